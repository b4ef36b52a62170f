"""Pictures of runs and patterns as PNG files; no display is needed."""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib import figure

Curve = tuple[Sequence[float | int], Sequence[float | int]]


def curves(
    panels: Mapping[str, Mapping[str, Curve]],
    path: str | os.PathLike[str],
    *,
    x_label: str = "step",
) -> None:
    """Writes one panel per entry, side by side; a panel maps the name of a line to its x and y.

    Runs keep their colour in all panels. Values that are not finite leave a gap.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".png") as png:
    ...     curves({"loss": {"a": ([0, 1], [5.0, 4.0])}}, png.name)
    ...     png.read(4)
    b'\\x89PNG'
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    picture = figure.Figure(figsize=(5.5 * len(panels), 3.8), layout="constrained")
    drawn = {}
    for axes, (title, lines) in zip(
        np.atleast_1d(picture.subplots(1, len(panels))), panels.items(), strict=True
    ):
        for name, (x, y) in lines.items():
            marker = "o" if len(x) < 12 else None
            color = f"C{names.index(name)}"
            style = {"color": color, "marker": marker, "markersize": 3, "linewidth": 1.4}
            (drawn[name],) = axes.plot(x, y, label=name, **style)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x_label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if names:  # Beside the panels: a legend inside hides lines.
        handles = [drawn[name] for name in names]
        picture.legend(handles=handles, frameon=False, fontsize=9, loc="outside center right")
    picture.savefig(path, dpi=120)


def images(
    pictures: Mapping[str, UInt8[np.ndarray, "height width 3"]], path: str | os.PathLike[str]
) -> None:
    """Writes small pictures with a title each, at most five in a row.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".png") as png:
    ...     images({"a": np.zeros((4, 4, 3), np.uint8)}, png.name)
    ...     png.read(4)
    b'\\x89PNG'
    """
    columns = min(5, max(1, len(pictures)))
    rows = max(1, math.ceil(len(pictures) / columns))
    picture = figure.Figure(figsize=(2.4 * columns, 2.7 * rows), layout="constrained")
    grid = np.atleast_1d(picture.subplots(rows, columns)).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (title, pixels) in zip(grid, pictures.items(), strict=False):
        axes.imshow(pixels, interpolation="nearest")
        axes.set_title(title, fontsize=9)
    picture.savefig(path, dpi=120)
