"""Published vision transformers as schedules of patterns on a grid: one line per model.

`schedule("swin", (14, 14), window=7)` is a `PerLayer` for `VisionTransformerConfig.pattern`; its
`expression()` is what a config file says. A preset is what is visible, layer by layer. What else
a paper has (pyramids of resolutions, convolutions, attention over channels) is not in it.
"""

import dataclasses
from collections.abc import Callable

from sparse_attn.patterns import (
    axial,
    base,
    block_grid,
    circular,
    cross_grid,
    full,
    halo,
    joint,
    neighborhood,
    per_head,
    per_layer,
    swin,
)

Layers = tuple[base.Pattern | per_head.PerHead, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model's schedule.

    Attributes:
      source: the paper.
      layers: gives one cycle of layers from (shape of the grid, window per axis, heads).
      axes: that the grid must have; None = any number.
      registers: learned tokens that the patterns count with; None = none.
    """

    source: str
    layers: Callable[[Shape, Shape, int], Layers]
    axes: int | None = None
    registers: int | None = None


def _windows(shape: Shape, window: Shape, num_heads: int = 0) -> tuple[swin.Swin, swin.Swin]:
    shift = tuple(w // 2 if w < n else 0 for w, n in zip(window, shape, strict=True))
    return swin.Swin(shape, window), swin.Swin(shape, window, shift)


def _dilated(shape: Shape, window: Shape, num_heads: int) -> Layers:
    dilation = tuple(n // w for n, w in zip(shape, window, strict=True))
    return (
        neighborhood.Neighborhood(shape, window),
        neighborhood.Neighborhood(shape, window, dilation=dilation),
    )


def _pooled(shape: Shape, window: Shape) -> cross_grid.CrossGrid:
    """Every query sees the average of every window."""
    cells = tuple(-(-n // w) for n, w in zip(shape, window, strict=True))
    return cross_grid.CrossGrid(shape, cells, reach=None)


def _hilo(shape: Shape, window: Shape, num_heads: int) -> Layers:
    high = (swin.Swin(shape, window),) * (num_heads // 2)
    low = (_pooled(shape, window),) * (num_heads - num_heads // 2)
    return (per_head.PerHead(high + low),)


def _style(shape: Shape, window: Shape, num_heads: int) -> Layers:
    half = num_heads // 2
    regular, shifted = _windows(shape, window)
    return (per_head.PerHead((regular,) * (num_heads - half) + (shifted,) * half),)


def _nested(shape: Shape, window: Shape, num_heads: int) -> Layers:
    layers = [swin.Swin(shape, window)]
    while any(w < n for w, n in zip(window, shape, strict=True)):
        window = tuple(min(2 * w, n) for w, n in zip(window, shape, strict=True))
        layers.append(swin.Swin(shape, window))
    return tuple(layers)


def _strips(shape: Shape, window: Shape) -> tuple[Shape, Shape]:
    """Halves of a window: the first half of its rows, or of its columns."""
    height, width = window
    return (-(-height // 2), width), (height, -(-width // 2))


def _flat(shape: Shape, window: Shape, num_heads: int) -> Layers:
    rows, columns = _strips(shape, window)
    shifts = [tuple(w // 2 for w in strip) for strip in (rows, columns)]
    return (
        swin.Swin(shape, rows),
        swin.Swin(shape, columns),
        swin.Swin(shape, rows, shifts[0]),
        swin.Swin(shape, columns, shifts[1]),
    )


PRESETS = {
    "full": Preset("ViT [arXiv:2010.11929, sec. 3.1]", lambda s, w, n: (full.Full(),)),
    "neighborhood": Preset(
        "NAT [arXiv:2204.07143, sec. 3.1]", lambda s, w, n: (neighborhood.Neighborhood(s, w),)
    ),
    "dinat": Preset("DiNAT [arXiv:2209.15001, sec. 3.2]", _dilated),
    "swin": Preset("Swin [arXiv:2103.14030, sec. 3.2]", _windows),
    "axial": Preset(
        "axial attention [arXiv:1912.12180, sec. 3.1]",
        lambda s, w, n: tuple(axial.Axial(s, (a,)) for a in reversed(range(len(s)))),
    ),
    "criss_cross": Preset(
        "CCNet [arXiv:1811.11721, sec. 3.2]",
        lambda s, w, n: (axial.Axial(s, (1,)) | axial.Axial(s, (0,)),),
        axes=2,
    ),
    "halonet": Preset(
        "HaloNet [arXiv:2103.12731, sec. 3.1]",
        lambda s, w, n: (halo.Halo(s, w, tuple(x // 2 for x in w)),),
    ),
    "maxvit": Preset(
        "MaxViT [arXiv:2204.01697, sec. 3]",
        lambda s, w, n: (block_grid.BlockGrid(s, block=w), block_grid.BlockGrid(s, grid=w)),
    ),
    # Blocks are joined four by four from level to level; on one grid, windows that double.
    "nest": Preset("NesT [arXiv:2105.12723, sec. 3.1]", _nested),
    # The layers between, attention over channels, are no pattern of tokens.
    "davit": Preset(
        "DaViT, spatial part [arXiv:2204.03645, sec. 3.2]", lambda s, w, n: (swin.Swin(s, w),)
    ),
    "cat": Preset(
        "CAT [arXiv:2211.13654, sec. 3.2]",
        lambda s, w, n: tuple(
            swin.rectangles(s, (-(-w[0] // 2), 2 * w[1]), n, layer=i) for i in (0, 1)
        ),
        axes=2,
    ),
    "style_swin": Preset("StyleSwin [arXiv:2112.10762, sec. 3.2]", _style),
    # Window means as keys; the papers learn a strided convolution (Twins, PVT).
    "twins": Preset(
        "Twins-SVT [arXiv:2104.13840, sec. 3.2]",
        lambda s, w, n: (swin.Swin(s, w), _pooled(s, w)),
    ),
    "pvt": Preset("PVT [arXiv:2102.12122, sec. 3.3]", lambda s, w, n: (_pooled(s, w),)),
    "hilo": Preset("HiLo, alpha = 1/2 [arXiv:2205.13213, sec. 3.2]", _hilo),
    # The 3 x 3 chunks around the query's, and tokens that see and are seen by all.
    "vil": Preset(
        "ViL [arXiv:2103.15358, sec. 3.1]",
        lambda s, w, n: (joint.Joint(halo.Halo(s, w, w), tokens=1),),
        registers=1,
    ),
    "clear": Preset(
        "CLEAR [arXiv:2412.16112, sec. 3.2]", lambda s, w, n: (circular.Circular(s, max(w) // 2),)
    ),
    "inf_dit": Preset(
        "Inf-DiT [arXiv:2405.04312, sec. 3.1]",
        lambda s, w, n: (halo.Halo(s, w, halo=w, after=0),),
        axes=2,
    ),
    # Voxels sorted by row or column inside windows, cut in sets of half a window. On a grid without
    # holes these are strips.
    "dsvt": Preset(
        "DSVT [arXiv:2301.06051]",
        lambda s, w, n: tuple(swin.Swin(s, strip) for strip in _strips(s, w)),
        axes=2,
    ),
    "flat_former": Preset("FlatFormer [arXiv:2301.08739]", _flat, axes=2),
    "skate_former": Preset(
        "SkateFormer [arXiv:2403.09508]",
        lambda s, w, n: (block_grid.skate_former(s, w, n),),
        axes=2,
    ),
    # A layer per stage: local ones, then global ones. Its local affinities are learned offsets.
    "uniformer": Preset(
        "UniFormer [arXiv:2201.04676, sec. 3.2]",
        lambda s, w, n: (neighborhood.Neighborhood(s, w),) * 2 + (full.Full(),) * 2,
    ),
    "divided_space_time": Preset(
        "TimeSformer [arXiv:2102.05095, sec. 3]",
        lambda s, w, n: (axial.Axial(s, (0,)), axial.Axial(s, (1, 2))),
        axes=3,
    ),
    "ultra_gen": Preset(
        "UltraGen, local branch: spatial windows through all frames, cut anew in the next layer",
        lambda s, w, n: _windows(s, (s[0], *w[1:])),
        axes=3,
    ),
    "simple_gvr": Preset(
        "SimpleGVR: units of frames, shifted in the next layer, times spatial neighbourhoods",
        lambda s, w, n: tuple(
            swin.Swin(s, (w[0], None, None), (shift, 0, 0))
            & neighborhood.Neighborhood(s, (None, *w[1:]))
            for shift in (0, w[0] // 2)
        ),
        axes=3,
    ),
    "seer": Preset(
        "Seer [arXiv:2303.14897]", lambda s, w, n: (swin.past_frames(s, w[1:]),), axes=3
    ),
}


def schedule(
    name: str, shape: Shape, *, window: int | Shape, num_heads: int = 4
) -> per_layer.PerLayer:
    """The layers of a preset, one cycle of them, on a grid.

    Args:
      name: of `PRESETS`.
      shape: tokens along each axis.
      window: tokens along each axis of what the model calls window, block, kernel or cell, an int
        or one per axis; models of equal windows see equally many keys (axial and full ones aside).
      num_heads: of a layer, for presets whose heads differ.

    Raises:
      ValueError: there is no such preset, or it needs another number of axes.

    >>> [p.expression() for p in schedule("maxvit", (8, 8), window=4).patterns]
    ['block_grid(shape=(8, 8), block=4)', 'block_grid(shape=(8, 8), grid=4)']
    """
    if name not in PRESETS:
        raise ValueError(f"name={name!r} must be one of {', '.join(PRESETS)}")
    preset, shape = PRESETS[name], tuple(shape)
    window = (window,) * len(shape) if isinstance(window, int) else tuple(window)
    if len(window) != len(shape):
        raise ValueError(f"window={window} must have one entry per axis of shape={shape}")
    if preset.axes not in (None, len(shape)):
        raise ValueError(f"shape={shape} must have {preset.axes} axes for {name!r}")
    return per_layer.PerLayer(preset.layers(shape, window, num_heads))
