import pytest

from sparse_attn.patterns import chunked


def test_causal_inside_the_chunk(draw):
    assert draw(chunked.Chunked(size=3)) == [
        "#.......",
        "##......",
        "###.....",
        "...#....",
        "...##...",
        "...###..",
        "......#.",
        "......##",
    ]


def test_two_sided(draw):
    assert draw(chunked.Chunked(size=3, two_sided=True)) == [
        "###.....",
        "###.....",
        "###.....",
        "...###..",
        "...###..",
        "...###..",
        "......##",
        "......##",
    ]


def test_pairs(pairs):
    assert pairs(chunked.Chunked(size=20), 100) == 5 * 20 * 21 // 2
    assert pairs(chunked.Chunked(size=20, two_sided=True), 100) == 5 * 20 * 20


@pytest.mark.usefixtures("unchecked")
def test_wrong_fields():
    with pytest.raises(ValueError, match="size=0 must be an int >= 1"):
        chunked.Chunked(size=0)
    with pytest.raises(ValueError, match="two_sided='yes' must be True or False"):
        chunked.Chunked(size=4, two_sided="yes")
