"""Portable blockwise attention in plain JAX: any device, static and run-time masks.

One scan visits the rows (a query block of some heads and batch entries); an inner loop with the
row's own trip count visits its listed KV blocks, a chunk of them at a time, gathered side by side
so that each step is one large product. The program does not grow with the number of blocks, and
nothing of size T x S exists.  [arXiv:2205.14135, alg. 1 and 4]
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.masks import block_mask
from sparse_attn.ops import softmax
from sparse_attn.ops.block_sparse import inputs as inputs_lib

# Elements of one tile of logits: 2 MB in float32, what the caches of two CPU cores hold.
_TILE = 1 << 19
# What a step costs besides its products, as so many more keys; measured on CPU.
_STEP_KEYS = 64
# Keys per step when the counts are not known while tracing.
_RUN_TIME_KEYS = 256


def check(inputs: inputs_lib.Inputs) -> None:
    """Takes everything."""


class _Layout(NamedTuple):
    """How batch, heads and blocks are cut into units: (batch part, head slot, row).

    A slot is a set of consecutive heads with one table. Blocked queries are
    `[parts, slots, rows, part, kv_heads, group, block_q, H]`, keys
    `[parts, kv_slots, part, kv_heads, cols, block_kv, H]`.
    """

    parts: int
    part: int
    slots: int
    kv_slots: int
    kv_heads: int
    group: int
    chunk: int
    tables: np.ndarray  # [slots]

    def of_batch(self, size: int) -> tuple[int, int]:
        """(parts, part) of an array whose batch axis is `size`, 1 or the batch."""
        return (1, 1) if size == 1 else (self.parts, self.part)


def _layout(inputs: inputs_lib.Inputs) -> _Layout:
    mask = inputs.mask
    batch, _, heads, _ = inputs.q.shape
    num_kv_heads = inputs.k.shape[2]
    tables = mask.tables_of_heads(heads)
    slots = min(
        n for n in range(1, heads + 1)
        if heads % n == 0 and (num_kv_heads % n == 0 or n % num_kv_heads == 0)
        and (tables.reshape(n, -1) == tables[:: heads // n, None]).all()
    )  # fmt: skip
    kv_slots = min(slots, num_kv_heads)
    kv_heads = num_kv_heads // kv_slots
    group = heads // slots // kv_heads
    row = kv_heads * group * mask.block_q
    part = 1
    if mask.batch == 1:
        # Batch entries of one mask go together first: they add no padding, unlike more blocks.
        part = max(
            d for d in range(1, batch + 1)
            if batch % d == 0 and (d == 1 or d * row * mask.block_kv <= _TILE)
        )  # fmt: skip
    most = max(1, min(mask.max_kv, _TILE // (part * row * mask.block_kv)))
    return _Layout(
        batch // part, part, slots, kv_slots, kv_heads, group,
        _chunk(mask, most), tables[:: heads // slots],
    )  # fmt: skip


def _chunk(mask: block_mask.BlockMask, most: int) -> int:
    """KV blocks per step, at most `most`."""
    if not mask.is_static:
        return min(most, max(1, _RUN_TIME_KEYS // mask.block_kv))
    counts, rows = np.unique(mask.kv_counts, return_counts=True)
    sizes = np.arange(1, most + 1)
    steps = (-(-counts[:, None] // sizes) * rows[:, None]).sum(0)
    return int(sizes[np.argmin(steps * (sizes * mask.block_kv + _STEP_KEYS))])


# --- Cutting into blocks --------------------------------------------------------------------------


def _pad(x, axis, block, value=0):
    """Pads an axis to a multiple of `block` and splits it into (blocks, block)."""
    length = x.shape[axis]
    blocks = -(-length // block)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, blocks * block - length)
    if widths[axis][1]:
        x = jnp.pad(x, widths, constant_values=value)
    return x.reshape(*x.shape[:axis], blocks, block, *x.shape[axis + 1 :])


def _rows_of(x, lay: _Layout, block, value=0):
    """`[B, T, N, ..]` to `[parts * slots * rows, part, kv_heads, group, block, ..]`."""
    x = _pad(x, 1, block, value)
    x = x.reshape(
        lay.parts, lay.part, *x.shape[1:3], lay.slots, lay.kv_heads, lay.group, *x.shape[4:]
    )
    x = jnp.moveaxis(x, (4, 2, 1, 5, 6, 3), (1, 2, 3, 4, 5, 6))
    return x.reshape(-1, *x.shape[3:])


def _rows_back(x, lay: _Layout, length):
    """The inverse of `_rows_of`."""
    x = x.reshape(lay.parts, lay.slots, -1, *x.shape[1:])
    x = jnp.moveaxis(x, (1, 2, 3, 4, 5, 6), (4, 2, 1, 5, 6, 3))
    x = x.reshape(lay.parts * lay.part, -1, lay.slots * lay.kv_heads * lay.group, *x.shape[7:])
    return x[:, :length]


def _cols_of(x, lay: _Layout, block):
    """`[B, S, K, D]` to `[parts * kv_slots, part, kv_heads, cols, block, D]`."""
    x = _pad(x, 1, block)
    x = x.reshape(lay.parts, lay.part, *x.shape[1:3], lay.kv_slots, lay.kv_heads, x.shape[-1])
    x = jnp.moveaxis(x, (4, 1, 5, 2, 3), (1, 2, 3, 4, 5))
    return x.reshape(-1, *x.shape[2:])


def _transposed(x):
    """Blocked keys with D before the tokens: products then need no transposed tile."""
    return jnp.moveaxis(x, -1, 3)


def _cols_back(x, lay: _Layout, length):
    """`[B, S, K, D]` from transposed blocked keys."""
    x = x.reshape(lay.parts, lay.kv_slots, *x.shape[1:])
    x = jnp.moveaxis(x, (1, 2, 3, 4, 5, 6), (4, 1, 5, 6, 2, 3))
    x = x.reshape(lay.parts * lay.part, -1, lay.kv_slots * lay.kv_heads, x.shape[-1])
    return x[:, :length]


def _bias_of(bias, lay: _Layout, block):
    """`[B, 1 or N, S]` to `[parts * (1 or slots), part, (1 or) kv_heads, group, cols, block]`."""
    heads = (1, 1, 1) if bias.shape[1] == 1 else (lay.slots, lay.kv_heads, lay.group)
    x = _pad(bias, 2, block)
    x = x.reshape(lay.parts, lay.part, *heads, *x.shape[2:]).swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])


def _bias_back(x, lay: _Layout, shape):
    """The inverse of `_bias_of`, for a bias of `shape`."""
    x = x.reshape(lay.parts, -1, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(*shape[:2], -1)[..., : shape[2]]


def _take(x, slab, at, axis):
    """Blocks `at` of `axis` from `x[slab]`, side by side: `[.., len(at) * block, ..]`."""
    at = _places(slab, at)
    out_axes = tuple(i for i in range(x.ndim - 1) if i != axis - 1)
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=out_axes, collapsed_slice_dims=(0, axis), start_index_map=(0, axis)
    )
    sizes = tuple(1 if i in (0, axis) else n for i, n in enumerate(x.shape))
    y = jax.lax.gather(x, at, numbers, sizes, mode="promise_in_bounds")
    return y.reshape(*y.shape[: axis - 1], -1, *y.shape[axis + 1 :])


def _add(x, slab, at, axis, update):
    """Adds blocks that lie side by side to `x[slab]` at the places `_take` takes them from."""
    shape = (*x.shape[1:axis], at.shape[0], *x.shape[axis + 1 :])
    update_axes = tuple(i for i in range(x.ndim - 1) if i != axis - 1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=update_axes, inserted_window_dims=(0, axis),
        scatter_dims_to_operand_dims=(0, axis),
    )  # fmt: skip
    return jax.lax.scatter_add(
        x, _places(slab, at), update.reshape(shape), numbers, mode="promise_in_bounds"
    )


def _places(slab, at):
    return jnp.stack([jnp.broadcast_to(slab, at.shape), at], -1)


# --- The lists ------------------------------------------------------------------------------------


class _Unit(NamedTuple):
    """One row of the scan: where its list lies and where its keys are."""

    offset: Any  # Of its list in the flattened indices.
    count: Any
    partial: Any
    part: Any
    slot: Any
    table: Any  # Its rule, and with the mask's batch entry its bits.
    bits: Any  # First slot of its table in the flattened bits.
    row: Any


class _Keys(NamedTuple):
    """One step's listed blocks."""

    at: Any  # [chunk], 0 where nothing is listed.
    visible: Any  # bool [1 or part, 1, 1, block_q, keys]


def _units(mask, lay: _Layout) -> _Unit:
    """All rows in the order of the scan, int32 `[parts * slots * rows]` each."""
    part, slot, row = (
        x.ravel().astype(np.int32) for x in np.mgrid[: lay.parts, : lay.slots, : mask.num_rows]
    )
    entry = part if mask.batch > 1 else np.zeros_like(part)
    table = lay.tables[slot]
    where = (entry, table, row)
    first = entry * mask.num_tables + table
    bits = first * (0 if mask.bits is None else mask.bits.shape[2])
    return _Unit(
        mask.kv_starts[where] + first * mask.kv_indices.shape[-1],
        mask.kv_counts[where], mask.kv_partial_counts[where], part, slot, table, bits, row,
    )  # fmt: skip


def _lister(inputs: inputs_lib.Inputs, lay: _Layout):
    """`f(unit, j) -> _Keys`: the j-th chunk of a row's list and what of it is visible."""
    mask, chunk = inputs.mask, lay.chunk
    block_q, block_kv = mask.block_q, mask.block_kv
    # A slice at the end of the last list must not be shifted back.
    indices, slots = (
        None if x is None else jnp.pad(jnp.ravel(x), (0, chunk)) for x in
        (mask.kv_indices, mask.kv_bits)
    )  # fmt: skip
    bits = None
    if mask.bits is not None:
        bits = jnp.asarray(mask.bits).reshape(-1, block_q, block_kv)

    def blocked(x, block):
        """`[1 or B, length]` to `[1 or parts, 1 or part, blocks, block]`."""
        if x is None:
            return None
        x = _pad(x, 1, block)
        return x.reshape(*lay.of_batch(x.shape[0]), *x.shape[1:])

    q_ids, q_pos = (blocked(x, block_q) for x in (inputs.q_segment_ids, inputs.q_positions))
    kv_ids, kv_pos = (blocked(x, block_kv) for x in (inputs.kv_segment_ids, inputs.kv_positions))

    def of_queries(x, unit):
        part = unit.part if x.shape[0] > 1 else 0
        return jax.lax.dynamic_index_in_dim(x[part], unit.row, 1, keepdims=False)[..., None]

    def of_keys(x, unit, at):
        return _take(x, unit.part if x.shape[0] > 1 else 0, at, 2)[:, None, :]

    def by_bits(unit, j, q_at, kv_at):
        listed = jax.lax.dynamic_slice(slots, (unit.offset + j * chunk,), (chunk,))
        tile = bits[unit.bits + jnp.maximum(listed, 0)]
        return (tile.swapaxes(0, 1).reshape(1, block_q, -1) != 0) & (q_at == q_at)

    def by_rule(rule):
        def evaluate(unit, j, q_at, kv_at):
            return rule.mask_fn(q_at, kv_at) & (q_at == q_at) & (kv_at == kv_at)

        return by_bits if rule is None else evaluate

    rules = [by_rule(mask.rule(table)) for table in sorted(set(lay.tables.tolist()))]
    if len(set(mask.rules)) == 1:
        rules = rules[:1]
    order = np.searchsorted(np.unique(lay.tables), np.arange(mask.num_tables))

    def elements(unit, j, at):
        """The element rule of the chunk, bool `[1 or part, block_q, keys]`."""
        index = (at[:, None] * block_kv + jnp.arange(block_kv, dtype=jnp.int32)).reshape(1, 1, -1)
        if q_pos is None:
            q_at = unit.row * block_q + jnp.arange(block_q, dtype=jnp.int32)[None, :, None]
            kv_at = index
        else:
            q_at, kv_at = of_queries(q_pos, unit), of_keys(kv_pos, unit, at)
        if len(rules) == 1:
            seen = rules[0](unit, j, q_at, kv_at)
        else:
            which = jnp.asarray(order, jnp.int32)[unit.table]
            seen = jax.lax.switch(which, rules, unit, j, q_at, kv_at)
        if q_ids is not None:
            mine = of_queries(q_ids, unit)
            seen = seen & (mine == of_keys(kv_ids, unit, at)) & (mine != 0)
        if mask.kv_len % block_kv:
            seen = seen & (index < mask.kv_len)
        return seen

    def keys(unit: _Unit, j) -> _Keys:
        place = j * chunk + jnp.arange(chunk, dtype=jnp.int32)
        at = jax.lax.dynamic_slice(indices, (unit.offset + j * chunk,), (chunk,))
        at = jnp.where(place < unit.count, at, 0)
        listed, full = (
            jnp.repeat(x, block_kv) for x in (place < unit.count, place >= unit.partial)
        )
        shape = jax.eval_shape(lambda: elements(unit, j, at)).shape
        # The branch keeps costly rules out of FULL chunks, and makes the tile once for all heads.
        visible = jax.lax.cond(
            j * chunk < unit.partial,
            lambda: (elements(unit, j, at) | full) & listed,
            lambda: jnp.broadcast_to(listed, shape),
        )
        return _Keys(at, visible[:, None, None])

    return keys


# --- Forward and backward -------------------------------------------------------------------------


def _finite(inputs: inputs_lib.Inputs):
    """k and v with the tokens zeroed that hold a non-finite number, and which those are."""
    k, v = inputs.k, inputs.v
    bad = ~(jnp.isfinite(k).all(-1) & jnp.isfinite(v).all(-1))[..., None]
    return jnp.where(bad, 0, k), jnp.where(bad, 0, v), bad


def _logits(inputs, q, k, bias, keys: _Keys):
    """Logits `[part, kv_heads, group, block_q, keys]`, -inf where hidden, and the cap's slope."""
    z = softmax.dot("bkgqh,bkhz->bkgqz", q, k, q.dtype) * inputs.scale
    slope = None
    if inputs.logits_soft_cap is not None:
        tanh = jnp.tanh(z / inputs.logits_soft_cap)
        z, slope = tanh * inputs.logits_soft_cap, 1 - tanh * tanh
    if bias is not None:
        z = z + bias[..., None, :]
    return jnp.where(keys.visible, z, -jnp.inf), slope


def forward(inputs: inputs_lib.Inputs) -> tuple[jax.Array, jax.Array]:
    """`out [B, T, N, Hv]` in q's dtype and `lse [B, T, N]` float32.

    A non-finite key or value makes the queries that see it nan, and no other.
    """
    mask, lay, dtype = inputs.mask, _layout(inputs), softmax.operand_dtype(inputs.q.dtype)
    k, v, bad = _finite(inputs)
    # A nan key spoils one column of the logits, which is hidden where the key is; values are
    # multiplied by weights of 0 there, so they must be finite.
    k = _transposed(_cols_of(jnp.where(bad, jnp.nan, k).astype(dtype), lay, mask.block_kv))
    v = _cols_of(v.astype(dtype), lay, mask.block_kv)
    q = _rows_of(inputs.q.astype(dtype), lay, mask.block_q)
    bias = None
    if inputs.key_bias is not None:
        bias = _bias_of(inputs.key_bias, lay, mask.block_kv)
    keys_of = _lister(inputs, lay)
    sinks = None
    if inputs.sink_logits is not None:
        sinks = inputs.sink_logits.reshape(lay.slots, 1, lay.kv_heads, lay.group, 1)

    def visit(_, xs):
        unit, q = xs
        slab = _slab(unit, lay)

        def step(carry):
            j, top, total, acc = carry
            keys = keys_of(unit, j)
            here = None if bias is None else _take_bias(bias, unit, lay, keys.at)
            z, _ = _logits(inputs, q, _take(k, slab, keys.at, 4), here, keys)
            new = jnp.maximum(top, z.max(-1))
            safe = jnp.where(new == -jnp.inf, 0, new)
            p = jnp.exp(z - safe[..., None])
            fade = jnp.exp(top - safe)
            acc = acc * fade[..., None] + softmax.dot(
                "bkgqz,bkzh->bkgqh", p, _take(v, slab, keys.at, 3), dtype
            )
            return j + 1, new, total * fade + p.sum(-1), acc

        shape = q.shape[:-1]
        start = (
            jnp.int32(0), jnp.full(shape, -jnp.inf), jnp.zeros(shape),
            jnp.zeros((*shape, v.shape[-1])),
        )  # fmt: skip
        _, top, total, acc = jax.lax.while_loop(
            lambda carry: carry[0] * lay.chunk < unit.count, step, start
        )
        if sinks is not None:
            sink = sinks[unit.slot]
            new = jnp.maximum(top, sink)
            fade = jnp.exp(top - new)
            top, total, acc = new, total * fade + jnp.exp(sink - new), acc * fade[..., None]
        empty = total == 0
        safe = jnp.where(empty, 1, total)
        return None, (acc / safe[..., None], jnp.where(empty, -jnp.inf, top + jnp.log(safe)))

    _, (out, lse) = jax.lax.scan(visit, None, (_units(mask, lay), q))
    out = _rows_back(out.astype(inputs.q.dtype), lay, mask.q_len)
    return out, _rows_back(lse, lay, mask.q_len)


def backward(
    inputs: inputs_lib.Inputs, lse: jax.Array, dout: jax.Array, delta: jax.Array
) -> inputs_lib.Grads:
    """Gradients in one pass over the rows, which recomputes the weights from `lse`.

    dk and dv are summed in place, block by block: a second pass over the columns would be
    deterministic as well, but compute two of five products twice.
    """
    mask, lay, dtype = inputs.mask, _layout(inputs), softmax.operand_dtype(inputs.q.dtype)
    # A spoiled row has a nan lse and is finite otherwise: its weights are nan exactly where it
    # sees a key, and 0 elsewhere. Rows that see nothing, and those past the end, get weights of 0.
    spoiled = ~(jnp.isfinite(delta) & jnp.isfinite(inputs.q).all(-1)) | jnp.isnan(lse)
    q, dout = (jnp.where(spoiled[..., None], 0, x) for x in (inputs.q, dout))
    delta = jnp.where(spoiled, 0, delta)
    lse = jnp.where(spoiled, jnp.nan, jnp.where(lse == -jnp.inf, jnp.inf, lse))
    q, dout = (_rows_of(x.astype(dtype), lay, mask.block_q) for x in (q, dout))
    lse = _rows_of(lse, lay, mask.block_q, jnp.inf)
    delta = _rows_of(delta, lay, mask.block_q)
    k, v = (_cols_of(x.astype(dtype), lay, mask.block_kv) for x in _finite(inputs)[:2])
    k_t, v_t = _transposed(k), _transposed(v)
    bias = None
    if inputs.key_bias is not None:
        bias = _bias_of(inputs.key_bias, lay, mask.block_kv)
    keys_of = _lister(inputs, lay)

    def visit(sums, xs):
        unit, q, dout, lse, delta = xs
        slab = _slab(unit, lay)
        q_t, dout_t = (jnp.moveaxis(x, -1, 2) for x in (q, dout))

        def step(carry):
            j, dq, (dk, dv, dbias) = carry
            keys = keys_of(unit, j)
            here = None if bias is None else _take_bias(bias, unit, lay, keys.at)
            z, slope = _logits(inputs, q, _take(k_t, slab, keys.at, 4), here, keys)
            hidden = z == -jnp.inf
            p = jnp.where(hidden, 0, jnp.exp(z - lse[..., None]))
            dp = softmax.dot("bkgqh,bkhz->bkgqz", dout, _take(v_t, slab, keys.at, 4), dtype)
            # A hidden value may be so large that its dp overflows, and 0 * inf is nan.
            dz = jnp.where(hidden, 0, p * (dp - delta[..., None]))
            if dbias is not None:
                dbias = _add_bias(dbias, unit, lay, keys.at, dz.sum(-2))
            if slope is not None:
                dz = dz * slope
            dq = dq + softmax.dot("bkgqz,bkzh->bkgqh", dz, _take(k, slab, keys.at, 3), dtype)
            dk = _add(dk, slab, keys.at, 4, softmax.dot("bkhgq,bkgqz->bkhz", q_t, dz, dtype))
            dv = _add(dv, slab, keys.at, 4, softmax.dot("bkhgq,bkgqz->bkhz", dout_t, p, dtype))
            return j + 1, dq, (dk, dv, dbias)

        _, dq, sums = jax.lax.while_loop(
            lambda carry: carry[0] * lay.chunk < unit.count,
            step,
            (jnp.int32(0), jnp.zeros(q.shape, jnp.float32), sums),
        )
        return sums, dq

    sums = tuple(None if x is None else jnp.zeros(x.shape, jnp.float32) for x in (k_t, v_t, bias))
    xs = (_units(mask, lay), q, dout, lse, delta)
    (dk, dv, dbias), dq = jax.lax.scan(visit, sums, xs)
    return inputs_lib.Grads(
        (_rows_back(dq, lay, mask.q_len) * inputs.scale).astype(inputs.q.dtype),
        (_cols_back(dk, lay, mask.kv_len) * inputs.scale).astype(inputs.k.dtype),
        _cols_back(dv, lay, mask.kv_len).astype(inputs.v.dtype),
        None if dbias is None else _bias_back(dbias, lay, inputs.key_bias.shape),
    )


def _slab(unit: _Unit, lay: _Layout):
    """Which leading entry of the blocked keys a unit reads."""
    return unit.part * lay.kv_slots + unit.slot * lay.kv_slots // lay.slots


def _bias_slab(bias, unit, lay):
    slots = math.prod(bias.shape[:1]) // lay.parts
    return unit.part * slots + (unit.slot if slots > 1 else 0)


def _take_bias(bias, unit, lay, at):
    return _take(bias, _bias_slab(bias, unit, lay), at, 4)


def _add_bias(dbias, unit, lay, at, update):
    """Adds `[part, kv_heads, group, keys]`, summed over heads where the bias is shared."""
    if dbias.shape[2:4] != update.shape[1:3]:
        update = update.sum((1, 2), keepdims=True)
    return _add(dbias, _bias_slab(dbias, unit, lay), at, 4, update)
