"""Two real processes on one machine, over gloo: they stop together, resume, and are one run."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from sparse_attn.parallel import hosts
from sparse_attn.train import exits, metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    text = " ".join(draw.choice(["one", "run", "in", "many", "places"]) for _ in range(6000))
    (folder / "text.txt").write_text(text)
    return folder


def start(corpus, workdir, *, processes, devices):
    """The command in `processes` processes of `devices` simulated devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [
        *(sys.executable, "-m", "sparse_attn.train.main"),
        "--config=configs/quickstart.py:local,tiny",
        f"--config.data.path={corpus}",
        "--config.data.batch_size=8",
        f"--config.train.steps={STEPS}",
        "--config.train.log_every=1",
        f"--config.train.eval_every={STEPS}",
        "--config.train.eval_batches=1",
        "--config.train.checkpoint_every=1000",
        "--config.sample.length=2",
        "--config.mesh.axes=data=2,fsdp=2",
        f"--workdir={workdir}",
    ]
    # Programs that run for milliseconds are not worth optimising.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "SPARSE_ATTN_CACHE": str(corpus.parent / "cache"),
    }
    several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=env | (several | {"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]


def finish(processes, code):
    try:
        for process in processes:
            output = process.communicate(timeout=240)[0]
            assert process.returncode == code, output
    finally:
        for process in processes:
            process.kill()


def losses(workdir):
    lines = metrics.read_json_lines(workdir / "metrics.jsonl")
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_are_one_run(corpus, tmp_path):
    finish(start(corpus, tmp_path / "one", processes=1, devices=4), exits.ExitCode.FINISHED)

    two = tmp_path / "two"
    processes = start(corpus, two, processes=2, devices=2)
    deadline = time.monotonic() + 240
    while not (two / "metrics.jsonl").is_file() or not losses(two):
        assert all(p.poll() is None for p in processes), [p.communicate()[0] for p in processes]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)  # One is told, both stop, after the same step.
    finish(processes, exits.ExitCode.PREEMPTED)
    (saved,) = (int(p.name) for p in (two / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == len(losses(two)) < STEPS

    finish(start(corpus, two, processes=2, devices=2), exits.ExitCode.FINISHED)
    np.testing.assert_allclose(losses(two), losses(tmp_path / "one"), rtol=1e-5)
    tokens = json.loads((tmp_path / "one" / "summary.json").read_text())["tokens"]
    for folder in (two, two / "processes" / "1"):
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["starts"] == 2
        # A process takes the padding at the end of an epoch in its own rows for that of all.
        assert summary["tokens"] == pytest.approx(tokens, rel=0.01)


def test_start_without_being_asked_is_one_process(monkeypatch):
    for name in ("SPARSE_ATTN_HOSTS", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    hosts.start()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"SPARSE_ATTN_HOSTS": "2"}, "must be 'auto', or not set"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, "JAX_NUM_PROCESSES=None must be a number"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID='x' must be a number"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "must be HOST:PORT of process 0"),
    ],
)
def test_an_incomplete_environment_is_named(monkeypatch, env, message):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        hosts.start()
