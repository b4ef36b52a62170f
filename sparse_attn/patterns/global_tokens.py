"""Global tokens: the first tokens see everything and are seen by everyone."""

import dataclasses
from typing import ClassVar

from sparse_attn.patterns import base


@dataclasses.dataclass(frozen=True)
class GlobalTokens(base.Pattern):
    """The first `tokens` positions, symmetrically.  [arXiv:2004.05150, sec. 3.1]

    Two-sided; for a decoder write `global_tokens(tokens=n) & causal()`, which leaves what `sinks`
    is: every later query sees them.

    Raises:
      ValueError: `tokens` is not an int >= 1.

    >>> import numpy as np
    >>> GlobalTokens(tokens=1).mask_fn(np.arange(3)[:, None], np.arange(3)[None, :]).astype(int)
    array([[1, 1, 1],
           [1, 0, 0],
           [1, 0, 0]])
    """

    tokens: int

    block_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        base.check_int("tokens", self.tokens)

    def mask_fn(self, q_pos, kv_pos):
        return (q_pos < self.tokens) | (kv_pos < self.tokens)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        return base.state_of(
            empty=(q_lo >= self.tokens) & (kv_lo >= self.tokens),
            full=(q_hi <= self.tokens) | (kv_hi <= self.tokens),
        )


EXAMPLES = (GlobalTokens(tokens=1), GlobalTokens(tokens=5), GlobalTokens(tokens=70))
