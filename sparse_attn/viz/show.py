"""Pictures of what a pattern lets through: block maps as text, HTML, pixels and figures.

Everything is drawn from the lists of active blocks, so 2**20 tokens cost no T x S array.
"""

import dataclasses
import html as html_lib
import textwrap
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sparse_attn.masks import block_mask, lower, stats
from sparse_attn.patterns import base, per_layer

FULL, PARTIAL, EMPTY = "█", "▒", "·"

_WHITE, _LIGHT, _DARK = np.array([[255, 255, 255], [136, 176, 222], [23, 55, 114]], np.float64)
_FAINTEST = 0.35  # Ink of a pixel in which a single block is active: visible, however few.
_MAX_PAIRS = 1 << 30  # Counted for a caption at most: about 1 s.


def text(
    pattern: Any,
    q_len: int | None = None,
    block: int | None = None,
    *,
    kv_len: int | None = None,
    max_cells: int = 64,
) -> str:
    """The block map of a pattern in characters, with densities and keys per query.

    Args:
      pattern: a `Pattern`, `PerHead`, `PerLayer` or static `BlockMask`; one map per distinct head
        and layer. Of a batch of masks the first is drawn.
      q_len: tokens, default 512. A `BlockMask` has its own lengths and blocks.
      block: tokens per block, for queries and keys; default 64.
      max_cells: most rows and columns of characters; a character stands for several blocks where
        there are more: full if all of them are, empty if none is active.

    Raises:
      ValueError: lengths or blocks for a `BlockMask`, or a run-time `BlockMask`.

    >>> from sparse_attn.patterns import local
    >>> print(text(local.Local(window=3), 8, 2))
    local(window=3)
    8 queries (down) x 8 keys in blocks of 2 x 2: █ full ▒ partial · empty
    ▒▒······
    ▒▒▒▒····
    ··▒▒▒▒··
    ····▒▒▒▒
    token density 0.3281, block density 0.4375 (7 partial + 0 full of 16 blocks)
    keys per query 1 to 3, mean 2.6; queries without keys 0; imbalance 1.14
    """
    parts = []
    for title, mask in panels(pattern, q_len, block, kv_len=kv_len):
        partial, full, size = cells(mask, max_cells)
        glyphs = np.where(full == 1, FULL, np.where(partial + full > 0, PARTIAL, EMPTY))
        wide = 2 if glyphs.shape[1] <= 32 else 1  # A character is about twice as high as wide.
        grouped = f", one character = {size} x {size} blocks" if size > 1 else ""
        parts.append(
            f"{title}\n{mask.q_len} queries (down) x {mask.kv_len} keys in blocks of "
            f"{mask.block_q} x {mask.block_kv}{grouped}: "
            f"{FULL} full {PARTIAL} partial {EMPTY} empty\n"
            + "\n".join("".join(g * wide for g in row) for row in glyphs)
            + f"\n{caption(mask)}"
        )
    return "\n\n".join(parts)


def html(pattern: Any, q_len: int | None = None, block: int | None = None) -> str:
    """The map of `text` for notebooks: what `pattern` shows as the last line of a cell.

    >>> from sparse_attn.patterns import causal
    >>> html(causal.Causal(), 4, 2)[:20]
    '<pre style="line-hei'
    """
    drawn = html_lib.escape(text(pattern, q_len, block))
    return f'<pre style="line-height:1.15">{drawn}</pre>'


def image(
    pattern: Any,
    q_len: int | None = None,
    block: int | None = None,
    *,
    kv_len: int | None = None,
    max_pixels: int = 512,
) -> UInt8[np.ndarray, "height width 3"]:
    """The block map as pixels, a pixel per block, or per several where there are too many.

    White is empty, light blue partial, dark blue full; a pixel with few active blocks (or heads
    of a `PerHead`) is paler, but never white. Arguments as in `text`, with blocks of 128.

    Raises:
      ValueError: as `text`, or a `PerLayer`, whose layers have one picture each.

    >>> from sparse_attn.patterns import causal
    >>> image(causal.Causal(), 1 << 14, 64, max_pixels=100).shape
    (86, 86, 3)
    """
    if isinstance(pattern, per_layer.PerLayer):
        raise ValueError("pattern must be one layer of the PerLayer: pattern.for_layer(i)")
    mask = _lower(pattern, q_len, block, kv_len, default_block=128)
    heads = stats.heads_of_tables(mask)
    partial, full = (
        sum(n * x for n, x in zip(heads, fractions, strict=True)) / sum(heads)
        for fractions in zip(
            *(cells(_table(mask, u), max_pixels)[:2] for u in range(mask.num_tables)), strict=True
        )
    )
    partial, full = partial[..., None], full[..., None]
    active = partial + full
    ink = (partial * _LIGHT + full * _DARK) / np.where(active == 0, 1, active)
    opacity = np.where(active == 0, 0, _FAINTEST + (1 - _FAINTEST) * active)
    return np.rint(_WHITE + opacity * (ink - _WHITE)).astype(np.uint8)


def show(
    pattern: Any,
    q_len: int | None = None,
    block: int | None = None,
    *,
    kv_len: int | None = None,
) -> "matplotlib.figure.Figure":
    """A matplotlib figure of the block map with axes in tokens; works at 2**20 tokens.

    Arguments as in `image`; a `PerHead` or `PerLayer` has one panel per distinct entry. Save it
    with `.savefig(path)`; a notebook draws it when it ends a cell.

    >>> from sparse_attn.patterns import local
    >>> show(local.Local(window=4096), 1 << 16).axes[0].get_title()
    'local(window=4096)'
    """
    from matplotlib import pyplot  # slow to import, and only figures need it

    drawn = panels(pattern, q_len, block, kv_len=kv_len, default_block=128)
    made, axes = pyplot.subplots(
        1, len(drawn), figsize=(4.2 * len(drawn), 5), squeeze=False, layout="constrained"
    )
    for axis, (title, mask) in zip(axes[0], drawn, strict=True):
        extent = (0, mask.kv_len, mask.q_len, 0)
        axis.imshow(image(mask), extent=extent, interpolation="nearest", aspect="equal")
        axis.set_title("\n".join(textwrap.wrap(title, 44)), fontsize=9)
        axis.set_xlabel("key\n" + "\n".join(textwrap.wrap(caption(mask), 52)), fontsize=7)
        axis.set_ylabel("query", fontsize=8)
        axis.tick_params(labelsize=7)
    pyplot.close(made)  # The caller holds it: pyplot must neither draw it again nor keep it.
    return made


def caption(mask: block_mask.BlockMask) -> str:
    """Densities, keys per query, empty queries and imbalance, in two lines."""
    counts = stats.of(mask, max_pairs=_MAX_PAIRS)
    blocks = (
        f"block density {counts.block_density:.4g} ({counts.partial_blocks:.0f} partial + "
        f"{counts.full_blocks:.0f} full of {mask.num_rows * mask.num_cols} blocks)"
    )
    if counts.token_density is None:
        return (
            f"token density not counted (too many partial blocks), {blocks}\n"
            f"imbalance {counts.imbalance:.2f}"
        )
    return (
        f"token density {counts.token_density:.4g}, {blocks}\n"
        f"keys per query {counts.keys_per_row_min} to {counts.keys_per_row_max}, mean "
        f"{counts.keys_per_row_mean:.1f}; queries without keys {counts.empty_rows:.0f}; "
        f"imbalance {counts.imbalance:.2f}"
    )


def panels(
    pattern: Any,
    q_len: int | None = None,
    block: int | None = None,
    *,
    kv_len: int | None = None,
    default_block: int = 64,
) -> list[tuple[str, block_mask.BlockMask]]:
    """A title and a mask of one table for every distinct head and layer of `pattern`.

    >>> from sparse_attn import patterns
    >>> heads = patterns.parse("per_head((causal(), local(window=2), causal()))")
    >>> [title for title, _ in panels(heads)]
    ['heads 0, 2 of 3: causal()', 'head 1 of 3: local(window=2)']
    """
    if isinstance(pattern, per_layer.PerLayer):
        found = []
        for entry in dict.fromkeys(pattern.patterns):
            where = _places("layer", [p == entry for p in pattern.patterns])
            inner = panels(entry, q_len, block, kv_len=kv_len, default_block=default_block)
            found += [(f"{where}{title}", mask) for title, mask in inner]
        return found
    mask = _lower(pattern, q_len, block, kv_len, default_block)
    tables = mask.head_tables or range(mask.num_tables)
    return [
        (
            (_places("head", [t == u for t in tables]) if mask.num_tables > 1 else "")
            + _name(mask.rule(u)),
            _table(mask, u),
        )
        for u in range(mask.num_tables)
    ]


def cells(mask: block_mask.BlockMask, max_cells: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Shares of PARTIAL and FULL blocks in each cell, float64 `[h, w]`, and blocks per cell side.

    Cells are square groups of blocks, at most `max_cells` in a row or column.
    """
    size = -(-max(mask.num_rows, mask.num_cols) // max_cells)
    height, width = -(-mask.num_rows // size), -(-mask.num_cols // size)
    blocks = np.outer(
        np.minimum(size, mask.num_rows - size * np.arange(height)),
        np.minimum(size, mask.num_cols - size * np.arange(width)),
    )
    shares = []
    for state in (block_mask.BlockState.PARTIAL, block_mask.BlockState.FULL):
        count = np.zeros(height * width, np.int64)
        for rows, cols, _ in block_mask.entries(mask, state):
            count += np.bincount(rows // size * width + cols // size, minlength=height * width)
        shares.append(count.reshape(height, width) / blocks)
    return shares[0], shares[1], size


def _lower(pattern, q_len, block, kv_len, default_block):
    if not isinstance(pattern, block_mask.BlockMask):
        q_len = 512 if q_len is None else q_len
        block = default_block if block is None else block
        return lower.lower(pattern, q_len=q_len, kv_len=kv_len, block_q=block, block_kv=block)
    if (q_len, block, kv_len) != (None, None, None):
        raise ValueError(
            f"q_len={q_len}, block={block}, kv_len={kv_len} must be None: a BlockMask has its own"
        )
    if not pattern.is_static:
        raise ValueError("mask must be static (NumPy tables) to be drawn, not run-time")
    return pattern


def _table(mask, table):
    """The first mask of the batch with table `table` alone."""
    arrays = {name: getattr(mask, name) for name in block_mask.ARRAYS}
    return dataclasses.replace(
        mask,
        **{n: None if x is None else x[:1, table : table + 1] for n, x in arrays.items()},
        rules=(mask.rule(table),),
        head_tables=None,
    )


def _places(word, chosen):
    at = [str(i) for i, here in enumerate(chosen) if here]
    return f"{word}{'s' * (len(at) > 1)} {', '.join(at)} of {len(chosen)}: "


def _name(rule):
    if rule is None:
        return "array"
    return rule.expression() if isinstance(rule, base.Expression) else repr(rule)
