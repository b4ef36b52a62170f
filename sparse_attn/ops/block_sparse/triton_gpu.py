"""Backend for NVIDIA GPUs from Ampere on: the kernels of `triton_kernels.py` through jax-triton."""

import importlib
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.ops import tiles
from sparse_attn.ops.block_sparse import inputs as inputs_lib
from sparse_attn.ops.block_sparse import triton_kernels, triton_rules

_LOG2E = 1.4426950408889634
_MAX_HEAD_DIM = 256


class Tile(NamedTuple):
    """Tokens of queries and keys per tile, and how many warps and pipeline stages work on it."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of both kernels; dq and dk/dv are one launch, so their stages are equal."""

    forward: Tile
    dq: Tile
    dkv: Tile


def check_device() -> None:
    """Raises NotImplementedError(reason) where no Triton kernel runs."""
    target = tiles.target()
    if target.platform != "gpu" or target.compute_capability is None:
        raise NotImplementedError(f"needs an NVIDIA GPU, the target is {target.kind}")
    if float(target.compute_capability) < 8.0:
        raise NotImplementedError(
            f"needs compute capability 8.0 (Ampere), {target.kind} has {target.compute_capability}"
        )
    jax_triton()


def check_head_dims(inputs: Any) -> None:
    """Raises NotImplementedError(reason) for head dimensions of q and v that are too large."""
    widest = max(inputs.q.shape[3], inputs.v.shape[3])
    if widest > _MAX_HEAD_DIM:
        raise NotImplementedError(f"head_dim={widest} is over {_MAX_HEAD_DIM}")


def check(inputs: inputs_lib.Inputs) -> None:
    """Raises NotImplementedError(reason) for what this backend cannot do."""
    check_device()
    check_head_dims(inputs)
    _rule(inputs)


def forward(inputs: inputs_lib.Inputs) -> tuple[jax.Array, jax.Array]:
    """`out [B, T, N, Hv]` in q's dtype and `lse [B, T, N]` float32, sink included in lse."""
    mask = inputs.mask
    tile = _fitted(_tiles(inputs).forward, mask, "queries")
    rows = _lists(inputs, "kv", tile)
    arrays = (inputs.q, inputs.k, inputs.v, inputs.key_bias, inputs.sink_logits, *_ids(inputs))
    outputs = (
        jax.ShapeDtypeStruct((*inputs.q.shape[:3], inputs.v.shape[3]), inputs.q.dtype),
        jax.ShapeDtypeStruct(inputs.q.shape[:3], jnp.float32),
    )
    return _launch(
        triton_kernels.forward_kernel, inputs, tile, rows.tiles, (*arrays, mask.bits),
        rows.arrays, rows.sizes, outputs, SINKS=inputs.sink_logits is not None,
        QUERIES=tile.queries, KEYS=tile.keys, EVEN=rows.even,
    )  # fmt: skip


def backward(
    inputs: inputs_lib.Inputs, lse: jax.Array, dout: jax.Array, delta: jax.Array
) -> inputs_lib.Grads:
    """Gradients from `p = exp(logits - lse)` and `ds = p * (dout @ v.T - delta)`."""
    q, k, v, bias, mask = inputs.q, inputs.k, inputs.v, inputs.key_bias, inputs.mask
    # Rows become contiguous, and exp2(logits - inf) = 0 gives empty rows zero gradients.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * _LOG2E).swapaxes(1, 2)
    arrays = (q, k, v, dout, lse, delta.swapaxes(1, 2), bias, *_ids(inputs))
    chosen = _tiles(inputs)
    dq, dkv = _fitted(chosen.dq, mask, "queries"), _fitted(chosen.dkv, mask, "keys")
    rows, columns = _lists(inputs, "kv", dq), _lists(inputs, "q", dkv)
    each_head = (q.shape[0], q.shape[2], k.shape[1])
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    outputs += [jax.ShapeDtypeStruct((1,) if bias is None else each_head, jnp.float32)]
    *grads, dbias = _launch(
        triton_kernels.backward_kernel, inputs, dkv._replace(warps=max(dq.warps, dkv.warps)),
        columns.tiles + rows.tiles, (*arrays, mask.bits),
        (*rows.arrays, *columns.arrays), (*rows.sizes, *columns.sizes, columns.tiles), outputs,
        DQ_QUERIES=dq.queries, DQ_KEYS=dq.keys, DQ_EVEN=rows.even,
        DKV_QUERIES=dkv.queries, DKV_KEYS=dkv.keys, DKV_EVEN=columns.even,
    )  # fmt: skip
    if bias is None:
        return inputs_lib.Grads(*grads, None)
    return inputs_lib.Grads(*grads, dbias if bias.shape[1] > 1 else dbias.sum(1, keepdims=True))


class _Lists(NamedTuple):
    """One side of the mask as a kernel reads it."""

    arrays: tuple  # Programs, indices, slots of bits.
    sizes: tuple  # How many programs a batch element has, and the entries of a table.
    tiles: int  # Programs to launch: several own one block when it is larger than a tile.
    even: bool  # No tile reaches over the end of a block or of the array.


def _lists(inputs, side, tile) -> _Lists:
    """Lists of keys by row ("kv") or of queries by column ("q"), for programs of that tile."""
    q, k, mask = inputs.q, inputs.k, inputs.mask
    programs = _programs(mask, side, q.shape[2], k.shape[2])
    indices, slots = (getattr(mask, f"{side}_{name}") for name in ("indices", "bits"))
    if side == "kv":  # A program owns queries and walks over keys.
        length, own, walked, part, step = (
            mask.kv_len, mask.block_q, mask.block_kv, tile.queries, tile.keys
        )  # fmt: skip
    else:
        length, own, walked, part, step = (
            mask.q_len, mask.block_kv, mask.block_q, tile.keys, tile.queries
        )  # fmt: skip
    return _Lists(
        (programs, indices, slots), (programs.shape[1], indices.shape[-1]),
        q.shape[0] * programs.shape[1] * -(-own // part),
        length % walked == 0 and walked % step == 0,
    )  # fmt: skip


def _ids(inputs):
    return inputs.q_segment_ids, inputs.kv_segment_ids, inputs.q_positions, inputs.kv_positions


def _launch(kernel, inputs, tile, programs, arrays, lists, sizes, outputs, **constants):
    """Calls a kernel. Its arguments: arrays, lists, lengths and sizes, and last the outputs."""
    q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.mask
    absent = jnp.zeros((1,), jnp.int32)
    num_slots = 1 if mask.bits is None else mask.bits.shape[2]
    return jax_triton().triton_call(
        *[absent if x is None else jnp.asarray(x) for x in (*arrays, *lists)],
        mask.q_len, mask.kv_len, num_slots, *sizes,
        kernel=kernel, out_shape=outputs, grid=(programs,),
        num_warps=tile.warps, num_stages=tile.stages,
        HEADS=q.shape[2], KV_HEADS=k.shape[2], H=q.shape[3], HV=v.shape[3],
        HP=_padded(q.shape[3]), HVP=_padded(v.shape[3]),
        BLOCK_Q=mask.block_q, BLOCK_KV=mask.block_kv,
        SCALE=inputs.scale, CAP=inputs.logits_soft_cap,
        BIAS=0 if inputs.key_bias is None else inputs.key_bias.shape[1],
        RULE=_rule(inputs), BITS=mask.bits is not None, IDS=inputs.q_segment_ids is not None,
        POSITIONS=0 if inputs.q_positions is None else inputs.q_positions.shape[0],
        NUM_TABLES=mask.num_tables, MASK_BATCH=mask.batch > 1, **constants,
    )  # fmt: skip


def _programs(mask, side, heads, kv_heads):
    """What each program works on, int32 `[M, P, G, 6]`: see `_record`.

    Rows: one program per head and block, G = 1. Columns: one per KV head and block, with the G
    query heads of its group. The longest come first, so that none is left for the end.
    """
    xp = np if mask.is_static else jnp
    groups = np.arange(heads).reshape(heads if side == "kv" else kv_heads, 1, -1)
    tables = mask.tables_of_heads(heads)[groups]
    lists = [
        xp.moveaxis(getattr(mask, f"{side}_{name}")[:, tables[:, 0]], -1, 2)
        for name in ("starts", "partial_counts", "counts")
    ]
    shape = lists[0].shape  # M, owners, blocks, G
    block = np.arange(shape[2])[:, None]
    fields = [xp.broadcast_to(x, shape) for x in (groups, block, tables, *lists)]
    records = xp.stack(fields, -1).reshape(shape[0], -1, shape[3], 6).astype(np.int32)
    work = lists[2].sum(-1)
    owner = np.arange(shape[1])[:, None]
    if mask.is_static:
        # Far above the mean: at once. The rest head by head, whose keys then stay in the cache.
        owner = np.where(work > 2 * work.mean((1, 2), keepdims=True), -1, owner)
        order = np.lexsort([x.reshape(shape[0], -1) for x in (-work, owner)])
    else:  # Sorting them all together would take longer than it gains.
        # Owners share the one table there may be: sorted once.
        order = jnp.argsort(-work[:, :1] if mask.num_tables == 1 else -work) + owner * shape[2]
    return xp.take_along_axis(records, order.reshape(shape[0], -1, 1, 1), 1)


def shared_bytes() -> int:
    """Shared memory that one program may take on the target.

    >>> with tiles.assume(tiles.Target("gpu", "NVIDIA H100", "9.0")):
    ...     shared_bytes() >> 10
    227
    """
    capability = float(tiles.target().compute_capability)
    if 9.0 <= capability < 12.0:
        return 227 << 10
    return (163 if capability in (8.0, 8.7) else 99) << 10


def jax_triton() -> types.ModuleType:
    """The module; NotImplementedError where it cannot be imported."""
    # Imported here: it raises on a JAX without CUDA.
    try:
        return importlib.import_module("jax_triton")
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise NotImplementedError(f"needs jax-triton, which cannot be imported: {reason}") from None


def _rule(inputs):
    """The element rule as a Triton function, or None when bits decide."""
    rules = inputs.mask.rules
    without = [rule is None for rule in rules]
    if any(without):
        if not all(without) or inputs.mask.bits is None:
            raise NotImplementedError("some tables have a rule and some have bits")
        return None
    return triton_rules.rule_of(rules)


# --- Tiles ----------------------------------------------------------------------------------------


def _padded(head_dim):
    return max(16, tiles.power_of_two(head_dim))


def _tiles(inputs) -> Tiles:
    """Tiles for the device, the dtype and the head dimension, before they meet the mask."""
    widest = _padded(max(inputs.q.shape[3], inputs.v.shape[3]))
    capability = float(tiles.target().compute_capability)
    if inputs.q.dtype == jnp.float32:
        # Exact float32 products run on the scalar units: small tiles, or registers spill.
        small = Tile(32, 32, 8, 1) if widest <= 128 else Tile(16, 16, 8, 1)
        return Tiles(small, small, small)
    if widest <= 64:
        return Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3))
    if 9.0 <= capability < 12.0:  # 227 KiB of shared memory
        if widest <= 128:
            keys = 64 if _busy(inputs) else 128
            return Tiles(Tile(128, keys, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3))
        return Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2))
    roomy = capability == 8.0  # 163 KiB, not 99 KiB
    if widest <= 128:
        return Tiles(Tile(128, 64, 8, 2 + roomy), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
    return Tiles(Tile(64, 32, 4, 1 + roomy), Tile(32, 32, 4, 1 + roomy), Tile(32, 32, 4, 1 + roomy))


def _busy(inputs) -> bool:
    """Whether elements take much more than their product: wide tiles then run out of registers."""
    extras = (inputs.key_bias, inputs.logits_soft_cap, inputs.q_segment_ids)
    if any(x is not None for x in extras):
        return True
    mask = inputs.mask
    return mask.is_static and 2 * mask.kv_partial_counts.sum() > mask.kv_counts.sum()


def _fitted(tile, mask, owner) -> Tile:
    """The tile cut to the mask's blocks: powers of two >= 16, as the matrix units want.

    `owner` is the side that a program keeps, "queries" or "keys"; warps share its rows.
    """
    cut = tile._replace(
        queries=min(tile.queries, _padded(mask.block_q)),
        keys=min(tile.keys, _padded(mask.block_kv)),
    )
    return cut._replace(warps=max(1, tile.warps * getattr(cut, owner) // getattr(tile, owner)))
