"""The best entries of the whole map of patches, at one density for every head."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_attn.masks import reorder
from sparse_attn.ops import scoring
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft(base.Selector):
    """Softmax rows of the low-resolution map, and its largest entries; training-free.

    DraftAttention [arXiv:2505.14708]: queries and keys are averaged over 2-D patches of
    each frame, and `density` of all pairs of patches are kept, wherever in the map they are.
    `attend(..., order=patches(...))` makes each patch a block. A patch at an edge that it does not
    divide is smaller, so blocks there hold parts of two patches.

    Attributes:
      density: kept blocks / blocks that the pattern allows, per head, those of `always` included.

    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
    >>> rule = Draft(block_q=16, block_kv=16, density=0.25)
    >>> int(rule.select(q, k).kv_counts[0, 0].sum())  # of 16
    4
    >>> order = patches((1, 8, 8), (4, 4))
    >>> jax.eval_shape(lambda q, k, v: rule.attend(q, k, v, order=order), q, k, v).shape
    (1, 64, 2, 8)
    """

    pattern: patterns_base.Pattern = base.EVERYTHING
    always: patterns_base.Pattern | None = None
    density: float = 0.25

    looks_ahead = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} must be > 0 and <= 1")

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Bool[Array, "B U nq nk"]:
        low = scoring.logits(
            scoring.pool(q, self.block_q, blocks.q_real),
            scoring.pool(k, self.block_kv, blocks.kv_real),
        )
        share = scoring.mass(low, blocks.candidates)
        candidates = jnp.broadcast_to(blocks.candidates, share.shape)
        first = jnp.where(blocks.guard, 2.0, share)
        flat = (*share.shape[:2], -1)
        candidates = candidates.reshape(flat)
        budget = jnp.ceil(self.density * candidates.sum(-1, keepdims=True) - 1e-4)
        return scoring.top_k(first.reshape(flat), budget, candidates).reshape(share.shape)


def patches(shape: Sequence[int], patch: Sequence[int]) -> reorder.Tiles:
    """The order of a video `(frames, height, width)` by 2-D patches of single frames.

    >>> patches((2, 2, 4), (2, 2)).forward[:8].tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    return reorder.Tiles(tuple(shape), (1, *patch))


EXAMPLES = (Draft(block_q=16, block_kv=8, density=0.3),)
