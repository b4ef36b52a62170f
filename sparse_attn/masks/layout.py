"""Layouts: what stands where in a sequence of segments, for the host and inside kernels."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sparse_attn.patterns import base

_SHORTEST_RUN = 6  # Changes at equal distances; a run costs about as much as five single ones.


def on_host(*arrays: Any) -> bool:
    """True when all are NumPy arrays or numbers: nothing is traced."""
    return all(isinstance(x, (int, np.ndarray, np.generic)) for x in arrays)


def take(table: np.ndarray, index):
    """`table[index]`, also where `index` is traced (outside kernels)."""
    return table[index] if on_host(index) else jnp.asarray(table)[index]


def search(table: np.ndarray, values):
    """How many entries of the ascending `table` are <= the values, also traced."""
    if on_host(values):
        return np.searchsorted(table, values, side="right")
    return jnp.searchsorted(jnp.asarray(table), values, side="right")


class Steps:
    """A piecewise constant function of the position, by a table or by arithmetic.

    A kernel cannot look into a table, so under a trace every change of the value is one comparison,
    and changes by the same amount at equal distances are one division together: a layout of equal
    segments costs the same whatever their number, one of n unequal segments O(n) per element.

    Args:
      starts: ascending positions from 0 on; the last piece has no end.
      values: int32 value from each start on.

    >>> steps = Steps([0, 3, 5], [7, 8, 7])
    >>> steps(np.arange(6)).tolist()
    [7, 7, 7, 8, 8, 7]
    >>> Steps(np.arange(0, 8000, 8), np.arange(1000)).num_terms
    1
    """

    def __init__(self, starts, values):
        starts, values = np.asarray(starts, np.int64), np.asarray(values, np.int64)
        changes = np.append(True, values[1:] != values[:-1])
        self._starts = starts[changes].astype(np.int32)
        self._values = values[changes].astype(np.int32)
        self._terms = _terms(starts[changes][1:], np.diff(values[changes]))

    @property
    def num_terms(self) -> int:
        """Comparisons or divisions per element under a trace."""
        return len(self._terms)

    def __call__(self, position):
        if on_host(position):
            return self._values[search(self._starts, position) - 1]
        value = 0 * position + int(self._values[0])
        for first, distance, count, change in self._terms:
            if count == 1:
                value = value + change * (position >= first)
            else:
                passed = base.greatest(position - first, -distance) // distance + 1
                value = value + change * base.least(passed, count)
        return value


def _terms(starts, changes):
    """(first, distance, count, change): the function changes `count` times by `change`."""
    terms = []
    for change in np.unique(changes).tolist():
        at = starts[changes == change]
        # Runs of equal distances, from where each of them begins.
        distances = np.diff(at)
        ends = np.append(np.flatnonzero(np.diff(distances)) + 1, len(distances))
        i = 0
        for end in ends.tolist():
            if end + 1 - i >= _SHORTEST_RUN:
                terms.append((int(at[i]), int(distances[i]), end + 1 - i, change))
                i = end + 1
            else:  # The last of these may begin the next run.
                terms += [(int(first), 1, 1, change) for first in at[i:end]]
                i = max(i, end)
        terms += [(int(first), 1, 1, change) for first in at[i:]]
    return tuple(sorted(terms))


class RangeExtremes:
    """Least and greatest entry of any range of a table, in O(1) from O(n log n) memory.

    >>> extremes = RangeExtremes([3, 1, 4, 1, 5])
    >>> extremes.least(np.array([0, 2]), np.array([2, 3])).tolist()
    [1, 4]
    >>> int(extremes.greatest(1, 5))
    5
    """

    def __init__(self, values):
        values = np.asarray(values, np.int32)
        # Exponent of the largest power of two <= each length; 0 for the empty range.
        lengths = np.arange(len(values) + 1)
        self._exponents = np.frexp(np.maximum(lengths, 1))[1].astype(np.int32) - 1
        self._levels = tuple(self._level(values, f) for f in (np.minimum, np.maximum))

    def _level(self, values, extreme):
        levels = [values]
        for exponent in range(int(self._exponents[-1])):
            shift, last = 1 << exponent, levels[-1]
            levels.append(extreme(last, np.append(last[shift:], last[-shift:])))
        return np.stack(levels).ravel()

    def _pair(self, levels, lo, hi):
        exponent = take(self._exponents, hi - lo)
        row = exponent * (len(self._exponents) - 1)
        return take(levels, row + lo), take(levels, row + hi - (1 << exponent))

    def least(self, lo, hi):
        """Least of the entries `[lo, hi)`; ranges must not be empty."""
        return base.least(*self._pair(self._levels[0], lo, hi))

    def greatest(self, lo, hi):
        """Greatest of the entries `[lo, hi)`; ranges must not be empty."""
        return base.greatest(*self._pair(self._levels[1], lo, hi))


def pack(
    slots: np.ndarray, lengths: Int[Array, "*B S"] | np.ndarray, *, length: int
) -> Int[Array, "*B T"]:
    """Positions of the tokens of segments that stand one behind the other, segment i in slot i.

    A pattern on slots of fixed size then serves segments of any lengths that fit, known only at
    run time and different in each batch entry: pass the result as `attend(..., positions=...)`.
    Tokens behind the last segment continue its slot.

    Args:
      slots: first position of each slot, `[S]`, ascending.
      lengths: tokens in each slot, 0 and more; may be traced.
      length: T, tokens of the packed sequence.

    >>> pack(np.array([0, 8, 16]), jnp.array([2, 0, 3]), length=5).tolist()
    [0, 1, 16, 17, 18]
    """
    slots, lengths = jnp.asarray(slots, jnp.int32), jnp.asarray(lengths, jnp.int32)
    ends = jnp.cumsum(lengths, -1)
    token = jnp.arange(length, dtype=jnp.int32)
    find = functools.partial(jnp.searchsorted, side="right")
    find = jnp.vectorize(find, signature="(s),(t)->(t)")
    slot = find(ends[..., :-1], token)
    return slots[slot] + token - jnp.take_along_axis(ends - lengths, slot, -1)
