"""Entries of lists by block, in whole tiles: what kernels that keep keys and fetch queries run on.

An entry is a query and one of the blocks that it lists. Their order is that of a stable sort by
block, found by counting: each block's entries in each chunk of entries, and each entry's equals
before it in its chunk. So an entry is moved once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparse_attn.ops import tiles

# There are entries x chunk comparisons and entries / chunk x blocks counts: at so many blocks per
# entry of a chunk the counts grow with the entries alone.
_BLOCKS_PER_ENTRY, _CHUNKS = 8, (32, 1024)
# Comparisons of a step. Accelerators never hold them: XLA sums them where it makes them; on a CPU
# it does not.
_AT_ONCE = {"cpu": 1 << 18, "gpu": 1 << 40, "tpu": 1 << 40}
# A loop costs an accelerator a launch per turn, and a CPU less to compile.
_SEARCH = {"cpu": "scan", "gpu": "scan_unrolled", "tpu": "scan_unrolled"}


class Plan(NamedTuple):
    """Where the entries of lists `[B, T, U, n]` lie: all int32, for each batch entry and table.

    Attributes:
      entry: `[B, U, tiles * tile]`, the entry of each place as `t * n + i`; T * n for padding.
      place: `[B, U, T, n]`, the place of each entry; past the end where nothing is listed.
      starts, counts: `[B, U, blocks]`, the tiles of each block.
      block: `[B, U, tiles]`, the block of each tile; `blocks` for tiles without entries.

    Kernels say neither `place` nor `block` (None), nor what is in tiles of no block.
    """

    entry: Any
    place: Any
    starts: Any
    counts: Any
    block: Any


def most_tiles(entries: int, *, tile: int, blocks: int) -> int:
    """Tiles that any lists of `entries` entries need at most: one of each block is not full."""
    return blocks + -(-entries // tile)


def split(count: int, most: int) -> tuple[int, int]:
    """For `count` places of a list: how many at a time, `most` or fewer but one, and how often.

    >>> split(16, 6), split(16, 0), split(3, 9)
    ((6, 3), (1, 16), (3, 1))
    """
    steps = -(-count // max(1, min(count, most)))
    return -(-count // steps), steps


def in_steps(selected: Int[Array, "B T U n"], places: int, steps: int) -> Int[Array, "s B T U p"]:
    """Lists with so many places at a time, -1 at the end.

    >>> in_steps(jnp.arange(3).reshape(1, 1, 1, 3), 2, 2).ravel().tolist()
    [0, 1, 2, -1]
    """
    widths = ((0, 0),) * 3 + ((0, steps * places - selected.shape[3]),)
    selected = jnp.pad(selected, widths, constant_values=-1)
    return jnp.moveaxis(selected.reshape(*selected.shape[:3], steps, places), 3, 0)


@tiles.one_program
def plan(selected: Int[Array, "B T U n"], *, tile: int, blocks: int) -> Plan:
    """Places for the entries of lists of blocks, -1 = none; `tile` entries a tile.

    Args:
      selected: blocks below `blocks`, or -1.

    Raises:
      NotImplementedError: places of a table that int32 cannot count.

    >>> found = plan(jnp.array([1, 0, 1, -1, 1]).reshape(1, 5, 1, 1), tile=2, blocks=2)
    >>> found.entry.ravel().tolist(), found.block.ravel().tolist()
    ([1, 5, 0, 2, 4, 5, 5, 5, 5, 5], [0, 1, 1, 2, 2])
    """
    _, length, _, count = selected.shape
    entries = length * count
    num_tiles = checked_tiles(entries, tile=tile, blocks=blocks)
    size = num_tiles * tile

    def one(selected):
        key = jnp.where(selected < 0, blocks, selected).ravel()
        number, totals = _numbered(key, blocks)
        counts = -(-totals // tile)
        ends = jnp.cumsum(counts)
        starts, owner = ends - counts, _owners(ends, num_tiles)
        listed = key < blocks
        index = jnp.arange(entries, dtype=jnp.int32)
        # Nothing is listed: past the end, and unique as well.
        place = jnp.where(
            listed, starts[jnp.minimum(key, blocks - 1)] * tile + number, size + index
        )
        entry = jnp.full(size, entries, jnp.int32)
        entry = entry.at[place].set(index, mode="drop", unique_indices=True)
        return Plan(entry, place.reshape(length, count), starts, counts, owner)

    return jax.vmap(jax.vmap(one))(selected.swapaxes(1, 2))


def checked_tiles(entries: int, *, tile: int, blocks: int) -> int:
    """`most_tiles`, where int32 can count their places.

    Raises:
      NotImplementedError: it cannot.
    """
    num_tiles = most_tiles(entries, tile=tile, blocks=blocks)
    if num_tiles * tile + entries > jnp.iinfo(jnp.int32).max:
        raise NotImplementedError(
            f"{entries} entries of a list in tiles of {tile} are more than int32 counts: pass fewer"
            " queries at a time"
        )
    return num_tiles


def _owners(ends, size):
    """Which block each of `size` places is of, by the ends of blocks; past the last, none."""
    at = jnp.arange(size, dtype=jnp.int32)
    found = jnp.searchsorted(ends, at, side="right", method=_SEARCH[tiles.target().platform])
    return found.astype(jnp.int32)


def _numbered(key, blocks):
    """How many equal keys stand before each of `key [m]`, and how many there are of each."""
    platform = tiles.target().platform
    chunk = tiles.power_of_two(max(1, blocks // _BLOCKS_PER_ENTRY))
    chunk = min(max(chunk, _CHUNKS[0]), _CHUNKS[1], key.size)
    step = max(1, min(-(-key.size // chunk), _AT_ONCE[platform] // chunk**2))
    keys = jnp.pad(key, (0, -key.size % (step * chunk)), constant_values=blocks)
    keys = keys.reshape(-1, chunk)
    at = jnp.arange(chunk, dtype=jnp.int32)

    def inside(keys):
        equal = (keys[:, :, None] == keys[:, None, :]) & (at[:, None] > at)
        return equal.sum(-1, dtype=jnp.int32)

    if step == keys.shape[0]:
        number = inside(keys)
    else:
        number = jax.lax.map(inside, keys.reshape(-1, step, chunk)).reshape(keys.shape)
    # Whole numbers: added in any order, they give the same.
    rows = jnp.arange(keys.shape[0], dtype=jnp.int32)[:, None]
    counts = jnp.zeros((keys.shape[0], blocks + 1), jnp.int32).at[rows, keys].add(1)
    sums = jnp.cumsum(counts, axis=0)
    number = number + jnp.take_along_axis(sums - counts, keys, axis=1)
    return number.ravel()[: key.size], sums[-1, :blocks]
