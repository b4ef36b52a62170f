"""Block and grid attention: the nearest tokens, or tokens spread evenly over the whole grid."""

import dataclasses

from sparse_attn.masks import grids
from sparse_attn.patterns import per_head


@dataclasses.dataclass(frozen=True)
class BlockGrid(grids.WindowPattern):
    """Keys of the query's block, or the keys at its offset in every cell.

    [arXiv:2204.01697, sec. 3]. Along an axis with `block`, the query sees its block of that many
    tokens. Along an axis with `grid`, the axis is cut into that many equal cells, and the query
    sees the token at its own offset in each: `length / grid` tokens apart. MaxViT alternates both
    in every layer.

    Attributes:
      shape: tokens along each axis, row-major.
      block: tokens of a block along each axis, an int or one per axis; None where `grid` is given.
      grid: cells along each axis, likewise. Where it does not divide the axis, the last cell is
        smaller.

    Raises:
      ValueError: an axis has both or none of the two, or a number is not an int >= 1.

    >>> import numpy as np
    >>> pattern = BlockGrid(shape=(4, 4), grid=2)
    >>> pattern.mask_fn(np.int32(5), np.arange(16)).reshape(4, 4).astype(int)  # of row 1, column 1
    array([[0, 0, 0, 0],
           [0, 1, 0, 1],
           [0, 0, 0, 0],
           [0, 1, 0, 1]])
    """

    shape: tuple[int, ...]
    block: int | tuple[int | None, ...] | None = None
    grid: int | tuple[int | None, ...] | None = None

    def __post_init__(self):
        grids.check_shape(self)
        grids.check_axes(self, "block", optional=True)
        grids.check_axes(self, "grid", optional=True)
        for axis in range(len(self.shape)):
            block, grid = (grids.on_axis(x, axis) for x in (self.block, self.grid))
            if (block is None) == (grid is None):
                raise ValueError(
                    f"block={block} and grid={grid}: give exactly one of the two for axis {axis}"
                )

    def period(self, axis):
        grid = grids.on_axis(self.grid, axis)
        return 1 if grid is None else -(-self.shape[axis] // grid)

    def whole(self, axis):
        return grids.on_axis(self.block, axis) is None

    def window(self, axis, at, length):
        block = grids.on_axis(self.block, axis)
        first = at // block * block
        return first, first + block


def skate_former(shape: tuple[int, int], size: tuple[int, int], num_heads: int) -> per_head.PerHead:
    """Near or far frames times near or far joints, a quarter of the heads each. [arXiv:2403.09508]

    Args:
      shape: (frames, joints), joints ordered so that neighbours in the body are neighbours.
      size: tokens of a partition along each axis, near ones as a block and far ones as a grid.

    Raises:
      ValueError: `num_heads` is not a multiple of four.

    >>> len(skate_former((8, 12), (4, 3), num_heads=8).patterns)
    8
    """
    if num_heads % 4:
        raise ValueError(f"num_heads={num_heads} must be a multiple of 4: one group per partition")
    (frames, joints), none = size, None
    kinds = (
        BlockGrid(shape, block=(frames, joints)),
        BlockGrid(shape, block=(frames, none), grid=(none, joints)),
        BlockGrid(shape, block=(none, joints), grid=(frames, none)),
        BlockGrid(shape, grid=(frames, joints)),
    )
    return per_head.PerHead(tuple(kind for kind in kinds for _ in range(num_heads // 4)))


EXAMPLES = (
    BlockGrid(shape=(8, 8), grid=4),
    BlockGrid(shape=(9, 10), block=(4, None), grid=(None, 4)),
)
