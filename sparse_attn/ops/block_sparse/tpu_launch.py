"""Launching the TPU kernels: tiles, operands, and the grid over a work list in scalar memory."""

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_attn.ops import tiles
from sparse_attn.ops.block_sparse import inputs as inputs_lib
from sparse_attn.ops.block_sparse import tpu_steps

LANES = 128
LOG2E = math.log2(math.e)
GATHERED = 4  # Tiles of keys in one step where blocks lie far apart.
_MAX_GROUP = 16  # Heads in one block of queries; larger groups go head by head.
_NOTHING = 1e30  # In place of the lse of a row that sees nothing: exp(logit - 1e30) is 0.


@dataclasses.dataclass(frozen=True)
class Call:
    """One kernel launch: what its steps mean.

    Attributes:
      step: "forward" or "backward".
      by: the output side, "rows" (queries) or "cols" (keys). A backward by rows writes dq and sums
        dk and dv over its steps in HBM, by columns the reverse.
      group: query heads of one q block, stacked.
      units, repeats: tables in the list, and heads that share each.
      heads: tables that add to one output row.
      parts: tiles of keys that one step gathers.
    """

    inputs: inputs_lib.Inputs
    mask: Any
    step: str
    by: str
    tile_q: int
    tile_kv: int
    group: int
    repeats: int
    tables: np.ndarray
    parts: int
    steps: tpu_steps.Steps

    @property
    def units(self):
        return len(self.tables)

    @property
    def heads(self):
        return self.tables.shape[1]

    @property
    def rows(self):
        return -(-self.mask.q_len // self.tile_q)

    @property
    def cols(self):
        return -(-self.mask.kv_len // self.tile_kv)

    @property
    def q_heads(self):
        """Query heads, counted in blocks of `group`."""
        return self.inputs.q.shape[2] // self.group

    def place(self, ib, ih, t, outer, inner, *_, part=0):
        """(batch entry, q block of heads, KV head, q tile, kv tile, table entry) of step t."""
        num_outer, num_inner = (
            (self.rows, self.cols) if self.by == "rows" else (self.cols, self.rows)
        )
        mu, out = _divmod(outer[t], num_outer, self.mask.batch * self.units)
        m, unit = _divmod(mu, self.units, self.mask.batch)
        g, other = _divmod(inner[t * self.parts + part] >> tpu_steps.SHIFT, num_inner, self.heads)
        head = unit * self.repeats + ih
        entry = unit * self.heads + g
        if self.by == "rows":
            kv_head = head if self.group > 1 else lax.div(head, inputs_lib.group_size(self.inputs))
            return ib + m, head, kv_head, out, other, entry
        q_head = head if self.group > 1 else head * self.heads + g
        return ib + m, q_head, head, other, out, entry


def _divmod(x, by, most):
    """Quotient below `most` and rest, without a division where the quotient is 0."""
    if most == 1:
        return 0, x
    return lax.div(x, by), lax.rem(x, by)


def plan(inputs: inputs_lib.Inputs, step: str) -> Call:
    """Tiles, units and work list of one launch, "forward" or "backward"."""
    num_heads, num_kv_heads = inputs.q.shape[2], inputs.k.shape[2]
    group = num_heads // num_kv_heads
    mask = inputs.mask
    per_kv_head = mask.tables_of_heads(num_heads).reshape(num_kv_heads, group)
    stacked = bool((per_kv_head == per_kv_head[:, :1]).all()) and group <= _MAX_GROUP
    group_in_block = group if stacked else 1
    by, tile_q, tile_kv, parts = _tile(inputs, step, group_in_block)
    mask = tpu_steps.at_tiles(mask, tile_q, tile_kv)
    # The fresh mask may number its tables otherwise.
    per_kv_head = mask.tables_of_heads(num_heads).reshape(num_kv_heads, group)
    if stacked:
        tables = per_kv_head[:, :1]
    else:
        tables = per_kv_head.reshape(-1, 1) if by == "rows" else per_kv_head
    repeats = 1
    if tables.shape[1] == 1:
        repeats = len(tables) // mask.num_tables
        if (tables[:, 0] == np.arange(len(tables)) // max(1, repeats)).all():
            tables = tables[::repeats]
        else:
            repeats = 1
    steps = tpu_steps.build(
        mask, tables, by=by, tile_q=tile_q, tile_kv=tile_kv,
        smem_words=tiles.tpu_smem_words(), parts=parts,
    )  # fmt: skip
    return Call(
        inputs, mask, step, by, tile_q, tile_kv, group_in_block, repeats, tables, parts, steps
    )


def _tile(inputs, step, group):
    """The output side, tokens per tile (queries, keys) and tiles per step.

    The cheapest for a static mask, by its active tiles.
    """
    mask = inputs.mask
    alone = (inputs.q_segment_ids, inputs.q_positions, inputs.key_bias) == (None,) * 3
    by = "rows"
    # A tile of dk and dv in float32 is as large as dq of two heads.
    if step == "backward" and (group == 1 or inputs.key_bias is not None):
        by = "cols"
    if mask.bits is not None:
        return by, mask.block_q, mask.block_kv, 1  # One set of bits per tile.
    wide = max(inputs.q.shape[3], inputs.v.shape[3]) > LANES or inputs.q.dtype != jnp.bfloat16
    choices = [
        (by, _fit(q, mask.q_len, mask.block_q), _fit(kv, mask.kv_len, mask.block_kv), 1)
        for q, kv in tiles.tpu_tiles(step=step, group=group, wide=wide)
    ]
    smallest = choices[-1][1:3]
    blocks = tpu_steps.at_tiles(mask, *smallest)
    whole = blocks.block_q >= smallest[0] and blocks.block_kv >= smallest[1]
    if alone and whole and mask.kv_len > GATHERED * smallest[1]:
        choices.append(("rows", *smallest, GATHERED))
    choices = list(dict.fromkeys(choices))  # A short sequence fits several alike.
    if mask.is_static:
        costs = [_cost(mask, *choice, step, group) for choice in choices]
        return choices[int(np.argmin(costs))]
    # Run-time lists that may hold every block come from a selection: single blocks, far apart.
    if mask.kv_indices.shape[-1] < mask.num_rows * mask.num_cols:
        # Documents may be short: fewer queries, at nearly the same cost per pair.
        return choices[0] if choices[0][1] <= 256 else choices[1]
    block_q, block_kv = max(LANES, mask.block_q), max(LANES, mask.block_kv)
    fitting = [x for x in choices if x[1] <= block_q and x[2] <= block_kv]
    if not fitting or fitting[0][1:3] == smallest:
        return choices[-1]
    return fitting[0]


def _cost(mask, by, tile_q, tile_kv, parts, step, group):
    steps = tpu_steps.num_tiles(mask, tile_q, tile_kv)
    rows = mask.num_tables * (mask.q_len / tile_q if by == "rows" else mask.kv_len / tile_kv)
    if parts > 1:  # Half a step per row is empty.
        steps = steps / parts + 0.5 * rows
    return tiles.tpu_cycles(step)(steps, rows, (tile_q, tile_kv), parts, group)


def _fit(tile, length, block):
    """The tile for a sequence: no longer than it, and it divides the block or the reverse."""
    tile = min(tile, -(-length // LANES) * LANES)
    if block % tile == 0 or tile % block == 0:
        return tile
    return math.lcm(block, LANES)


# --- Operands -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array in HBM (or the shape of an output), its block, and the block of a step.

    `at` maps `Call.place` to block indices.
    """

    array: Any
    block: tuple[int, ...]
    at: Callable | None
    memory: Any = None
    part: int = 0


def _heads_in_lanes(x, length):
    """[B, T, N, D] -> [B, length, N * D], head dimensions padded to whole lanes."""
    *_, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, -dim % LANES)))
    return x.reshape(*x.shape[:2], -1)


def heads_from_lanes(x, length, num_heads, dim):
    """[B, padded, N * lanes] -> [B, length, N, dim]."""
    return x.reshape(*x.shape[:2], num_heads, -1)[:, :length, :, :dim]


def lane_dim(dim):
    """A head dimension in whole lanes."""
    return -(-dim // LANES) * LANES


def compute_dtype(x):
    """The matrix unit takes bfloat16 and float32; float16 is exact in float32."""
    return jnp.float32 if x.dtype == jnp.float16 else x.dtype


def operands_of(call: Call, dout=None, lse=None, delta=None) -> dict[str, Operand]:
    """What the kernels read, by name."""
    inputs = call.inputs
    q_len, kv_len = call.rows * call.tile_q, call.cols * call.tile_kv
    dtype = compute_dtype(inputs.q)
    tile_q, tile_kv, group = call.tile_q, call.tile_kv, call.group

    def q_side(x):
        dim = lane_dim(x.shape[3])
        return Operand(
            _heads_in_lanes(x.astype(dtype), q_len),
            (1, tile_q, group * dim),
            lambda b, qh, kh, row, col, e: (b, row, qh),
        )

    def per_query(x, pad):
        """[B, T, N] float32 -> [B, heads / group, group, T]."""
        x = jnp.pad(
            x.swapaxes(1, 2), ((0, 0), (0, 0), (0, q_len - x.shape[1])), constant_values=pad
        )
        return Operand(
            x.reshape(x.shape[0], call.q_heads, group, q_len),
            (1, 1, group, tile_q),
            lambda b, qh, kh, row, col, e: (b, qh, 0, row),
        )

    def tokens(x, length, tile, at):
        """int32 [M, L] -> [M, 1, L]."""
        shared = x.shape[0] == 1
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1])))[:, None]
        return Operand(x, (1, 1, tile), lambda *p: (0 if shared else p[0], 0, p[at]))

    # Whatever a hidden key holds must not reach a product, since 0 * nan is nan. A key with a nan
    # or inf anywhere gets nan logits in the forward pass, so that a query which sees it is nan;
    # in the backward pass that query's lse is.
    finite = jnp.isfinite(inputs.k).all(-1) & jnp.isfinite(inputs.v).all(-1)
    poison = jnp.nan if dout is None else 0
    k = jnp.where(finite[..., None], inputs.k, poison)
    v = jnp.where(finite[..., None], inputs.v, 0)
    # Side by side, k in whole lanes: one copy per step and part. They are rewritten here anyway.
    k = jnp.pad(k, ((0, 0), (0, 0), (0, 0), (0, -k.shape[3] % LANES)))
    kv = _heads_in_lanes(jnp.concatenate([k, v], -1).astype(dtype), kv_len)
    block = (1, tile_kv, kv.shape[2] // k.shape[2])
    result = {"q": q_side(inputs.q)}
    for part in range(call.parts):
        result[f"kv{part}"] = Operand(
            kv, block, lambda b, qh, kh, row, col, e: (b, col, kh), part=part
        )
    if dout is not None:
        empty = lse == -jnp.inf
        # Rows that see nothing may hold anything: 0 * nan is nan.
        result["q"] = q_side(jnp.where(empty[..., None], 0, inputs.q))
        result["dout"] = q_side(dout)
        result["lse"] = per_query(jnp.where(empty, _NOTHING, lse * LOG2E), _NOTHING)
        result["delta"] = per_query(delta, 0)
    if inputs.q_segment_ids is not None:
        result["q_ids"] = tokens(inputs.q_segment_ids, q_len, tile_q, 3)
        result["kv_ids"] = tokens(inputs.kv_segment_ids, kv_len, tile_kv, 4)
    if inputs.q_positions is not None:
        result["q_pos"] = tokens(inputs.q_positions, q_len, tile_q, 3)
        result["kv_pos"] = tokens(inputs.kv_positions, kv_len, tile_kv, 4)
    if inputs.key_bias is not None:
        bias = inputs.key_bias
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, kv_len - bias.shape[2])))
        per_head = bias.shape[1] > 1
        heads = group if per_head else 1
        result["bias"] = Operand(
            bias.reshape(bias.shape[0], -1, heads, kv_len),
            (1, 1, heads, tile_kv),
            lambda b, qh, kh, row, col, e: (b, qh if per_head else 0, 0, col),
        )
    if inputs.sink_logits is not None and dout is None:
        sinks = (inputs.sink_logits / unit(inputs)).reshape(call.q_heads, group)
        result["sinks"] = Operand(sinks, sinks.shape, lambda *p: (0, 0), pltpu.SMEM)
    return result


# --- Launching ------------------------------------------------------------------------------------


def launch(
    call: Call,
    kernel: Callable,
    operands: dict[str, Operand],
    outputs: dict[str, Operand],
    scratch: dict[str, Any],
) -> tuple[jax.Array, ...]:
    """Runs `kernel(refs)` over every step; the outputs in order.

    A list in several chunks runs as a loop over calls that write into the same buffers. Outputs in
    `pl.ANY` begin as zeros.
    """
    inputs, mask, steps = call.inputs, call.mask, call.steps
    grid = (inputs.q.shape[0] if mask.batch == 1 else 1, call.repeats)
    lists = {"outer": steps.outer, "inner": steps.inner}
    lists |= {} if steps.words is None else {"words": steps.words}
    operands = dict(operands)
    if steps.slots is not None:
        lists["slots"] = steps.slots
        slot_at = list(lists).index("slots")
        bits = jnp.asarray(mask.bits).reshape(-1, *mask.bits.shape[3:]).astype(jnp.int8)
        operands["bits"] = Operand(bits, (1, *bits.shape[1:]), None)
    tables = {}
    if len(mask.rules) > 1:
        tables["rule_of"] = call.tables.reshape(-1).astype(np.int32)
        scratch = {**scratch, "visible": pltpu.VMEM(mask_shape(call), jnp.int32)}

    def spec(operand):
        if operand.memory is not None:
            return pl.BlockSpec(memory_space=operand.memory)
        if operand.at is None:
            return pl.BlockSpec(operand.block, lambda ib, ih, t, *refs: (refs[slot_at][t], 0, 0))
        return pl.BlockSpec(
            operand.block,
            lambda ib, ih, t, *refs: operand.at(*call.place(ib, ih, t, *refs, part=operand.part)),
        )

    # Query heads of one KV head that add to its dk and dv one by one must stay on one core.
    shared = call.step == "backward" and call.by == "rows"
    shared = shared and call.group < inputs_lib.group_size(inputs)
    heads = "arbitrary" if shared else "parallel"
    chunks = len(steps.totals)
    kept = [x for x, o in outputs.items() if chunks > 1 or o.memory is not None]
    names = [*lists, *tables, *operands, *(f"{x}_before" for x in kept), *outputs, *scratch]
    num_prefetch = len(lists) + len(tables)
    first_kept = num_prefetch + len(operands)

    def body(*refs):
        kernel(types.SimpleNamespace(**dict(zip(names, refs, strict=True))))

    def run(total, lists, before):
        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=num_prefetch,
                grid=(*grid, total),
                in_specs=[spec(x) for x in operands.values()]
                + [pl.BlockSpec(memory_space=pl.ANY)] * len(kept),
                out_specs=[spec(x) for x in outputs.values()],
                scratch_shapes=list(scratch.values()),
            ),
            out_shape=[x.array for x in outputs.values()],
            input_output_aliases={
                first_kept + i: list(outputs).index(name) for i, name in enumerate(kept)
            },
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", heads, "arbitrary"),
                vmem_limit_bytes=tiles.tpu_vmem_bytes(),
            ),
            name=f"block_sparse_{kernel.func.__name__.strip('_')}",
        )(*lists, *tables.values(), *(x.array for x in operands.values()), *before)

    before = [jnp.zeros(outputs[x].array.shape, outputs[x].array.dtype) for x in kept]
    if chunks == 1:
        total = int(steps.totals[0]) if steps.is_static else steps.totals[0]
        return tuple(run(total, [x[0] for x in lists.values()], before))

    def one(before, chunk):
        total, *lists = chunk
        return tuple(run(total, lists, before)), None

    lists = jax.tree.map(jnp.asarray, (steps.totals, *lists.values()))
    return lax.scan(one, tuple(before), lists)[0]


def mask_shape(call):
    """Element mask of a tile: queries lead in the forward kernel, keys in the backward ones."""
    shape = (call.tile_q, call.tile_kv)
    return shape if call.step == "forward" else shape[::-1]


def is_plain(inputs):
    """True when the forward kernel may take the maximum before scaling: one product less."""
    return inputs.logits_soft_cap is None and inputs.key_bias is None and inputs.scale > 0


def unit(inputs):
    """What one unit of the forward kernel's logits is worth."""
    return inputs.scale if is_plain(inputs) else 1.0
