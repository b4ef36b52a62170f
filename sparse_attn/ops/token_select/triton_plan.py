"""The plan of entries by block on NVIDIA GPUs: launches the kernels of `plan_kernels.py`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparse_attn.ops import tiles
from sparse_attn.ops.block_sparse import triton_gpu
from sparse_attn.ops.token_select import plan as plan_lib
from sparse_attn.ops.token_select import plan_kernels

# Counts of a chunk are in the registers of a warp: XLA plans for more.
_MOST_BLOCKS = 4096


# Blocks at a time of the kernel that counts tiles, and of the one that pads them; segments and
# blocks at a time of the one that divides tiles among programs.
_COUNTED, _PADDED = 1024, 4
_SEGMENTS, _BLOCKS = 32, 128


class Segments(NamedTuple):
    """Consecutive tiles of one block, a few at a time: all int32, for each batch entry and table.

    Attributes:
      work: `[B, U, segments, 3]`, the block, the first tile and the number of tiles of each; no
        tiles where there is nothing left.
      starts, counts: `[B, U, blocks]`, the segments of each block.
    """

    work: Any
    starts: Any
    counts: Any


class Sizes(NamedTuple):
    """What a program works on, powers of two, and how many warps work on it.

    Attributes:
      chunk: entries of a program that counts and places.
      warps: of these programs.
      sum_chunks, sum_blocks: counts that a program adds up at a time.
      sum_warps: of these programs.
    """

    chunk: int
    warps: int
    sum_chunks: int
    sum_blocks: int
    sum_warps: int


def sizes(blocks: int) -> Sizes:
    """For `blocks` blocks: at most 8 counts per entry; the work per entry grows with the chunk.

    >>> [sizes(blocks).chunk for blocks in (256, 2048, 4096)]
    [256, 256, 512]
    """
    chunk = max(256, tiles.power_of_two(-(-blocks // 8)))
    return Sizes(chunk, chunk // 128, 256, 16, 8)


def plan(selected: Int[Array, "B T U n"], *, tile: int, blocks: int) -> plan_lib.Plan:
    """As `plan.plan`, to the same result as far as `plan.Plan` says that kernels give it.

    >>> lists = jnp.zeros((1, 8, 1, 2), jnp.int32)
    >>> plan(lists, tile=4, blocks=_MOST_BLOCKS + 1).entry.shape  # XLA's, where there are many
    (1, 1, 16404)
    """
    if blocks > _MOST_BLOCKS:
        found = plan_lib.plan(selected, tile=tile, blocks=blocks)
        return found._replace(place=None, block=None)
    batch, length, tables, places = selected.shape
    num_tiles = plan_lib.checked_tiles(length * places, tile=tile, blocks=blocks)
    size = sizes(blocks)
    chunks = -(-length * places // size.chunk)
    call = triton_gpu.jax_triton().triton_call
    counted, of_blocks = (
        jax.ShapeDtypeStruct((batch, tables, *shape), jnp.int32)
        for shape in ((chunks, blocks), (blocks,))
    )
    chunked = {
        "grid": (batch * tables * chunks,), "TABLES": tables, "PLACES": places,
        "CHUNK": size.chunk,
    }  # fmt: skip
    (counts,) = call(
        selected, length, chunks, blocks, kernel=plan_kernels.count_kernel, out_shape=(counted,),
        num_warps=size.warps, num_stages=1, BINS=max(64, tiles.power_of_two(blocks)),
        **chunked,
    )  # fmt: skip
    before, totals = call(
        counts, chunks, blocks, kernel=plan_kernels.sum_kernel, out_shape=(counted, of_blocks),
        grid=(batch * tables * -(-blocks // size.sum_blocks),), num_warps=size.sum_warps,
        num_stages=1, CHUNKS=size.sum_chunks, BLOCKS=size.sum_blocks,
    )  # fmt: skip
    starts, counts = call(
        totals, blocks, kernel=plan_kernels.tiles_kernel, out_shape=(of_blocks, of_blocks),
        grid=(batch * tables,), num_warps=4, num_stages=1, TILE=tile, BLOCKS=_COUNTED,
    )  # fmt: skip
    (entry,) = call(
        selected, before, totals, starts, length, chunks, blocks, num_tiles,
        kernel=plan_kernels.place_kernel,
        out_shape=(jax.ShapeDtypeStruct((batch, tables, num_tiles * tile), jnp.int32),),
        num_warps=size.warps, num_stages=1, BITS=blocks.bit_length(), TILE=tile,
        WIDTH=tiles.power_of_two(tile), BLOCKS=_PADDED, **chunked,
    )  # fmt: skip
    return plan_lib.Plan(entry, None, starts, counts, None)


def segments(plan: plan_lib.Plan, *, tile: int, parts: int, most: int) -> Segments:
    """The tiles of each block in segments of at most `most`.

    Their number is bound by the lists' sizes: full ones, and one of each block that is not full.

    Args:
      tile: entries of a tile of `plan`.
      parts: tiles of the segments in one of these.
    """
    batch, tables, blocks = plan.counts.shape
    count = plan.entry.shape[2] // tile * parts // most + blocks
    of_blocks = jax.ShapeDtypeStruct(plan.counts.shape, jnp.int32)
    found = triton_gpu.jax_triton().triton_call(
        plan.starts, plan.counts, blocks, count, kernel=plan_kernels.segment_kernel,
        out_shape=(
            jax.ShapeDtypeStruct((batch, tables, count, 3), jnp.int32), of_blocks, of_blocks
        ),
        grid=(batch * tables * -(-count // _SEGMENTS),), num_warps=4, num_stages=1,
        PARTS=parts, MOST=most, SEGMENTS=_SEGMENTS, BLOCKS=_BLOCKS,
    )  # fmt: skip
    return Segments(*found)
