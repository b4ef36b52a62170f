"""Composition, expressions and discovery; the laws of each pattern are in test_contract.py."""

import numpy as np
import pytest

from sparse_attn import patterns
from sparse_attn.patterns import base, causal, local, sinks

WINDOW, SINKS = local.Local(window=4), sinks.Sinks(tokens=2)


def test_operators_build_and_nest():
    assert WINDOW & ~SINKS | causal.Causal() == base.Or(
        base.And(WINDOW, base.Not(SINKS)), causal.Causal()
    )


@pytest.mark.parametrize(
    "combine, word", [(lambda: WINDOW & 3, "'&'"), (lambda: WINDOW | "x", "'|'")]
)
def test_only_patterns_combine(combine, word):
    with pytest.raises(TypeError, match=f"{word[0]}\\{word[1]}{word[2]} combines patterns"):
        combine()


def test_python_logic_is_refused():
    # `a and b` would silently be b.
    with pytest.raises(TypeError, match="no truth value; compose patterns with '&'"):
        bool(WINDOW)


def test_a_pattern_without_a_rule_says_so():
    class Nothing(base.Pattern):
        pass

    with pytest.raises(NotImplementedError, match="Nothing must define mask_fn"):
        Nothing().mask_fn(0, 0)


def test_default_block_state_is_partial_everywhere():
    state = base.Pattern().block_state(np.zeros((3, 1)), np.ones((3, 1)), np.zeros(5), np.ones(5))
    np.testing.assert_array_equal(state, np.ones((3, 5)))


def test_causal_and_may_be_empty_of_combinations():
    future = local.Local(reach=(0, 3))
    assert (WINDOW & future).causal
    assert not (WINDOW | future).causal
    assert (WINDOW | SINKS).causal
    assert not (~future).causal
    assert not (WINDOW | ~SINKS).may_be_empty
    assert (WINDOW & SINKS).may_be_empty


@pytest.mark.parametrize(
    "text, want",
    [
        ("causal()", causal.Causal()),
        (" local(4) ", WINDOW),
        ("local(window=4) & ~sinks(tokens=2)", WINDOW & ~SINKS),
        ("(local(window=4) | sinks(2)) & causal()", (WINDOW | SINKS) & causal.Causal()),
        ("~~causal()", ~~causal.Causal()),
        ("local(reach=(3, None))", local.Local(reach=(3, None))),
        ("local(reach=[3, 0])", local.Local(reach=(3, 0))),
    ],
)
def test_parse(text, want):
    assert patterns.parse(text) == want
    assert patterns.parse(want.expression()) == want


def test_expressions_are_short():
    assert (WINDOW | SINKS).expression() == "(local(window=4) | sinks(tokens=2))"
    assert (~(WINDOW & SINKS)).expression() == "~(local(window=4) & sinks(tokens=2))"
    assert local.Local(reach=(None, 2)).expression() == "local(reach=(None, 2))"


@pytest.mark.parametrize(
    "text, message",
    [
        ("local(window=4", "is not an expression"),
        ("", "is not an expression"),
        ("dilate(window=4)", "'dilate' is unknown; did you mean 'dilated'.*known: .*causal"),
        ("base()", "'base' is unknown"),
        ("local(windw=4)", r"local\(\) takes the fields \(window, reach\)"),
        ("local(window=0)", "window=0 must be an int >= 1"),
        ("sinks()", r"sinks\(\) takes the fields \(tokens\)"),
        ("local", "'local' is not allowed; allowed are calls of pattern names"),
        ("7", "must name a pattern"),
        ("~7", "'~' combines patterns, got int"),
        ("causal() & 7", "'&' combines patterns, got int"),
        ("per_head((causal(),)) & causal()", "'&' combines patterns, got PerHead"),
        ("causal() + causal()", "is not allowed"),
        ("local(**{'window': 4})", "is not allowed"),
        ("local(window=__import__('os').getpid())", "is not allowed"),
        ("__import__('os').system('true')", "is not allowed"),
        ("os.system('true')", "is not allowed"),
        ("local(window=open('x'))", "'open' is unknown"),
        ("(lambda: causal())()", "is not allowed"),
        ("[causal() for _ in (1,)]", "is not allowed"),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        patterns.parse(text)


def test_names_resolve_without_a_list():
    assert patterns.find("global_tokens") is patterns.GlobalTokens
    assert patterns.PerHead is patterns.find("per_head")
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        patterns.Nothing  # noqa: B018


@pytest.mark.parametrize("value", [0, -1, 2.0, "4", None, True, np.int64(4), 2**31])
def test_fields_must_be_python_ints_in_range(value):
    # Other numbers would not survive `expression()`, or not fit int32 positions.
    with pytest.raises(ValueError, match=r"window=.* must be an int >= 1"):
        base.check_int("window", value)


def test_least_and_greatest():
    a, b = np.array([1, 5, -2]), np.array([3, 5, -7])
    assert base.least(a, b).tolist() == [1, 5, -7]
    assert base.greatest(a, b).tolist() == [3, 5, -2]
