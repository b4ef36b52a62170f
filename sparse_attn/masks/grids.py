"""Patterns on grids: coordinates, windows along each axis, and exact states of blocks.

A grid pattern is a rule on coordinates. Positions count row-major through a stack of grids of one
shape (a batch of images packed in a sequence); tokens of different grids never see each other.
The same rule serves row-major and reordered tokens, because a range of places is a union of a few
boxes of the grid in both, and the state of a pair of boxes has a closed form.
"""

import functools
import itertools
import math
from typing import Any, ClassVar

import numpy as np

from sparse_attn.masks import ranges as ranges_lib
from sparse_attn.masks import reorder
from sparse_attn.patterns import base

Span = reorder.Span


class GridPattern(base.Pattern):
    """A rule on the coordinates of a grid. Subclasses are frozen dataclasses with a `shape`.

    They define `visible` and, when they can, `box_state`; `mask_fn` and `block_state` follow.
    """

    shape: tuple[int, ...]

    # True when `box_state` is never a loose PARTIAL for boxes of step 1; see also `fits`.
    box_state_exact: ClassVar[bool] = False

    @property
    def kv_shape(self) -> tuple[int, ...]:
        """The grid of the keys, where it is another one than that of the queries."""
        return self.shape

    def visible(self, q, kv):
        """Visibility from the coordinates of query and key (tuples of arrays, one per axis)."""
        raise NotImplementedError(f"{type(self).__name__} must define visible(q, kv)")

    def box_state(self, q_box: tuple[Span, ...], kv_box: tuple[Span, ...]):
        """0 EMPTY, 1 PARTIAL, 2 FULL of all queries of a box with all keys of another one."""
        return 0 * (q_box[0].lo + kv_box[0].lo) + base.PARTIAL

    def fits(self, axis: int, step: int) -> bool:
        """Whether exactness holds for boxes of this `step` along `axis` too."""
        return step == 1

    def exact_in(self, order: reorder.Reordering) -> bool:
        """Whether `state_of_places` is never a loose PARTIAL for tokens that stand in `order`."""
        fits = all(self.fits(axis, step) for axis, step in enumerate(order.steps))
        return self.box_state_exact and order.pieces_exact and fits

    def mask_fn(self, q_pos, kv_pos):
        orders = reorder.Tiles(self.shape), reorder.Tiles(self.kv_shape)
        return mask_at(self, orders, q_pos, kv_pos)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        orders = reorder.Tiles(self.shape), reorder.Tiles(self.kv_shape)
        return state_of_places(self, orders, q_lo, q_hi, kv_lo, kv_hi)

    @property
    def block_state_exact(self) -> bool:
        return self.box_state_exact


class WindowPattern(GridPattern):
    """Along every axis, the keys of a query are an interval of coordinates, or of a residue class.

    Subclasses define `window`; its bounds must not decrease with the coordinate, and the windows
    of neighbouring queries must touch, so that a range of queries sees one interval.
    """

    box_state_exact: ClassVar[bool] = True

    def window(self, axis: int, at, length):
        """(first, end) of the keys that the query at coordinate `at` sees along `axis`.

        With `period(axis) > 1`, `at` and the bounds count the tokens of one residue class, of
        which there are `length`. Bounds may lie outside `[0, length)`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define window(axis, at, length)")

    def period(self, axis: int) -> int:
        """Keys are visible along `axis` only if they equal the query modulo this number."""
        return 1

    def whole(self, axis: int) -> bool:
        """Whether every query sees all keys along `axis`, or all of its residue class."""
        return False

    def fits(self, axis, step):
        period = self.period(axis)
        return step in (1, period) or (self.whole(axis) and step % period == 0)

    def visible(self, q, kv):
        result = None
        for axis, (at, key) in enumerate(zip(q, kv, strict=True)):
            seen = self._visible(axis, at, key)
            result = seen if result is None else result & seen
        return result

    def _visible(self, axis, at, key):
        period, length = self.period(axis), self.kv_shape[axis]
        if self.whole(axis):
            return _modulo(at - key, period) == 0 if period > 1 else (at == at) & (key == key)
        if period == 1:
            first, end = self.window(axis, at, length)
            return (key >= first) & (key < end)
        residue = _modulo(at, period)
        first, end = self.window(axis, at // period, _residue_length(length, residue, period))
        inside = (key // period >= first) & (key // period < end)
        return inside & (_modulo(key, period) == residue)

    def box_state(self, q_box, kv_box):
        some, every = True, True
        for axis, (q, kv) in enumerate(zip(q_box, kv_box, strict=True)):
            seen, all_seen = self._axis_state(axis, q, kv)
            some, every = some & seen, every & all_seen
        return base.state_of(empty=1 - 1 * some, full=every)

    def _axis_state(self, axis, q, kv):
        """(some key is visible to some query, all are visible to all)."""
        period, length = self.period(axis), self.kv_shape[axis]
        if self.whole(axis):
            if period == 1:
                return True, True
            one_class = _one_residue(q, period) & _one_residue(kv, period)
            return _meet(q, kv, period), one_class & (_modulo(q.lo - kv.lo, period) == 0)
        if period == 1:
            lowest, first_end = self.window(axis, q.lo, length)
            last_first, highest = self.window(axis, q.hi - 1, length)
            some = (lowest < kv.hi) & (highest > kv.lo)
            every = (last_first <= kv.lo) & (first_end >= kv.hi)
            return some, every
        one_q, one_kv = _one_residue(q, period), _one_residue(kv, period)
        # Where one side is in one residue class, that class decides alone.
        residue = _modulo(kv.lo + (q.lo - kv.lo) * one_q, period)
        some, inside = self._class_state(axis, q, kv, residue)
        every = some & inside & one_q & one_kv
        single = one_q | one_kv
        if isinstance(single, (bool, np.bool_, np.ndarray)):
            some, rest, *ends = np.broadcast_arrays(some, np.logical_not(single), *q, *kv)
            if rest.any():
                some = some.copy()
                ends = [x[rest] for x in ends]
                some[rest] = self._some_class(axis, Span(*ends[:4]), Span(*ends[4:]))
        else:
            some = some | self._some_class(axis, q, kv)
        return some, every

    def _some_class(self, axis, q, kv):
        """Whether some key is visible to some query, from every residue class."""
        some = False
        for residue in range(min(self.period(axis), self.kv_shape[axis])):
            some = some | self._class_state(axis, q, kv, residue)[0]
        return some

    def _class_state(self, axis, q, kv, residue):
        """(some key of a residue class is visible to some query, all of them to all)."""
        period = self.period(axis)
        length = _residue_length(self.kv_shape[axis], residue, period)
        at, at_exists = _in_residue(q, residue, period)
        key, key_exists = _in_residue(kv, residue, period)
        lowest, first_end = self.window(axis, at.lo, length)
        last_first, highest = self.window(axis, at.hi - 1, length)
        some = (lowest < key.hi) & (highest > key.lo) & at_exists & key_exists
        return some, (last_first <= key.lo) & (first_end >= key.hi)

    @property
    def causal(self) -> bool:
        return self.shape == self.kv_shape and _looks_ahead(self) is False

    @property
    def may_be_empty(self) -> bool:
        return self.shape != self.kv_shape


def _residue_length(length, residue, period):
    """How many of `0 .. length - 1` equal `residue` modulo `period`."""
    return (length - residue + period - 1) // period


def _in_residue(span, residue, period):
    """The members of a span in a residue class, counted in the class, and whether there are any."""
    lo = (span.lo - residue + period - 1) // period
    hi = (span.hi - 1 - residue) // period + 1
    # A span that strides by whole periods stays in its classes.
    strides = _modulo(span.step, period) == 0
    elsewhere = strides & (_modulo(residue - span.lo, period) >= span.width)
    return Span(lo, hi), (lo < hi) & (1 - 1 * elsewhere == 1)


def _meet(a, b, period):
    """Whether two spans have members that are equal modulo the period."""
    lengths = [x.width + (x.hi - x.lo - x.width) * (_modulo(x.step, period) != 0) for x in (a, b)]
    ahead, behind = (_modulo(x, period) for x in (b.lo - a.lo, a.lo - b.lo))
    return (ahead < lengths[0]) | (behind < lengths[1])


def _one_residue(span, period):
    strides = _modulo(span.step, period) == 0
    return (span.hi - span.lo == 1) | (strides & (span.width == 1))


def _modulo(x, period):
    # NumPy divides by a constant 20 times faster than it takes the remainder.
    return x - x // period * period


@functools.lru_cache(maxsize=256)
def _looks_ahead(pattern: WindowPattern) -> bool:
    """Whether a query sees a key at a larger coordinate, given that each one sees itself."""
    for axis, length in enumerate(pattern.shape):
        at = np.arange(length)
        later = pattern._visible(axis, at[:, None], at) & (at > at[:, None])
        if later.any():
            return True
    return False


def mask_at(pattern: GridPattern, orders, q_place, kv_place):
    """`mask_fn` of a grid pattern whose tokens stand in the given orders (of queries, of keys)."""
    q_image, *q = orders[0].coords(q_place)
    kv_image, *kv = orders[1].coords(kv_place)
    return pattern.visible(tuple(q), tuple(kv)) & (q_image == kv_image)


def state_of_places(pattern: GridPattern, orders, q_lo, q_hi, kv_lo, kv_hi):
    """`block_state` of a grid pattern whose tokens stand in the given orders.

    From the boxes around the ranges. On the host, ranges that are no boxes are cut into pieces
    that are, so that an order with `pieces_exact` gives exact states; a trace leaves them PARTIAL.
    """
    ranges = q_lo, q_hi, kv_lo, kv_hi
    if not all(isinstance(x, (int, np.ndarray, np.generic)) for x in ranges):
        return _box_state(pattern, orders[0].spans(q_lo, q_hi), orders[1].spans(kv_lo, kv_hi))
    ranges = np.broadcast_arrays(*(np.asarray(x, np.int32) for x in ranges))
    shape = ranges[0].shape
    q = ranges_lib.Ranges(orders[0], *(x.ravel() for x in ranges[:2]))
    kv = ranges_lib.Ranges(orders[1], *(x.ravel() for x in ranges[2:]))
    state = _box_state(pattern, q.boxes(), kv.boxes())
    state = np.broadcast_to(state, q.which.shape).astype(np.int8)
    if all(pattern.exact_in(order) for order in orders):
        (loose,) = np.nonzero((state == base.PARTIAL) & ~(q.is_box() & kv.is_box()))
        _resolve(pattern, q, kv, state, loose)
    return state.reshape(shape)


def _box_state(pattern, q_box, kv_box):
    q_image, kv_image = q_box[0], kv_box[0]
    state = pattern.box_state(q_box[1:], kv_box[1:])
    apart = (q_image.hi <= kv_image.lo) | (kv_image.hi <= q_image.lo)
    one = (q_image.hi - q_image.lo == 1) & (kv_image.hi - kv_image.lo == 1)
    # Tokens of several grids: what is seen inside one is not seen across.
    state = state - (state == base.FULL) * (1 - 1 * one)
    return state * (1 - 1 * apart)


def _resolve(pattern, q, kv, state, loose):
    """Replaces PARTIAL by the state that all pairs of pieces together have."""
    if not len(loose):
        return
    some = np.zeros(len(loose), bool)
    every = np.ones(len(loose), bool)
    alive = np.arange(len(loose))
    q_pieces, kv_pieces = q.pieces(q.which[loose]), kv.pieces(kv.which[loose])
    for i, j in itertools.product(range(q_pieces.count), range(kv_pieces.count)):
        # A pair of blocks with something seen and something hidden is PARTIAL: settled.
        alive = alive[~some[alive] | every[alive]]
        if not len(alive):
            return
        of_q, of_kv = q_pieces.which[alive], kv_pieces.which[alive]
        both = q_pieces.there[i][of_q] & kv_pieces.there[j][of_kv]
        at, of_q, of_kv = alive[both], of_q[both], of_kv[both]
        got = _box_state(pattern, q_pieces.boxes(i, of_q), kv_pieces.boxes(j, of_kv))
        some[at] |= got != base.EMPTY
        every[at] &= got == base.FULL
    state[loose] = np.where(every, base.FULL, np.where(some, base.PARTIAL, base.EMPTY))


def check_shape(pattern, name: str = "shape") -> None:
    """Checks and stores the shape of a grid: ints >= 1, one per axis.

    Raises:
      ValueError: it is not such a tuple, or the grid has 2**31 tokens or more.
    """
    shape = getattr(pattern, name)
    shape = (shape,) if type(shape) is int else shape
    if not isinstance(shape, (tuple, list)) or not shape:
        raise ValueError(f"{name}={shape!r} must be ints >= 1, one per axis")
    for length in shape:
        base.check_int(f"each axis of {name}={tuple(shape)}", length)
    if math.prod(shape) > 2**31 - 1:
        raise ValueError(f"{name}={tuple(shape)} must hold fewer than 2**31 tokens")
    object.__setattr__(pattern, name, tuple(shape))


def check_axes(pattern, name: str, *, least: int = 1, optional: bool = False) -> None:
    """Checks a field that is an int for all axes or a tuple with one per axis (None: the default).

    Equal entries are stored as one, so that `(3, 3)` and `3` make equal patterns.

    Raises:
      ValueError: it is neither, or a number is not an int >= `least`.
    """
    value = getattr(pattern, name)
    per_axis = value if isinstance(value, (tuple, list)) else (value,) * len(pattern.shape)
    if len(per_axis) != len(pattern.shape):
        raise ValueError(
            f"{name}={value!r} must have one entry per axis of shape={pattern.shape}, or be one int"
        )
    for x in per_axis:
        if not (optional and x is None):
            base.check_int(name, x, least=least)
    object.__setattr__(pattern, name, collapse(per_axis))


def collapse(per_axis) -> Any:
    """One value when all axes share it, else the tuple.

    >>> collapse((3, 3)), collapse((3, 5))
    (3, (3, 5))
    """
    same = all(x == per_axis[0] for x in per_axis)
    return per_axis[0] if same else tuple(per_axis)


def on_axis(value: Any, axis: int) -> Any:
    """The entry of one axis of a field that `collapse` may have joined."""
    return value[axis] if isinstance(value, tuple) else value


def positions_around(order: reorder.Reordering, lo, hi):
    """The range of row-major positions that holds all tokens at the places `[lo, hi)`."""
    spans = order.spans(lo, hi)
    first = reorder.ravel([span.lo for span in spans], order.shape)
    last = reorder.ravel([span.hi - 1 for span in spans], order.shape)
    return first, last + 1
