"""The choice of blocks on NVIDIA GPUs: launches the kernels of `choose_kernels.py`.

`lists.kernels` gives this module where they run. Like jax-triton they have no gradient.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_attn.ops import tiles
from sparse_attn.ops.block_sparse import triton_gpu
from sparse_attn.ops.token_select import choose_kernels

# One after the other, so that what is taken costs a pass over registers: sorting is for more.
_MOST_TAKEN = 64
_MOST_NUMBERS = 16384  # in a row
_MOST_MEANS = 512  # with a tile of queries, whose scores stay in registers
_MOST_HEADS = 128  # of a KV head
_MOST_PER_BLOCK = 128  # strides
_MAX_HEAD_DIM = 256
_GATES = 1024  # Programs of the gate, at least, before one of them takes several tiles.


class Rows(NamedTuple):
    """Rows of numbers that a program takes the largest from, and its warps."""

    rows: int
    warps: int


class Tile(NamedTuple):
    """Scores: columns (heads of a KV head, padded, times queries) and keys of a tile."""

    columns: int
    keys: int
    warps: int
    stages: int


class Gate(NamedTuple):
    """The gate of MoBA: queries per tile, tiles of a program at most, its warps."""

    queries: int
    tiles: int
    warps: int


def rows_tile(width: int) -> Rows:
    """For rows of `width` numbers, a power of two.

    One warp a row needs no barrier; 2048 numbers are 64 registers of each of its threads (twice as
    many take twice the time on an H200).

    >>> rows_tile(512)
    Rows(rows=4, warps=1)
    """
    return Rows(rows=max(1, min(32, 2048 // width)), warps=max(1, width // 4096))


def scores_tile(dtype: Any, head_dim: int) -> Tile:
    """For NSA's scores, by what fits into shared memory."""
    if dtype == jnp.float32:
        # Exact float32 products run on the scalar units: small tiles, or registers spill.
        return Tile(columns=32, keys=32, warps=4, stages=1)
    if head_dim <= 128:
        return Tile(columns=128, keys=64, warps=4, stages=2)
    roomy = triton_gpu.shared_bytes() > 128 << 10
    return Tile(columns=128 if roomy else 64, keys=64 if roomy else 32, warps=4, stages=2)


def gate_tile(width: int) -> Gate:
    """For MoBA's gate over `width` blocks, a power of two; 128 scores in registers of a thread."""
    return Gate(queries=64, tiles=8, warps=8 if width > 256 else 4)


def takes_rows(count: int, width: int) -> bool:
    """Whether `largest` takes `count` of rows of `width` numbers."""
    return count <= _MOST_TAKEN and width <= _MOST_NUMBERS


def takes_scores(q: Array, keys: Array, strides: Any, block: int, top_k: int) -> bool:
    """Whether `block_scores` and `best_blocks` run on these shapes."""
    per = block // strides.stride
    return (
        top_k <= _MOST_TAKEN
        and -(-q.shape[1] // block) <= _MOST_NUMBERS
        and q.shape[3] <= _MAX_HEAD_DIM
        and q.shape[2] // keys.shape[2] <= _MOST_HEADS
        and per & (per - 1) == 0
        and per <= _MOST_PER_BLOCK
        and q.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    )


def takes_gate(q: Array, blocks: int, count: int) -> bool:
    """Whether `gate` runs on these shapes; float32 products have no matrix unit."""
    padded = triton_gpu._padded(blocks)
    operands = (2 * gate_tile(padded).queries + padded) * triton_gpu._padded(q.shape[3]) * 2
    return (
        count <= _MOST_TAKEN
        and blocks <= _MOST_MEANS
        and operands < triton_gpu.shared_bytes()
        and q.dtype in (jnp.bfloat16, jnp.float16)
    )


def overlaps(strides: Any, block: int) -> int:
    """Blocks that one compressed key may overlap, at most.

    >>> from sparse_attn.ops.token_select import compress
    >>> overlaps(compress.Strides(size=32, stride=16), 64)
    2
    """
    per = block // strides.stride
    return (per + strides.size // strides.stride - 2) // per + 1


def _width(numbers: int) -> int:
    """Numbers of a row in a kernel, which has pairs of them."""
    return max(2, tiles.power_of_two(numbers))


def largest(key: Float[Array, "*B n"], count: int) -> Int[Array, "*B m"]:
    """Places of the `count` largest of the last axis, of equals the first; -1 for -inf.

    Args:
      key: float32 without NaN; see `takes_rows`.
    """
    lead, width = key.shape[:-1], key.shape[-1]
    padded = _width(width)
    tile = rows_tile(padded)

    def call(_, key):
        rows = key.size // width
        (out,) = triton_gpu.jax_triton().triton_call(
            key, rows, width, kernel=choose_kernels.largest_kernel,
            out_shape=(jax.ShapeDtypeStruct((*key.shape[:-1], count), jnp.int32),),
            grid=(-(-rows // tile.rows),), num_warps=tile.warps, num_stages=1,
            COUNT=count, ROWS=tile.rows, WIDTH=padded,
        )  # fmt: skip
        return out

    return _over_batch(call, jnp.zeros(1, jnp.int32), key.reshape(-1, width)).reshape(*lead, count)


def once(selected: Int[Array, "B T U n"], blocks: int) -> Int[Array, "B T U n"]:
    """Lists with -1 for what is no block below `blocks`, or stands before in its list."""
    size = 1024

    def call(_, selected):
        (out,) = triton_gpu.jax_triton().triton_call(
            selected, selected.size, blocks, kernel=choose_kernels.once_kernel,
            out_shape=(jax.ShapeDtypeStruct(selected.shape, jnp.int32),),
            grid=(-(-selected.size // size),), num_warps=4, num_stages=1,
            PLACES=selected.shape[-1], SIZE=size,
        )  # fmt: skip
        return out

    return _over_batch(call, jnp.zeros(1, jnp.int32), selected)


def block_scores(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B n K H"],
    lse: Float[Array, "B T N"],
    start: Int[Array, "1"],
    chunk: int,
    *,
    strides: Any,
    block: int,
    blocks: int,
    scale: float,
    documents: tuple[Array, Array, Array] | None = None,
) -> Float[Array, "B r C K m"]:
    """NSA's scores of blocks in parts, for `chunk` queries from `start` on; see `whole`.

    Parts exist from the first block of a query's document to its own, the rest is garbage.

    Args:
      start: the first query.
      strides, block: where compressed keys lie, and tokens per block.
      blocks: the queries' own are before this one.
      documents: ids, starts `[B, T]` and ids of compressed keys `[B, n]`.
    """
    heads, kv_heads, dim = q.shape[2], keys.shape[2], q.shape[3]
    tile = scores_tile(q.dtype, dim)
    group, per = tiles.power_of_two(heads // kv_heads), block // strides.stride
    queries = max(1, tile.columns // group)
    width, parts = max(tile.keys, per), overlaps(strides, block)

    def call(start, q, keys, lse, *documents):
        documents = documents or (jnp.zeros(1, jnp.int32),) * 3
        shape = (q.shape[0], parts, chunk, kv_heads, blocks)
        (out,) = triton_gpu.jax_triton().triton_call(
            q, keys, lse, *documents, start, q.shape[1], chunk, keys.shape[1], blocks,
            kernel=choose_kernels.scores_kernel,
            out_shape=(jax.ShapeDtypeStruct(shape, jnp.float32),),
            grid=(q.shape[0] * -(-chunk // queries) * kv_heads,),
            num_warps=tile.warps, num_stages=tile.stages,
            HEADS=heads, KV_HEADS=kv_heads, H=dim, HP=triton_gpu._padded(dim), GROUP=group,
            QUERIES=queries, KEYS=width, BLOCK=block, SIZE=strides.size, STRIDE=strides.stride,
            OVERLAPS=parts, SCALE=scale, IDS=has_documents,
        )  # fmt: skip
        return out

    has_documents = documents is not None
    arrays = (q, keys.astype(q.dtype), lse.astype(jnp.float32), *(documents or ()))
    return _over_batch(call, start, *arrays)


def whole(parts: Float[Array, "B r C K m"]) -> Float[Array, "B C K m"]:
    """Scores from parts: part r of block j belongs to block j + r.

    >>> whole(jnp.array([[1.0, 2, 3], [10, 20, 30]]).reshape(1, 2, 1, 1, 3)).ravel().tolist()
    [1.0, 12.0, 23.0]
    """
    width = parts.shape[-1]
    moved = (
        jnp.pad(parts[:, r, ..., : width - r], ((0, 0),) * 3 + ((min(r, width), 0),))
        for r in range(min(parts.shape[1], width))
    )
    return functools.reduce(jnp.add, moved)


def best_blocks(
    parts: Float[Array, "B r C K m"],
    start: Int[Array, "1"],
    count: int,
    *,
    block: int,
    initial: int,
    local: int,
    starts: Int[Array, "B T"] | None = None,
) -> Int[Array, "B C K c"]:
    """The `count` best blocks of each query from its document's first to its own, -1 = none.

    Args:
      parts, start: of and as for `block_scores`.
      initial, local: blocks that are always taken, at the start and up to the query's own.
      starts: where the document of each token starts.
    """
    _, num_parts, chunk, lists, blocks = parts.shape
    padded = _width(blocks)
    tile = rows_tile(padded)

    def call(start, parts, *starts):
        batch = parts.shape[0]
        rows, length = batch * chunk * lists, starts[0].shape[1] if starts else 0
        (out,) = triton_gpu.jax_triton().triton_call(
            parts, *(starts or (jnp.zeros(1, jnp.int32),)), start, batch, length, chunk, blocks,
            kernel=choose_kernels.blocks_kernel,
            out_shape=(jax.ShapeDtypeStruct((batch, chunk, lists, count), jnp.int32),),
            grid=(-(-rows // tile.rows),), num_warps=tile.warps, num_stages=1,
            LISTS=lists, BLOCK=block, INITIAL=initial, LOCAL=local, OVERLAPS=num_parts,
            STARTS=bool(starts), COUNT=count, ROWS=tile.rows, WIDTH=padded,
        )  # fmt: skip
        return out

    return _over_batch(call, start, parts, *(() if starts is None else (starts,)))


def gate(
    q: Float[Array, "B T N H"],
    means: Float[Array, "B n K H"],
    start: Int[Array, "1"],
    chunk: int,
    count: int,
    *,
    block: int,
    blocks: int,
    documents: tuple[Array, Array, Array] | None = None,
) -> Int[Array, "B C N c"]:
    """Each query's own block and the best before it by `q . mean`, -1 = none; see `takes_gate`.

    Args:
      start, chunk: the first query, and how many there are.
      count: places of a list, the own block included.
      block, blocks: tokens per block, and how many of the first blocks compete.
      documents: ids `[B, T]`, and the least and the largest id in each block `[B, n]`.
    """
    heads, kv_heads, dim = q.shape[2], means.shape[2], q.shape[3]
    padded = triton_gpu._padded(blocks)
    tile = gate_tile(padded)
    # A program of several tiles loads the means once; but all processors should have some.
    total = -(-chunk // tile.queries)
    each = max(1, min(tile.tiles, total * heads * q.shape[0] // _GATES))

    def call(start, q, means, *documents):
        documents = documents or (jnp.zeros(1, jnp.int32),) * 3
        (out,) = triton_gpu.jax_triton().triton_call(
            q, means, *documents, start, q.shape[1], chunk, blocks, means.shape[1],
            kernel=choose_kernels.gate_kernel,
            out_shape=(jax.ShapeDtypeStruct((q.shape[0], chunk, heads, count), jnp.int32),),
            grid=(q.shape[0] * -(-total // each) * heads,),
            num_warps=tile.warps, num_stages=2, HEADS=heads, KV_HEADS=kv_heads, H=dim,
            HP=triton_gpu._padded(dim), BLOCK=block, IDS=has_documents, COUNT=count,
            QUERIES=tile.queries, TILES=each, WIDTH=padded,
        )  # fmt: skip
        return out

    has_documents = documents is not None
    return _over_batch(call, start, q, means.astype(q.dtype), *(documents or ()))


def _over_batch(call: Callable[..., Array], start: Array, *arrays: Array) -> Array:
    """`call(start, *arrays)`: arrays begin with a batch, which `jax.vmap` makes larger."""

    @jax.custom_batching.custom_vmap
    def run(start, *arrays):
        return call(start, *arrays)

    @run.def_vmap
    def _over(size, batched, start, *arrays):
        # Where a loop over chunks begins is never mapped.
        wide = (
            x if b else jnp.broadcast_to(x, (size, *x.shape))
            for x, b in zip(arrays, batched[1:], strict=True)
        )
        out = run(start, *(x.reshape(-1, *x.shape[2:]) for x in wide))
        return out.reshape(size, -1, *out.shape[1:]), True

    return run(start, *jax.lax.stop_gradient(arrays))
