"""Ranges of places as boxes of a grid, for many blocks at once; what is the same is computed once.

The host's half of `grids.state_of_places`: NumPy only, sizes depend on values.
"""

import numpy as np

from sparse_attn.masks import reorder

_MANY = 1 << 20  # Blocks of a sequence up to which a table of their numbers is small.


class Ranges:
    """Ranges of places `[lo, hi)` of one side of many blocks, each different one kept once.

    Attributes:
      lo, hi: the different ranges, int32.
      which: of each block, the number of its range.
    """

    def __init__(self, order, lo, hi):
        self.order = order
        self.lo, self.hi, self.which = different_ranges(lo, hi)
        self.spans = [_as_arrays(s, len(self.lo)) for s in order.spans(self.lo, self.hi)]

    def boxes(self):
        """The box around the range of each block."""
        return [_take(span, self.which) for span in self.spans]

    def is_box(self):
        """Whether the range of each block fills the box around it."""
        volume = np.ones(len(self.lo), np.int64)
        for s in self.spans:
            runs, rest = np.divmod(s.hi - s.lo, s.step)
            volume = volume * (runs * s.width + np.minimum(rest, s.width))
        return (volume == self.hi - self.lo)[self.which]

    def pieces(self, which):
        """The pieces of the ranges of some blocks, each given by its range."""
        return Pieces(self.order, self.lo, self.hi, which)


class Pieces:
    """The boxes that ranges of places are made of.

    Attributes:
      which: of each block, the number of its range.
      count: the most pieces that a range has.
      there: bool `[count, ranges]`, whether the range has that many.
    """

    def __init__(self, order, lo, hi, which):
        used, self.which = _different(which)
        starts, stops = order.pieces(lo[used], hi[used])
        there = starts < stops
        # The existing pieces first, so that most blocks are settled by the first few pairs.
        ranges, column = np.nonzero(there)
        place = np.cumsum(there, axis=1)[ranges, column] - 1
        self.count = int(place.max(initial=-1)) + 1
        first, end = (
            np.zeros((self.count, len(used)), np.int32),
            np.ones((self.count, len(used)), np.int32),
        )
        first[place, ranges], end[place, ranges] = starts[ranges, column], stops[ranges, column]
        self.there = np.zeros(first.shape, bool)
        self.there[place, ranges] = True
        self.spans = [_as_arrays(s, first.shape) for s in order.spans(first, end)]

    def boxes(self, i, ranges):
        """The boxes of piece `i` of each of `ranges`."""
        return [_take(_take(span, i), ranges) for span in self.spans]


def different_ranges(lo, hi):
    """The different ranges among `[lo, hi)`, and which of them each one is."""
    size, end = int((hi - lo).max(initial=1)), hi.max(initial=1)
    index = lo // size
    aligned = (index * size == lo).all() and (lo + np.minimum(size, end - lo) == hi).all()
    if aligned and end // size < _MANY:
        # Aligned blocks, as in lowering: their numbers are few, and nothing has to be sorted.
        used, which = _different(index)
        first = used * size
        return first.astype(np.int32), np.minimum(first + size, end).astype(np.int32), which
    keys, which = np.unique(lo.astype(np.int64) << 32 | hi, return_inverse=True)
    return *(x.astype(np.int32) for x in (keys >> 32, keys & 0xFFFFFFFF)), which


def _different(numbers):
    """The different ones of small numbers >= 0, ascending, and which of them each one is."""
    used = np.zeros(numbers.max(initial=-1) + 1, bool)
    used[numbers] = True
    return np.flatnonzero(used), (np.cumsum(used) - 1)[numbers]


def _as_arrays(span, shape):
    return reorder.Span(*(_as_array(x, shape) for x in span))


def _as_array(x, shape):
    # What all ranges share, such as the number of the only grid, is cheaper as an int.
    if isinstance(x, int) or (np.size(x) and (x == x.flat[0]).all()):
        return x if isinstance(x, int) else int(x.flat[0])
    return np.broadcast_to(x, shape)


def _take(span, at):
    return reorder.Span(*(x if isinstance(x, int) else x[at] for x in span))
