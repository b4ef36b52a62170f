"""Blocks by pooled products where blocks are uniform, all blocks where they are not."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_attn.ops import scoring
from sparse_attn.patterns import full
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparge(base.BlockScores):
    """Pooled scores, trusted only for blocks whose tokens are alike; training-free.

    [arXiv:2502.18137] A block whose tokens have a mean cosine below `similarity`
    has no good mean: such queries keep their whole row of blocks, such keys stay in every row, and
    the budget is for the rest. This is the first stage; the paper's second one skips products
    inside a kernel. Images and videos: `attend(..., order=)` with a Hilbert-like order of tiles
    makes tokens of a block alike, as in the paper.

    Attributes:
      similarity: mean cosine of all pairs of tokens of a block, in [-1, 1].

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> rule = Sparge(block_q=16, block_kv=16, top_p=0.5, similarity=0.9)
    >>> rule.select(q, k).kv_counts[0, 0].tolist()  # noise is alike nowhere
    [1, 2, 3, 4]
    """

    similarity: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not -1 <= self.similarity <= 1:
            raise ValueError(f"similarity={self.similarity} must be >= -1 and <= 1")
        if self.tables != "query":
            raise ValueError(f"tables={self.tables!r} must be 'query'")

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Bool[Array, "B U nq nk"]:
        group = q.shape[2] // k.shape[2]
        alike_q = mean_cosine(q, self.block_q, blocks.q_real) >= self.similarity
        alike_k = mean_cosine(k, self.block_kv, blocks.kv_real) >= self.similarity
        alike_q = jnp.moveaxis(alike_q, 1, 2)[..., :, None]
        alike_k = jnp.repeat(jnp.moveaxis(alike_k, 1, 2)[..., None, :], group, 1)
        scores = scoring.logits(
            scoring.pool(q, self.block_q, blocks.q_real),
            scoring.pool(k, self.block_kv, blocks.kv_real),
        )
        # Left out of the mass too: their means say nothing.
        inner = blocks._replace(
            candidates=blocks.candidates & alike_k, guard=blocks.guard & alike_k
        )
        return self.choose(scores, inner, k.shape[2]) | ~alike_q | ~alike_k


def mean_cosine(
    x: Float[Array, "B T N H"], block: int, real: Bool[Any, "#B T"]
) -> Float[Array, "B n N"]:
    """Mean cosine of all pairs of real tokens of each block (a token with itself included).

    >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).reshape(1, 4, 1, 2)
    >>> mean_cosine(x, 2, jnp.ones((1, 4), bool)).ravel().tolist()
    [1.0, 0.5]
    """
    x = x.astype(jnp.float32)
    norm = jnp.sqrt((x * x).sum(-1, keepdims=True))
    # The mean over pairs of unit vectors is the square of the length of their mean.
    mean = scoring.pool(x / jnp.maximum(norm, 1e-20), block, real)
    return (mean * mean).sum(-1)


EXAMPLES = (
    Sparge(block_q=16, block_kv=16, top_p=0.5, similarity=0.06),
    Sparge(block_q=8, block_kv=16, top_k=1, similarity=-1.0, pattern=full.Full()),
)
