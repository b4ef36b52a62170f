"""Triton kernels that put entries of lists in order of blocks, in whole tiles: as `plan.py` says,
and divide the tiles of each block among programs.

A program has a chunk of entries. It counts them by block; when the counts of all chunks are added
up, it knows its first place of each block and writes its entries there. Inside a chunk, 32 entries
are compared with one in a few operations on their bits. Nothing depends on which program is first.

`selected [B, T, U, n]` lies as the caller's; a table is one of its B * U, and entry `t * n + i` of
a table is place i of query t. Programs with the same chunk of all tables are neighbours, as their
entries are in memory.
"""

import typing

import triton
import triton.language as tl

# `tl.constexpr` is a mark for Triton, no type: run-time type checks leave the kernels alone.


@triton.jit
@typing.no_type_check
def _program(num_chunks, TABLES: tl.constexpr):
    """Batch entry, table of the batch entry, and chunk of a program."""
    program = tl.program_id(0)
    return program // TABLES // num_chunks, program % TABLES, program // TABLES % num_chunks


@triton.jit
@typing.no_type_check
def _blocks(selected, entry, batch, table, length, TABLES: tl.constexpr, PLACES: tl.constexpr):
    """Blocks of entries of a table, -1 for none and past the end."""
    token = batch.to(tl.int64) * length + entry // PLACES
    at = (token * TABLES + table) * PLACES + entry % PLACES
    return tl.load(selected + at, mask=entry < length * PLACES, other=-1)


@triton.jit
@typing.no_type_check
def _ones(x):
    """How many bits of int32 are set."""
    x = x.to(tl.uint32, bitcast=True)
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101 >> 24).to(tl.int32)


@triton.jit
@typing.no_type_check
def _equals_before(block, CHUNK: tl.constexpr, BITS: tl.constexpr):
    """How many equal numbers of BITS bits stand before each of `block [CHUNK]`."""
    WORDS: tl.constexpr = CHUNK // 32
    block = tl.reshape(block, [WORDS, 32])
    word, place = tl.arange(0, WORDS), tl.arange(0, 32)
    # Of 32 numbers and each of all of them, one bit for each of the 32 that is equal to it.
    equal = tl.full([WORDS, WORDS, 32], -1, tl.int32)
    for i in range(BITS):
        bit = (block >> i) & 1
        bits = tl.sum(bit << place[None, :], 1)
        equal &= ~(bits[:, None, None] ^ -bit[None, :, :])
    other, mine = word[:, None, None], word[None, :, None]
    before = tl.where(other == mine, (1 << place[None, None, :]) - 1, 0)
    before = tl.where(other < mine, -1, before)
    return tl.reshape(tl.sum(_ones(equal & before), 0), [CHUNK])


@triton.jit
@typing.no_type_check
def count_kernel(
    selected, length, num_chunks, num_blocks, counts, TABLES: tl.constexpr, PLACES: tl.constexpr,
    CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Entries of each block in each chunk: `[B, U, chunks, blocks]`; BINS >= blocks."""
    batch, table, chunk = _program(num_chunks, TABLES)
    entry = chunk * CHUNK + tl.arange(0, CHUNK)
    block = _blocks(selected, entry, batch, table, length, TABLES, PLACES)
    # What is in no list is counted as block 0, and subtracted.
    none = tl.sum((block < 0).to(tl.int32), 0)
    found = tl.histogram(tl.maximum(block, 0), BINS)
    bins = tl.arange(0, BINS)
    found -= tl.where(bins == 0, none, 0)
    counts += ((batch * TABLES + table).to(tl.int64) * num_chunks + chunk) * num_blocks
    tl.store(counts + bins, found, mask=bins < num_blocks)


@triton.jit
@typing.no_type_check
def sum_kernel(
    counts, num_chunks, num_blocks, before, totals, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr
):
    """Of each chunk and block the entries in earlier chunks, `[B, U, chunks, blocks]`, and in all.

    A program adds up BLOCKS blocks of a table, and loads CHUNKS chunks at a time.
    """
    parts = (num_blocks + BLOCKS - 1) // BLOCKS
    table = (tl.program_id(0) // parts).to(tl.int64)
    block = tl.program_id(0) % parts * BLOCKS + tl.arange(0, BLOCKS)
    total = tl.zeros([BLOCKS], tl.int32)
    for first in range(0, num_chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        inside = (chunk < num_chunks)[:, None] & (block < num_blocks)[None, :]
        at = (table * num_chunks + chunk)[:, None] * num_blocks + block[None, :]
        count = tl.load(counts + at, mask=inside, other=0).to(tl.int32)
        tl.store(before + at, total[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        total += tl.sum(count, 0)
    tl.store(totals + table * num_blocks + block, total, mask=block < num_blocks)


@triton.jit
@typing.no_type_check
def tiles_kernel(totals, num_blocks, starts, counts, TILE: tl.constexpr, BLOCKS: tl.constexpr):
    """First tile and number of tiles of each block with `totals [B, U, blocks]` entries.

    A program has one table, and BLOCKS blocks at a time.
    """
    row = tl.program_id(0).to(tl.int64) * num_blocks
    before = 0
    for first in range(0, num_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        total = tl.load(totals + row + block, mask=inside, other=0)
        count = (total + (TILE - 1)) // TILE
        tl.store(starts + row + block, before + tl.cumsum(count, 0) - count, mask=inside)
        tl.store(counts + row + block, count, mask=inside)
        before += tl.sum(count, 0)


@triton.jit
@typing.no_type_check
def segment_kernel(
    starts, counts, num_blocks, num_segments, work, first, number,
    PARTS: tl.constexpr, MOST: tl.constexpr, SEGMENTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Tiles of each block in segments of at most MOST: see `triton_plan.Segments`.

    A tile of `starts` and `counts` is PARTS tiles here. A program finds the blocks of SEGMENTS
    segments, and looks at BLOCKS blocks at a time.
    """
    parts = (num_segments + SEGMENTS - 1) // SEGMENTS
    table, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    segment = part * SEGMENTS + tl.arange(0, SEGMENTS)
    row = table * num_blocks
    block = tl.zeros([SEGMENTS], tl.int32)  # How many end before the segment,
    begin = tl.zeros([SEGMENTS], tl.int32)  # and where the last of them does.
    total = 0
    for low in range(0, num_blocks, BLOCKS):
        at = low + tl.arange(0, BLOCKS)
        inside = at < num_blocks
        count = tl.load(counts + row + at, mask=inside, other=0) * PARTS
        each = (count + (MOST - 1)) // MOST
        ends = total + tl.cumsum(each, 0)
        if part == 0:
            tl.store(first + row + at, ends - each, mask=inside)
            tl.store(number + row + at, each, mask=inside)
        past = inside[None, :] & (ends[None, :] <= segment[:, None])
        block += tl.sum(past.to(tl.int32), 1)
        begin = tl.maximum(begin, tl.max(tl.where(past, ends[None, :], 0), 1))
        total += tl.sum(each, 0)
    used = segment < total
    before = (segment - begin) * MOST
    start = tl.load(starts + row + block, mask=used, other=0) * PARTS
    count = tl.load(counts + row + block, mask=used, other=0) * PARTS
    work += (table * num_segments + segment) * 3
    valid = segment < num_segments
    tl.store(work, block, mask=valid)
    tl.store(work + 1, start + before, mask=valid)
    tl.store(work + 2, tl.where(used, tl.minimum(count - before, MOST), 0), mask=valid)


@triton.jit
@typing.no_type_check
def place_kernel(
    selected, before, totals, starts, length, num_chunks, num_blocks, num_tiles, entries,
    TABLES: tl.constexpr, PLACES: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The entry of each place `[B, U, tiles * TILE]`, T * n for padding of a block's last tile.

    `starts [B, U, blocks]` are first tiles; BITS are those of num_blocks; WIDTH >= TILE. Tiles
    after those of the last block are left as they are.
    """
    batch, table, chunk = _program(num_chunks, TABLES)
    entry = chunk * CHUNK + tl.arange(0, CHUNK)
    block = _blocks(selected, entry, batch, table, length, TABLES, PLACES)
    # Of entries that list nothing all bits are set, and no block is as large.
    number = _equals_before(block, CHUNK, BITS)
    row = (batch * TABLES + table).to(tl.int64)
    before += (row * num_chunks + chunk) * num_blocks
    totals += row * num_blocks
    starts += row * num_blocks
    entries += row * num_tiles * TILE
    listed = block >= 0
    place = tl.load(starts + block, mask=listed, other=0) * TILE + number
    place += tl.load(before + block, mask=listed, other=0)
    tl.store(entries + place, entry, mask=listed)
    # Padding: each program has its share of the blocks, BLOCKS at a time.
    at = tl.arange(0, WIDTH)[None, :]
    nothing = tl.full([BLOCKS, WIDTH], 0, tl.int32) + length * PLACES
    for first in range(chunk * BLOCKS, num_blocks, num_chunks * BLOCKS):
        other = first + tl.arange(0, BLOCKS)
        total = tl.load(totals + other, mask=other < num_blocks, other=0)
        end = tl.load(starts + other, mask=other < num_blocks, other=0) * TILE + total
        missing = (TILE - total % TILE) % TILE
        tl.store(entries + end[:, None] + at, nothing, mask=at < missing[:, None])
