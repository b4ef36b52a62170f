"""Triton kernels over block lists: forward, and backward in one launch of dq and of dk with dv.

FlashAttention-2 [arXiv:2307.08691, alg. 1 and 2]: a program owns one tile of query rows (forward,
dq) or of key columns (dk, dv), and walks its list twice: the PARTIAL blocks with the element rule,
then the FULL ones without any mask. dk and dv loop over the query heads of their KV head, so
nothing is added atomically and results repeat bit by bit.

Arrays lie as the caller's: q, out, dout `[B, T, N, H]`, k, v `[B, S, K, H]`; `lse` and `delta` of
the backward pass are float32 `[B, N, T]`. Absent arrays are a dummy that is never read. Logits are
kept in base 2.
"""

import typing

import triton
import triton.language as tl

# `tl.constexpr` is a mark for Triton, no type: run-time type checks leave the kernels alone.


@triton.jit
@typing.no_type_check
def _load_rows(pointer, rows, valid, STRIDE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """A tile `[rows, PADDED]` of rows that lie STRIDE apart; 0 outside. `valid` may be None."""
    dim = tl.arange(0, PADDED)
    at = pointer + rows[:, None] * STRIDE + dim[None, :]
    if valid is None and DIM == PADDED:
        tile = tl.load(at)
    elif valid is None:
        tile = tl.load(at, mask=(dim < DIM)[None, :], other=0.0)
    elif DIM == PADDED:
        tile = tl.load(at, mask=valid[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=valid[:, None] & (dim < DIM)[None, :], other=0.0)
    return tile


@triton.jit
@typing.no_type_check
def _store_rows(
    pointer, x, rows, valid, STRIDE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr
):
    dim = tl.arange(0, PADDED)
    at = pointer + rows[:, None] * STRIDE + dim[None, :]
    tl.store(at, x.to(pointer.dtype.element_ty), mask=valid[:, None] & (dim < DIM)[None, :])


@triton.jit
@typing.no_type_check
def _record(programs, at):
    """What one program works on: head, block, list (table) and its start, PARTIAL and all entries.

    One line of memory holds it all, so that a program waits once before it can ask for indices.
    """
    at += programs
    head, block, table = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    start, partial, listed = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
    return head, block, table, start, partial, listed


@triton.jit
@typing.no_type_check
def _visible(
    q_at, kv_at, q_in, kv_in, q_len, kv_len, bias, table, slot, bits,
    q_ids, kv_ids, q_pos, kv_pos,
    RULE: tl.constexpr, BITS: tl.constexpr, IDS: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, PARTIAL: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Which pairs may attend: all arguments broadcast, so it serves tiles and transposed tiles."""
    if not PARTIAL:
        visible = kv_in >= 0
    elif BITS:
        inside = (q_in < BLOCK_Q) & (kv_in < BLOCK_KV)
        bits += tl.maximum(slot, 0).to(tl.int64) * (BLOCK_Q * BLOCK_KV)
        bit = tl.load(bits + q_in * BLOCK_KV + kv_in, mask=inside, other=0)
        # A block without bits was FULL before documents cut it.
        visible = (bit != 0) | (slot < 0)
    elif POSITIONS:
        at_q = tl.load(q_pos + q_at, mask=q_at < q_len, other=0)
        at_kv = tl.load(kv_pos + kv_at, mask=kv_at < kv_len, other=0)
        visible = RULE(at_q, at_kv, table)
    else:
        visible = RULE(q_at, kv_at, table)
    if PARTIAL and IDS:
        id_q = tl.load(q_ids + q_at, mask=q_at < q_len, other=0)
        id_kv = tl.load(kv_ids + kv_at, mask=kv_at < kv_len, other=0)
        visible = visible & (id_q == id_kv) & (id_q != 0)
    if not EVEN:
        visible = visible & (kv_in < BLOCK_KV) & (kv_at < kv_len)
    if BIAS:
        visible = visible & (bias != float("-inf"))
    return visible


@triton.jit
@typing.no_type_check
def _logits(s, bias, SCALE: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr):
    """Base-2 logits of products `s`, and the tanh of the soft cap (or `s`)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    t = s
    if CAP is None:
        x = s * (SCALE * LOG2E)
    else:
        # This exponential never overflows, and the error is absolute: 1e-7 of the cap.
        y = s * (SCALE / CAP)
        e = tl.exp2(tl.abs(y) * (-2.0 * LOG2E))
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(y < 0.0, -t, t)
        x = t * (CAP * LOG2E)
    if BIAS:
        x += bias * LOG2E
    return x, t


@triton.jit
@typing.no_type_check
def _finite(x):
    """`x` with NaN and inf as 0, since 0 * nan is nan; and which rows held one."""
    ok = tl.abs(x.to(tl.float32)) < float("inf")
    return tl.where(ok, x, 0.0).to(x.dtype), tl.min(ok.to(tl.int32), 1) == 0


@triton.jit
@typing.no_type_check
def _forward_blocks(
    acc, total, top, q, k, v, key_bias, q_at, q_in, q_len, kv_len, table, lists, first, last,
    slots, bits, q_ids, kv_ids, q_pos, kv_pos,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    HP: tl.constexpr, HVP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    KEYS: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
    RULE: tl.constexpr, BITS: tl.constexpr, IDS: tl.constexpr, POSITIONS: tl.constexpr,
    EVEN: tl.constexpr, PARTIAL: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Online softmax over entries `first .. last` of a row's list."""
    LOG2E: tl.constexpr = 1.4426950408889634
    SUB: tl.constexpr = (BLOCK_KV + KEYS - 1) // KEYS
    CHECK: tl.constexpr = PARTIAL or BIAS or BLOCK_KV % KEYS != 0
    PLAIN: tl.constexpr = CAP is None and not BIAS and SCALE > 0
    n = tl.arange(0, KEYS)
    block = tl.load(lists + first, mask=first < last, other=0)
    for i in range(first * SUB, last * SUB):
        kv_in = (i % SUB) * KEYS + n
        start = block * BLOCK_KV + (i % SUB) * KEYS
        kv_at = start + n
        valid = (kv_at < kv_len) & (kv_in < BLOCK_KV) if CHECK and not EVEN else None
        key = _load_rows(k + start.to(tl.int64) * K_STRIDE, n, valid, K_STRIDE, H, HP)
        s = tl.dot(q, tl.trans(key), input_precision="ieee")
        value = _load_rows(v + start.to(tl.int64) * V_STRIDE, n, valid, V_STRIDE, HV, HVP)
        bias = None
        if BIAS:
            bias = tl.load(key_bias + kv_at, mask=kv_at < kv_len, other=0.0)[None, :]
        # The maximum of plain products is scaled once per row, not once per element.
        x, _ = (s, s) if PLAIN else _logits(s, bias, SCALE, CAP, BIAS)
        factor: tl.constexpr = SCALE * LOG2E if PLAIN else 1.0
        if CHECK:
            if CLEAN:
                value, bad = _finite(value)
                x = tl.where(bad[None, :], float("nan"), x)
            slot = tl.load(slots + i // SUB) if BITS and PARTIAL else 0
            visible = _visible(
                q_at[:, None], kv_at[None, :], q_in[:, None], kv_in[None, :], q_len, kv_len, bias,
                table, slot, bits, q_ids, kv_ids, q_pos, kv_pos, RULE, BITS, IDS, POSITIONS,
                BLOCK_Q, BLOCK_KV, PARTIAL, BIAS, EVEN,
            )  # fmt: skip
            x = tl.where(visible, x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1) * factor)
        # A row that has seen nothing yet: -inf - -inf would be nan.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top) if CHECK else new_top
        p = tl.exp2(tl.fma(x, factor, -shift[:, None]))
        keep = tl.exp2(top - shift)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(value.dtype), value, acc * keep[:, None], input_precision="ieee")
        top = new_top
        # Loaded one turn ahead, so that the addresses of the next tile never wait for it.
        block = tl.load(lists + (i + 1) // SUB, mask=i + 1 < last * SUB, other=0)
    return acc, total, top


@triton.jit
@typing.no_type_check
def _has_nan(x):
    """Whether a tile holds a NaN or inf, as 0 * inf is nan too."""
    return tl.sum(tl.sum(x * 0.0, 1), 0) != 0.0


@triton.jit
@typing.no_type_check
def forward_kernel(
    q, k, v, key_bias, sinks, q_ids, kv_ids, q_pos, kv_pos, bits, programs, indices, slots,
    q_len, kv_len, num_slots, num_programs, length, out, lse,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    HP: tl.constexpr, HVP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    BIAS: tl.constexpr, SINKS: tl.constexpr, RULE: tl.constexpr, BITS: tl.constexpr,
    IDS: tl.constexpr, POSITIONS: tl.constexpr, NUM_TABLES: tl.constexpr,
    MASK_BATCH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """`out` and natural `lse` of one tile of rows of one head."""
    LOG2E: tl.constexpr = 1.4426950408889634
    SUB: tl.constexpr = (BLOCK_Q + QUERIES - 1) // QUERIES
    program = tl.program_id(0) // SUB
    batch = (program // num_programs).to(tl.int64)
    at = program if MASK_BATCH else program % num_programs
    head, block, table, start, num_partial, num_listed = _record(programs, at.to(tl.int64) * 6)
    kv_head = head // (HEADS // KV_HEADS)
    q_in = tl.program_id(0) % SUB * QUERIES + tl.arange(0, QUERIES)
    q_at = block * BLOCK_Q + q_in
    valid = (q_at < q_len) & (q_in < BLOCK_Q)
    mask = batch * NUM_TABLES + table if MASK_BATCH else table.to(tl.int64)
    lists, slots = indices + mask * length + start, slots + mask * length + start
    bits += mask * num_slots * BLOCK_Q * BLOCK_KV
    # One scalar 64-bit offset per array; the rest fits 32 bits.
    q_row = (batch * q_len + block * BLOCK_Q) * HEADS + head
    query = _load_rows(q + q_row * H, q_in, valid, HEADS * H, H, HP)
    k += (batch * kv_len * KV_HEADS + kv_head) * H
    v += (batch * kv_len * KV_HEADS + kv_head) * HV
    if BIAS:
        key_bias += (batch * BIAS + head % BIAS) * kv_len
    if IDS:
        q_ids += batch * q_len
        kv_ids += batch * kv_len
    if POSITIONS:
        q_pos += batch % POSITIONS * q_len
        kv_pos += batch % POSITIONS * kv_len
    if SINKS:
        first_top = tl.zeros([QUERIES], tl.float32) + tl.load(sinks + head) * LOG2E
        first_total = tl.full([QUERIES], 1.0, tl.float32)
    else:
        first_top = tl.full([QUERIES], float("-inf"), tl.float32)
        first_total = tl.zeros([QUERIES], tl.float32)
    nothing = tl.zeros([QUERIES, HVP], tl.float32)
    # In the lists with hidden keys a nan under the mask spoils the sum, since 0 * nan is nan.
    # That is seen at the end, and only then they are summed again with the nans taken out.
    HIDING: tl.constexpr = 2 if BIAS else 1
    acc, total, top = nothing, first_total, first_top
    for state in tl.static_range(HIDING):
        acc, total, top = _forward_blocks(
            acc, total, top, query, k, v, key_bias, q_at, q_in, q_len, kv_len, table, lists,
            0 if state == 0 else num_partial, num_partial if state == 0 else num_listed, slots,
            bits, q_ids, kv_ids, q_pos, kv_pos, KV_HEADS * H, KV_HEADS * HV, H, HV, HP, HVP,
            BLOCK_Q, BLOCK_KV, KEYS, SCALE, CAP, BIAS > 0, RULE, BITS, IDS, POSITIONS > 0, EVEN,
            state == 0, False,
        )  # fmt: skip
    if _has_nan(acc):
        acc, total, top = nothing, first_total, first_top
        for state in tl.static_range(HIDING):
            acc, total, top = _forward_blocks(
                acc, total, top, query, k, v, key_bias, q_at, q_in, q_len, kv_len, table, lists,
                0 if state == 0 else num_partial, num_partial if state == 0 else num_listed, slots,
                bits, q_ids, kv_ids, q_pos, kv_pos, KV_HEADS * H, KV_HEADS * HV, H, HV, HP, HVP,
                BLOCK_Q, BLOCK_KV, KEYS, SCALE, CAP, BIAS > 0, RULE, BITS, IDS, POSITIONS > 0,
                EVEN, state == 0, True,
            )  # fmt: skip
    if not BIAS:
        acc, total, top = _forward_blocks(
            acc, total, top, query, k, v, key_bias, q_at, q_in, q_len, kv_len, table, lists,
            num_partial, num_listed, slots, bits, q_ids, kv_ids, q_pos, kv_pos, KV_HEADS * H,
            KV_HEADS * HV, H, HV, HP, HVP, BLOCK_Q, BLOCK_KV, KEYS, SCALE, CAP, False, RULE, BITS,
            IDS, POSITIONS > 0, EVEN, False, False,
        )  # fmt: skip
    safe = tl.where(total == 0.0, 1.0, total)
    _store_rows(out + q_row * HV, acc / safe[:, None], q_in, valid, HEADS * HV, HV, HVP)
    tl.store(lse + q_row + q_in * HEADS, (top + tl.log2(safe)) / LOG2E, mask=valid)


@triton.jit
@typing.no_type_check
def _dq_blocks(
    dq, q, dout, lse, delta, k, v, key_bias, q_at, q_in, q_len, kv_len, table, lists, first, last,
    slots, bits, q_ids, kv_ids, q_pos, kv_pos,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    HP: tl.constexpr, HVP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    KEYS: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
    RULE: tl.constexpr, BITS: tl.constexpr, IDS: tl.constexpr, POSITIONS: tl.constexpr,
    EVEN: tl.constexpr, PARTIAL: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Adds `ds @ k` over entries `first .. last` of a row's list."""
    SUB: tl.constexpr = (BLOCK_KV + KEYS - 1) // KEYS
    CHECK: tl.constexpr = PARTIAL or BIAS or BLOCK_KV % KEYS != 0
    n = tl.arange(0, KEYS)
    block = tl.load(lists + first, mask=first < last, other=0)
    for i in range(first * SUB, last * SUB):
        kv_in = (i % SUB) * KEYS + n
        start = block * BLOCK_KV + (i % SUB) * KEYS
        kv_at = start + n
        valid = (kv_at < kv_len) & (kv_in < BLOCK_KV) if CHECK and not EVEN else None
        key = _load_rows(k + start.to(tl.int64) * K_STRIDE, n, valid, K_STRIDE, H, HP)
        s = tl.dot(q, tl.trans(key), input_precision="ieee")
        value = _load_rows(v + start.to(tl.int64) * V_STRIDE, n, valid, V_STRIDE, HV, HVP)
        dp = tl.dot(dout, tl.trans(value), input_precision="ieee")
        bias = None
        if BIAS:
            bias = tl.load(key_bias + kv_at, mask=kv_at < kv_len, other=0.0)[None, :]
        x, t = _logits(s, bias, SCALE, CAP, BIAS)
        ds = tl.exp2(x - lse[:, None]) * (dp - delta[:, None])
        if CAP is not None:
            ds *= 1.0 - t * t
        if CHECK:
            slot = tl.load(slots + i // SUB) if BITS and PARTIAL else 0
            visible = _visible(
                q_at[:, None], kv_at[None, :], q_in[:, None], kv_in[None, :], q_len, kv_len, bias,
                table, slot, bits, q_ids, kv_ids, q_pos, kv_pos, RULE, BITS, IDS, POSITIONS,
                BLOCK_Q, BLOCK_KV, PARTIAL, BIAS, EVEN,
            )  # fmt: skip
            ds = tl.where(visible, ds, 0.0)
            if CLEAN:
                key, _ = _finite(key)
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision="ieee")
        block = tl.load(lists + (i + 1) // SUB, mask=i + 1 < last * SUB, other=0)
    return dq


@triton.jit
@typing.no_type_check
def _dq_tile(
    tile, q, k, v, dout, lse, delta, key_bias, q_ids, kv_ids, q_pos, kv_pos,
    programs, indices, slots, bits, q_len, kv_len, num_programs, length, num_slots, dq_out,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    HP: tl.constexpr, HVP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    BIAS: tl.constexpr, RULE: tl.constexpr, BITS: tl.constexpr, IDS: tl.constexpr,
    POSITIONS: tl.constexpr, NUM_TABLES: tl.constexpr, MASK_BATCH: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """`dq` of one tile of rows of one head."""
    SUB: tl.constexpr = (BLOCK_Q + QUERIES - 1) // QUERIES
    program = tile // SUB
    batch = (program // num_programs).to(tl.int64)
    at = program if MASK_BATCH else program % num_programs
    head, block, table, start, num_partial, num_listed = _record(programs, at.to(tl.int64) * 6)
    kv_head = head // (HEADS // KV_HEADS)
    q_in = tile % SUB * QUERIES + tl.arange(0, QUERIES)
    q_at = block * BLOCK_Q + q_in
    valid = (q_at < q_len) & (q_in < BLOCK_Q)
    mask = batch * NUM_TABLES + table if MASK_BATCH else table.to(tl.int64)
    lists, slots = indices + mask * length + start, slots + mask * length + start
    bits += mask * num_slots * BLOCK_Q * BLOCK_KV
    q_row = (batch * q_len + block * BLOCK_Q) * HEADS + head
    query = _load_rows(q + q_row * H, q_in, valid, HEADS * H, H, HP)
    grad = _load_rows(dout + q_row * HV, q_in, valid, HEADS * HV, HV, HVP)
    statistics = (batch * HEADS + head) * q_len + q_at
    row_lse = tl.load(lse + statistics, mask=valid, other=float("inf"))
    row_delta = tl.load(delta + statistics, mask=valid, other=0.0)
    k += (batch * kv_len * KV_HEADS + kv_head) * H
    v += (batch * kv_len * KV_HEADS + kv_head) * HV
    if BIAS:
        key_bias += (batch * BIAS + head % BIAS) * kv_len
    if IDS:
        q_ids += batch * q_len
        kv_ids += batch * kv_len
    if POSITIONS:
        q_pos += batch % POSITIONS * q_len
        kv_pos += batch % POSITIONS * kv_len
    nothing = tl.zeros([QUERIES, HP], tl.float32)
    HIDING: tl.constexpr = 2 if BIAS else 1
    dq = nothing
    for state in tl.static_range(HIDING):
        dq = _dq_blocks(
            dq, query, grad, row_lse, row_delta, k, v, key_bias, q_at, q_in, q_len, kv_len, table,
            lists, 0 if state == 0 else num_partial, num_partial if state == 0 else num_listed,
            slots, bits, q_ids, kv_ids, q_pos, kv_pos, KV_HEADS * H, KV_HEADS * HV, H, HV, HP, HVP,
            BLOCK_Q, BLOCK_KV, KEYS, SCALE, CAP, BIAS > 0, RULE, BITS, IDS, POSITIONS > 0, EVEN,
            state == 0, False,
        )  # fmt: skip
    if _has_nan(dq):
        dq = nothing
        for state in tl.static_range(HIDING):
            dq = _dq_blocks(
                dq, query, grad, row_lse, row_delta, k, v, key_bias, q_at, q_in, q_len, kv_len,
                table, lists, 0 if state == 0 else num_partial,
                num_partial if state == 0 else num_listed, slots, bits, q_ids, kv_ids, q_pos,
                kv_pos, KV_HEADS * H, KV_HEADS * HV, H, HV, HP, HVP, BLOCK_Q, BLOCK_KV, KEYS,
                SCALE, CAP, BIAS > 0, RULE, BITS, IDS, POSITIONS > 0, EVEN,
                state == 0, True,
            )  # fmt: skip
    if not BIAS:
        dq = _dq_blocks(
            dq, query, grad, row_lse, row_delta, k, v, key_bias, q_at, q_in, q_len, kv_len, table,
            lists, num_partial, num_listed, slots, bits, q_ids, kv_ids, q_pos, kv_pos,
            KV_HEADS * H, KV_HEADS * HV, H, HV, HP, HVP, BLOCK_Q, BLOCK_KV, KEYS, SCALE, CAP,
            False, RULE, BITS, IDS, POSITIONS > 0, EVEN, False, False,
        )  # fmt: skip
    _store_rows(dq_out + q_row * H, dq * SCALE, q_in, valid, HEADS * H, H, HP)


@triton.jit
@typing.no_type_check
def _dkv_blocks(
    dk, dv, dbias, key, value, bias, q, dout, lse, delta, kv_at, kv_in, q_len, kv_len, table,
    lists, first, last, slots, bits, q_ids, kv_ids, q_pos, kv_pos,
    Q_STRIDE: tl.constexpr, DOUT_STRIDE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    HP: tl.constexpr, HVP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    QUERIES: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
    RULE: tl.constexpr, BITS: tl.constexpr, IDS: tl.constexpr, POSITIONS: tl.constexpr,
    EVEN: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Adds to dk, dv (and dbias) over entries `first .. last` of a column's list, transposed."""
    SUB: tl.constexpr = (BLOCK_Q + QUERIES - 1) // QUERIES
    CHECK: tl.constexpr = PARTIAL or BIAS
    m = tl.arange(0, QUERIES)
    block = tl.load(lists + first, mask=first < last, other=0)
    for i in range(first * SUB, last * SUB):
        q_in = (i % SUB) * QUERIES + m
        start = block * BLOCK_Q + (i % SUB) * QUERIES
        q_at = start + m
        # FULL blocks too may reach over the last query. Its lse is inf, so that p is 0.
        valid = None if EVEN else (q_at < q_len) & (q_in < BLOCK_Q)
        row = start.to(tl.int64)
        query = _load_rows(q + row * Q_STRIDE, m, valid, Q_STRIDE, H, HP)
        if EVEN:
            row_lse, row_delta = tl.load(lse + q_at)[None, :], tl.load(delta + q_at)[None, :]
        else:
            row_lse = tl.load(lse + q_at, mask=valid, other=float("inf"))[None, :]
            row_delta = tl.load(delta + q_at, mask=valid, other=0.0)[None, :]
        s = tl.dot(key, tl.trans(query), input_precision="ieee")
        x, t = _logits(s, bias, SCALE, CAP, BIAS)
        p = tl.exp2(x - row_lse)
        if CHECK:
            slot = tl.load(slots + i // SUB) if BITS and PARTIAL else 0
            visible = _visible(
                q_at[None, :], kv_at[:, None], q_in[None, :], kv_in[:, None], q_len, kv_len, bias,
                table, slot, bits, q_ids, kv_ids, q_pos, kv_pos, RULE, BITS, IDS, POSITIONS,
                BLOCK_Q, BLOCK_KV, PARTIAL, BIAS, True,  # Keys outside are not stored.
            )  # fmt: skip
            p = tl.where(visible, p, 0.0)
        grad = _load_rows(dout + row * DOUT_STRIDE, m, valid, DOUT_STRIDE, HV, HVP)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        dp = tl.dot(value, tl.trans(grad), input_precision="ieee")
        ds = p * (dp - row_delta)
        if CHECK:
            # Where p is 0, dp may be nan; and asking p keeps fewer registers than `visible`.
            ds = tl.where(p == 0.0, 0.0, ds)
        if BIAS:
            dbias += tl.sum(ds, 1)
        if CAP is not None:
            ds *= 1.0 - t * t
            if CHECK:
                ds = tl.where(p == 0.0, 0.0, ds)
        dk = tl.dot(ds.to(query.dtype), query, dk, input_precision="ieee")
        block = tl.load(lists + (i + 1) // SUB, mask=i + 1 < last * SUB, other=0)
    return dk, dv, dbias


@triton.jit
@typing.no_type_check
def _dkv_tile(
    tile, q, k, v, dout, lse, delta, key_bias, q_ids, kv_ids, q_pos, kv_pos,
    programs, indices, slots, bits, q_len, kv_len, num_programs, length, num_slots,
    dk_out, dv_out, dbias_out,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    HP: tl.constexpr, HVP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    BIAS: tl.constexpr, RULE: tl.constexpr, BITS: tl.constexpr, IDS: tl.constexpr,
    POSITIONS: tl.constexpr, NUM_TABLES: tl.constexpr, MASK_BATCH: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """`dk`, `dv` of one tile of columns of one KV head, `dbias` per query head."""
    SUB: tl.constexpr = (BLOCK_KV + KEYS - 1) // KEYS
    GROUP: tl.constexpr = HEADS // KV_HEADS
    program = tile // SUB
    batch = (program // num_programs).to(tl.int64)
    at = (program if MASK_BATCH else program % num_programs).to(tl.int64) * (6 * GROUP)
    kv_head = tl.load(programs + at) // GROUP
    block = tl.load(programs + at + 1)
    kv_in = tile % SUB * KEYS + tl.arange(0, KEYS)
    kv_at = block * BLOCK_KV + kv_in
    valid = (kv_at < kv_len) & (kv_in < BLOCK_KV)
    kv_row = (batch * kv_len + block * BLOCK_KV) * KV_HEADS + kv_head
    key = _load_rows(k + kv_row * H, kv_in, valid, KV_HEADS * H, H, HP)
    value = _load_rows(v + kv_row * HV, kv_in, valid, KV_HEADS * HV, HV, HVP)
    if IDS:
        q_ids += batch * q_len
        kv_ids += batch * kv_len
    if POSITIONS:
        q_pos += batch % POSITIONS * q_len
        kv_pos += batch % POSITIONS * kv_len
    dk = tl.zeros([KEYS, HP], tl.float32)
    dv = tl.zeros([KEYS, HVP], tl.float32)
    for g in range(GROUP):
        head, block, table, start, num_partial, num_listed = _record(programs, at + g * 6)
        mask = batch * NUM_TABLES + table if MASK_BATCH else table.to(tl.int64)
        entry = mask * length + start
        bias, dbias = None, tl.zeros([KEYS], tl.float32)
        if BIAS:
            bias = key_bias + (batch * BIAS + head % BIAS) * kv_len
            bias = tl.load(bias + kv_at, mask=valid, other=0.0)[:, None]
        q_row = batch * q_len * HEADS + head
        statistics = (batch * HEADS + head) * q_len
        for state in tl.static_range(2):
            dk, dv, dbias = _dkv_blocks(
                dk, dv, dbias, key, value, bias, q + q_row * H, dout + q_row * HV,
                lse + statistics, delta + statistics, kv_at, kv_in, q_len, kv_len, table,
                indices + entry, 0 if state == 0 else num_partial,
                num_partial if state == 0 else num_listed, slots + entry,
                bits + mask * num_slots * BLOCK_Q * BLOCK_KV, q_ids, kv_ids, q_pos, kv_pos,
                HEADS * H, HEADS * HV, H, HV, HP, HVP, BLOCK_Q, BLOCK_KV, QUERIES, SCALE, CAP,
                BIAS > 0, RULE, BITS, IDS, POSITIONS > 0, EVEN, state == 0,
            )  # fmt: skip
        if BIAS:
            tl.store(dbias_out + (batch * HEADS + head) * kv_len + kv_at, dbias, mask=valid)
    _store_rows(dk_out + kv_row * H, dk * SCALE, kv_in, valid, KV_HEADS * H, H, HP)
    _store_rows(dv_out + kv_row * HV, dv, kv_in, valid, KV_HEADS * HV, HV, HVP)


@triton.jit
@typing.no_type_check
def backward_kernel(
    q, k, v, dout, lse, delta, key_bias, q_ids, kv_ids, q_pos, kv_pos, bits,
    rows, kv_indices, kv_slots, columns, q_indices, q_slots, q_len, kv_len, num_slots,
    num_rows, row_length, num_columns, column_length, column_tiles,
    dq_out, dk_out, dv_out, dbias_out,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    HP: tl.constexpr, HVP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    DQ_QUERIES: tl.constexpr, DQ_KEYS: tl.constexpr, DQ_EVEN: tl.constexpr,
    DKV_QUERIES: tl.constexpr, DKV_KEYS: tl.constexpr, DKV_EVEN: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, RULE: tl.constexpr,
    BITS: tl.constexpr, IDS: tl.constexpr, POSITIONS: tl.constexpr, NUM_TABLES: tl.constexpr,
    MASK_BATCH: tl.constexpr,
):  # fmt: skip
    """`dk` and `dv` of one tile of columns or, after all of those, `dq` of one tile of rows.

    One launch, so that rows fill the processors while the last columns end. `lse` is in base 2,
    inf for empty rows.
    """
    tile = tl.program_id(0)
    if tile < column_tiles:
        _dkv_tile(
            tile, q, k, v, dout, lse, delta, key_bias, q_ids, kv_ids, q_pos, kv_pos,
            columns, q_indices, q_slots, bits, q_len, kv_len, num_columns, column_length, num_slots,
            dk_out, dv_out, dbias_out, HEADS, KV_HEADS, H, HV, HP, HVP, BLOCK_Q, BLOCK_KV,
            DKV_QUERIES, DKV_KEYS, SCALE, CAP, BIAS, RULE, BITS, IDS, POSITIONS, NUM_TABLES,
            MASK_BATCH, DKV_EVEN,
        )  # fmt: skip
    else:
        _dq_tile(
            tile - column_tiles, q, k, v, dout, lse, delta, key_bias, q_ids, kv_ids, q_pos, kv_pos,
            rows, kv_indices, kv_slots, bits, q_len, kv_len, num_rows, row_length, num_slots,
            dq_out, HEADS, KV_HEADS, H, HV, HP, HVP, BLOCK_Q, BLOCK_KV, DQ_QUERIES, DQ_KEYS,
            SCALE, CAP, BIAS, RULE, BITS, IDS, POSITIONS, NUM_TABLES, MASK_BATCH, DQ_EVEN,
        )  # fmt: skip
