"""Triton kernels over entries by block: forward, the whole backward pass, and their sums.

A program keeps the keys of one block and fetches tile after tile of the queries that list it. A
row of a tile is one head of one entry (a query and one of its blocks; entry `t * n + i` is place i
in the list of query t), and the heads that share the list lie side by side, in memory as in the
tile. What belongs to an entry is written to its own place, `[B, T, n, N, ..]`, so nothing is
scattered afterwards; what belongs to a block is summed by the program, and the sums of programs
are added in order. Nothing is added atomically: results repeat bit by bit.

Arrays lie as the caller's: q, dout `[B, T, N, H]`, k, v `[B, S, K, H]`, `lse` and `delta`
`[B, T, N]`. Logits are kept in base 2.
"""

import typing

import triton
import triton.language as tl

from sparse_attn.ops.block_sparse import triton_kernels as tiles_lib

# `tl.constexpr` is a mark for Triton, no type: run-time type checks leave the kernels alone.


@triton.jit
@typing.no_type_check
def _rows(entries, tile, total, TILE: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr):
    """Of each row of a tile: its entry, its head among those of the list, whether there is one."""
    row = tl.arange(0, TILE * PADDED)
    entry = tl.load(entries + tile * TILE + row // PADDED)
    head = row % PADDED
    return entry, head, (entry < total) & (head < GROUP)


@triton.jit
@typing.no_type_check
def _keys(
    k, v, at, valid, KV_HEADS: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, HP: tl.constexpr,
    HVP: tl.constexpr,
):  # fmt: skip
    """Keys and values at tokens `at`, with NaN and inf as 0; and which tokens held one."""
    row = at.to(tl.int64) * KV_HEADS
    key, bad_k = tiles_lib._finite(tiles_lib._load_rows(k, row, valid, H, H, HP))
    value, bad_v = tiles_lib._finite(tiles_lib._load_rows(v, row, valid, HV, HV, HVP))
    return key, value, bad_k | bad_v


@triton.jit
@typing.no_type_check
def _poisoned(key, bad):
    """Keys whose products are NaN where `bad`: whoever sees such a token is spoiled, no other."""
    return tl.where(bad[:, None], float("nan"), key).to(key.dtype)


@triton.jit
@typing.no_type_check
def _visible(q_at, kv_at, kv_valid, id_q, id_kv, RULE: tl.constexpr, IDS: tl.constexpr):
    """Which pairs may attend: all arguments broadcast, so it serves tiles and transposed tiles."""
    visible = RULE(q_at, kv_at, 0) & kv_valid
    if IDS:
        visible = visible & (id_q == id_kv) & (id_q != 0)
    return visible


@triton.jit
@typing.no_type_check
def _softmax_step(
    acc, total, top, query, key, value, visible, SCALE: tl.constexpr, MASKED: tl.constexpr
):
    """Online softmax over one more tile of keys; all are visible unless MASKED."""
    LOG2E: tl.constexpr = 1.4426950408889634
    # The maximum of products is scaled once per row, not once per element, if that is one.
    FACTOR: tl.constexpr = SCALE * LOG2E if SCALE > 0 else 1.0
    x = tl.dot(query, tl.trans(key), input_precision="ieee")
    if SCALE <= 0:
        x *= SCALE * LOG2E
    if MASKED:
        x = tl.where(visible, x, float("-inf"))
    new_top = tl.maximum(top, tl.max(x, 1) * FACTOR)
    # A row that has seen nothing yet: -inf - -inf would be nan.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(tl.fma(x, FACTOR, -shift[:, None]))
    keep = tl.exp2(top - shift)
    total = total * keep + tl.sum(p, 1)
    acc = tl.dot(p.to(value.dtype), value, acc * keep[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit
@typing.no_type_check
def _masked_until(entries, first, count, block, kv_len, BLOCK: tl.constexpr, TILE: tl.constexpr,
                  PLACES: tl.constexpr):  # fmt: skip
    """The first tile whose queries, under a causal pattern, see all of the block.

    Entries of a block lie in the order of their queries, so the first one of a tile tells.
    """
    until = first
    last = (block + 1) * BLOCK - 1
    looking = until < first + count
    while looking:
        # Nothing of a block over the end of the keys is seen whole.
        early = tl.load(entries + until * TILE) // PLACES < last
        early = early | (last >= kv_len)
        until += early.to(tl.int32)
        looking = early & (until < first + count)
    return until


@triton.jit
@typing.no_type_check
def _store_entries(
    out, lse, acc, total, top, entry, head, valid, HEADS: tl.constexpr, HV: tl.constexpr,
    HVP: tl.constexpr,
):  # fmt: skip
    """Writes outputs and natural lse of a tile to the places of its entries."""
    LOG2E: tl.constexpr = 1.4426950408889634
    safe = tl.where(total == 0.0, 1.0, total)
    row = entry.to(tl.int64) * HEADS + head
    # A division per row: one per number would cost more than the exponentials.
    tiles_lib._store_rows(out, acc * (1.0 / safe)[:, None], row, valid, HV, HV, HVP)
    tl.store(lse + row, (top + tl.log2(safe)) / LOG2E, mask=valid)


@triton.jit
@typing.no_type_check
def _forward_tile(
    tile, q, q_ids, entries, out, lse, key, value, id_kv, kv_at, kv_valid, total_entries,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PLACES: tl.constexpr, H: tl.constexpr,
    HV: tl.constexpr, HP: tl.constexpr, HVP: tl.constexpr, TILE: tl.constexpr,
    PADDED: tl.constexpr, SCALE: tl.constexpr, RULE: tl.constexpr, IDS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Outputs of a tile of entries that need the keys given and no others; see `_softmax_step`."""
    ROWS: tl.constexpr = TILE * PADDED
    entry, head, valid = _rows(entries, tile, total_entries, TILE, GROUP, PADDED)
    token = entry // PLACES
    query = tiles_lib._load_rows(q, token.to(tl.int64) * HEADS + head, valid, H, H, HP)
    acc = tl.zeros([ROWS, HVP], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    visible = kv_valid[None, :]
    if MASKED:
        id_q = tl.load(q_ids + token, mask=valid, other=0) if IDS else token
        visible = _visible(
            token[:, None], kv_at[None, :], visible, id_q[:, None], id_kv[None, :], RULE, IDS
        )
    acc, total, top = _softmax_step(acc, total, top, query, key, value, visible, SCALE, MASKED)
    _store_entries(out, lse, acc, total, top, entry, head, valid, HEADS, HV, HVP)


@triton.jit
@typing.no_type_check
def forward_kernel(
    q, k, v, q_ids, kv_ids, work, entries, q_len, kv_len, num_segments, num_entries, out, lse,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TABLES: tl.constexpr, PLACES: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, HP: tl.constexpr, HVP: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr, SCALE: tl.constexpr,
    RULE: tl.constexpr, IDS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Each entry's own output and natural lse, `[B, T, n, N, Hv]` and `[B, T, n, N]`.

    CAUSAL: nothing but causality hides keys, and a program holds all KEYS = BLOCK of its block.
    """
    SUB: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    GROUP: tl.constexpr = HEADS // TABLES
    ROWS: tl.constexpr = TILE * PADDED
    program = tl.program_id(0).to(tl.int64)
    work += program * 3
    block, first, count = tl.load(work), tl.load(work + 1), tl.load(work + 2)
    table = program // num_segments  # Of all batch entries.
    batch = table // TABLES
    kv_head = table % TABLES // (TABLES // KV_HEADS)
    head_row = table % TABLES * GROUP
    q += (batch * q_len * HEADS + head_row) * H
    out += (batch * q_len * PLACES * HEADS + head_row) * HV
    lse += batch * q_len * PLACES * HEADS + head_row
    k += (batch * kv_len * KV_HEADS + kv_head) * H
    v += (batch * kv_len * KV_HEADS + kv_head) * HV
    entries += table * num_entries
    q_ids += batch * q_len
    kv_ids += batch * kv_len
    total_entries = q_len * PLACES
    n = tl.arange(0, KEYS)
    start = block * BLOCK
    if SUB == 1:
        kv_valid = (start + n < kv_len) & (n < BLOCK)
        key, value, bad = _keys(k, v, start + n, kv_valid, KV_HEADS, H, HV, HP, HVP)
        key = _poisoned(key, bad)
        id_kv = tl.load(kv_ids + start + n, mask=kv_valid, other=0) if IDS else n
    until = first + count
    if CAUSAL:
        until = _masked_until(entries, first, count, block, kv_len, BLOCK, TILE, PLACES)
    # A program that holds the whole block has no inner loop, so that the outer is pipelined.
    if SUB == 1:
        for tile in range(first, until):
            _forward_tile(
                tile, q, q_ids, entries, out, lse, key, value, id_kv, start + n, kv_valid,
                total_entries, HEADS, GROUP, PLACES, H, HV, HP, HVP, TILE, PADDED, SCALE, RULE,
                IDS, True,
            )  # fmt: skip
        if CAUSAL:
            for tile in range(until, first + count):
                _forward_tile(
                    tile, q, q_ids, entries, out, lse, key, value, id_kv, start + n, kv_valid,
                    total_entries, HEADS, GROUP, PLACES, H, HV, HP, HVP, TILE, PADDED, SCALE, RULE,
                    IDS, False,
                )  # fmt: skip
    else:
        for tile in range(first, until):
            entry, head, valid = _rows(entries, tile, total_entries, TILE, GROUP, PADDED)
            token = entry // PLACES
            query = tiles_lib._load_rows(q, token.to(tl.int64) * HEADS + head, valid, H, H, HP)
            id_q = tl.load(q_ids + token, mask=valid, other=0) if IDS else token
            acc = tl.zeros([ROWS, HVP], tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            top = tl.full([ROWS], float("-inf"), tl.float32)
            for sub in range(SUB):
                kv_in = sub * KEYS + n
                at = start + kv_in
                inside = (at < kv_len) & (kv_in < BLOCK)
                part_k, part_v, bad = _keys(k, v, at, inside, KV_HEADS, H, HV, HP, HVP)
                part_k = _poisoned(part_k, bad)
                ids = tl.load(kv_ids + at, mask=inside, other=0) if IDS else n
                visible = _visible(
                    token[:, None], at[None, :], inside[None, :], id_q[:, None], ids[None, :],
                    RULE, IDS,
                )  # fmt: skip
                acc, total, top = _softmax_step(
                    acc, total, top, query, part_k, part_v, visible, SCALE, True
                )
            _store_entries(out, lse, acc, total, top, entry, head, valid, HEADS, HV, HVP)


@triton.jit
@typing.no_type_check
def _backward_tile(
    tile, q, dout, lse, delta, q_ids, entries, dq, key, value, id_kv, kv_at, kv_valid, sum_k, sum_v,
    total_entries, HEADS: tl.constexpr, GROUP: tl.constexpr, PLACES: tl.constexpr, H: tl.constexpr,
    HV: tl.constexpr, HP: tl.constexpr, HVP: tl.constexpr, TILE: tl.constexpr,
    PADDED: tl.constexpr, SCALE: tl.constexpr, RULE: tl.constexpr, IDS: tl.constexpr,
    FLIPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Writes dq of a tile of entries, adds its share of dk and dv; all is visible unless MASKED.

    FLIPPED: the product that makes dq has dimensions as rows and queries as columns.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    entry, head, valid = _rows(entries, tile, total_entries, TILE, GROUP, PADDED)
    token = entry // PLACES
    row = token.to(tl.int64) * HEADS + head
    query = tiles_lib._load_rows(q, row, valid, H, H, HP)
    row_lse = tl.load(lse + row, mask=valid, other=float("inf"))[None, :]
    row_delta = tl.load(delta + row, mask=valid, other=0.0)[None, :]
    # Transposed, so that dk and dv take p and ds as they lie in registers.
    s = tl.dot(key, tl.trans(query), input_precision="ieee")
    p = tl.exp2(s * (SCALE * LOG2E) - row_lse)
    if MASKED:
        id_q = tl.load(q_ids + token, mask=valid, other=0) if IDS else token
        visible = _visible(
            token[None, :], kv_at[:, None], kv_valid[:, None], id_q[None, :], id_kv[:, None],
            RULE, IDS,
        )  # fmt: skip
        p = tl.where(visible, p, 0.0)
    grad = tiles_lib._load_rows(dout, row, valid, HV, HV, HVP)
    sum_v = tl.dot(p.to(grad.dtype), grad, sum_v, input_precision="ieee")
    dp = tl.dot(value, tl.trans(grad), input_precision="ieee")
    # Where p is 0, delta may be nan; and asking p keeps fewer registers than `visible`.
    ds = tl.where(p == 0.0, 0.0, p * (dp - row_delta)).to(query.dtype)
    sum_k = tl.dot(ds, query, sum_k, input_precision="ieee")
    if FLIPPED:
        grad_q = tl.dot(tl.trans(key), ds, input_precision="ieee") * SCALE
        grad_q = tl.trans(grad_q.to(query.dtype))
    else:
        grad_q = tl.dot(tl.trans(ds), key, input_precision="ieee") * SCALE
    at = entry.to(tl.int64) * HEADS + head
    tiles_lib._store_rows(dq, grad_q, at, valid, H, H, HP)
    return sum_k, sum_v


@triton.jit
@typing.no_type_check
def backward_kernel(
    q, k, v, dout, lse, delta, q_ids, kv_ids, work, entries, q_len, kv_len, num_segments,
    num_entries, dq, dk, dv,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TABLES: tl.constexpr, PLACES: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, HP: tl.constexpr, HVP: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr, SCALE: tl.constexpr,
    RULE: tl.constexpr, IDS: tl.constexpr, CAUSAL: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """Each entry's own `dq [B, T, n, N, H]`, each segment's `dk`, `dv [B, U, segments, block, H]`.

    `lse` is in base 2, inf for empty rows; `dk` lacks the factor SCALE.
    """
    GROUP: tl.constexpr = HEADS // TABLES
    program = tl.program_id(0).to(tl.int64)
    work += program * 3
    block, first, count = tl.load(work), tl.load(work + 1), tl.load(work + 2)
    table = program // num_segments  # Of all batch entries.
    batch = table // TABLES
    kv_head = table % TABLES // (TABLES // KV_HEADS)
    head_row = table % TABLES * GROUP
    rows = batch * q_len * HEADS + head_row
    q += rows * H
    dout += rows * HV
    lse += rows
    delta += rows
    dq += (batch * q_len * PLACES * HEADS + head_row) * H
    k += (batch * kv_len * KV_HEADS + kv_head) * H
    v += (batch * kv_len * KV_HEADS + kv_head) * HV
    entries += table * num_entries
    total_entries = q_len * PLACES
    n = tl.arange(0, KEYS)
    kv_at = block * BLOCK + n
    kv_valid = (kv_at < kv_len) & (n < BLOCK)
    q_ids += batch * q_len
    id_kv = tl.load(kv_ids + batch * kv_len + kv_at, mask=kv_valid, other=0) if IDS else n
    # Who sees a NaN here has one in its lse.
    key, value, _ = _keys(k, v, kv_at, kv_valid, KV_HEADS, H, HV, HP, HVP)
    sum_k = tl.zeros([KEYS, HP], tl.float32)
    sum_v = tl.zeros([KEYS, HVP], tl.float32)
    until = first + count
    if CAUSAL:
        until = _masked_until(entries, first, count, block, kv_len, BLOCK, TILE, PLACES)
    for tile in range(first, until):
        sum_k, sum_v = _backward_tile(
            tile, q, dout, lse, delta, q_ids, entries, dq, key, value, id_kv, kv_at, kv_valid,
            sum_k, sum_v, total_entries, HEADS, GROUP, PLACES, H, HV, HP, HVP, TILE, PADDED, SCALE,
            RULE, IDS, FLIPPED, True,
        )  # fmt: skip
    if CAUSAL:
        for tile in range(until, first + count):
            sum_k, sum_v = _backward_tile(
                tile, q, dout, lse, delta, q_ids, entries, dq, key, value, id_kv, kv_at, kv_valid,
                sum_k, sum_v, total_entries, HEADS, GROUP, PLACES, H, HV, HP, HVP, TILE, PADDED,
                SCALE, RULE, IDS, FLIPPED, False,
            )  # fmt: skip
    stored = n < tl.where(count > 0, BLOCK, 0)
    tiles_lib._store_rows(dk + program * (BLOCK * H), sum_k, n, stored, H, H, HP)
    tiles_lib._store_rows(dv + program * (BLOCK * HV), sum_v, n, stored, HV, HV, HVP)


@triton.jit
@typing.no_type_check
def sum_kernel(
    x, starts, counts, kv_len, num_segments, num_blocks, out,
    KV_HEADS: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    PIECE: tl.constexpr, SEGMENTS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Adds the segments `x [B, U, segments, block, H]` of a block, to `[B, S, K, H]` float32.

    A program has PIECE numbers of one block, and loads SEGMENTS segments at a time.
    """
    PIECES: tl.constexpr = (BLOCK * WIDTH + PIECE - 1) // PIECE
    program = tl.program_id(0)
    block = program // PIECES % num_blocks
    head = program // PIECES // num_blocks  # Of all batch entries.
    at = program % PIECES * PIECE + tl.arange(0, PIECE)
    inside = at < BLOCK * WIDTH
    i = tl.arange(0, SEGMENTS)
    total = tl.zeros([PIECE], tl.float32)
    for shared in range(SHARED):
        table = head * SHARED + shared
        start = tl.load(starts + table * num_blocks + block)
        count = tl.load(counts + table * num_blocks + block)
        for j in range(0, count, SEGMENTS):
            segment = table.to(tl.int64) * num_segments + start + j + i
            mask = (j + i < count)[:, None] & inside[None, :]
            found = x + segment[:, None] * (BLOCK * WIDTH) + at[None, :]
            total += tl.sum(tl.load(found, mask=mask, other=0.0), 0)
    row = block * BLOCK + at // WIDTH
    to = ((head // KV_HEADS).to(tl.int64) * kv_len + row) * KV_HEADS + head % KV_HEADS
    tl.store(out + to * WIDTH + at % WIDTH, total * FACTOR, mask=inside & (row < kv_len))


@triton.jit
@typing.no_type_check
def merge_kernel(
    x, lses, selected, before, before_lse, num_rows, out, lse,
    HEADS: tl.constexpr, TABLES: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, SOFTMAX: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """Adds the places of `x [B, T, n, N, H]` that list a block, to `[B, T, N, H]`.

    With SOFTMAX `x` are outputs, weighted by their `lses [B, T, n, N]`, and the result has an lse.
    BEFORE are the results `[B, T, N, H]` and `[B, T, N]` of places that have been added already.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # A head of a query.
    inside = row < num_rows
    token, head = row // HEADS, row % HEADS
    selected += (token * TABLES + head // (HEADS // TABLES)) * PLACES
    first = token * PLACES * HEADS + head
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    shift = total
    if BEFORE:
        acc = tiles_lib._load_rows(before, row, inside, WIDTH, WIDTH, PADDED)
    if SOFTMAX:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        if BEFORE:
            top = tl.load(before_lse + row, mask=inside, other=float("-inf"))
        last = top
        for i in range(PLACES):
            listed = inside & (tl.load(selected + i, mask=inside, other=-1) >= 0)
            found = tl.load(lses + first + i * HEADS, mask=listed, other=float("-inf"))
            top = tl.maximum(top, found)
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = tl.exp(last - shift)
        acc *= total[:, None]
    for i in range(PLACES):
        listed = inside & (tl.load(selected + i, mask=inside, other=-1) >= 0)
        piece = tiles_lib._load_rows(x, first + i * HEADS, listed, WIDTH, WIDTH, PADDED)
        piece = piece.to(tl.float32)
        if SOFTMAX:
            found = tl.load(lses + first + i * HEADS, mask=listed, other=float("-inf"))
            weight = tl.exp(found - shift)
            total += weight
            piece *= weight[:, None]
        acc += piece
    if SOFTMAX:
        safe = tl.where(total == 0.0, 1.0, total)
        acc /= safe[:, None]
        found = tl.where(total == 0.0, float("-inf"), shift + tl.log(safe))
        tl.store(lse + row, found, mask=inside)
    tiles_lib._store_rows(out, acc, row, inside, WIDTH, WIDTH, PADDED)
