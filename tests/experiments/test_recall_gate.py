"""The gate of the recall study: 200 steps of the trainer tell full attention from a window."""

import json

import pytest

from configs import recall
from sparse_attn.train import exits, main

pytestmark = pytest.mark.slow  # Both runs together are about half a minute of one core.


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    found = {}
    for method in ("full", "window8"):
        config = recall.get_config(f"{method},tiny")
        config.model.impl = "reference"
        folder = tmp_path_factory.mktemp(method)
        assert main.train(config, folder) == exits.ExitCode.FINISHED
        found[method] = json.loads((folder / "summary.json").read_text())
    return found


def test_full_attention_recalls_in_200_steps_and_a_window_does_not(summaries):
    full, window = summaries["full"], summaries["window8"]
    assert full["steps"] == window["steps"] == 200
    assert full["chance"] == 1 / 128
    assert full["test_accuracy"] > 0.5
    assert window["test_accuracy"] < 0.2
    assert full["test_accuracy"] > window["test_accuracy"] + 0.5


def test_summaries_tell_the_task_and_what_was_visible(summaries):
    assert summaries["full"]["corpus"].startswith("Mqar(vocab_size=256, length=32, num_pairs=4")
    assert summaries["full"]["params"] == summaries["window8"]["params"]
    assert summaries["full"]["token_density"] == 33 / 64
    assert summaries["window8"]["pattern"] == "local(window=2)"
    assert summaries["full"]["row_tokens"] == 32
    assert summaries["full"]["tokens"] == 200 * 64 * 32
