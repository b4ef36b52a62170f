"""Which summaries of the past a query sees, so that they and the near tokens cover all of it."""

import dataclasses
from typing import ClassVar

from sparse_attn.patterns import base

_BLOCKS, _TREE = "blocks", "tree"


@dataclasses.dataclass(frozen=True)
class Combiner(base.Pattern):
    """Summaries that, with the tokens of the query's own block, cover the past exactly once.

    Keys are summaries, not tokens; `region` says which tokens summary `kv_pos` stands for.
    `regions="blocks"`: one summary per block of `size` tokens, n / size for the last query
    (Combiner-Fixed). `regions="tree"`: summary i stands for the last 1, 2, 4 ... of the first
    i + 1 blocks, the lowest power of two in that number, so that a query sees at most
    log2(n / size) + 1 of them (Combiner-Logsparse is `size=1`).  [arXiv:2107.05768, sec. 4]

    What is pattern: this rule, and `chunked(size)` for the tokens of the own block; the two share
    a softmax by `merge_lse`. What is not: the pooled key and value of a region, which the model
    makes from the keys and values of its tokens (max-pooled key, and as value their attention to a
    query of the region).

    Attributes:
      size: tokens of a block.
      regions: "blocks" or "tree".

    Raises:
      ValueError: a field is not in its range.

    >>> import numpy as np
    >>> np.flatnonzero(Combiner(size=4).mask_fn(np.int32(14), np.arange(8)))  # and tokens 12 .. 14
    array([0, 1, 2])
    >>> tree = Combiner(size=4, regions="tree")
    >>> seen = np.flatnonzero(tree.mask_fn(np.int32(14), np.arange(8)))
    >>> [tuple(map(int, tree.region(i))) for i in seen]
    [(0, 8), (8, 12)]
    """

    size: int
    regions: str = _BLOCKS

    block_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        base.check_int("size", self.size)
        base.check_choice("regions", self.regions, (_BLOCKS, _TREE))

    def region(self, kv_pos):
        """First token of the region of summary `kv_pos`, and the one after its last."""
        end = kv_pos + 1
        blocks = 1 if self.regions == _BLOCKS else end & -end
        return (end - blocks) * self.size, end * self.size

    def mask_fn(self, q_pos, kv_pos):
        past, end = q_pos // self.size, kv_pos + 1  # in blocks
        if self.regions == _BLOCKS:
            return end <= past
        # `end` is `past` without some of its lowest bits, as in a binary indexed tree.
        return (end <= past) & (past - end < (end & -end))

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        first, last = q_lo // self.size, (q_hi - 1) // self.size  # blocks before the queries
        if self.regions == _BLOCKS:
            return base.state_of(empty=kv_lo + 1 > last, full=kv_hi <= first)
        # Ends kv_lo + 1 .. kv_hi. Those in [first, last] are seen by the query block of that
        # number; of the smaller ones some query sees only the prefixes of `first`, and the largest
        # prefix that is not above an end has the bits that the two share.
        below = base.least(kv_hi, first)
        differ = first ^ below
        for step in (1, 2, 4, 8, 16):
            differ = differ | (differ >> step)
        reached = base.greatest(base.least(kv_hi, last) * (kv_hi >= first), first & ~differ)
        # Two ends that one query sees are never followed by a third.
        one, two = kv_hi - kv_lo == 1, (kv_hi - kv_lo == 2) & (kv_lo % 2 == 1)
        seen_by_all = (kv_hi <= first) & (last - kv_hi < (kv_hi & -kv_hi))
        return base.state_of(
            empty=(reached <= kv_lo) | (kv_lo + 1 > last),
            full=(one & seen_by_all) | (two & (first == last) & (first == kv_hi)),
        )

    @property
    def causal(self) -> bool:
        return True  # Summary i ends before its reader, who is at or after position i.

    @property
    def may_be_empty(self) -> bool:
        return True


EXAMPLES = (
    Combiner(size=1),
    Combiner(size=6),
    Combiner(size=1, regions=_TREE),
    Combiner(size=3, regions=_TREE),
)
