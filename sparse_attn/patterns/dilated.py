"""A causal window with gaps: every `dilation`-th key back from the query."""

import dataclasses
from typing import ClassVar

from sparse_attn.patterns import base


@dataclasses.dataclass(frozen=True)
class Dilated(base.Pattern):
    """Keys `q - j * dilation` for `0 <= j < window`.  [arXiv:2004.05150, sec. 3.1]

    One query sees `window` keys spread over `(window - 1) * dilation + 1` tokens. The paper
    dilates some heads only; combine with `local` by `|`, or by `per_head`.

    Raises:
      ValueError: a field is not an int >= 1, or the reach exceeds int32.

    >>> import numpy as np
    >>> np.flatnonzero(Dilated(window=3, dilation=4).mask_fn(np.int32(9), np.arange(12)))
    array([1, 5, 9])
    """

    window: int
    dilation: int

    block_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        base.check_int("window", self.window)
        base.check_int("dilation", self.dilation)
        base.check_int("(window - 1) * dilation", self._reach, least=0)

    @property
    def _reach(self) -> int:
        return (self.window - 1) * self.dilation

    def mask_fn(self, q_pos, kv_pos):
        back = q_pos - kv_pos
        return (back >= 0) & (back <= self._reach) & (back % self.dilation == 0)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        # Every distance q - kv from `low` to `high` occurs in the block.
        low, high = q_lo - (kv_hi - 1), (q_hi - 1) - kv_lo
        last = base.least(high, self._reach) // self.dilation * self.dilation
        gapless = (self.dilation == 1) | ((low == high) & (low % self.dilation == 0))
        return base.state_of(
            empty=last < base.greatest(low, 0),
            full=(low >= 0) & (high <= self._reach) & gapless,
        )

    @property
    def causal(self) -> bool:
        return True


EXAMPLES = (
    Dilated(window=3, dilation=2),
    Dilated(window=1, dilation=5),
    Dilated(window=9, dilation=1),
    Dilated(window=16, dilation=7),
)
