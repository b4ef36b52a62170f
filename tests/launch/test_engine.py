"""Engines, with a stand-in for the trainer that behaves as its config says."""

import contextlib
import json
import os
import pathlib
import pty
import shlex
import signal
import subprocess
import sys
import threading
import time

import ml_collections
import pytest

from sparse_attn.launch import engine, units

TRAINER = """
import json, os, pathlib, signal, sys, time

flags = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
folder = pathlib.Path(flags["workdir"])
behaviour = flags["config.behaviour"]
folder.mkdir(parents=True, exist_ok=True)
starts = folder / "starts"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
print("terminal" if sys.stdout.isatty() else "no terminal", flags["config.name"], flush=True)
if behaviour.startswith("exit"):
    sys.exit(int(behaviour.split()[1]))
if behaviour == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "wait" and len(starts.read_text()) == 1:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("waiting", flush=True)
    time.sleep(60)
(folder / "metrics.jsonl").write_text(
    json.dumps({"step": 1, "train/loss": 5.5, "perf/tokens_per_s": 1234.5}) + "\\n"
    + json.dumps({"step": 2, "train/loss": 5.0, "eval/bits_per_byte": 3.25}) + "\\n"
)
(folder / "checkpoints" / "2").mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(
    json.dumps({"model": {"pattern": "local(window=4)"}, "data": {"context": 64}})
)
(folder / "sample.txt").write_text("once upon a time")
corpus = {"name": "a book", "num_bytes": 1000, "sha256": "ab"}
(folder / "corpus.json").write_text(json.dumps(corpus))
(folder / "summary.json").write_text(json.dumps({"finished": True, "val_bpb": 3.25}))
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Runs `fake_trainer` instead of the trainer, and gives a folder for the runs."""
    (tmp_path / "fake_trainer.py").write_text(TRAINER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(units, "MODULE", "fake_trainer")
    return str(tmp_path / "runs")


def make_units(workdir, **behaviours):
    config = ml_collections.ConfigDict({"name": "", "behaviour": ""})
    points = [{"name": name, "behaviour": b} for name, b in behaviours.items()]
    return units.expand(config, points, config_spec="c.py", workdir=workdir)


def starts(unit) -> int:
    path = pathlib.Path(unit.folder, "starts")
    return len(path.read_text()) if path.exists() else 0


def test_print_is_what_local_runs(trainer, capfd, monkeypatch):
    work = make_units(trainer, a="finish", b='it\'s "odd" $HOME')
    assert engine.run_print(work, trainer) == 0
    printed = [shlex.split(line) for line in capfd.readouterr().out.splitlines()]
    assert not os.path.exists(trainer)
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, arguments, **kwargs):
            started.append(arguments)
            super().__init__(arguments, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    engine.run_local(work, trainer)
    assert [["python", *words[1:]] for words in started] == printed
    assert {words[0] for words in started} == {sys.executable}


def test_printed_line_runs_in_a_shell(trainer, capfd):
    (unit,) = make_units(trainer, a="finish")
    engine.run_print([unit], trainer)
    line = capfd.readouterr().out
    program = line.replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(["bash", "-c", program], check=True, timeout=60)
    assert engine.is_finished(unit.folder)


def test_finished_units_are_skipped_on_a_rerun(trainer, capfd):
    work = make_units(trainer, a="finish", b="finish")
    assert engine.run_local(work, trainer) == 0
    first = capfd.readouterr().out
    assert engine.run_local(work, trainer) == 0
    second = capfd.readouterr().out
    assert [starts(u) for u in work] == [1, 1]
    assert "skipped" not in first
    assert second.count("finished before, skipped") == 2
    for out in (first, second):
        assert "val bits/byte" in out
        assert out.count("3.2500") == 2
        assert f"report: {os.path.join(trainer, 'report.md')}" in out


def test_a_failed_unit_does_not_stop_the_others_and_is_named(trainer, capfd):
    work = make_units(trainer, a="exit 70", b="finish", c="kill", d="exit 0")
    assert engine.run_local(work, trainer) == 1
    captured = capfd.readouterr()
    failed = [line for line in captured.err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 3
    log = os.path.join(work[0].folder, "launch.log")
    assert failed[0] == f"failed: {work[0].id} (a): exit code 70 (NON_FINITE), log: {log}"
    assert "killed by SIGKILL" in failed[1]
    assert "no finished summary.json" in failed[2]
    assert "no terminal a" in pathlib.Path(log).read_text()
    assert engine.is_finished(work[1].folder)


def test_a_failed_unit_is_started_again(trainer):
    work = make_units(trainer, a="exit 1")
    engine.run_local(work, trainer)
    engine.run_local(work, trainer)
    assert starts(work[0]) == 2
    log = pathlib.Path(work[0].folder, "launch.log").read_text()
    assert log.count("no terminal a") == 2


def test_a_preempted_unit_is_not_a_failure(trainer, capfd):
    work = make_units(trainer, a="exit 75", b="finish")
    assert engine.run_local(work, trainer) == 75
    captured = capfd.readouterr()
    assert "failed" not in captured.err
    assert f"not finished: {work[0].id} (a); start the same command again" in captured.err
    assert engine.is_finished(work[1].folder)


def test_sigterm_goes_to_the_unit_and_the_next_start_finishes(trainer, capfd):
    work = make_units(trainer, a="wait", b="finish")

    def stop():
        log = pathlib.Path(work[0].folder, "launch.log")
        for _ in range(600):
            if log.exists() and "waiting" in log.read_text():
                break
            time.sleep(0.05)
        assert engine.state_of(work[0]) == "running"
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert engine.run_local(work, trainer) == 75
    thread.join()
    assert engine.state_of(work[0]) == "preempted"
    assert starts(work[1]) == 0
    assert engine.run_local(work, trainer) == 0
    assert [starts(u) for u in work] == [2, 1]


def test_one_folder_is_run_by_one_process_at_a_time(trainer, capfd):
    work = make_units(trainer, a="wait")
    (unit,) = work
    os.makedirs(unit.folder)
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import fcntl, sys, time; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX);"
            "print('held', flush=True); time.sleep(60)",
            os.path.join(unit.folder, "launch.log"),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        assert engine.state_of(unit) == "running"
        assert engine.run_local(work, trainer) == 75
        assert f"{unit.id} is being run by another process" in capfd.readouterr().err
        assert starts(unit) == 0
    finally:
        holder.kill()
        holder.wait()
    assert engine.state_of(unit) == "stopped"


def test_status(trainer, capfd):
    work = make_units(trainer, done="finish", bad="exit 3", gone="exit 75", later="finish")
    engine.run_local(work[:3], trainer)
    lines = engine.status(work).splitlines()
    assert lines[0].split() == [
        *("unit", "name", "state", "step", "checkpoint", "restarts", "validation", "tokens/s"),
    ]
    rows = {line.split()[1]: line.split()[2:] for line in lines[2:]}
    assert rows["done"] == ["finished", "2", "2", "0", "3.2500", "1,234"]
    assert rows["bad"] == ["failed", "(exit", "3)", "-", "-", "0", "-", "-"]
    assert rows["gone"][0] == "preempted"
    assert rows["later"] == ["not", "started", "-", "-", "0", "-", "-"]
    engine.run_local(work[1:2], trainer)
    again = {line.split()[1]: line.split()[2:] for line in engine.status(work).splitlines()[2:]}
    assert again["bad"][5] == "1"  # Restarts.


def test_a_terminal_is_passed_on(trainer):
    """Under a pseudo-terminal the run sees one too, so it draws its bar."""
    program = (
        "import sys; from sparse_attn.launch import engine, units; units.MODULE = 'fake_trainer';"
        "unit = units.WorkUnit('000-x', 'a', 'c.py', (('name', 'a'), ('behaviour', 'finish')),"
        " sys.argv[1] + '/000-x'); sys.exit(engine.run_local([unit], sys.argv[1]))"
    )
    reader, writer = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", program, trainer], stdout=writer)
    os.close(writer)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed.
        while chunk := os.read(reader, 4096):
            seen += chunk
    os.close(reader)
    assert process.wait(timeout=60) == 0, seen
    assert b"\nterminal a" in seen
    log = pathlib.Path(trainer, "000-x", "launch.log").read_text()
    assert log == "terminal a\n"


def test_summary_that_is_not_finished_or_damaged_is_run_again(trainer):
    (unit,) = make_units(trainer, a="finish")
    os.makedirs(unit.folder)
    for content in (json.dumps({"finished": False}), "{", "[]"):
        pathlib.Path(unit.folder, "summary.json").write_text(content)
        assert not engine.is_finished(unit.folder)
