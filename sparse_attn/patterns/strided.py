"""The strided factorisation of the Sparse Transformer: a row head and a column head."""

import dataclasses
from typing import ClassVar

from sparse_attn.patterns import base, local, per_head


@dataclasses.dataclass(frozen=True)
class Strided(base.Pattern):
    """One head of strided attention, for data with rows of `stride`.  [arXiv:1904.10509, sec. 4.3]

    `part="row"` sees the query and the `stride` tokens before it (`stride + 1` keys), and
    `part="column"` every `stride`-th key back from the query. Two layers, or two heads and a
    layer, reach every earlier token. `Strided.heads(stride)` alternates the parts over the heads;
    one head that merges them is `strided(stride=s, part='row') | strided(stride=s, part='column')`.

    Raises:
      ValueError: `stride` is not an int >= 1, or `part` is another word.

    >>> import numpy as np
    >>> np.flatnonzero(Strided(stride=4, part="column").mask_fn(np.int32(9), np.arange(12)))
    array([1, 5, 9])
    """

    stride: int
    part: str

    block_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        base.check_int("stride", self.stride, most=2**31 - 2)
        base.check_choice("part", self.part, ("row", "column"))

    @classmethod
    def heads(cls, stride: int) -> per_head.PerHead:
        """Even heads attend to rows, odd ones to columns.

        >>> Strided.heads(4).expression()
        "per_head(patterns=(strided(stride=4, part='row'), strided(stride=4, part='column')))"
        """
        return per_head.PerHead((cls(stride, "row"), cls(stride, "column")))

    @property
    def _row(self) -> local.Local:
        return local.Local(window=self.stride + 1)

    def mask_fn(self, q_pos, kv_pos):
        if self.part == "row":
            return self._row.mask_fn(q_pos, kv_pos)
        return (kv_pos <= q_pos) & ((q_pos - kv_pos) % self.stride == 0)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        if self.part == "row":
            return self._row.block_state(q_lo, q_hi, kv_lo, kv_hi)
        # Every distance q - kv from `low` to `high` occurs in the block.
        low, high = q_lo - (kv_hi - 1), (q_hi - 1) - kv_lo
        gapless = (self.stride == 1) | ((low == high) & (low % self.stride == 0))
        return base.state_of(
            empty=high // self.stride * self.stride < base.greatest(low, 0),
            full=(low >= 0) & gapless,
        )

    @property
    def causal(self) -> bool:
        return True


EXAMPLES = (
    Strided(stride=7, part="row"),
    Strided(stride=7, part="column"),
    Strided(stride=1, part="column"),
    Strided(stride=64, part="column"),
)
