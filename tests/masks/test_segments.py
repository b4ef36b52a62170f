"""Documents and positions: what they leave of a mask, against every element."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.masks import block_mask, lower, segments
from sparse_attn.patterns import causal, full, local, sinks

CAUSAL = causal.Causal()
PATTERNS = (CAUSAL, full.Full(), local.Local(window=5) | sinks.Sinks(tokens=2), CAUSAL & ~CAUSAL)


def elements(states, rule, block_q, block_kv, q_ids, kv_ids):
    """Pairs that a kernel shows: all of FULL blocks, rule and documents in PARTIAL ones."""
    shape = len(q_ids), len(kv_ids)
    state = states.repeat(block_q, 0).repeat(block_kv, 1)[: shape[0], : shape[1]]
    same = (q_ids[:, None] == kv_ids) & (q_ids[:, None] != 0)
    return (state == 2) | ((state == 1) & rule & same)


def visible(rule, q_ids, kv_ids):
    return rule & (q_ids[:, None] == kv_ids) & (q_ids[:, None] != 0)


def column_states(mask, batch, table=0):
    """The states as the columns list them, int8 [nq, nk]."""
    grid = np.zeros((mask.num_rows, mask.num_cols), np.int8)
    starts, counts, partial, indices = (
        x[batch, table]
        for x in (mask.q_starts, mask.q_counts, mask.q_partial_counts, mask.q_indices)
    )
    for col in range(mask.num_cols):
        listed = indices[starts[col] : starts[col] + counts[col]]
        assert (np.diff(listed[: partial[col]]) > 0).all()
        assert (np.diff(listed[partial[col] :]) > 0).all()
        grid[listed[: partial[col]], col] = 1
        grid[listed[partial[col] :], col] = 2
    return grid


def check(mask, rule, q_ids, kv_ids):
    """Everything `restrict` promises, for one pattern or array under documents."""
    restricted = segments.restrict(mask, jnp.asarray(q_ids), jnp.asarray(kv_ids))
    restricted = jax.tree.map(np.asarray, restricted)
    assert restricted.batch == len(q_ids)
    block_q, block_kv = mask.block_q, mask.block_kv
    before = block_mask.block_states(mask)
    for b in range(len(q_ids)):
        states = block_mask.block_states(restricted, batch=b)
        np.testing.assert_array_equal(column_states(restricted, b), states)
        shown = elements(states, rule, block_q, block_kv, q_ids[b], kv_ids[b])
        np.testing.assert_array_equal(shown, visible(rule, q_ids[b], kv_ids[b]))
        assert (states <= before).all()
        # Blocks stay listed only if the id ranges of their tokens meet.
        for r, c in zip(*np.nonzero(states)):
            mine = q_ids[b][r * block_q : (r + 1) * block_q]
            theirs = kv_ids[b][c * block_kv : (c + 1) * block_kv]
            mine, theirs = mine[mine != 0], theirs[theirs != 0]
            assert len(mine)
            assert len(theirs)
            assert mine.min() <= theirs.max()
            assert theirs.min() <= mine.max()
        rows = restricted.kv_counts[b, 0]
        np.testing.assert_array_equal(rows, (states != 0).sum(1))
        # What no row lists is -1.
        listed = np.zeros(restricted.kv_indices.shape[-1], bool)
        for start, count in zip(restricted.kv_starts[b, 0], rows, strict=True):
            listed[start : start + count] = True
        np.testing.assert_array_equal(restricted.kv_indices[b, 0] >= 0, listed)
    return restricted


def packed(rng, batch, length, longest):
    lengths = rng.integers(1, longest + 1, (batch, length))
    ids = np.stack([np.repeat(np.arange(1, length + 1), x)[:length] for x in lengths])
    ids[rng.random((batch, 1)) * length * 1.5 < np.arange(length)] = 0
    return ids.astype(np.int32)


@hypothesis.settings(max_examples=8)
@hypothesis.given(
    pattern=st.sampled_from(PATTERNS),
    lengths=st.sampled_from([(20, 20), (17, 40), (1, 9)]),
    blocks=st.sampled_from([(4, 4), (8, 4)]),
    longest=st.sampled_from([1, 3, 12, 60]),
    scattered=st.booleans(),
    seed=st.integers(0, 999),
)
def test_restricted_patterns_show_exactly_the_pairs_of_one_document(
    pattern, lengths, blocks, longest, scattered, seed
):
    rng = np.random.default_rng(seed)
    if scattered:
        q_ids, kv_ids = (rng.integers(0, 3, (2, n)).astype(np.int32) for n in lengths)
    else:
        q_ids, kv_ids = (packed(rng, 2, n, longest) for n in lengths)
    sizes = {"q_len": lengths[0], "kv_len": lengths[1]}
    mask = lower.lower(pattern, **sizes, block_q=blocks[0], block_kv=blocks[1])
    rule = pattern.mask_fn(np.arange(lengths[0])[:, None], np.arange(lengths[1])[None])
    check(mask, rule, q_ids, kv_ids)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_bits_follow_their_blocks(density):
    """Also where a document boundary makes a FULL block PARTIAL."""
    rng = np.random.default_rng(0)
    array = rng.random((18, 22)) < density
    array[:8, 4:12] = True
    mask = block_mask.from_array(array, block_q=4, block_kv=4)
    ids = packed(rng, 3, 18, 9), packed(rng, 3, 22, 9)
    restricted = check(mask, array, *ids)
    bits = restricted.bits
    for b in range(3):
        shown = np.zeros((5 * 4, 6 * 4), bool)
        lists = (
            x[b, 0]
            for x in (restricted.kv_starts, restricted.kv_counts, restricted.kv_indices,
                      restricted.kv_bits)
        )  # fmt: skip
        starts, counts, indices, slots = lists
        for r in range(5):
            for at in range(starts[r], starts[r] + counts[r]):
                c = indices[at]
                assert slots[at] >= 0
                shown[4 * r : 4 * r + 4, 4 * c : 4 * c + 4] = bits[b, 0, slots[at]]
        shown = visible(shown[:18, :22], ids[0][b], ids[1][b])
        np.testing.assert_array_equal(shown, visible(array, ids[0][b], ids[1][b]))


def test_tables_of_heads_are_restricted_alike():
    patterns = (local.Local(window=3), CAUSAL)
    ids = packed(np.random.default_rng(0), 2, 24, 7)
    mask = lower.lower(patterns, q_len=24, block_q=4, block_kv=4)
    restricted = segments.restrict(mask, jnp.asarray(ids), jnp.asarray(ids))
    for u, pattern in enumerate(patterns):
        alone = lower.lower(pattern, q_len=24, block_q=4, block_kv=4)
        want = segments.restrict(alone, jnp.asarray(ids), jnp.asarray(ids))
        for b in range(2):
            np.testing.assert_array_equal(
                block_mask.block_states(restricted, batch=b, table=u),
                block_mask.block_states(want, batch=b),
            )


def test_run_time_masks_of_a_batch_are_restricted_each_by_its_documents():
    rng = np.random.default_rng(0)
    grid = rng.integers(0, 2, (2, 1, 5, 5))
    mask = block_mask.from_block_states(
        jnp.asarray(grid), rule=CAUSAL, q_len=20, kv_len=20, block_q=4, block_kv=4
    )
    ids = packed(rng, 2, 20, 6)
    restricted = segments.restrict(mask, jnp.asarray(ids), jnp.asarray(ids))
    rule = CAUSAL.mask_fn(np.arange(20)[:, None], np.arange(20)[None])
    for b in range(2):
        active = grid[b, 0].repeat(4, 0).repeat(4, 1) != 0
        shown = elements(block_mask.block_states(restricted, batch=b), rule, 4, 4, ids[b], ids[b])
        np.testing.assert_array_equal(shown, visible(rule & active, ids[b], ids[b]))


def test_one_document_leaves_the_mask_as_it_is():
    mask = lower.lower(CAUSAL, q_len=20, block_q=4, block_kv=4)
    ids = jnp.full((1, 20), 7)
    restricted = segments.restrict(mask, ids, ids)
    np.testing.assert_array_equal(
        block_mask.block_states(restricted), block_mask.block_states(mask)
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.expression())
@pytest.mark.parametrize("order", ["shifted", "permuted", "decode"])
def test_lowering_at_positions_shows_what_the_pattern_says(pattern, order):
    rng = np.random.default_rng(0)
    q_len, kv_len = (1, 22) if order == "decode" else (18, 22)
    q_pos = {"shifted": np.arange(18) + 7, "permuted": rng.permutation(18), "decode": [15]}[order]
    kv_pos = rng.permutation(22) if order == "permuted" else np.arange(22)
    q_pos, kv_pos = (np.asarray(x, np.int32)[None] for x in (q_pos, kv_pos))
    block_q = 1 if order == "decode" else 4
    mask = segments.lower_at(
        pattern, jnp.asarray(q_pos), jnp.asarray(kv_pos), block_q=block_q, block_kv=4
    )
    rule = pattern.mask_fn(q_pos[0][:, None], kv_pos[0][None])
    ids = np.ones(q_len, np.int32), np.ones(kv_len, np.int32)
    states = block_mask.block_states(mask)
    np.testing.assert_array_equal(elements(states, rule, block_q, 4, *ids), rule)
    if order != "permuted" and pattern != CAUSAL & ~CAUSAL:
        # Consecutive positions: a listed block has something to see.
        padded = np.zeros((states.shape[0] * block_q, states.shape[1] * 4), bool)
        padded[:q_len, :kv_len] = rule
        some = padded.reshape(states.shape[0], block_q, -1, 4).any((1, 3))
        np.testing.assert_array_equal(states != 0, some)
