"""The grid of needles: what is out of reach is a guess, what is in reach is found."""

import json

import numpy as np
import pytest

from experiments.recall import needle
from sparse_attn.patterns import base


def test_reach_is_that_of_the_pattern_and_the_convolution():
    reached = {
        name: [
            needle.in_reach(base.parse(expression), needle.task_of(64, d)) for d in (0.0, 0.5, 1.0)
        ]
        for name, expression in needle.METHODS.items()
    }
    assert reached == {
        "full": [True] * 3, "window 16": [False, False, True],
        "sinks + window 16": [True, False, True], "dilated": [False, True, True],
    }  # fmt: skip
    # A value 17 tokens before the question is carried two tokens on, into a window of 16.
    window, task = base.parse("local(window=16)"), needle.task_of(64, 23 / 30)
    assert task.needle_place() + 1 == 63 - 16
    assert needle.in_reach(window, task)
    assert not needle.in_reach(window, needle.task_of(64, 22 / 30))


@pytest.mark.slow
def test_a_tiny_run_writes_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(needle, "METHODS", {"window 16": "local(window=16)"})
    monkeypatch.setattr(needle, "LENGTHS", (16, 32))
    monkeypatch.setattr(needle, "DEPTHS", (0.0, 1.0))
    assert needle.main(["--out", str(tmp_path), "--steps", "150", "--test", "512"]) == 0
    cells = json.loads((tmp_path / "needle.json").read_text())["results"]["cells"]
    found = {(c["length"], c["depth"]): c for c in cells}
    assert [c["in_reach"] for c in found.values()] == [True, True, False, True]
    # 3 * 512 guesses: five deviations.
    chance = found[32, 0.0]["chance"]
    allowed = chance + 5 * np.sqrt(chance * (1 - chance) / (3 * 512))
    assert np.mean(found[32, 0.0]["accuracy"]) < allowed
    assert np.mean(found[32, 1.0]["accuracy"]) > 0.9
    assert "| window 16 | 32     | (0.0" in (tmp_path / "needle.md").read_text()
    assert (tmp_path / "needle.png").stat().st_size > 5000
