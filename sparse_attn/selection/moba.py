"""Blocks of keys for every single query, by the product with their mean key."""

import dataclasses

import numpy as np
from jaxtyping import Array, Bool, Float

from sparse_attn.ops import scoring
from sparse_attn.patterns import local, sinks
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moba(base.BlockScores):
    """Each query of each head takes the blocks with the best `q . mean(k block)`; for training.

    Mixture of block attention [arXiv:2502.13189, sec. 2.2]: causal, the query's own block is
    always taken and only blocks that end before the query compete, so that no mean holds a later
    key. `top_k` counts the blocks beside the own one (the paper's count includes it).

    The rows of the mask are single queries (block_q = 1), which is exact, on backends that take
    such rows; its lists have T * S / block_kv entries per head, and every query is a row of work.

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> mask = Moba(block_kv=16, top_k=1).select(q, k)
    >>> mask.kv_counts[0, 0, ::16].tolist()  # queries 0, 16, 32 and 48
    [1, 2, 2, 2]
    """

    block_q: int = 1

    def _check_blocks(self):
        if self.block_q != 1:
            raise ValueError(f"block_q={self.block_q} must be 1: each query chooses for itself")
        if not self.pattern.causal:
            raise ValueError(f"pattern={self.pattern.expression()} must be causal")

    def scores(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Float[Array, "B N nq nk"]:
        return scoring.logits(q, scoring.pool(k, self.block_kv, blocks.kv_real))

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Bool[Array, "B U nq nk"]:
        ends = np.arange(blocks.candidates.shape[-1]) * self.block_kv + self.block_kv
        past = ends <= np.arange(q.shape[1])[:, None]
        inner = blocks._replace(candidates=blocks.candidates & past, guard=blocks.guard & past)
        return self.choose(self.scores(q, k, blocks), inner, k.shape[2])


EXAMPLES = (
    Moba(block_kv=8, top_k=2),
    Moba(block_kv=16, top_p=0.6, always=local.Local(window=1) | sinks.Sinks(tokens=1)),
)
