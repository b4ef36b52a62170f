"""Sliding windows: one-sided (causal) or two-sided."""

import dataclasses
from typing import ClassVar

from sparse_attn.patterns import base


@dataclasses.dataclass(frozen=True)
class Local(base.Pattern):
    """A sliding window around the query.  [arXiv:2004.05150, sec. 3.1]

    Give exactly one of:
      window: tokens one query sees, itself included; causal: keys `(q - window, q]`.
      reach: `(left, right)` tokens seen on each side, the query itself excluded; `None` on a
        side = unlimited.

    Raises:
      ValueError: both or none given, or a number that is not an int in its range.

    >>> import numpy as np
    >>> Local(window=2).mask_fn(np.arange(3)[:, None], np.arange(3)[None, :]).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]])
    >>> Local(reach=(0, 1)).mask_fn(np.arange(3)[:, None], np.arange(3)[None, :]).astype(int)
    array([[1, 1, 0],
           [0, 1, 1],
           [0, 0, 1]])
    """

    window: int | None = None
    reach: tuple[int | None, int | None] | None = None

    block_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        if (self.window is None) == (self.reach is None):
            raise ValueError(
                f"window={self.window} and reach={self.reach}: give exactly one of the two"
            )
        if self.window is not None:
            base.check_int("window", self.window)
            return
        if not isinstance(self.reach, (tuple, list)) or len(self.reach) != 2:
            raise ValueError(f"reach={self.reach!r} must be (left, right)")
        object.__setattr__(self, "reach", tuple(self.reach))
        for i, side in enumerate(self.reach):
            if side is not None:
                base.check_int(f"reach[{i}]", side, least=0)

    @property
    def _sides(self) -> tuple[int | None, int | None]:
        return (self.window - 1, 0) if self.reach is None else self.reach

    def mask_fn(self, q_pos, kv_pos):
        left, right = self._sides
        ahead = kv_pos - q_pos
        if left is None:
            return ahead <= right if right is not None else ahead == ahead
        return ahead >= -left if right is None else (ahead >= -left) & (ahead <= right)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        left, right = self._sides
        # The offset kv - q of a block runs from `low` to `high`; the window is [-left, right].
        low, high = kv_lo - (q_hi - 1), (kv_hi - 1) - q_lo
        empty, full = low > high, low <= high
        if left is not None:
            empty, full = empty | (high < -left), full & (low >= -left)
        if right is not None:
            empty, full = empty | (low > right), full & (high <= right)
        return base.state_of(empty, full)

    @property
    def causal(self) -> bool:
        return self._sides[1] == 0


EXAMPLES = (
    Local(window=1),
    Local(window=3),
    Local(window=64),
    Local(reach=(5, 2)),
    Local(reach=(None, 0)),
    Local(reach=(3, None)),
)
