"""`BlockMask` from arrays and from block states, static and traced."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.masks import block_mask, lower, stats
from sparse_attn.patterns import causal, full, local

SIZES = {"q_len": 30, "kv_len": 21, "block_q": 8, "block_kv": 4}  # 4 x 6 blocks, both ends cut


def from_states(grid, **sizes):
    return block_mask.from_block_states(grid, rule=causal.Causal(), **(SIZES | sizes))


def assert_same(mask, other):
    for name in block_mask.ARRAYS:
        mine, theirs = getattr(mask, name), getattr(other, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_array_equal(mine, theirs, name)


grids = st.builds(
    lambda seed, share: np.random.default_rng(seed).choice(
        3, size=(4, 6), p=[1 - share, share / 2, share / 2]
    ),
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
)


@hypothesis.given(grid=grids)
def test_block_states_round_trip_static_and_traced(grid):
    static = from_states(grid)
    want = grid.copy()
    want[:, -1] = np.minimum(want[:, -1], 1)  # 21 keys do not fill the last block
    np.testing.assert_array_equal(block_mask.block_states(static), want)
    assert static.is_static
    traced = jitted_from_states(jnp.asarray(grid))
    assert not traced.is_static
    assert_same(static, traced)
    # Columns list the same blocks.
    flipped = np.zeros_like(want.T)
    for col in range(6):
        start, count, partial = (
            int(x[0, 0, col]) for x in (static.q_starts, static.q_counts, static.q_partial_counts)
        )
        listed = static.q_indices[0, 0, start : start + count]
        flipped[col, listed[:partial]], flipped[col, listed[partial:]] = 1, 2
    np.testing.assert_array_equal(flipped, want.T)


jitted_from_states = jax.jit(from_states)


def test_leading_axes_are_tables_and_batch():
    grid = np.random.default_rng(0).integers(0, 3, (2, 3, 4, 6))
    mask = from_states(grid)
    assert (mask.batch, mask.num_tables) == (2, 3)
    for b in range(2):
        for u in range(3):
            alone = block_mask.block_states(from_states(grid[b, u]))
            np.testing.assert_array_equal(block_mask.block_states(mask, batch=b, table=u), alone)
    assert from_states(grid[0]).num_tables == 3
    assert mask.tables_of_heads(6).tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="mask has 3 tables, which must divide num_heads=4"):
        mask.tables_of_heads(4)


def test_a_mask_is_a_pytree():
    mask = lower.lower(local.Local(window=5), q_len=20, block_q=4, block_kv=4)
    out = jax.jit(lambda m: m)(mask)
    assert_same(mask, out)
    assert (out.rules, out.block_q, out.max_kv) == (mask.rules, 4, mask.max_kv)
    assert "static" in repr(mask)
    assert "run-time" in repr(out)
    assert "Local(window=5, reach=None)" in repr(mask)
    assert mask._repr_html_().startswith("<pre")
    assert out._repr_html_() is None


@pytest.mark.parametrize(
    "grid, sizes, message",
    [
        (np.zeros((4, 5), int), {}, r"block_states.shape=\(4, 5\) must be \[..., 4, 6\]"),
        (np.zeros(6, int), {}, "must be"),
        (np.zeros((1, 1, 1, 4, 6), int), {}, "0 to 2 leading axes"),
        (np.zeros((4, 6), int), {"block_q": 0}, "block_q=0 must be >= 1"),
        (np.zeros((4, 6), int), {"kv_len": -1}, "kv_len=-1 must be >= 1"),
    ],
)
def test_block_states_must_fit(grid, sizes, message):
    with pytest.raises(ValueError, match=message):
        from_states(grid, **sizes)


def dense_of(mask, table=0):
    """The dense mask that a bit-carrying block mask stands for, from its row lists."""
    shape = mask.num_rows * mask.block_q, mask.num_cols * mask.block_kv
    out = np.zeros(shape, bool)
    for row in range(mask.num_rows):
        start, count, partial = (
            int(x[0, table, row]) for x in (mask.kv_starts, mask.kv_counts, mask.kv_partial_counts)
        )
        for i in range(start, start + count):
            col, slot = int(mask.kv_indices[0, table, i]), int(mask.kv_bits[0, table, i])
            tile = mask.bits[0, table, slot] != 0
            # Slot 0 is all ones: a FULL block that a segment cuts still has its bits.
            assert (slot == 0) == (i >= start + partial)
            assert slot > 0 or tile.all()
            out[
                row * mask.block_q : (row + 1) * mask.block_q,
                col * mask.block_kv : (col + 1) * mask.block_kv,
            ] = tile
    return out[: mask.q_len, : mask.kv_len]


@hypothesis.given(
    seed=st.integers(0, 1000),
    q_len=st.integers(1, 40),
    kv_len=st.integers(1, 40),
    block_q=st.integers(1, 16),
    block_kv=st.integers(1, 16),
    density=st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]),
)
def test_arrays_round_trip(seed, q_len, kv_len, block_q, block_kv, density):
    array = np.random.default_rng(seed).random((2, q_len, kv_len)) < density
    mask = block_mask.from_array(array, block_q=block_q, block_kv=block_kv)
    for table in range(2):
        np.testing.assert_array_equal(dense_of(mask, table), array[table])
        np.testing.assert_array_equal(stats.keys_per_row(mask, table=table), array[table].sum(1))
    # Columns carry the same slots.
    for table in range(2):
        by_row = listed(mask.kv_starts, mask.kv_counts, mask.kv_indices, mask.kv_bits, table)
        by_col = listed(mask.q_starts, mask.q_counts, mask.q_indices, mask.q_bits, table)
        assert {(row, col, slot) for col, row, slot in by_col} == by_row


def listed(starts, counts, indices, slots, table):
    """The set of (list, index, slot) of every listed block."""
    return {
        (i, int(indices[0, table, at]), int(slots[0, table, at]))
        for i, (start, count) in enumerate(zip(starts[0, table], counts[0, table]))
        for at in range(start, start + count)
    }


def test_an_array_agrees_with_its_pattern():
    pattern = causal.Causal() & ~local.Local(window=3)
    at = np.arange(50)
    from_array = block_mask.from_array(pattern.mask_fn(at[:, None], at), block_q=8, block_kv=16)
    lowered = lower.lower(pattern, q_len=50, block_q=8, block_kv=16)
    np.testing.assert_array_equal(
        block_mask.block_states(from_array), block_mask.block_states(lowered)
    )


def test_an_all_true_array_needs_no_bits_where_blocks_fit():
    mask = block_mask.from_array(np.ones((20, 16), bool), block_q=8, block_kv=8)
    assert (block_mask.block_states(mask) == 2).all()
    assert mask.bits.shape == (1, 1, 1, 8, 8)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.ones((4, 4)), "dtype float64 and shape .* must be a bool"),
        (np.ones(4, bool), r"shape \(4,\) must be"),
        (np.ones((0, 4), bool), "no empty axis"),
    ],
)
def test_arrays_are_checked(array, message):
    with pytest.raises(ValueError, match=message):
        block_mask.from_array(array)
    with pytest.raises(ValueError, match="block_kv=0 must be >= 1"):
        block_mask.from_array(np.ones((4, 4), bool), block_kv=0)


def test_entries_come_in_pieces():
    mask = lower.lower(full.Full(), q_len=40, kv_len=30, block_q=4, block_kv=4)
    pieces = list(block_mask.entries(mask, block_mask.BlockState.FULL, piece=9))
    assert [len(rows) for rows, _, _ in pieces] == [9] * 7 + [7]
    rows, cols, places = (np.concatenate(x) for x in zip(*pieces, strict=True))
    assert set(zip(rows.tolist(), cols.tolist())) == {(r, c) for r in range(10) for c in range(7)}
    np.testing.assert_array_equal(mask.kv_indices[0, 0, places], cols)
    edge = list(block_mask.entries(mask, block_mask.BlockState.PARTIAL))
    assert [x.tolist() for x in edge[0][:2]] == [list(range(10)), [7] * 10]
    nothing = from_states(np.zeros((4, 6), int))
    assert not list(block_mask.entries(nothing, block_mask.BlockState.PARTIAL))
