"""Kills and preempts a training run at random moments, and compares it with an undisturbed one.

    python -m experiments.hard_to_kill.study                         # 20 + 20, stores the result
    python -m experiments.hard_to_kill.study --kills=2 --terms=2 --seed=3 --output=runs/killed

The run is a process of the command that users start, with a checkpoint every 5 steps that is
written while training goes on. See README.md for what must hold.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.kernels import bench
from sparse_attn.train import checkpoint, digests, exits, metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = pathlib.Path(__file__).parent / "results"
SAVE_EVERY = 5
OVERRIDES = {
    "data.max_bytes": 100_000, "data.batch_size": 2, "data.context": 64, "model.num_layers": 1,
    "model.impl": "reference", "train.log_every": 1, "train.checkpoint_every": SAVE_EVERY,
    "train.keep": 3, "sample.length": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """One process that was ended by a signal.

    Attributes:
      signal: its name.
      moment: "step n" of this process, or "second s" after its start.
      exit_code: of the process; minus the signal when nothing handled it.
      last_step: the last one in `metrics.jsonl`.
      durable_step: the newest checkpoint on disk; 0 = none.
      resumed_step: what the next process went on from.
    """

    signal: str
    moment: str
    exit_code: int
    last_step: int
    durable_step: int
    resumed_step: int


class Study:
    """Runs in one folder, with one text, one compilation cache and one number of steps."""

    def __init__(self, folder: pathlib.Path, *, steps: int, seed: int):
        self.folder, self.steps, self._draw = folder, steps, random.Random(seed)
        text = " ".join(self._draw.choice(("few", "words", "of", "text")) for _ in range(40_000))
        (folder / "text.txt").write_text(text)
        self._start_seconds = 0.0

    def start(self, workdir: pathlib.Path) -> subprocess.Popen:
        """A process of the command."""
        values = OVERRIDES | {
            "data.path": str(self.folder / "text.txt"), "train.steps": self.steps,
            "train.eval_every": self.steps, "optim.warmup_steps": 5,
        }  # fmt: skip
        # The cache saves most of the time of a start.
        caches = {
            "SPARSE_ATTN_CACHE": str(self.folder / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "sparse_attn.train.main"),
                "--config=configs/quickstart.py:local,tiny",
                *(f"--config.{name}={value}" for name, value in values.items()),
                f"--workdir={workdir}",
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | caches,
        )

    def to_end(self, workdir: pathlib.Path) -> str:
        """Runs to the end, undisturbed from now on; the output."""
        begin = time.monotonic()
        process = self.start(workdir)
        while process.poll() is None and not _last_step(workdir):
            time.sleep(0.01)
        self._start_seconds = self._start_seconds or time.monotonic() - begin
        output = process.communicate()[0]
        if process.returncode != exits.ExitCode.FINISHED:
            raise RuntimeError(f"exit code {process.returncode}: {output}")
        return output

    def disturb(self, workdir: pathlib.Path, name: str) -> tuple[Disturbance, str] | None:
        """Starts a process and ends it by a signal; what happened and its output.

        `resumed_step` is yet to be known. None when the run was finished before.
        """
        before = _last_step(workdir)
        process = self.start(workdir)
        if self._draw.random() < 0.25:
            seconds = self._draw.uniform(0, self._start_seconds)
            moment = f"second {seconds:.2f}"
            end = time.monotonic() + seconds
            _wait(process, lambda: time.monotonic() > end)
        else:
            steps = self._draw.randrange(1, 4 * SAVE_EVERY)
            moment = f"step {steps}"
            # Lines after the checkpoint are dropped at a restart, so the count may fall first.
            seen = [before]

            def made() -> bool:
                now = _last_step(workdir)
                seen[0] = min(seen[0], now)
                return now >= seen[0] + steps

            _wait(process, made)
            time.sleep(self._draw.uniform(0, 0.05))
        if process.poll() is None:
            process.send_signal(signal.Signals[name])
        output = process.communicate()[0]
        if process.returncode == exits.ExitCode.FINISHED:
            return None
        return Disturbance(
            name, moment, process.returncode, _last_step(workdir), _durable_step(workdir), -1
        ), output


def run(folder: pathlib.Path, *, kills: int, terms: int, steps: int, seed: int) -> dict[str, Any]:
    """The whole study; raises `RuntimeError` when something was lost or differs."""
    study = Study(folder, steps=steps, seed=seed)
    undisturbed = folder / "undisturbed"
    study.to_end(undisturbed)
    names = ["SIGKILL"] * kills + ["SIGTERM"] * terms
    random.Random(seed).shuffle(names)
    disturbances: list[Disturbance] = []
    rounds = 0
    while names:  # A run that finishes before all signals are used is followed by another.
        rounds += 1
        workdir, found = folder / f"disturbed_{rounds}", []
        while names:
            disturbed = study.disturb(workdir, names[-1])
            if disturbed is None:
                break
            names.pop()
            found.append(disturbed)
        outputs = [output for _, output in found] + [study.to_end(workdir)]
        for (event, output), following in zip(found, outputs[1:], strict=True):
            disturbances.append(_check(event, output, following))
        compare(undisturbed, workdir, steps)
    killed = [d for d in disturbances if d.signal == "SIGKILL"]
    lost = [d.last_step - d.durable_step for d in killed]
    return {
        "kills": len(killed),
        "terms": len(disturbances) - len(killed),
        "steps": steps,
        "checkpoint_every": SAVE_EVERY,
        "seed": seed,
        "runs": rounds,
        "final_weights_equal": True,
        "steps_lost_per_kill_max": max(lost, default=0),
        "steps_lost_per_kill_mean": float(np.mean(lost)) if lost else 0.0,
        "disturbances": [dataclasses.asdict(d) for d in disturbances],
        "ledger_of_last_run": json.loads((workdir / "ledger.json").read_text()),
    }


def compare(a: pathlib.Path, b: pathlib.Path, steps: int) -> None:
    """Raises `RuntimeError` unless two finished runs are the same run, bit for bit."""
    states = [checkpoint.load(folder / "checkpoints", step=steps) for folder in (a, b)]
    arrays = [digests.named(restored.state) for restored in states]
    if arrays[0].keys() != arrays[1].keys():
        raise RuntimeError(f"{b}: other arrays than {a}")
    for name, x in arrays[0].items():
        if np.asarray(x).tobytes() != np.asarray(arrays[1][name]).tobytes():
            raise RuntimeError(f"{b}: {name} differs from {a}")
    if states[0].data_state != states[1].data_state:
        raise RuntimeError(f"{b}: the data iterator differs from {a}")
    lines = [
        [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in all_lines]
        for all_lines in (metrics.read_json_lines(folder / "metrics.jsonl") for folder in (a, b))
    ]
    if lines[0] != lines[1]:
        raise RuntimeError(f"{b}: metrics.jsonl differs from {a}")


def _check(event: Disturbance, output: str, following: str) -> Disturbance:
    """The event with the step that was resumed; raises `RuntimeError` when something was lost."""
    resumed = 0
    if "resumed from step " in following:
        resumed = int(following.split("resumed from step ")[1].split()[0])
    elif "step " not in following:
        resumed = event.durable_step  # Ended before it looked.
    event = dataclasses.replace(event, resumed_step=resumed)
    if resumed != event.durable_step or "rejected" in following:
        raise RuntimeError(f"a durable step was not restored: {event}: {following}")
    if event.exit_code == exits.ExitCode.PREEMPTED:
        stopped = int(output.split("stopped by SIGTERM after step ")[1].split(";")[0])
        if stopped != event.durable_step:
            raise RuntimeError(f"steps before SIGTERM were lost: {event}: {output}")
    elif event.exit_code != -signal.Signals[event.signal]:  # Before the handler is installed.
        raise RuntimeError(f"unexpected end: {event}: {output}")
    return event


def _wait(process: subprocess.Popen, condition) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.002)


def _last_step(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    lines = metrics.read_json_lines(path) if path.exists() else []
    return lines[-1]["step"] if lines else 0


def _durable_step(workdir: pathlib.Path) -> int:
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = run(
            pathlib.Path(folder),
            kills=args.kills,
            terms=args.terms,
            steps=args.steps,
            seed=args.seed,
        )
    result["seconds"] = round(time.monotonic() - begin, 1)
    path = bench.write(result, args.output / "hard_to_kill.json")
    print(f"{result['kills']} kills, {result['terms']} preemptions: nothing lost; {path}")


if __name__ == "__main__":
    main()
