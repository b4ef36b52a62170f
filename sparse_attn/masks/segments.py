"""Packed documents and explicit positions: run-time facts that sharpen a `BlockMask`."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparse_attn.masks import block_mask, programs
from sparse_attn.patterns import base

_NONE = jnp.iinfo(jnp.int32).max


@programs.one_program()
def restrict(
    mask: block_mask.BlockMask,
    q_segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
) -> block_mask.BlockMask:
    """Drops listed blocks whose queries and keys share no document; run-time, per batch entry.

    A token sees only tokens with its own segment id; id 0 is padding: it sees and is seen by
    nothing. FULL blocks that are not inside one document become PARTIAL, so a backend applies the
    segment rule in PARTIAL blocks only. Works for ids in any order, and drops most where equal
    ids are neighbours (packed documents).

    >>> import numpy as np
    >>> from sparse_attn.masks import lower
    >>> from sparse_attn.patterns import causal
    >>> mask = lower.lower(causal.Causal(), q_len=8, block_q=2, block_kv=2)
    >>> ids = jnp.array([[1, 1, 1, 1, 2, 2, 0, 0]])
    >>> restrict(mask, ids, ids).kv_counts[0, 0].tolist()  # 4 document rows instead of 1 2 3 4
    [1, 2, 1, 0]
    """
    q_low, q_high, q_all = block_ranges(q_segment_ids, mask.block_q, mask.num_rows)
    kv_low, kv_high, kv_all = block_ranges(kv_segment_ids, mask.block_kv, mask.num_cols)
    kv_starts, kv_counts, kv_partial, kv_indices, kv_bits = _restrict_lists(
        mask.kv_starts, mask.kv_counts, mask.kv_partial_counts, mask.kv_indices, mask.kv_bits,
        (q_low, q_high, q_all), (kv_low, kv_high, kv_all),
    )  # fmt: skip
    q_starts, q_counts, q_partial, q_indices, q_bits = _restrict_lists(
        mask.q_starts, mask.q_counts, mask.q_partial_counts, mask.q_indices, mask.q_bits,
        (kv_low, kv_high, kv_all), (q_low, q_high, q_all),
    )  # fmt: skip
    bits = mask.bits
    if bits is not None:
        bits = jnp.broadcast_to(bits, (kv_counts.shape[0], *bits.shape[1:]))
    return dataclasses.replace(
        mask,
        kv_starts=kv_starts, kv_counts=kv_counts, kv_partial_counts=kv_partial,
        kv_indices=kv_indices, q_starts=q_starts, q_counts=q_counts,
        q_partial_counts=q_partial, q_indices=q_indices, kv_bits=kv_bits, q_bits=q_bits,
        bits=bits,
    )  # fmt: skip


@programs.one_program()
def block_ranges(segment_ids, block, num_blocks):
    """Lowest and highest id of each block, and the id that all its tokens share (else 0)."""
    batch, length = segment_ids.shape
    # Tokens past the end repeat the last one: they do not exist, so they may not split a block.
    ids = jnp.pad(segment_ids, ((0, 0), (0, num_blocks * block - length)), mode="edge")
    ids = ids.reshape(batch, num_blocks, block)
    low = jnp.where(ids == 0, _NONE, ids).min(-1)
    high = ids.max(-1, where=ids != 0, initial=-_NONE)
    return low, high, jnp.where((ids == ids[..., :1]).all(-1), ids[..., 0], 0)


def _restrict_lists(starts, counts, partial_counts, indices, bits, mine, theirs):
    """Re-sorts every row's list to PARTIAL, FULL, dropped. Rows keep their places."""
    batch = mine[0].shape[0]
    arrays = (starts, counts, partial_counts, indices)
    starts, counts, partial_counts, indices = (
        jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in arrays
    )
    num_rows, length = counts.shape[-1], indices.shape[-1]
    width = theirs[0].shape[-1]

    def one_table(starts, counts, partial_counts, indices, bits, mine, theirs):
        # Rows lie one behind the other in the list, so the row of an entry is a search.
        row = jnp.searchsorted(starts, jnp.arange(length), side="right") - 1
        # Rows without a slot share their start with the next one: the search finds the last.
        offset = jnp.arange(length) - starts[row]
        listed = (offset < counts[row]) & (indices >= 0)
        other = jnp.where(listed, indices, 0)
        overlap = (mine[0][row] <= theirs[1][other]) & (theirs[0][other] <= mine[1][row])
        same = (mine[2][row] == theirs[2][other]) & (mine[2][row] != 0)
        full = listed & (offset >= partial_counts[row]) & same
        kept = listed & overlap
        state = jnp.where(full, 1, jnp.where(kept, 0, 2))
        indices, slot = _sorted(row, state, other, (num_rows, 3, width), bits)
        counts = jax.ops.segment_sum(kept.astype(jnp.int32), row, num_rows)
        partial = jax.ops.segment_sum((kept & ~full).astype(jnp.int32), row, num_rows)
        return starts, counts, partial, indices, slot

    tables = jax.vmap(one_table, in_axes=(0, 0, 0, 0, None if bits is None else 0, None, None))
    bits_in = None if bits is None else jnp.broadcast_to(bits, indices.shape)
    batched = jax.vmap(tables, in_axes=(0, 0, 0, 0, None if bits is None else 0, 0, 0))
    *lists, slot = batched(starts, counts, partial_counts, indices, bits_in, mine, theirs)
    return *lists, None if bits is None else slot


def _sorted(row, state, column, sizes, bits):
    """Columns by row and state, -1 where the state is 2, and their `bits` (None without).

    A sort of keys with payloads takes a TPU compiler many times as long as one of numbers alone, so
    they are packed into one number wherever they fit.
    """
    num_rows, num_states, width = sizes
    if num_rows * num_states * width <= _NONE:
        key = (row * num_states + state) * width + column
        if bits is None:
            key, slot = jax.lax.sort(key, is_stable=False), None
        else:
            key, slot = jax.lax.sort((key, bits), num_keys=1, is_stable=False)
        within = key % (num_states * width)
        return jnp.where(within < 2 * width, within % width, -1), slot
    payload = () if bits is None else (bits,)
    _, key, *slot = jax.lax.sort((row, state * width + column, *payload), num_keys=2)
    return jnp.where(key < 2 * width, key % width, -1), slot[0] if slot else None


@programs.one_program()
def lower_at(
    pattern: base.Pattern,
    q_positions: Int[Array, "M T"],
    kv_positions: Int[Array, "M S"],
    *,
    block_q: int = 128,
    block_kv: int = 128,
) -> block_mask.BlockMask:
    """The run-time `BlockMask` of a pattern whose tokens stand at the given absolute positions.

    For decoding (a query at position 1000 against a cache), sharded queries and permuted tokens.
    Blocks are classified by the range of positions they hold: exact where positions are
    consecutive, conservative elsewhere. O(nq * nk) memory.

    >>> from sparse_attn.patterns import local
    >>> mask = lower_at(local.Local(window=4), jnp.array([[9]]), jnp.arange(12)[None],
    ...                 block_q=1, block_kv=4)
    >>> mask.kv_indices[0, 0].tolist(), mask.kv_counts[0, 0].tolist()
    ([1, 2, -1], [2])
    """

    def ranges(positions, block):
        batch, length = positions.shape
        num_blocks = -(-length // block)
        padded = jnp.pad(positions, ((0, 0), (0, num_blocks * block - length)), mode="edge")
        padded = padded.reshape(batch, num_blocks, block)
        return padded.min(-1), padded.max(-1) + 1

    q_lo, q_hi = (x[:, :, None] for x in ranges(q_positions, block_q))
    kv_lo, kv_hi = (x[:, None, :] for x in ranges(kv_positions, block_kv))
    state = pattern.block_state(q_lo, q_hi, kv_lo, kv_hi)
    shape = (q_lo.shape[0], 1, q_lo.shape[1], kv_lo.shape[2])
    state = jnp.broadcast_to(jnp.asarray(state), (shape[0], *shape[2:])).reshape(shape)
    return block_mask.from_block_states(
        state,
        rule=pattern,
        q_len=q_positions.shape[1],
        kv_len=kv_positions.shape[1],
        block_q=block_q,
        block_kv=block_kv,
    )
