"""Regions of an image by the product of mean queries and keys of all heads together."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_attn.ops import scoring
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiFormer(base.Selector):
    """Bi-level routing: `top_k` regions for each region, shared by its tokens and all heads.

    [arXiv:2303.08810] The affinity is the product of mean queries and mean keys over all
    channels. `attend(..., order=reorder.Tiles(shape, region))` makes each region of the image a
    block; where regions do not divide the image, blocks hold parts of two. Trained from scratch,
    without a gradient through the choice. The paper's depth-wise convolution of the values is no
    part of a choice, and left to the layer.

    Attributes:
      top_k: regions that each region sees, beside those of `always`.

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> BiFormer(block_q=16, block_kv=16, top_k=2).select(q, k).kv_counts.tolist()
    [[[2, 2, 2, 2]]]
    """

    pattern: patterns_base.Pattern = base.EVERYTHING
    always: patterns_base.Pattern | None = None
    top_k: int = 4

    tables: ClassVar[str] = "one"

    def __post_init__(self):
        super().__post_init__()
        patterns_base.check_int("top_k", self.top_k)

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Bool[Array, "B U nq nk"]:
        affinity = scoring.logits(
            scoring.pool(q, self.block_q, blocks.q_real),
            scoring.pool(k, self.block_kv, blocks.kv_real),
        ).sum(1, keepdims=True)
        free = jnp.broadcast_to(blocks.candidates & ~blocks.guard, affinity.shape)
        return scoring.top_k(affinity, self.top_k, free)


EXAMPLES = (BiFormer(block_q=16, block_kv=16, top_k=2),)
