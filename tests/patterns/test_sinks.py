import pytest

from sparse_attn.patterns import sinks


def test_picture(draw):
    assert draw(sinks.Sinks(tokens=2)) == ["#......."] + ["##......"] * 7


def test_pairs(pairs):
    for length, tokens in ((100, 3), (100, 70), (10, 70)):
        n = min(tokens, length)
        assert pairs(sinks.Sinks(tokens=tokens), length) == n * (n + 1) // 2 + (length - n) * n


def test_wrong_fields():
    with pytest.raises(ValueError, match="tokens=0 must be an int >= 1"):
        sinks.Sinks(tokens=0)
