"""Causal attention of every query to the best keys so far, by a score that keys have themselves."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparse_attn.ops import scoring, softmax, tiles


@tiles.one_program
def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    scores: Float[Array, "B T K"],
    keep: int,
    segment_ids: Int[Array, "B T"] | None = None,
    block: int = 128,
) -> Float[Array, "B T N Hv"]:
    """Softmax of `q @ k.T * H ** -0.5 + scores` over the `keep` keys with the highest scores.

    [arXiv:2508.02124] Of the keys up to the query, in the query's document; of equal scores, the
    earlier keys. Differentiable in q, k, v and scores; no gradient goes through the choice.

    As a score does not depend on the query, a key that is overtaken never returns. So the keys of
    a block of queries are among the best `keep` before it and its own: queries go by in blocks with
    those at hand, dense products of `block x (keep + block)`, and nothing else is read. The work is
    T * (keep + block), and no array grows as T x T.

    Args:
      keep: keys per query.
      segment_ids: packed documents, runs of equal ids; 0 = padding, whose output is 0.
      block: queries at a time.

    >>> q = k = jnp.zeros((1, 4, 1, 2))
    >>> v = jnp.array([1.0, 2, 3, 4]).reshape(1, 4, 1, 1)
    >>> scores = jnp.log(jnp.array([3.0, 1, 3, 1])).reshape(1, 4, 1)
    >>> attend(q, k, v, scores=scores, keep=2).ravel().tolist()
    [1.0, 1.25, 2.0, 2.0]
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    dtype = softmax.operand_dtype(q.dtype)
    by_head = [jnp.moveaxis(x, 2, 1) for x in (k, v, scores.astype(jnp.float32))]
    at_batch, at_head = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[:, None]

    @jax.checkpoint
    def step(best, xs):
        q, positions, ids = xs
        own = jnp.broadcast_to(positions, (batch, kv_heads, block))
        taken = jnp.concatenate([best, own], -1)
        taken = jnp.where(taken < length, taken, -1)
        at = jnp.maximum(taken, 0)
        some_k, some_v, some_scores = (x[at_batch, at_head, at] for x in by_head)
        their_ids = jnp.where(taken >= 0, segment_ids[at_batch, at], 0)
        order = _order(some_scores, taken >= 0)
        visible = (taken[:, :, None] <= positions[:, None]) & (ids[:, None, :, None] != 0)
        visible = visible & (their_ids[:, :, None] == ids[:, None, :, None])
        kept = _first(visible, order, keep)
        grouped = q.reshape(batch, block, kv_heads, -1, dim)
        z = softmax.dot("bckgh,bkmh->bkgcm", grouped, some_k, dtype) * dim**-0.5
        z = z + some_scores[:, :, None, None]
        weights, _ = softmax.masked(z, kept[:, :, None])
        out = softmax.dot("bkgcm,bkmh->bckgh", weights, some_v, dtype)
        # What the next queries may still want: the best of the last query's document.
        left = (their_ids == ids[:, None, -1:]) & (their_ids != 0)
        ordered = jnp.take_along_axis(jnp.where(left, taken, -1), order, -1)
        first = jnp.argsort(ordered < 0, axis=-1, stable=True)[..., :keep]
        return jnp.take_along_axis(ordered, first, -1), out.reshape(batch, block, heads, -1)

    pieces = [jnp.moveaxis(scoring.blocked(x, block), 1, 0) for x in (q, segment_ids)]
    positions = jnp.arange(pieces[0].shape[0] * block, dtype=jnp.int32).reshape(-1, block)
    start = jnp.full((batch, kv_heads, keep), -1, jnp.int32)
    _, out = jax.lax.scan(step, start, (pieces[0], positions, pieces[1]))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, v.shape[-1])
    return out[:, :length].astype(q.dtype)


def _order(scores, real):
    """Places by descending score, equals as they are: those at hand before later ones."""
    key = jnp.where(real, jax.lax.stop_gradient(scores), -jnp.inf)
    return jnp.argsort(-key, axis=-1, stable=True)


def _first(
    visible: Bool[Array, "B K C m"], order: Int[Array, "B K m"], count: int
) -> Bool[Array, "B K C m"]:
    """Which of the visible places are among the first `count` of them in `order`."""
    ordered = jnp.take_along_axis(visible, order[:, :, None], -1)
    kept = ordered & (jnp.cumsum(ordered, -1, dtype=jnp.int32) <= count)
    back = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(kept, back[:, :, None], -1)
