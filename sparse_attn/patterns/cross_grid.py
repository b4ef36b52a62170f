"""Queries on one grid, keys on a coarser or finer grid of the same picture."""

import dataclasses

from sparse_attn.masks import grids


@dataclasses.dataclass(frozen=True)
class CrossGrid(grids.WindowPattern):
    """Keys at the query's place on another grid, and `reach` more on each side.

    Along an axis with Q queries and K keys, query i covers keys `i*K//Q` to the first one at or
    past `(i+1)*K/Q`. With keys pooled from the queries' grid: the 3 x 3 super tokens around a
    pixel are `reach=1` [arXiv:2211.11167, sec. 3.2], and one pooled key per window, seen by all
    (Twins [arXiv:2104.13840, sec. 3.2], HiLo's low frequencies [arXiv:2205.13213, sec. 3.2]), is
    `reach=None`. Compressed tokens that look back at the region they stand for are `reach=0` with
    `key_shape` finer than `shape`. Views that see only their own image are `reach=(0, None)` on
    grids (views, tokens).

    Attributes:
      shape: queries along each axis, row-major.
      key_shape: keys along each axis.
      reach: keys on each side, an int or one per axis; None = the whole axis.

    Raises:
      ValueError: a field is not in its range.

    >>> import numpy as np
    >>> pattern = CrossGrid(shape=(4, 4), key_shape=(2, 2), reach=0)
    >>> pattern.mask_fn(np.int32(6), np.arange(4)).reshape(2, 2).astype(int)  # row 1, column 2
    array([[0, 1],
           [0, 0]])
    """

    shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    reach: int | tuple[int | None, ...] | None = 0

    def __post_init__(self):
        grids.check_shape(self)
        grids.check_shape(self, "key_shape")
        if len(self.shape) != len(self.key_shape):
            raise ValueError(f"key_shape={self.key_shape} must have the axes of shape={self.shape}")
        grids.check_axes(self, "reach", least=0, optional=True)

    @property
    def kv_shape(self):
        return self.key_shape

    def whole(self, axis):
        return grids.on_axis(self.reach, axis) is None

    def window(self, axis, at, length):
        reach, queries = grids.on_axis(self.reach, axis), self.shape[axis]
        end = ((at + 1) * length + queries - 1) // queries
        return at * length // queries - reach, end + reach


EXAMPLES = (
    CrossGrid(shape=(8, 8), key_shape=(4, 4), reach=1),
    CrossGrid(shape=(3, 4), key_shape=(7, 10)),
    CrossGrid(shape=(3, 6), key_shape=(3, 10), reach=(0, None)),
)
