"""Sequence attention of papers that needs no pattern of its own: expressions, and their laws."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn import patterns
from sparse_attn.masks import lower, segments
from sparse_attn.patterns import causal
from tests.patterns import on_grid


@pytest.mark.parametrize("window, first", [(8, 4), (1, 1), (5, 30)])
def test_streaming_is_sinks_and_a_window(pairs, window, first):
    """Efficient streaming language models with attention sinks [arXiv:2309.17453, sec. 3.2]."""
    streaming = patterns.parse(f"local(window={window}) | sinks(tokens={first})")
    length = 60
    i, j = np.ogrid[:length, :length]
    mask = on_grid.dense(streaming, length)
    np.testing.assert_array_equal(mask, ((j < first) | (i - j < window)) & (j <= i))
    keys = [min(t + 1, window + min(first, max(0, t + 1 - window))) for t in range(length)]
    assert pairs(streaming, length) == sum(keys)
    assert mask.sum(1).max() <= window + first
    short = on_grid.dense(streaming, window + first)
    np.testing.assert_array_equal(short, on_grid.dense(causal.Causal(), window + first))


def test_streaming_at_a_million_tokens():
    mask = lower.lower(patterns.parse("local(window=1024) | sinks(tokens=4)"), q_len=1 << 20)
    assert mask.kv_counts.sum() == sum(min(i + 1, 9) + (i >= 9) for i in range(8192))


def test_overlapping_windows_of_documents_are_a_halo():
    """Local self-attention over long text [arXiv:2005.04908]: windows of `size` with an overlap.

    Every document is packed from a window's start, and padding costs no window.
    """
    size, overlap = 8, 2
    lengths, pack = (19, 8, 3), 48
    windows = patterns.parse(f"halo(shape=({pack},), block={size}, halo={overlap})")
    ids, token = np.zeros(pack, np.int32), 0
    for document, length in enumerate(lengths, 1):
        ids[token : token + length] = document
        token += -(-length // size) * size
    at = np.arange(pack)
    start = at // size * size
    want = (at >= start[:, None] - overlap) & (at < start[:, None] + size + overlap)
    np.testing.assert_array_equal(on_grid.dense(windows, pack), want)
    lowered = lower.lower(windows, q_len=pack, block_q=size, block_kv=size)
    kept = segments.restrict(lowered, jnp.asarray(ids)[None], jnp.asarray(ids)[None])
    assert (np.asarray(kept.kv_counts) > 0).sum() == sum(-(-n // size) for n in lengths)


@pytest.mark.parametrize("reach", [0, 3, 20])
def test_monotonic_local_attention_of_a_decoder(reach):
    """Attention-based translation, local-m [arXiv:1508.04025, sec. 3.2]: a window in the source.

    local-p centres the window at a predicted place and weighs it: decided at run time.
    """
    targets, sources = 15, 12
    window = patterns.parse(f"local(reach=({reach}, {reach}))")
    mask = on_grid.dense(window, targets, sources)
    for t, row in enumerate(mask):
        in_range = max(0, min(t + reach, sources - 1) - max(t - reach, 0) + 1)
        assert row.sum() == min(2 * reach + 1, in_range)
    assert mask.all() == (reach >= sources)


def test_three_window_layers_after_a_full_one():
    """SmallThinker [arXiv:2507.20984]: cached tokens are a quarter full, the rest windows."""
    num_layers, length, window = 8, 60, 16
    local = f"local(window={window})"
    schedule = patterns.parse(f"per_layer((causal(), {local}, {local}, {local}))")
    kept = [on_grid.dense(schedule.for_layer(i), length)[-1].sum() for i in range(num_layers)]
    assert sum(kept) == num_layers // 4 * length + 3 * num_layers // 4 * min(length, window)
