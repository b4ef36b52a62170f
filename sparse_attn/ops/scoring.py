"""The parts of block selection: pooling, scores of few tokens, and choices under a budget."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparse_attn.ops import tiles

_AT_ONCE = 1 << 22  # Numbers in the largest array of a step, 16 MB.
_LEAST = float(np.finfo(np.float32).min)


@tiles.one_program
def top_k(
    scores: Float[Array, "*B n"], k: Any, candidates: Bool[Any, "*#B #n"]
) -> Bool[Array, "*B n"]:
    """The k best candidates of the last axis; of equals, those with the lower index.

    `k` is an int, or integers that broadcast against the axes before the last, with a 1 for it.

    >>> top_k(jnp.array([1.0, 3, 3, 0]), 2, jnp.array([True] * 3 + [False])).tolist()
    [False, True, True, False]
    """
    return (_ranks(_order_key(scores, candidates)) < k) & candidates


@tiles.one_program
def top_p(
    scores: Float[Array, "*B n"],
    p: Any,
    candidates: Bool[Any, "*#B #n"],
    guard: Bool[Any, "*#B #n"] | None = None,
) -> Bool[Array, "*B n"]:
    """The smallest set of candidates with at least `p` of `softmax(scores)`, `guard` in it.

    Of equals, those with the lower index. `p` as `k` in `top_k`; 1 keeps all candidates.

    >>> x = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    >>> top_p(x, 0.6, jnp.ones(4, bool)).tolist()
    [False, True, False, True]
    """
    share = mass(scores, candidates)
    key = _order_key(scores, candidates)
    if guard is not None:
        key = jnp.where(guard & candidates, jnp.inf, key)
    ordered = jnp.take_along_axis(share, jnp.argsort(-key, axis=-1, stable=True), -1)
    # All whose sum with those before them is too small, and the one that makes it enough. Rounding
    # must not let p = 1 drop a block.
    short = (jnp.cumsum(ordered, -1) < p).sum(-1, keepdims=True)
    kept = (_ranks(key) <= short) | (jnp.asarray(p) >= 1)
    return (kept if guard is None else kept | guard) & candidates


@tiles.one_program
def mass(scores: Float[Array, "*B n"], candidates: Bool[Any, "*#B #n"]) -> Float[Array, "*B n"]:
    """`softmax(scores)` over the candidates of the last axis; 0 where there are none."""
    key = _order_key(scores, candidates)
    weights = jnp.exp(key - jnp.maximum(key.max(-1, keepdims=True), _LEAST))
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)


def _order_key(scores, candidates):
    """Scores without nan, -inf for what is no candidate: no candidate comes after one of those."""
    finite = jnp.clip(jnp.where(jnp.isnan(scores), _LEAST, scores), _LEAST, -_LEAST)
    return jnp.where(candidates, finite, -jnp.inf)


def _ranks(key):
    """Place of each entry in the order of descending keys, equals in the order of their index."""
    return jnp.argsort(jnp.argsort(-key, axis=-1, stable=True), axis=-1, stable=True)


def share_document(q_ranges, kv_ranges) -> Bool[Array, "B nq nk"]:
    """Whether blocks, by the ranges of their segment ids, may have tokens of one document."""
    (q_low, q_high, _), (kv_low, kv_high, _) = q_ranges, kv_ranges
    return (q_low[:, :, None] <= kv_high[:, None]) & (kv_low[:, None] <= q_high[:, :, None])


@tiles.one_program
def pool(
    x: Float[Array, "B T N H"], block: int, real: Bool[Any, "#B T"]
) -> Float[Array, "B n N H"]:
    """Means over the real tokens of each block, float32; 0 where a block has none.

    >>> x = jnp.arange(5.0).reshape(1, 5, 1, 1)
    >>> pool(x, 2, np.array([[True, True, True, True, True]])).ravel().tolist()
    [0.5, 2.5, 4.0]
    """
    sums = blocked(jnp.where(real[:, :, None, None], x.astype(jnp.float32), 0), block).sum(2)
    counts = blocked(jnp.asarray(real), block).sum(2)
    return sums / jnp.maximum(counts, 1)[:, :, None, None]


@tiles.one_program
def blocked(x: Array, block: int) -> Array:
    """`[B, T, ...]` as `[B, n, block, ...]`, zeros past the end.

    >>> blocked(jnp.ones((1, 5)), 2).tolist()
    [[[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]]]
    """
    extra = -x.shape[1] % block
    x = jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])


@tiles.one_program
def logits(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], scale: float | None = None
) -> Float[Array, "B N T S"]:
    """`q @ k.T * scale` (default `H ** -0.5`) in float32, of pooled or few tokens only."""
    batch, length, heads, dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, dim)
    precision = "highest" if q.dtype == jnp.float32 else None
    out = jnp.einsum(
        "BTKGH,BSKH->BKGTS", grouped, k.astype(q.dtype), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return out.reshape(batch, heads, length, -1) * (dim**-0.5 if scale is None else scale)


def by_rows(f: Callable[..., Any], rows: Any, *, elements: int) -> Any:
    """`f` on each entry of the first axis of `rows`, several at once while they stay small.

    Args:
      elements: numbers in the largest array that one call of `f` makes.

    >>> by_rows(lambda x: x.sum(), jnp.ones((3, 4)), elements=4).tolist()
    [4.0, 4.0, 4.0]
    """
    return jax.lax.map(f, rows, batch_size=max(1, _AT_ONCE // max(elements, 1)))
