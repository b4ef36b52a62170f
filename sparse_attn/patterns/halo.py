"""Blocked local attention: the queries of a block share one neighbourhood, the block and a halo."""

import dataclasses

from sparse_attn.masks import grids


@dataclasses.dataclass(frozen=True)
class Halo(grids.WindowPattern):
    """Keys of the query's block and of a halo of tokens around it.  [arXiv:2103.12731, sec. 3.1]

    At the borders of the grid the halo is cut off. `halo=0` is window attention (`swin`); `block=1`
    is a window around each query that is not moved inward (compare `neighborhood`).

    Attributes:
      shape: tokens along each axis, row-major.
      block: tokens of a block along each axis, an int or one per axis; None = the whole axis.
      halo: tokens that are seen before the block along each axis, and after it.
      after: tokens that are seen after it, where that is another number; None = `halo`.

    Raises:
      ValueError: a field is not in its range.

    >>> import numpy as np
    >>> pattern = Halo(shape=(4, 4), block=2, halo=1)
    >>> pattern.mask_fn(np.int32(0), np.arange(16)).reshape(4, 4).astype(int)  # of the corner
    array([[1, 1, 1, 0],
           [1, 1, 1, 0],
           [1, 1, 1, 0],
           [0, 0, 0, 0]])
    """

    shape: tuple[int, ...]
    block: int | tuple[int | None, ...] | None
    halo: int | tuple[int, ...] = 0
    after: int | tuple[int, ...] | None = None

    def __post_init__(self):
        grids.check_shape(self)
        grids.check_axes(self, "block", optional=True)
        grids.check_axes(self, "halo", least=0)
        if self.after is not None:
            grids.check_axes(self, "after", least=0)
        if self.after == self.halo:
            object.__setattr__(self, "after", None)

    def whole(self, axis):
        return grids.on_axis(self.block, axis) is None

    def window(self, axis, at, length):
        block, halo = (grids.on_axis(x, axis) for x in (self.block, self.halo))
        after = halo if self.after is None else grids.on_axis(self.after, axis)
        first = at // block * block
        return first - halo, first + block + after


def unidirectional(shape: tuple[int, int], block: int) -> Halo:
    """The query's block and the ones left, above and above left of it.

    [arXiv:2405.04312, sec. 3.1]. Causal over blocks in raster order, so an image is made
    block row by block row (Inf-DiT).

    >>> unidirectional((8, 8), 4)
    Halo(shape=(8, 8), block=4, halo=4, after=0)
    """
    return Halo(shape, block, halo=block, after=0)


def frame_diagonal(frames: int, frame_tokens: int, width: int) -> Halo:
    """A band of `width` tokens on both sides inside each frame.  [arXiv:2506.03065, sec. 3.1]

    The "diagonal" heads of Sparse-vDiT. Its vertical stripes are `global_tokens`, or the prefix of
    `joint`; its dense heads `full`; a skipped head has no pattern.

    >>> frame_diagonal(3, 16, width=2)
    Halo(shape=(3, 16), block=1, halo=(0, 2), after=None)
    """
    return Halo((frames, frame_tokens), block=1, halo=(0, width))


def frame_multi_diagonal(frames: int, frame_tokens: int, width: int) -> Halo:
    """The same band in every frame: places near the query's own.  [arXiv:2506.03065, sec. 3.1]

    >>> frame_multi_diagonal(3, 16, width=2)
    Halo(shape=(3, 16), block=(None, 1), halo=(0, 2), after=None)
    """
    return Halo((frames, frame_tokens), block=(None, 1), halo=(0, width))


EXAMPLES = (
    Halo(shape=(7, 10), block=(2, 3), halo=(1, 2), after=0),
    Halo(shape=(5, 15), block=(None, 1), halo=(0, 2)),
)
