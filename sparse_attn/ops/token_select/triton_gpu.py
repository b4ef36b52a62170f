"""Keys stay, queries come, inside kernels: NVIDIA GPUs from Ampere on, through jax-triton.

As `by_block`, without copies of the queries: the kernels of `triton_kernels.py` fetch the queries
of each block by their number and write what they find to the entry's own place, `[B, T, n, N, ..]`.
Partial results meet by their log-sum-exp, partial dq in a sum, both in one pass over the places.
Any pattern that Triton can evaluate hides keys inside the blocks, the query's own among them. Some
places of the lists are processed at a time, so that the partial results stay within `_AT_ONCE`
numbers.  [arXiv:2508.18224, sec. 3]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_attn.ops import tiles
from sparse_attn.ops.block_sparse import triton_gpu as blocks_lib
from sparse_attn.ops.block_sparse import triton_rules
from sparse_attn.ops.token_select import inputs as inputs_lib
from sparse_attn.ops.token_select import plan as plan_lib
from sparse_attn.ops.token_select import triton_choose, triton_kernels, triton_plan
from sparse_attn.patterns import causal

_LOG2E = 1.4426950408889634
_MAX_BLOCK = 128
_SMALL_THINGS = 2048  # Bytes of shared memory for statistics, barriers and sums over rows.
# Numbers in the partial results of a step: 8 GB in bfloat16.
_AT_ONCE = 1 << 32


once = triton_choose.once  # Of the backend, see `inputs.Backend`.


class Tile(NamedTuple):
    """What a program works on, and how many warps and pipeline stages work on it.

    Attributes:
      rows: heads of entries in a tile, a power of two >= 16.
      keys: of the block at a time, a power of two >= 16; the backward pass takes whole blocks.
      tiles: of one block that a program takes at most, one after the other.
    """

    rows: int
    keys: int
    tiles: int
    warps: int
    stages: int


class Sum(NamedTuple):
    """How segments are added: numbers of a program, segments that it loads at a time, warps."""

    numbers: int
    segments: int
    warps: int


class Merge(NamedTuple):
    """How places are added: heads of queries of a program, and warps."""

    rows: int
    warps: int


_MERGED = Merge(16, 4)


class Tiles(NamedTuple):
    """The tile of each kernel; None where none fits the device."""

    forward: Tile | None
    backward: Tile | None
    sum: Sum


def check(inputs: inputs_lib.Inputs, kernel: str | None) -> None:
    """Raises NotImplementedError(reason) for what this backend cannot do."""
    if kernel is not None:
        raise NotImplementedError(f"kernel={kernel!r} must be None: it has kernels of its own")
    blocks_lib.check_device()
    blocks_lib.check_head_dims(inputs)
    if inputs.block % 16 or inputs.block > _MAX_BLOCK:
        raise NotImplementedError(
            f"block={inputs.block} must be a multiple of 16 up to {_MAX_BLOCK}; by_block takes any"
        )
    if None in _tiles(inputs):
        raise NotImplementedError(
            f"block={inputs.block} with head_dim={max(inputs.q.shape[3], inputs.v.shape[3])} in "
            f"{inputs.q.dtype.name} does not fit the shared memory of {tiles.target().kind}; "
            "by_block takes them"
        )
    _rule(inputs)


def _rule(inputs):
    return triton_rules.rule_of((inputs.pattern,))


# --- Tiles ----------------------------------------------------------------------------------------


def _tiles(inputs) -> Tiles:
    """Tiles for the device, the dtype, the block and the head dimension."""
    forward, backward = _preferred(inputs)
    return Tiles(
        _fitted(forward, lambda tile: _forward_bytes(inputs, tile)),
        _fitted(backward, lambda tile: _backward_bytes(inputs, tile)),
        Sum(512, 8, 4),
    )


def _preferred(inputs) -> tuple[Tile, Tile]:
    """Tiles of both passes where shared memory does not matter."""
    widest = blocks_lib._padded(max(inputs.q.shape[3], inputs.v.shape[3]))
    if inputs.q.dtype == jnp.float32:
        # Exact float32 products run on the scalar units: small tiles, or registers spill.
        small = Tile(32, 32, 4, 8, 1) if widest <= 128 else Tile(16, 16, 4, 8, 1)
        return small, Tile(16, _MAX_BLOCK, 32, 8, 1)
    if widest * inputs.block <= 64 * 64:
        return Tile(128, 64, 4, 4, 2), Tile(64, _MAX_BLOCK, 32, 4, 2)
    if widest * inputs.block <= 128 * 64:
        return Tile(64, 64, 16, 4, 2), Tile(32, _MAX_BLOCK, 256, 4, 3)
    if widest <= 128:
        return Tile(64, 128, 32, 4, 3), Tile(64, _MAX_BLOCK, 32, 8, 2)
    return Tile(64, 64, 4, 8, 2), Tile(32, _MAX_BLOCK, 32, 8, 2)


def _fitted(tile: Tile, size: Callable[[Tile], int]) -> Tile | None:
    """The first of fewer stages and then fewer rows whose `size` in bytes fits the device."""
    rows = [tile.rows >> i for i in range(tile.rows.bit_length() - 4)]
    candidates = [tile._replace(rows=r, stages=s) for r in rows for s in range(tile.stages, 0, -1)]
    return next((t for t in candidates if size(t) <= blocks_lib.shared_bytes()), None)


def _forward_bytes(inputs, tile: Tile) -> int:
    """Shared memory: queries of each stage, keys and values (of each stage, if in parts)."""
    h, hv = (blocks_lib._padded(x.shape[3]) for x in (inputs.q, inputs.v))
    block = blocks_lib._padded(inputs.block)
    keys = block if block <= tile.keys else tile.keys * tile.stages
    numbers = tile.rows * tile.stages * h + (h + hv) * keys + tile.rows * hv
    return numbers * inputs.q.dtype.itemsize + _SMALL_THINGS


def _flipped(inputs, tile: Tile) -> bool:
    """Whether dq is made transposed, `keys^T @ ds`, as a tile has fewer than 64 rows.

    A Hopper product has 64 rows at least: in the transposed one these are dimensions, and the few
    rows of the tile its columns. Keys lie in shared memory the other way round too, which must fit.
    """
    if not tiles.target().compute_capability.startswith("9.") or tile.rows >= 64:
        return False
    h, block = (blocks_lib._padded(n) for n in (inputs.q.shape[3], inputs.block))
    more = block * h * inputs.q.dtype.itemsize
    fits = _backward_bytes(inputs, tile) + more <= blocks_lib.shared_bytes()
    return fits and inputs.q.dtype != jnp.float32


def _backward_bytes(inputs, tile: Tile) -> int:
    """Shared memory: keys and values, queries and dout of each stage, ds, and dq in float32."""
    h, hv = (blocks_lib._padded(x.shape[3]) for x in (inputs.q, inputs.v))
    block = blocks_lib._padded(inputs.block)
    numbers = (h + hv) * (block + tile.rows * tile.stages) + block * tile.rows
    return numbers * inputs.q.dtype.itemsize + tile.rows * h * 4 + _SMALL_THINGS


# --- One step: some places of the lists -----------------------------------------------------------


def _halved(inputs):
    """The same with each list told more than once, until its heads fit the rows of all tiles."""
    chosen, (_, group, _) = _tiles(inputs), inputs.sizes
    rows = min(chosen.forward.rows, chosen.backward.rows)
    times = next(n for n in range(1, group + 1) if group % n == 0 and group // n <= rows)
    return inputs._replace(selected=jnp.repeat(inputs.selected, times, axis=2))


def _steps(inputs):
    """The lists in `[steps, B, T, U, places]`, so that partial results stay small."""
    batch, length, heads, width = inputs.q.shape
    each = batch * length * heads * max(width, inputs.v.shape[-1])
    found = plan_lib.split(inputs.selected.shape[3], _AT_ONCE // each)
    return plan_lib.in_steps(inputs.selected, *found)


def _over(inputs, step, dtype):
    """The last result of `step(before, selected, plan, dtype)`; those in between are float32."""
    each = (_steps(inputs), inputs.plan)
    first, rest, last = (jax.tree.map(lambda x, at=at: x[at], each) for at in (0, slice(1, -1), -1))
    if each[0].shape[0] == 1:
        return step(None, *last, dtype)
    # Only what is carried on is float32: of the last step it would be written to be rounded.
    found = step(None, *first, jnp.float32)
    if each[0].shape[0] > 2:
        found = jax.lax.scan(lambda found, x: (step(found, *x, jnp.float32), None), found, rest)[0]
    # Its kernels do not need what was found before; without a barrier they may run early, and the
    # partial results of two steps lie in memory at once.
    found, last = jax.lax.optimization_barrier((found, last))
    return step(found, *last, dtype)


def _entries(inputs, tile: Tile) -> int:
    """Entries of a tile: the heads of each are padded to a power of two."""
    return tile.rows // tiles.power_of_two(inputs.sizes[1])


def _planned(inputs) -> int:
    """Entries of a tile of the plan."""
    chosen = _tiles(inputs)
    return max(_entries(inputs, chosen.forward), _entries(inputs, chosen.backward))


def plan(inputs: inputs_lib.Inputs, kernel: str | None = None) -> plan_lib.Plan:
    """The plan of each step, for both passes: in the larger tiles; the smaller ones divide them."""
    del kernel
    inputs = _halved(inputs)
    size, blocks = _planned(inputs), -(-inputs.k.shape[1] // inputs.block)
    return jax.lax.map(
        lambda selected: triton_plan.plan(selected, tile=size, blocks=blocks), _steps(inputs)
    )


def _launch(
    kernel, inputs, selected, plan, tile: Tile, keys: int, arrays, outputs, **constants
) -> tuple:
    """Calls a kernel over the segments of the step; also gives the segments.

    `outputs` makes the shapes of its results from the number of segments; `constants` are the
    kernel's own.
    """
    tables, group, _ = inputs.sizes
    batch, q_len, heads, width = inputs.q.shape
    kv_len, kv_heads, v_width = inputs.v.shape[1:]
    size, planned = _entries(inputs, tile), _planned(inputs)
    segments = triton_plan.segments(plan, tile=planned, parts=planned // size, most=tile.tiles)
    count = segments.work.shape[2]
    absent = jnp.zeros((1,), jnp.int32)
    ids = [absent if x is None else x for x in (inputs.q_segment_ids, inputs.kv_segment_ids)]
    found = blocks_lib.jax_triton().triton_call(
        *arrays, *ids, segments.work, plan.entry, q_len, kv_len, count, plan.entry.shape[2],
        kernel=kernel, out_shape=outputs(count), grid=(batch * tables * count,),
        num_warps=tile.warps, num_stages=tile.stages,
        HEADS=heads, KV_HEADS=kv_heads, TABLES=tables, PLACES=selected.shape[3],
        H=width, HV=v_width, HP=blocks_lib._padded(width), HVP=blocks_lib._padded(v_width),
        BLOCK=inputs.block, KEYS=keys, TILE=size, PADDED=tiles.power_of_two(group),
        SCALE=inputs.scale, RULE=_rule(inputs), IDS=ids[0] is not absent,
        # Of other patterns it is not known which tiles see a block whole.
        CAUSAL=inputs.pattern == causal.Causal() and ids[0] is absent and keys == inputs.block,
        **constants,
    )  # fmt: skip
    return found, segments


def _merge(before, x, lses, selected, dtype) -> tuple[Any, Any]:
    """Adds pieces `x [B, T, places, N, H]` to `before`, weighted by `lses` unless None.

    `before` is None or a sum and its lse; the new ones have `dtype`, and float32.
    """
    batch, length, places, heads, width = x.shape
    rows = batch * length * heads
    absent = jnp.zeros((1,), jnp.float32)
    out, lse = before or (None, None)
    has_lse = lses is not None
    shapes = (
        jax.ShapeDtypeStruct((batch, length, heads, width), dtype),
        jax.ShapeDtypeStruct((batch, length, heads) if has_lse else (1,), jnp.float32),
    )
    return blocks_lib.jax_triton().triton_call(
        x, *[absent if y is None else y for y in (lses, selected, out, lse)], rows,
        kernel=triton_kernels.merge_kernel, out_shape=shapes, grid=(-(-rows // _MERGED.rows),),
        num_warps=_MERGED.warps, num_stages=1,
        HEADS=heads, TABLES=selected.shape[2], PLACES=places, WIDTH=width,
        PADDED=blocks_lib._padded(width), ROWS=_MERGED.rows, SOFTMAX=has_lse,
        BEFORE=before is not None,
    )  # fmt: skip


# --- Forward and backward -------------------------------------------------------------------------


def forward(inputs: inputs_lib.Inputs, kernel: str | None = None) -> tuple[jax.Array, jax.Array]:
    """`out [B, T, N, Hv]` in q's dtype and `lse [B, T, N]` float32."""
    del kernel
    tile = _tiles(inputs).forward
    inputs = _halved(inputs)
    batch, length, heads, _ = inputs.q.shape
    keys = min(tile.keys, blocks_lib._padded(inputs.block))

    def step(before, selected, plan, dtype):
        pieces = (batch, length, selected.shape[3], heads)
        found, _ = _launch(
            triton_kernels.forward_kernel, inputs, selected, plan, tile, keys,
            (inputs.q, inputs.k, inputs.v),
            lambda _: (
                jax.ShapeDtypeStruct((*pieces, inputs.v.shape[3]), inputs.q.dtype),
                jax.ShapeDtypeStruct(pieces, jnp.float32),
            ),
        )  # fmt: skip
        return _merge(before, *found, selected, dtype)

    return _over(inputs, step, inputs.q.dtype)


def backward(
    inputs: inputs_lib.Inputs, kernel: str | None, lse: jax.Array, dout: jax.Array, delta: jax.Array
) -> inputs_lib.Grads:
    """Gradients in one pass over the entries, from the whole row's `lse`."""
    del kernel
    chosen = _tiles(inputs)
    tile, likes = chosen.backward, (inputs.q, inputs.k, inputs.v)
    inputs = _halved(inputs)
    batch, length = inputs.q.shape[:2]
    tables = inputs.sizes[0]
    # exp2(logits - inf) = 0 gives empty rows zero gradients.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * _LOG2E)

    def step(before, selected, plan, dtype):
        def outputs(segments):
            each = (batch, tables, segments, inputs.block)
            entries = (batch, length, selected.shape[3], *inputs.q.shape[2:])
            return (
                jax.ShapeDtypeStruct(entries, inputs.q.dtype),
                *(jax.ShapeDtypeStruct((*each, x.shape[3]), jnp.float32) for x in likes[1:]),
            )

        (dq, dk, dv), segments = _launch(
            triton_kernels.backward_kernel, inputs, selected, plan, tile,
            blocks_lib._padded(inputs.block), (*likes, dout, lse, delta), outputs,
            FLIPPED=_flipped(inputs, tile),
        )  # fmt: skip
        dq = _merge(before and before[:2], dq, None, selected, dtype)
        dk = _sum(dk, segments, inputs, chosen.sum, inputs.scale)
        dv = _sum(dv, segments, inputs, chosen.sum, 1.0)
        if before is not None:
            dk, dv = dk + before[2], dv + before[3]
        return *dq, dk, dv

    dq, _, dk, dv = _over(inputs, step, inputs.q.dtype)
    grads = zip((dq, dk, dv), likes, strict=True)
    return inputs_lib.Grads(*(x.astype(like.dtype) for x, like in grads))


def _sum(x, segments: triton_plan.Segments, inputs, tile: Sum, factor: float):
    """The sums of segments `[B, U, segments, block, H]` by block, `[B, S, K, H]`."""
    batch, kv_len, kv_heads, _ = inputs.k.shape
    numbers, blocks, width = inputs.block * x.shape[4], segments.starts.shape[2], x.shape[4]
    (out,) = blocks_lib.jax_triton().triton_call(
        x, segments.starts, segments.counts, kv_len, x.shape[2], blocks,
        kernel=triton_kernels.sum_kernel,
        out_shape=(jax.ShapeDtypeStruct((batch, kv_len, kv_heads, width), jnp.float32),),
        grid=(batch * kv_heads * blocks * -(-numbers // tile.numbers),),
        num_warps=tile.warps, num_stages=1,
        KV_HEADS=kv_heads, SHARED=inputs.sizes[2], BLOCK=inputs.block, WIDTH=width,
        PIECE=tile.numbers, SEGMENTS=tile.segments, FACTOR=factor,
    )  # fmt: skip
    return out
