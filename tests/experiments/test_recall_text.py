"""Bits per byte by part of a run on text: the whole is what the run itself told."""

import json

import pytest

from configs import quickstart
from experiments.recall import text
from sparse_attn.train import exits, main


@pytest.mark.slow  # Trains and loads a run on text.
def test_the_whole_is_what_the_run_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPARSE_ATTN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    for i in range(10):
        words = " ".join(f"{(i * j) % 17} and {j % 5} make" for j in range(300))
        (tmp_path / "corpus" / f"{i}.txt").write_text(words)
    config = quickstart.get_config("local,tiny")
    config.data.path, config.sample.length = str(tmp_path / "corpus"), 1
    config.model.impl = "reference"
    assert main.train(config, tmp_path / "run") == exits.ExitCode.FINISHED
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    name, parts = text.of_run(tmp_path / "run", edges=(0, 32), n=3)
    assert name == "local (run)"
    assert parts["all"]["bits_per_byte"] == pytest.approx(summary["val_bpb"], rel=1e-4)
    assert set(parts) == {"all", "position 0-31", "position 32-", "repeated 3-grams", "new"}
    assert text.main([str(tmp_path / "run"), "--ngram", "3"]) == 0
    assert f"{summary['val_bpb']:.3f}" in capsys.readouterr().out
