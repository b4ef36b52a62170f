"""Orders of the tokens of a grid: tiles, axis orders, dilation groups; curves are in `curves`.

A reordering says which token of the row-major grid stands at which place of the sequence, by
integer arithmetic where there is a closed form, so that a kernel can evaluate a pattern in the new
order without a table. Blocks of consecutive places then are compact boxes of the grid, which is
what makes a window of neighbours few blocks.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import numpy as np

_INT32_MAX = 2**31 - 1


class Span(NamedTuple):
    """Coordinates along one axis: every `step` from `lo` on, `width` of them, all below `hi`.

    Ints or arrays of them. `width` > 1 are the members of neighbouring residue classes.
    """

    lo: Any
    hi: Any
    step: Any = 1
    width: Any = 1


class _Level(NamedTuple):
    """One digit of a place: the cell of all places that share the digits up to this one."""

    axis: int | None  # None: the number of the grid
    digit: Any
    start: Any  # first place of the cell
    size: Any  # places in the cell
    span: Span  # coordinates of the cell along `axis`
    is_residue: bool = False


@dataclasses.dataclass(frozen=True)
class Reordering:
    """An order of the tokens of grids of one `shape`, one grid behind the other.

    `x[:, order.forward]` is x in the new order and `y[:, order.inverse]` is y back in row-major
    order. Places after the first grid belong to the next grid of the same shape.

    Attributes:
      shape: tokens along each axis; row-major order has the last axis fastest.
    """

    shape: tuple[int, ...]

    # True when `pieces` cuts any range of places into boxes.
    pieces_exact: ClassVar[bool] = False

    @property
    def steps(self) -> tuple[int, ...]:
        """Along each axis, the `step` of the boxes that single dilation groups have; else 1."""
        return (1,) * len(self.shape)

    @property
    def size(self) -> int:
        """Tokens of one grid."""
        return math.prod(self.shape)

    @property
    def forward(self) -> np.ndarray:
        """Row-major index of the token at each place, int32 `[size]`."""
        return _tables(self)[0]

    @property
    def inverse(self) -> np.ndarray:
        """Place of each token in row-major order, int32 `[size]`."""
        return _tables(self)[1]

    @property
    def spec(self) -> tuple:
        """The order as a tuple of literals, which `make` reads back."""
        values = tuple(getattr(self, field.name) for field in dataclasses.fields(self))
        while len(values) > 1 and values[-1] is None:
            values = values[:-1]
        return (type(self).__name__.lower(), *values)

    def coords(self, place) -> tuple:
        """(number of the grid, coordinate along each axis) of the tokens at `place`.

        Integer arithmetic on NumPy or JAX arrays, also traced inside a kernel.
        """
        raise NotImplementedError(f"{type(self).__name__} must define coords(place)")

    def spans(self, lo, hi) -> tuple[Span, ...]:
        """A box (grid numbers, then one span per axis) that holds all places in `[lo, hi)`."""
        raise NotImplementedError(f"{type(self).__name__} must define spans(lo, hi)")

    def cells(self, place) -> list[tuple[Any, Any]]:
        """(first place, places) of ever smaller cells around a place: grids first, itself last.

        Neighbouring cells of one level inside a cell of the level above make a box together.
        """
        raise NotImplementedError(f"{type(self).__name__} must define cells(place)")

    def pieces(self, lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cuts each range `[lo, hi)` of places into sub-ranges that are boxes of the grid.

        Returns:
          (starts, stops), integers `[len(lo), pieces]`; pieces that are not needed are empty.
        """
        first, last = self.cells(lo), self.cells(hi - 1)
        head, tail = lo, hi
        cuts = []
        # From the finest cells up: what is left of the first place's cell, and of the last one's.
        for (a, a_size), (b, b_size) in zip(first[-2::-1], last[-2::-1], strict=True):
            end = a + a_size
            cut = (end < hi) & (head > a)
            cuts.append((head, np.where(cut, end, head)))
            head = np.where(cut, end, head)
            cut = (b > lo) & (tail < b + b_size)
            cuts.append((np.where(cut, b, tail), tail))
            tail = np.where(cut, b, tail)
        cuts.append((head, tail))
        starts, stops = (np.stack(x, -1) for x in zip(*cuts, strict=True))
        used = (starts < stops).any(0)
        return starts[:, used], stops[:, used]

    def index(self, place):
        """Row-major position of the token at `place`, counting through all grids."""
        return ravel(self.coords(place), self.shape)


@functools.lru_cache(maxsize=64)
def _tables(order: Reordering) -> tuple[np.ndarray, np.ndarray]:
    forward = np.asarray(order.index(np.arange(order.size, dtype=np.int32)), np.int32)
    inverse = np.empty_like(forward)
    inverse[forward] = np.arange(order.size, dtype=np.int32)
    forward.flags.writeable = inverse.flags.writeable = False
    return forward, inverse


def ravel(coords, shape):
    """Row-major position of (grid number, coordinates...).

    >>> int(ravel((1, 0, 2), (3, 4)))
    14
    """
    position = coords[0]
    for coordinate, length in zip(coords[1:], shape, strict=True):
        position = position * length + coordinate
    return position


@dataclasses.dataclass(frozen=True)
class Tiles(Reordering):
    """Tile after tile, each in row-major order; with no `tile`, the order of the axes alone.

    The last tiles along an axis are smaller where the tile does not divide it. Closed form: a
    place is split into digits by division, and ranges of places are unions of a few boxes.
    Multi-dimensional tiles of neighbourhood attention [arXiv:2504.16922, sec. 3.3]; axis orders of
    (frame, height, width) [arXiv:2506.16054, sec. 4.1].

    Attributes:
      tile: tokens per tile along each axis; None = no tiles.
      axes: axes from the slowest to the fastest, of the tiles and inside them; None = as they are.
      dilation: per axis, tokens whose coordinate has the same remainder come together, before the
        tiles are cut; None = 1 everywhere.

    Raises:
      ValueError: a field does not fit the shape.

    >>> Tiles((4, 4), (2, 2)).forward
    array([ 0,  1,  4,  5,  2,  3,  6,  7,  8,  9, 12, 13, 10, 11, 14, 15], dtype=int32)
    >>> Tiles((2, 3), axes=(1, 0)).forward
    array([0, 3, 1, 4, 2, 5], dtype=int32)
    >>> Tiles((6,), dilation=(2,)).forward
    array([0, 2, 4, 1, 3, 5], dtype=int32)
    """

    tile: int | tuple[int, ...] | None = None
    axes: tuple[int, ...] | None = None
    dilation: int | tuple[int, ...] | None = None

    pieces_exact: ClassVar[bool] = True

    def __post_init__(self):
        check_shape(self)
        ndim = len(self.shape)
        for name in ("tile", "axes", "dilation"):
            value = getattr(self, name)
            if value is None:
                continue
            value = (value,) * ndim if type(value) is int else tuple(value)
            object.__setattr__(self, name, value)
            if len(value) != ndim or not all(type(x) is int for x in value):
                raise ValueError(f"{name}={value} must have one int per axis of shape={self.shape}")
            if name != "axes" and min(value) < 1:
                raise ValueError(f"{name}={value} must be >= 1 along every axis")
        if self.axes is not None and sorted(self.axes) != list(range(ndim)):
            raise ValueError(f"axes={self.axes} must be an order of {tuple(range(ndim))}")

    @property
    def steps(self) -> tuple[int, ...]:
        return self.dilation or super().steps

    def _levels(self, place) -> list[_Level]:
        order = range(len(self.shape)) if self.axes is None else self.axes
        dilation = self.dilation or (1,) * len(self.shape)
        extents: list[Any] = list(self.shape)  # of the cell, in tokens; ints as long as possible
        origins: list[Any] = [0] * len(self.shape)
        image = place // self.size
        rest = place - image * self.size
        levels = [_Level(None, image, place - rest, self.size, Span(image, image + 1))]

        def fix(axis, digit, origin, extent, is_residue=False):
            origins[axis], extents[axis] = origin, extent
            hi = origin + (extent - 1) * dilation[axis] + 1
            span = Span(origin, hi, dilation[axis])
            levels.append(_Level(axis, digit, place - rest, math.prod(extents), span, is_residue))

        for axis in order:
            step, length = dilation[axis], self.shape[axis]
            if step == 1:
                continue
            shorter, num_longer = divmod(length, step)
            others = math.prod(extents[:axis] + extents[axis + 1 :])
            long, short = (shorter + 1) * others, shorter * others
            edge = num_longer * long
            # The first groups have a token more; past them, the offset is counted from the edge.
            past = 1 * (rest >= edge)
            residue = (1 - past) * (rest // long)
            if shorter:
                residue = residue + past * (num_longer + (rest - edge) // short)
            is_long = 1 * (residue < num_longer)
            before = residue * short + (is_long * residue + (1 - is_long) * num_longer) * others
            rest = rest - before
            extent = shorter if num_longer == 0 else shorter + is_long
            fix(axis, residue, residue, extent, is_residue=True)
        for axis in order:
            if self.tile is None:
                continue
            side, length = self.tile[axis], extents[axis]
            slab = side * math.prod(extents[:axis] + extents[axis + 1 :])
            index = rest // slab
            rest = rest - index * slab
            extent = side
            if not isinstance(length, int) or length % side:
                left = length - index * side
                extent = side + (left - side) * (left < side)
            fix(axis, index, origins[axis] + index * side * dilation[axis], extent)
        for i, axis in enumerate(order):
            inner = math.prod(extents[a] for a in order[i + 1 :])
            offset = rest // inner
            rest = rest - offset * inner
            fix(axis, offset, origins[axis] + offset * dilation[axis], 1)
        return levels

    def cells(self, place) -> list[tuple[Any, Any]]:
        return [(level.start, level.size) for level in self._levels(place)]

    def coords(self, place) -> tuple:
        levels = self._levels(place)
        last = {level.axis: level for level in levels}
        return levels[0].digit, *(last[axis].span.lo for axis in range(len(self.shape)))

    def spans(self, lo, hi) -> tuple[Span, ...]:
        first, last = self._levels(lo), self._levels(hi - 1)
        spans = {axis: Span(0, n) for axis, n in enumerate(self.shape)}
        same = first[0].digit == last[0].digit
        for a, b in zip(first[1:], last[1:], strict=True):
            equal = same & (a.digit == b.digit)
            new = Span(a.span.lo, b.span.hi, a.span.step)
            if a.is_residue:  # Remainders that differ are neighbouring classes, each one whole.
                end = _select(equal, b.span.hi, self.shape[a.axis])
                new = Span(a.digit, end, a.span.step, b.digit - a.digit + 1)
            # Below the first digit that differs, the axis keeps what the digits above it leave.
            spans[a.axis] = Span(*map(_select, (same,) * 4, new, spans[a.axis]))
            same = equal
        images = Span(first[0].digit, last[0].digit + 1)
        return images, *(spans[axis] for axis in range(len(self.shape)))


@functools.lru_cache(maxsize=256)
def make(spec: tuple) -> Reordering:
    """The order that a `spec` names: `("tiles", shape, tile, axes, dilation)` and so on.

    Raises:
      ValueError: no such order.

    >>> make(("tiles", (4, 6), (2, 3))).tile
    (2, 3)
    """
    from sparse_attn.masks import curves  # It imports this module.

    kinds = {"tiles": Tiles, "hilbert": curves.Hilbert, "gilbert": curves.Gilbert}
    if not spec or spec[0] not in kinds:
        raise ValueError(f"order={spec!r} must begin with one of {', '.join(map(repr, kinds))}")
    try:
        return kinds[spec[0]](*spec[1:])
    except TypeError as error:
        raise ValueError(f"order={spec!r}: {error}") from None


def check_shape(order: Reordering, ndim: int | None = None) -> None:
    """Checks and stores the shape of an order.

    Raises:
      ValueError: it is no tuple of `ndim` ints >= 1, or the grid has 2**31 tokens or more.
    """
    shape = (order.shape,) if type(order.shape) is int else tuple(order.shape)
    object.__setattr__(order, "shape", shape)
    if not shape or not all(type(n) is int and n >= 1 for n in shape):
        raise ValueError(f"shape={order.shape!r} must be ints >= 1, one per axis")
    if ndim is not None and len(shape) != ndim:
        raise ValueError(f"shape={shape} must have {ndim} axes")
    if math.prod(shape) > _INT32_MAX:
        raise ValueError(f"shape={shape} must hold fewer than 2**31 tokens")


def _select(known, new, old):
    if isinstance(new, int) and isinstance(old, int) and new == old:
        return new  # Stays static: steps are 1 almost everywhere.
    return old + (new - old) * known
