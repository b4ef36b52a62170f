"""Space-filling curves: orders in which consecutive tokens are neighbours on the grid."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import numpy as np

from sparse_attn.masks import reorder


@dataclasses.dataclass(frozen=True)
class Hilbert(reorder.Reordering):
    """A Hilbert curve through each square of `side` tokens, squares in row-major order.

    Closed form by bits; consecutive tokens of a square are neighbours on the grid, and every
    aligned run of 4**k tokens is a square.  [arXiv:2510.16325, sec. 3.3]

    Attributes:
      side: tokens per side of a square, a power of two that divides both axes; None = the largest.

    Raises:
      ValueError: the shape is not 2-D, or `side` is not such a number.

    >>> Hilbert((4, 4)).forward
    array([ 0,  4,  5,  1,  2,  3,  7,  6, 10, 11, 15, 14, 13,  9,  8, 12], dtype=int32)
    """

    side: int | None = None

    pieces_exact: ClassVar[bool] = True

    def __post_init__(self):
        reorder.check_shape(self, ndim=2)
        largest = math.gcd(*self.shape)
        largest &= -largest
        side = largest if self.side is None else self.side
        if type(side) is not int or side < 1 or largest % side:
            raise ValueError(
                f"side={self.side} must be a power of two that divides shape={self.shape}"
            )
        object.__setattr__(self, "side", side)

    def coords(self, place) -> tuple:
        image, square, at = self._squares(place)
        y, x = _hilbert(at, self.side)
        columns = self.shape[1] // self.side
        return image, square // columns * self.side + y, square % columns * self.side + x

    def cells(self, place) -> list[tuple[Any, Any]]:
        area, columns = self.side**2, self.shape[1] // self.side
        # Grids, rows of squares, squares, and halves of halves: two quadrants are a rectangle.
        sizes = [self.size, area * columns, *(area >> i for i in range(area.bit_length()))]
        return [(place // size * size, size) for size in sizes]

    def _squares(self, place):
        area = self.side**2
        image = place // self.size
        rest = place - image * self.size
        return image, rest // area, rest % area

    def spans(self, lo, hi) -> tuple[reorder.Span, ...]:
        """The box around the at most five aligned squares of the curve that touch the range."""
        last = hi - 1
        (image, square, at), (image_b, square_b, at_b) = self._squares(lo), self._squares(last)
        same_image = image == image_b
        inside = same_image & (square == square_b)
        # 4**k is the largest power below the length: the range meets at most 5 such squares.
        k = 0 * at
        for i in range(1, self.side.bit_length()):
            k = k + 1 * (at_b - at + 1 >= 4**i)
        bounds = None
        for i in range(5):
            part = (at >> 2 * k) + i
            part = part + ((at_b >> 2 * k) - part) * (part > (at_b >> 2 * k))
            corner = [(c >> k) << k for c in _hilbert((part * inside) << 2 * k, self.side)]
            box = [(c, c + (1 << k)) for c in corner]
            bounds = box if bounds is None else [
                (_least(a, c), _greatest(b, d))
                for (a, b), (c, d) in zip(bounds, box, strict=True)
            ]  # fmt: skip
        columns = self.shape[1] // self.side
        rows = square // columns, square_b // columns
        cols = square % columns, square_b % columns
        same_row = same_image & (rows[0] == rows[1])
        spans = []
        for axis, (a, b) in enumerate(bounds):
            first, final = (rows, cols)[axis]
            known = same_image if axis == 0 else same_row
            length = self.shape[axis]
            low = first * known * self.side
            high = length + ((final + 1) * self.side - length) * known
            low = low + (first * self.side + a - low) * inside
            high = high + (first * self.side + b - high) * inside
            spans.append(reorder.Span(low, high))
        return reorder.Span(image, image_b + 1), *spans


def _hilbert(place, side: int):
    """(y, x) of the places along one Hilbert curve, by two bits a level."""
    x, y = 0 * place, 0 * place
    for level in range(side.bit_length() - 1):
        side_here = 1 << level
        digit = place >> 2 * level
        right, down = 1 & (digit >> 1), 1 & (digit ^ (digit >> 1))
        # Quadrants 0 and 3 are transposed, and 3 is also mirrored: where `down` is 0.
        turn = 1 - down
        mirror = turn * right
        x = x + mirror * (side_here - 1 - 2 * x)
        y = y + mirror * (side_here - 1 - 2 * y)
        x, y = x + turn * (y - x), y + turn * (x - y)
        x, y = x + side_here * right, y + side_here * down
    return x, y


@dataclasses.dataclass(frozen=True)
class Gilbert(reorder.Reordering):
    """A generalised Hilbert curve through a rectangle of any sides; a table, not arithmetic.

    The construction of Cerveny (2018, "Gilbert"): the rectangle is cut in two along its long side,
    or in three like Hilbert's square, until it is a line. Consecutive tokens are neighbours on the
    grid, but for at most one diagonal step. PARTIAL blocks are lowered to bits: see `lowering`.

    >>> Gilbert((2, 3)).forward
    array([0, 3, 4, 5, 2, 1], dtype=int32)
    """

    def __post_init__(self):
        reorder.check_shape(self, ndim=2)

    @property
    def forward(self) -> np.ndarray:
        return _gilbert_tables(self.shape)[0]

    @property
    def inverse(self) -> np.ndarray:
        return _gilbert_tables(self.shape)[1]


@functools.lru_cache(maxsize=16)
def _gilbert_tables(shape):
    height, width = shape
    corners = (width, 0, 0, height) if width >= height else (0, height, width, 0)
    path = np.array(list(_gilbert(0, 0, *corners)), np.int32)
    forward = path[:, 1] * width + path[:, 0]
    inverse = np.empty_like(forward)
    inverse[forward] = np.arange(len(forward), dtype=np.int32)
    forward.flags.writeable = inverse.flags.writeable = False
    return forward, inverse


def _gilbert(x, y, ax, ay, bx, by):
    """Points from (x, y) that fill the rectangle of the long side a and the short side b."""
    width, height = abs(ax + ay), abs(bx + by)
    dax, day, dbx, dby = (int(np.sign(v)) for v in (ax, ay, bx, by))
    if height == 1 or width == 1:
        dx, dy, count = (dax, day, width) if height == 1 else (dbx, dby, height)
        for i in range(count):
            yield x + i * dx, y + i * dy
        return
    # Halves towards zero, so that mirrored rectangles are cut alike.
    ax2, ay2, bx2, by2 = (int(v / 2) for v in (ax, ay, bx, by))
    width2, height2 = abs(ax2 + ay2), abs(bx2 + by2)
    if 2 * width > 3 * height:
        if width2 % 2 and width > 2:
            ax2, ay2 = ax2 + dax, ay2 + day
        yield from _gilbert(x, y, ax2, ay2, bx, by)
        yield from _gilbert(x + ax2, y + ay2, ax - ax2, ay - ay2, bx, by)
        return
    if height2 % 2 and height > 2:
        bx2, by2 = bx2 + dbx, by2 + dby
    yield from _gilbert(x, y, bx2, by2, ax2, ay2)
    yield from _gilbert(x + bx2, y + by2, ax, ay, bx - bx2, by - by2)
    yield from _gilbert(
        x + (ax - dax) + (bx2 - dbx),
        y + (ay - day) + (by2 - dby),
        -bx2, -by2, -(ax - ax2), -(ay - ay2),
    )  # fmt: skip


def _least(a, b):
    return a + (b - a) * (b < a)


def _greatest(a, b):
    return a + (b - a) * (b > a)
