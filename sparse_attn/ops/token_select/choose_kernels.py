"""Triton kernels that choose blocks: the largest of rows, NSA's scores, the gate of MoBA; and one
that takes repeated blocks out of lists.

Chosen are the largest of a row one after the other, in registers: numbers are read once, however
many are taken. As integers that sort like the floats, a warp compares them in one instruction.

Arrays lie as the caller's: q `[B, T, N, H]`, keys and means `[B, n, K, H]`, lse `[B, T, N]`, ids
and starts `[B, T]`. Programs work on the `chunk` queries from `*start` on, a number in memory, so
that a loop over chunks is one program. Absent arrays are a dummy that is never read.
"""

import typing

import triton
import triton.language as tl

# `tl.constexpr` is a mark for Triton, no type: run-time type checks leave the kernels alone.


@triton.jit
@typing.no_type_check
def _sortable(x):
    """Floats without NaN as integers in the same order; equal floats, 0 and -0 too, stay equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 = 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
@typing.no_type_check
def _ranked(scores, candidate, forced):
    """Scores as integers: candidates above all others, those that are forced above all of them."""
    LEAST: tl.constexpr = -3.4028234663852886e38
    finite = tl.where(scores == scores, tl.minimum(tl.maximum(scores, LEAST), -LEAST), LEAST)
    x = tl.where(forced, float("inf"), finite)
    return _sortable(tl.where(candidate, x, float("-inf")))


@triton.jit
@typing.no_type_check
def _take(x, out, valid, COUNT: tl.constexpr):
    """Writes the places of the COUNT largest of each row, of equals the first; -1 for -inf.

    Neighbours are put in order first: then a pass looks at the larger ones, half of all.
    """
    NOTHING: tl.constexpr = -2139095041  # _sortable(-inf)
    ROWS: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // 2
    first, second = tl.split(tl.reshape(x, [ROWS, PAIRS, 2]))
    place = 2 * tl.arange(0, PAIRS)[None, :] + (second > first).to(tl.int32)
    large, small = tl.maximum(first, second), tl.minimum(first, second)
    for i in range(COUNT):
        top = tl.max(large, 1)
        best = tl.min(tl.where(large == top[:, None], place, 2 * PAIRS), 1)
        tl.store(out + i, tl.where(top == NOTHING, -1, best), mask=valid)
        taken = place == best[:, None]
        large = tl.where(taken, small, large)
        place = tl.where(taken, place ^ 1, place)
        small = tl.where(taken, NOTHING, small)


@triton.jit
@typing.no_type_check
def _take_keyed(scores, candidate, forced, out, valid, COUNT: tl.constexpr, FORCED: tl.constexpr):
    """As `_take` of `_ranked`, for few numbers a row: they and their places are one integer.

    The lowest bits of a score make room for its place, of equals the first: it counts with 15 bits
    after the first for 256 numbers, 14 for 512, where queries and keys in half precision have 7 or
    10. A pass then costs half, as it carries no places.
    """
    LEAST: tl.constexpr = -3.4028234663852886e38
    NOTHING: tl.constexpr = -2147483648
    ROWS: tl.constexpr = scores.shape[0]
    WIDTH: tl.constexpr = scores.shape[1]
    # Of NaN and a number, `maximum` is the number.
    x = _sortable(tl.minimum(tl.maximum(scores, LEAST), -LEAST))
    if FORCED:
        x = tl.where(forced, 0x7F800000, x)  # _sortable(inf)
    x = (x & -WIDTH) | (tl.arange(0, WIDTH)[None, :] ^ (WIDTH - 1))
    x = tl.where(candidate, x, NOTHING)
    first, second = tl.split(tl.reshape(x, [ROWS, WIDTH // 2, 2]))
    large, small = tl.maximum(first, second), tl.minimum(first, second)
    for i in range(COUNT):
        top = tl.max(large, 1)
        place = (top & (WIDTH - 1)) ^ (WIDTH - 1)
        tl.store(out + i, tl.where(top == NOTHING, -1, place), mask=valid)
        taken = large == top[:, None]
        large = tl.where(taken, small, large)
        small = tl.where(taken, NOTHING, small)


@triton.jit
@typing.no_type_check
def largest_kernel(
    key, rows, width, out, COUNT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Places of the largest of `key [rows, width]`, which has no NaN: `[rows, COUNT]`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (at < width)[None, :]
    x = tl.load(key + row[:, None] * width + at[None, :], mask=inside, other=float("-inf"))
    _take(_sortable(x), out + row * COUNT, row < rows, COUNT)


@triton.jit
@typing.no_type_check
def once_kernel(selected, numbers, blocks, out, PLACES: tl.constexpr, SIZE: tl.constexpr):
    """`selected [lists, PLACES]` with -1 for what stands before in its list, or is no block."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < numbers
    place = at % PLACES
    block = tl.load(selected + at, mask=inside, other=-1)
    kept = (block >= 0) & (block < blocks)
    for back in tl.static_range(1, PLACES):
        other = tl.load(selected + at - back, mask=inside & (place >= back), other=-1)
        kept = kept & (other != block)
    tl.store(out + at, tl.where(kept, block, -1), mask=inside)


@triton.jit
@typing.no_type_check
def blocks_kernel(
    parts, starts, start, batch, length, chunk, blocks, out,
    LISTS: tl.constexpr, BLOCK: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    OVERLAPS: tl.constexpr, STARTS: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Places of the best blocks by the `parts` of `scores_kernel`: `[B, chunk, LISTS, COUNT]`.

    A query chooses from the block where its document starts to its own.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    each = chunk * LISTS
    valid = row < batch * each
    entry, within = row // each, row % each
    position = tl.load(start) + within // LISTS
    own, first = position // BLOCK, 0 * position
    if STARTS:
        token = entry * length + tl.minimum(position, length - 1)
        first = tl.load(starts + token, mask=valid, other=0) // BLOCK
    at = tl.arange(0, WIDTH)
    candidate = (first[:, None] <= at[None, :]) & (at[None, :] <= own[:, None])
    candidate = candidate & (valid[:, None] & (at < blocks)[None, :])
    forced = (at[None, :] < first[:, None] + INITIAL) | (at[None, :] > own[:, None] - LOCAL)
    scores = tl.zeros([ROWS, WIDTH], tl.float32)
    for reach in tl.static_range(OVERLAPS):
        part = ((entry * OVERLAPS + reach).to(tl.int64) * each + within) * blocks - reach
        there = candidate & (at >= reach)[None, :]
        scores += tl.load(parts + part[:, None] + at[None, :], mask=there, other=0.0)
    _take(_ranked(scores, candidate, forced), out + row.to(tl.int64) * COUNT, valid, COUNT)


@triton.jit
@typing.no_type_check
def scores_kernel(
    q, keys, lse, ids, starts, key_ids, start, length, chunk, num_keys, blocks, out,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, OVERLAPS: tl.constexpr, SCALE: tl.constexpr,
    IDS: tl.constexpr,
):  # fmt: skip
    """Weights of compressed keys, summed over heads and blocks: `[B, OVERLAPS, chunk, K, blocks]`.

    [arXiv:2502.11089, eq. 8 to 10] Part r of block j is what the keys that begin in it give to
    block j + r. Parts are written from the document's first block to the query's own.

    Keys are the rows of the product and (head, query) its columns, the heads GROUP (padded): in the
    layout of the matrix units a thread then has all heads of a query, and adds them by itself.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    PER: tl.constexpr = BLOCK // STRIDE
    COLUMNS: tl.constexpr = GROUP * QUERIES
    HELD: tl.constexpr = KEYS // PER  # blocks of a tile of keys
    tiles = (chunk + QUERIES - 1) // QUERIES
    kv_head, tile = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    batch = (tile // tiles).to(tl.int64)
    # Late queries see the most keys: they start first, so that none is left for the end.
    first = (tiles - 1 - tile % tiles) * QUERIES
    first_position = tl.load(start) + first
    column = tl.arange(0, COLUMNS)
    head, column_at = column // QUERIES, first_position + column % QUERIES
    real = (head < HEADS // KV_HEADS) & (column_at < length)
    row = (batch * length + column_at) * HEADS + kv_head * (HEADS // KV_HEADS) + head
    dim = tl.arange(0, HP)
    query = tl.load(
        q + row[:, None] * H + dim[None, :], mask=real[:, None] & (dim < H)[None, :], other=0.0
    )
    # exp2(0 - inf) = 0 where there is no query.
    shift = tl.load(lse + row, mask=real, other=float("inf")) * LOG2E
    within = first + tl.arange(0, QUERIES)
    position = first_position + tl.arange(0, QUERIES)
    last = (tl.minimum(first_position + QUERIES, length) - 1) // BLOCK
    begin = 0
    if IDS:
        token = batch * length + position
        query_id = tl.load(ids + token, mask=position < length, other=-1)
        origin = tl.min(tl.load(starts + token, mask=position < length, other=length), 0)
        begin = tl.maximum(origin // BLOCK - (OVERLAPS - 1), 0) * PER // KEYS * KEYS
        key_ids += batch * num_keys
    keys += (batch * num_keys * KV_HEADS + kv_head) * H
    out += ((batch * OVERLAPS * chunk + within) * KV_HEADS + kv_head) * blocks
    n = tl.arange(0, KEYS)
    for key_start in range(begin, (last + 1) * PER, KEYS):
        at = key_start + n
        inside = at < num_keys
        there = inside[:, None] & (dim < H)[None, :]
        key = tl.load(keys + at[:, None] * (KV_HEADS * H) + dim[None, :], mask=there, other=0.0)
        s = tl.dot(key, tl.trans(query), input_precision="ieee")
        p = tl.exp2(tl.fma(s, SCALE * LOG2E, -shift[None, :]))
        p = tl.sum(tl.reshape(p, [KEYS, GROUP, QUERIES]), 1)
        visible = inside[:, None] & ((at * STRIDE + (SIZE - 1))[:, None] <= position[None, :])
        if IDS:
            key_id = tl.load(key_ids + at, mask=inside, other=-2)
            visible = visible & (key_id[:, None] == query_id[None, :])
        p = tl.where(visible, p, 0.0)
        block = key_start // PER + tl.arange(0, HELD)
        stored = (block < blocks)[:, None] & (within < chunk)[None, :]
        for reach in tl.static_range(OVERLAPS):
            # Strides that a key shares with the block, `reach` blocks after the one it begins in.
            low = tl.maximum(n % PER, reach * PER)
            strides = tl.minimum(n % PER + SIZE // STRIDE, (reach + 1) * PER) - low
            # 0 * nan is nan.
            x = tl.where((strides > 0)[:, None], p * strides.to(tl.float32)[:, None], 0.0)
            x = tl.sum(tl.reshape(x, [HELD, PER, QUERIES]), 1)
            part = out + reach * chunk * KV_HEADS * blocks
            tl.store(part[None, :] + block[:, None], x, mask=stored)


@triton.jit
@typing.no_type_check
def gate_kernel(
    q, means, ids, low, high, start, length, chunk, blocks, num_means, out,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    BLOCK: tl.constexpr, IDS: tl.constexpr, COUNT: tl.constexpr, QUERIES: tl.constexpr,
    TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The own block and those before it with the best `q . mean`: `[B, chunk, N, COUNT]`.

    [arXiv:2502.13189, eq. 5 to 7] With ids only blocks whose range of ids holds the query's. A
    program keeps the means of a head for TILES tiles of queries, one after the other.
    """
    tiles = (chunk + QUERIES - 1) // QUERIES
    programs = (tiles + TILES - 1) // TILES
    head, program = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    batch = (program // programs).to(tl.int64)
    first = program % programs * TILES
    dim, at = tl.arange(0, HP), tl.arange(0, WIDTH)
    mean_row = (batch * num_means + at) * KV_HEADS + head // (HEADS // KV_HEADS)
    there = (at < blocks)[:, None] & (dim < H)[None, :]
    mean = tl.load(means + mean_row[:, None] * H + dim[None, :], mask=there, other=0.0)
    if IDS:
        block = batch * num_means + at
        least = tl.load(low + block, mask=at < blocks, other=0)[None, :]
        most = tl.load(high + block, mask=at < blocks, other=0)[None, :]
    begin = tl.load(start)
    for tile in range(first, tl.minimum(first + TILES, tiles)):
        within = tile * QUERIES + tl.arange(0, QUERIES)
        position = begin + within
        real = (within < chunk) & (position < length)
        row = (batch * length + position) * HEADS + head
        query = tl.load(
            q + row[:, None] * H + dim[None, :], mask=real[:, None] & (dim < H)[None, :], other=0.0
        )
        scores = tl.dot(query, tl.trans(mean), input_precision="ieee")
        own = position // BLOCK
        to = out + ((batch * chunk + within) * HEADS + head) * COUNT
        if IDS:
            candidate = (at[None, :] <= own[:, None]) & (at < blocks)[None, :]
            mine = tl.load(ids + batch * length + position, mask=real, other=0)[:, None]
            candidate = candidate & (least <= mine) & (mine <= most)
            forced = at[None, :] == own[:, None]
            _take_keyed(scores, candidate, forced, to, within < chunk, COUNT, True)
        else:
            # It needs no pass: it is in every list.
            tl.store(to, own, mask=within < chunk)
            before = at[None, :] < own[:, None]
            _take_keyed(scores, before, before, to + 1, within < chunk, COUNT - 1, False)
