"""Blocks by the product of their mean query and mean key."""

import dataclasses

from jaxtyping import Array, Float

from sparse_attn.ops import scoring
from sparse_attn.patterns import full, global_tokens
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pooled(base.BlockScores):
    """Scores `mean(q block) . mean(k block) / sqrt(H)`: training-free block-sparse attention.

    With `top_k`, the block-sparse heads of MInference [arXiv:2407.02490, sec. 3.2]; with `top_p`
    and a full pattern, the global layers of "Faster VGGT with Block-Sparse Global Attention"
    (Wang et al., 2025), whose special tokens are `always=global_tokens(tokens=n)`.

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> mask = Pooled(block_q=16, block_kv=16, top_k=2).select(q, k)
    >>> mask.kv_counts[0, 0].tolist()
    [1, 2, 3, 3]
    """

    def scores(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Float[Array, "B N nq nk"]:
        return scoring.logits(
            scoring.pool(q, self.block_q, blocks.q_real),
            scoring.pool(k, self.block_kv, blocks.kv_real),
        )


EXAMPLES = (
    Pooled(block_q=16, block_kv=16, top_k=2),
    Pooled(block_q=16, block_kv=8, top_p=0.6, min_blocks=2),
    Pooled(block_q=16, block_kv=16, threshold=0.2, tables="kv"),
    Pooled(
        block_q=8, block_kv=16, pattern=full.Full(), top_k=1,
        always=global_tokens.GlobalTokens(tokens=3),
    ),
)  # fmt: skip
