"""The plan of entries by block on NVIDIA GPUs: launches the kernels of `plan_kernels.py`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparse_attn.ops import tiles
from sparse_attn.ops.block_sparse import triton_gpu
from sparse_attn.ops.token_select import plan as plan_lib
from sparse_attn.ops.token_select import plan_kernels

# Counts of a chunk are in the registers of a warp: XLA plans for more.
_MOST_BLOCKS = 4096


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
    """As `plan.plan`, to the same result without `place`; see there.

    >>> lists = jnp.zeros((1, 8, 1, 2), jnp.int32)
    >>> plan(lists, tile=4, blocks=_MOST_BLOCKS + 1).entry.shape  # XLA's, where there are many
    (1, 1, 16404)
    """
    if blocks > _MOST_BLOCKS:
        return plan_lib.plan(selected, tile=tile, blocks=blocks)._replace(place=None)
    batch, length, tables, places = selected.shape
    num_tiles = plan_lib.checked_tiles(length * places, tile=tile, blocks=blocks)
    size = sizes(blocks)
    chunks = -(-length * places // size.chunk)
    call = triton_gpu.jax_triton().triton_call
    counted = (batch, tables, chunks, blocks)
    chunked = {
        "grid": (batch * tables * chunks,), "TABLES": tables, "PLACES": places,
        "CHUNK": size.chunk,
    }  # fmt: skip
    (counts,) = call(
        selected, length, chunks, blocks, kernel=plan_kernels.count_kernel,
        out_shape=(jax.ShapeDtypeStruct(counted, jnp.int32),),
        num_warps=size.warps, num_stages=1, BINS=max(64, tiles.power_of_two(blocks)),
        **chunked,
    )  # fmt: skip
    before, totals = call(
        counts, chunks, blocks, kernel=plan_kernels.sum_kernel,
        out_shape=(
            jax.ShapeDtypeStruct(counted, jnp.int32),
            jax.ShapeDtypeStruct((batch, tables, blocks), jnp.int32),
        ),
        grid=(batch * tables * -(-blocks // size.sum_blocks),), num_warps=size.sum_warps,
        num_stages=1, CHUNKS=size.sum_chunks, BLOCKS=size.sum_blocks,
    )  # fmt: skip
    starts, counts, owner = plan_lib.tiles_of(totals, tile, num_tiles)
    (entry,) = call(
        selected, before, totals, starts, owner, length, chunks, blocks, num_tiles,
        kernel=plan_kernels.place_kernel,
        out_shape=(jax.ShapeDtypeStruct((batch, tables, num_tiles * tile), jnp.int32),),
        num_warps=size.warps, num_stages=1, BITS=blocks.bit_length(), TILE=tile, **chunked,
    )  # fmt: skip
    return plan_lib.Plan(entry, None, starts, counts, owner)
