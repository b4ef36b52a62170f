"""Processes that share the checks of a GPU: their results come, failures show, none is left."""

import dataclasses
import os

import pytest

from experiments.kernels import bench, gpu_check

SHARD = """
import os, sys, time
shards, shard = (int(argument.split("=")[1]) for argument in sys.argv[1:])
print("a line of another kind")
print('RESULT {"shard": %d, "of": %d, "pid": %d}' % (shard, shards, os.getpid()), flush=True)
if shard == 1:
    sys.exit(3)
if shard == 2:
    time.sleep(100)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "tiny_shard.py").write_text(SHARD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "tiny_shard"


def is_there(process):
    try:
        os.kill(process, 0)  # A process that nobody waited for is still there.
    except ProcessLookupError:
        return False
    return True


def test_results_come_and_a_shard_that_fails_is_named(module, capsys):
    results = list(bench.in_shards(module, 2))
    assert sorted((r["shard"], r["of"]) for r in results) == [(0, 2), (1, 2)]
    assert capsys.readouterr().err == "tiny_shard: shard 1 ended with 3\n"
    assert not any(is_there(r["pid"]) for r in results)


def test_no_process_is_left_when_nobody_takes_its_results(module):
    results = bench.in_shards(module, 3)
    sleeper = next(r["pid"] for r in results if r["shard"] == 2)
    assert is_there(sleeper)
    results.close()
    assert not is_there(sleeper)


def test_a_module_that_cannot_start_is_named(module, capfd):
    assert list(bench.in_shards(f"{module}_of_another_name", 1)) == []
    assert "shard 0 ended with 1" in capfd.readouterr().err


def test_checks_are_told_apart_by_their_names():
    names = [gpu_check.name_of(dataclasses.asdict(check)) for check in gpu_check.checks()]
    assert len(set(names)) == len(names)
    assert "mask=causal extra=bias,sinks" in names
    assert "head_dim=64 block_q=64 block_kv=64 dtype=float16 group=4 traced=True" in names
