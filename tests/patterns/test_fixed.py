import numpy as np
import pytest

from sparse_attn.patterns import causal, fixed


def test_block_is_causal_inside_its_block(draw):
    assert draw(fixed.Fixed(stride=3, part="block")) == [
        "#.......",
        "##......",
        "###.....",
        "...#....",
        "...##...",
        "...###..",
        "......#.",
        "......##",
    ]


def test_summary_is_the_end_of_every_block(draw):
    assert draw(fixed.Fixed(stride=4, part="summary", summary_tokens=2)) == [
        "........",
        "........",
        "..#.....",
        "..##....",
        "..##....",
        "..##....",
        "..##..#.",
        "..##..##",
    ]


def test_pairs(pairs):
    blocks, stride, tokens = 6, 16, 3
    pattern = fixed.Fixed(stride=stride, part="summary", summary_tokens=tokens)
    own, earlier = blocks * tokens * (tokens + 1) // 2, blocks * (blocks - 1) // 2
    assert pairs(pattern, blocks * stride) == own + earlier * tokens * stride


def test_two_steps_reach_every_earlier_token():
    at = np.arange(48, dtype=np.int32)
    block, summary = (p.mask_fn(at[:, None], at) for p in fixed.Fixed.heads(8).patterns)
    reached = block | (summary.astype(int) @ block.astype(int) > 0)
    np.testing.assert_array_equal(reached, causal.Causal().mask_fn(at[:, None], at))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"stride": 0, "part": "block"}, "stride=0 must be an int >= 1"),
        ({"stride": 4, "part": "row"}, "part='row' must be one of 'block', 'summary'"),
        ({"stride": 4, "part": "summary", "summary_tokens": 5}, "summary_tokens=5 .* and <= 4"),
        ({"stride": 4, "part": "summary", "summary_tokens": 0}, "summary_tokens=0 must be an int"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        fixed.Fixed(**fields)
