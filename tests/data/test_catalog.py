"""Synthetic tasks by name, and the batches a run takes from one."""

import itertools

import numpy as np
import pytest

from sparse_attn.data.synthetic import base, catalog, mqar

TASK = "mqar(vocab_size=64, length=16, num_pairs=2)"


def test_every_task_has_a_name():
    found = catalog.tasks()
    assert found["mqar"] is mqar.Mqar
    assert {"needle", "variable_tracking", "in_context_recall", "list_ops"} <= set(found)
    assert "noisy_in_context_recall" in found
    assert base.Task not in found.values()
    assert all(catalog.parse(f"{name}()") == cls() for name, cls in found.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mqra()", "'mqra' is unknown; did you mean 'mqar'"),
        ("mqar(size=4)", "mqar\\(\\) has the fields vocab_size, length"),
        ("mqar(length=15)", "length=15 must be even"),
        ("mqar(64)", "must be a name with fields"),
        ("mqar(length=open('x'))", "must be a name with fields"),
        ("mqar.Mqar()", "must be a name with fields"),
        ("mqar(", "must be a name with fields"),
    ],
)
def test_what_is_no_task_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        catalog.parse(text)


def batches(**changes):
    fields = dict(split="train", seed=0, batch_size=4) | changes
    return catalog.Batches(catalog.parse(TASK), **fields)


def test_batches_are_the_examples_in_order_and_go_on_where_they_stopped():
    task, mine = catalog.parse(TASK), batches()
    first, second, third = itertools.islice(mine, 3)
    source = base.Source(task, split="train", seed=0, size=12)
    for name in ("inputs", "targets", "weights"):
        rows = np.concatenate([first[name], second[name], third[name]])
        np.testing.assert_array_equal(rows, np.stack([source[i][name] for i in range(12)]))
    assert (first["segment_ids"] == 1).all()
    again = batches()
    next(again)
    saved = again.get_state()
    other = batches()
    other.set_state(saved)
    np.testing.assert_array_equal(next(other)["inputs"], second["inputs"])
    for changes in ({"seed": 1}, {"split": "test"}, {"batch_size": 2}):
        same = (next(batches(**changes))["inputs"][:2] == first["inputs"][:2]).all()
        assert same == ("batch_size" in changes)
        with pytest.raises(ValueError, match="the data order cannot be resumed"):
            batches(**changes).set_state(saved)


def test_data_of_a_run_is_told_apart_by_its_recipe():
    drawn = catalog.Drawn(catalog.parse(TASK))
    assert drawn.sha256 == catalog.Drawn(catalog.parse(TASK)).sha256
    assert drawn.sha256 != catalog.Drawn(catalog.parse("mqar(vocab_size=128)")).sha256
    assert drawn.to_json()["chance"] == 1 / 32
