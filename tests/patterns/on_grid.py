"""What the tests of patterns on grids share: element masks, pictures and loops over coordinates."""

import itertools

import numpy as np

from sparse_attn.masks import stats


def dense(pattern, q_len, kv_len=None):
    """The element mask, bool [q_len, kv_len]."""
    kv_len = q_len if kv_len is None else kv_len
    q_pos, kv_pos = np.arange(q_len, dtype=np.int32), np.arange(kv_len, dtype=np.int32)
    return pattern.mask_fn(q_pos[:, None], kv_pos[None, :])


def seen_from(pattern, query, shape=None):
    """What one query sees on its grid, as lines of '#' and '.'; the query itself is 'Q' or 'q'."""
    shape = pattern.shape if shape is None else shape
    at = np.int32(np.ravel_multi_index(query, shape))
    row = pattern.mask_fn(at, np.arange(np.prod(shape), dtype=np.int32))
    marks = np.where(row, "#", ".")
    marks[at] = "Q" if row[at] else "q"
    return ["".join(line) for line in marks.reshape(-1, shape[-1])]


def by_loop(shape, rule, kv_shape=None):
    """The element mask of `rule(query, key)` on coordinates, pair by pair."""
    queries = list(itertools.product(*map(range, shape)))
    keys = list(itertools.product(*map(range, kv_shape or shape)))
    return np.array([[bool(rule(q, k)) for k in keys] for q in queries])


def pairs(pattern, length, block=16):
    """Visible pairs, counted from the block lists."""
    counted = stats.of(pattern, q_len=length, block_q=block, block_kv=block)
    return round(counted.token_density * length * length)
