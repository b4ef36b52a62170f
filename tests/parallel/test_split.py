import numpy as np
import pytest

from sparse_attn.masks import block_mask, lower
from sparse_attn.parallel import balance, split
from sparse_attn.patterns import causal, local, per_head, sinks

RANKS, LENGTH, BLOCK = 4, 64, 4
DRAWN = np.random.default_rng(0).random((2, LENGTH, LENGTH)) < 0.04
MASKS = {
    "window": local.Local(window=9),
    "sinks": local.Local(window=9) | sinks.Sinks(tokens=3),
    "per_head": per_head.PerHead((causal.Causal(), local.Local(reach=(2, 5)))),
    "array": DRAWN,
}


def mask_of(name):
    if isinstance(MASKS[name], np.ndarray):
        return block_mask.from_array(MASKS[name], block_q=BLOCK, block_kv=BLOCK)
    return lower.lower(MASKS[name], q_len=LENGTH, block_q=BLOCK, block_kv=BLOCK)


def states_of(stacked, rank, table):
    mask = stacked.mask({name: x[rank] for name, x in stacked.lists.items()})
    # The columns must list the same blocks as the rows.
    by_rows = block_mask.block_states(mask, table=table)
    by_cols = np.zeros_like(by_rows)
    for col in range(mask.num_cols):
        start, count = mask.q_starts[0, table, col], mask.q_counts[0, table, col]
        rows = mask.q_indices[0, table, start : start + count]
        partial = np.arange(count) < mask.q_partial_counts[0, table, col]
        by_cols[rows, col] = np.where(partial, 1, 2)
    np.testing.assert_array_equal(by_rows, by_cols)
    return by_rows


@pytest.mark.parametrize("kind", balance.ORDERS)
@pytest.mark.parametrize("name", MASKS)
def test_pieces_together_are_the_mask(name, kind):
    mask = mask_of(name)
    order = balance.order(kind, [mask], ranks=RANKS) or range(RANKS)
    at = split.places(order, LENGTH)[::BLOCK] // BLOCK
    cut = split.Split(mask, order=order, ranks=RANKS)
    rows = cut.of_rows()
    steps = [cut.of_pairs([(r - step) % RANKS for r in range(RANKS)]) for step in range(RANKS)]
    each = LENGTH // BLOCK // RANKS
    for table in range(mask.num_tables):
        whole = block_mask.block_states(mask, table=table)[np.ix_(at, at)]
        for rank in range(RANKS):
            mine = whole[rank * each : (rank + 1) * each]
            np.testing.assert_array_equal(states_of(rows, rank, table), mine)
            for step in range(RANKS):
                first = (rank - step) % RANKS * each
                part = mine[:, first : first + each]
                np.testing.assert_array_equal(states_of(steps[step], rank, table), part)
                seen = cut.pairs[rank, (rank - step) % RANKS]
                assert seen or not part.any()


def test_bits_follow_their_blocks():
    mask = mask_of("array")
    order = (2, 0, 3, 1)
    at = split.places(order, LENGTH)
    rows = split.Split(mask, order=order, ranks=RANKS).of_rows()
    for rank, table in ((0, 0), (3, 1)):
        cut = rows.mask({name: x[rank] for name, x in rows.lists.items()})
        tokens = at[rank * 16 : (rank + 1) * 16]
        wanted = DRAWN[table][np.ix_(tokens, at)]
        for row, col, place in block_mask.entries(cut, block_mask.BlockState.PARTIAL, table=table):
            for r, c, slot in zip(row, col, cut.kv_bits[0, table, place]):
                block = wanted[r * BLOCK : (r + 1) * BLOCK, c * BLOCK : (c + 1) * BLOCK]
                np.testing.assert_array_equal(cut.bits[0, table, slot], block)


def test_groups_of_heads_share_masks_that_are_equal():
    window, every = local.Local(window=9), causal.Causal()
    heads = (window, window, every, every, window, window, window, every)
    mask = lower.lower(heads, q_len=LENGTH, block_q=BLOCK, block_kv=BLOCK)
    masks, which = split.of_heads(mask, num_heads=8, parts=4)
    assert which == (0, 1, 0, 2)
    assert [m.rules for m in masks] == [(window,), (every,), (window, every)]
    assert masks[2].head_tables == (0, 1)
    for part, kind in enumerate(which):
        tables = masks[kind].tables_of_heads(2)
        for head, table in enumerate(tables):
            expected = lower.lower(
                heads[2 * part + head], q_len=LENGTH, block_q=BLOCK, block_kv=BLOCK
            )
            np.testing.assert_array_equal(
                block_mask.block_states(masks[kind], table=int(table)),
                block_mask.block_states(expected),
            )


def test_what_cannot_be_split_is_named():
    coarse = lower.lower(causal.Causal(), q_len=16, block_q=8, block_kv=8)
    with pytest.raises(ValueError, match="block_q=8 must divide the chunks of 4 tokens"):
        split.Split(coarse, order=range(4), ranks=4)
    wide = lower.lower(causal.Causal(), q_len=16, kv_len=32, block_q=4, block_kv=4)
    with pytest.raises(ValueError, match="as many queries as keys"):
        split.Split(wide, order=range(4), ranks=4)
