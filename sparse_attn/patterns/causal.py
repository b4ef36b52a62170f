"""A query sees itself and every key before it."""

import dataclasses
from typing import ClassVar

from sparse_attn.patterns import base


@dataclasses.dataclass(frozen=True)
class Causal(base.Pattern):
    """Dense causal attention: key position <= query position.  [arXiv:1706.03762, sec. 3.2.3]

    >>> import numpy as np
    >>> Causal().mask_fn(np.arange(3)[:, None], np.arange(3)[None, :]).sum(1).tolist()
    [1, 2, 3]
    """

    block_state_exact: ClassVar[bool] = True

    def mask_fn(self, q_pos, kv_pos):
        return kv_pos <= q_pos

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        return base.state_of(empty=kv_lo > q_hi - 1, full=kv_hi - 1 <= q_lo)

    @property
    def causal(self) -> bool:
        return True


EXAMPLES = (Causal(),)
