"""Circular windows: keys within a Euclidean distance of the query on the grid."""

import dataclasses
from typing import ClassVar

from sparse_attn.masks import grids
from sparse_attn.patterns import base

_LONGEST = 1 << 14  # Squared distances along all of three axes stay inside int32.


@dataclasses.dataclass(frozen=True)
class Circular(grids.GridPattern):
    """Keys with `dx**2 + dy**2 <= radius**2`, on any number of axes.  [arXiv:2412.16112, sec. 3.2]

    Points at exactly the radius are inside. Text tokens that see and are seen by all image tokens:
    `joint(pattern=circular(...), tokens=n)`. Inside each frame of a video:
    `circular(...) & axial(axes=(1, 2))`.

    Raises:
      ValueError: `radius` is not an int >= 0, or an axis is longer than 16384 tokens.

    >>> import numpy as np
    >>> pattern = Circular(shape=(5, 5), radius=2)
    >>> pattern.mask_fn(np.int32(12), np.arange(25)).reshape(5, 5).astype(int)  # of the middle
    array([[0, 0, 1, 0, 0],
           [0, 1, 1, 1, 0],
           [1, 1, 1, 1, 1],
           [0, 1, 1, 1, 0],
           [0, 0, 1, 0, 0]])
    """

    shape: tuple[int, ...]
    radius: int

    box_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        grids.check_shape(self)
        for length in self.shape:
            base.check_int(f"each axis of shape={self.shape}", length, most=_LONGEST)
        base.check_int("radius", self.radius, least=0, most=2 * _LONGEST)

    def visible(self, q, kv):
        squares = sum((a - b) * (a - b) for a, b in zip(q, kv, strict=True))
        return squares <= self.radius**2

    def box_state(self, q_box, kv_box):
        nearest = farthest = 0
        for q, kv in zip(q_box, kv_box, strict=True):
            before, behind = kv.lo - (q.hi - 1), q.lo - (kv.hi - 1)
            gap = base.greatest(base.greatest(before, behind), 0)
            reach = base.greatest(-before, -behind)
            nearest, farthest = nearest + gap * gap, farthest + reach * reach
        return base.state_of(nearest > self.radius**2, farthest <= self.radius**2)

    @property
    def causal(self) -> bool:
        return self.radius == 0 or max(self.shape) == 1


EXAMPLES = (
    Circular(shape=(8, 9), radius=2),
    Circular(shape=(4, 5, 4), radius=2),
)
