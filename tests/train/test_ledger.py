"""All seconds are accounted for, over restarts too, and lost steps are told from useful ones."""

import contextlib
import json

from sparse_attn.train import ledger


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def spend(entry, clock, **activities):
    for activity, seconds in activities.items():
        with entry.timed(activity):
            clock.now += seconds


def test_the_parts_add_up_to_the_wall_time():
    clock = Clock()
    entry = ledger.Ledger(clock=clock)
    spend(entry, clock, init=2.0, step=5.0)
    clock.now += 1.5
    assert entry.to_json()["seconds"] == {"init": 2.0, "step": 5.0, "other": 1.5}


def test_time_counts_also_when_the_activity_fails():
    clock = Clock()
    entry = ledger.Ledger(clock=clock)
    with contextlib.suppress(KeyError), entry.timed("step"):
        clock.now += 2.0
        raise KeyError
    assert entry.seconds == {"step": 2.0}


def test_steps_after_the_last_checkpoint_are_lost_and_counted():
    clock = Clock()
    first = ledger.Ledger(clock=clock)
    spend(first, clock, init=1.0, compile=3.0, step=10.0)
    first.step, first.tokens = 10, 1000
    saved = json.loads(json.dumps(first.to_json()))  # In the checkpoint of step 10.
    spend(first, clock, step=4.0, data_wait=0.5, checkpoint=2.0)
    first.step, first.tokens = 14, 1400
    last = first.to_json()  # Killed here.

    clock.now += 1000.0  # Nobody ran.
    second = ledger.Ledger(clock=clock)
    spend(second, clock, init=1.0, restore=2.0)
    second.resume(last, saved)
    content = second.to_json()
    assert content["seconds"] == {
        "init": 2.0, "restore": 2.0, "compile": 3.0, "step": 10.0, "data_wait": 0.0,
        "checkpoint": 2.0, "lost": 4.5, "other": 0.0,
    }  # fmt: skip
    assert sum(content["seconds"].values()) == 23.5
    assert (content["tokens"], content["step"]) == (1000, 10)
    assert (content["starts"], content["lost_steps"]) == (2, 4)


def test_a_run_killed_before_its_first_checkpoint_lost_all_steps():
    clock = Clock()
    first = ledger.Ledger(clock=clock)
    spend(first, clock, step=6.0)
    first.step, first.tokens = 6, 600
    second = ledger.Ledger(clock=clock)
    second.resume(first.to_json(), None)
    assert second.lost_steps == 6
    assert second.tokens == second.step == 0
    assert second.to_json()["seconds"] == {"lost": 6.0, "step": 0.0, "other": 0.0}
