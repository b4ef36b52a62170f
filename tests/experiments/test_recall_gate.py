"""The gate of the recall study: 200 steps of the trainer tell full attention from a window."""

import json

import pytest

from configs import recall
from sparse_attn.train import exits, main

pytestmark = pytest.mark.slow  # Both runs together are less than a minute of one core.


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
    assert full["chance"] == window["chance"] == 1 / 128
    assert full["test_accuracy"] > 0.5
    assert window["test_accuracy"] < 0.2
    assert full["test_accuracy"] > window["test_accuracy"] + 0.5


def test_summaries_tell_the_task_and_what_was_visible(summaries):
    assert summaries["full"]["corpus"].startswith("Mqar(vocab_size=256, length=64, num_pairs=8")
    assert summaries["full"]["params"] == summaries["window8"]["params"]
    assert summaries["full"]["token_density"] == 65 / 128
    assert summaries["window8"]["pattern"] == "local(window=8)"
    assert summaries["window8"]["token_density"] == (8 * 64 - 28) / 64**2
    assert summaries["full"]["row_tokens"] == 64
    assert summaries["full"]["tokens"] == 200 * 64 * 64
