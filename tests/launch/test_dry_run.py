"""Dry runs: the numbers are those of a real step, and a config that does not fit is told why."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import pytest

from configs import lm, quickstart
from experiments.dry_run import study
from sparse_attn.launch import dry_run, topology
from sparse_attn.patterns import causal
from sparse_attn.train import flops, tasks
from tests.launch import programs

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30


def tiny(**changes):
    config = quickstart.get_config("local,tiny").to_dict()
    config["model"] |= changes
    return config


@pytest.mark.parametrize(
    ("name", "count", "platform"),
    [("v4:2x2x1", 4, "tpu"), ("v5p:8x8x4", 256, "tpu"), ("v6e:8x8", 64, "tpu"),
     ("h200:8", 8, "gpu"), ("cpu:3", 3, "cpu")],
)  # fmt: skip
def test_topologies(name, count, platform):
    found = topology.parse(name)
    assert (found.count, found.platform) == (count, platform)
    assert (flops.peak(found.kind) is None) == (platform == "cpu")


@pytest.mark.parametrize(
    "name", [None, "", "v5e", "v5e:4", "v4:2x2", "h200:2x2", "cpu:0", "v9:2x2"]
)
def test_topologies_that_are_none(name):
    with pytest.raises(ValueError, match="must be GENERATION:SHAPE"):
        topology.parse(name)


@pytest.mark.parametrize("name", ["v5e:1x1", "v5e:2x2", "v6e:8x8", "v5e:16x16", "v4:4x4x4"])
def test_a_roomy_topology_has_as_many_devices(name):
    one = topology.parse(name)
    assert one.roomy().count == one.count
    assert one.roomy().memory > one.memory


MISTAKES = {
    "topology=None must be GENERATION:SHAPE": ["--dry-run"],
    "--topology=cpu:2 must come with --dry-run": ["--topology=cpu:2", "--workdir=x"],
}
TWO_DEVICES = ["--dry-run", "--topology=cpu:2", "--json"]
LINES = MISTAKES | {
    "data": ["--config.model.pattern=local(window=64)", "--config.mesh.axes=data=-1", *TWO_DEVICES],
    "seq": [
        "--config.model.pattern=causal()", "--config.data.context=512",
        "--config.model.num_layers=1", "--config.mesh.axes=seq=2",
        "--config.mesh.sequence=all_gather_kv", *TWO_DEVICES,
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of every command line: one list of them is one start of Python."""
    lines = [["--config=configs/quickstart.py:tiny", *words] for words in LINES.values()]
    done = programs.launch_each(lines, tmp_path_factory.mktemp("lines"))
    return dict(zip(LINES, done, strict=True))


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(results, message):
    done = results[message]
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_two_devices_through_the_command_line(results):
    done = results["data"]
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    golden = (ROOT / "tests/golden/quickstart_local_tiny.txt").read_text()
    assert found["params"] == int(re.search(r"parameters: ([\d,]+)", golden)[1].replace(",", ""))
    assert found["devices"] == 2
    # Each device has all parameters, two moments and its half of the rows; gradients are summed.
    arguments = 3 * 4 * found["params"] + 5 * 4 * found["tokens_per_step"] // 2
    assert 0 <= found["memory"]["arguments"] - arguments < 1000
    summed = found["collectives"]["all-reduce"]["bytes"] / (4 * found["params"])
    assert 1 <= summed < 1.5  # The output matrix is the embedding: two gradients of it.
    assert "estimate" in found
    assert found["estimate"] is None


def test_flops_and_densities_are_those_of_training():
    config = tiny()
    found = dry_run.report(config, topology.parse("cpu:1"))
    model = tasks.of(config).model.config
    cost = flops.attention_cost(model, context=128, batch_size=4)
    assert found["layers"] == [
        {"pattern": "local(window=64)", "token_density": pytest.approx(cost["token_density"]),
         "block_density": pytest.approx(cost["block_density"]), "first": 0, "last": 1}
    ]  # fmt: skip
    dense = dataclasses.replace(model, pattern=causal.Causal())
    more = flops.attention_cost(dense, context=128, batch_size=4)["useful_flops"]
    assert found["dense_flops"] - found["useful_flops"] == more - cost["useful_flops"]
    assert found["useful_flops"] < found["executed_flops"]
    assert found["fits"]
    shown = dry_run.text(found)
    assert "compiles" in shown
    assert f"{found['params']:,}" in shown


def test_tokens_over_ranks_tell_how_even_the_work_is(results):
    done = results["seq"]
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Causal, of 8 blocks: 1 + 2 + 3 + 4 on one rank, 5 + 6 + 7 + 8 on the other.
    assert found["imbalance"] == {"text": 26 / 18, "zigzag": 1.0, "balanced": 1.0}
    line = "busiest of 2 ranks / mean: 1.44 in the order text (1.00 zigzag, 1.00 balanced)"
    assert line in dry_run.text(found)
    in_zigzag = dry_run.text(found | {"sequence": "ring:zigzag"})
    assert "1.00 in the order zigzag (1.44 text, 1.00 balanced)" in in_zigzag
    assert "busiest" not in dry_run.text(found | {"imbalance": None})


def test_what_does_not_fit_names_buffers_and_flags():
    small = topology.Topology("cpu:1", "cpu", "cpu", 1, memory=100_000)
    found = dry_run.report(tiny(), small)
    assert not found["fits"]
    assert found["memory"]["total"] > 100_000
    buffers = found["largest_buffers"]
    assert len(buffers) == 3
    sizes = [b["bytes"] * b["copies"] for b in buffers]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= found["memory"]["total"]
    shown = dry_run.text(found)
    assert "DOES NOT FIT" in shown
    assert "--config.model.remat=block" in shown
    assert all(b["shape"] in shown for b in buffers)


def test_gpus_are_an_estimate_and_say_so():
    found = dry_run.report(tiny(impl="pallas_gpu"), topology.parse("h200:1"))
    assert found["fits"]
    assert found["limit_bytes"] == 141 * 10**9
    assert found["seconds_at_peak"] == found["executed_flops"] / flops.peak("NVIDIA H200")
    assert "cannot be compiled without one" in dry_run.text(found)


def test_every_size_is_recorded_and_fits():
    reports = json.loads(study.RESULTS.read_text())["results"]
    assert [tuple(r["case"]) for r in reports] == study.cases()
    for r in reports:
        size, variant, named, _ = r["case"]
        config = lm.get_config(f"{size},{variant}")
        assert r["fits"], r["case"]
        assert r["command"] == " ".join(study.command(*r["case"]))
        assert r["tokens_per_step"] == config.data.context * config.data.batch_size
        assert r["limit_bytes"] == topology.parse(named).memory
        if r["sequence"]:
            taken = r["sequence"].partition(":")[2] or "text"
            assert r["imbalance"][taken] < 1.05, "configs/lm.py names an order that is even"
    assert study.RESULTS.with_suffix(".md").read_text() == study.table(reports) + "\n"
    for row in study.docstring_rows(reports):
        assert row in lm.__doc__, "python -m experiments.dry_run.study --table prints the rows"


@pytest.mark.slow
def test_the_smallest_size_on_its_topology():
    recorded = json.loads(study.RESULTS.read_text())["results"][0]
    found = study.measure(study.cases()[0])
    assert found["fits"]
    for name in ("params", "useful_flops", "executed_flops", "dense_flops", "layers"):
        assert found[name] == recorded[name], name
    # Compilers differ by version.
    assert found["memory"]["total"] == pytest.approx(recorded["memory"]["total"], rel=0.3)


@pytest.mark.slow
def test_a_tpu_that_is_too_small():
    words = [
        "--config=configs/quickstart.py:full", "--config.data.batch_size=128",
        "--config.data.context=4096", "--config.model.num_layers=2",
        "--config.model.dtype=float32", "--dry-run", "--topology=v5e:1x1",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "launch.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 71, done.stderr
    assert "Ran out of memory" in done.stdout
    assert "compiled for v5p:1x1x1" in done.stdout
    largest = re.findall(r"^ +(\d+) x ([\d.]+) GiB", done.stdout, re.MULTILINE)
    assert len(largest) == 3
    assert float(largest[0][1]) * int(largest[0][0]) > 1
    assert "--config.model.remat=block" in done.stdout
