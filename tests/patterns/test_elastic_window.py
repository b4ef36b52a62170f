import numpy as np
import pytest

from sparse_attn import patterns
from sparse_attn.patterns import causal, elastic_window, local, per_layer, sinks
from tests.patterns import on_grid

ElasticWindow = elastic_window.ElasticWindow


def test_picture_of_the_same_rule_at_two_lengths(draw):
    rule = ElasticWindow(alpha=1, beta=0.25, length=8)
    assert draw(rule) == [
        "#.......",
        "##......",
        "###.....",
        ".###....",
        "..###...",
        "...###..",
        "....###.",
        ".....###",
    ]
    assert draw(elastic_window.at_length(rule, 4), 4, 4) == ["#...", "##..", ".##.", "..##"]


def test_window_is_the_rule_kept_in_range():
    windows = [ElasticWindow(-64, 0.5, n).window for n in (64, 128, 256, 4096)]
    assert windows == [1, 1, 64, 1984]
    assert ElasticWindow(8192, 0.5, 1024).window == 1024
    assert ElasticWindow(0, 0.29, 100).window == 29  # 0.29 * 100 is a little less than that


@pytest.mark.parametrize("alpha, beta", [(40, 0.0), (0, 0.25), (16, 0.5), (-8, 0.125)])
@pytest.mark.parametrize("length", [128, 512])
def test_pairs_follow_from_the_rule(pairs, alpha, beta, length):
    window = round(alpha + beta * length)
    want = window * (window + 1) // 2 + (length - window) * window
    assert pairs(ElasticWindow(alpha, beta, length), length) == want


def test_the_whole_length_is_causal_attention():
    np.testing.assert_array_equal(
        on_grid.dense(ElasticWindow(alpha=0, beta=1.0, length=40), 40),
        on_grid.dense(causal.Causal(), 40),
    )


def test_heads_hold_the_windows_of_their_rules_and_the_first_tokens():
    """Kept keys per head are what the rules say; the budget is their sum."""
    rules, length, first = [(16, 0.0), (0, 0.25), (-10, 0.5)], 80, 4
    heads = elastic_window.heads(rules, length=length, sink_tokens=first)
    kept = [on_grid.dense(p, length)[-1].sum() for p in heads.patterns]
    assert kept == [16 + first, 20 + first, 30 + first]
    for head, window in zip(heads.patterns, (16, 20, 30)):
        same = local.Local(window=window) | sinks.Sinks(tokens=first)
        np.testing.assert_array_equal(on_grid.dense(head, length), on_grid.dense(same, length))


def test_at_length_enters_compositions_and_leaves_the_rest():
    schedule = patterns.parse(
        "per_layer((per_head((elastic_window(4, 0.5, 64) | sinks(2), causal())),"
        " ~elastic_window(0, 0.25, 64) & local(window=9), per_head((causal(),))))"
    )
    longer = elastic_window.at_length(schedule, 128)
    assert longer == patterns.parse(schedule.expression().replace("length=64", "length=128"))
    assert longer.patterns[0].patterns[0].a.window == 68
    assert elastic_window.at_length(longer, 64) == schedule
    fixed = per_layer.PerLayer((causal.Causal(),))
    assert elastic_window.at_length(fixed, 128) is fixed


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"alpha": 1.5, "beta": 0, "length": 8}, "alpha=1.5 must be an int"),
        ({"alpha": 1, "beta": 1.5, "length": 8}, r"beta=1.5 must be a number in \[0, 1\]"),
        ({"alpha": 1, "beta": "all", "length": 8}, r"beta='all' must be a number in \[0, 1\]"),
        ({"alpha": 1, "beta": 0.5, "length": 0}, "length=0 must be an int >= 1"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ElasticWindow(**fields)
