"""Every query sees every key: dense attention."""

import dataclasses
from typing import ClassVar

import numpy as np

from sparse_attn.patterns import base


@dataclasses.dataclass(frozen=True)
class Full(base.Pattern):
    """Dense, two-sided attention.  [arXiv:1706.03762, eq. 1]

    >>> Full().mask_fn(np.arange(2)[:, None], np.arange(3)[None, :]).all()
    np.True_
    """

    block_state_exact: ClassVar[bool] = True

    def mask_fn(self, q_pos, kv_pos):
        return (q_pos == q_pos) & (kv_pos == kv_pos)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        shape = np.broadcast_shapes(*(np.shape(x) for x in (q_lo, q_hi, kv_lo, kv_hi)))
        return np.full(shape, base.FULL, np.int8)


EXAMPLES = (Full(),)
