"""Random blocks: every block of queries sees a few blocks of keys, drawn once from a seed."""

import dataclasses
from typing import ClassVar

import numpy as np

from sparse_attn.patterns import base

_ROUNDS = 4
_HALF = 15  # bits; products of two halves stay inside int32
_LOW = (1 << _HALF) - 1


@dataclasses.dataclass(frozen=True)
class RandomBlocks(base.Pattern):
    """`num_blocks` distinct key blocks per query block, uniformly drawn. [arXiv:2007.14062, sec. 2]

    Block granular: all `block` queries of a block see all `block` keys of a drawn block. The draw
    is a hash of (seed, query block), so it is the same on every machine and length, and a kernel
    computes it with int32 arithmetic. Combine with a window: a block does not draw itself.

    Attributes:
      block: tokens per block, of queries and of keys.
      num_blocks: key blocks drawn per query block, without repetition (all, where there are
        fewer).
      seed: another number, another draw.
      key_blocks: None draws from the blocks before the query block (causal; the first query block
        sees nothing); an int draws from the first `key_blocks` blocks, on both sides.

    Raises:
      ValueError: a field is not an int in its range.

    >>> import numpy as np
    >>> drawn = RandomBlocks(block=2, num_blocks=2, seed=0)
    >>> drawn.mask_fn(np.arange(0, 12, 2)[:, None], np.arange(0, 12, 2)).sum(1).tolist()
    [0, 1, 2, 2, 2, 2]
    """

    block: int
    num_blocks: int
    seed: int = 0
    key_blocks: int | None = None

    block_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        base.check_int("block", self.block)
        base.check_int("num_blocks", self.num_blocks, most=64)
        base.check_int("seed", self.seed, least=0)
        if self.key_blocks is not None:
            base.check_int("key_blocks", self.key_blocks)

    def mask_fn(self, q_pos, kv_pos):
        kv_block = kv_pos // self.block
        first, *others = self._draws(q_pos // self.block)
        visible = first == kv_block
        for drawn in others:
            visible = visible | (drawn == kv_block)
        return visible

    def _draws(self, q_block):
        """The blocks drawn by each query block, `num_blocks` arrays; negative = none.

        Floyd's algorithm: draw i is uniform in [0, top], and is replaced by `top` if it was drawn
        before, where `top` grows by one each time. All subsets are equally likely.
        """
        choices = q_block if self.key_blocks is None else q_block * 0 + self.key_blocks
        chosen = []
        for i in range(self.num_blocks):
            top = choices - self.num_blocks + i
            draw = _hash(q_block, self.seed, i) % base.greatest(top + 1, 1)
            repeated = top < 0
            for earlier in chosen:
                repeated = repeated | (draw == earlier)
            chosen.append(draw + (top - draw) * repeated)
        return chosen

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        """Exact on the host. Traced, a region that spans several query blocks stays PARTIAL."""
        q_first, q_end = q_lo // self.block, (q_hi - 1) // self.block + 1
        kv_first, kv_end = kv_lo // self.block, (kv_hi - 1) // self.block + 1
        rows, cols = q_end - q_first, kv_end - kv_first
        # A trace cannot loop over a number of rows that is not known yet.
        on_host = isinstance(rows, (int, np.ndarray, np.generic))
        counted_rows = int(np.max(rows, initial=0)) if on_host else 1
        hits = 0 * (rows * kv_first)
        for i in range(counted_rows):
            exists = q_first + i < q_end
            for drawn in self._draws(q_first + i):
                hits = hits + 1 * (exists & (drawn >= kv_first) & (drawn < kv_end))
        # Draws of a row are distinct, so a region with as many hits as blocks is full.
        known = rows <= counted_rows
        all_hit = (cols <= self.num_blocks) & (hits == rows * base.least(cols, self.num_blocks))
        state = base.state_of(empty=known & (hits == 0), full=known & all_hit)
        if self.key_blocks is None:
            state = state * (kv_first < q_end - 1)
        return state

    @property
    def causal(self) -> bool:
        return self.key_blocks is None

    @property
    def may_be_empty(self) -> bool:
        return True


def _hash(x, seed: int, draw: int):
    """30 pseudo-random bits of integers in [0, 2**31): a small Feistel network.

    No product exceeds int32, so NumPy, JAX and every kernel agree, whatever their integer width.
    """
    keys = np.random.SeedSequence((seed, draw)).generate_state(2 * _ROUNDS)
    low, high = x & _LOW, (x >> _HALF) & _LOW
    for factor, offset in zip(keys[:_ROUNDS].tolist(), keys[_ROUNDS:].tolist(), strict=True):
        mixed = (low ^ (offset & _LOW)) * (factor & _LOW | 0x4001)
        low, high = high ^ ((mixed >> 7) & _LOW) ^ (mixed & 127), low
    return (high << _HALF) | low


EXAMPLES = (
    RandomBlocks(block=8, num_blocks=2, seed=1),
    RandomBlocks(block=16, num_blocks=3),
    RandomBlocks(block=64, num_blocks=1, seed=7),
    RandomBlocks(block=16, num_blocks=2, key_blocks=12),
    RandomBlocks(block=8, num_blocks=5, seed=3, key_blocks=3),
)
