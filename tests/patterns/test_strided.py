import numpy as np
import pytest

from sparse_attn.patterns import causal, strided


def test_row_sees_stride_tokens_before_the_query(draw):
    assert draw(strided.Strided(stride=2, part="row")) == [
        "#.......",
        "##......",
        "###.....",
        ".###....",
        "..###...",
        "...###..",
        "....###.",
        ".....###",
    ]


def test_column_sees_every_stride_th_key(draw):
    assert draw(strided.Strided(stride=3, part="column")) == [
        "#.......",
        ".#......",
        "..#.....",
        "#..#....",
        ".#..#...",
        "..#..#..",
        "#..#..#.",
        ".#..#..#",
    ]


def test_pairs(pairs):
    for length, stride in ((100, 7), (100, 200), (64, 1)):
        want = sum(max(0, length - j * stride) for j in range(length))
        assert pairs(strided.Strided(stride=stride, part="column"), length) == want


def test_two_steps_reach_every_earlier_token():
    at = np.arange(50, dtype=np.int32)
    row, column = (
        p.mask_fn(at[:, None], at).astype(int) for p in strided.Strided.heads(7).patterns
    )
    np.testing.assert_array_equal((row @ column) > 0, causal.Causal().mask_fn(at[:, None], at))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"stride": 0, "part": "row"}, "stride=0 must be an int >= 1"),
        ({"stride": 4, "part": "rows"}, "part='rows' must be one of 'row', 'column'"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        strided.Strided(**fields)
