"""A run on a synthetic task: it trains, resumes exactly, and tells its accuracy."""

import json
import pathlib
import shutil

import pytest

from configs import recall
from sparse_attn.train import exits, main, metrics
from sparse_attn.viz import report, tables


def config_of(steps=4, **data):
    config = recall.get_config("sinks,tiny")
    config.model.impl = "reference"
    config.data.task = "mqar(vocab_size=32, length=16, num_pairs=2)"
    config.data.batch_size, config.train.steps, config.train.eval_batches = 4, steps, 2
    config.optim.warmup_steps = 1
    config.train.log_every, config.train.eval_every, config.train.checkpoint_every = 1, 2, 2
    config.data.update(data)
    return config


def losses(folder):
    lines = metrics.read_json_lines(folder / "metrics.jsonl")
    return [(x["step"], x["train/loss"], x["data/crc32"]) for x in lines if "data/crc32" in x]


def test_it_goes_on_exactly_where_it_stopped_and_is_reported(tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert main.train(config_of(), whole) == exits.ExitCode.FINISHED
    shutil.copytree(whole, pieces)
    shutil.rmtree(pieces / "checkpoints" / "4")
    (pieces / "summary.json").unlink()
    assert main.train(config_of(), pieces) == exits.ExitCode.FINISHED
    assert losses(pieces) == losses(whole)
    other = config_of(steps=6, task="mqar(vocab_size=32, length=16, num_pairs=1)")
    with pytest.raises(main.UsageError, match="data changed"):
        main.train(other, whole)
    assert len({crc for _, _, crc in losses(whole)}) == 4
    summary = json.loads((pieces / "summary.json").read_text())
    assert summary["starts"] == 2
    assert summary["chance"] == 1 / 16
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["tokens"] == 4 * 4 * 16
    assert tables.result_row("sinks", whole)[3].endswith("%")
    text = pathlib.Path(report.write(tmp_path, [("a", str(whole))])).read_text()
    assert "Mqar(vocab_size=32, length=16" in text


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("mqra", "data.task='mqra': 'mqra' is unknown; did you mean 'mqar'"),
        ("linear_regression", "data.task='linear_regression' is not .* must have tokens as inputs"),
        ("compression(length=8)", "is not for a decoder: .* copy .* an auto-encoder .* would do"),
    ],
)
def test_usage_errors_are_named_and_write_nothing(tmp_path, task, message):
    with pytest.raises(main.UsageError, match=message):
        main.train(config_of(task=task), tmp_path / "run")
    assert not (tmp_path / "run").exists()
