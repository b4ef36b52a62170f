"""The work list of the TPU kernels: one step per active tile, by output row, cut to fit SMEM.

A tile is what one grid step computes; a block is the granularity of the mask. Tiles may hold
several blocks (their states are packed, 2 bits each) or be part of one.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.masks import block_mask, lower
from sparse_attn.patterns import base

# Low bits of `inner`: state of the tile, whether it opens or closes its output row, and whether its
# step meets a tile of the step before it (then a sum over steps must wait for the one before).
STATE, FIRST, LAST, AGAIN, SHIFT = 3, 4, 8, 16, 5
_PER_WORD = 16  # States of 2 bits in a word.


@dataclasses.dataclass(frozen=True)
class Steps:
    """A chunked work list.

    Attributes:
      outer: int32 `[C, L]`: output row, `((mask * units + unit) * num_outer + tile)`.
      inner: int32 `[C, L * parts]`: `(head * num_inner + tile) << SHIFT | flags`, see STATE and
        the next lines. A step computes `parts` tiles of one output row, far apart or not.
      words: int32 `[C, L * num_words]` states of the blocks of a tile, or None (one block each).
      slots: int32 `[C, L]` index of the tile's bits, or None.
      totals: int32 `[C]` steps of each chunk; the rest of its list is filler.
      num_words: words per step.
      fine_q, fine_kv: tokens of the blocks that `words` speak of.
      is_static: arrays are NumPy.
    """

    outer: Any
    inner: Any
    words: Any
    slots: Any
    totals: Any
    num_words: int
    fine_q: int
    fine_kv: int

    @property
    def is_static(self) -> bool:
        return isinstance(self.outer, np.ndarray)


def at_tiles(mask: block_mask.BlockMask, tile_q: int, tile_kv: int) -> block_mask.BlockMask:
    """`mask` lowered afresh with tiles as its blocks, where that says the same; else `mask`.

    A static mask that `lower` made is its rules and nothing else, so its tiles need no states of
    smaller blocks. Masks from block states or arrays hide what their rule would show.
    """
    if not mask.is_static or (mask.block_q, mask.block_kv) == (tile_q, tile_kv):
        return mask
    if mask.bits is not None or len(mask.rules) != mask.num_tables:
        return mask
    if not all(isinstance(rule, base.Pattern) for rule in mask.rules):
        return mask
    rules = mask.rules
    if mask.head_tables is not None:
        rules = tuple(mask.rules[t] for t in mask.head_tables)
    lengths = {"q_len": mask.q_len, "kv_len": mask.kv_len}
    # `lower` caches: a mask it made is found again, arrays and all.
    again = lower.lower(rules, **lengths, block_q=mask.block_q, block_kv=mask.block_kv)
    if again.kv_indices is not mask.kv_indices:
        return mask
    return lower.lower(rules, **lengths, block_q=tile_q, block_kv=tile_kv)


def num_tiles(mask: block_mask.BlockMask, tile_q: int, tile_kv: int) -> int:
    """Active tiles of a static mask, over all its tables."""
    mask = at_tiles(mask, tile_q, tile_kv)
    total = 0
    for m in range(mask.batch):
        for u in range(mask.num_tables):
            counts = mask.kv_counts[m, u]
            rows = np.repeat(np.arange(len(counts)), counts)
            offset = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
            cols = mask.kv_indices[m, u][mask.kv_starts[m, u][rows] + offset].astype(np.int64)
            # A tile over several blocks is one, a block over several tiles is several.
            tiles_per_block = -(-mask.block_q // tile_q) * -(-mask.block_kv // tile_kv)
            key = rows * mask.block_q // tile_q * mask.num_cols * mask.block_kv
            total += len(np.unique(key + cols * mask.block_kv // tile_kv)) * tiles_per_block
    return total


def build(
    mask: block_mask.BlockMask,
    tables: np.ndarray,
    *,
    by: str,
    tile_q: int,
    tile_kv: int,
    smem_words: int,
    parts: int = 1,
) -> Steps:
    """The work list of `mask`, by "rows" (for out and dq) or by "cols" (for dk and dv).

    Args:
      tables: int `[units, heads]`: the table of each head that adds to one output row; one head
        where the heads of a group share a table.
      smem_words: 32-bit words of SMEM that a chunk may take.
      parts: tiles of one step; rows are filled up with EMPTY ones.

    Raises:
      NotImplementedError: one output row alone may exceed `smem_words`, or tile and block sizes
        are no multiples of each other.
    """
    layout = _Layout.of(mask, tables, by, tile_q, tile_kv)
    if mask.is_static:
        lists = _static_lists(mask, layout)
    else:
        lists = _traced_lists(mask, layout)
    return _chunk(lists, mask.batch * len(tables) * layout.num_outer, layout, smem_words, parts)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Sizes of tiles and of the blocks in them, seen from the output side (`outer`)."""

    by: str
    tables: np.ndarray
    fine_q: int
    fine_kv: int
    blocks_q: int  # Fine blocks per tile.
    blocks_kv: int
    fine_rows: int  # Fine blocks of the sequence.
    fine_cols: int
    split_q: int  # Fine blocks per block of the mask.
    split_kv: int
    has_bits: bool
    longest: int  # Bound of the steps of one output row and head.

    @classmethod
    def of(cls, mask, tables, by, tile_q, tile_kv):
        for name, block, tile in (
            ("block_q", mask.block_q, tile_q),
            ("block_kv", mask.block_kv, tile_kv),
        ):
            if block % tile and tile % block:
                raise NotImplementedError(f"{name}={block} and its tile {tile} divide neither way")
        fine_q, fine_kv = min(mask.block_q, tile_q), min(mask.block_kv, tile_kv)
        longest = mask.max_kv * (mask.block_kv // fine_kv) * (tile_q // fine_q)
        others = -(-mask.kv_len // tile_kv)
        if by == "cols":
            longest = mask.max_q * (mask.block_q // fine_q) * (tile_kv // fine_kv)
            others = -(-mask.q_len // tile_q)
        return cls(
            by, tables, fine_q, fine_kv, tile_q // fine_q, tile_kv // fine_kv,
            -(-mask.q_len // fine_q), -(-mask.kv_len // fine_kv),
            mask.block_q // fine_q, mask.block_kv // fine_kv, mask.bits is not None,
            max(1, min(longest, others)),
        )  # fmt: skip

    @property
    def num_words(self):
        blocks = self.blocks_q * self.blocks_kv
        return 0 if blocks == 1 else -(-blocks // _PER_WORD)

    @property
    def num_outer(self):
        rows, cols = -(-self.fine_rows // self.blocks_q), -(-self.fine_cols // self.blocks_kv)
        return rows if self.by == "rows" else cols

    @property
    def num_inner(self):
        rows, cols = -(-self.fine_rows // self.blocks_q), -(-self.fine_cols // self.blocks_kv)
        return cols if self.by == "rows" else rows

    def fine(self, xp, outer, inner, state, slot):
        """Fine blocks `(q, kv, state, slot)` of entries of the mask; state 0 = none."""
        q, kv = (outer, inner) if self.by == "rows" else (inner, outer)
        if self.split_q * self.split_kv > 1:
            offset_q, offset_kv = np.divmod(np.arange(self.split_q * self.split_kv), self.split_kv)
            q = (q[:, None] * self.split_q + offset_q).ravel()
            kv = (kv[:, None] * self.split_kv + offset_kv).ravel()
            state, slot = (xp.repeat(x, len(offset_q)) for x in (state, slot))
        exists = (q < self.fine_rows) & (kv < self.fine_cols)
        return q, kv, xp.where(exists, state, 0), slot

    def key(self, q, kv):
        """Tile numbers `(outer, inner)` of fine blocks."""
        q, kv = q // self.blocks_q, kv // self.blocks_kv
        return (q, kv) if self.by == "rows" else (kv, q)

    def position(self, q, kv):
        """Place of a fine block among those of its tile."""
        return q % self.blocks_q * self.blocks_kv + kv % self.blocks_kv

    def tile_state(self, xp, outer, inner, num_full, some):
        """FULL where every block that exists is; rows over the edge do not exist, keys always."""
        q = outer if self.by == "rows" else inner
        rows = xp.clip(self.fine_rows - q * self.blocks_q, 1, self.blocks_q)
        return xp.where(num_full == rows * self.blocks_kv, 2, xp.where(some, 1, 0))


def _fields(mask, by):
    prefix = "kv" if by == "rows" else "q"
    names = ("starts", "counts", "partial_counts", "indices", "bits")
    return tuple(getattr(mask, f"{prefix}_{name}") for name in names)


def _static_lists(mask, layout):
    """Flat sorted (outer, inner, state, words, slots) of NumPy tables."""
    starts, counts, partial, indices, slots = _fields(mask, layout.by)
    num_units, num_heads = layout.tables.shape
    cache, parts = {}, []

    def table(m, u):
        if (m, u) not in cache:
            outer = np.repeat(np.arange(counts.shape[-1]), counts[m, u])
            offset = np.arange(len(outer)) - (np.cumsum(counts[m, u]) - counts[m, u])[outer]
            at = starts[m, u][outer] + offset
            state = np.where(offset < partial[m, u][outer], 1, 2)
            slot = np.zeros_like(at)
            if slots is not None:
                slot = (m * mask.num_tables + u) * mask.bits.shape[2] + slots[m, u][at]
                slot = np.where(state == 1, slot, 0)
            q, kv, state, slot = layout.fine(np, outer, indices[m, u][at], state, slot)
            listed = state > 0
            cache[m, u] = tuple(x[listed].astype(np.int64) for x in (q, kv, state, slot))
        return cache[m, u]

    for m in range(mask.batch):
        for unit in range(num_units):
            rows = []
            for head in range(num_heads):
                q, kv, state, slot = table(m, layout.tables[unit, head])
                outer, inner = layout.key(q, kv)
                rows.append(
                    (outer, inner + head * layout.num_inner, state, slot, layout.position(q, kv))
                )
            outer, inner, state, slot, position = (
                np.concatenate(x) for x in zip(*rows, strict=True)
            )
            key, first, index = np.unique(
                outer * (num_heads * layout.num_inner) + inner,
                return_index=True,
                return_inverse=True,
            )
            outer, inner = np.divmod(key, num_heads * layout.num_inner)
            num_full = np.bincount(index, state == 2, len(key))
            tile = layout.tile_state(np, outer, inner % layout.num_inner, num_full, True)
            words = np.zeros((len(key), layout.num_words), np.int64)
            if layout.num_words:
                place = (index, position // _PER_WORD)
                np.add.at(words, place, state << (2 * (position % _PER_WORD)))
            empty = np.setdiff1d(np.arange(layout.num_outer), outer)
            none = np.zeros_like(empty)
            order = np.argsort(np.concatenate([outer, empty]), kind="stable")
            merged = (
                np.concatenate([outer, empty]) + (m * num_units + unit) * layout.num_outer,
                np.concatenate([inner, none]),
                np.concatenate([tile, none]),
                np.concatenate([words, np.zeros((len(empty), layout.num_words), np.int64)]),
                np.concatenate([slot[first], none]),
            )
            parts.append([x[order] for x in merged])
    outer, inner, state, words, slot = (np.concatenate(x) for x in zip(*parts, strict=True))
    # Words are bit patterns: the top state may set the sign.
    words = words.astype(np.uint32).view(np.int32)
    return outer, inner, state, words, slot, None


def _traced_lists(mask, layout):
    """The same of traced tables: fixed length, what is not listed sorted to the end."""
    starts, counts, partial, indices, slots = (
        None if x is None else jnp.asarray(x) for x in _fields(mask, layout.by)
    )
    num_units, num_heads = layout.tables.shape
    num_rows, length = counts.shape[-1], indices.shape[-1]

    def one_table(starts, counts, partial, indices, slots):
        entry = jnp.arange(length)
        row = jnp.clip(jnp.searchsorted(starts, entry, side="right") - 1, 0, num_rows - 1)
        offset = entry - starts[row]
        listed = (offset < counts[row]) & (indices >= 0)
        state = jnp.where(listed, jnp.where(offset < partial[row], 1, 2), 0)
        slot = jnp.where(state == 1, slots, 0) if slots is not None else jnp.zeros_like(row)
        q, kv, state, slot = layout.fine(jnp, row, jnp.maximum(indices, 0), state, slot)
        outer, inner = layout.key(q, kv)
        return outer, inner, state, slot, layout.position(q, kv)

    if slots is not None:
        base_slot = jnp.arange(mask.batch * mask.num_tables) * mask.bits.shape[2]
        slots = slots + base_slot.reshape(mask.batch, mask.num_tables, 1)
    in_axes = (0, 0, 0, 0, None if slots is None else 0)
    tables = jax.vmap(jax.vmap(one_table, in_axes), in_axes)(
        starts, counts, partial, indices, slots
    )
    # [M, units, heads, L] -> [M, units, heads * L].
    outer, inner, state, slot, position = (
        x[:, layout.tables].reshape(mask.batch, num_units, -1) for x in tables
    )
    head = jnp.repeat(jnp.arange(num_heads), outer.shape[-1] // num_heads)
    inner = inner + head * layout.num_inner
    capacity = min(outer.shape[-1], layout.num_outer * num_heads * layout.longest)
    capacity += layout.num_outer

    width = num_heads * layout.num_inner
    if (layout.num_outer + 1) * width > np.iinfo(np.int32).max:
        raise NotImplementedError(
            f"{layout.num_outer} x {width} tiles of run-time lists pass 2**31; use larger blocks"
        )

    def one_unit(outer, inner, state, slot, position):
        rows = jnp.arange(layout.num_outer)
        filled = jnp.zeros(layout.num_outer + 1, bool).at[outer].max(state > 0)[:-1]
        # One step without any block for an empty row: it writes the zeros.
        key = jnp.concatenate(
            [
                jnp.where(state > 0, outer, layout.num_outer) * width + inner,
                jnp.where(filled, layout.num_outer, rows) * width,
            ]
        )
        # As few arrays as possible, one where all fits into 31 bits: that decides how long a sort
        # takes to compile, and to run.
        payload = jnp.pad(position << 2 | state, (0, layout.num_outer))
        most = 4 * layout.blocks_q * layout.blocks_kv
        if layout.has_bits:
            slot = jnp.pad(slot, (0, layout.num_outer))
            key, payload, slot = jax.lax.sort((key, payload, slot), num_keys=1, is_stable=False)
        elif ((layout.num_outer + 1) * width) * most <= np.iinfo(np.int32).max:
            key, payload = jnp.divmod(jax.lax.sort(key * most + payload, is_stable=False), most)
        else:
            key, payload = jax.lax.sort((key, payload), num_keys=1, is_stable=False)
        state, position = payload & 3, payload >> 2
        listed = key < layout.num_outer * width
        new = listed & (jnp.concatenate([jnp.full(1, -1), key[:-1]]) != key)
        # Entry -> step; entries that are not listed go past the end and are dropped.
        index = jnp.where(listed, jnp.cumsum(new) - 1, capacity)

        def gather(x):
            """The largest x of the entries of each step."""
            return jnp.zeros(capacity, jnp.int32).at[index].max(x, mode="drop")

        full = jnp.zeros(capacity, jnp.int32).at[index].add(state == 2, mode="drop")
        words = jnp.zeros((capacity, layout.num_words), jnp.int32)
        if layout.num_words:
            place = (index, position // _PER_WORD)
            words = words.at[place].add(state << (2 * (position % _PER_WORD)), mode="drop")
        outer, inner = jnp.divmod(gather(key), width)
        some = gather(state) > 0
        slot = gather(slot) if layout.has_bits else jnp.zeros(capacity, jnp.int32)
        state = layout.tile_state(jnp, outer, inner % layout.num_inner, full, some)
        return outer, inner, state, words, slot, new.sum()

    outer, inner, state, words, slot, totals = jax.vmap(jax.vmap(one_unit))(
        outer, inner, state, slot, position
    )
    unit = jnp.arange(mask.batch * num_units).reshape(mask.batch, num_units, 1)
    outer = outer + unit * layout.num_outer
    # Units one behind the other without gaps.
    totals = totals.reshape(-1)
    ends = jnp.cumsum(totals)
    to = (ends - totals)[:, None] + jnp.arange(capacity)
    to = jnp.where(jnp.arange(capacity) < totals[:, None], to, totals.size * capacity).reshape(-1)
    flat = [
        x.reshape(totals.size * capacity, *x.shape[3:]) for x in (outer, inner, state, words, slot)
    ]
    if totals.size > 1:
        flat = [jnp.zeros_like(x).at[to].set(x, mode="drop") for x in flat]
    return *flat, ends[-1]


def _fill_rows(xp, outer, inner, state, num_rows, parts):
    """Makes the entries of every output row a multiple of `parts`, with EMPTY ones."""
    row_starts = xp.searchsorted(outer, np.arange(num_rows + 1), side="left")
    counts = row_starts[1:] - row_starts[:-1]
    filled = -(-counts // parts) * parts
    ends = xp.cumsum(filled)
    size = int(ends[-1]) if xp is np else len(outer) + num_rows * (parts - 1)
    entry = np.arange(-(-size // parts) * parts)
    row = xp.searchsorted(ends, entry, side="right")
    at = xp.minimum(row, num_rows - 1)
    offset = entry - (ends - filled)[at]
    source = row_starts[at] + xp.minimum(offset, counts[at] - 1)
    return row, inner[source], xp.where(offset < counts[at], state[source], 0)


def _meets_step_before(xp, inner, state, parts):
    """By entry: may its step list a tile that the last step with any tiles lists too?

    True also where the step before has none: what the one before that writes may be under way.
    """
    tile = xp.where(state > 0, inner, -1).reshape(-1, parts)
    before = xp.concatenate([np.full((1, parts), -1), tile[:-1]])
    meets = (tile[:, :, None] == before[:, None, :]) & (tile >= 0)[:, :, None]
    return xp.repeat(meets.any((1, 2)) | (before < 0).all(1), parts)


def _chunk(lists, num_rows, layout, smem_words, parts):
    """Cuts a flat list at output rows into chunks that fit into SMEM, and sets the flags."""
    outer, inner, state, words, slot, total = lists
    xp = np if isinstance(outer, np.ndarray) else jnp
    static = xp is np
    total = len(outer) if static else total
    valid = np.arange(len(outer)) < total
    outer = xp.where(valid, outer, num_rows)
    if parts > 1:
        outer, inner, state = _fill_rows(xp, outer, inner, state, num_rows, parts)
    edge = outer[1:] != outer[:-1]
    one = np.ones(1, bool)
    first, last = xp.concatenate([one, edge]), xp.concatenate([edge, one])
    again = xp.where(_meets_step_before(xp, inner, state, parts), AGAIN, 0)
    inner = inner << SHIFT | state | again | xp.where(first, FIRST, 0) | xp.where(last, LAST, 0)
    per_step = 2 + layout.num_words + layout.has_bits
    limit = smem_words // per_step
    row_starts = xp.searchsorted(outer, np.arange(num_rows + 1), side="left")
    if static:
        # As few chunks as possible, each ending at a row.
        cuts = [0]
        while cuts[-1] < num_rows:
            end = int(np.searchsorted(row_starts, row_starts[cuts[-1]] + limit, side="right")) - 1
            _require_progress(end > cuts[-1], int(np.diff(row_starts).max()), limit)
            cuts.append(min(end, num_rows))
        size = max(int(row_starts[b] - row_starts[a]) for a, b in itertools.pairwise(cuts))
    else:
        longest = -(-layout.longest * layout.tables.shape[1] // parts) * parts
        rows = min(num_rows, limit // longest)
        _require_progress(rows > 0, longest, limit)
        rows = -(-num_rows // -(-num_rows // rows))  # Equal shares.
        cuts = [*range(0, num_rows, rows), num_rows]
        size = min(len(outer), rows * longest)
    cuts = np.asarray(cuts)
    begins = row_starts[cuts[:-1]]
    totals = row_starts[cuts[1:]] - begins
    at = xp.minimum(begins[:, None] + np.arange(size), len(outer) - 1)

    def cut(x):
        return x[at].reshape(len(cuts) - 1, -1).astype(np.int32)

    return Steps(
        outer=cut(xp.minimum(outer, num_rows - 1))[:, ::parts],
        inner=cut(inner),
        words=cut(words) if layout.num_words else None,
        slots=cut(slot) if layout.has_bits else None,
        totals=(totals // parts).astype(np.int32),
        num_words=layout.num_words,
        fine_q=layout.fine_q,
        fine_kv=layout.fine_kv,
    )


def _require_progress(fits, longest, limit):
    if not fits:
        raise NotImplementedError(
            f"one row of tiles may list {longest} steps, SMEM holds {limit}; use larger blocks"
        )
