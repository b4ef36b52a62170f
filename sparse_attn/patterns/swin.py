"""Windows that do not overlap, regular or shifted, on grids of any number of axes."""

import dataclasses

from sparse_attn.masks import grids
from sparse_attn.patterns import base, neighborhood, per_head


@dataclasses.dataclass(frozen=True)
class Swin(grids.WindowPattern):
    """Keys of the query's window; with `shift`, all windows start that much later.

    [arXiv:2103.14030, sec. 3.2]. The shifted windows that the paper makes by a cyclic shift and a
    mask of regions: tokens that were carried around the border are apart from the others, so the
    first and the last window along an axis are smaller. Without a shift: block attention, also
    the local attention of Twins [arXiv:2104.13840, sec. 3.2], NesT [arXiv:2105.12723, sec. 3.1]
    and DaViT [arXiv:2204.03645, sec. 3.2]; with rectangles, that of MCW-Net and CAT.

    Attributes:
      shape: tokens along each axis, row-major.
      window_size: tokens of a window along each axis, an int or one per axis; None = the whole axis
        (a video in spatial windows: `(None, h, w)`). An axis no longer than the window is one
        window and is not shifted.
      shift: tokens, below `window_size`; the paper's is half of it.

    Raises:
      ValueError: a field is not in its range.

    >>> import numpy as np
    >>> pattern = Swin(shape=(4, 4), window_size=2, shift=1)
    >>> pattern.mask_fn(np.int32(6), np.arange(16)).reshape(4, 4).astype(int)  # of row 1, column 2
    array([[0, 0, 0, 0],
           [0, 1, 1, 0],
           [0, 1, 1, 0],
           [0, 0, 0, 0]])
    """

    shape: tuple[int, ...]
    window_size: int | tuple[int | None, ...] | None
    shift: int | tuple[int, ...] = 0

    def __post_init__(self):
        grids.check_shape(self)
        grids.check_axes(self, "window_size", optional=True)
        grids.check_axes(self, "shift", least=0)
        for axis in range(len(self.shape)):
            size, shift = (grids.on_axis(x, axis) for x in (self.window_size, self.shift))
            if size is not None and shift >= size:
                raise ValueError(f"shift={shift} must be < window_size={size}, axis {axis}")

    def whole(self, axis):
        size = grids.on_axis(self.window_size, axis)
        return size is None or size >= self.shape[axis]

    def window(self, axis, at, length):
        size, shift = (grids.on_axis(x, axis) for x in (self.window_size, self.shift))
        before = (size - shift) % size  # Tokens that the first window lacks.
        first = (at + before) // size * size - before
        return first, first + size


def two_layers(shape: tuple[int, ...], window_size: int) -> tuple[Swin, Swin]:
    """The regular and the shifted pattern that alternate by layer; for `PerLayer`.

    >>> [p.shift for p in two_layers((8, 8), 4)]
    [0, 2]
    """
    return Swin(shape, window_size), Swin(shape, window_size, window_size // 2)


def style_swin(shape: tuple[int, ...], window_size: int, num_heads: int) -> per_head.PerHead:
    """Half of the heads in regular windows, half in shifted ones.  [arXiv:2112.10762, sec. 3.2]

    Raises:
      ValueError: `num_heads` is odd.

    >>> [p.shift for p in style_swin((8, 8), 4, num_heads=4).patterns]
    [0, 0, 2, 2]
    """
    return _halves(*two_layers(shape, window_size), num_heads)


def rectangles(
    shape: tuple[int, int],
    window_size: tuple[int, int],
    num_heads: int,
    *,
    layer: int = 0,
) -> per_head.PerHead:
    """Half of the heads in rectangles, half in the transposed ones.  [arXiv:2211.13654, sec. 3.2]

    Args:
      window_size: (height, width) of the rectangles of the first half of the heads.
      layer: in odd layers all windows are moved by half their sides (the paper's axial shift).

    Raises:
      ValueError: `num_heads` is odd.

    >>> [p.window_size for p in rectangles((8, 8), (2, 4), num_heads=2).patterns]
    [(2, 4), (4, 2)]
    """
    height, width = window_size
    shift = (height // 2, width // 2) if layer % 2 else (0, 0)
    return _halves(
        Swin(shape, (height, width), shift),
        Swin(shape, (width, height), shift[::-1]),
        num_heads,
    )


def _halves(first, second, num_heads):
    if num_heads % 2:
        raise ValueError(f"num_heads={num_heads} must be even: half of the heads per pattern")
    return per_head.PerHead((first,) * (num_heads // 2) + (second,) * (num_heads // 2))


def half_windows(shape: tuple[int, ...], shift: tuple[int, ...]) -> Swin:
    """Windows of half the sides; the shift changes with the sampling step.

    The MSW-MSA of HiDiffusion [arXiv:2311.17528, sec. 3].

    >>> half_windows((8, 6), shift=(2, 0)).window_size
    (4, 3)
    """
    return Swin(shape, tuple(-(-length // 2) for length in shape), shift)


def temporal_units(
    shape: tuple[int, int, int], frames: int, kernel_size: int, *, shift: int = 0
) -> base.Pattern:
    """Spatial neighbourhoods inside units of `frames` frames of a video (SimpleGVR).

    Layers alternate `shift=0` and `shift=frames // 2`, so that units connect.

    >>> temporal_units((8, 6, 6), frames=4, kernel_size=3).b.kernel_size
    (None, 3, 3)
    """
    units = Swin(shape, (frames, None, None), (shift, 0, 0))
    return units & neighborhood.Neighborhood(shape, (None, kernel_size, kernel_size))


def past_frames(shape: tuple[int, int, int], window_size: tuple[int, int]) -> base.Pattern:
    """The same spatial window in the query's frame and in all earlier ones. [arXiv:2303.14897]

    >>> past_frames((4, 6, 6), (3, 3)).a.window_size
    (None, 3, 3)
    """
    before = neighborhood.Neighborhood(shape, None, causal_axes=(True, False, False))
    return Swin(shape, (None, *window_size)) & before


EXAMPLES = (
    Swin(shape=(10, 7), window_size=(4, 3), shift=(2, 1)),
    Swin(shape=(4, 6, 5), window_size=(2, 4, None), shift=(1, 2, 0)),
)
