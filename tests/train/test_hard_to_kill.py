"""A small part of `python -m experiments.hard_to_kill.study`, whose result is stored."""

import collections
import json
import re

import pytest

from experiments.hard_to_kill import study
from sparse_attn.train import exits


@pytest.mark.slow
def test_killed_and_preempted_at_random_moments_it_is_the_same_run(tmp_path):
    result = study.run(tmp_path, kills=2, terms=2, steps=60, seed=1)
    assert (result["kills"], result["terms"]) == (2, 2)
    assert all(d["resumed_step"] == d["durable_step"] for d in result["disturbances"])
    # A process that was asked to stop saved what it had, and said so by its exit code.
    stopped = [d for d in result["disturbances"] if d["exit_code"] == exits.ExitCode.PREEMPTED]
    assert stopped
    assert all(0 < d["last_step"] == d["durable_step"] < 60 for d in stopped)


def test_a_step_that_is_not_restored_and_one_that_differs_are_found(tmp_path):
    event = study.Disturbance("SIGKILL", "step 3", -9, 13, 10, -1)
    assert study._check(event, "", "resumed from step 10\n").resumed_step == 10
    with pytest.raises(RuntimeError, match="a durable step was not restored"):
        study._check(event, "", "resumed from step 5\n")
    with pytest.raises(RuntimeError, match="unexpected end"):
        study._check(event.__class__("SIGTERM", "step 3", 1, 13, 10, -1), "", "")
    stopped = event.__class__("SIGTERM", "step 3", 75, 13, 10, -1)
    with pytest.raises(RuntimeError, match="steps before SIGTERM were lost"):
        study._check(stopped, "stopped by SIGTERM after step 13; x", "resumed from step 10\n")


def test_the_stored_result_is_of_twenty_kills_and_twenty_preemptions():
    stored = json.loads((study.RESULTS / "hard_to_kill.json").read_text())
    result = stored["results"]
    signals = collections.Counter(d["signal"] for d in result["disturbances"])
    assert signals == {"SIGKILL": 20, "SIGTERM": 20}
    for event in result["disturbances"]:
        assert event["resumed_step"] == event["durable_step"]
        assert event["last_step"] - event["durable_step"] <= 2 * result["checkpoint_every"]
    # What ran can be found again.
    environment = stored["environment"]
    assert re.fullmatch("[0-9a-f]{40}", environment["commit"])
    assert environment["changed_files"] == 0
    assert {"jax", "orbax-checkpoint"} < environment["packages"].keys()
