"""The study of training speed: two devices are held against one, and what differs is told."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments.throughput import study
from sparse_attn.parallel import attention

ROOT = pathlib.Path(__file__).parents[1]


def row(scheme="", **changes):
    values = dict(
        size="125m", pattern="causal()", impl="xla", remat="none", scheme=scheme, step_ms=2.0,
        tokens_per_s=1e5, mfu_useful=None, mfu_executed=0.5, losses=[6.0, 5.0],
        grads={"x": np.ones(4)},
    )  # fmt: skip
    return values | changes


def test_two_devices_that_agree():
    rows = [row(), row("ring", step_ms=1.0)]
    assert study.compare(rows, tiny=False) == []
    assert rows[1]["speedup"] == 2
    assert rows[1]["loss_difference"] == 0
    assert "2.00 x" in study.table(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": [6.0, 5.1]}, "ring: loss differs by 0.02"),
        ({"losses": [6.0, float("nan")]}, "ring: loss differs by nan"),
        ({"grads": {"x": np.array([1, 1, 1, 1.5])}}, "ring: grad differs by 0.25"),
    ],
)
def test_a_difference_is_told(change, message):
    (told,) = study.compare([row(), row("ring", **change)], tiny=False)
    assert message in told


def test_every_scheme_and_both_kinds_of_attention_are_measured():
    one, two = (study.cases(n, study.REAL) for n in (1, 2))
    assert {(c.size, c.impl) for c in one} == {
        (size, impl) for size in ("125m", "350m") for impl in ("cudnn", "pallas_gpu")
    }
    schemes = {c.scheme.partition(":")[0] for c in two}
    assert schemes == {"", *attention.schemes()} - {"all_gather_kv"}


def test_tables_stand_between_the_marks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{study.MARKS[0]}\nold\n{study.MARKS[1]}\nafter\n")
    study.bench.write([row(), row("ring", error="XlaRuntimeError: x")], tmp_path / "gpu_x2.json")
    study.write_readme(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "100,000" in text
    assert "XlaRuntimeError" in text


@pytest.mark.slow
def test_tiny_study_is_accepted():
    command = [sys.executable, "-m", "experiments.throughput.study", "--tiny"]
    # Programs that run for milliseconds are not worth optimising.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    done = subprocess.run(
        [*command, "--devices=2"],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens/s" in done.stdout
    assert "NOT accepted" not in done.stdout
