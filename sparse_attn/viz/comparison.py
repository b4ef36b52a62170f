"""Patterns side by side at one density: what they cost, how far they reach, how they look."""

import dataclasses
import os
import textwrap
from collections.abc import Sequence

import numpy as np

from sparse_attn.patterns import base, per_head
from sparse_attn.viz import costs, reach, show, tables

COLUMNS = (*costs.COLUMNS, "layers to see all")
NOTE = (
    "Bound: of the speed-up over dense attention (causal where the pattern is) at the same blocks. "
    "Layers to see all: layers of this pattern until the last token depends on every token, or on "
    "every one before it."
)
_MAX_LAYERS = 16
# While a number is sought, density is that of all pairs up to 2,048 tokens, and of a sample beyond.
_PAIRS, _QUERIES, _CHUNK = 1 << 22, 64, 1 << 20


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Costs and reach of several patterns; `str` is the table, `show()` the picture.

    Attributes:
      costs: of each pattern, in the order given.
      layers: per pattern, layers until the last token depends on all; None = more than 16.
      patterns: the patterns, sizes filled in.
    """

    costs: tuple[costs.Cost, ...]
    layers: tuple[int | None, ...]
    patterns: tuple[base.Pattern | per_head.PerHead, ...]

    def rows(self) -> list[tuple[str, ...]]:
        """Cells under `COLUMNS`."""
        return [
            (*costs.row(found), f"> {_MAX_LAYERS}" if layers is None else str(layers))
            for found, layers in zip(self.costs, self.layers, strict=True)
        ]

    def __str__(self) -> str:
        """The table, for a terminal."""
        return tables.text(COLUMNS, self.rows())

    def markdown(self) -> str:
        """The table for a Markdown file, with what its columns mean."""
        return f"{tables.markdown(COLUMNS, self.rows())}\n\n{NOTE}"

    def show(self) -> "matplotlib.figure.Figure":
        """A figure: the block maps, and executed FLOPs over useful ones beside the bound."""
        from matplotlib import pyplot  # slow to import, and only figures need it

        count = len(self.costs)
        made, axes = pyplot.subplots(1, count, figsize=(2.6 * count, 3.4), layout="constrained")
        for axis, found, pattern in zip(
            np.atleast_1d(axes), self.costs, self.patterns, strict=True
        ):
            pixels = show.image(pattern, found.length, found.block, kv_len=found.kv_length)
            extent = (0, found.kv_length, found.length, 0)
            axis.imshow(pixels, extent=extent, interpolation="nearest")
            axis.set_title("\n".join(textwrap.wrap(found.pattern, 32)), fontsize=7)
            density = found.token_density
            axis.set_xlabel(
                f"density {density:.3f}, bound {found.bound:.1f}x"
                if density is not None
                else f"block density {found.block_density:.3f}, bound {found.bound:.1f}x",
                fontsize=7,
            )
            axis.tick_params(labelsize=6)
        pyplot.close(made)  # The caller holds it: pyplot must neither draw it again nor keep it.
        return made


def compare(
    entries: Sequence[base.Pattern | per_head.PerHead | str],
    length: int,
    *,
    density: float | None = None,
    head_dim: int = 64,
    heads: int = 1,
    device: str | None = None,
    block: int | None = None,
    results: str | os.PathLike[str] = costs.measured.RESULTS,
) -> Comparison:
    """Patterns at equal density: an entry with `{n}` gets the number that comes nearest to it.

    Args:
      entries: patterns, or expressions. In an expression `{n}` stands for an integer that makes
        the pattern denser as it grows, such as "local(window={n})".
      length: tokens.
      density: visible pairs over all pairs; default: that of the first entry without `{n}`.
      head_dim, heads, device, block, results: as in `costs.cost`.

    Raises:
      ValueError: no entry, no density to aim at, or no `n` that makes a pattern of an entry.

    >>> same = compare(["local(window=32)", "dilated(window={n}, dilation=4)"], 256, block=32)
    >>> [found.pattern for found in same.costs]
    ['local(window=32)', 'dilated(window=47, dilation=4)']
    """
    if not entries:
        raise ValueError("entries must be one or more patterns or expressions")
    templates = [isinstance(e, str) and "{n}" in e for e in entries]
    if density is None and any(templates):
        if all(templates):
            raise ValueError("density=None must be given where every entry has {n}")
        given = base.parse(e) if isinstance(e := entries[templates.index(False)], str) else e
        density = _density(given, length)
    chosen = [
        solve(entry, length, density)
        if is_template
        else (base.parse(entry) if isinstance(entry, str) else entry)
        for entry, is_template in zip(entries, templates, strict=True)
    ]
    found = [
        costs.cost(
            pattern, length, head_dim=head_dim, heads=heads, device=device, block=block,
            results=results,
        )
        for pattern in chosen
    ]  # fmt: skip
    layers = []
    for pattern in chosen:
        field = reach.receptive_field(pattern, length, num_layers=_MAX_LAYERS, queries=[length - 1])
        layers.append(field.first_full_layer)
    return Comparison(tuple(found), tuple(layers), tuple(chosen))


def solve(template: str, length: int, density: float) -> base.Pattern | per_head.PerHead:
    """The pattern of `template` whose token density is nearest to `density`, by bisection in `{n}`.

    Raises:
      ValueError: no `n` from 1 to `length` makes a pattern.

    >>> solve("local(window={n})", 1024, 0.1)
    Local(window=108, reach=None)
    """
    tried: dict[int, float] = {}

    def above(n: int) -> bool:
        """Whether `n` is too dense; what cannot be built counts as too large."""
        try:
            tried[n] = _density(base.parse(template.replace("{n}", str(n))), length)
        except ValueError:
            return True
        return tried[n] > density

    low, high = 0, 1
    while high < length and not above(high):
        low, high = high, 2 * high
    high = min(high, length)
    above(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if above(middle) else (middle, high)
    if not tried:
        raise ValueError(f"template={template!r} is no pattern for any n from 1 to {length}")
    best = min(tried, key=lambda n: abs(tried[n] - density))
    return base.parse(template.replace("{n}", str(best)))


def _density(pattern, length) -> float:
    """Token density, from evenly spread queries where the sequence is long."""
    heads = pattern.patterns if isinstance(pattern, per_head.PerHead) else (pattern,)
    count = min(length, max(_QUERIES, _PAIRS // length))
    # One query from each stretch: a fixed stride could keep step with the pattern's own.
    edges = np.linspace(0, length, count + 1)
    queries = (edges[:-1] + np.random.default_rng(0).random(count) * np.diff(edges)).astype(
        np.int32
    )
    keys = np.arange(length, dtype=np.int32)
    step = max(1, _CHUNK // length)
    seen = 0
    for head in heads:
        for i in range(0, count, step):
            visible = head.mask_fn(queries[i : i + step, None], keys)
            seen += int(np.broadcast_to(visible, (len(queries[i : i + step]), length)).sum())
    return seen / (len(heads) * count * length)
