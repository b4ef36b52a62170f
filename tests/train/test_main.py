"""The command itself: real processes that are killed, stopped and started again; its exit codes."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import quickstart
from sparse_attn.train import checkpoint, digests, exits, main, metrics, out_of_memory

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents with something to learn, and a cache for what is prepared from them."""
    folder = tmp_path_factory.mktemp("text")
    words = ["attention", "looks", "back", "along", "the", "line", "and", "picks", "few", "words"]
    for i in range(30):
        draw = random.Random(i)
        text = " ".join(draw.choice(words) for _ in range(400))
        (folder / f"{i}.txt").write_text(text)
    os.environ["SPARSE_ATTN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield folder
    del os.environ["SPARSE_ATTN_CACHE"]


def overrides(corpus, **changes):
    values = {
        "data.path": str(corpus), "data.max_bytes": 10**6, "data.batch_size": 8,
        "model.impl": "reference", "train.steps": STEPS, "train.log_every": 1,
        "train.eval_every": 20, "train.checkpoint_every": 10, "train.keep": 10,
        "sample.length": 8,
    }  # fmt: skip
    return values | {name.replace("__", "."): value for name, value in changes.items()}


def config_of(corpus, **changes):
    config = quickstart.get_config("local,tiny")
    for name, value in overrides(corpus, **changes).items():
        *sections, field = name.split(".")
        node = config
        for section in sections:
            node = node[section]
        node[field] = value
    return config


def start(corpus, workdir, **changes):
    """A process of the command as the README shows it."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "sparse_attn.train.main"),
            "--config=configs/quickstart.py:local,tiny",
            *(f"--config.{name}={value}" for name, value in overrides(corpus, **changes).items()),
            f"--workdir={workdir}",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_checkpoint(process, workdir, step):
    folder = workdir / "checkpoints"
    while not (folder.exists() and any(p.name.isdigit() and int(p.name) >= step
                                       for p in folder.iterdir())):  # fmt: skip
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "undisturbed"
    assert main.train(config_of(corpus), workdir) == exits.ExitCode.FINISHED
    return workdir


def assert_same_run(a, b):
    """Loss curves, data order and final weights and moments, bit for bit."""
    lines = [
        [{k: v for k, v in line.items() if not k.startswith("perf/")}
         for line in metrics.read_json_lines(folder / "metrics.jsonl")]
        for folder in (a, b)
    ]  # fmt: skip
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0] if "data/crc32" in line] == list(range(1, STEPS + 1))
    states = [checkpoint.load(folder / "checkpoints", step=STEPS) for folder in (a, b)]
    raw = [digests.named(s.state) for s in states]
    assert raw[0].keys() == raw[1].keys()
    for name in raw[0]:
        np.testing.assert_array_equal(raw[0][name], raw[1][name])
    assert states[0].data_state == states[1].data_state


def test_the_run_folder_tells_what_ran(undisturbed, corpus):
    def read(name):
        return json.loads((undisturbed / name).read_text())

    summary = read("summary.json")
    assert summary["finished"] is True
    assert summary["pattern"] == "local(window=64)"
    assert summary["steps"] == STEPS
    assert summary["params"] > 10_000
    # Windows of 128 in 128 tokens: rows see 1, 2 ... 64, 64, 64 keys.
    assert summary["token_density"] == pytest.approx((64 * 65 / 2 + 64 * 64) / 128**2)
    assert summary["block_density"] == 0.75  # Blocks of 64: the one above the diagonal is empty.
    assert 0 < summary["useful_flops"] < summary["executed_flops"]
    assert summary["val_bpb"] < 8
    assert summary["tokens"] == STEPS * 8 * 128
    assert summary["starts"] == 1
    assert read("config.json")["model"]["pattern"] == "local(window=64)"
    assert read("env.json")["packages"]["jax"]
    assert read("corpus.json")["sha256"] == summary["corpus_sha256"]
    assert read("corpus.json")["num_documents"] >= 30  # Long ones were cut.
    assert (undisturbed / "sample.txt").read_text(errors="replace").startswith("The ")
    assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == [
        "10", "20", "30", "40",
    ]  # fmt: skip


def test_it_learns(undisturbed):
    lines = metrics.read_json_lines(undisturbed / "metrics.jsonl")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[0] == pytest.approx(np.log(384), rel=0.1)
    assert losses[-1] < 0.7 * losses[0]


def test_a_finished_run_is_not_run_again(undisturbed, corpus, capsys):
    before = (undisturbed / "summary.json").read_bytes()
    assert main.train(config_of(corpus), undisturbed) == exits.ExitCode.FINISHED
    assert "already finished" in capsys.readouterr().out
    assert (undisturbed / "summary.json").read_bytes() == before


@pytest.mark.slow  # Two processes; in one, test_loop.py resumes bit by bit.
def test_killed_and_started_again_is_the_same_run(undisturbed, corpus, tmp_path):
    workdir = tmp_path / "killed"
    process = start(corpus, workdir)
    wait_for_checkpoint(process, workdir, 20)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (workdir / "summary.json").exists()
    killed_at = json.loads((workdir / "ledger.json").read_text())["step"]
    process = start(corpus, workdir)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == exits.ExitCode.FINISHED, output
    resumed_at = int(output.split("resumed from step ")[1].split()[0])
    assert_same_run(workdir, undisturbed)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["starts"] == 2
    assert summary["tokens"] == STEPS * 8 * 128  # Steps that were made twice count once.
    ledger = json.loads((workdir / "ledger.json").read_text())
    assert ledger["lost_steps"] == summary["lost_steps"] == killed_at - resumed_at
    assert ledger["step"] == STEPS
    assert {
        "init",
        "compile",
        "data_wait",
        "step",
        "eval",
        "checkpoint",
        "restore",
        "other",
    } <= set(ledger["seconds"])
    assert sum(ledger["seconds"].values()) == pytest.approx(summary["wall_seconds"], abs=1)


def test_nan_ends_with_its_code_and_a_report(corpus, tmp_path, capsys):
    config = config_of(corpus, optim__lr=1e30, optim__clip_norm=1e30, optim__warmup_steps=3)
    assert main.train(config, tmp_path) == exits.ExitCode.NON_FINITE
    report = json.loads((tmp_path / "non_finite.json").read_text())
    assert report["step"] >= 1
    assert "error: step" in capsys.readouterr().err
    assert not (tmp_path / "summary.json").exists()


def test_a_full_device_says_what_to_change(corpus, tmp_path, monkeypatch):
    def fit(*arguments, **more):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(main.loop_lib, "fit", fit)
    with pytest.raises(out_of_memory.OutOfMemoryError, match=r"optim.grad_accum=2") as error:
        main.train(config_of(corpus), tmp_path)
    assert "\n" not in str(error.value)
    assert (tmp_path / "ledger.json").exists()


def test_unusable_checkpoints_end_with_one_line(undisturbed, corpus, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    wider = config_of(corpus, train__steps=STEPS + 1, model__embed_dim=48)
    with pytest.raises(checkpoint.CheckpointError, match="params/embedding is float32") as error:
        main.train(wider, folder)
    assert "\n" not in str(error.value)
    other_order = config_of(corpus, train__steps=STEPS + 1, seed=1)
    with pytest.raises(checkpoint.CheckpointError, match="data order cannot be resumed: seed was"):
        main.train(other_order, folder)


def test_another_corpus_is_refused(undisturbed, corpus, tmp_path):
    (tmp_path / "other.txt").write_text("something else entirely. " * 500)
    config = config_of(corpus, train__steps=STEPS + 1, data__path=str(tmp_path / "other.txt"))
    with pytest.raises(main.UsageError, match=r"data changed: .* start in another workdir"):
        main.train(config, undisturbed)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model__pattern="locl(window=4)"), "pattern='locl' is unknown"),
        (dict(model__pattern="full()"), r"pattern=full\(\) must be causal"),
        (dict(model__num_heads=3, model__num_kv_heads=2), "num_kv_heads=2 must divide num_heads=3"),
        (dict(model__impl="cuda"), "impl='cuda' must be None or one of"),
        (dict(optim__lr=-1.0), "lr=-1.0 must be > 0"),
        (dict(data__path="/no/such/file"), "path='/no/such/file' must be"),
        (dict(optim__warmup_steps=40), r"warmup_steps=40 must be in \[0, steps=40\)"),
    ],
)
def test_usage_errors_are_named_and_write_nothing(corpus, tmp_path, changes, message):
    with pytest.raises(main.UsageError, match=message):
        main.train(config_of(corpus, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_command_line_mistakes_are_one_line_and_exit_code_2(corpus, tmp_path):
    process = start(corpus, tmp_path / "run", optim__leraning_rate=1)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == exits.ExitCode.USAGE
    (line,) = output.splitlines()
    assert line.startswith("error: config.optim.leraning_rate is unknown; the nearest valid name")
    assert "config.optim." in line.split("nearest")[1]
    assert not (tmp_path / "run").exists()
