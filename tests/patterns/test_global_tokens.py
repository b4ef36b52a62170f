import pytest

from sparse_attn.patterns import causal, global_tokens, sinks


def test_picture(draw):
    assert draw(global_tokens.GlobalTokens(tokens=2)) == ["########"] * 2 + ["##......"] * 6


def test_causally_they_are_sinks(draw):
    pattern = global_tokens.GlobalTokens(tokens=3) & causal.Causal()
    assert pattern.causal
    assert draw(pattern) == draw(sinks.Sinks(tokens=3))


def test_pairs(pairs):
    assert pairs(global_tokens.GlobalTokens(tokens=7), 100) == 2 * 7 * 100 - 7 * 7


def test_wrong_fields():
    with pytest.raises(ValueError, match="tokens=-1 must be an int >= 1"):
        global_tokens.GlobalTokens(tokens=-1)
