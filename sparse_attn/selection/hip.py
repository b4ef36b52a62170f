"""Blocks by a search that halves chunks of keys and follows the best halves."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_attn.ops import scoring
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import local, sinks
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hip(base.Selector):
    """The `top_k` best blocks of each row in `2 * top_k * log2(blocks / top_k)` scores.

    Hierarchical attention pruning [arXiv:2406.09827]: the blocks that a row of
    blocks may see are cut into `top_k` chunks. Each step halves all chunks, scores a half by the
    largest logit of its middle key with the queries of the row, and keeps the best `top_k` halves,
    until chunks are single blocks. Finds what is coherent along the sequence. Training-free.

    Attributes:
      top_k: blocks kept in each row of blocks, beside those of `always`.

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> Hip(block_q=8, block_kv=8, top_k=2).select(q, k).kv_counts[0, 0].tolist()
    [1, 2, 3, 4, 4, 4, 4, 4]
    """

    always: patterns_base.Pattern | None = local.Local(window=1) | sinks.Sinks(tokens=1)
    top_k: int = 32

    def __post_init__(self):
        super().__post_init__()
        patterns_base.check_int("top_k", self.top_k)

    def steps(self, num_blocks: int) -> int:
        """Halvings until no chunk of `num_blocks` blocks has more than one.

        >>> Hip(top_k=4).steps(64), Hip(top_k=4).steps(4)
        (4, 0)
        """
        return math.ceil(math.log2(max(1, -(-num_blocks // self.top_k))))

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Bool[Array, "B U nq nk"]:
        batch, _, heads, dim = q.shape
        rows, cols = blocks.candidates.shape[2:]
        count = min(self.top_k, cols)
        keys = jnp.repeat(jnp.moveaxis(k, 1, 2), heads // k.shape[2], 1)
        keys = jnp.where(jnp.asarray(blocks.kv_real)[:, None, :, None], keys, 0)
        real = scoring.blocked(
            jnp.broadcast_to(jnp.asarray(blocks.q_real), q.shape[:2]), self.block_q
        )
        free = blocks.candidates & ~blocks.guard
        shape = (batch, 1, rows)
        lo = jnp.broadcast_to(jnp.argmax(free, -1), shape)
        hi = jnp.broadcast_to(cols - jnp.argmax(free[..., ::-1], -1), shape)
        hi = jnp.where(jnp.broadcast_to(free.any(-1), shape), hi, lo)
        q_rows = jnp.moveaxis(scoring.blocked(q, self.block_q), 1, 0)

        def row(at):
            index, q, real, lo, hi = at  # [], [B, bq, N, H], [B, bq], [B, 1], [B, 1]
            edges = lo[..., None] + jnp.arange(count + 1) * (hi - lo)[..., None] // count
            edges = jnp.broadcast_to(edges, (batch, heads, count + 1))
            first, last = edges[..., :-1], edges[..., 1:]
            q_pos = index * self.block_q + jnp.arange(self.block_q, dtype=jnp.int32)[:, None]
            for _ in range(self.steps(cols)):
                middle = first + (last - first + 1) // 2
                first = jnp.stack([first, middle], -1).reshape(batch, heads, -1)
                last = jnp.stack([middle, last], -1).reshape(batch, heads, -1)
                place = (first + last) * self.block_kv // 2
                place = jnp.clip(place, 0, k.shape[1] - 1).astype(jnp.int32)
                picked = jnp.take_along_axis(keys, place[..., None], 2)
                logits = jnp.einsum("BTNH,BNCH->BNTC", q, picked) * dim**-0.5
                seen = self.pattern.mask_fn(q_pos, place[:, :, None]) & real[:, None, :, None]
                best = jnp.where(seen, logits.astype(jnp.float32), -jnp.inf).max(2)
                # A half that no query sees at its middle comes after the others, an empty one last.
                best = jnp.where(first < last, jnp.maximum(best, -1e30), -jnp.inf)
                kept = jnp.sort(jnp.argsort(-best, axis=-1, stable=True)[..., :count], -1)
                first, last = (jnp.take_along_axis(x, kept, -1) for x in (first, last))
            found = jnp.where(first < last, first, cols)
            grid = jnp.zeros((batch * heads, cols + 1), bool)
            grid = grid.at[jnp.arange(batch * heads)[:, None], found.reshape(-1, count)].set(True)
            return grid.reshape(batch, heads, -1)[..., :-1]

        kept = scoring.by_rows(
            row,
            (jnp.arange(rows), q_rows, jnp.moveaxis(real, 1, 0), *(
                jnp.moveaxis(x, 2, 0) for x in (lo, hi)
            )),
            elements=batch * heads * 2 * count * max(self.block_q, dim),
        )  # fmt: skip
        return jnp.moveaxis(kept, 0, 2) & free


EXAMPLES = (Hip(block_q=8, block_kv=8, top_k=2),)
