"""Pairs of a query and a block of keys, chosen together for all queries of a head."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_attn.masks import reorder
from sparse_attn.ops import scoring
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class VMoba(base.Selector):
    """The best pairs `q . mean(k block)` of a head, up to a part `top_p` of the similarity.

    [arXiv:2506.23858] Similarities of all queries of a head are normalised together (a
    softmax over queries and blocks), so that queries with clear matches take more blocks than
    others; each has at least its best one. Layers cycle through `partitions` of the video, one for
    each `attend(..., order=)`. Rows of the mask are single queries, as in `moba`. Not causal.

    Attributes:
      top_p: part of the similarity of a head that its pairs have; 1 = all.

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> bool((VMoba(block_kv=16, top_p=0.3).select(q, k).kv_counts >= 1).all())
    True
    """

    block_q: int = 1
    pattern: patterns_base.Pattern = base.EVERYTHING
    always: patterns_base.Pattern | None = None
    top_p: float = 0.25

    looks_ahead = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be > 0 and <= 1")

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Bool[Array, "B U nq nk"]:
        scores = scoring.logits(
            scoring.pool(q, self.block_q, blocks.q_real),
            scoring.pool(k, self.block_kv, blocks.kv_real),
        )
        flat = (*scores.shape[:2], -1)
        candidates = jnp.broadcast_to(blocks.candidates, scores.shape)
        kept = scoring.top_p(scores.reshape(flat), self.top_p, candidates.reshape(flat))
        return kept.reshape(scores.shape) | scoring.top_k(scores, 1, candidates)


def partitions(
    shape: Sequence[int], frames: int, plane: Sequence[int], cube: Sequence[int]
) -> tuple[reorder.Tiles, reorder.Tiles, reorder.Tiles]:
    """Orders of a video `(frames, height, width)` for layers 0, 1, 2, 0, 1, ... of a model.

    Blocks of whole frames in time, of `plane` tokens in space over all frames, and cubes.

    >>> [x.tile for x in partitions((4, 4, 4), 2, (2, 2), (2, 2, 2))]
    [(2, 4, 4), (4, 2, 2), (2, 2, 2)]
    """
    shape = tuple(shape)
    tiles = ((frames, *shape[1:]), (shape[0], *plane), tuple(cube))
    return tuple(reorder.Tiles(shape, tile) for tile in tiles)


EXAMPLES = (VMoba(block_kv=16, top_p=0.4),)
