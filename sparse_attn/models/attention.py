"""Multi-head self-attention with rotary positions over any pattern."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from sparse_attn.masks import lower
from sparse_attn.models import short_conv as short_conv_lib
from sparse_attn.ops import pooled
from sparse_attn.ops.token_select import attend as select_lib
from sparse_attn.parallel import attention as parallel_lib
from sparse_attn.parallel import mesh as mesh_lib
from sparse_attn.parallel import whole_rows
from sparse_attn.patterns import per_head
from sparse_attn.selection import base as selection_base
from sparse_attn.selection import moba

SINK_LOGITS = (None, "learned")


def rope(
    x_BTNH: Float[jax.Array, "B T N H"],
    positions_BT: Int[jax.Array, "B T"],
    *,
    base: float = 10_000.0,
) -> Float[jax.Array, "B T N H"]:
    """Rotates queries or keys by their position.  [arXiv:2104.09864, sec. 3.2.2, eq. 15]

    Pair i is (x[i], x[i + H/2]) and turns by `positions * base ** (-2i / H)` radians; angles are
    float32 whatever the dtype of x. Scores then depend on differences of positions only.

    Raises:
      ValueError: the head dimension is odd.

    >>> x = jnp.ones((1, 2, 1, 2))
    >>> [round(y, 2) for y in rope(x, jnp.array([[0, 1]]))[0, 1, 0].tolist()]
    [-0.3, 1.38]
    """
    half = x_BTNH.shape[-1] // 2
    if x_BTNH.shape[-1] % 2:
        raise ValueError(f"head_dim={x_BTNH.shape[-1]} must be even for rotary positions")
    frequencies_H = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BTNH = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_H
    sin_BTNH, cos_BTNH = jnp.sin(angles_BTNH), jnp.cos(angles_BTNH)
    first, second = x_BTNH[..., :half].astype(jnp.float32), x_BTNH[..., half:].astype(jnp.float32)
    rotated = (first * cos_BTNH - second * sin_BTNH, second * cos_BTNH + first * sin_BTNH)
    return jnp.concatenate(rotated, -1).astype(x_BTNH.dtype)


class SelfAttention(nn.Module):
    """Self-attention [arXiv:1706.03762, sec. 3.2] with rotary positions and grouped KV heads.

    Parameters (float32): `query/kernel [D, N, H]`, `key/kernel` and `value/kernel [D, K, H]`,
    `out/kernel [N, H, D]`, `sink_logits [N]` when they are learned, `(query|key|value)_taps
    [W, N or K, H]` with a convolution, and what a selector trains.

    Attributes:
      num_heads, num_kv_heads, head_dim: N, K (which divides N) and H.
      pattern: what is visible: a `Pattern`, a `PerHead`, or anything else `attend` takes as mask.
        Heads with a pattern of coarser keys (`cross_grid`) see averages of keys and values. A
        `Selector` chooses from the rotated queries and keys, or has an `attend` of its own.
      block: tokens per block of the mask, along queries and keys; None = `attend` chooses. Smaller
        blocks follow a fine pattern more closely, larger ones suit the matrix units. A selector has
        blocks of its own, whatever this says.
      impl: backend of `attend`, or None for the best one here.
      tokens: how a row is split over the `seq` axis of the mesh, where there is one.
      dtype: of the computation.
      rope_base: slowest rotation, in positions; None = no rotary positions.
      logits_soft_cap: see `attend`; None = off.
      sink_logits: "learned" for one trained logit per head in the softmax denominator
        [arXiv:2508.10925, sec. 2.2], zero at the start; None = off.
      short_conv: W, tokens (itself included) that a causal convolution mixes into each query, key
        and value before they are rotated, see `short_conv.py`; None = off.
      out_scale: factor on the initial output projection; a deep model uses less than 1.

    >>> from sparse_attn.patterns import local
    >>> window = local.Local(window=4)
    >>> layer = SelfAttention(num_heads=4, num_kv_heads=2, head_dim=8, pattern=window)
    >>> x = jnp.ones((1, 16, 32))
    >>> out, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
    >>> out.shape
    (1, 16, 32)
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    pattern: Any
    block: int | None = None
    impl: str | None = None
    tokens: parallel_lib.Tokens = parallel_lib.Tokens()
    dtype: Any = jnp.float32
    rope_base: float | None = 10_000.0
    logits_soft_cap: float | None = None
    sink_logits: str | None = None
    short_conv: int | None = None
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[jax.Array, "B T D"],
        *,
        positions: Int[jax.Array, "B T"] | None = None,
        segment_ids: Int[jax.Array, "B T"] | None = None,
    ) -> Float[jax.Array, "B T D"]:
        """Attends; `positions` (default 0 .. T-1) only rotate: patterns see places in the row."""
        if self.sink_logits not in SINK_LOGITS:
            raise ValueError(f"sink_logits={self.sink_logits!r} must be one of {SINK_LOGITS}")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])

        def project(heads: int, name: str):
            return nn.DenseGeneral(
                (heads, self.head_dim),
                use_bias=False,
                dtype=self.dtype,
                kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
                name=name,
            )(x_BTD)

        q_BTNH = project(self.num_heads, "query")
        k_BTKH = project(self.num_kv_heads, "key")
        v_BTKH = project(self.num_kv_heads, "value")
        if self.short_conv is not None and self.tokens.order is not None:
            raise ValueError(
                f"short_conv={self.short_conv} must be None for tokens in another order"
            )
        q_BTNH, k_BTKH, v_BTKH = (
            short_conv_lib.convolved(self, x, name, segment_ids)
            for x, name in ((q_BTNH, "query"), (k_BTKH, "key"), (v_BTKH, "value"))
        )
        if self.rope_base is not None:
            q_BTNH = rope(q_BTNH, positions, base=self.rope_base)
            k_BTKH = rope(k_BTKH, positions, base=self.rope_base)
        sinks_N = None
        if self.sink_logits == "learned":
            sinks_N = self.param("sink_logits", nn.initializers.zeros, (self.num_heads,))
        if pooled.is_pooled(self.pattern):
            if segment_ids is not None:
                raise ValueError(f"segment_ids must be None for pooled keys, {self.pattern!r}")
            attend = functools.partial(pooled.attend_pooled, mask=self.pattern, block=self.block)
        elif isinstance(self.pattern, selection_base.OwnAttention) and self.pattern.causal:
            attend = self._own_attention(segment_ids, sinks_N)
        elif self._by_lists(sinks_N):
            attend = self._list_attention(segment_ids)
        else:
            mask = self._mask(q_BTNH, k_BTKH, segment_ids)
            attend = functools.partial(
                parallel_lib.attend, mask=mask, segment_ids=segment_ids, tokens=self.tokens
            )
        out_BTNH = attend(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            logits_soft_cap=self.logits_soft_cap,
            sink_logits=sinks_N,
            impl=self.impl,
        )
        return nn.DenseGeneral(
            x_BTD.shape[-1],
            axis=(-2, -1),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(self.out_scale**2, "fan_in", "normal"),
            name="out",
        )(out_BTNH)

    def _own_attention(self, segment_ids, sinks_N):
        for name, value in (("logits_soft_cap", self.logits_soft_cap), ("sink_logits", sinks_N)):
            if value is not None:
                raise ValueError(f"{name} must be None for {self.pattern.expression()}")
        if self.tokens.order is not None or mesh_lib.current() is not None:
            raise NotImplementedError(f"{self.pattern.expression()}: on one device only")
        options = {"segment_ids": segment_ids}
        if params := self._rule_params():
            options["params"] = params
        return lambda q, k, v, **_: self.pattern.attend(q, k, v, **options)

    def _by_lists(self, sinks_N):
        # The choice of a mask of single queries (but for near ties on GPUs, see `Moba.lists`), in
        # less memory and time; what this op does not have runs by the mask.
        return (
            isinstance(self.pattern, moba.Moba)
            and self.pattern.as_lists
            and self.logits_soft_cap is None
            and sinks_N is None
            and whole_rows.fits(self.num_kv_heads)
        )

    def _list_attention(self, segment_ids):
        def attend(arrays, segment_ids):
            q, k, v = arrays
            return select_lib.attend(
                q, k, v, selected=self.pattern.lists(q, k, segment_ids=segment_ids),
                block=self.pattern.block_kv, segment_ids=segment_ids,
                **select_lib.backend_of(self.impl),
            )  # fmt: skip

        return lambda q, k, v, **_: whole_rows.run(attend, (q, k, v), segment_ids)

    def _rule_params(self):
        start = self.pattern.params_like(self.num_heads, self.num_kv_heads, self.head_dim)
        return {name: self.param(name, lambda _, x=x: jnp.asarray(x)) for name, x in start.items()}

    def _mask(self, q_BTNH, k_BTKH, segment_ids):
        pattern, length = self.pattern, q_BTNH.shape[1]
        if isinstance(pattern, selection_base.Selector):
            params = self._rule_params()
            return pattern.select(q_BTNH, k_BTKH, segment_ids=segment_ids, params=params)
        if self.block is None:
            return pattern
        if isinstance(pattern, per_head.PerHead):
            pattern = pattern.for_heads(self.num_heads)
        return lower.lower(pattern, q_len=length, block_q=self.block, block_kv=self.block)
