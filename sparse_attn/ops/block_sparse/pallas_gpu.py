"""Block-sparse attention on NVIDIA Hopper, in Pallas Mosaic GPU: forward, dq, and dk with dv.

One warpgroup streams the tiles that the lists of a `BlockMask` name from global to shared memory
(TMA) through a ring; one or two compute warpgroups, 64 rows each, multiply them (wgmma) and keep
their accumulators in registers [arXiv:2407.08608, sec. 3]. The forward and dq walk the row lists;
dk and dv walk the column lists with K and V stationary (where columns are few, for parts of a group
of heads, summed afterwards), so nothing is added atomically and results repeat bit by bit. Each
list is walked as PARTIAL blocks, where the element rule runs, and then FULL blocks without any mask
code.

A tile holds at most one mask block: larger ones take several, smaller ones leave rows of the matrix
instruction unused. A non-finite value spoils all queries of the PARTIAL tiles that hold it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from sparse_attn.ops import plgpu_compat, tiles
from sparse_attn.ops.block_sparse import gpu_rules, gpu_walk
from sparse_attn.ops.block_sparse import inputs as inputs_lib

_ROWS = gpu_walk.ROWS
_slot = gpu_walk.slot_of
_to_tile = gpu_walk.rows_to_tile


def check(inputs: inputs_lib.Inputs) -> None:
    """Raises NotImplementedError(reason) for what these kernels cannot do."""
    device, mask = tiles.target(), inputs.mask
    if (reason := plgpu_compat.missing()) is not None:
        raise NotImplementedError(reason)
    if device.platform != "gpu" or not (device.compute_capability or "").startswith("9."):
        raise NotImplementedError(
            "needs an NVIDIA Hopper GPU (compute capability 9.x), the device is "
            f"{device.kind} ({device.compute_capability})"
        )
    if inputs.q.dtype == jnp.float32:
        raise NotImplementedError("takes bfloat16 and float16, not float32")
    for name, x in (("q and k", inputs.q), ("v", inputs.v)):
        if x.shape[-1] > 256:
            raise NotImplementedError(f"takes head_dim <= 256, {name} have {x.shape[-1]}")
    for name, block in (("block_q", mask.block_q), ("block_kv", mask.block_kv)):
        if not (block in (16, 32) or block % _ROWS == 0):
            raise NotImplementedError(f"{name}={block} is not 16, 32 or a multiple of {_ROWS}")
    if mask.bits is not None and any(rule is not None for rule in mask.rules):
        raise NotImplementedError("a mask with element bits may not have element rules as well")


def _pad(x):
    """Zeros up to a multiple of 64 columns and 8 tokens: they add nothing to any product."""
    length, width = -x.shape[1] % 8, -x.shape[-1] % 64
    return jnp.pad(x, ((0, 0), (0, length), (0, 0), (0, width))) if length or width else x


# --- Forward ------------------------------------------------------------------------------------


def forward(
    inputs: inputs_lib.Inputs, *, schedule: gpu_walk.Schedule | None = None
) -> tuple[jax.Array, jax.Array]:
    """`out [B, T, N, Hv]` in q's dtype and `lse [B, T, N]` float32; see `inputs.Backend`."""
    plgpu, pl = plgpu_compat.plgpu, plgpu_compat.pl
    q_len, v_dim = inputs.q.shape[1], inputs.v.shape[-1]
    q, k, v = (_pad(x) for x in inputs[:3])
    (batch_size, padded_len, num_heads, qk_dim), width, dtype = q.shape, v.shape[-1], q.dtype
    wide = max(qk_dim, width)  # Q and then the output are copied as one tile: both get its width.
    q = jnp.pad(q, ((0, 0),) * 3 + ((0, wide - qk_dim),))
    group = inputs_lib.group_size(inputs)
    lists, arrays = gpu_walk.lists_of(inputs, "kv", num_heads)
    wgs, own = lists.warpgroups, pl.ds(0, lists.wg_rows)
    schedule = schedule or gpu_walk.schedule_of(lists, wide, qk_dim + width, tile=128)
    tile, stages, buffers = gpu_walk.tile_of(lists, schedule), schedule.stages, schedule.buffers
    shape = (_ROWS, tile)
    rules = gpu_rules.rules_of(inputs, shape, 0)
    # PV is made in parts of at most 128 columns, so that a part and the sum fit in registers.
    parts = [(c, min(128, width - c)) for c in range(0, width, 128)]
    pingpong = wgs == 2
    row_layout = plgpu.Layout.WGMMA.reduce(1)

    def body(refs, q_smem, k_smem, v_smem, lse_smem, q_full, q_free, k_full, v_full, k_free,
             v_free, turn, *staging):  # fmt: skip
        wg = lax.axis_index("wg")

        def program(n):
            found = lists.program(refs, n, tile)
            return found, found.entries(found.head)

        def take_turn():
            if pingpong:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        def serve(n, done):
            (batch, head, first, _), walk = program(n)
            count = walk.count
            q_first = first + wg * lists.wg_rows
            buffer = _slot(n, buffers)
            q_tile = q_smem.at[buffer, wg]
            staged = staging[0].at[wg] if staging else None
            plgpu.barrier_wait(q_full.at[buffer])
            if pingpong:
                pl.when(wg == 1)(take_turn)

            def step(i, carry, masked):
                acc, m, l = carry
                slot = _slot(done + i, stages)
                kv_first = walk.first_token(i) if masked or "bias" in refs else None
                where = rules.read(refs, batch, head, q_first, kv_first, masked)

                def scores(acc_ref):
                    plgpu.wgmma(
                        acc_ref, q_tile.at[:, pl.ds(0, qk_dim)],
                        k_smem.at[slot].transpose((1, 0)),
                    )  # fmt: skip
                    take_turn()
                    return acc_ref[...]

                raw = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                x, c, _ = rules.logits(raw, where)
                x = rules.hide(x, -jnp.inf, refs, walk, i, where, masked)
                m_new = jnp.maximum(m, x.max(axis=1) * c)
                m_safe = m_new
                if masked or rules.hides_always:
                    m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)
                alpha = jnp.exp2(m - m_safe)
                p = jnp.exp2(x * c - _to_tile(m_safe, shape))
                l = l * alpha + p.sum(axis=1)
                acc = tuple(a * _to_tile(alpha, a.shape) for a in acc)
                # Everything above is done before the other warpgroup is let in.
                acc, l, m_new, p16 = lax.optimization_barrier((acc, l, m_new, p.astype(dtype)))
                if pingpong:
                    plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                if pingpong:
                    plgpu.barrier_wait(turn)

                def await_next_k():
                    after = _slot(done + i + 1, stages)
                    pl.when(i + 1 < count)(lambda: plgpu.barrier_wait(k_full.at[after]))

                acc = tuple(
                    plgpu_compat.multiply_add(
                        a, p16, v_smem.at[slot, :, pl.ds(start, n)], staged,
                        await_next_k if start == 0 else None,
                    )
                    for a, (start, n) in zip(acc, parts)
                )  # fmt: skip
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, m_new, l

            pl.when(count > 0)(lambda: plgpu.barrier_wait(k_full.at[_slot(done, stages)]))
            carry = (
                tuple(gpu_walk.zeros((_ROWS, n), plgpu.Layout.WGMMA) for _, n in parts),
                gpu_walk.zeros((_ROWS,), row_layout) - jnp.inf,
                gpu_walk.zeros((_ROWS,), row_layout),
            )
            carry = lax.fori_loop(0, walk.partial, functools.partial(step, masked=True), carry)
            acc, m, l = lax.fori_loop(
                walk.partial, count, functools.partial(step, masked=False), carry
            )
            if pingpong:
                pl.when(wg == 0)(take_turn)
            if "sinks" in refs:
                sink = lax.broadcast_in_dim(refs["sinks"][head], (_ROWS,), [])
                sink = plgpu.layout_cast(sink, row_layout)
                m_new = jnp.maximum(m, sink)
                scaled = jnp.exp2(m - m_new)
                acc = tuple(a * _to_tile(scaled, a.shape) for a in acc)
                l, m = l * scaled + jnp.exp2(sink - m_new), m_new
            empty = l == 0.0
            inverse = 1.0 / jnp.where(empty, 1.0, l)
            for a, (start, n) in zip(acc, parts):
                out = (a * _to_tile(inverse, a.shape)).astype(dtype)
                q_tile[:, pl.ds(start, n)] = out
            lse = (m + jnp.log2(jnp.where(empty, 1.0, l))) * (1 / gpu_rules.LOG2E)
            lse_smem[wg] = jnp.where(empty, -jnp.inf, lse)
            rows = pl.ds(q_first, lists.wg_rows)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile.at[own], refs["out"].at[batch, rows, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg, own], refs["lse"].at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free.at[buffer])
            return done + count

        def feed(n, done):
            (batch, head, first, _), walk = program(n)
            buffer = _slot(n, buffers)
            pl.when(n >= buffers)(lambda: plgpu.barrier_wait(q_free.at[buffer]))
            for w in range(wgs):
                window = (batch, pl.ds(first + w * lists.wg_rows, _ROWS), head)
                target = q_smem.at[buffer, w]
                plgpu.copy_gmem_to_smem(refs["q"].at[window], target, q_full.at[buffer])
            kv_head = lax.div(head, jnp.int32(group))
            sources = (refs[name].at[batch, :, kv_head] for name in ("k", "v"))
            ring = zip(sources, (k_smem, v_smem), (k_full, v_full), (k_free, v_free))
            ring = [(((source, smem),), full, free) for source, smem, full, free in ring]
            gpu_walk.feed_ring(walk, done, stages, ring, tile)
            return done + walk.count

        gpu_walk.run_warpgroups(lists, refs, serve, feed, stages, (k_free, v_free), buffers, q_free)

    rows_len = inputs.mask.num_rows * inputs.mask.block_q
    sinks = inputs.sink_logits
    results = gpu_walk.call(
        body,
        {
            "q": q, "k": k, "v": v, **arrays, **gpu_rules.per_token(inputs),
            "sinks": None if sinks is None else sinks * gpu_rules.LOG2E,
        },
        out_type={
            "out": jax.ShapeDtypeStruct((batch_size, padded_len, num_heads, wide), dtype),
            "lse": jax.ShapeDtypeStruct((batch_size, num_heads, rows_len), jnp.float32),
        },
        scratch=(
            gpu_walk.smem((buffers, wgs, _ROWS, wide), dtype),
            gpu_walk.smem((stages, tile, qk_dim), dtype),
            gpu_walk.smem((stages, tile, width), dtype),
            plgpu.SMEM((wgs, _ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=buffers),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=buffers),
            *(plgpu.Barrier(num_barriers=stages),) * 2,
            *(plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),) * 2,
            plgpu.Barrier(num_arrivals=wgs),
            *plgpu_compat.staging((wgs, *shape), dtype),
        ),
        lists=lists,
    )  # fmt: skip
    out, lse = results["out"][:, :q_len, :, :v_dim], results["lse"][..., :q_len]
    return out, lse.swapaxes(1, 2)


# --- Backward -----------------------------------------------------------------------------------


def backward(
    inputs: inputs_lib.Inputs,
    lse: jax.Array,
    dout: jax.Array,
    delta: jax.Array,
    *,
    schedules: tuple[gpu_walk.Schedule | None, gpu_walk.Schedule | None] = (None, None),
) -> inputs_lib.Grads:
    """Gradients from `p = exp(logits - lse)` and `ds = p * (dout @ v.T - delta)`."""
    length = inputs.mask.num_rows * inputs.mask.block_q + _ROWS
    pads = ((0, 0), (0, 0), (0, length - lse.shape[1]))
    # Base 2; +inf makes every probability of an empty or a padding row 0.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * gpu_rules.LOG2E).swapaxes(1, 2)
    arrays = {
        "q": _pad(inputs.q), "k": _pad(inputs.k), "v": _pad(inputs.v), "dout": _pad(dout),
        "lse": jnp.pad(lse, pads, constant_values=jnp.inf),
        "delta": jnp.pad(delta.swapaxes(1, 2), pads), **gpu_rules.per_token(inputs),
    }  # fmt: skip
    dq = _dq(inputs, arrays, schedules[0])
    dk, dv, dbias = _dkv(inputs, arrays, schedules[1])
    if dbias is not None:
        dbias = dbias[..., : inputs.k.shape[1]]
        if inputs.key_bias.shape[1] == 1:
            dbias = dbias.sum(1, keepdims=True)
    cut = [g[:, : x.shape[1], :, : x.shape[-1]] for g, x in zip((dq, dk, dv), inputs[:3])]
    return inputs_lib.Grads(*cut, dbias)


def _probabilities(rules, refs, raw, walk, i, where, lse, masked):
    """p and slope of a tile from its raw scores; `lse` is broadcast to the tile."""
    x, c, slope = rules.logits(raw, where)
    p = jnp.exp2(x * c - lse)
    return rules.hide(p, 0.0, refs, walk, i, where, masked), slope


def _dq(inputs, arrays, schedule):
    plgpu, pl = plgpu_compat.plgpu, plgpu_compat.pl
    q, v = arrays["q"], arrays["v"]
    (_, _, num_heads, qk_dim), width, dtype = q.shape, v.shape[-1], q.dtype
    group = inputs_lib.group_size(inputs)
    lists, list_arrays = gpu_walk.lists_of(inputs, "kv", num_heads)
    wgs = lists.warpgroups
    schedule = schedule or gpu_walk.schedule_of(lists, qk_dim + width + 4, qk_dim + width, tile=64)
    tile, stages, buffers = gpu_walk.tile_of(lists, schedule), schedule.stages, schedule.buffers
    shape = (_ROWS, tile)
    rules = gpu_rules.rules_of(inputs, shape, 0)
    row_layout = plgpu.Layout.WGMMA.reduce(1)

    def body(refs, q_smem, do_smem, lse_smem, delta_smem, k_smem, v_smem, own_full, own_free,
             k_full, v_full, k_free, v_free, *staging):  # fmt: skip
        wg = lax.axis_index("wg")

        def program(n):
            found = lists.program(refs, n, tile)
            return found, found.entries(found.head)

        def serve(n, done):
            (batch, head, first, _), walk = program(n)
            q_first = first + wg * lists.wg_rows
            buffer = _slot(n, buffers)
            q_tile, do_tile = q_smem.at[buffer, wg], do_smem.at[buffer, wg]
            staged = staging[0].at[wg] if staging else None
            plgpu.barrier_wait(own_full.at[buffer])
            lse = plgpu.load(lse_smem.at[buffer, wg], layout=row_layout)
            delta = plgpu.load(delta_smem.at[buffer, wg], layout=row_layout)

            def run(dq_ref):
                def step(i, _, masked):
                    slot = _slot(done + i, stages)
                    kv_first = walk.first_token(i) if masked or "bias" in refs else None
                    where = rules.read(refs, batch, head, q_first, kv_first, masked)
                    plgpu.barrier_wait(k_full.at[slot])
                    plgpu.barrier_wait(v_full.at[slot])
                    k_rows, v_rows = (x.at[slot].transpose((1, 0)) for x in (k_smem, v_smem))

                    def weights(raw):
                        # The dq product of the last step is done too: its K is free.
                        before = _slot(done + i + (stages - 1), stages)
                        pl.when(i > 0)(lambda: plgpu.barrier_arrive(k_free.at[before]))
                        return _probabilities(
                            rules, refs, raw, walk, i, where,
                            _to_tile(lse, shape), masked,
                        )  # fmt: skip

                    def both(s_ref, dp_ref):
                        plgpu.wgmma(s_ref, q_tile, k_rows)
                        plgpu.wgmma(dp_ref, do_tile, v_rows)
                        p, slope = weights(plgpu.wgmma_accumulator_load(s_ref, wait_n=1))
                        return p, slope, dp_ref[...]

                    def only_s(s_ref):
                        plgpu.wgmma(s_ref, q_tile, k_rows)
                        return weights(s_ref[...])

                    def then_dp(dp_ref):
                        plgpu.wgmma(dp_ref, do_tile, v_rows)
                        return dp_ref[...]

                    accumulator = plgpu.ACC(shape, jnp.float32)
                    if masked:  # Fewer registers: the rule needs them.
                        p, slope = pl.run_scoped(only_s, accumulator)
                        dp = pl.run_scoped(then_dp, accumulator)
                    else:
                        p, slope, dp = pl.run_scoped(both, accumulator, accumulator)
                    plgpu.barrier_arrive(v_free.at[slot])
                    ds = p * (dp - _to_tile(delta, shape))
                    ds = ds if slope is None else ds * slope
                    plgpu_compat.wgmma_from_registers(
                        dq_ref, ds.astype(dtype), k_smem.at[slot], staged
                    )

                lax.fori_loop(0, walk.partial, functools.partial(step, masked=True), None)
                lax.fori_loop(walk.partial, walk.count, functools.partial(step, masked=False), None)
                dq = dq_ref[...]
                last = _slot(done + walk.count + (stages - 1), stages)
                pl.when(walk.count > 0)(lambda: plgpu.barrier_arrive(k_free.at[last]))
                return dq

            dq = pl.run_scoped(run, plgpu.ACC((_ROWS, qk_dim), jnp.float32))
            q_tile[...] = (dq * inputs.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                q_tile.at[pl.ds(0, lists.wg_rows)],
                refs["dq"].at[batch, pl.ds(q_first, lists.wg_rows), head],
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(own_free.at[buffer])
            return done + walk.count

        def feed(n, done):
            (batch, head, first, _), walk = program(n)
            buffer = _slot(n, buffers)
            pl.when(n >= buffers)(lambda: plgpu.barrier_wait(own_free.at[buffer]))
            for w in range(wgs):
                rows = pl.ds(first + w * lists.wg_rows, _ROWS)
                for name, ref in (("q", q_smem), ("dout", do_smem)):
                    plgpu.copy_gmem_to_smem(
                        refs[name].at[batch, rows, head],
                        ref.at[buffer, w],
                        own_full.at[buffer],
                    )
                for name, ref in (("lse", lse_smem), ("delta", delta_smem)):
                    plgpu.copy_gmem_to_smem(
                        refs[name].at[batch, head, rows],
                        ref.at[buffer, w],
                        own_full.at[buffer],
                    )
            kv_head = lax.div(head, jnp.int32(group))
            sources = (refs[name].at[batch, :, kv_head] for name in ("k", "v"))
            ring = zip(sources, (k_smem, v_smem), (k_full, v_full), (k_free, v_free))
            ring = [(((source, smem),), full, free) for source, smem, full, free in ring]
            gpu_walk.feed_ring(walk, done, stages, ring, tile)
            return done + walk.count

        gpu_walk.run_warpgroups(
            lists, refs, serve, feed, stages, (k_free, v_free), buffers, own_free
        )

    return gpu_walk.call(
        body,
        {**arrays, **list_arrays},
        out_type={"dq": jax.ShapeDtypeStruct(q.shape, dtype)},
        scratch=(
            gpu_walk.smem((buffers, wgs, _ROWS, qk_dim), dtype),
            gpu_walk.smem((buffers, wgs, _ROWS, width), dtype),
            *(plgpu.SMEM((buffers, wgs, _ROWS), jnp.float32),) * 2,
            gpu_walk.smem((stages, tile, qk_dim), dtype),
            gpu_walk.smem((stages, tile, width), dtype),
            plgpu.Barrier(num_arrivals=4 * wgs, num_barriers=buffers),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=buffers),
            *(plgpu.Barrier(num_barriers=stages),) * 2,
            *(plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),) * 2,
            *plgpu_compat.staging((wgs, *shape), dtype),
        ),
        lists=lists,
    )["dq"]


def _dkv(inputs, arrays, schedule):
    """dk, dv and, with a key bias, its gradient per query head."""
    plgpu, pl = plgpu_compat.plgpu, plgpu_compat.pl
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    (batch_size, _, num_kv_heads, qk_dim), width, dtype = k.shape, v.shape[-1], q.dtype
    parts = gpu_walk.group_parts(inputs)
    heads_per_part = inputs_lib.group_size(inputs) // parts
    lists, list_arrays = gpu_walk.lists_of(inputs, "q", num_kv_heads * parts)
    wgs, own = lists.warpgroups, pl.ds(0, lists.wg_rows)
    has_bias = inputs.key_bias is not None
    schedule = schedule or gpu_walk.schedule_of(
        lists, qk_dim + width, qk_dim + width + 4, tile=64, stages=2, reserved=2048 * has_bias
    )
    tile, stages, buffers = gpu_walk.tile_of(lists, schedule), schedule.stages, schedule.buffers
    shape = (_ROWS, tile)
    rules = gpu_rules.rules_of(inputs, shape, 1)
    col_layout = plgpu.Layout.WGMMA.reduce(0)

    def body(refs, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, *rest):
        db_smem, rest = (rest[0], rest[1:]) if has_bias else (None, rest)
        own_full, own_free, q_full, do_full, q_free, do_free, *staging = rest
        wg = lax.axis_index("wg")

        def program(n):
            return lists.program(refs, n, tile)

        def serve(n, before_item):
            batch, part, first, entries = program(n)
            kv_first = first + wg * lists.wg_rows
            buffer = _slot(n, buffers)
            k_tile, v_tile = k_smem.at[buffer, wg], v_smem.at[buffer, wg]
            staged = staging[0].at[wg] if staging else None
            rows = pl.ds(kv_first, lists.wg_rows)
            plgpu.barrier_wait(own_full.at[buffer])

            def run(dk_ref, dv_ref):
                def step(i, db, masked, walk, done):
                    at = done + i
                    slot = _slot(at, stages)
                    q_first = walk.first_token(i) if masked else None
                    where = rules.read(refs, batch, walk.head, q_first, kv_first, masked)
                    plgpu.barrier_wait(q_full.at[slot])
                    plgpu.barrier_wait(do_full.at[slot])
                    q_tile, do_tile = q_smem.at[slot], do_smem.at[slot]
                    q_cols, do_cols = (x.transpose((1, 0)) for x in (q_tile, do_tile))

                    def weights(raw):
                        # The dk product of the last step is done: its Q is free.
                        before = _slot(at + (stages - 1), stages)
                        pl.when(at > before_item)(lambda: plgpu.barrier_arrive(q_free.at[before]))
                        lse = plgpu.load(lse_smem.at[slot], layout=col_layout)
                        p, slope = _probabilities(
                            rules, refs, raw, walk, i, where,
                            lax.broadcast_in_dim(lse, shape, [1]), masked,
                        )  # fmt: skip
                        return lax.optimization_barrier(p.astype(dtype)), slope

                    def only_s(s_ref):
                        plgpu.wgmma(s_ref, k_tile, q_cols)
                        return weights(s_ref[...])

                    def then_dp(dp_ref):
                        plgpu.wgmma(dp_ref, v_tile, do_cols)
                        plgpu_compat.wgmma_from_registers(dv_ref, p16, do_tile, staged)
                        return plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)

                    # In turn: both at once take registers that hide latencies (3 to 6 % slower).
                    accumulator = plgpu.ACC(shape, jnp.float32)
                    p16, slope = pl.run_scoped(only_s, accumulator)
                    dp = pl.run_scoped(then_dp, accumulator)
                    delta = plgpu.load(delta_smem.at[slot], layout=col_layout)
                    # p as bfloat16 or float16: a float32 copy does not fit in the registers.
                    ds = p16.astype(jnp.float32) * (dp - lax.broadcast_in_dim(delta, shape, [1]))
                    if has_bias:
                        db = db + ds.sum(axis=1)
                    ds = ds if slope is None else ds * slope
                    plgpu_compat.wgmma_from_registers(dk_ref, ds.astype(dtype), q_tile, staged)
                    plgpu.wgmma_wait(1)  # The dv product is done: its dO is free.
                    plgpu.barrier_arrive(do_free.at[slot])
                    return db

                def one_head(g, done):
                    walk = entries(part * heads_per_part + g)
                    db = (
                        gpu_walk.zeros((_ROWS,), plgpu.Layout.WGMMA.reduce(1)) if has_bias else None
                    )
                    args = {"walk": walk, "done": done}
                    masked = functools.partial(step, masked=True, **args)
                    unmasked = functools.partial(step, masked=False, **args)
                    db = lax.fori_loop(0, walk.partial, masked, db)
                    db = lax.fori_loop(walk.partial, walk.count, unmasked, db)
                    if has_bias:
                        db_smem[wg] = db
                        plgpu.commit_smem()
                        target = refs["dbias"].at[batch, walk.head, rows]
                        plgpu.copy_smem_to_gmem(db_smem.at[wg, own], target)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    return done + walk.count

                done = lax.fori_loop(0, heads_per_part, one_head, before_item)
                dk, dv = dk_ref[...], dv_ref[...]
                last = _slot(done + (stages - 1), stages)
                pl.when(done > before_item)(lambda: plgpu.barrier_arrive(q_free.at[last]))
                return dk, dv, done

            dk, dv, done = pl.run_scoped(
                run,
                plgpu.ACC((_ROWS, qk_dim), jnp.float32),
                plgpu.ACC((_ROWS, width), jnp.float32),
            )
            grads = (("dk", dk * inputs.scale, k_tile), ("dv", dv, v_tile))
            if parts > 1:
                at = (batch, part, lax.div(kv_first, jnp.int32(lists.wg_rows)))
                for name, grad, _ in grads:
                    plgpu_compat.store_to_global(refs[name].at[at], grad)
            else:
                for _, grad, tile_ in grads:
                    tile_[...] = grad.astype(dtype)
                plgpu.commit_smem()
                for name, _, tile_ in grads:
                    plgpu.copy_smem_to_gmem(tile_.at[own], refs[name].at[batch, rows, part])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(own_free.at[buffer])
            return done

        def feed(n, done):
            batch, part, first, entries = program(n)
            kv_head = lax.div(part, jnp.int32(parts))
            buffer = _slot(n, buffers)
            pl.when(n >= buffers)(lambda: plgpu.barrier_wait(own_free.at[buffer]))
            for w in range(wgs):
                window = (batch, pl.ds(first + w * lists.wg_rows, _ROWS), kv_head)
                for name, ref in (("k", k_smem), ("v", v_smem)):
                    plgpu.copy_gmem_to_smem(
                        refs[name].at[window], ref.at[buffer, w], own_full.at[buffer]
                    )

            def one_head(g, done):
                walk = entries(part * heads_per_part + g)
                matrices = (refs[name].at[batch, :, walk.head] for name in ("q", "dout"))
                vectors = (refs[name].at[batch, walk.head] for name in ("lse", "delta"))
                copies = zip(matrices, (q_smem, do_smem), vectors, (lse_smem, delta_smem))
                copies = [((m, m_smem), (x, x_smem)) for m, m_smem, x, x_smem in copies]
                ring = list(zip(copies, (q_full, do_full), (q_free, do_free)))
                gpu_walk.feed_ring(walk, done, stages, ring, tile)
                return done + walk.count

            return lax.fori_loop(0, heads_per_part, one_head, done)

        gpu_walk.run_warpgroups(
            lists, refs, serve, feed, stages, (q_free, do_free), buffers, own_free
        )

    out_type = {name: gpu_walk.grad_type(x, parts, lists) for name, x in (("dk", k), ("dv", v))}
    if has_bias:
        shape_db = (batch_size, q.shape[2], inputs.mask.num_cols * inputs.mask.block_kv)
        out_type["dbias"] = jax.ShapeDtypeStruct(shape_db, jnp.float32)
    results = gpu_walk.call(
        body,
        {**arrays, **list_arrays},
        out_type=out_type,
        scratch=(
            gpu_walk.smem((buffers, wgs, _ROWS, qk_dim), dtype),
            gpu_walk.smem((buffers, wgs, _ROWS, width), dtype),
            gpu_walk.smem((stages, tile, qk_dim), dtype),
            gpu_walk.smem((stages, tile, width), dtype),
            *(plgpu.SMEM((stages, tile), jnp.float32),) * 2,
            *(plgpu.SMEM((wgs, _ROWS), jnp.float32),) * has_bias,
            plgpu.Barrier(num_arrivals=2 * wgs, num_barriers=buffers),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=buffers),
            *(plgpu.Barrier(num_arrivals=2, num_barriers=stages),) * 2,
            *(plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),) * 2,
            *plgpu_compat.staging((wgs, *shape), dtype),
        ),
        lists=lists,
    )
    dk, dv = (gpu_walk.sum_parts(results[name], parts, lists, dtype) for name in ("dk", "dv"))
    return dk, dv, results.get("dbias")
