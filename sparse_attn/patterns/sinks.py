"""Attention sinks: the first tokens stay visible to every later query."""

import dataclasses
from typing import ClassVar

from sparse_attn.patterns import base


@dataclasses.dataclass(frozen=True)
class Sinks(base.Pattern):
    """The first `tokens` positions, causally; combine with a window.  [arXiv:2309.17453, sec. 3.2]

    Raises:
      ValueError: `tokens` is not an int >= 1.

    >>> import numpy as np
    >>> Sinks(tokens=2).mask_fn(np.arange(4)[:, None], np.arange(4)[None, :]).sum(1).tolist()
    [1, 2, 2, 2]
    """

    tokens: int

    block_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        base.check_int("tokens", self.tokens)

    def mask_fn(self, q_pos, kv_pos):
        return (kv_pos < self.tokens) & (kv_pos <= q_pos)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        return base.state_of(
            empty=(kv_lo >= self.tokens) | (kv_lo > q_hi - 1),
            full=(kv_hi <= self.tokens) & (kv_hi - 1 <= q_lo),
        )

    @property
    def causal(self) -> bool:
        return True


EXAMPLES = (Sinks(tokens=1), Sinks(tokens=4), Sinks(tokens=70))
