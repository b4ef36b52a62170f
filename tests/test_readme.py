"""What the README says works: Python runs, commands parse, files and targets exist."""

import json
import os
import pathlib
import re
import runpy
import shlex
import shutil

from experiments.dry_run import study
from sparse_attn.ops import attend as attend_lib
from sparse_attn.patterns import base
from sparse_attn.train import exits
from tests.launch import programs

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(program)]


def test_python_blocks_run_in_order():
    namespace = {"__name__": "readme"}
    assert len(blocks("python")) >= 4
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["out"].shape == (1, 1000, 8, 64)
    assert len(list(namespace["sweep_windows"]())) == 9


def test_the_new_pattern_is_one_file(tmp_path, monkeypatch):
    """The pattern of the README, saved under the name it gives, is found and composes."""
    (source,) = [block for block in blocks("python") if "EXAMPLES" in block]
    package = tmp_path / "readme_patterns"
    shutil.copytree(ROOT / "sparse_attn/patterns", package)
    (package / "log_sparse.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert "log_sparse.py" in README
    (text,) = re.findall(r'patterns\.parse\("(log_sparse[^"]*)"\)', README)
    pattern = base.find("log_sparse", package="readme_patterns")()
    seen = [back for back in range(100) if pattern.mask_fn(100, 100 - back)]
    assert seen == [0, 1, 2, 4, 8, 16, 32, 64]
    assert base.parse(text, package="readme_patterns").a == pattern


def test_launch_commands_parse(tmp_path):
    lines = [shlex.split(line, comments=True)[2:] for line in commands("python launch.py")]
    assert lines
    results = programs.launch_each([[*words, "--engine=print"] for words in lines], tmp_path)
    for words, result in zip(lines, results, strict=True):
        assert result.returncode == 0, (words, result.stderr)
        assert "error" not in result.stderr, words
        (config,) = (w.partition("=")[2] for w in words if w.startswith("--config="))
        runs = 1
        for sweep in (w.partition("=")[2] for w in words if w.startswith("--sweep=")):
            runs = len(list(runpy.run_path(str(ROOT / config))[f"sweep_{sweep}"]()))
        printed = result.stdout.strip().splitlines()
        assert len(printed) == (runs + 2 if "--status" in words else runs), words


def test_make_targets_exist():
    assert commands("make")
    named = set(re.findall(r"`?make ([a-z][a-z-]+)", README))
    makefile = (ROOT / "Makefile").read_text()
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def test_requirements_files_exist():
    named = set(re.findall(r"requirements[a-z-]*\.txt", README))
    assert {"requirements-gpu.txt", "requirements-tpu.txt"} < named
    assert all((ROOT / name).is_file() for name in named)


def test_folders_exist():
    table = README.split("## Where things are")[1]
    for folder in re.findall(r"`([a-z_]+/(?:[a-z_]+/)?)`", table):
        assert any((root / folder).is_dir() for root in (ROOT, ROOT / "sparse_attn")), folder


def test_exit_codes_are_those_of_the_code():
    table = README.split("| exit code |")[1].split("\n\n")[0]
    named = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert named == {1, *map(int, exits.ExitCode)}


def test_backends_are_those_of_attend():
    table = README.split("| backend |")[1].split("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == attend_lib.backends()


def test_no_command_names_a_missing_file():
    for path in set(re.findall(r"(?:configs|sparse_attn)/[a-z_/]+\.py", README)):
        assert (ROOT / path).is_file() or os.path.basename(path) == "log_sparse.py", path


def test_the_dry_run_table_is_the_recorded_one():
    reports = json.loads(study.RESULTS.read_text())["results"]
    cases = {(r["case"][1], r["case"][2]) for r in reports if r["case"][0] == "1.3b"}
    assert cases == {(v, on) for v in ("window", "dense") for on in ("v5e:16x16", "v6e:8x8")}
    shown = study.readme_table(reports)
    assert shown in README, "python -m experiments.dry_run.study --table prints it"
