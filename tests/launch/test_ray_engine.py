"""A sweep on a local Ray cluster: retries, a killed unit, a killed driver, nothing done twice."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from sparse_attn.launch import engine, ray_engine, units

ROOT = pathlib.Path(__file__).parents[2]
TRAINER = """
import json, os, pathlib, signal, sys, time

flags = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
folder = pathlib.Path(flags["workdir"])
behaviour = flags["config.behaviour"]


def add(name):
    with (folder / name).open("a") as file:
        file.write("x")
    return len((folder / name).read_text())


starts = add("starts")
if behaviour == "fail twice" and starts <= 2:
    sys.exit(1)
if behaviour == "fail" or (behaviour == "wrong" and starts):
    sys.exit(1 if behaviour == "fail" else 2)
if behaviour == "killed" and starts == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "save and stop":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
while behaviour in ("slow", "save and stop") and not (folder.parent / "go").exists():
    time.sleep(0.02)
(folder / "checkpoints" / "7").mkdir(parents=True)
line = {"step": 7, "perf/tokens_per_s": 1234.5, "eval/bits_per_byte": 3.25}
(folder / "metrics.jsonl").write_text(json.dumps(line) + "\\n")
(folder / "config.json").write_text(json.dumps({"model": {"pattern": "causal()"}, "data": {}}))
add("ends")
(folder / "summary.json").write_text(json.dumps({"finished": True}))
"""
DRIVER = """
import pathlib, sys
from sparse_attn.launch import engine, ray_engine, units

units.MODULE = "fake_trainer"
engine.conclude = lambda work, workdir, codes: engine._tell(work, codes)  # No report.
workdir, *behaviours = sys.argv[1:]
work = [
    units.WorkUnit(f"{i:03d}-x", b, "c.py", (("behaviour", b),), f"{workdir}/{i:03d}-x")
    for i, b in enumerate(behaviours)
]
sys.exit(ray_engine.run(work, workdir, resources={"CPU": 0.25}))
"""


class Sweep:
    """A sweep whose driver is a process."""

    def __init__(self, folder, behaviours):
        (folder / "fake_trainer.py").write_text(TRAINER)
        (folder / "driver.py").write_text(DRIVER)
        self.folder, self.behaviours, self.workdir = folder, behaviours, folder / "runs"
        self.drivers = []
        self.units = [
            units.WorkUnit(f"{i:03d}-x", b, "c.py", (), str(self.workdir / f"{i:03d}-x"))
            for i, b in enumerate(behaviours)
        ]

    def start(self):
        path = os.pathsep.join((str(ROOT), str(self.folder)))
        driver = subprocess.Popen(
            [sys.executable, "driver.py", str(self.workdir), *self.behaviours],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.drivers.append(driver)
        return driver

    def end(self):
        """Leaves nothing behind, whatever failed."""
        for driver in self.drivers:
            driver.kill()
            driver.wait()
            driver.stderr.close()
        self.workdir.mkdir(exist_ok=True)
        (self.workdir / "go").touch()

    def wait_for(self, name, *numbers):
        end = time.monotonic() + 120
        while not all(self.count(name, i) for i in numbers):
            assert time.monotonic() < end, engine.status(self.units)
            time.sleep(0.05)

    def count(self, name, i):
        path = pathlib.Path(self.units[i].folder, name)
        return len(path.read_text()) if path.exists() else 0

    def counts(self, name):
        return [self.count(name, i) for i in range(len(self.units))]

    def table(self):
        return [line.split() for line in engine.status(self.units).splitlines()[2:]]


@pytest.fixture
def make_sweep(tmp_path):
    with contextlib.ExitStack() as stack:

        def make(*behaviours):
            sweep = Sweep(tmp_path, behaviours)
            stack.callback(sweep.end)
            return sweep

        yield make


@pytest.mark.slow
def test_failures_kills_and_a_killed_driver(make_sweep):
    sweep = make_sweep("finish", "finish", "fail twice", "killed", "slow", "slow")
    driver = sweep.start()
    sweep.wait_for("ends", 0, 1, 2, 3)
    sweep.wait_for("starts", 4, 5)
    assert [row[2] for row in sweep.table()[4:]] == ["running", "running"]
    driver.kill()
    driver.communicate()
    again = sweep.start()
    (sweep.workdir / "go").touch()
    error = again.communicate(timeout=120)[1]
    assert again.returncode == 0, error
    assert sweep.counts("ends") == [1] * 6
    starts = sweep.counts("starts")
    assert starts[:4] == [1, 1, 3, 2]
    assert set(starts[4:]) <= {1, 2}  # Went on without its cluster, or was started again.
    for (*_, state, step, saved, restarts, _, speed), count in zip(
        sweep.table(), starts, strict=True
    ):
        assert (state, step, saved, int(restarts), speed) == (
            "finished", "7", "7", count - 1, "1,234",
        )  # fmt: skip
    third = sweep.start()  # Everything is finished: nothing is started.
    assert third.wait(timeout=120) == 0
    assert sweep.counts("starts") == starts


@pytest.mark.slow
def test_retries_end_and_sigterm_is_passed_on(make_sweep):
    sweep = make_sweep("fail", "wrong", "save and stop")
    driver = sweep.start()
    sweep.wait_for("starts", 0, 1, 2)
    end = time.monotonic() + 60
    while sweep.count("starts", 0) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    driver.send_signal(signal.SIGTERM)
    error = driver.communicate(timeout=120)[1]
    assert driver.returncode == 1, error  # A unit failed.
    assert sweep.counts("starts") == [4, 1, 1]
    states = [engine.state_of(unit) for unit in sweep.units]
    assert states == ["failed (exit 1)", "failed (exit 2)", "preempted"]
    assert json.loads(pathlib.Path(sweep.units[0].folder, "launch.json").read_text()) == {
        "starts": 4, "exit_code": 1,
    }  # fmt: skip


def test_without_ray_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install -r requirements-ray.txt"):
        ray_engine.run([], str(tmp_path))


class FakeSlice:
    """A slice of two hosts, as `ray.util.tpu` gives it; free at the second request."""

    requests, closed = 0, 0
    bundle_specs = ({"TPU": 4.0}, {"TPU": 4.0})

    def __init__(self, topology, version):
        assert (topology, version) == ("2x2x2", "v4")
        FakeSlice.requests += 1
        if FakeSlice.requests == 1:
            raise TimeoutError
        self.placement_group = self

    def wait(self, seconds):
        return True

    def shutdown(self):
        FakeSlice.closed += 1


def test_every_host_of_a_tpu_slice_runs_the_command_and_the_slice_is_given_back(monkeypatch):
    fakes = {
        name: types.ModuleType(name)
        for name in ("ray", "ray.util", "ray.util.tpu", "ray.util.scheduling_strategies")
    }
    fakes["ray.util"].tpu = fakes["ray.util.tpu"]
    fakes["ray.util"].scheduling_strategies = fakes["ray.util.scheduling_strategies"]
    fakes["ray.util.tpu"].slice_placement_group = FakeSlice
    fakes["ray.util.scheduling_strategies"].PlacementGroupSchedulingStrategy = lambda g, i: i
    fakes["ray"].remote = lambda **_: lambda function: function
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    sweep = ray_engine._Sweep(fakes["ray"], {}, "v4:2x2x2", 0)
    with sweep._hosts() as hosts:
        assert hosts == [
            {"num_cpus": 0, "resources": {"TPU": 4.0}, "scheduling_strategy": rank}
            for rank in (0, 1)
        ]
        assert FakeSlice.closed == 0
    assert (FakeSlice.requests, FakeSlice.closed) == (2, 1)
    sweep.stop()
    with sweep._hosts() as hosts:
        assert hosts == []
