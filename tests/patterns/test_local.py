import pytest

from sparse_attn.patterns import local


def test_window_counts_the_query_itself(draw):
    assert draw(local.Local(window=3)) == [
        "#.......",
        "##......",
        "###.....",
        ".###....",
        "..###...",
        "...###..",
        "....###.",
        ".....###",
    ]


def test_reach_excludes_the_query_itself(draw):
    assert draw(local.Local(reach=(1, 2))) == [
        "###.....",
        "####....",
        ".####...",
        "..####..",
        "...####.",
        "....####",
        ".....###",
        "......##",
    ]


def test_none_is_unlimited(draw):
    assert draw(local.Local(reach=(None, 0))) == draw(local.Local(window=8))
    assert draw(local.Local(reach=(None, None))) == ["########"] * 8
    assert draw(local.Local(reach=(0, None)))[5] == ".....###"


def test_pairs(pairs):
    for length, window in ((100, 7), (100, 100), (130, 1)):
        want = window * (window + 1) // 2 + (length - window) * window
        assert pairs(local.Local(window=window), length) == want
    left, right = 9, 4
    want = 100 * (left + right + 1) - left * (left + 1) // 2 - right * (right + 1) // 2
    assert pairs(local.Local(reach=(left, right)), 100) == want


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "give exactly one of the two"),
        ({"window": 3, "reach": (1, 1)}, "give exactly one of the two"),
        ({"window": 0}, "window=0 must be an int >= 1"),
        ({"window": 2.5}, "window=2.5 must be an int >= 1"),
        ({"window": True}, "window=True must be an int >= 1"),
        ({"window": 2**31}, "must be an int >= 1 and <= 2147483647"),
        ({"reach": (1, -1)}, r"reach\[1\]=-1 must be an int >= 0"),
        ({"reach": (1,)}, r"reach=\(1,\) must be \(left, right\)"),
        ({"reach": 4}, r"reach=4 must be \(left, right\)"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        local.Local(**fields)
