"""`BlockMask`: which blocks of the T x S mask are active, as ragged lists by row and by column."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.masks import programs, states

BlockState = states.BlockState

# The fields that are arrays (NumPy for static masks, JAX for run-time ones); the others are static.
ARRAYS = (
    "kv_starts", "kv_counts", "kv_partial_counts", "kv_indices",
    "q_starts", "q_counts", "q_partial_counts", "q_indices",
    "bits", "kv_bits", "q_bits",
)  # fmt: skip


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=ARRAYS,
    meta_fields=[
        "q_len", "kv_len", "block_q", "block_kv", "rules", "head_tables", "max_kv", "max_q",
    ],
)  # fmt: skip
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """Active blocks of an attention mask, listed by row (for queries) and by column (for keys).

    There are `M` masks in the batch (1 = shared by the batch) and `U` tables (heads may share
    one); `nq = ceil(q_len / block_q)` rows, `nk = ceil(kv_len / block_kv)` columns. Row `r` of
    table `u` lists its active KV blocks in `kv_indices[m, u, start : start + count]`: first
    `kv_partial_counts` PARTIAL blocks, then the FULL ones, each group ascending. The order
    carries the state, so a kernel runs one loop with the element rule and one without, and
    memory is O(active blocks) even where one row is far longer than the rest. Columns
    (`q_*`) list the same blocks transposed, for dk and dv.

    A block that reaches over `kv_len` is never FULL, so the rule is always applied there; rows
    over `q_len` are the caller's padding.

    Attributes:
      kv_starts, kv_counts, kv_partial_counts: int32 `[M, U, nq]`.
      kv_indices: int32 `[M, U, L]`; -1 where no row lists an entry.
      q_starts, q_counts, q_partial_counts: int32 `[M, U, nk]`.
      q_indices: int32 `[M, U, L]`, likewise.
      bits: uint8 `[M, U, P, block_q, block_kv]` element masks (1 = may attend) of arbitrary
        arrays, or None. Slot 0 is all ones, for FULL blocks that a document boundary turns into
        PARTIAL ones.
      kv_bits, q_bits: int32 `[M, U, L]` slot of each listed block in `bits` (0 for FULL ones; -1
        where nothing is listed), or None.
      q_len, kv_len: tokens.
      block_q, block_kv: tokens per block.
      rules: per table (or one for all) the hashable rule with `mask_fn`; None = `bits` decide.
      head_tables: table of each query head, or None: `U` divides the number of heads, and heads
        share tables in consecutive groups (1 = one for all, `num_kv_heads` = one per KV head).
      max_kv, max_q: static bounds of `kv_counts` and `q_counts`.
    """

    kv_starts: Any
    kv_counts: Any
    kv_partial_counts: Any
    kv_indices: Any
    q_starts: Any
    q_counts: Any
    q_partial_counts: Any
    q_indices: Any
    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    rules: tuple[Any, ...]
    head_tables: tuple[int, ...] | None = None
    max_kv: int = 0
    max_q: int = 0
    bits: Any = None
    kv_bits: Any = None
    q_bits: Any = None

    @property
    def num_rows(self) -> int:
        """Query blocks, `ceil(q_len / block_q)`."""
        return -(-self.q_len // self.block_q)

    @property
    def num_cols(self) -> int:
        """KV blocks, `ceil(kv_len / block_kv)`."""
        return -(-self.kv_len // self.block_kv)

    @property
    def num_tables(self) -> int:
        """`U`, the number of distinct tables."""
        return self.kv_counts.shape[1]

    @property
    def batch(self) -> int:
        """`M`, 1 when the whole batch shares the mask."""
        return self.kv_counts.shape[0]

    @property
    def is_static(self) -> bool:
        """True when the tables are NumPy arrays, known while tracing."""
        return isinstance(self.kv_counts, np.ndarray)

    def rule(self, table: int):
        """The element rule of `table` (an object with `mask_fn`), or None when `bits` decide."""
        return self.rules[table if len(self.rules) > 1 else 0]

    def tables_of_heads(self, num_heads: int) -> np.ndarray:
        """The table of each query head, int32 `[num_heads]`.

        Raises:
          ValueError: the mask was made for another number of heads.
        """
        if self.head_tables is not None:
            if len(self.head_tables) != num_heads:
                raise ValueError(
                    f"mask has a table for each of {len(self.head_tables)} heads, q has {num_heads}"
                )
            return np.asarray(self.head_tables, np.int32)
        if num_heads % self.num_tables:
            raise ValueError(
                f"mask has {self.num_tables} tables, which must divide num_heads={num_heads}"
            )
        return np.arange(num_heads, dtype=np.int32) // (num_heads // self.num_tables)

    def __repr__(self) -> str:
        kind = "static" if self.is_static else "run-time"
        return (
            f"BlockMask({kind}, {self.q_len}x{self.kv_len} tokens, block {self.block_q}x"
            f"{self.block_kv}, batch {self.batch}, tables {self.num_tables}, rules={self.rules!r})"
        )

    def _repr_html_(self) -> str | None:
        from sparse_attn.viz import show  # viz is a leaf: nothing imports it at start-up

        return show.html(self) if self.is_static else None  # None: notebooks fall back to repr.


def block_states(mask: BlockMask, *, batch: int = 0, table: int = 0) -> np.ndarray:
    """The states of all blocks, int8 `[nq, nk]`: for tests and pictures of small masks.

    >>> from sparse_attn.masks import lower
    >>> from sparse_attn.patterns import causal
    >>> mask = lower.lower(causal.Causal(), q_len=6, kv_len=6, block_q=2, block_kv=2)
    >>> block_states(mask)
    array([[1, 0, 0],
           [2, 1, 0],
           [2, 2, 1]], dtype=int8)
    """
    grid = np.zeros((mask.num_rows, mask.num_cols), np.int8)
    for state in (BlockState.PARTIAL, BlockState.FULL):
        for rows, cols, _ in entries(mask, state, batch=batch, table=table):
            grid[rows, cols] = state
    return grid


def entries(
    mask: BlockMask, state: BlockState, *, batch: int = 0, table: int = 0, piece: int = 1 << 16
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The blocks of one state as (rows, columns, places in `kv_indices`), some at a time.

    Row by row, for tables whose arrays are concrete. A piece has at most `piece` blocks, so that
    work on the 33 million blocks of 2**20 causal tokens stays in the cache.

    >>> from sparse_attn.masks import lower
    >>> from sparse_attn.patterns import causal
    >>> mask = lower.lower(causal.Causal(), q_len=6, block_q=2, block_kv=2)
    >>> [(rows.tolist(), cols.tolist()) for rows, cols, _ in entries(mask, BlockState.FULL)]
    [([1, 2, 2], [0, 0, 1])]
    """
    starts, counts, partial = (
        np.asarray(x)[batch, table]
        for x in (mask.kv_starts, mask.kv_counts, mask.kv_partial_counts)
    )
    indices = np.asarray(mask.kv_indices)[batch, table]
    if state == BlockState.PARTIAL:
        counts = partial
    else:
        starts, counts = starts + partial, counts - partial
    ends = np.cumsum(counts, dtype=np.int64)
    for i in range(0, int(ends[-1]), piece):
        entry = np.arange(i, min(i + piece, int(ends[-1])))
        rows = np.searchsorted(ends, entry, side="right")
        places = starts[rows] + entry - (ends[rows] - counts[rows])
        yield rows, indices[places], places


def from_block_states(
    block_states: Any,
    *,
    rule: Any,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
) -> BlockMask:
    """A `BlockMask` from block states, static or traced: the way in for run-time selection.

    Args:
      block_states: integer `[nq, nk]`, `[U, nq, nk]` or `[M, U, nq, nk]` of 0 EMPTY, 1 PARTIAL,
        2 FULL. NumPy gives a static mask, a JAX array a run-time one (O(nq * nk) memory, sorted
        on the device). FULL promises that the rule holds in the whole block: it becomes PARTIAL
        over the edge of `kv_len` and where documents split it.
      rule: what PARTIAL blocks evaluate (an object with `mask_fn(q_pos, kv_pos)`).

    Raises:
      ValueError: the shape does not fit the lengths and blocks, or one of them is < 1.

    >>> from sparse_attn.patterns import causal
    >>> mask = from_block_states(np.array([[1, 0], [2, 1]]), rule=causal.Causal(),
    ...                          q_len=7, kv_len=7, block_q=4, block_kv=4)
    >>> mask.kv_counts[0, 0], mask.kv_partial_counts[0, 0], mask.kv_indices[0, 0]
    (array([1, 2], dtype=int32), array([1, 1], dtype=int32), array([ 0, -1,  1,  0], dtype=int32))
    """
    _check_sizes(q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv)
    nq, nk = -(-q_len // block_q), -(-kv_len // block_kv)
    if block_states.ndim not in (2, 3, 4) or block_states.shape[-2:] != (nq, nk):
        raise ValueError(
            f"block_states.shape={block_states.shape} must be [..., {nq}, {nk}], 0 to 2 leading "
            f"axes for q_len={q_len}, kv_len={kv_len}, block_q={block_q}, block_kv={block_kv}"
        )
    static = isinstance(block_states, np.ndarray)
    make = functools.partial(_lists, np) if static else _run_time_lists
    return BlockMask(
        *make(block_states, edge=kv_len % block_kv != 0),
        q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv, rules=(rule,),
        max_kv=nk, max_q=nq,
    )  # fmt: skip


def _lists(xp, block_states, *, edge):
    """The lists of rows, then those of columns; with an `edge`, the last column is never FULL."""
    grid = block_states.reshape((1,) * (4 - block_states.ndim) + block_states.shape)
    if edge:
        last = xp.arange(grid.shape[-1]) == grid.shape[-1] - 1
        grid = xp.where(last & (grid == BlockState.FULL), BlockState.PARTIAL, grid)
    return *_padded_lists(grid, xp), *_padded_lists(xp.swapaxes(grid, -1, -2), xp)


@programs.one_program()
def _run_time_lists(block_states, *, edge):
    return _lists(jnp, block_states, edge=edge)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be >= 1")


def _padded_lists(grid, xp):
    """starts, counts, partial counts and indices of `[M, U, rows, width]` block states."""
    width = grid.shape[-1]
    # PARTIAL sorts before FULL before EMPTY, ascending index within each: the list order.
    order = xp.where(grid == BlockState.EMPTY, 3, grid).astype(np.int32) * width + xp.arange(width)
    order = xp.sort(order, axis=-1)
    indices = xp.where(order < 3 * width, order % width, -1)
    counts = (grid != BlockState.EMPTY).sum(-1)
    partial = (grid == BlockState.PARTIAL).sum(-1)
    starts = xp.broadcast_to(xp.arange(grid.shape[-2]) * width, counts.shape)
    flat = indices.reshape(*indices.shape[:-2], -1)
    return tuple(x.astype(np.int32) for x in (starts, counts, partial, flat))


def from_array(array: np.ndarray, *, block_q: int = 128, block_kv: int = 128) -> BlockMask:
    """A static `BlockMask` from an arbitrary boolean mask; PARTIAL blocks carry their bits.

    Args:
      array: bool `[T, S]` or `[N, T, S]` (one per query head), True = may attend.

    Raises:
      ValueError: not a boolean array of two or three dimensions, or empty, or a block < 1.

    >>> mask = from_array(np.tri(5, dtype=bool), block_q=2, block_kv=2)
    >>> int(mask.kv_counts.sum()), mask.bits.shape
    (6, (1, 1, 4, 2, 2))
    """
    _check_sizes(block_q=block_q, block_kv=block_kv)
    array = np.asarray(array)
    if array.dtype != np.bool_ or array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(
            f"array of dtype {array.dtype} and shape {array.shape} must be a bool [T, S] or "
            "[N, T, S] with no empty axis"
        )
    masks = array[None] if array.ndim == 2 else array
    num_tables, q_len, kv_len = masks.shape
    nq, nk = -(-q_len // block_q), -(-kv_len // block_kv)
    padded = np.zeros((num_tables, nq * block_q, nk * block_kv), bool)
    padded[:, :q_len, :kv_len] = masks
    tiles = padded.reshape(num_tables, nq, block_q, nk, block_kv).swapaxes(2, 3)
    # Rows over the edge do not exist, so they do not keep a block from being FULL.
    row_exists = (np.arange(nq * block_q) < q_len).reshape(nq, 1, block_q, 1)
    grid = np.where((tiles | ~row_exists).all((-1, -2)), BlockState.FULL, BlockState.PARTIAL)
    grid = np.where(tiles.any((-1, -2)), grid, BlockState.EMPTY)
    mask = from_block_states(
        grid, rule=None, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv
    )
    partial = grid == BlockState.PARTIAL
    slots = np.where(partial, np.cumsum(partial.reshape(num_tables, -1), -1).reshape(grid.shape), 0)
    bits = np.zeros((1, num_tables, 1 + int(slots.max()), block_q, block_kv), np.uint8)
    bits[:, :, 0] = 1
    for table in range(num_tables):
        bits[0, table, 1 : 1 + int(partial[table].sum())] = tiles[table][partial[table]]
    return dataclasses.replace(
        mask,
        bits=bits,
        kv_bits=_slots_of_lists(slots, mask.kv_indices, nk),
        q_bits=_slots_of_lists(slots.swapaxes(1, 2), mask.q_indices, nq),
    )


def _slots_of_lists(slots, indices, width):
    """Slot of each listed block, `[1, U, L]`, from slots by block `[U, rows, width]`."""
    listed = indices[0].reshape(*slots.shape[:2], width)
    found = np.take_along_axis(slots, np.maximum(listed, 0), -1)
    return np.where(listed >= 0, found, -1).reshape(1, slots.shape[0], -1).astype(np.int32)
