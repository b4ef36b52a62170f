"""Native sparse attention: compressed keys, blocks chosen by them, and a window, behind gates."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_attn.masks import block_mask
from sparse_attn.models import attention
from sparse_attn.models import short_conv as short_conv_lib
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops.token_select import attend as select_lib
from sparse_attn.ops.token_select import compress as compress_lib
from sparse_attn.parallel import attention as parallel_lib
from sparse_attn.parallel import whole_rows
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import local as local_lib
from sparse_attn.selection import base

BRANCHES = ("compressed", "selected", "window")
COMPRESSIONS = ("mlp", "mean")
GATES = ("learned", "none")
KEYS = ("per_branch", "shared")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nsa(base.Selector):
    """Native sparse attention  [arXiv:2502.11089, sec. 3]; `layer` gives its Linen module.

    Each query attends to compressed blocks of all keys before it, to the tokens of the blocks that
    get most weight among the compressed ones (one choice for the query heads of a KV head), and to
    a window; gates of the query's own input weigh the three. The defaults are the paper's.

    Attributes:
      block_kv: tokens per block that is selected, a multiple of `stride`.
      top_k: selected blocks of a query, `initial` and `local` included.
      initial, local: blocks always selected: the first of the document, and the last ones up to the
        query's own.
      window: tokens of the window, the query included.
      compress_block, stride: tokens per compressed key, and from one to the next, which divides
        `compress_block`.
      compress: "mlp" of a block's keys (values) with learned positions inside the block, or "mean".
      branches: those that run, of "compressed", "selected" and "window". The selection needs
        compressed keys in any case.
      gates: "learned", sigmoid gates per head by an MLP; or "none", a plain sum.
      gate_dim: hidden width of the gates' MLP; None = the head dimension.
      keys: "per_branch" projects keys and values for each branch [sec. 3.3.3]; "shared" has the
        parameters of dense attention, so that its weights serve both.

    Raises:
      ValueError: a field is out of its range.

    >>> Nsa(block_kv=32, stride=16, window=64).expression()
    'nsa(block_kv=32, window=64)'
    """

    block_q: int = 1
    block_kv: int = 64
    always: patterns_base.Pattern | None = None
    top_k: int = 16
    initial: int = 1
    local: int = 2
    window: int = 512
    compress_block: int = 32
    stride: int = 16
    compress: str = "mlp"
    branches: tuple[str, ...] = BRANCHES
    gates: str = "learned"
    gate_dim: int | None = None
    keys: str = "per_branch"

    def _check_blocks(self):
        for name in ("top_k", "window", "compress_block", "stride"):
            patterns_base.check_int(name, getattr(self, name))
        for name in ("initial", "local"):
            patterns_base.check_int(name, getattr(self, name), least=0)
        if self.gate_dim is not None:
            patterns_base.check_int("gate_dim", self.gate_dim)
        for name, choices in (("compress", COMPRESSIONS), ("gates", GATES), ("keys", KEYS)):
            patterns_base.check_choice(name, getattr(self, name), choices)
        self._check_fixed(block_q=1, always=None, pattern=base.CAUSAL)
        for name in ("block_kv", "compress_block"):
            if getattr(self, name) % self.stride:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a multiple of stride={self.stride}"
                )
        if self.compress_block > self.block_kv:
            raise ValueError(
                f"compress_block={self.compress_block} must be <= block_kv={self.block_kv}"
            )
        if self.top_k < self.initial + self.local:
            raise ValueError(
                f"top_k={self.top_k} must be >= initial + local = {self.initial + self.local}"
            )
        unknown = set(self.branches) - set(BRANCHES)
        if unknown or not self.branches or len(set(self.branches)) < len(self.branches):
            raise ValueError(f"branches={self.branches} must be one or more of {BRANCHES}")

    @property
    def strides(self) -> compress_lib.Strides:
        """Where compressed keys lie."""
        return compress_lib.Strides(self.compress_block, self.stride)

    def keep(self, q, k, blocks):
        raise NotImplementedError("nsa runs as a layer of its own: `layer(...)`")

    def most_keys(self, length: int) -> int:
        """Keys that the last query of a row reads at most, compressed ones included."""
        keys = {
            "compressed": self.strides.count(length),
            "selected": self.top_k * self.block_kv,
            "window": self.window,
        }
        return sum(keys[name] for name in self.branches)

    def cache_per_token(self, length: int, *, num_kv_heads: int, head_dim: int) -> float:
        """Numbers that a layer keeps to decode after `length` tokens, per token of these.

        Of the compressed branch only what it compressed: the tokens of a block that is not full
        yet, at most `compress_block - 1`, are left out. A window forgets the tokens that left it.

        >>> rule = Nsa(window=4, compress_block=4, stride=4, block_kv=4)
        >>> rule.cache_per_token(8, num_kv_heads=1, head_dim=2)  # 2 + 8 + 4 keys and values
        7.0
        """
        sizes = self._numbers(num_kv_heads, head_dim)
        return sum(sizes[name] * n for name, n in self._kept(length).items()) / length

    def _numbers(self, num_kv_heads, head_dim):
        """Numbers of one entry of the cache of each branch."""
        return dict.fromkeys(BRANCHES, 2 * num_kv_heads * head_dim)

    def _kept(self, length):
        """Entries in the cache of each branch that runs."""
        branches = set(self.branches)
        if "selected" in branches:
            branches.add("compressed")  # They choose.
            if self.keys == "shared":
                branches.discard("window")
        kept = {
            "compressed": max(0, length - self.compress_block + self.stride) // self.stride,
            "selected": length,
            "window": min(length, self.window),
        }
        return {name: kept[name] for name in branches}

    @property
    def _shapes(self):
        """What the names and shapes of the parameters follow from, beside the sizes of a model."""
        return (
            self.branches, self.compress, self.compress_block, self.gates, self.gate_dim, self.keys
        )  # fmt: skip

    def includes(self, other: patterns_base.Expression) -> bool:
        """True if this layer has the parameters of a layer with `other`, so that they alternate.

        >>> Nsa(top_k=8).includes(Nsa()), Nsa(keys="shared").includes(Nsa())
        (True, False)
        """
        if not hasattr(other, "layer"):
            return True  # Those of `SelfAttention`.
        return type(other) is type(self) and other._shapes == self._shapes

    def at_most(self, q_len: int, kv_len: int | None = None) -> block_mask.BlockMask:
        """A window with as many keys as a query reads at most, for counting."""
        return base.window_of(self.most_keys(q_len), q_len, kv_len)

    def layer(self, **fields: Any) -> nn.Module:
        """The module, with the fields of `SelfAttention` beside its `pattern`.

        Raises:
          ValueError: a field is set that this attention does not have.
        """
        for name in ("logits_soft_cap", "sink_logits"):
            if fields.pop(name, None) is not None:
                raise ValueError(f"{name} must be None for {self.expression()}")
        fields.pop("block", None)  # Of masks; selected blocks are `block_kv`.
        return self._module(rule=self, **fields)

    @property
    def _module(self):
        return NativeSparseAttention


class NativeSparseAttention(nn.Module):
    """Self-attention by an `Nsa` with rotary positions and grouped KV heads.

    Parameters (float32): those of `SelfAttention`, whose keys and values are the selected branch's;
    `key_<branch>` and `value_<branch>` `[D, K, H]` of the others (keys="per_branch"); of the
    compression `<key|value>_positions [l, H]`, `<key|value>_compress_in [l, H, H]` and
    `.._out [H, H]` ("mlp"); of the gates `gate_in [D, F]` and `gate_out [F, N, 3]`; with
    `short_conv` `<projection>_taps [W, N or K, H]`.

    Compressed keys are made of rotated ones.

    Attributes:
      rule: the `Nsa`.
      num_heads, num_kv_heads, head_dim, impl, tokens, dtype, rope_base, out_scale, short_conv: as
        of `SelfAttention`; `impl` runs all branches, and each branch's keys have taps of their own.

    >>> import jax
    >>> rule = Nsa(block_kv=8, top_k=3, window=8, compress_block=4, stride=4)
    >>> layer = rule.layer(num_heads=4, num_kv_heads=2, head_dim=8)
    >>> out, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 20, 32)))
    >>> out.shape
    (1, 20, 32)
    """

    rule: Nsa
    num_heads: int
    num_kv_heads: int
    head_dim: int
    impl: str | None = None
    tokens: parallel_lib.Tokens = parallel_lib.Tokens()
    dtype: Any = jnp.float32
    rope_base: float | None = 10_000.0
    out_scale: float = 1.0
    short_conv: int | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends; `positions` (default 0 .. T-1) only rotate, as in `SelfAttention`."""
        if self.tokens.order is not None:
            raise NotImplementedError("nsa: the tokens of a row must be in their order")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
        q_BTNH, keys = self._projected(x_BTD, positions, segment_ids)
        outs = self._branches(q_BTNH, keys, segment_ids)
        out_BTNH = self._gated(x_BTD, outs)
        return nn.DenseGeneral(
            x_BTD.shape[-1], axis=(-2, -1), use_bias=False, dtype=self.dtype, name="out",
            kernel_init=nn.initializers.variance_scaling(self.out_scale**2, "fan_in", "normal"),
        )(out_BTNH)  # fmt: skip

    def _project(self, x_BTD, heads, dim, name):
        return nn.DenseGeneral(
            (heads, dim), use_bias=False, dtype=self.dtype, name=name,
            kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
        )(x_BTD)  # fmt: skip

    def _rotate(self, x, positions):
        if self.rope_base is None:
            return x
        return attention.rope(x, positions, base=self.rope_base)

    def _projected(self, x_BTD, positions, segment_ids):
        """Queries `[B, T, N, H]`, and keys and values `[B, T, K, H]` of the branches by name."""

        def project(heads, name):
            x = self._project(x_BTD, heads, self.head_dim, name)
            return short_conv_lib.convolved(self, x, name, segment_ids)

        def keys_of(branch):
            name = "" if branch == "selected" else f"_{branch}"
            k, v = (project(self.num_kv_heads, f"{kind}{name}") for kind in ("key", "value"))
            return self._rotate(k, positions), v

        q_BTNH = project(self.num_heads, "query")
        keys = {"selected": keys_of("selected")}
        for branch in ("compressed", "window"):
            shared = self.rule.keys == "shared"
            keys[branch] = keys["selected"] if shared else keys_of(branch)
        return self._rotate(q_BTNH, positions), keys

    def _branches(self, q, keys, segment_ids):
        """The outputs `[B, T, N, H]` of the branches that run, by name."""
        needed = {*self.rule.branches}
        if "selected" in needed:
            needed.add("compressed")
        arrays = {name: keys[name] for name in needed}
        if "compressed" in needed:
            arrays["compressed"] = tuple(
                self._compressed(x, name)
                for x, name in zip(keys["compressed"], ("key", "value"), strict=True)
            )
        outs, selected = whole_rows.run(self._attend, (q, arrays), segment_ids)
        if selected is not None:
            self.sow("intermediates", "selected", selected)
        return outs

    def _attend(self, arrays, segment_ids):
        """Outputs of the branches by name, and the selected blocks; of some rows and heads."""
        (q, keys), rule, outs, selected = arrays, self.rule, {}, None
        scale = self.head_dim**-0.5  # Queries may be longer than heads, see `nsa_latent`.
        if "compressed" in keys:
            ids = segment_ids
            if ids is not None:
                ids = (ids, rule.strides.documents(ids))
            outs["compressed"], lse = attend_lib.attend(
                q, *keys["compressed"], mask=rule.strides, segment_ids=ids, scale=scale,
                return_lse=True, impl=self.impl,
            )  # fmt: skip
        if "selected" in keys:
            selected = compress_lib.choose_blocks(
                q, keys["compressed"][0], lse, strides=rule.strides, block=rule.block_kv,
                top_k=rule.top_k, initial=rule.initial, local=rule.local, segment_ids=segment_ids,
                scale=scale,
            )  # fmt: skip
            outs["selected"] = select_lib.attend(
                q, *keys["selected"], selected=selected, block=rule.block_kv,
                segment_ids=segment_ids, scale=scale, **select_lib.backend_of(self.impl),
            )  # fmt: skip
        if "window" in keys:
            outs["window"] = attend_lib.attend(
                q, *keys["window"], mask=local_lib.Local(window=rule.window),
                segment_ids=segment_ids, scale=scale, impl=self.impl,
            )  # fmt: skip
        return {name: outs[name] for name in rule.branches}, selected

    def _compressed(self, x_BSKH, name):
        """One key (value) per block of `compress_block` tokens, `[B, n, K, H]`.  [eq. 7]"""
        x_BnlKH = self.rule.strides.windows(x_BSKH)
        if self.rule.compress == "mean":
            return x_BnlKH.astype(jnp.float32).mean(2).astype(self.dtype)
        size, width = self.rule.compress_block, x_BSKH.shape[-1]
        normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1))
        places = self.param(f"{name}_positions", nn.initializers.normal(0.02), (size, width))
        into = self.param(f"{name}_compress_in", normal, (size, width, width))
        out = self.param(f"{name}_compress_out", nn.initializers.lecun_normal(), (width, width))
        x_BnlKH = x_BnlKH + places[:, None].astype(self.dtype)
        hidden = nn.gelu(jnp.einsum("BnlKH,lHF->BnKF", x_BnlKH, into.astype(self.dtype)))
        return jnp.einsum("BnKF,FH->BnKH", hidden, out.astype(self.dtype))

    def _gated(self, x_BTD, outs):
        """The weighted sum of the branches.  [eq. 5]"""
        if self.rule.gates == "none":
            return sum(outs.values())
        hidden = self.rule.gate_dim or self.head_dim
        init = nn.initializers.lecun_normal()
        into = self.param("gate_in", init, (x_BTD.shape[-1], hidden))
        out = self.param("gate_out", nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2)),
                         (hidden, self.num_heads, len(BRANCHES)))  # fmt: skip
        hidden_BTF = nn.silu(x_BTD @ into.astype(self.dtype))
        gates = jnp.einsum("BTF,FNc->cBTN", hidden_BTF, out.astype(self.dtype))
        gates = nn.sigmoid(gates.astype(jnp.float32)).astype(self.dtype)[..., None]
        self.sow("intermediates", "gates", gates)
        return sum(gates[BRANCHES.index(name)] * x for name, x in outs.items())


EXAMPLES = (
    Nsa(block_kv=8, top_k=3, window=8, compress_block=4, stride=2),
    Nsa(
        block_kv=16, top_k=2, initial=0, local=1, window=16, compress_block=8, stride=8,
        compress="mean", keys="shared",
    ),
)  # fmt: skip
