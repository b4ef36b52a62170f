"""Cutting a static `BlockMask` into the masks of the devices: by heads, and by query and key parts.

A row of T tokens is cut into equal chunks, and `order` says which chunk stands at each place of the
row; the `seq` ranks hold consecutive places. Every rank runs one program, so the lists of all ranks
are stacked as arrays of one shape with the ranks leading.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sparse_attn.masks import block_mask
from sparse_attn.ops import tiles

_LISTS = tuple(name for name in block_mask.ARRAYS if name != "bits")


def of_heads(
    mask: block_mask.BlockMask, *, num_heads: int, parts: int
) -> tuple[tuple[block_mask.BlockMask, ...], tuple[int, ...]]:
    """The different masks of `parts` equal groups of heads, and which one each group has.

    >>> from sparse_attn.masks import lower
    >>> from sparse_attn.patterns import causal, local
    >>> heads = (causal.Causal(), local.Local(window=2)) * 2 + (causal.Causal(),) * 4
    >>> masks, which = of_heads(lower.lower(heads, q_len=8, block_q=4, block_kv=4),
    ...                         num_heads=8, parts=4)
    >>> [mask.num_tables for mask in masks], which
    ([2, 1], (0, 0, 1, 1))
    """
    tables = mask.tables_of_heads(num_heads).reshape(parts, -1)
    kinds = list(dict.fromkeys(map(tuple, tables.tolist())))
    return tuple(_with_tables(mask, kind) for kind in kinds), tuple(
        kinds.index(tuple(row)) for row in tables.tolist()
    )


def _with_tables(mask, of_heads):
    used = sorted(set(of_heads))
    arrays = {}
    if len(used) < mask.num_tables:
        arrays = {n: x[:, used] for n in block_mask.ARRAYS if (x := getattr(mask, n)) is not None}
    cut = dataclasses.replace(
        mask,
        rules=mask.rules if len(mask.rules) == 1 else tuple(mask.rules[t] for t in used),
        head_tables=tuple(used.index(t) for t in of_heads) if len(used) > 1 else None,
        **arrays,
    )
    return dataclasses.replace(cut, max_kv=_most(cut.kv_counts), max_q=_most(cut.q_counts))


def _most(counts) -> int:
    return int(counts.max())


def block_of(length: int, *, chunks: int) -> int:
    """Tokens per mask block that divide each chunk: the largest power of two up to the usual block.

    >>> block_of(4096, chunks=16), block_of(96, chunks=2)
    (128, 16)
    """
    return min(math.gcd(length // chunks, 128), tiles.mask_block(length))


def places(order: Sequence[int], length: int) -> np.ndarray:
    """The token that stands at each place of a row, int32 `[length]`.

    >>> places((0, 2, 1), 6).tolist()
    [0, 1, 4, 5, 2, 3]
    """
    chunk = length // len(order)
    return (np.asarray(order, np.int32)[:, None] * chunk + np.arange(chunk, dtype=np.int32)).ravel()


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Masks of the same lengths for all ranks: run-time lists `[ranks, 1, U, ...]` and the rest.

    Attributes:
      frame: a `BlockMask` whose lists are None.
      lists: NumPy arrays by field name.
    """

    frame: block_mask.BlockMask
    lists: dict[str, np.ndarray]

    def mask(self, lists: dict[str, Any]) -> block_mask.BlockMask:
        """The mask of one rank, from its slice `[1, U, ...]` of the lists."""
        return dataclasses.replace(self.frame, **lists)


class Split:
    """The active blocks of a static mask by (query rank, key rank), for one order of the chunks.

    Attributes:
      pairs: bool `[ranks, ranks]`, True where some query of the first sees a key of the second.

    Raises:
      ValueError: the mask is not square or of a batch, or its blocks do not divide the chunks.

    >>> from sparse_attn.masks import lower
    >>> from sparse_attn.patterns import local
    >>> mask = lower.lower(local.Local(window=3), q_len=16, block_q=4, block_kv=4)
    >>> Split(mask, order=range(4), ranks=4).pairs.astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [0, 1, 1, 0],
           [0, 0, 1, 1]])
    """

    def __init__(self, mask: block_mask.BlockMask, *, order: Sequence[int], ranks: int):
        if mask.q_len != mask.kv_len or mask.batch != 1:
            raise ValueError(
                f"mask={mask!r} must have as many queries as keys and no batch, to be split over "
                "the seq axis"
            )
        chunk = mask.q_len // len(order)
        for name in ("block_q", "block_kv"):
            if chunk % getattr(mask, name):
                raise ValueError(
                    f"{name}={getattr(mask, name)} must divide the chunks of {chunk} tokens that "
                    f"{ranks} ranks of the seq axis hold; give a smaller model.block"
                )
        self._mask, self._ranks = mask, ranks
        self._tables = [list(_blocks(mask, table)) for table in range(mask.num_tables)]
        for blocks in self._tables:
            for i, block in enumerate((mask.block_q, mask.block_kv)):
                blocks[i] = np.argsort(places(order, mask.q_len)[::block])[blocks[i]]
        self._rows, self._cols = mask.num_rows // ranks, mask.num_cols // ranks
        self.pairs = np.zeros((ranks, ranks), bool)
        for rows, cols, *_ in self._tables:
            self.pairs[rows // self._rows, cols // self._cols] = True

    def of_rows(self) -> Stacked:
        """The mask of each rank's queries against the keys of all ranks."""
        return self._stack([_within(self._tables, self._rows, r) for r in range(self._ranks)])

    def of_pairs(self, keys_of: Sequence[int]) -> Stacked:
        """The mask of each rank's queries against the keys of rank `keys_of[rank]`."""
        parts = [_within(self._tables, self._rows, r, self._cols, c) for r, c in enumerate(keys_of)]
        return self._stack(parts, kv_parts=self._ranks)

    def _stack(self, parts, kv_parts: int = 1) -> Stacked:
        mask = self._mask
        cols = mask.num_cols // kv_parts
        lists = {}
        by_rows = [[_ragged(r, c, p, s, self._rows) for r, c, p, s in part] for part in parts]
        by_cols = [[_ragged(c, r, p, s, cols) for r, c, p, s in part] for part in parts]
        for prefix, ragged in (("kv", by_rows), ("q", by_cols)):
            longest = max(1, *(len(table[3]) for part in ragged for table in part))
            names = ("starts", "counts", "partial_counts", "indices", "bits")
            for i, name in enumerate(names[: None if mask.bits is not None else 4]):
                # A table without entries still has one place, where nothing is listed.
                width = longest if i > 2 else None
                lists[f"{prefix}_{name}"] = np.stack(
                    [
                        np.stack([_padded(table[i], width) for table in part])[None]
                        for part in ragged
                    ]
                )
        frame = dataclasses.replace(
            mask,
            **dict.fromkeys(_LISTS),
            q_len=mask.q_len // self._ranks,
            kv_len=mask.kv_len // kv_parts,
            max_kv=max(1, _most(lists["kv_counts"])),
            max_q=max(1, _most(lists["q_counts"])),
        )
        return Stacked(frame, lists)


def _blocks(mask, table) -> Iterator[np.ndarray]:
    """Row, column, whether PARTIAL, and slot in `bits` of every active block."""
    slots = None if mask.kv_bits is None else mask.kv_bits[0, table]
    found = [
        (rows, cols, np.full(rows.shape, state == block_mask.BlockState.PARTIAL),
         np.zeros_like(cols) if slots is None else slots[at])
        for state in (block_mask.BlockState.PARTIAL, block_mask.BlockState.FULL)
        for rows, cols, at in block_mask.entries(mask, state, table=table)
    ]  # fmt: skip
    if not found:
        nothing = np.empty(0, np.int32)
        found = [(nothing, nothing, nothing.astype(bool), nothing)]
    return (np.concatenate(x) for x in zip(*found, strict=True))


def _within(tables, rows_each, q_rank, cols_each=None, kv_rank=None):
    """The blocks of one query rank (and key rank), with rows and columns counted from its first."""
    parts = []
    for rows, cols, partial, slots in tables:
        inside = rows // rows_each == q_rank
        first = 0
        if cols_each is not None:
            inside &= cols // cols_each == kv_rank
            first = kv_rank * cols_each
        parts.append(
            (
                rows[inside] - q_rank * rows_each,
                cols[inside] - first,
                partial[inside],
                slots[inside],
            )
        )
    return parts


def _ragged(rows, cols, partial, slots, num_rows):
    """Starts, counts, partial counts, indices and slots: PARTIAL blocks first, both ascending."""
    sort = np.lexsort((cols, ~partial, rows))
    counts = np.bincount(rows, minlength=num_rows)
    partial_counts = np.bincount(rows[partial], minlength=num_rows)
    lists = (np.cumsum(counts) - counts, counts, partial_counts, cols[sort], slots[sort])
    return tuple(x.astype(np.int32) for x in lists)


def _padded(x, width):
    return x if width is None else np.pad(x, (0, width - len(x)), constant_values=-1)
