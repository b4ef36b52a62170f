"""Blocks of keys at several resolutions: whole, averaged by 2, 4, 8, or left out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparse_attn.masks import block_mask
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import scoring, tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Psa(base.Selector):
    """Pyramid sparse attention: the higher a block ranks, the finer its keys.  [arXiv:2512.04025]

    The blocks that a row may see are ranked by pooled scores. The first `counts[0]` have level 0,
    all their keys; the next `counts[1]` level 1, averages of 2 keys and values, and so on; the rest
    is left out. An averaged key stands for `2 ** level` keys, so their number is added to its logit
    as a logarithm, and one softmax goes over all levels. Blocks of `always`, and those that a
    causal pattern cuts, have level 0 beside the counts: no average holds a later key. `select` is
    the mask of all blocks at any level; `attend` runs the levels. Ranks by quota are the paper's
    "topk" form; how it estimates scores is its own, here as in `pooled`.

    Attributes:
      counts: blocks per row at levels 0, 1, 2, ...; `2 ** level` divides block_kv.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
    >>> rule = Psa(block_q=8, block_kv=8, counts=(1, 2, 1))
    >>> rule.select(q, k).kv_counts[0, 0].tolist()
    [1, 2, 3, 4, 5, 5, 5, 5]
    >>> jax.eval_shape(rule.attend, q, k, v).shape
    (1, 64, 2, 8)
    """

    counts: tuple[int, ...] = (8, 8, 16, 32)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "counts", tuple(self.counts))
        if not self.counts or not all(type(n) is int and n >= 0 for n in self.counts):
            raise ValueError(f"counts={self.counts} must be ints >= 0, one per level")
        largest = 2 ** (len(self.counts) - 1)
        if self.block_kv % largest:
            raise ValueError(
                f"counts={self.counts} must have few enough levels that {largest} divides "
                f"block_kv={self.block_kv}"
            )

    @tiles.one_program
    def levels(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Int[Array, "B N nq nk"]:
        """The level of each block; -1 = left out."""
        scores = scoring.logits(
            scoring.pool(q, self.block_q, blocks.q_real),
            scoring.pool(k, self.block_kv, blocks.kv_real),
        )
        states = self._states(q.shape[1], k.shape[1])
        edge = (np.arange(states.shape[1]) + 1) * self.block_kv > k.shape[1]
        exact = blocks.candidates & ((states == patterns_base.PARTIAL) | edge)
        exact = exact | blocks.guard
        free = blocks.candidates & ~exact
        level = jnp.full(scores.shape, -1)
        for i in reversed(range(len(self.counts))):
            best = scoring.top_k(scores, sum(self.counts[: i + 1]), free)
            level = jnp.where(best, i, level)
        return jnp.where(exact, 0, level)

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Bool[Array, "B U nq nk"]:
        return self.levels(q, k, blocks) >= 0

    @tiles.one_program
    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        *,
        levels: Int[Array, "B N nq nk"] | None = None,
        return_lse: bool = False,
        impl: str | None = None,
    ) -> Any:
        """Attends to every level and merges them; one document.

        Args:
          levels: of the blocks, as `levels` gives them; None = those.
        """
        (batch, q_len), kv_len = q.shape[:2], k.shape[1]
        states = self._states(q_len, kv_len)
        if levels is None:
            fixed = jax.lax.stop_gradient((q, k))
            levels = self.levels(*fixed, self._blocks(states, *fixed, None, None))
        pieces = []
        for level in range(len(self.counts)):
            size = 2**level
            # Blocks above level 0 are whole and FULL: what is past the last whole pool is not seen.
            keys, values = (pooled_tokens(x, size) for x in (k, v))
            chosen = jnp.where(levels == level, states, patterns_base.EMPTY)
            chosen = chosen[..., : -(-keys.shape[1] // (self.block_kv // size))]
            mask = block_mask.from_block_states(
                chosen, rule=self.pattern if level == 0 else base.EVERYTHING,
                q_len=q_len, kv_len=keys.shape[1],
                block_q=self.block_q, block_kv=self.block_kv // size,
            )  # fmt: skip
            bias = jnp.full((batch, keys.shape[1]), np.log(size), jnp.float32) if level else None
            pieces.append(
                attend_lib.attend(
                    q, keys, values, mask=mask, key_bias=bias, return_lse=True, impl=impl
                )
            )
            if kv_len < 2 * size:
                break
        out, lse = attend_lib.merge_lse(pieces)
        return (out, lse) if return_lse else out


@tiles.one_program
def pooled_tokens(x: Float[Array, "B S K H"], size: int) -> Float[Array, "B s K H"]:
    """Averages of `size` tokens each; tokens past the last whole one are dropped.

    >>> pooled_tokens(jnp.arange(5.0).reshape(1, 5, 1, 1), 2).ravel().tolist()
    [0.5, 2.5]
    """
    whole = x[:, : x.shape[1] // size * size]
    whole = whole.reshape(x.shape[0], -1, size, *x.shape[2:])
    return whole.astype(jnp.float32).mean(2).astype(x.dtype)


EXAMPLES = (Psa(block_q=8, block_kv=8, counts=(1, 0, 1)),)
