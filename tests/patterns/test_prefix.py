import pytest

from sparse_attn.patterns import prefix


def test_picture(draw):
    assert draw(prefix.Prefix(tokens=3)) == [
        "###.....",
        "###.....",
        "###.....",
        "####....",
        "#####...",
        "######..",
        "#######.",
        "########",
    ]


def test_pairs(pairs):
    length, tokens = 100, 30
    after = (length * (length + 1) - tokens * (tokens + 1)) // 2
    assert pairs(prefix.Prefix(tokens=tokens), length) == tokens**2 + after


def test_wrong_fields():
    with pytest.raises(ValueError, match="tokens=0 must be an int >= 1"):
        prefix.Prefix(tokens=0)
