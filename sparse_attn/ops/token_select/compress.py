"""Keys compressed block by block, attention to them, and blocks chosen by its weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_attn.ops import scoring, tiles
from sparse_attn.ops.token_select import lists
from sparse_attn.patterns import base


@dataclasses.dataclass(frozen=True)
class Strides(base.Pattern):
    """A query sees compressed key i once tokens `i * stride .. i * stride + size - 1` are past.

    [arXiv:2502.11089, eq. 7] The query itself may be the last of them.

    >>> Strides(size=4, stride=2).mask_fn(np.arange(7)[:, None], np.arange(2)[None]).astype(int).T
    array([[0, 0, 0, 1, 1, 1, 1],
           [0, 0, 0, 0, 0, 1, 1]])
    """

    size: int
    stride: int

    def mask_fn(self, q_pos, kv_pos):
        return kv_pos * self.stride + (self.size - 1) <= q_pos

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        empty = kv_lo * self.stride + (self.size - 1) > q_hi - 1
        full = (kv_hi - 1) * self.stride + (self.size - 1) <= q_lo
        return base.state_of(empty, full)

    @property
    def may_be_empty(self) -> bool:
        return True

    def count(self, length: int) -> int:
        """Compressed keys of `length` tokens; at least one, which nobody sees in a short row."""
        return max(0, length - self.size) // self.stride + 1

    def windows(self, x: Array) -> Array:
        """`[B, S, ..]` as `[B, count, size, ..]`, zeros past the end."""
        count = self.count(x.shape[1])
        at = np.arange(count)[:, None] * self.stride + np.arange(self.size)
        return x.at[:, at].get(mode="fill", fill_value=0)

    def documents(self, segment_ids: Int[Array, "B S"]) -> Int[Array, "B n"]:
        """The document of each compressed key, 0 where it holds tokens of several or padding."""
        ids = self.windows(segment_ids)
        return jnp.where((ids == ids[..., :1]).all(-1), ids[..., 0], 0)


@tiles.one_program
def importance(
    weights: Float[Array, "*B n"], strides: Strides, block: int, blocks: int
) -> Float[Array, "*B m"]:
    """Weights of compressed keys as sums over the blocks that they overlap.  [eq. 9]

    A compressed key counts once for each stride of tokens that it shares with a block.

    >>> importance(jnp.array([1.0, 2.0, 4.0]), Strides(size=4, stride=2), 4, 2).tolist()
    [4.0, 10.0]
    """
    per, parts = block // strides.stride, strides.size // strides.stride
    width = blocks * per
    extra = max(0, width - weights.shape[-1])
    lead = [(0, 0)] * (weights.ndim - 1)
    padded = jnp.pad(weights, (*lead, (parts - 1, extra)))
    # What each stride of tokens receives, then the strides of a block.
    strips = sum(padded[..., parts - 1 - i : parts - 1 - i + width] for i in range(parts))
    return strips.reshape(*strips.shape[:-1], blocks, per).sum(-1)


@tiles.one_program
def document_starts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The first token of the run of equal ids that each token is in.

    >>> document_starts(jnp.array([[1, 1, 2, 2, 2]])).tolist()
    [[0, 0, 2, 2, 2]]
    """
    fresh = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], 1
    )
    at = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(fresh, at, 0), axis=1)


@tiles.one_program
def choose_blocks(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B n K H"],
    lse: Float[Array, "B T N"],
    *,
    strides: Strides,
    block: int,
    top_k: int,
    initial: int = 1,
    local: int = 2,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
) -> Int[Array, "B T K m"]:
    """Blocks of every query by the weights that attention gives to compressed keys.

    [arXiv:2502.11089, eq. 8 to 12] The weights are summed over the heads of a KV head, which share
    the choice; the first blocks of the document and the last ones up to the query are always in it
    and counted. Scores exist for some queries at a time. No gradient goes through the choice.

    Args:
      q, keys: queries and compressed keys.
      lse: of the attention of q to `keys`, which makes weights of logits.
      strides: where compressed keys lie.
      block: tokens per block, a multiple of the stride.
      top_k: blocks of a query, those that are always taken included.
      initial, local: blocks that are always taken, at the start and up to the query's own.
      segment_ids: packed documents.
      scale: as in attention; default `H ** -0.5`.

    >>> q = k = jnp.zeros((1, 16, 1, 4))
    >>> strides = Strides(size=2, stride=2)
    >>> chosen = choose_blocks(q, k[:, ::2], jnp.full((1, 16, 1), jnp.inf), strides=strides,
    ...                        block=2, top_k=4)
    >>> chosen[0, 11, 0].tolist()  # the first, the own and the one before it; then the best
    [0, 4, 5, 1]
    """
    q, keys, lse = jax.lax.stop_gradient((q, keys, lse))
    batch, length, heads, _ = q.shape
    kv_heads = keys.shape[2]
    starts = ids = jnp.zeros((batch, length), jnp.int32)
    key_ids = None
    if segment_ids is not None:
        starts, ids, key_ids = (
            document_starts(segment_ids), segment_ids, strides.documents(segment_ids)
        )  # fmt: skip

    def choose(end, positions, xs):
        q, lse, start, ids = xs
        count, blocks = strides.count(end), -(-end // block)
        places = jnp.arange(count, dtype=jnp.int32)
        z = scoring.logits(q, keys[:, :count], scale)
        seen = strides.mask_fn(positions[:, None], places)[None]
        if key_ids is not None:
            seen = seen & (key_ids[:, None, :count] == ids[..., None])
        # A row that sees no compressed key has lse -inf, and nothing here is seen.
        weights = jnp.where(seen[:, None], jnp.exp(z - jnp.moveaxis(lse, 2, 1)[..., None]), 0)
        weights = weights.reshape(batch, kv_heads, -1, *weights.shape[2:]).sum(2)
        scores = jnp.moveaxis(importance(weights, strides, block, blocks), 1, 2)
        at = jnp.arange(blocks, dtype=jnp.int32)
        first, own = start[..., None] // block, positions[:, None] // block
        candidates = (first <= at) & (at <= own)
        forced = (at < first + initial) | (at > own - local)
        return lists.best(scores, top_k, candidates[:, :, None], forced[:, :, None])

    def choose_by_kernel(end, positions, _):
        documents = None if key_ids is None else (ids, starts, key_ids)
        blocks, start = -(-end // block), positions[:1]
        parts = gpu.block_scores(
            q, keys, lse, start, positions.size, strides=strides, block=block, blocks=blocks,
            scale=q.shape[3] ** -0.5 if scale is None else scale, documents=documents,
        )  # fmt: skip
        return gpu.best_blocks(
            parts, start, min(top_k, blocks), block=block, initial=initial, local=local,
            starts=None if documents is None else starts,
        )  # fmt: skip

    gpu = lists.kernels()
    if gpu is not None and gpu.takes_scores(q, keys, strides, block, top_k):
        numbers = batch * kv_heads * gpu.overlaps(strides, block)
        # The queries are read as they lie: pieces of them would be copies.
        return lists.by_prefix(
            choose_by_kernel, ids, count=top_k,
            elements=lambda end: numbers * -(-end // block),
        )  # fmt: skip
    return lists.by_prefix(
        choose, (q, lse, starts, ids), count=top_k,
        elements=lambda end: batch * heads * strides.count(end),
    )  # fmt: skip
