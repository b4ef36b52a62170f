"""Frame tiles for video: each frame sees itself and a few reference frames."""

import dataclasses
from typing import ClassVar

from sparse_attn.masks import grids
from sparse_attn.patterns import base


@dataclasses.dataclass(frozen=True)
class FrameTiles(grids.GridPattern):
    """The query's frame and the reference frames, which see all frames.

    [arXiv:2502.06155, sec. 3.2]. With F frames and k references, spread evenly
    from the first one, the density is
    `(F * (2 * k + 1) - k * k - k) / F**2`: linear in F. `references` may differ by layer
    (`per_layer`).

    Attributes:
      shape: (frames, tokens per frame), or the axes of a video with the frames first.
      references: frames that see and are seen by all, 0 to the number of frames.

    Raises:
      ValueError: a field is not in its range.

    >>> import numpy as np
    >>> pattern = FrameTiles(shape=(4, 1), references=1)
    >>> pattern.mask_fn(np.arange(4)[:, None], np.arange(4)).astype(int)
    array([[1, 1, 1, 1],
           [1, 1, 0, 0],
           [1, 0, 1, 0],
           [1, 0, 0, 1]])
    """

    shape: tuple[int, ...]
    references: int

    box_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        grids.check_shape(self)
        if len(self.shape) < 2:
            raise ValueError(f"shape={self.shape} must be (frames, tokens per frame, ...)")
        base.check_int("references", self.references, least=0, most=self.shape[0])
        base.check_int("frames * references", self.shape[0] * self.references, least=0)

    def _before(self, frame):
        """How many of the reference frames `i * frames // references` come before `frame`."""
        frames = self.shape[0]
        return (frame * self.references + frames - 1) // frames

    def visible(self, q, kv):
        is_reference = [self._before(f + 1) > self._before(f) for f in (q[0], kv[0])]
        return (q[0] == kv[0]) | is_reference[0] | is_reference[1]

    def box_state(self, q_box, kv_box):
        q, kv = q_box[0], kv_box[0]
        both = grids.Span(base.greatest(q.lo, kv.lo), base.least(q.hi, kv.hi))
        overlap = both.lo < both.hi
        # Frames that are no reference; two different ones of them do not see each other.
        q_left, kv_left = self._ordinary(q), self._ordinary(kv)
        same = overlap & (q_left == 1) & (kv_left == 1) & (self._ordinary(both) == 1)
        some = overlap | (q_left < q.hi - q.lo) | (kv_left < kv.hi - kv.lo)
        return base.state_of(1 - 1 * some, (q_left == 0) | (kv_left == 0) | same)

    def _ordinary(self, span):
        return span.hi - span.lo - (self._before(span.hi) - self._before(span.lo))

    @property
    def causal(self) -> bool:
        return False


EXAMPLES = (
    FrameTiles(shape=(7, 9), references=2),
    FrameTiles(shape=(6, 10), references=0),
)
