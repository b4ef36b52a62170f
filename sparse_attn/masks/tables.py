"""Lowering under an order that only a table knows: PARTIAL blocks become bits."""

import dataclasses
import functools

import jax
import numpy as np

from sparse_attn.masks import block_mask, grids, reorder
from sparse_attn.patterns import base

_CHUNK = 1 << 20  # Elements of mask_fn evaluated at a time.


@functools.lru_cache(maxsize=16)
@jax.ensure_compile_time_eval()  # A pattern may compute with jax, and the caller be in a jit.
def lower(
    pattern: base.Pattern,
    order: reorder.Reordering,
    *,
    block_q: int = 128,
    block_kv: int = 128,
) -> block_mask.BlockMask:
    """The static `BlockMask` of `pattern` when the tokens of one grid stand in `order`.

    For any order, and any pattern on the positions of one grid in row-major order. The box around
    each block of tokens rules out most pairs of blocks; the elements of the others are evaluated
    and kept, block_q * block_kv bytes for each PARTIAL block. O(nq * nk) time and memory.

    >>> from sparse_attn.masks import curves
    >>> from sparse_attn.patterns import neighborhood
    >>> near = neighborhood.Neighborhood(shape=(12, 10), kernel_size=3)
    >>> mask = lower(near, curves.Gilbert((12, 10)), block_q=8, block_kv=8)
    >>> int(mask.kv_counts.sum()), mask.bits.shape[2] - 1  # of 225 blocks; all are PARTIAL
    (81, 81)
    """
    length = order.size
    blocks = -(-length // block_q), -(-length // block_kv)
    q_boxes, kv_boxes = (_boxes(order, block) for block in (block_q, block_kv))
    states = np.empty(blocks, np.int8)
    for row in range(blocks[0]):
        states[row] = _state(pattern, [box[row, None] for box in q_boxes], kv_boxes, order.shape)
    if length % block_kv:  # Never FULL over the edge, where its elements are needed.
        states[:, -1] = np.minimum(states[:, -1], base.PARTIAL)
    rows, cols = np.nonzero(states == base.PARTIAL)
    tiles = [np.ones((1, block_q, block_kv), np.uint8)]
    step = max(1, _CHUNK // (block_q * block_kv))
    places = np.append(order.forward, np.int32(-1))
    for i in range(0, len(rows), step):
        at = slice(i, i + step)
        q = places[np.minimum(rows[at, None] * block_q + np.arange(block_q), length)][:, :, None]
        kv = places[np.minimum(cols[at, None] * block_kv + np.arange(block_kv), length)][:, None]
        seen = pattern.mask_fn(np.maximum(q, 0), np.maximum(kv, 0)) & (kv >= 0) & (q >= 0)
        # Queries past the end do not exist: they do not keep a block from being FULL.
        every, some = (seen | (q < 0)).all((1, 2)), seen.any((1, 2))
        exact = np.where(every, base.FULL, np.where(some, base.PARTIAL, base.EMPTY))
        states[rows[at], cols[at]] = exact
        tiles.append(seen[exact == base.PARTIAL].astype(np.uint8))
    mask = block_mask.from_block_states(
        states, rule=None, q_len=length, kv_len=length, block_q=block_q, block_kv=block_kv
    )
    partial = states == base.PARTIAL
    slots = np.where(partial, np.cumsum(partial).reshape(blocks), 0)
    return dataclasses.replace(
        mask,
        bits=np.concatenate(tiles)[None, None],
        kv_bits=_slots_of_lists(slots, mask.kv_indices),
        q_bits=_slots_of_lists(slots.T, mask.q_indices),
        max_kv=int((states > 0).sum(1).max()),
        max_q=int((states > 0).sum(0).max()),
    )


def _slots_of_lists(slots, indices):
    listed = indices.reshape(slots.shape)
    found = np.take_along_axis(slots, np.maximum(listed, 0), 1)
    return np.where(listed >= 0, found, -1).reshape(1, 1, -1).astype(np.int32)


def _boxes(order, block):
    """First and last coordinate along each axis of each block of places, two arrays per axis."""
    starts = np.arange(0, order.size, block)
    boxes = []
    for coordinate in np.unravel_index(order.forward, order.shape):
        lows, highs = (f.reduceat(coordinate, starts) for f in (np.minimum, np.maximum))
        boxes.append(np.stack([lows, highs + 1], -1))
    return boxes


def _state(pattern, q_boxes, kv_boxes, shape):
    """State of boxes of tokens; PARTIAL where the pattern cannot say."""
    recurse = functools.partial(_state, q_boxes=q_boxes, kv_boxes=kv_boxes, shape=shape)
    match pattern:
        case base.And(a=a, b=b):
            return np.minimum(recurse(a), recurse(b))
        case base.Or(a=a, b=b):
            return np.maximum(recurse(a), recurse(b))
        case base.Not(a=a):
            return base.FULL - recurse(a)
        case grids.GridPattern(shape=grid, kv_shape=kv_grid) if grid == kv_grid == shape:
            q, kv = (
                tuple(grids.Span(box[..., 0], box[..., 1]) for box in boxes)
                for boxes in (q_boxes, kv_boxes)
            )
            return pattern.box_state(q, kv)
    ranges = []
    for boxes in (q_boxes, kv_boxes):
        first = reorder.ravel([0, *(box[..., 0] for box in boxes)], shape)
        last = reorder.ravel([0, *(box[..., 1] - 1 for box in boxes)], shape)
        ranges += [first, last + 1]
    return pattern.block_state(*ranges)
