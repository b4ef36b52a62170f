"""Pallas Mosaic TPU kernels over a `BlockMask`: work follows the number of active tiles.

The grid is (batch, heads, steps): one step per active tile from a scalar-prefetched list
(`tpu_steps`), whose bound may be known at run time only. All heads of a group share the keys and
values of a step. Online softmax over tiles [arXiv:2205.14135, alg. 1].
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_attn.ops import tiles
from sparse_attn.ops.block_sparse import inputs as inputs_lib
from sparse_attn.ops.block_sparse import tpu_launch, tpu_steps, tpu_sums

_MAX_HEAD_DIM = 256
_ROWS_AT_ONCE = 512  # Of stacked heads, in the products of a backward step.


def check(inputs: inputs_lib.Inputs) -> None:
    """Raises NotImplementedError(reason) for what the kernels cannot do."""
    if tiles.target().platform != "tpu":
        raise NotImplementedError(f"needs a TPU, the target is {tiles.target().kind!r}")
    mask = inputs.mask
    if max(inputs.q.shape[3], inputs.v.shape[3]) > _MAX_HEAD_DIM:
        raise NotImplementedError(f"head_dim must be <= {_MAX_HEAD_DIM}, got {inputs.q.shape[3]}")
    if mask.bits is not None and (
        mask.block_q % tpu_launch.LANES or mask.block_kv % tpu_launch.LANES
    ):
        raise NotImplementedError(
            f"masks from arrays need blocks of a multiple of {tpu_launch.LANES} tokens, got "
            f"{mask.block_q}x{mask.block_kv}"
        )
    for block in (mask.block_q, mask.block_kv):
        if math.lcm(block, tpu_launch.LANES) > 8 * tpu_launch.LANES and block % tpu_launch.LANES:
            raise NotImplementedError(
                f"a block of {block} tokens fits no tile of {tpu_launch.LANES}s"
            )
    for step in ("forward", "backward"):
        if mask.is_static:
            tpu_launch.plan(inputs, step)
        else:
            jax.eval_shape(lambda step=step: tpu_launch.plan(inputs, step).steps.outer)


def forward(inputs: inputs_lib.Inputs) -> tuple[jax.Array, jax.Array]:
    """out and lse, see `inputs.Backend`."""
    call = tpu_launch.plan(inputs, "forward")
    batch, q_len, num_heads, _ = inputs.q.shape
    v_dim = tpu_launch.lane_dim(inputs.v.shape[3])
    operands = tpu_launch.operands_of(call)
    padded = call.rows * call.tile_q
    rows = call.group * call.tile_q
    dtype = tpu_launch.compute_dtype(inputs.q)
    out, lse = tpu_launch.launch(
        call,
        functools.partial(_forward, call),
        operands,
        {
            "out": tpu_launch.Operand(
                jax.ShapeDtypeStruct((batch, padded, num_heads * v_dim), dtype),
                (1, call.tile_q, call.group * v_dim),
                operands["q"].at,
            ),
            "lse": tpu_launch.Operand(
                jax.ShapeDtypeStruct((batch, call.q_heads, call.group, padded), jnp.float32),
                (1, 1, call.group, call.tile_q),
                lambda b, qh, kh, row, col, e: (b, qh, 0, row),
            ),
        },
        {
            "q_rows": pltpu.VMEM((rows, tpu_launch.lane_dim(inputs.q.shape[3])), dtype),
            "top": pltpu.VMEM((rows, tpu_launch.LANES), jnp.float32),
            "sum": pltpu.VMEM((rows, tpu_launch.LANES), jnp.float32),
            "acc": pltpu.VMEM((rows, v_dim), jnp.float32),
        },
    )
    out = tpu_launch.heads_from_lanes(out, q_len, num_heads, inputs.v.shape[3]).astype(
        inputs.q.dtype
    )
    return out, lse.reshape(batch, num_heads, padded)[..., :q_len].swapaxes(1, 2)


def backward(inputs: inputs_lib.Inputs, lse, dout, delta) -> inputs_lib.Grads:
    """Gradients, see `inputs.Backend`: one kernel, which recomputes the weights once."""
    call = tpu_launch.plan(inputs, "backward")
    run = _backward_by_rows if call.by == "rows" else _backward_by_cols
    return run(call, tpu_launch.operands_of(call, dout, lse, delta))


def _backward_by_rows(call, operands):
    inputs = call.inputs
    batch, q_len, num_heads, head_dim = inputs.q.shape
    _, kv_len, num_kv_heads, v_dim = inputs.v.shape
    dim, v_lanes = tpu_launch.lane_dim(head_dim), tpu_launch.lane_dim(v_dim)
    dtype = tpu_launch.compute_dtype(inputs.q)
    outputs = {
        "dq": tpu_launch.Operand(
            jax.ShapeDtypeStruct(operands["q"].array.shape, dtype),
            operands["q"].block,
            operands["q"].at,
        ),
        # dk and dv side by side; the last tile takes what parts without a tile would add.
        "dkv": tpu_launch.Operand(
            jax.ShapeDtypeStruct(
                (batch, (call.cols + 1) * call.tile_kv, num_kv_heads * (dim + v_lanes)),
                jnp.float32,
            ),
            (), None, pl.ANY,
        ),
    }  # fmt: skip
    scratch = {
        "dq_acc": pltpu.VMEM((call.group * call.tile_q, dim), jnp.float32),
        **tpu_sums.scratch(call.parts, call.tile_kv, dim + v_lanes),
    }
    dq, dkv = tpu_launch.launch(
        call, functools.partial(_backward_row, call), operands, outputs, scratch
    )
    dq = tpu_launch.heads_from_lanes(dq, q_len, num_heads, head_dim).astype(inputs.q.dtype)
    dkv = tpu_launch.heads_from_lanes(dkv, kv_len, num_kv_heads, dim + v_lanes)
    dk = (dkv[..., :head_dim] * inputs.scale).astype(inputs.k.dtype)
    dv = dkv[..., dim : dim + v_dim].astype(inputs.v.dtype)
    return inputs_lib.Grads(dq, dk, dv, None)


def _backward_by_cols(call, operands):
    inputs = call.inputs
    batch, q_len, num_heads, head_dim = inputs.q.shape
    _, kv_len, num_kv_heads, v_dim = inputs.v.shape
    dim, v_lanes = tpu_launch.lane_dim(head_dim), tpu_launch.lane_dim(v_dim)
    q_pad, kv_pad = call.rows * call.tile_q, call.cols * call.tile_kv
    dtype = tpu_launch.compute_dtype(inputs.q)
    outputs = {
        "dk": tpu_launch.Operand(
            jax.ShapeDtypeStruct((batch, kv_pad, num_kv_heads * dim), dtype),
            (1, call.tile_kv, dim),
            operands["kv0"].at,
        ),
        "dv": tpu_launch.Operand(
            jax.ShapeDtypeStruct((batch, kv_pad, num_kv_heads * v_lanes), dtype),
            (1, call.tile_kv, v_lanes),
            operands["kv0"].at,
        ),
        "dq": tpu_launch.Operand(
            jax.ShapeDtypeStruct((batch, q_pad, num_heads * dim), jnp.float32), (), None, pl.ANY
        ),
    }
    scratch = {
        "dk_acc": pltpu.VMEM((call.tile_kv, dim), jnp.float32),
        "dv_acc": pltpu.VMEM((call.tile_kv, v_lanes), jnp.float32),
        **tpu_sums.scratch(1, call.tile_q, call.group * dim),
    }
    if inputs.key_bias is not None:
        heads = inputs_lib.group_size(inputs) if inputs.key_bias.shape[1] > 1 else 1
        outputs["dbias"] = tpu_launch.Operand(
            jax.ShapeDtypeStruct((batch, num_kv_heads, heads, kv_pad), jnp.float32),
            (1, 1, heads, call.tile_kv),
            lambda b, qh, kh, row, col, e: (b, kh, 0, col),
        )
        scratch["dbias_acc"] = pltpu.VMEM((heads, call.tile_kv, tpu_launch.LANES), jnp.float32)
    dk, dv, dq, *dbias = tpu_launch.launch(
        call, functools.partial(_backward_col, call), operands, outputs, scratch
    )
    dq = tpu_launch.heads_from_lanes(dq * inputs.scale, q_len, num_heads, head_dim).astype(
        inputs.q.dtype
    )
    dk = tpu_launch.heads_from_lanes(dk, kv_len, num_kv_heads, head_dim).astype(inputs.k.dtype)
    dv = tpu_launch.heads_from_lanes(dv, kv_len, num_kv_heads, v_dim).astype(inputs.v.dtype)
    if not dbias:
        return inputs_lib.Grads(dq, dk, dv, None)
    dbias = dbias[0].reshape(batch, -1, kv_pad)[..., :kv_len]
    if inputs.key_bias.shape[1] == 1:
        dbias = dbias.sum(1, keepdims=True)
    return inputs_lib.Grads(dq, dk, dv, dbias)


# --- Kernels --------------------------------------------------------------------------------------


def _step(call, refs):
    """Number of this step, and the places and flags of its parts."""
    ib, ih, t = (pl.program_id(i) for i in range(3))
    parts = range(call.parts)
    places = [call.place(ib, ih, t, refs.outer, refs.inner, part=i) for i in parts]
    return t, places, [refs.inner[t * call.parts + i] for i in parts]


def _state(entries):
    """States of the parts, and of their step: FULL if all are, PARTIAL if any part is listed."""
    states = [entry & tpu_steps.STATE for entry in entries]
    least, most = functools.reduce(jnp.minimum, states), functools.reduce(jnp.maximum, states)
    return states, jnp.where(least == 2, 2, jnp.minimum(most, 1))


def _keys_values(call, refs, dim):
    """Keys (the first `dim` lanes) and values of the parts of a step, one below the other."""
    parts = [getattr(refs, f"kv{i}") for i in range(call.parts)]
    return (_concatenate([x[0, :, at] for x in parts], 0) for at in (slice(dim), slice(dim, None)))


def _branches(state, body):
    """Runs body(masked) by the state of the tile: FULL runs no mask code."""
    pl.when(state == 2)(lambda: body(False))
    pl.when(state == 1)(lambda: body(True))


def _visible(call, refs, t, place):
    """Element mask of a tile, [q, kv] forward, [kv, q] backward; bool."""
    inputs, mask = call.inputs, call.mask
    _, _, _, row, col, entry = place
    queries, keys = (0, 1) if call.step == "forward" else (1, 0)
    shape = tpu_launch.mask_shape(call)

    def along(axis, ids):
        """(1, n) values of tokens -> values along `axis` of the tile."""
        if axis == 1:
            return ids
        return _in_lanes(_column(ids), shape[1])

    kv_at = lax.broadcasted_iota(jnp.int32, shape, keys) + col * call.tile_kv
    if inputs.q_positions is None:
        q_pos = lax.broadcasted_iota(jnp.int32, shape, queries) + row * call.tile_q
        kv_pos = kv_at
    else:
        q_pos, kv_pos = along(queries, refs.q_pos[0]), along(keys, refs.kv_pos[0])

    def by_rule(rule):
        if rule is None:
            bits = refs.bits[0].astype(jnp.float32)
            return (bits if queries == 0 else bits.T) > 0
        return jnp.broadcast_to(rule.mask_fn(q_pos, kv_pos), shape)

    if len(mask.rules) == 1:
        seen = by_rule(mask.rules[0])
    else:
        # Only the rule is compiled once per table, not the products.
        rule_of = refs.rule_of[entry]
        for i, rule in enumerate(mask.rules):

            @pl.when(rule_of == i)
            def _(rule=rule):
                refs.visible[...] = by_rule(rule).astype(jnp.int32)

        seen = refs.visible[...] != 0
    if inputs.q_segment_ids is not None:
        q_ids, kv_ids = along(queries, refs.q_ids[0]), along(keys, refs.kv_ids[0])
        seen = seen & (q_ids == kv_ids) & (q_ids != 0)
    if mask.kv_len % call.steps.fine_kv:
        seen = seen & (kv_at < mask.kv_len)
    if call.steps.words is not None:
        states = _states(call, refs, t, queries, shape)
        seen = (states == 2) | ((states == 1) & seen)
    return seen


def _states(call, refs, t, queries, shape):
    """The states of the blocks of a tile, int32, by element."""
    steps = call.steps
    fine = (steps.fine_q, steps.fine_kv)
    per_row = call.tile_kv // steps.fine_kv
    words = [refs.words[t * steps.num_words + i] for i in range(steps.num_words)]
    lane = lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
    strip = fine[queries if queries == 0 else 1]
    lane_block = lane // fine[1 - queries if queries == 0 else 0]
    strips = []
    for i in range(shape[0] // strip):
        position = i * per_row + lane_block if queries == 0 else lane_block * per_row + i
        states = jnp.zeros_like(lane)
        for w, word in enumerate(words):
            found = jnp.full_like(lane, word) >> (2 * (position & 15)) & 3
            states = states + jnp.where(position >> 4 == w, found, 0)
        strips.append(jnp.broadcast_to(states, (strip, shape[1])))
    return strips[0] if len(strips) == 1 else jnp.concatenate(strips, 0)


def _column(x):
    """(1, n) -> (n, 128), each row one value."""
    return jnp.broadcast_to(x, (tpu_launch.LANES, x.shape[1])).T


def _in_lanes(x, width):
    """(n, 128) of equal lanes -> (n, width)."""
    return jnp.tile(x, (1, -(-width // tpu_launch.LANES)))[:, :width]


def _dot(a, b, contract):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, ((contract[:1], contract[1:]), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _logits(call, products):
    """Scaled and capped logits, and tanh of the cap (None without)."""
    scale, cap = call.inputs.scale, call.inputs.logits_soft_cap
    if cap is None:
        return products * scale, None
    tanh = jnp.tanh(products * (scale / cap))
    return tanh * cap, tanh


def _stack(ref, heads, dim):
    """[1, tokens, group * dim] -> [heads * tokens, dim]."""
    return _concatenate([ref[0, :, g * dim : (g + 1) * dim] for g in heads], 0)


def _hide(call, refs, logits, visible, keys):
    """Bias and mask on `[group * q, keys]` logits."""
    if "bias" not in vars(refs) and visible is None:
        return logits
    shape = logits.shape
    logits = logits.reshape(call.group, call.tile_q, -1)
    if "bias" in vars(refs):
        bias = refs.bias[0, 0, :, keys][:, None, :]
        logits = jnp.where(bias == -jnp.inf, -jnp.inf, logits + bias)
    if visible is not None:
        logits = jnp.where(visible[None, :, keys], logits, -jnp.inf)
    return logits.reshape(shape)


def _concatenate(parts, axis):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _visible_parts(call, refs, t, places, states):
    """Element mask of the tiles of a step side by side, along the keys."""
    if call.parts == 1:
        return _visible(call, refs, t, places[0])
    found = []
    for place, state in zip(places, states, strict=True):
        seen = _visible(call, refs, t, place)
        state = jnp.full(seen.shape, state)
        found.append(((seen & (state == 1)) | (state == 2)).astype(jnp.int32))
    return jnp.concatenate(found, 1 if call.step == "forward" else 0) != 0


def _forward(call, refs):
    t, places, entries = _step(call, refs)
    states, state = _state(entries)
    group, tile_q = call.group, call.tile_q
    dim, v_dim = refs.q_rows.shape[1], refs.acc.shape[1]
    unit = tpu_launch.unit(call.inputs)

    @pl.when(entries[0] & tpu_steps.FIRST != 0)
    def _():
        refs.q_rows[...] = _stack(refs.q, range(group), dim)
        refs.acc[...] = jnp.zeros_like(refs.acc)
        if "sinks" not in vars(refs):
            refs.top[...] = jnp.full_like(refs.top, -jnp.inf)
            refs.sum[...] = jnp.zeros_like(refs.sum)
        else:
            for g in range(group):
                sink = jnp.full((tile_q, tpu_launch.LANES), refs.sinks[places[0][1], g])
                refs.top[g * tile_q : (g + 1) * tile_q] = sink
                one = jnp.where(sink == -jnp.inf, 0.0, 1.0)
                refs.sum[g * tile_q : (g + 1) * tile_q] = one

    def body(masked):
        hides = masked or "bias" in vars(refs)
        keys_of_step = call.parts * call.tile_kv
        visible = _visible_parts(call, refs, t, places, states) if masked else None
        ks, vs = _keys_values(call, refs, dim)
        # Masks take registers: half the keys at a time then spills less.
        halves = masked and group * tile_q * keys_of_step >= 1 << 19
        width = keys_of_step // 2 if halves else keys_of_step
        for start in range(0, keys_of_step, width):
            keys = slice(start, start + width)
            k, v = ks[keys], vs[keys]
            logits = _dot(refs.q_rows[...], k, (1, 1))
            if not tpu_launch.is_plain(call.inputs):
                logits, _ = _logits(call, logits)
            logits = _hide(call, refs, logits, visible, keys)
            before = refs.top[...]
            top = jnp.maximum(before, logits.max(1, keepdims=True))
            refs.top[...] = top
            if hides:
                top = jnp.where(top == -jnp.inf, 0, top)  # -inf - -inf is nan.
            weights = jnp.exp2((logits - _in_lanes(top, width)) * (unit * tpu_launch.LOG2E))
            decay = jnp.exp2((before - top) * (unit * tpu_launch.LOG2E))
            refs.sum[...] = refs.sum[...] * decay + weights.sum(1, keepdims=True)
            refs.acc[...] = refs.acc[...] * _in_lanes(decay, v_dim) + _dot(
                weights.astype(v.dtype), v, (1, 0)
            )

    _branches(state, body)

    @pl.when(entries[-1] & tpu_steps.LAST != 0)
    def _():
        total = refs.sum[...]
        empty = total == 0
        safe = jnp.where(empty, 1, total)
        out = refs.acc[...] * _in_lanes(1 / safe, v_dim)
        lse = jnp.where(empty, -jnp.inf, refs.top[...] * unit + jnp.log(safe))
        for g in range(group):
            rows = slice(g * tile_q, (g + 1) * tile_q)
            refs.out[0, :, g * v_dim : (g + 1) * v_dim] = out[rows].astype(refs.out.dtype)
            refs.lse[0, 0, g : g + 1] = lse[rows].T[:1]


def _recompute(call, k, q, lse, visible, bias=None):
    """Weights [keys, queries] from their lse (in powers of 2), and tanh of the cap or None."""
    if call.inputs.logits_soft_cap is None:
        logits, tanh = _dot(k, q, (1, 1)) * (call.inputs.scale * tpu_launch.LOG2E), None
    else:
        logits, tanh = _logits(call, _dot(k, q, (1, 1)))
        logits = logits * tpu_launch.LOG2E
    if bias is not None:
        logits = logits + bias * tpu_launch.LOG2E
    weights = jnp.exp2(logits - lse)
    # Last, since lse and the logits of a query are nan where it sees a nan.
    return weights if visible is None else jnp.where(visible, weights, 0), tanh


def _dlogits(weights, dweights, delta, visible):
    """The products of a hidden value may overflow, and 0 * inf is nan: they are masked last."""
    dlogits = weights * (dweights - delta)
    return dlogits if visible is None else jnp.where(visible, dlogits, 0)


def _backward_row(call, refs):
    t, places, entries = _step(call, refs)
    states, state = _state(entries)
    group, tile_q, tile_kv = call.group, call.tile_q, call.tile_kv
    dim, width = refs.dq_acc.shape[1], refs.sums.shape[3]
    sums = tpu_sums.Sums(refs, [
        refs.dkv.at[
            b, pl.ds(jnp.where(state > 0, col, call.cols) * tile_kv, tile_kv),
            pl.ds(kv_head * width, width),
        ]
        for (b, _, kv_head, _, col, _), state in zip(places, states, strict=True)
    ])  # fmt: skip
    pl.when(t == 0)(sums.reset)
    pl.when(state != 0)(lambda: sums.begin(entries[0] & tpu_steps.AGAIN != 0))

    @pl.when(entries[0] & tpu_steps.FIRST != 0)
    def _():
        refs.dq_acc[...] = jnp.zeros_like(refs.dq_acc)

    def body(masked):
        k, v = _keys_values(call, refs, dim)
        heads = max(1, min(group, _ROWS_AT_ONCE // tile_q))
        visible = _visible_parts(call, refs, t, places, states) if masked else None
        dk = dv = 0
        for g in range(0, group, heads):
            together = range(g, min(g + heads, group))
            rows = slice(g * tile_q, together.stop * tile_q)
            lse, delta = (
                _concatenate([x[0, 0, i : i + 1] for i in together], 1)
                for x in (refs.lse, refs.delta)
            )
            seen = visible
            if masked and len(together) > 1:
                seen = jnp.concatenate([visible.astype(jnp.int32)] * len(together), 1) != 0
            q, dout = (_stack(x, together, x.shape[2] // group) for x in (refs.q, refs.dout))
            weights, tanh = _recompute(call, k, q, lse, seen)
            dlogits = _dlogits(weights, _dot(v, dout, (1, 1)), delta, seen)
            if tanh is not None:
                dlogits = dlogits * (1 - tanh * tanh)
            dlogits = dlogits.astype(q.dtype)
            dv += _dot(weights.astype(dout.dtype), dout, (1, 0))
            dk += _dot(dlogits, q, (1, 0))
            refs.dq_acc[rows] += _dot(dlogits, k, (0, 0))
        tiles = sums.tiles()
        for i in range(call.parts):
            keys = slice(i * tile_kv, (i + 1) * tile_kv)
            tiles[i, :, :dim] += dk[keys]
            tiles[i, :, dim:] += dv[keys]
        sums.end()

    _branches(state, body)

    @pl.when(entries[-1] & tpu_steps.LAST != 0)
    def _():
        for g in range(group):
            dq = refs.dq_acc[g * tile_q : (g + 1) * tile_q] * call.inputs.scale
            refs.dq[0, :, g * dim : (g + 1) * dim] = dq.astype(refs.dq.dtype)

    pl.when(t == pl.num_programs(2) - 1)(sums.drain)


def _backward_col(call, refs):
    t, (place,), (flags,) = _step(call, refs)
    group = call.group
    dim, v_dim = refs.dk_acc.shape[1], refs.dv_acc.shape[1]
    has_bias = "bias" in vars(refs)
    b, q_head, _, row, _, _ = place
    sums = tpu_sums.Sums(refs, [
        refs.dq.at[
            b, pl.ds(row * call.tile_q, call.tile_q), pl.ds(q_head * group * dim, group * dim)
        ]
    ])  # fmt: skip
    pl.when(t == 0)(sums.reset)
    pl.when(flags & tpu_steps.STATE != 0)(lambda: sums.begin(flags & tpu_steps.AGAIN != 0))

    @pl.when(flags & tpu_steps.FIRST != 0)
    def _():
        refs.dk_acc[...] = jnp.zeros_like(refs.dk_acc)
        refs.dv_acc[...] = jnp.zeros_like(refs.dv_acc)
        if has_bias:
            refs.dbias_acc[...] = jnp.zeros_like(refs.dbias_acc)

    def body(masked):
        k, v = _keys_values(call, refs, dim)
        visible = _visible(call, refs, t, place) if masked else None
        dq = []
        for g in range(group):
            q, dout = (
                ref[0, :, g * d : (g + 1) * d] for ref, d in ((refs.q, dim), (refs.dout, v_dim))
            )
            bias, seen = None, visible
            if has_bias:
                bias = refs.bias[0, 0, g : g + 1] if refs.bias.shape[2] > 1 else refs.bias[0, 0]
                bias = _in_lanes(_column(bias), call.tile_q)
                seen = bias != -jnp.inf if seen is None else seen & (bias != -jnp.inf)
            weights, tanh = _recompute(call, k, q, refs.lse[0, 0, g : g + 1], seen, bias)
            refs.dv_acc[...] += _dot(weights.astype(dout.dtype), dout, (1, 0))
            delta = refs.delta[0, 0, g : g + 1]
            dlogits = _dlogits(weights, _dot(v, dout, (1, 1)), delta, seen)
            if has_bias:
                slot = 0
                if refs.dbias_acc.shape[0] > 1:
                    slot = g if group > 1 else lax.rem(q_head, refs.dbias_acc.shape[0])
                refs.dbias_acc[slot] += jnp.broadcast_to(
                    dlogits.sum(1, keepdims=True), refs.dbias_acc.shape[1:]
                )
            if tanh is not None:
                dlogits = dlogits * (1 - tanh * tanh)
            dlogits = dlogits.astype(q.dtype)
            refs.dk_acc[...] += _dot(dlogits, q, (1, 0))
            dq.append(_dot(dlogits, k, (0, 0)))
        tiles = sums.tiles()
        for g, part in enumerate(dq):
            tiles[0, :, g * dim : (g + 1) * dim] += part
        sums.end()

    _branches(flags & tpu_steps.STATE, body)

    @pl.when(flags & tpu_steps.LAST != 0)
    def _():
        refs.dk[0] = (refs.dk_acc[...] * call.inputs.scale).astype(refs.dk.dtype)
        refs.dv[0] = refs.dv_acc[...].astype(refs.dv.dtype)
        if has_bias:
            for i in range(refs.dbias_acc.shape[0]):
                refs.dbias[0, 0, i : i + 1] = refs.dbias_acc[i].T[:1]

    pl.when(t == pl.num_programs(2) - 1)(sums.drain)
