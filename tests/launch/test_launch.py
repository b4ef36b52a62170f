"""The program `launch.py`: its messages, and a real sweep from start to status."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.launch import programs

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from configs import quickstart

def get_config(arg=None):
    return quickstart.get_config(",".join(filter(None, ("tiny", arg))))

def sweep_two():
    yield {"name": "dense", "model.pattern": "causal()"}
    yield {"name": "window", "model.pattern": "local(window=16)"}

def sweep_wrong():
    yield {"model.patern": "causal()"}
"""


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "two.py"
    path.write_text(CONFIG)
    return path


def launch(*arguments, cwd=ROOT, cache=None, timeout=280):
    # Compiled as users compile, whatever the lane does.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"SPARSE_ATTN_CACHE": str(cache)} if cache else {}
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


MISTAKES = [
    (["--config.optim.learning_rate=1"], "config.optim.learning_rate is unknown; the nearest"),
    (["--config.optim.lrr=1"], "the nearest valid name is config.optim.lr"),
    (["--config.seed=one"], "--config.seed=one"),
    (["--sweep=tow"], "--sweep=tow must be one of: two, wrong"),
    (["--sweep=wrong"], "the nearest valid name is config.model.pattern"),
    (["--sweep=two", "--config.model.pattern=causal()"], "is set by the sweep itself"),
    (["--engine=nowhere"], "--engine=nowhere"),
    (["--engine=skypilot"], "--accelerators=None must be what to rent"),
    (["--engine=ray", "--ray-resources=CPU"], "could not convert"),
    (["--profile=7"], "profile='7' must be START:STOP"),
    (["--swep=two"], "swep"),
    (["two"], "argument 'two' must be a flag"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of every command line that starts nothing; one list of them is one start of Python."""
    folder = tmp_path_factory.mktemp("lines")
    config = folder / "two.py"
    config.write_text(CONFIG)
    lines = {
        message: [f"--config={config}", f"--workdir={folder / 'runs'}", *arguments]
        for arguments, message in MISTAKES
    }
    lines["no such file"] = [f"--config={folder / 'none.py'}", "--workdir=x"]
    lines["no workdir"] = [f"--config={config}"]
    lines["overrides"] = [
        f"--config={config}:local", "--config.optim.lr=3e-4", "--sweep=two", "--workdir=w",
        "--engine=print", "--profile=3:4", "--dump-hlo",
    ]  # fmt: skip
    found = dict(zip(lines, programs.launch_each(lines.values(), folder), strict=True))
    assert not (folder / "runs").exists()
    return found


@pytest.mark.parametrize("message", [message for _, message in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(results, message):
    result = results[message]
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr


def test_a_missing_config_or_workdir_is_named(results):
    missing = results["no such file"]
    assert missing.returncode == 2
    assert "none.py" in missing.stderr
    assert "Traceback" not in missing.stderr
    no_workdir = results["no workdir"]
    assert no_workdir.returncode == 2
    assert "--workdir" in no_workdir.stderr


def test_command_line_overrides_reach_every_run(results):
    result = results["overrides"]
    lines = result.stdout.splitlines()
    assert result.returncode == 0
    assert len(lines) == 2
    for line, name in zip(lines, ("dense", "window"), strict=True):
        assert line.startswith("python -m sparse_attn.train.main ")
        assert "two.py:local " in line
        assert "--config.optim.lr=0.0003" in line
        assert f"--config.name={name}" in line
        assert line.endswith(" --dump-hlo --profile=3:4")


def test_the_program_starts_by_itself(config_path):
    """What the cases above leave out: Python starts with nothing imported, as a user starts it."""
    result = launch(f"--config={config_path}", "--workdir=w", "--swep=two")
    assert result.returncode == 2
    assert [x for x in result.stderr.splitlines() if x.startswith("error: ") and "swep" in x]


@pytest.mark.slow
def test_a_real_sweep_runs_skips_and_reports(config_path, tmp_path):
    text = " ".join(f"{i} times {i} is {i * i}." for i in range(12_000))
    (tmp_path / "text.txt").write_text(text)
    arguments = (
        f"--config={config_path}",
        f"--config.data.path={tmp_path / 'text.txt'}",
        "--sweep=two",
        "--workdir=runs",  # of the current folder, which is not the repository
    )
    first = launch(*arguments, cwd=tmp_path, cache=tmp_path / "cache")
    assert first.returncode == 0, first.stdout + first.stderr
    folders = sorted((tmp_path / "runs").glob("00*"))
    assert len(folders) == 2
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert [s["name"] for s in summaries] == ["dense", "window"]
    assert all(s["finished"] and s["steps"] == 6 for s in summaries)
    # One model, one budget: only what the patterns see differs.
    assert summaries[0]["params"] == summaries[1]["params"]
    assert summaries[0]["tokens"] == summaries[1]["tokens"]
    assert summaries[0]["token_density"] > summaries[1]["token_density"]

    table = [line for line in first.stdout.splitlines() if line.startswith(("dense ", "window "))]
    assert [len(line.split()) for line in table] == [7, 7]
    assert not any(" - " in line for line in table)
    report = (tmp_path / "runs" / "report.md").read_text()
    for part in ("text.txt", "sha256", "| dense |", "| window |", "**dense**", "report/loss.png"):
        assert part in report, part
    for picture in ("loss.png", "patterns.png"):
        assert (tmp_path / "runs/report" / picture).read_bytes().startswith(b"\x89PNG")

    stamps = [(folder / "metrics.jsonl").stat().st_mtime_ns for folder in folders]
    second = launch(*arguments, cwd=tmp_path, cache=tmp_path / "cache")
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("finished before, skipped") == 2
    assert [(folder / "metrics.jsonl").stat().st_mtime_ns for folder in folders] == stamps

    status = launch(*arguments, "--status", cwd=tmp_path)
    rows = [line.split() for line in status.stdout.splitlines() if line.startswith("00")]
    assert [row[1:5] for row in rows] == [
        ["dense", "finished", "6", "6"],
        ["window", "finished", "6", "6"],
    ]
    assert [float(row[6]) for row in rows] == [round(s["val_bpb"], 4) for s in summaries]

    other = launch(*arguments, "--config.seed=1", "--status", cwd=tmp_path)
    assert other.stdout.count("not started") == 2
