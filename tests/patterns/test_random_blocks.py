import numpy as np
import pytest

from sparse_attn.patterns import random_blocks


def drawn(pattern, rows, cols):
    """Which key blocks each query block draws, bool `[rows, cols]`."""
    q_pos, kv_pos = np.arange(rows) * pattern.block, np.arange(cols) * pattern.block
    return pattern.mask_fn(q_pos.astype(np.int32)[:, None], kv_pos.astype(np.int32))


def test_picture(draw):
    # The draw is part of the definition: a checkpoint trained with a seed must find it again.
    assert draw(random_blocks.RandomBlocks(block=2, num_blocks=1)) == [
        "........",
        "........",
        "##......",
        "##......",
        "..##....",
        "..##....",
        "##......",
        "##......",
    ]
    assert draw(random_blocks.RandomBlocks(block=2, num_blocks=2, seed=5, key_blocks=4)) == [
        "..##..##",
        "..##..##",
        "##..##..",
        "##..##..",
        "##..##..",
        "##..##..",
        "..####..",
        "..####..",
    ]


def test_the_past_holds_num_blocks_distinct_blocks(pairs):
    pattern = random_blocks.RandomBlocks(block=8, num_blocks=3, seed=2)
    blocks = drawn(pattern, 40, 40)
    assert not np.triu(blocks).any()
    assert blocks.sum(1).tolist() == [min(row, 3) for row in range(40)]
    assert pairs(pattern, 40 * 8) == (0 + 1 + 2 + 37 * 3) * 8 * 8


def test_two_sided_draws_from_all_key_blocks(pairs):
    pattern = random_blocks.RandomBlocks(block=8, num_blocks=3, key_blocks=20)
    blocks = drawn(pattern, 200, 25)
    assert (blocks.sum(1) == 3).all()
    assert not blocks[:, 20:].any()
    assert blocks[:, :20].any(0).all()
    assert pairs(pattern, 20 * 8) == 20 * 3 * 8 * 8


def test_draws_are_uniform_and_independent():
    rows, cols, num_blocks = 8000, 16, 4
    blocks = drawn(
        random_blocks.RandomBlocks(block=1, num_blocks=num_blocks, seed=11, key_blocks=cols),
        rows, cols,
    )  # fmt: skip

    def deviations(counts, share):
        return np.abs(counts - rows * share) / np.sqrt(rows * share * (1 - share))

    share = num_blocks / cols
    assert deviations(blocks.sum(0), share).max() < 4
    # Two blocks of a row, without repetition; and the same block in neighbouring rows.
    together = (blocks.T.astype(int) @ blocks)[np.triu_indices(cols, 1)]
    assert deviations(together, share * (num_blocks - 1) / (cols - 1)).max() < 4.5
    neighbours = blocks[:-1].T.astype(int) @ blocks[1:]
    assert deviations(neighbours, share * share).max() < 4.5


def test_seeds_differ_and_large_block_numbers_work():
    first, second = (
        drawn(random_blocks.RandomBlocks(block=1, num_blocks=2, seed=s, key_blocks=50), 50, 50)
        for s in (0, 1)
    )
    assert 0 < (first & second).sum() < 30
    pattern = random_blocks.RandomBlocks(block=1, num_blocks=1)
    late = np.arange(2**31 - 2000, 2**31 - 1, dtype=np.int32)
    (picked,) = pattern._draws(late)
    assert (picked >= 0).all()
    assert (picked < late).all()
    assert len(np.unique(picked)) > 1990


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"block": 0, "num_blocks": 1}, "block=0 must be an int >= 1"),
        ({"block": 4, "num_blocks": 0}, "num_blocks=0 must be an int >= 1"),
        ({"block": 4, "num_blocks": 65}, "num_blocks=65 must be an int >= 1 and <= 64"),
        ({"block": 4, "num_blocks": 1, "seed": -1}, "seed=-1 must be an int >= 0"),
        ({"block": 4, "num_blocks": 1, "key_blocks": 0}, "key_blocks=0 must be an int >= 1"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        random_blocks.RandomBlocks(**fields)
