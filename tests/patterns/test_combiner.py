import jax
import numpy as np
import pytest

from sparse_attn.masks import lower, stats
from sparse_attn.ops import attend
from sparse_attn.patterns import causal, chunked, combiner
from tests.patterns import on_grid

Combiner = combiner.Combiner
REGIONS = ["blocks", "tree"]


def test_pictures(draw):
    assert draw(Combiner(size=2)) == [
        "........",
        "........",
        "#.......",
        "#.......",
        "##......",
        "##......",
        "###.....",
        "###.....",
    ]
    # 7 = 4 + 2 + 1: summaries of the tokens 0-3 (at 3), 4-5 (at 5) and 6.
    assert draw(Combiner(size=1, regions="tree")) == [
        "........",
        "#.......",
        ".#......",
        ".##.....",
        "...#....",
        "...##...",
        "...#.#..",
        "...#.##.",
    ]


@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("size", [1, 4, 5])
def test_own_block_and_regions_cover_the_past_exactly_once(regions, size):
    length = 60
    pattern = Combiner(size, regions)
    summaries = np.arange(length // size)
    start, end = (np.broadcast_to(x, summaries.shape) for x in pattern.region(summaries))
    token = np.arange(length)
    inside = (start[:, None] <= token) & (token < end[:, None])
    seen = on_grid.dense(pattern, length, len(summaries)).astype(int)
    covered = on_grid.dense(chunked.Chunked(size=size), length).astype(int) + seen @ inside
    np.testing.assert_array_equal(covered, on_grid.dense(causal.Causal(), length))


def test_cost_per_query():
    """size + n / size keys with blocks, size + log2(n / size) with a tree."""
    length, size = 1024, 16
    blocks, tree = (
        stats.of(Combiner(size, r), q_len=length, kv_len=length // size) for r in REGIONS
    )
    assert blocks.keys_per_row_max == length // size - 1
    assert tree.keys_per_row_max == 6  # 63 = 32 + 16 + 8 + 4 + 2 + 1
    assert tree.keys_per_row_mean == 3


def implied_weights(pattern, length):
    """Of each token: its own one, or its region's, shared out evenly in the region."""
    summaries = np.arange(length // pattern.size)
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, length, 8))
    start, end = (np.broadcast_to(x, summaries.shape) for x in pattern.region(summaries))
    pooled = np.stack([k[first:last].max(0) for first, last in zip(start, end)])
    near = on_grid.dense(chunked.Chunked(size=pattern.size), length)
    far = on_grid.dense(pattern, length, len(summaries))
    terms = np.exp(q @ np.concatenate([k, pooled]).T) * np.concatenate([near, far], 1)
    terms /= terms.sum(1, keepdims=True)  # one softmax over tokens and summaries
    token = np.arange(length)
    inside = (start[:, None] <= token) & (token < end[:, None])
    return terms[:, :length] + terms[:, length:] @ (inside / inside.sum(1, keepdims=True))


@pytest.mark.parametrize("regions, size", [("blocks", 8), ("tree", 1), ("tree", 4)])
def test_implied_weights_are_those_of_full_attention_over_the_past(regions, size):
    """Positive for every token of the past, 0 for the others, and their sum is 1."""
    weights = implied_weights(Combiner(size, regions), 32)
    past = on_grid.dense(causal.Causal(), 32)
    assert (weights[past] > 0).all()
    assert (weights[~past] == 0).all()
    np.testing.assert_allclose(weights.sum(1), 1)


def test_regions_of_one_token_are_causal_attention():
    q, k, v = jax.random.normal(jax.random.key(1), (3, 1, 20, 2, 8))

    @jax.jit
    def run(q, k, v):
        pieces = [
            attend.attend(q, k, v, mask=mask, return_lse=True, impl="reference")
            for mask in (chunked.Chunked(size=1), Combiner(size=1))
        ]
        whole = attend.attend(q, k, v, mask=causal.Causal(), impl="reference")
        return attend.merge_lse(pieces)[0], whole

    np.testing.assert_allclose(*run(q, k, v), atol=1e-6)


def test_a_million_tokens_take_few_blocks():
    mask = lower.lower(Combiner(size=1, regions="tree"), q_len=1 << 20)
    # The queries of block i see its own block, and a key per bit of the tokens before the block.
    want = sum(1 + i.bit_count() for i in range(8192))
    assert mask.kv_counts.sum() == want


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"size": 0}, "size=0 must be an int >= 1"),
        ({"size": 4, "regions": "rows"}, "regions='rows' must be one of 'blocks', 'tree'"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Combiner(**fields)
