import numpy as np
import pytest

from sparse_attn.masks import lower
from sparse_attn.patterns import causal, sharded
from tests.patterns import on_grid

Sharded = sharded.Sharded


def test_picture(draw):
    assert draw(Sharded(size=1, stride=3, shard=1, local_blocks=2)) == [
        "#.......",
        "##......",
        ".##.....",
        ".###....",
        ".#.##...",
        ".#..##..",
        ".#..###.",
        ".#..#.##",
    ]
    assert draw(Sharded(size=2, stride=2, shard=0)) == [
        "#.......",
        "##......",
        "###.....",
        "####....",
        "##..#...",
        "##..##..",
        "##..###.",
        "##..####",
    ]


@pytest.mark.parametrize("local_blocks", [1, 2])
def test_heads_share_out_the_whole_past(local_blocks):
    """Their union is causal attention, and every far key is seen by exactly one head."""
    size, stride, length = 4, 3, 40
    heads = sharded.heads(size, stride, local_blocks=local_blocks)
    seen = np.sum([on_grid.dense(p, length) for p in heads.patterns], axis=0)
    at = np.arange(length) // size
    far = at[:, None] - at >= local_blocks
    np.testing.assert_array_equal(seen > 0, on_grid.dense(causal.Causal(), length))
    assert (seen[far] == 1).all()


def test_a_key_that_is_hidden_once_stays_hidden():
    """So a head's cache keeps its shard and the near blocks only."""
    size, stride, local_blocks, length = 4, 4, 2, 96
    pattern = Sharded(size, stride, shard=1, local_blocks=local_blocks)
    mask = on_grid.dense(pattern, length)
    for key in range(length):
        column = mask[key:, key]
        assert column[0]
        assert (np.diff(column.astype(int)) <= 0).all()
    kept = np.flatnonzero(mask[-1])
    near = np.arange(length - local_blocks * size, length)
    shard = [k for k in range(length) if k // size % stride == 1]
    np.testing.assert_array_equal(kept, np.union1d(near, shard))


def test_pairs_in_closed_form(pairs):
    """Near blocks, and one of `stride` of the earlier ones."""
    size, stride, local_blocks, blocks = 16, 3, 2, 12
    for shard in range(stride):
        earlier = sum(
            len([j for j in range(i - local_blocks + 1) if j % stride == shard])
            for i in range(blocks)
        )
        near = sum(min(i, local_blocks - 1) for i in range(blocks))
        got = pairs(Sharded(size, stride, shard, local_blocks), size * blocks)
        assert got == blocks * size * (size + 1) // 2 + (near + earlier) * size**2


def test_density_of_the_last_row_is_the_near_blocks_and_a_share_of_the_rest():
    size, stride, local_blocks, length = 8, 4, 2, 8 * 50
    last = on_grid.dense(Sharded(size, stride, 0, local_blocks), length)[-1].mean()
    near = local_blocks * size / length
    assert last == pytest.approx(near + (1 - near) / stride, abs=size / length)


def test_one_shard_is_causal_attention():
    np.testing.assert_array_equal(
        on_grid.dense(Sharded(size=4, stride=1, shard=0), 30), on_grid.dense(causal.Causal(), 30)
    )


def test_query_heads_of_a_kv_head_share_its_shard():
    heads = sharded.heads(16, 2, queries_per_kv=4).for_heads(16)
    assert [p.shard for p in heads] == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4


def test_a_million_tokens_take_few_blocks():
    mask = lower.lower(Sharded(size=256, stride=64, shard=3, local_blocks=4), q_len=1 << 20)
    blocks = 4096
    near = 4 * blocks - 6
    # Block i sees the blocks 3, 67, 131 ... up to i - 4.
    far = sum(len(range(3, i - 3, 64)) for i in range(blocks))
    assert mask.kv_counts.sum() == 4 * (near + far) - blocks


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Sharded(size=0, stride=2, shard=0), "size=0 must be an int >= 1"),
        (lambda: Sharded(size=4, stride=0, shard=0), "stride=0 must be an int >= 1"),
        (lambda: Sharded(size=4, stride=2, shard=2), "shard=2 must be .* <= 1"),
        (lambda: Sharded(size=4, stride=2, shard=0, local_blocks=0), "local_blocks=0 must be"),
        (lambda: sharded.heads(4, 2, queries_per_kv=0), "queries_per_kv=0 must be an int >= 1"),
        (lambda: sharded.heads(4, 0), "stride=0 must be an int >= 1"),
    ],
)
def test_wrong_fields(call, message):
    with pytest.raises(ValueError, match=message):
        call()
