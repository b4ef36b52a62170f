"""Lowering: a `Pattern` becomes a `BlockMask` in O(active blocks) time and memory."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
import scipy.sparse

from sparse_attn.masks import block_mask
from sparse_attn.patterns import base, per_head

EMPTY, PARTIAL, FULL = base.EMPTY, base.PARTIAL, base.FULL

_INT32_MAX = 2**31 - 1
_COARSEST = 64  # Blocks per side of the first regions that are classified.
_PIECE = 1 << 17  # Regions that are classified at a time: some 20 MB.
_CHUNK = 1 << 20  # Elements of mask_fn evaluated at a time.


def lower(
    pattern: base.Pattern | per_head.PerHead | Sequence[base.Pattern],
    *,
    q_len: int,
    kv_len: int | None = None,
    block_q: int = 128,
    block_kv: int = 128,
) -> block_mask.BlockMask:
    """The static `BlockMask` of a pattern, or of one pattern per query head.

    Regions of blocks are classified with `block_state` from coarse to fine: an EMPTY region is
    dropped, a FULL one listed whole, only a PARTIAL one is split. No T x S array is made, and
    time and memory follow the number of active blocks. A pattern without `block_state` is
    evaluated element by element in small pieces: O(T * S) time, still O(active blocks) memory.
    Results are cached, since patterns are hashable.

    Args:
      pattern: a `Pattern`, a `PerHead`, or a sequence of patterns, one per query head. Heads with
        equal patterns share a table.
      q_len, kv_len: tokens; `kv_len=None` means `q_len`.
      block_q, block_kv: tokens per block.

    Raises:
      ValueError: a length or a block size is smaller than 1, or the pattern is of another type.

    >>> from sparse_attn.patterns import local
    >>> mask = lower(local.Local(window=256), q_len=1 << 20)
    >>> mask.num_rows, int(mask.kv_counts.max()), int(mask.kv_counts.sum())
    (8192, 3, 24573)
    """
    kv_len = q_len if kv_len is None else kv_len
    sizes = {"q_len": q_len, "kv_len": kv_len, "block_q": block_q, "block_kv": block_kv}
    for name, size in sizes.items():
        if not 1 <= size <= _INT32_MAX:
            raise ValueError(f"{name}={size} must be >= 1 and < 2**31: positions are int32")
    if isinstance(pattern, per_head.PerHead):
        pattern = pattern.patterns
    patterns = (pattern,) if isinstance(pattern, base.Pattern) else tuple(pattern)
    if not patterns or not all(isinstance(p, base.Pattern) for p in patterns):
        raise ValueError(f"pattern={pattern!r} must be a Pattern, a PerHead or patterns per head")
    return _lower(patterns, q_len, kv_len, block_q, block_kv)


@functools.lru_cache(maxsize=64)
@jax.ensure_compile_time_eval()  # A pattern may compute with jax, and the caller be in a jit.
def _lower(patterns, q_len, kv_len, block_q, block_kv) -> block_mask.BlockMask:
    unique = tuple(dict.fromkeys(patterns))
    tables = [_rows_and_cols(p, q_len, kv_len, block_q, block_kv) for p in unique]
    rows = _stack([rows for rows, _ in tables])
    cols = _stack([cols for _, cols in tables])
    for array in (*rows, *cols):
        array.flags.writeable = False  # Cached and shared: nobody may change it.
    return block_mask.BlockMask(
        *rows,
        *cols,
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_q,
        block_kv=block_kv,
        rules=unique,
        head_tables=tuple(unique.index(p) for p in patterns) if len(patterns) > 1 else None,
        max_kv=int(rows[1].max()),
        max_q=int(cols[1].max()),
    )


def _stack(tables):
    """Arrays `[1, U, ...]` from per-table (starts, counts, partial counts, indices)."""
    *lists, indices = zip(*tables, strict=True)
    longest = max(1, *map(len, indices))
    if all(len(listed) == longest for listed in indices):
        padded = indices
    else:
        padded = [np.pad(x, (0, longest - len(x)), constant_values=-1) for x in indices]
    # One table is not copied: at 2**20 tokens of dense causal attention it holds 134 MB.
    stacked = (x[0][None] if len(x) == 1 else np.stack(x) for x in (*lists, padded))
    return tuple(x[None] for x in stacked)


def _rows_and_cols(pattern, q_len, kv_len, block_q, block_kv):
    nq, nk = -(-q_len // block_q), -(-kv_len // block_kv)
    partial, full = active_regions(pattern, q_len, kv_len, block_q, block_kv)
    rows, cols, sides = full
    area = np.minimum(sides, nq - rows).astype(np.int64) * np.minimum(sides, nk - cols)
    if (count := len(partial[0]) + int(area.sum())) > _INT32_MAX:
        raise ValueError(
            f"block_q={block_q} and block_kv={block_kv} must be larger: {count} active blocks "
            "are more than int32 offsets can address"
        )
    return (
        _lists(*partial, rows, cols, sides, (nq, nk)),
        _lists(*partial[::-1], cols, rows, sides, (nk, nq)),
    )


def _lists(partial_rows, partial_cols, top, left, sides, shape):
    """Starts, counts, partial counts and indices: each row's PARTIAL blocks, then its FULL ones.

    A FULL region is a run of blocks in each of its rows, so that what is sorted are runs.
    """
    num_rows, width = shape
    dtype = np.int32 if 2 * width <= _INT32_MAX else np.int64
    heights = np.minimum(sides, num_rows - top)
    ends = np.cumsum(heights, dtype=np.int32)
    full_rows = np.repeat(top - (ends - heights), heights)
    full_rows += np.arange(len(full_rows), dtype=np.int32)
    rows = np.concatenate([partial_rows, full_rows])
    # Columns of FULL blocks are counted from `width` on, which sorts them behind the PARTIAL ones.
    firsts = np.concatenate([partial_cols, np.repeat(left.astype(dtype) + width, heights)])
    lengths = np.ones(len(rows), np.int32)
    lengths[len(partial_rows) :] = np.repeat(np.minimum(sides, width - left), heights)
    # Compressed sparse rows sort in O(runs).
    runs = scipy.sparse.coo_array((lengths, (rows, firsts)), shape=(num_rows, 2 * width)).tocsr()
    runs.sort_indices()
    is_partial = runs.indices < width
    firsts = (runs.indices - width * ~is_partial).astype(np.int32)
    ends = np.cumsum(runs.data, dtype=np.int32)
    indices = firsts
    if len(ends) and ends[-1] > len(ends):
        indices = np.repeat(firsts - (ends - runs.data), runs.data)
        indices += np.arange(len(indices), dtype=np.int32)
    starts = np.append(np.int32(0), ends)[runs.indptr]
    partial_ends = np.append(np.int32(0), np.cumsum(is_partial, dtype=np.int32))[runs.indptr]
    return starts[:-1], np.diff(starts), np.diff(partial_ends), indices


def active_regions(pattern, q_len, kv_len, block_q, block_kv):
    """(rows, columns) of the PARTIAL blocks; (rows, columns, sides) of squares of FULL blocks.

    int32 arrays in no fixed order. A square reaches over the last row or column of blocks where
    the number of blocks is no multiple of its side.

    >>> from sparse_attn.patterns import causal
    >>> partial, full = active_regions(causal.Causal(), 4, 4, 2, 2)
    >>> [x.tolist() for x in (*partial, *full)]
    [[0, 1], [0, 1], [1], [0], [1]]
    """
    nq, nk = -(-q_len // block_q), -(-kv_len // block_kv)
    nothing = np.empty(0, np.int32)
    partial, full = [(nothing,) * 2], [(nothing,) * 3]

    def add(found, *columns):
        found.append(tuple(x.astype(np.int32) for x in columns))

    side = min(_COARSEST, 1 << (max(nq, nk) - 1).bit_length())
    rows, cols = np.mgrid[0 : -(-nq // side), 0 : -(-nk // side)].reshape(2, -1)
    # Depth first and in pieces, so that what is still undecided never takes much memory.
    stack = [(side, rows, cols)]
    while stack:
        side, rows, cols = stack.pop()
        if len(rows) > _PIECE:
            half = len(rows) // 2
            stack += (side, rows[half:], cols[half:]), (side, rows[:half], cols[:half])
            continue
        # Token ranges of the regions, cut at the sequence ends.
        q_lo, kv_lo = rows * side * block_q, cols * side * block_kv
        q_hi = np.minimum(q_lo + side * block_q, q_len)
        kv_hi = np.minimum(kv_lo + side * block_kv, kv_len)
        state, sure = _classify(pattern, q_lo, q_hi, kv_lo, kv_hi)
        if side == 1:
            state = _evaluate(pattern, state, sure, q_lo, q_hi, kv_lo, kv_hi)
        # Keys past the end do not exist: the block that holds them needs the element rule.
        inside = (state == FULL) & (kv_lo + side * block_kv <= kv_len)
        add(full, rows[inside] * side, cols[inside] * side, np.full(inside.sum(), side))
        rest = (state != EMPTY) & ~inside
        if side == 1:
            add(partial, rows[rest], cols[rest])
        else:
            stack.append((side // 2, *_quarters(rows[rest], cols[rest], nq, nk, side // 2)))
    return tuple(
        tuple(np.concatenate(found) for found in zip(*regions, strict=True))
        for regions in (partial, full)
    )


def _quarters(rows, cols, nq, nk, side):
    """The 2 x 2 regions of `side` blocks in each region that begin inside the grid."""
    offset_r, offset_c = np.mgrid[0:2, 0:2].reshape(2, -1)
    r = (rows[:, None] * 2 + offset_r).ravel()
    c = (cols[:, None] * 2 + offset_c).ravel()
    inside = (r * side < nq) & (c * side < nk)
    return r[inside], c[inside]


def _classify(pattern, q_lo, q_hi, kv_lo, kv_hi):
    """Block states and whether each is certain (a loose PARTIAL is not)."""
    match pattern:
        case base.And(a=a, b=b):
            (sa, ca), (sb, cb) = (
                _classify(p, q_lo, q_hi, kv_lo, kv_hi) for p in (a, b)
            )  # fmt: skip
            state = np.minimum(sa, sb)
            # PARTIAL & FULL is as PARTIAL as its part; PARTIAL & PARTIAL may share no element.
            sure = (state != PARTIAL) | ((sa == FULL) & cb) | ((sb == FULL) & ca)
        case base.Or(a=a, b=b):
            (sa, ca), (sb, cb) = (
                _classify(p, q_lo, q_hi, kv_lo, kv_hi) for p in (a, b)
            )  # fmt: skip
            state = np.maximum(sa, sb)
            sure = (state != PARTIAL) | ((sa == EMPTY) & cb) | ((sb == EMPTY) & ca)
        case base.Not(a=a):
            state, sure = _classify(a, q_lo, q_hi, kv_lo, kv_hi)
            state = FULL - state
        case _:
            state = pattern.block_state(q_lo, q_hi, kv_lo, kv_hi)
            state = np.broadcast_to(state, q_lo.shape).astype(np.int8)
            sure = (state != PARTIAL) | pattern.block_state_exact
    return state, sure


def _evaluate(pattern, state, sure, q_lo, q_hi, kv_lo, kv_hi):
    """Exact states of the blocks that are not sure, by evaluating their elements in chunks."""
    exact = state.copy()
    (unsure,) = np.nonzero(~sure)
    if not len(unsure):
        return exact
    span_q, span_kv = int((q_hi - q_lo).max()), int((kv_hi - kv_lo).max())
    step = max(1, _CHUNK // (span_q * span_kv))
    for i in range(0, len(unsure), step):
        at = unsure[i : i + step]
        q_pos = (q_lo[at, None] + np.arange(span_q))[:, :, None]
        kv_pos = (kv_lo[at, None] + np.arange(span_kv))[:, None, :]
        exists = (q_pos < q_hi[at, None, None]) & (kv_pos < kv_hi[at, None, None])
        visible = pattern.mask_fn(q_pos.astype(np.int32), kv_pos.astype(np.int32))
        some, every = (visible & exists).any((1, 2)), (visible | ~exists).all((1, 2))
        exact[at] = np.where(every, FULL, np.where(some, PARTIAL, EMPTY))
    return exact
