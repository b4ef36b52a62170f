"""The fixed factorisation of the Sparse Transformer: a block head and a summary head."""

import dataclasses
from typing import ClassVar

from sparse_attn.patterns import base, chunked, per_head


@dataclasses.dataclass(frozen=True)
class Fixed(base.Pattern):
    """One head of fixed attention, for data without rows, like text.  [arXiv:1904.10509, sec. 4.3]

    `part="block"` sees its own block of `stride` tokens, `part="summary"` the last
    `summary_tokens` of every block; both causally. `Fixed.heads(...)` alternates the parts over
    the heads; one head that merges them joins the two with `|`.

    Raises:
      ValueError: `stride` is not an int >= 1, `part` is another word, or `summary_tokens` is not
        in `[1, stride]`.

    >>> import numpy as np
    >>> np.flatnonzero(Fixed(4, "summary", summary_tokens=1).mask_fn(np.int32(9), np.arange(12)))
    array([3, 7])
    """

    stride: int
    part: str
    summary_tokens: int = 1

    block_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        base.check_int("stride", self.stride)
        base.check_choice("part", self.part, ("block", "summary"))
        base.check_int("summary_tokens", self.summary_tokens, most=self.stride)

    @classmethod
    def heads(cls, stride: int, summary_tokens: int = 1) -> per_head.PerHead:
        """Even heads attend to their block, odd ones to the summaries.

        >>> Fixed.heads(8, 2).for_head(3)
        Fixed(stride=8, part='summary', summary_tokens=2)
        """
        return per_head.PerHead(
            (cls(stride, "block", summary_tokens), cls(stride, "summary", summary_tokens))
        )

    @property
    def _block(self) -> chunked.Chunked:
        return chunked.Chunked(size=self.stride)

    @property
    def _ordinary(self) -> int:
        return self.stride - self.summary_tokens  # tokens of a block before its summary

    def mask_fn(self, q_pos, kv_pos):
        if self.part == "block":
            return self._block.mask_fn(q_pos, kv_pos)
        return (kv_pos <= q_pos) & (kv_pos % self.stride >= self._ordinary)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        if self.part == "block":
            return self._block.block_state(q_lo, q_hi, kv_lo, kv_hi)
        first = kv_lo + base.greatest(self._ordinary - kv_lo % self.stride, 0)
        one_summary = (first == kv_lo) & (kv_lo // self.stride == (kv_hi - 1) // self.stride)
        return base.state_of(
            empty=(first >= kv_hi) | (first > q_hi - 1),
            full=(kv_hi - 1 <= q_lo) & (one_summary | (self._ordinary == 0)),
        )

    @property
    def causal(self) -> bool:
        return True

    @property
    def may_be_empty(self) -> bool:
        return self.part == "summary" and self._ordinary > 0


EXAMPLES = (
    Fixed(stride=9, part="block"),
    Fixed(stride=9, part="summary"),
    Fixed(stride=64, part="summary", summary_tokens=8),
    Fixed(stride=5, part="summary", summary_tokens=5),
)
