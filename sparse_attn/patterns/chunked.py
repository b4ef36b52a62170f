"""Block-local attention: the sequence is cut into chunks, and a query sees its own chunk."""

import dataclasses
from typing import ClassVar

from sparse_attn.patterns import base


@dataclasses.dataclass(frozen=True)
class Chunked(base.Pattern):
    """Keys of the query's chunk of `size` tokens.  [arXiv:1801.10198, sec. 4.2]

    Causal inside the chunk, or the whole chunk with `two_sided=True`  [arXiv:1911.02972, sec. 3].

    Raises:
      ValueError: `size` is not an int >= 1, or `two_sided` is not a bool.

    >>> import numpy as np
    >>> Chunked(size=2).mask_fn(np.arange(4)[:, None], np.arange(4)[None, :]).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [0, 0, 1, 0],
           [0, 0, 1, 1]])
    """

    size: int
    two_sided: bool = False

    block_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        base.check_int("size", self.size)
        if not isinstance(self.two_sided, bool):
            raise ValueError(f"two_sided={self.two_sided!r} must be True or False")

    def mask_fn(self, q_pos, kv_pos):
        visible = q_pos // self.size == kv_pos // self.size
        return visible if self.two_sided else visible & (kv_pos <= q_pos)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        first_q, last_q = q_lo // self.size, (q_hi - 1) // self.size
        first_kv, last_kv = kv_lo // self.size, (kv_hi - 1) // self.size
        empty = (last_q < first_kv) | (last_kv < first_q)
        full = (first_q == last_kv) & (last_q == first_kv)
        if not self.two_sided:
            empty, full = empty | (kv_lo > q_hi - 1), full & (kv_hi - 1 <= q_lo)
        return base.state_of(empty, full)

    @property
    def causal(self) -> bool:
        return not self.two_sided or self.size == 1


EXAMPLES = (
    Chunked(size=1),
    Chunked(size=5),
    Chunked(size=64),
    Chunked(size=5, two_sided=True),
    Chunked(size=48, two_sided=True),
)
