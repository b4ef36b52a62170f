"""Radial attention for video: the spatial band halves each time the distance in frames doubles."""

import dataclasses
from typing import ClassVar

from sparse_attn.masks import grids
from sparse_attn.patterns import base


@dataclasses.dataclass(frozen=True)
class Radial(grids.GridPattern):
    """A spatial band that is halved with every doubling of the distance in frames.

    [arXiv:2506.19852, sec. 4.2]. Token k of frame i sees token l of frame j, with p the largest
    power of two <= |i - j| (1 if i = j) and s tokens per frame, if `(|k - l| + 1) * p <= s`, or if
    k = l and |i - j| is a multiple of `ceil(p / s)`: once the band is narrower than a token, only
    some frames are left.
    All tokens see the first frames. O(n log n) pairs.

    Attributes:
      shape: (frames, tokens per frame).
      sink_frames: frames at the start that every token sees; the paper's is 1.

    Raises:
      ValueError: a field is not in its range.

    >>> import numpy as np
    >>> pattern = Radial(shape=(5, 4), sink_frames=0)
    >>> pattern.mask_fn(np.int32(1), np.arange(20)).reshape(5, 4).astype(int)
    array([[1, 1, 1, 1],
           [1, 1, 1, 1],
           [1, 1, 1, 0],
           [1, 1, 1, 0],
           [0, 1, 0, 0]])
    """

    shape: tuple[int, ...]
    sink_frames: int = 1

    box_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        grids.check_shape(self)
        if len(self.shape) != 2:
            raise ValueError(f"shape={self.shape} must be (frames, tokens per frame)")
        base.check_int("sink_frames", self.sink_frames, least=0)

    def _powers(self):
        """The distances at which the band halves: 2, 4, 8 ... below the number of frames."""
        return [2**i for i in range(1, self.shape[0].bit_length()) if 2**i < self.shape[0]]

    def _power(self, distance):
        """The largest power of two <= distance; 1 for 0."""
        below = distance  # Becomes all ones below the highest bit.
        for shift in (1, 2, 4, 8, 16):
            if shift < self.shape[0].bit_length():
                below = below | (below >> shift)
        return base.greatest(below - (below >> 1), 1)

    def _steps(self):
        """(step, first, end) of distances of which the multiples of `step` keep their diagonal."""
        edges = [1, *self._powers()]
        steps = [-(-edge // self.shape[1]) for edge in edges]
        whole = steps.count(1)  # The nearest distances, in one range.
        yield 1, 0, 2 * edges[whole - 1]
        for edge, step in list(zip(edges, steps, strict=True))[whole:]:
            yield step, edge, 2 * edge

    def visible(self, q, kv):
        tokens = self.shape[1]
        frames, apart = _distance(q[0], kv[0]), _distance(q[1], kv[1])
        power = self._power(frames)
        band = (apart + 1) * power <= tokens
        kept = (frames % ((power + tokens - 1) // tokens) == 0) & (apart == 0)
        return band | kept | (kv[0] < self.sink_frames)

    def box_state(self, q_box, kv_box):
        (q_frames, q_at), (kv_frames, kv_at) = q_box, kv_box
        tokens = self.shape[1]
        # Sink frames are seen by all; the rest of the key frames decides.
        sinks = kv_frames.lo < self.sink_frames
        first = base.greatest(kv_frames.lo, self.sink_frames)
        others = first < kv_frames.hi
        near, far = _distances(q_frames, grids.Span(first, base.greatest(kv_frames.hi, first + 1)))
        low, high = _distances(q_at, kv_at)
        # Every distance between the extremes occurs, in frames and in tokens independently.
        some = (low + 1) * self._power(near) <= tokens
        every = (high + 1) * self._power(far) <= tokens
        kept_some, kept_every = False, True
        for step, start, end in self._steps():
            a, b = base.greatest(near, start), base.least(far, end - 1)
            occurs = a <= b
            multiples = b // step - (a + step - 1) // step + 1
            kept_some = kept_some | (occurs & (multiples > 0))
            kept_every = kept_every & ((multiples == b - a + 1) | (1 - 1 * occurs == 1))
        some = some | (kept_some & (low == 0))
        every = every | (kept_every & (high == 0))
        empty = (1 - 1 * sinks == 1) & (1 - 1 * some == 1)
        return base.state_of(empty, every | (1 - 1 * others == 1))

    @property
    def causal(self) -> bool:
        return self.shape == (1, 1)


def _distance(a, b):
    return base.greatest(a - b, b - a)


def _distances(a, b):
    """Smallest and largest distance of members of two spans."""
    before, behind = b.lo - (a.hi - 1), a.lo - (b.hi - 1)
    nearest = base.greatest(base.greatest(before, behind), 0)
    return nearest, base.greatest(-before, -behind)


EXAMPLES = (
    Radial(shape=(6, 8)),
    Radial(shape=(20, 3), sink_frames=0),
)
