"""Prefix-LM: a two-sided prefix, then causal."""

import dataclasses
from typing import ClassVar

from sparse_attn.patterns import base


@dataclasses.dataclass(frozen=True)
class Prefix(base.Pattern):
    """All see the first `tokens` positions, the rest is causal.  [arXiv:1910.10683, sec. 3.2.1]

    Raises:
      ValueError: `tokens` is not an int >= 1.

    >>> import numpy as np
    >>> Prefix(tokens=2).mask_fn(np.arange(4)[:, None], np.arange(4)[None, :]).astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [1, 1, 1, 1]])
    """

    tokens: int

    block_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        base.check_int("tokens", self.tokens)

    def mask_fn(self, q_pos, kv_pos):
        return (kv_pos < self.tokens) | (kv_pos <= q_pos)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        return base.state_of(
            empty=(kv_lo >= self.tokens) & (kv_lo > q_hi - 1),
            full=(kv_hi <= self.tokens) | (kv_hi - 1 <= q_lo),
        )

    @property
    def causal(self) -> bool:
        return self.tokens == 1


EXAMPLES = (Prefix(tokens=1), Prefix(tokens=5), Prefix(tokens=70))
