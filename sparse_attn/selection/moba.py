"""Blocks of keys for every single query, by the product with their mean key."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparse_attn.ops import scoring
from sparse_attn.ops.token_select import lists
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
    `lists` gives the choice to `ops.token_select`, which gathers for each block the queries that
    chose it; a layer of a model does so wherever `as_lists` says that it can. Both choose alike but
    for near ties of half-precision queries and keys on GPUs.

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

    @property
    def as_lists(self) -> bool:
        """True where the choice is one list of `top_k` blocks and the own one for every query."""
        return (
            type(self) is Moba
            and isinstance(self.top_k, int)
            and (self.tables, self.pattern, self.always) == ("query", base.CAUSAL, base.DIAGONAL)
        )

    def lists(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], *, segment_ids: Any = None
    ) -> Int[Array, "B T N m"]:
        """The choice of `select` as lists for `ops.token_select`, -1 = none.

        On GPUs a kernel ranks scores of half-precision queries and keys without their last bits, so
        that near ties may go otherwise.

        Memory follows T * top_k: the scores exist for some queries at a time.

        Raises:
          ValueError: the rule is none for which `as_lists` is True.

        >>> import jax
        >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
        >>> Moba(block_kv=16, top_k=2).lists(q, k)[0, 20, 0].tolist()  # query 20: blocks 1 and 0
        [1, 0, -1]
        """
        if not self.as_lists:
            raise ValueError(
                f"{self.expression()} must be moba with one top_k and the rest default"
            )
        return lists.by_mean_key(
            q, k, block=self.block_kv, top_k=self.top_k, segment_ids=segment_ids
        )


EXAMPLES = (
    Moba(block_kv=8, top_k=2),
    Moba(block_kv=16, top_p=0.6, always=local.Local(window=1) | sinks.Sinks(tokens=1)),
)
