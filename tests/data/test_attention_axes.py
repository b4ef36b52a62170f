"""The four kinds of attention: each can answer its own questions, and a lesser one cannot."""

import itertools

import numpy as np
import pytest

from sparse_attn.data.synthetic import attention_axes
from sparse_attn.patterns import base

AXES = list(itertools.product((True, False), repeat=2))


def answered(task, pattern):
    """The share of questions whose pair the pattern shows, and whether those give the answers."""
    shown, right = [], []
    at = np.arange(task.length, dtype=np.int32)
    mask = np.broadcast_to(pattern.mask_fn(at[:, None], at), (task.length,) * 2)
    for seed in range(30):
        example = task.example(np.random.default_rng(seed))
        inputs, asked = example["inputs"], np.flatnonzero(example["weights"])
        assert len(asked) == task.num_pairs
        for place in asked:
            keys = np.flatnonzero((inputs[:-1] == inputs[place]) & (inputs[1:] > task._kinds))
            (key,) = keys  # One pair has this key.
            shown.append(mask[place, key + 1])
            right.append(inputs[key + 1] == example["targets"][place])
    return np.mean(shown), np.mean(right)


@pytest.mark.parametrize(("causal", "cross"), AXES)
def test_a_pattern_shows_what_its_questions_need(causal, cross):
    task = attention_axes.AttentionAxes(length=40, causal=causal, cross=cross)
    assert answered(task, task.pattern) == (1, 1)
    at = np.arange(40)
    mask = np.broadcast_to(task.pattern.mask_fn(at[:, None], at), (40, 40))
    if cross:
        assert not mask[20:, 20:].any()  # Questions do not see each other.
        expected = np.tri(20, dtype=bool) if causal else np.ones((20, 20), bool)
        np.testing.assert_array_equal(mask[20:, :20], expected)
    else:
        np.testing.assert_array_equal(mask, np.tri(40, dtype=bool) | (not causal))


def test_noncausal_questions_need_noncausal_attention():
    task = attention_axes.AttentionAxes(causal=False)
    assert answered(task, base.parse("causal()"))[0] == pytest.approx(0.5, abs=0.1)
    task = attention_axes.AttentionAxes(causal=False, cross=True)
    streamed = attention_axes.AttentionAxes(causal=True, cross=True).pattern
    assert answered(task, streamed)[0] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 30}, "length=30 must be at least 34"),
        ({"length": 38}, "length=38 must be a multiple of 4"),
        ({"vocab_size": 16}, "vocab_size=16 must be at least 17"),
    ],
)
def test_rows_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        attention_axes.AttentionAxes(**fields)
