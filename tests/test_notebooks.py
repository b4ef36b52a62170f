"""The notebooks run from the first cell to the last, and what they assert holds."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import matplotlib
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "experiments/notebooks").glob("*.py"))
# Trains, so it runs with the slow tests only, in jupyter.
TRAINS = ROOT / "experiments/notebooks/inspecting_a_run.py"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p != TRAINS], ids=lambda p: p.stem)
def test_notebook_runs_as_a_script(path):
    from matplotlib import pyplot

    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    try:
        assert "patterns" in runpy.run_path(str(path))
    finally:
        pyplot.close("all")
        matplotlib.use(before)


def test_the_readme_lists_every_notebook():
    readme = (ROOT / "experiments/notebooks/README.md").read_text()
    assert re.findall(r"\]\((\w+\.py)\)", readme)
    assert set(re.findall(r"\]\((\w+\.py)\)", readme)) == {p.name for p in NOTEBOOKS}


@pytest.mark.slow
def test_notebooks_run_in_jupyter(tmp_path):
    converted = ["-m", "jupytext", "--to", "notebook"]
    for path in NOTEBOOKS:
        target = tmp_path / f"{path.stem}.ipynb"
        subprocess.run([sys.executable, *converted, path, "--output", target], check=True)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbmake", tmp_path],
        cwd=tmp_path, env=_environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(NOTEBOOKS)} passed" in result.stdout


def _environment(tmp_path):
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg",
        "SPARSE_ATTN_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path),
        # Programs run for milliseconds here: what takes time is compiling them.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }  # fmt: skip
