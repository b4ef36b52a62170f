"""The attention layers of the recall study, as dense attention under a mask.

At 256 tokens and less a T x T mask is small, and dense attention under it is the same function as
the sparse kernels compute; it can be batched over runs by `jax.vmap`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn import patterns
from sparse_attn.models import short_conv
from sparse_attn.models.mixers import nsa
from sparse_attn.ops.token_select import compress
from sparse_attn.patterns import base
from sparse_attn.selection import base as selection

FIRST_LAYERS = ("convolution", "attention")
# The static patterns first: they share one program. Blocks of 8 tokens are four pairs.
METHODS = {
    "full": "causal()",
    "window 16": "local(window=16)",
    "window 64": "local(window=64)",
    "dilated": "local(window=4) | dilated(window=16, dilation=4)",
    "BigBird": "causal() & (local(window=16) | global_tokens(tokens=8) "
    "| random_blocks(block=8, num_blocks=1, seed=0))",
    "sinks + window 16": "local(window=16) | sinks(tokens=4)",
    "MoBA": "moba(block_kv=8, top_k=3)",
    "pooled top-k": "pooled(block_q=8, block_kv=8, top_k=3)",
    "NSA": "nsa(block_kv=8, top_k=5, initial=0, local=1, window=16, compress_block=8, stride=8)",
}


def rule_of(method: str) -> Any:
    """The pattern or selector of a method.

    >>> rule_of("window 16")
    Local(window=16, reach=None)
    """
    return patterns.parse(METHODS[method])


def is_static(rule: Any) -> bool:
    """True for a pattern, whose mask is known before any query."""
    return isinstance(rule, base.Pattern)


def mask_of(rule: Any, length: int) -> np.ndarray:
    """The bool mask `[T, T]` of a pattern; of a selector, what it may choose from.

    >>> mask_of(rule_of("window 16"), 64).sum(1).max().item()
    16
    """
    pattern = rule if is_static(rule) else rule.pattern
    at = np.arange(length, dtype=np.int32)
    return np.broadcast_to(pattern.mask_fn(at[:, None], at), (length, length))


def attend(q: Any, k: Any, v: Any, mask: Any) -> tuple[jax.Array, jax.Array]:
    """Output `[B, T, N, H]` and lse `[B, T, N]`; products in q's dtype, softmax in float32.

    `mask` is bool and broadcasts to `[B, N, T, S]`; a query that sees nothing gets 0 and -inf.
    """
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask, logits * q.shape[-1] ** -0.5, -1e30)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(logits - top), 0)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("BNTS,BSNH->BTNH", (weights / jnp.maximum(total, 1e-30)).astype(q.dtype), v)
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), -jnp.inf)
    return out, lse[..., 0].swapaxes(1, 2)


def at_places(x: jax.Array, places: jax.Array) -> jax.Array:
    """What of `x [B, T, ...]` stands at `places [B, P]`.

    >>> at_places(jnp.arange(6).reshape(1, 6), jnp.array([[4, 1]])).tolist()
    [[4, 1]]
    """
    return jax.vmap(lambda row, at: row[at])(x, places)


def chosen(rule: selection.Selector, q: Any, k: Any, mask: Any, places: Any) -> jax.Array:
    """The bool mask `[B, N, P, T]` of what a selector chooses for the queries at `places [B, P]`.

    Args:
      rule: the selector.
      q, k: all queries and keys `[B, T, N, H]`: a block of queries may choose together.
      mask: bool `[T, T]`, what may be chosen.
      places: of the queries whose choice is returned.
    """
    length = q.shape[1]
    table = rule.select(q, k)
    # Lists made at run time have room for all blocks in each row.
    lists = table.kv_indices.reshape(*table.kv_counts.shape, -1)
    lists = at_places(jnp.moveaxis(lists, 1, 2), places // rule.block_q)
    kept = (lists[..., None] == jnp.arange(table.num_cols)).any(-2)
    kept = jnp.repeat(kept, rule.block_kv, 3)[..., :length]
    return jnp.moveaxis(kept, 2, 1) & mask[places][:, None]


class Attention(nn.Module):
    """Multi-head attention under `mask [T, T]`, or under what `rule` chooses from it.

    Returns `[B, P, D]`, for the queries at `places [B, P]`.
    """

    rule: Any
    num_heads: int
    dtype: Any
    out_scale: float

    @nn.compact
    def __call__(self, x, mask, places):
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        init = nn.initializers.variance_scaling
        query, key, value = (
            nn.DenseGeneral(
                heads, use_bias=False, dtype=self.dtype, name=name,
                kernel_init=init(1.0, "fan_in", "normal"),
            )
            for name in ("query", "key", "value")
        )  # fmt: skip
        k, v = key(x), value(x)
        if self.rule is None:
            q, seen = query(at_places(x, places)), mask[places][:, None]
        else:
            q = query(x)
            q, seen = at_places(q, places), chosen(self.rule, q, k, mask, places)
        out, _ = attend(q, k, v, seen)
        return nn.DenseGeneral(
            x.shape[-1], axis=(-2, -1), use_bias=False, dtype=self.dtype, name="out",
            kernel_init=init(self.out_scale**2, "fan_in", "normal"),
        )(out)  # fmt: skip


class DenseNsa(nsa.NativeSparseAttention):
    """`NativeSparseAttention` with its branches as dense attention, for the queries at `places`.

    Of the output `[B, T, D]` only what stands at `places` means something.
    """

    places: Any = None  # [B, P]

    def _branches(self, q, keys, segment_ids):
        rule, length, at = self.rule, q.shape[1], jnp.arange(q.shape[1])
        k, v = (
            self._compressed(x, name)
            for x, name in zip(keys["compressed"], ("key", "value"), strict=True)
        )
        ends = rule.strides.mask_fn(at[:, None], jnp.arange(k.shape[1]))
        compressed, lse = attend(q, k, v, ends)
        selected = compress.choose_blocks(
            q, k, lse, strides=rule.strides, block=rule.block_kv, top_k=rule.top_k,
            initial=rule.initial, local=rule.local,
        )  # fmt: skip
        blocks = (selected[..., None] == jnp.arange(-(-length // rule.block_kv))).any(-2)
        blocks = at_places(blocks, self.places).swapaxes(1, 2)
        kept = jnp.repeat(blocks, rule.block_kv, -1)[..., :length]
        back = (self.places[..., None] - at)[:, None]
        q = at_places(q, self.places)
        rows = jnp.arange(q.shape[0])[:, None]
        outs = {
            "selected": attend(q, *keys["selected"], kept & (back >= 0))[0],
            "window": attend(q, *keys["window"], (back >= 0) & (back < rule.window))[0],
        }
        outs = {n: jnp.zeros_like(compressed).at[rows, self.places].set(x) for n, x in outs.items()}
        return outs | {"compressed": compressed}


class Convolution(nn.Module):
    """A convolution of 3 tokens times a projection: the BaseConv of arXiv:2312.04927."""

    dtype: Any
    out_scale: float

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        taps = self.param("taps", short_conv.init, (3, 1, width))
        gate = nn.Dense(
            width, dtype=self.dtype, name="gate", bias_init=nn.initializers.ones,
            kernel_init=nn.initializers.variance_scaling(self.out_scale**2, "fan_in", "normal"),
        )(x)  # fmt: skip
        return short_conv.short_conv(x[:, :, None], taps)[:, :, 0] * gate


class Recaller(nn.Module):
    """The small models of Zoology and Based: two layers, no MLP, tied output.

    With `first_layer="attention"` both are attention, and places are added to tokens
    [arXiv:2312.04927, app. E]; with "convolution" the first is `Convolution`, which puts what stood
    before a token into it, and attention needs no places [arXiv:2402.18668, fig. 2].

    Returns the logits `[B, P, V]` at `places [B, P]` only: nothing else is asked for, so the last
    layer runs for these queries only.
    """

    rule: Any
    vocab_size: int
    width: int
    num_layers: int = 2
    num_heads: int = 1
    dtype: Any = jnp.bfloat16
    first_layer: str = "attention"

    @nn.compact
    def __call__(self, tokens, places, mask):
        if self.first_layer not in FIRST_LAYERS:
            raise ValueError(f"first_layer={self.first_layer!r} must be one of {FIRST_LAYERS}")
        # Tokens enter with entries of size 1, as large as what a layer adds to them.
        init, scale = nn.initializers.normal(self.width**-0.5), (2 * self.num_layers) ** -0.5
        table = self.param("embedding", init, (self.vocab_size, self.width))
        x = table[tokens]
        convolution = self.first_layer == "convolution"
        if not convolution:
            x = x + self.param("positions", init, (tokens.shape[1], self.width))
        x = (x * self.width**0.5).astype(self.dtype)
        everywhere = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        for i in range(self.num_layers):
            h = nn.LayerNorm(dtype=self.dtype, name=f"norm_{i}")(x)
            if convolution and i == 0:
                x = x + Convolution(self.dtype, scale, name=f"mixer_{i}")(h)
                continue
            asked = everywhere
            if i == self.num_layers - 1:
                asked, x = places, at_places(x, places)
            if isinstance(self.rule, nsa.Nsa):
                layer = DenseNsa(
                    rule=self.rule, num_heads=self.num_heads, num_kv_heads=self.num_heads,
                    head_dim=self.width // self.num_heads, rope_base=None, dtype=self.dtype,
                    out_scale=scale, places=asked, name=f"mixer_{i}",
                )  # fmt: skip
                x = x + at_places(layer(h), asked)
            else:
                layer = Attention(self.rule, self.num_heads, self.dtype, scale, name=f"mixer_{i}")
                x = x + layer(h, mask, asked)
        x = nn.LayerNorm(dtype=self.dtype, name="final_norm")(x)
        return jnp.einsum(
            "BPD,VD->BPV", x, table.astype(self.dtype), preferred_element_type=jnp.float32
        )
