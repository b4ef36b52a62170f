"""Triton kernels that put entries of lists in order of blocks, in whole tiles: as `plan.py` says.

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
def place_kernel(
    selected, before, totals, starts, owner, length, num_chunks, num_blocks, num_tiles, entries,
    TABLES: tl.constexpr, PLACES: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The entry of each place `[B, U, tiles * TILE]`, T * n for padding.

    `starts [B, U, blocks]` are first tiles, `owner [B, U, tiles]` the block of each, or num_blocks.
    BITS are those of num_blocks.
    """
    batch, table, chunk = _program(num_chunks, TABLES)
    at = tl.arange(0, CHUNK)
    entry = chunk * CHUNK + at
    block = _blocks(selected, entry, batch, table, length, TABLES, PLACES)
    # Of entries that list nothing all bits are set, and no block is as large.
    number = _equals_before(block, CHUNK, BITS)
    row = (batch * TABLES + table).to(tl.int64)
    before += (row * num_chunks + chunk) * num_blocks
    totals += row * num_blocks
    starts += row * num_blocks
    owner += row * num_tiles
    entries += row * num_tiles * TILE
    listed = block >= 0
    place = tl.load(starts + block, mask=listed, other=0) * TILE + number
    place += tl.load(before + block, mask=listed, other=0)
    tl.store(entries + place, entry, mask=listed)
    # Padding: each program looks through its share of the places.
    size = num_tiles * TILE
    share = (size + num_chunks - 1) // num_chunks
    last = tl.minimum((chunk + 1) * share, size)
    for first in range(chunk * share, last, CHUNK):
        place = first + at
        inside = place < last
        mine = tl.load(owner + place // TILE, mask=inside, other=num_blocks)
        used = mine < num_blocks
        end = tl.load(starts + mine, mask=used, other=0) * TILE
        end += tl.load(totals + mine, mask=used, other=0)
        nothing = tl.full([CHUNK], 0, tl.int32) + length * PLACES
        tl.store(entries + place, nothing, mask=inside & (place >= end))
