"""The study of four kinds of attention: its bands lie in the axes, and one of them learns."""

import itertools

import numpy as np
import pytest

from experiments.recall import axes


@pytest.mark.parametrize(("causal", "cross"), list(itertools.product((True, False), repeat=2)))
def test_a_band_is_a_part_around_the_own_place(causal, cross):
    task = axes.task_of(causal=causal, cross=cross)
    at = np.arange(task.length)
    whole, band = (
        np.broadcast_to(axes.pattern_of(task, kind).mask_fn(at[:, None], at), (task.length,) * 2)
        for kind in ("all", "band")
    )
    assert not (band & ~whole).any()
    half = task.length // 2
    query = at[half:] if cross else at  # A place of the questions, and what it stands beside.
    own = query - half if cross else query
    distance = own[:, None] - at
    near = (distance < axes.BAND) & (distance >= 0) if causal else abs(distance) <= axes.BAND
    np.testing.assert_array_equal(band[query], near & whole[query])
    assert axes.shown(task, axes.pattern_of(task, "all")) == 1
    assert 0.1 < axes.shown(task, axes.pattern_of(task, "band")) < 0.9


@pytest.mark.slow  # Trains three models at once.
def test_questions_to_a_memory_are_learned_beyond_what_a_stream_has_brought():
    task = axes.task_of(causal=False, cross=True)
    arrived = axes.shown(task, axes.task_of(causal=True, cross=True).pattern)
    assert 0.4 < arrived < 0.6
    assert min(axes.run(task, task.pattern, steps=250, test=128)) > arrived + 0.3
