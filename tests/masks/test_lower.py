"""Lowering beyond what the contract of patterns checks: size, sharing, caching, errors."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn import patterns
from sparse_attn.masks import block_mask, curves, lower, tables
from sparse_attn.patterns import base, causal, local, per_head, sinks

MILLION = 1 << 20


@pytest.fixture
def peak_of():
    """Calls a function and returns its result and the peak of its allocations, in MB."""

    def measure(function):
        tracemalloc.start()
        result = function()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return result, peak / 1e6

    lower._lower.cache_clear()
    return measure


def test_a_million_tokens(peak_of):
    pattern = local.Local(window=4096) | sinks.Sinks(tokens=64)
    mask, peak = peak_of(lambda: lower.lower(pattern, q_len=MILLION))
    assert peak < 500
    rows = np.arange(MILLION // 128)
    window, partial_edge, sink = np.minimum(rows, 32) + 1, rows >= 32, rows > 32
    np.testing.assert_array_equal(mask.kv_counts[0, 0], window + sink)
    np.testing.assert_array_equal(mask.kv_partial_counts[0, 0], 1 + 1 * partial_edge + 1 * sink)
    cols = rows[::-1]
    below = np.minimum(cols, 32) + 1
    below[0] = len(rows)  # every query block sees the block of the sinks
    np.testing.assert_array_equal(mask.q_counts[0, 0], below)
    last = mask.kv_indices[0, 0, -34:]
    assert last.tolist() == [0, 8159, 8191, *range(8160, 8191)]
    for name in block_mask.ARRAYS:
        array = getattr(mask, name)
        assert array is None or (array.dtype == np.int32 and array.min() >= 0)


@pytest.mark.parametrize(
    "text",
    [
        "chunked(size=4096)",
        "global_tokens(tokens=64) & causal()",
        "random_blocks(block=128, num_blocks=3)",
        "dilated(window=128, dilation=64)",
        "(local(window=512) | random_blocks(block=128, num_blocks=2)) & ~sinks(tokens=4)",
    ],
)
def test_memory_follows_the_active_blocks(text, peak_of):
    mask, peak = peak_of(lambda: lower.lower(patterns.parse(text), q_len=MILLION))
    assert int(mask.kv_counts.sum()) < 1_000_000
    assert peak < 200


def test_dense_causal_at_a_million_tokens_fits_a_laptop(peak_of):
    mask, peak = peak_of(lambda: lower.lower(causal.Causal(), q_len=MILLION))
    assert int(mask.kv_counts.sum(dtype=np.int64)) == 8192 * 8193 // 2
    assert peak < 800


def test_one_block_and_huge_blocks():
    mask = lower.lower(causal.Causal(), q_len=5, block_q=128, block_kv=1 << 20)
    assert mask.kv_indices.tolist() == [[[0]]]
    assert mask.kv_partial_counts.tolist() == [[[1]]]


def test_the_region_size_does_not_matter(monkeypatch):
    pattern = (local.Local(window=9) | sinks.Sinks(tokens=3)) & ~local.Local(window=2)
    want = block_mask.block_states(
        lower.lower(pattern, q_len=301, kv_len=290, block_q=2, block_kv=3)
    )
    for coarsest, piece, chunk in ((1, 4, 8), (4, 1, 1 << 20), (256, 1 << 16, 6)):
        monkeypatch.setattr(lower, "_COARSEST", coarsest)
        monkeypatch.setattr(lower, "_PIECE", piece)
        monkeypatch.setattr(lower, "_CHUNK", chunk)
        lower._lower.cache_clear()
        again = lower.lower(pattern, q_len=301, kv_len=290, block_q=2, block_kv=3)
        np.testing.assert_array_equal(block_mask.block_states(again), want)
    lower._lower.cache_clear()


def test_a_pattern_without_block_state_is_evaluated():
    class Band(base.Pattern):
        def mask_fn(self, q_pos, kv_pos):
            return (q_pos - kv_pos) % 11 < 3

    got = lower.lower(Band(), q_len=40, block_q=8, block_kv=8)
    at = np.arange(40)
    tiles = Band().mask_fn(at[:, None], at).reshape(5, 8, 5, 8).swapaxes(1, 2)
    want = np.where(tiles.all((2, 3)), 2, 1 * tiles.any((2, 3)))
    np.testing.assert_array_equal(block_mask.block_states(got), want)


def test_equal_heads_share_a_table():
    window = local.Local(window=4)
    heads = per_head.PerHead((window, causal.Causal(), local.Local(window=4), window))
    mask = lower.lower(heads, q_len=32, block_q=8, block_kv=8)
    assert mask.num_tables == 2
    assert mask.rules == (window, causal.Causal())
    assert mask.head_tables == (0, 1, 0, 0)
    assert mask.tables_of_heads(4).tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match="a table for each of 4 heads, q has 8"):
        mask.tables_of_heads(8)
    for table, rule in enumerate(mask.rules):
        alone = lower.lower(rule, q_len=32, block_q=8, block_kv=8)
        np.testing.assert_array_equal(
            block_mask.block_states(mask, table=table), block_mask.block_states(alone)
        )
    # The shorter table is padded.
    assert (mask.kv_indices[0, 0, int(mask.kv_counts[0, 0].sum()) :] == -1).all()
    assert (mask.max_kv, mask.max_q) == (4, 4)


def test_results_are_cached_and_cannot_be_changed():
    mask = lower.lower(local.Local(window=4), q_len=32)
    assert lower.lower(local.Local(window=4), q_len=32, kv_len=32) is mask
    assert lower.lower(local.Local(window=4), q_len=33) is not mask
    for name in block_mask.ARRAYS:
        if (array := getattr(mask, name)) is not None:
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"q_len": 0}, "q_len=0 must be >= 1"),
        ({"q_len": 8, "kv_len": 0}, "kv_len=0 must be >= 1"),
        ({"q_len": 8, "block_q": 0}, "block_q=0 must be >= 1"),
        ({"q_len": 8, "block_kv": -4}, "block_kv=-4 must be >= 1"),
        ({"q_len": 1 << 31}, r"q_len=2147483648 must be >= 1 and < 2\*\*31"),
    ],
)
def test_sizes_are_checked(sizes, message):
    with pytest.raises(ValueError, match=message):
        lower.lower(causal.Causal(), **sizes)


def test_there_must_be_a_pattern():
    with pytest.raises(ValueError, match="must be a Pattern, a PerHead or patterns per head"):
        lower.lower((), q_len=8)


def test_more_active_blocks_than_int32_is_an_error(monkeypatch):
    monkeypatch.setattr(lower, "_INT32_MAX", 40)
    with pytest.raises(ValueError, match="block_q=4 and block_kv=4 must be larger: 45 active"):
        lower.lower(causal.Causal(), q_len=36, block_q=4, block_kv=4)


class _Wave(base.Pattern):
    def mask_fn(self, q_pos, kv_pos):
        return jnp.sin(q_pos * 1.0) > jnp.cos(kv_pos * 1.0)


@pytest.mark.parametrize("by", [lower.lower, tables.lower])
def test_a_pattern_that_computes_with_jax_is_lowered_inside_of_jit(by):
    given = {"q_len": 20} if by is lower.lower else {"order": curves.Gilbert((4, 5))}
    found = []

    @jax.jit
    def program(x):
        found.append(by(_Wave(), **given, block_q=4, block_kv=4))
        return x

    program(0.0)
    assert found[0].is_static
    lower._lower.cache_clear()
    tables.lower.cache_clear()
    np.testing.assert_array_equal(
        block_mask.block_states(found[0]),
        block_mask.block_states(by(_Wave(), **given, block_q=4, block_kv=4)),
    )
