"""Axial attention: every query sees the tokens of its row, of its column, or of its frame."""

import dataclasses

from sparse_attn.masks import grids


@dataclasses.dataclass(frozen=True)
class Axial(grids.WindowPattern):
    """All keys that differ from the query along `axes` only.  [arXiv:1912.12180, sec. 3.1]

    A row of an image is `axes=(1,)`, a column `axes=(0,)`. With `& causal()` these are the masked
    rows and columns of the autoregressive model (sec. 3.2); `a | b` sees row and column at once. In
    a video `(time, height, width)`, `axes=(1, 2)` is attention inside the frame and `axes=(0,)`
    through time.

    Attributes:
      shape: tokens along each axis, row-major.
      axes: one or more axes, negative ones counted from the end; stored ascending.

    Raises:
      ValueError: an axis does not exist, or is given twice.

    >>> import numpy as np
    >>> pattern = Axial(shape=(3, 4), axes=(1,)) | Axial(shape=(3, 4), axes=(0,))
    >>> pattern.mask_fn(np.int32(5), np.arange(12)).reshape(3, 4).astype(int)
    array([[0, 1, 0, 0],
           [1, 1, 1, 1],
           [0, 1, 0, 0]])
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def __post_init__(self):
        grids.check_shape(self)
        ndim = len(self.shape)
        axes = (self.axes,) if type(self.axes) is int else tuple(self.axes)
        inside = all(type(a) is int and -ndim <= a < ndim for a in axes)
        if not axes or not inside or len({a % ndim for a in axes}) != len(axes):
            raise ValueError(f"axes={self.axes!r} must be different axes of shape={self.shape}")
        object.__setattr__(self, "axes", tuple(sorted(a % ndim for a in axes)))

    def whole(self, axis):
        return axis in self.axes

    def window(self, axis, at, length):
        return at, at + 1


EXAMPLES = (
    Axial(shape=(6, 9), axes=(0,)),
    Axial(shape=(3, 4, 5), axes=(0, 2)),
)
