"""The window of the profiler, the dumped program, and where compiled programs are kept."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from sparse_attn.train import profiling

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
import jax
from sparse_attn.train import profiling

def train_step(x):
    return 2 * x

profiling.dump_hlo(sys.argv[1])
jax.jit(lambda x: x + 1)(1.0)
jax.jit(train_step)(1.0)
"""


@pytest.mark.parametrize("text", ["", "3", "3:", "0:2", "5:4", "a:b", "-1:2", "1:2:3"])
def test_a_window_is_two_steps(text):
    with pytest.raises(ValueError, match="must be START:STOP"):
        profiling.ProfileWindow.parse(text)


def test_a_trace_is_of_the_window_and_is_written_also_when_the_run_ends_inside(
    tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with profiling.Profiler(tmp_path, profiling.ProfileWindow(3, 4)) as profiler:
        assert [profiler.starts_at(s) for s in (2, 3, 4)] == [False, True, False]
        profiler.start()
        assert [profiler.ends_at(s) for s in (3, 4, 5)] == [False, True, False]
    assert calls == [str(tmp_path), "stop"]
    with profiling.Profiler(tmp_path, None) as profiler:
        assert not profiler.starts_at(1)
        assert not profiler.ends_at(1)
    assert len(calls) == 2


def test_the_training_step_is_dumped(tmp_path):
    subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], cwd=ROOT, check=True, timeout=120)
    names = [path.name for path in tmp_path.iterdir()]
    assert any("jit_train_step" in n and "before_optimizations" in n for n in names)
    assert any("jit_train_step" in n and "after_optimizations" in n for n in names)
    assert not any("lambda" in n for n in names if n.endswith(".txt"))


def test_programs_are_cached_where_there_is_an_accelerator(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    try:
        profiling.cache_compilations(tmp_path / "xla")
        assert jax.config.jax_compilation_cache_dir == before  # This is a CPU.
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        jax.config.update("jax_compilation_cache_dir", os.fspath(tmp_path / "mine"))
        profiling.cache_compilations(tmp_path / "xla")
        assert jax.config.jax_compilation_cache_dir == os.fspath(tmp_path / "mine")
        jax.config.update("jax_compilation_cache_dir", None)
        profiling.cache_compilations(tmp_path / "xla")
        assert jax.config.jax_compilation_cache_dir == os.fspath(tmp_path / "xla")
        assert (tmp_path / "xla").is_dir()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
