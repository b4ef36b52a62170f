"""Patterns on grids drawn on their grid: what one query sees of an image or a video."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from sparse_attn.masks import grids, reorder
from sparse_attn.patterns import base, joint, permuted

SEEN, HIDDEN = "█", "·"
QUERY_SEEN, QUERY_HIDDEN = "◉", "○"  # The query, which sees itself or does not.
_COLORS = np.array([[255, 255, 255], [60, 110, 170], [205, 60, 40]], np.uint8)
_MAX_FRAMES = 8


def on_grid(
    pattern: base.Pattern,
    query: Sequence[int],
    *,
    shape: tuple[int, ...] | None = None,
) -> str:
    """What the query at one coordinate sees, as characters; frames of a video side by side.

    ◉ is the query, ○ a query that does not see itself. Of a `Joint` pattern the grid behind the
    prefix is drawn; of a `Permuted` one the tokens stand where they belong, whatever their order
    in the sequence; where keys have a grid of their own, that one is drawn, without the query.

    Args:
      query: its coordinate, one int per axis.
      shape: of the grid, for patterns that do not have one (1 to 3 axes).

    Raises:
      ValueError: the pattern has no shape, or the query is outside.

    >>> from sparse_attn.patterns import neighborhood
    >>> print(on_grid(neighborhood.Neighborhood((4, 5), kernel_size=3), (0, 2)))
    neighborhood(shape=(4, 5), kernel_size=3)
    query (0, 2) sees 9 of 20 tokens
    ··██◉◉██··
    ··██████··
    ··██████··
    ··········
    """
    seen, marked = visible(pattern, query, shape=shape)
    frames, titles = _frames(seen, query)
    glyphs = np.where(seen, SEEN, HIDDEN)
    glyphs[marked] = np.where(seen[marked], QUERY_SEEN, QUERY_HIDDEN)
    wide = 2 if seen.shape[-1] * len(frames) <= 40 else 1  # A character is twice as high as wide.
    lines = [
        "  ".join("".join(g * wide for g in row) for row in rows)
        for rows in zip(*(_plane(glyphs)[frame] for frame in frames), strict=True)
    ]
    if len(titles) > 1:
        width = wide * seen.shape[-1]
        titles = [t if len(t) <= width else t.removeprefix("frame ") for t in titles]
        lines.insert(0, "  ".join(title.ljust(width)[:width] for title in titles).rstrip())
    return f"{pattern.expression()}\n{_caption(pattern, query, seen)}\n" + "\n".join(lines)


def show_on_grid(
    pattern: base.Pattern,
    queries: Sequence[Sequence[int]],
    *,
    shape: tuple[int, ...] | None = None,
) -> "matplotlib.figure.Figure":
    """A matplotlib figure of the same: a row of panels per query, a panel per frame.

    Of more than eight frames, eight that the query sees are drawn. Save it with `.savefig(path)`.

    >>> from sparse_attn.patterns import swin
    >>> len(show_on_grid(swin.Swin((8, 8), window_size=4), [(1, 1), (6, 2)]).axes)
    2
    """
    from matplotlib import pyplot  # slow to import, and only figures need it

    rows = []
    for query in queries:
        seen, marked = visible(pattern, query, shape=shape)
        pixels = _COLORS[seen.astype(int)]
        pixels[marked] = _COLORS[2]
        frames, titles = _frames(seen, query)
        rows.append((_caption(pattern, query, seen), [_plane(pixels)[f] for f in frames], titles))
    columns = max(len(frames) for _, frames, _ in rows)
    made, axes = pyplot.subplots(
        len(rows), columns, figsize=(2.4 * columns + 0.6, 2.6 * len(rows) + 0.4),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for row, (caption, frames, titles) in zip(axes, rows, strict=True):
        for i, axis in enumerate(row):
            if i >= len(frames):
                axis.set_axis_off()
                continue
            axis.imshow(frames[i], interpolation="nearest")
            axis.set_title(titles[i] if len(frames) > 1 else caption, fontsize=8)
            axis.tick_params(labelsize=6)
        if len(frames) > 1:
            row[0].set_ylabel(caption, fontsize=7)
    made.suptitle(pattern.expression(), fontsize=9, wrap=True)
    pyplot.close(made)  # The caller holds it: pyplot must neither draw it again nor keep it.
    return made


def show_order(order: reorder.Reordering, *, block: int) -> "matplotlib.figure.Figure":
    """The place of every token of a 2-D grid, and which blocks of `block` places they fill.

    Raises:
      ValueError: the order is not one of a grid with two axes.

    >>> show_order(reorder.Tiles((8, 8), (4, 4)), block=16).axes[0].get_title()
    'blocks of 16 places'
    """
    from matplotlib import pyplot

    if len(order.shape) != 2:
        raise ValueError(f"order.shape={order.shape} must have two axes to be drawn")
    places = order.inverse.reshape(order.shape)
    made, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    # Neighbouring blocks get colours far apart: the order of the blocks is in the line beside.
    left.imshow(places // block * 7 % 20, cmap="tab20", interpolation="nearest")
    left.set_title(f"blocks of {block} places", fontsize=9)
    down, across = np.unravel_index(order.forward, order.shape)
    right.plot(across, down, linewidth=0.8)
    right.invert_yaxis()
    right.set_aspect("equal")
    right.set_title("order of the tokens", fontsize=9)
    pyplot.close(made)
    return made


def visible(
    pattern: base.Pattern, query: Sequence[int], *, shape: tuple[int, ...] | None = None
) -> tuple[Bool[np.ndarray, "..."], Bool[np.ndarray, "..."]]:
    """Which tokens of the grid of keys the query sees, and which one it is (none of another grid).

    >>> from sparse_attn.patterns import axial
    >>> visible(axial.Axial((2, 3), axes=(1,)), (1, 0))[0].astype(int)
    array([[0, 0, 0],
           [1, 1, 1]])
    """
    leaves = list(_leaves(pattern))
    grid = next((p for p in leaves if isinstance(p, grids.GridPattern)), None)
    moved = next((p for p in leaves if isinstance(p, permuted.Permuted)), None)
    shape = tuple(shape) if shape is not None else _shape(grid, moved)
    kv_shape = shape if grid is None or grid.shape != shape else grid.kv_shape
    query = tuple(int(i) for i in query)
    if len(query) != len(shape) or not all(0 <= i < n for i, n in zip(query, shape, strict=True)):
        raise ValueError(f"query={query} must be a coordinate of the grid {shape}")
    if len(shape) > 3:
        raise ValueError(f"shape={shape} must have at most three axes to be drawn")
    place, places = np.ravel_multi_index(query, shape), np.arange(np.prod(kv_shape))
    if moved is not None:
        place, places = moved.reordering.inverse[place], moved.reordering.inverse
    first = _prefix(pattern)
    seen = pattern.mask_fn(np.int32(first + place), (first + places).astype(np.int32))
    marked = np.zeros(kv_shape, bool)
    if kv_shape == shape:
        marked[query] = True
    return np.broadcast_to(seen, places.shape).reshape(kv_shape), marked


def _shape(grid, moved):
    if moved is not None:
        return moved.reordering.shape
    if grid is None:
        raise ValueError("shape=None must be given: the pattern is not on a grid")
    return grid.shape


def _leaves(pattern):
    match pattern:
        case base.And(a=a, b=b) | base.Or(a=a, b=b):
            yield from _leaves(a)
            yield from _leaves(b)
        case base.Not(a=inner) | joint.Joint(pattern=inner):
            yield from _leaves(inner)
        case permuted.Permuted(pattern=inner):
            yield pattern
            yield from _leaves(inner)
        case _:
            yield pattern


def _prefix(pattern) -> int:
    match pattern:
        case joint.Joint(tokens=tokens):
            return tokens
        case base.And(a=a, b=b) | base.Or(a=a, b=b):
            return max(_prefix(a), _prefix(b))
        case base.Not(a=a):
            return _prefix(a)
    return 0


def _plane(values):
    """[frames, height, width, ...]: grids of fewer axes are one frame, or one row."""
    extra = values.ndim - (values.shape[-1:] == (3,) and values.dtype == np.uint8)
    return values.reshape((1,) * (3 - extra) + values.shape)


def _frames(seen, query):
    """Indices of the frames that are drawn, and their titles."""
    if seen.ndim < 3:
        return [0], [""]
    frames = np.nonzero(seen.any((1, 2)))[0]
    frames = np.union1d(frames, query[:1]) if query[0] < len(seen) else frames
    if len(seen) <= _MAX_FRAMES:
        frames = np.arange(len(seen))
    spread = np.linspace(0, len(frames) - 1, min(_MAX_FRAMES, len(frames))).round().astype(int)
    chosen = np.unique(frames[spread])
    return chosen.tolist(), [f"frame {f}" for f in chosen]


def _caption(pattern, query, seen) -> str:
    at = tuple(int(i) for i in query)
    text = f"query {at} sees {int(seen.sum())} of {seen.size} tokens"
    if prefix := _prefix(pattern):
        place = prefix + int(np.ravel_multi_index(at, seen.shape))
        keys = pattern.mask_fn(np.int32(place), np.arange(prefix, dtype=np.int32))
        text += f" and {int(np.broadcast_to(keys, prefix).sum())} of {prefix} in front"
    return text
