"""Neighbourhood attention: every query sees its nearest keys on a grid of one or more axes."""

import dataclasses

from sparse_attn.masks import grids
from sparse_attn.patterns import base


@dataclasses.dataclass(frozen=True)
class Neighborhood(grids.WindowPattern):
    """The `kernel_size` nearest keys along every axis.  [arXiv:2204.07143, sec. 3.1]

    NATTEN's rule. At a border the window is moved inward, so every query has as many keys as any
    other. With `dilation` d it counts only tokens whose coordinate equals the query's modulo d
    [arXiv:2209.15001, sec. 3.1]. With `stride` s, each s consecutive queries (of a residue class)
    share the window of their leader, the one in the middle [arXiv:2504.16922, sec. 3.1]. A causal
    axis sees only itself and what is before it, and there early queries have fewer keys.

    An even kernel sees one key more before the query than after it.

    Attributes:
      shape: tokens along each axis, row-major.
      kernel_size: keys along each axis, an int or one per axis; None = the whole axis. A video
        whose queries see a spatial window of every frame, moved inward at the borders
        [arXiv:2511.14712, sec. 3.2], has `kernel_size=(None, h, w)`.
      stride: queries that share a window, at most `kernel_size`; 1 = a sliding window, and
        `kernel_size` = windows that do not overlap.
      dilation: distance of neighbouring keys; `kernel_size * dilation` must fit the axis.
      causal_axes: True, or one bool per axis.

    Raises:
      ValueError: a field is not in its range.

    >>> import numpy as np
    >>> pattern = Neighborhood(shape=(4, 4), kernel_size=3)
    >>> pattern.mask_fn(np.int32(0), np.arange(16)).reshape(4, 4).astype(int)  # of the corner
    array([[1, 1, 1, 0],
           [1, 1, 1, 0],
           [1, 1, 1, 0],
           [0, 0, 0, 0]])
    """

    shape: tuple[int, ...]
    kernel_size: int | tuple[int | None, ...] | None
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal_axes: bool | tuple[bool, ...] = False

    def __post_init__(self):
        grids.check_shape(self)
        grids.check_axes(self, "kernel_size", optional=True)
        grids.check_axes(self, "stride")
        grids.check_axes(self, "dilation")
        flags = self.causal_axes
        flags = tuple(flags) if isinstance(flags, (tuple, list)) else (flags,) * len(self.shape)
        if len(flags) != len(self.shape) or not all(isinstance(x, bool) for x in flags):
            raise ValueError(
                f"causal_axes={self.causal_axes!r} must be a bool, or one per axis of {self.shape}"
            )
        object.__setattr__(self, "causal_axes", grids.collapse(flags))
        for axis, length in enumerate(self.shape):
            kernel, stride, dilation = self._kernel(axis), self._stride(axis), self.period(axis)
            if kernel * dilation > length:
                raise ValueError(
                    f"kernel_size={kernel} times dilation={dilation} must be <= {length}, the "
                    f"length of axis {axis}"
                )
            if stride > kernel:
                raise ValueError(f"stride={stride} must be <= kernel_size={kernel}, axis {axis}")

    def _kernel(self, axis):
        kernel = grids.on_axis(self.kernel_size, axis)
        return self.shape[axis] // self.period(axis) if kernel is None else kernel

    def _stride(self, axis):
        return grids.on_axis(self.stride, axis)

    def period(self, axis):
        return grids.on_axis(self.dilation, axis)

    def whole(self, axis):
        # Residue classes may be a token longer than `length // dilation`: all of it is seen.
        return grids.on_axis(self.kernel_size, axis) is None and not self._is_causal(axis)

    def _is_causal(self, axis):
        return grids.on_axis(self.causal_axes, axis)

    def window(self, axis, at, length):
        kernel, stride = self._kernel(axis), self._stride(axis)
        group = at // stride * stride if stride > 1 else at
        if self._is_causal(axis):
            # The leader of a causal group is its last query, which sees `kernel` keys.
            leader = base.least(group + stride - 1, length - 1) if stride > 1 else at
            seen_from = leader - (kernel - 1)
            return 0 * at if grids.on_axis(self.kernel_size, axis) is None else seen_from, at + 1
        leader = base.least(group + stride // 2, length - 1) if stride > 1 else at
        first = base.least(base.greatest(leader - kernel // 2, 0), length - kernel)
        return first, first + kernel


EXAMPLES = (
    Neighborhood(shape=(40,), kernel_size=7),
    Neighborhood(shape=(8, 9), kernel_size=(3, 4)),
    Neighborhood(shape=(7, 11), kernel_size=(4, 5), stride=(2, 5)),
    Neighborhood(shape=(9, 10), kernel_size=3, dilation=(2, 3)),
    Neighborhood(shape=(3, 6, 5), kernel_size=(None, 3, 2), causal_axes=(True, False, False)),
    Neighborhood(shape=(6, 8), kernel_size=(2, 3), stride=2, dilation=(3, 2), causal_axes=True),
)
