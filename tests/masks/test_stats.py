"""Counts against closed forms; brute force over all patterns is in test_contract.py."""

import math
import tracemalloc

import jax
import numpy as np
import pytest

from sparse_attn import patterns
from sparse_attn.masks import block_mask, lower, stats
from sparse_attn.patterns import causal, chunked, full, local, per_head


@pytest.mark.parametrize("length", [1, 128, 1000, 4097])
def test_causal(length):
    counted = stats.of(causal.Causal(), q_len=length)
    blocks = math.ceil(length / 128)
    assert counted.token_density == (length + 1) / (2 * length)
    assert counted.active_blocks == blocks * (blocks + 1) / 2
    assert counted.block_density == (blocks + 1) / (2 * blocks)
    assert counted.partial_blocks == blocks
    assert (counted.keys_per_row_min, counted.keys_per_row_max) == (1, length)
    assert counted.keys_per_row_mean == (length + 1) / 2
    assert counted.empty_rows == 0
    assert counted.imbalance == blocks / ((blocks + 1) / 2)


def test_a_window_of_a_million_tokens_is_counted_exactly():
    length, window = 1 << 20, 512
    mask = lower.lower(local.Local(window=window), q_len=length)
    tracemalloc.start()
    counted = stats.of(mask)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counted.token_density == (window * (window + 1) / 2 + (length - window) * window) / (
        length * length
    )
    assert peak < 100e6


def test_chunks():
    counted = stats.of(chunked.Chunked(size=256, two_sided=True), q_len=1024)
    assert counted.token_density == counted.block_density == 1 / 4
    assert (counted.partial_blocks, counted.full_blocks) == (0, 16)
    assert counted.imbalance == 1


def test_empty_rows_and_empty_masks():
    nothing = stats.of(causal.Causal() & ~causal.Causal(), q_len=300)
    assert (nothing.token_density, nothing.block_density, nothing.empty_rows) == (0, 0, 300)
    assert (nothing.keys_per_row_max, nothing.imbalance) == (0, 1)
    assert nothing.useful_flops(64, 8) == nothing.executed_flops(64, 8) == 0
    assert stats.of(causal.Causal() & ~local.Local(window=1), q_len=300).empty_rows == 1
    # With more queries than keys the last ones see nothing of the window.
    assert stats.of(local.Local(window=4), q_len=300, kv_len=100).empty_rows == 197


def test_heads_are_averaged():
    one = stats.of(causal.Causal(), q_len=512)
    two = stats.of(full.Full(), q_len=512)
    both = stats.of(per_head.PerHead((causal.Causal(), full.Full(), full.Full())), q_len=512)
    for name in ("token_density", "block_density", "partial_blocks", "full_blocks"):
        mean = (getattr(one, name) + 2 * getattr(two, name)) / 3
        assert getattr(both, name) == pytest.approx(mean, rel=1e-15)
    assert (both.keys_per_row_min, both.keys_per_row_max) == (1, 512)


def test_batches_are_averaged():
    grid = np.stack([np.full((1, 4, 4), 2), np.zeros((1, 4, 4), int)])
    mask = block_mask.from_block_states(
        grid, rule=full.Full(), q_len=32, kv_len=32, block_q=8, block_kv=8
    )
    counted = stats.of(mask)
    assert (counted.token_density, counted.full_blocks, counted.empty_rows) == (0.5, 8, 16)


def test_arbitrary_arrays():
    array = np.random.default_rng(0).random((3, 70, 50)) < 0.1
    array[:, :, :16] = True
    counted = stats.of(block_mask.from_array(array, block_q=16, block_kv=16))
    assert counted.token_density == array.mean()
    assert counted.full_blocks == 5
    assert counted.keys_per_row_min == array.sum(2).min()


def test_flops_and_bytes():
    counted = stats.of(causal.Causal(), q_len=1000)
    pairs, blocks = 1000 * 1001 / 2, 36
    assert counted.useful_flops(64, 8) == pytest.approx(4 * 64 * 8 * pairs, rel=1e-15)
    assert counted.executed_flops(64, 8) == 4 * 64 * 8 * blocks * 128 * 128
    # Backward: five products instead of two.
    assert counted.executed_flops(64, 8, backward=True) == 2.5 * counted.executed_flops(64, 8)
    # q k^T, dq, dk are over 192; p v, dv and dout v^T over 128.
    assert counted.executed_flops(192, 1, 128) == 2 * (192 + 128) * blocks * 128**2
    assert counted.executed_flops(192, 1, 128, True) == 2 * (3 * 192 + 2 * 128) * blocks * 128**2
    assert counted.kv_bytes(64, 2) == blocks * 128 * 2 * (64 + 64) * 2
    assert counted.kv_bytes(192, 2, 128, itemsize=4) == blocks * 128 * 2 * (192 + 128) * 4


def test_expensive_token_counts_can_be_left_out():
    column = patterns.parse("strided(stride=64, part='column')")
    counted = stats.of(column, q_len=1 << 14, max_pairs=1 << 20)
    assert counted.token_density is None
    assert counted.keys_per_row_min is None
    assert counted.empty_rows is None
    assert counted.block_density == 129 / 256
    with pytest.raises(ValueError, match="useful_flops needs token_density"):
        counted.useful_flops(64, 8)
    cheap = stats.of(full.Full(), q_len=1 << 14, max_pairs=0)
    assert cheap.token_density == 1


def test_what_cannot_be_counted():
    mask = lower.lower(causal.Causal(), q_len=64)
    with pytest.raises(ValueError, match="q_len=None must be a number of tokens"):
        stats.of(causal.Causal())
    with pytest.raises(ValueError, match="q_len=64, kv_len=None must be None"):
        stats.of(mask, q_len=64)
    with pytest.raises(ValueError, match="must be static"):
        stats.of(jax.tree.map(jax.numpy.asarray, mask))
