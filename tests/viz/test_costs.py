"""Costs: counts by hand, bounds, the rows of results files and the break-even density."""

import json
import pathlib
import re

import pytest

from sparse_attn import patterns, viz
from sparse_attn.masks import stats
from sparse_attn.viz import costs, measured

PAIRS = 256 * 128 - 128 * 127 // 2  # of window 128 on 256 tokens


def test_counts_by_hand():
    found = viz.cost("local(window=128)", 256, head_dim=16, heads=4, kv_heads=2, block=64)
    assert found.token_density == PAIRS / 256**2
    assert found.useful_flops == 4 * 16 * 4 * PAIRS
    assert found.block_density == 9 / 16  # 1 + 2 + 3 + 3 blocks
    assert found.executed_flops == 4 * 16 * 4 * 9 * 64**2
    assert found.kv_bytes == 9 * 64 * 2 * 32 * 2
    assert found.least_bytes == 2 * 16 * 2 * (4 * 256 + 2 * 256)
    assert found.imbalance == 3 / (9 / 4)
    assert found.bound == 10 / 9  # blocks of dense causal attention
    assert found.measured is None
    assert found.break_even == ()


def test_backward_is_two_and_a_half_times_forward():
    forward, both = (
        viz.cost("local(window=9)", 256, 64, 2, passes=passes) for passes in measured.PASSES
    )
    assert both.executed_flops == 3.5 * forward.executed_flops
    assert both.useful_flops == 3.5 * forward.useful_flops
    assert both.bound == forward.bound


@pytest.mark.parametrize("device", [None, *costs.DEVICES])
@pytest.mark.parametrize("dense", ["causal", "full"])
def test_dense_attention_gains_nothing(device, dense):
    found = viz.cost(f"{dense}()", 1000, head_dim=64, heads=8, kv_heads=2, device=device)
    assert found.dense == dense
    assert found.bound == pytest.approx(1)
    assert found.limited_by in ("FLOPs", "longest row", "bytes")


def test_heads_with_their_own_pattern_are_added():
    half = viz.cost("per_head((causal(), local(window=64)))", 512, 64, 4, block=64)
    parts = [viz.cost(text, 512, 64, 2, block=64) for text in ("causal()", "local(window=64)")]
    assert half.executed_flops == sum(p.executed_flops for p in parts)


def test_what_limits_the_bound():
    # Few blocks: reading K and V takes longer than the products.
    sparse = viz.cost("chunked(size=64)", 1 << 15, head_dim=128, heads=1, device="h200", block=64)
    assert sparse.limited_by == "bytes"
    # One long row on one of 132 cores holds up all others.
    wide = viz.cost(
        "local(window=64) | joint(local(window=64), tokens=64, seen_by='prefix')",
        1 << 15, head_dim=128, heads=1, device="h200", block=64,
    )  # fmt: skip
    assert wide.limited_by == "longest row"
    assert wide.bound < sparse.bound


def test_rows_of_the_stored_results_are_found_and_keep_to_the_bound():
    fastest = {}  # Of the kernels that were measured on the same mask, sizes and device.
    for row in measured.rows():
        if row.parts is None or row.passes != "forward":
            continue
        sizes = (row.parts, row.tokens, row.head_dim, row.heads, row.kv_heads, row.device)
        fastest[sizes] = min(row, fastest.get(sizes, row), key=lambda r: r.ours)
    assert len(fastest) >= 5
    for row in fastest.values():
        found = viz.cost(
            " | ".join(sorted(row.parts)), row.tokens, row.head_dim, row.heads, row.device,
            kv_heads=row.kv_heads,
        )  # fmt: skip
        assert found.measured == row
        if row.unit == "Mcycles":  # Times of a CPU scatter too much.
            assert found.measured_speedup <= found.bound


def cpu_row(mask, ms, density=None, **changes):
    return {
        "mask": mask, "tokens": 1024, "batch": 1, "pass": "forward", "xla ms": ms,
        "reference ms": 40.0, "jax.nn ms": 20.0, "block density": density,
    } | changes  # fmt: skip


def write(folder, name, results, device="AMD EPYC"):
    path = pathlib.Path(folder, name)
    path.write_text(json.dumps({"environment": {"device": device}, "results": results}))


def test_measured_values_stand_beside(tmp_path):
    write(
        tmp_path,
        "cpu.json",
        [
            cpu_row("causal", 16.0),
            cpu_row("sinks 64 + window 512", 4.0),
            cpu_row("random blocks 10%", 3.0, 0.1),
            cpu_row("random blocks 30%", 7.0, 0.3),
            cpu_row("random blocks 30%, run-time", 90.0, 0.3),
            cpu_row("window 512", 1.0, batch=8),
            cpu_row("window 512", 2.0, tokens=2048),
        ],
    )
    sizes = {"head_dim": 64, "heads": 4, "device": "cpu", "results": tmp_path}
    found = viz.cost("local(window=512) | sinks(tokens=64)", 1024, **sizes)
    assert found.measured.ours == 4
    assert found.measured_speedup == 16 / 4  # our own dense causal is the fastest
    assert "4.00, 4 ms (cpu.json)" in str(found)
    assert viz.cost("local(window=512)", 1024, **sizes).measured is None
    assert viz.cost("local(window=512)", 1024, **{**sizes, "heads": 8}).measured is None
    # 1 ms and 20 ms for every block: 0.75 would be as slow as causal, which has only half.
    (even,) = found.break_even
    assert (even.block, even.block_density) == (128, 0.5)
    write(tmp_path, "cpu.json", [cpu_row("causal", 5.0), *_random()])
    (even,) = viz.cost("causal()", 1024, **sizes).break_even
    assert even.block_density == pytest.approx(0.2)
    assert even.source == "cpu.json, 2 densities at 1024 tokens"


def _random():
    return [cpu_row("random 10%", 3.0, 0.1), cpu_row("random 30%", 7.0, 0.3)]


def test_results_of_a_gpu(tmp_path):
    random = [
        {"workload": f"random {p}% blocks per head", "fwd_ms": 0.1 + p / 50, "density": p / 100}
        for p in (10, 30, 60)
    ]
    rows = [
        {"workload": "causal", "fwd_ms": 2.0, "cudnn_fwd_ms": 1.6, "flex_fwd_ms": 2.5},
        {"workload": "window 1024 + 64 sinks", "fwd_ms": 0.4, "bwd_ms": 1.0},
        {"workload": "window 1024, T 65536", "fwd_ms": 0.1},
        {"workload": "broken", "error": "ended"},
        *random,
    ]
    write(tmp_path, "gpu.json", rows, device="NVIDIA H200-SXM")
    found = viz.cost(
        "sinks(tokens=64) | local(window=1024)", 16384, 128, 16, "h200", results=tmp_path
    )
    assert found.measured_speedup == pytest.approx(1.6 / 0.4)
    known = {even.block: even for even in found.break_even}
    assert known[128].block_density == 0.5
    assert known[64].source == "model"
    # A slower kernel, measured on the same device, hides nothing of this one.
    slower = [r | {k: 3 * r[k] for k in ("fwd_ms", "bwd_ms") if k in r} for r in rows]
    for name in ("a.json", "z.json"):
        write(tmp_path, name, slower, device="NVIDIA H200-SXM")
    again = viz.cost(
        "sinks(tokens=64) | local(window=1024)", 16384, 128, 16, "h200", results=tmp_path
    )
    assert again.measured == found.measured
    assert again.measured_speedup == found.measured_speedup
    assert again.break_even == found.break_even
    window = viz.cost("local(window=1024)", 16384, 128, 16, "h200", results=tmp_path)
    assert window.measured is None  # Its row is of another length.


def test_damaged_results_are_no_results(tmp_path):
    (tmp_path / "half.json").write_text('{"results": [{"mask"')
    write(tmp_path, "other.json", [{"case": "local"}, 3])
    assert measured.rows(tmp_path) == []
    assert measured.rows(tmp_path / "none") == []


def test_the_model_of_the_break_even_density():
    def densities(kv_heads, pattern="causal()"):
        found = viz.cost(pattern, 512, 128, 8, "a100", kv_heads=kv_heads)
        return [even.block_density for even in found.break_even]

    alone, grouped = densities(8), densities(1)
    fed = 2.04e12 / 312e12
    assert alone == pytest.approx(
        [min(1, 16 * n * fed, (n / 4) ** 2) / 2 for n in (1, 2, 4, 8, 16)]
    )
    assert grouped[-3:] == [0.5] * 3
    assert sorted(alone) == alone
    assert densities(8, "full()") == [2 * density for density in alone]


def test_a_million_tokens_are_counted_exactly():
    found = viz.cost("local(window=4096)", 1 << 20, 128, 1, "v5e")
    assert found.token_density == stats.of(
        patterns.parse("local(window=4096)"), q_len=1 << 20
    ).token_density  # fmt: skip
    assert found.bound > 100


def test_uncounted_tokens_are_said_to_be():
    found = viz.cost("strided(stride=64, part='column')", 1 << 17, 64, 1)
    assert found.useful_flops is found.executed_over_useful is None
    assert re.search("useful GFLOPs +not counted", str(found))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "per_layer((causal(), full()))"}, r"pattern\.for_layer"),
        ({"heads": 3, "kv_heads": 2}, "kv_heads=2 must divide heads=3"),
        ({"device": "abacus"}, "device='abacus' must be None or one of cpu, a100"),
        ({"passes": "backward"}, "passes='backward'"),
        ({"length": 0}, "length=0"),
    ],
)
def test_malformed_arguments(changes, message):
    arguments = {"pattern": "causal()", "length": 64, "head_dim": 8, "heads": 1} | changes
    with pytest.raises(ValueError, match=message):
        viz.cost(**arguments)
