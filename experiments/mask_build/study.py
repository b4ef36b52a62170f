"""Time and memory of making block lists, from 8k to 1M tokens; see README.md.

    python -m experiments.mask_build.study            # all cases, about 7 minutes
    python -m experiments.mask_build.study --grids    # those on grids alone, about a minute
    python -m experiments.mask_build.study --quick    # the acceptance case alone

Every number comes from a process of its own, so that a peak is the peak of that case.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Lists are made on the host: ask for no device.

from experiments.kernels import bench
from experiments.pattern_table import study as pattern_table
from sparse_attn import patterns
from sparse_attn.masks import grids, lower
from sparse_attn.patterns import base, joint

RESULTS = pathlib.Path(__file__).parent / "results"
LENGTHS = (8192, 32768, 131072, 1048576)
BLOCK = 128
REPEATS = 3

ACCEPTANCE = "local(window=4096) | sinks(tokens=64)"
MAX_SECONDS, MAX_MB = 1.0, 500.0

# Patterns of sequences, at sizes that fit a million tokens.
CASES = (
    ACCEPTANCE,
    "full()",
    "causal()",
    "local(window=4096)",
    "local(reach=(2048, 2048))",
    "dilated(window=4096, dilation=16)",
    "strided(stride=1024, part='row')",
    "strided(stride=1024, part='column')",
    "fixed(stride=1024, part='block')",
    "fixed(stride=1024, part='summary', summary_tokens=32)",
    "chunked(size=4096)",
    "sinks(tokens=64)",
    "global_tokens(tokens=64)",
    "random_blocks(block=128, num_blocks=3)",
    "prefix(tokens=4096)",
    "block_local(size=1024)",
    "shifted_groups(size=4096, shift=2048)",
    "sharded(size=64, stride=16, shard=3, local_blocks=16)",
    "retrieval_heads((True, False, False, False), window=1024, sink_tokens=64)",
    "local(window=512) | global_tokens(tokens=64) & causal()"
    " | random_blocks(block=128, num_blocks=3)",
    "per_head((local(window=4096), causal() & ~local(window=4096)))",
)

# Patterns on grids, on images of 1024 x 1024 and videos of 128 x 96 x 80 tokens: as the tokens
# stand, and in orders that bring together what belongs together.
IMAGE, VIDEO = (1024, 1024), (128, 96, 80)
GRID_CASES = (
    f"neighborhood({IMAGE}, 33)",
    f"permuted(neighborhood({IMAGE}, 33), ('tiles', {IMAGE}, (8, 16)))",
    f"permuted(neighborhood({IMAGE}, 33), ('hilbert', {IMAGE}))",
    f"neighborhood({IMAGE}, 17, dilation=4)",
    f"permuted(neighborhood({IMAGE}, 17, dilation=4), ('tiles', {IMAGE}, (8, 16), None, 4))",
    f"neighborhood({VIDEO}, 9)",
    f"permuted(neighborhood({VIDEO}, 9), ('tiles', {VIDEO}, (4, 4, 8)))",
    f"neighborhood({VIDEO}, 9, dilation=2)",
    f"permuted(neighborhood({VIDEO}, 9, dilation=2), ('tiles', {VIDEO}, (4, 4, 8), None, 2))",
    f"permuted(neighborhood({VIDEO}, 9, dilation=3), ('tiles', {VIDEO}, (4, 4, 8), None, 3))",
    f"swin({IMAGE}, 32, 16)",
    f"permuted(swin({IMAGE}, 32, 16), ('tiles', {IMAGE}, (8, 16)))",
    f"permuted(swin({VIDEO}, 8, 4), ('tiles', {VIDEO}, (4, 4, 8)))",
    f"permuted(halo({IMAGE}, 16, 8), ('tiles', {IMAGE}, (8, 16)))",
    f"axial({IMAGE}, (1,))",
    f"permuted(axial({IMAGE}, (0,)), ('tiles', {IMAGE}, None, (1, 0)))",
    f"permuted(axial({IMAGE}, (0,)), ('tiles', {IMAGE}, (8, 16)))",
    f"axial({VIDEO}, (1, 2))",
    f"axial({VIDEO}, (0,))",
    f"permuted(axial({VIDEO}, (0,)), ('tiles', {VIDEO}, None, (1, 2, 0)))",
    f"block_grid({IMAGE}, block=32)",
    f"block_grid({IMAGE}, grid=32)",
    f"permuted(block_grid({IMAGE}, grid=32), ('tiles', {IMAGE}, None, None, 32))",
    f"permuted(circular({IMAGE}, 16), ('tiles', {IMAGE}, (8, 16)))",
    f"joint(swin({IMAGE}, 32), tokens=128)",
    f"cross_grid({IMAGE}, (256, 256), reach=1)",
    "radial((128, 7680))",
    f"frame_tiles({VIDEO}, references=4)",
)

# JAX's splash attention classifies every block of the T x S grid in Python and NumPy.
SPLASH = {"causal()": LENGTHS[:2], "local(window=4096)": LENGTHS[:2]}


@dataclasses.dataclass(frozen=True)
class EveryThird(base.Pattern):
    """No `block_state`, so that every element is evaluated: the price of not having one."""

    def mask_fn(self, q_pos, kv_pos):
        return (kv_pos <= q_pos) & (kv_pos % 3 == 0)


ELEMENTWISE = "a pattern without block_state"
ELEMENTWISE_LENGTHS = LENGTHS[:2]  # O(T * S) time: 128k would take a minute, 1M an hour.


def build(case: str, length: int):
    """The block lists of `case`; returns the number of active blocks."""
    pattern = EveryThird() if case == ELEMENTWISE else patterns.parse(case)
    kv_len = math.prod(pattern.kv_shape) if isinstance(pattern, grids.GridPattern) else None
    lower._lower.cache_clear()
    mask = lower.lower(pattern, q_len=length, kv_len=kv_len, block_q=BLOCK, block_kv=BLOCK)
    return int(mask.kv_counts.sum(dtype="int64"))


def grid_tokens(case: str) -> int:
    """Queries of a pattern on a grid, of one grid and the prefix in front of it."""
    pattern = patterns.parse(case)
    prefix = pattern.tokens if isinstance(pattern, joint.Joint) else 0
    shapes = {x.shape for x in pattern_table.leaves(pattern) if isinstance(x, grids.GridPattern)}
    (shape,) = shapes
    return math.prod(shape) + prefix


def others() -> list[str]:
    """Patterns that are in no case; they join with their first example, at a million tokens."""
    known = [patterns.parse(case) for case in (*CASES, *GRID_CASES)]
    return [x.expression() for x in pattern_table.examples_of_others(known, ("per_layer",))]


def build_splash(case: str, length: int):
    """The same by `jax.experimental.pallas.ops.tpu.splash_attention`: forward and dkv lists."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask_info as mask_info,
    )

    shape = (length, length)
    window = patterns.parse(case)
    if window == patterns.Causal():
        mask = masks.CausalMask(shape)
    else:
        mask = masks.LocalMask(shape, (window.window - 1, 0), 0)
    mask = masks.MultiHeadMask([mask])
    info, _ = mask_info.process_mask(mask, (BLOCK, BLOCK))
    mask_info.process_mask_dkv(mask, (BLOCK, BLOCK))
    return int((info.block_mask > 0).sum())


BUILDERS = {"sparse_attn": build, "splash": build_splash}


def peak_mb() -> float:
    """The highest resident memory of this process so far, in MB (10**6 bytes)."""
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def measure_here(builder: str, case: str, length: int) -> dict:
    """Median seconds of cold builds in this process, and its peak memory."""
    before = peak_mb()
    seconds, cpu_seconds = [], []
    for _ in range(REPEATS if builder == "sparse_attn" else 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        active = BUILDERS[builder](case, length)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
        "peak_mb": peak_mb(),
        "added_mb": peak_mb() - before,
        "active_blocks": active,
    }


def measure(builder: str, case: str, length: int) -> dict:
    """`measure_here` in a new process."""
    run = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--one", builder, case, str(length)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"{builder}, {case}, {length} tokens failed:\n{run.stderr}")
    found = json.loads(run.stdout.splitlines()[-1])
    return {"case": case, "tokens": length, "builder": builder} | found


def grid_jobs() -> list[tuple[str, str, int]]:
    """(builder, case, tokens) of the patterns on grids, and of those without a case."""
    on_grids = [("sparse_attn", case, grid_tokens(case)) for case in GRID_CASES]
    return on_grids + [("sparse_attn", case, LENGTHS[-1]) for case in others()]


def jobs(quick: bool) -> list[tuple[str, str, int]]:
    """(builder, case, tokens) of everything else that is measured."""
    if quick:
        return [("sparse_attn", ACCEPTANCE, LENGTHS[-1])]
    ours = [("sparse_attn", case, length) for case in CASES for length in LENGTHS]
    ours += [("sparse_attn", ELEMENTWISE, length) for length in ELEMENTWISE_LENGTHS]
    return ours + [("splash", case, n) for case, lengths in SPLASH.items() for n in lengths]


def tables(rows: list[dict]) -> str:
    """Markdown: one line per case and builder, seconds and added MB at each length."""
    lines = []
    for builder, case in dict.fromkeys((r["builder"], r["case"]) for r in rows):
        mine = {r["tokens"]: r for r in rows if (r["builder"], r["case"]) == (builder, case)}
        text = case.replace("|", "\\|")  # a bar would end the cell
        line = {"case": f"`{text}`" if "(" in case else case, "by": builder}
        for length in LENGTHS:
            row = mine.get(length)
            name = f"{length >> 10}k" if length < 1 << 20 else "1M"
            line[f"{name}: s"] = f"{row['seconds']:.3f}" if row else "-"
            line[f"{name}: MB"] = f"{row['added_mb']:.0f}" if row else "-"
        last = mine[max(mine)]
        line["active blocks (last)"] = last["active_blocks"]
        lines.append(line)
    return bench.table(lines)


def grid_table(rows: list[dict]) -> str:
    """Markdown: one line per case of a million tokens."""
    lines = [
        {
            "case": "`{}`".format(row["case"].replace("|", "\\|")),
            "tokens": row["tokens"],
            "s": f"{row['seconds']:.3f}",
            "CPU s": f"{row['cpu_seconds']:.3f}",
            "MB": f"{row['added_mb']:.0f}",
            "active blocks": row["active_blocks"],
        }
        for row in rows
    ]
    return bench.table(lines)


def slow(rows: list[dict]) -> list[dict]:
    """The rows of about a million tokens that took `MAX_SECONDS` or more of the processor.

    Lists are made by one thread: on a machine that does nothing else, that is the time it takes.
    """
    ours = (r for r in rows if r["builder"] == "sparse_attn" and r["tokens"] > LENGTHS[-2])
    return [r for r in ours if r["cpu_seconds"] >= MAX_SECONDS]


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """Seconds against tokens, one line per case and builder."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    axis.set_prop_cycle(color=pyplot.colormaps["tab20"].colors)
    for builder, case in dict.fromkeys((r["builder"], r["case"]) for r in rows):
        mine = [r for r in rows if (r["builder"], r["case"]) == (builder, case)]
        dashed = builder == "splash" or case == ELEMENTWISE
        axis.plot(
            [r["tokens"] for r in mine], [r["seconds"] for r in mine],
            "--" if dashed else "-", marker="o", markersize=3,
            label=f"{case[:52]}{'...' * (len(case) > 52)} ({builder})",
        )  # fmt: skip
    axis.axhline(MAX_SECONDS, color="gray", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds to build the lists")
    axis.set_xticks(LENGTHS, [f"{n >> 10}k" if n < 1 << 20 else "1M" for n in LENGTHS])
    axis.minorticks_off()
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _measure(chosen):
    rows = []
    for job in chosen:
        rows.append(measure(*job))
        print(
            "{case}, {tokens} tokens, {builder}: {seconds:.3f} s ({cpu_seconds:.3f} of CPU), "
            "{added_mb:.0f} MB".format(**rows[-1]),
            flush=True,
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the acceptance case alone")
    parser.add_argument("--grids", action="store_true", help="the cases on grids alone")
    parser.add_argument("--one", nargs=3, metavar=("BUILDER", "CASE", "TOKENS"), help="in here")
    arguments = parser.parse_args()
    if arguments.one:
        builder, case, length = arguments.one
        print(json.dumps(measure_here(builder, case, int(length))))
        return 0
    rows, on_grids = [], []
    if not arguments.grids:
        rows = _measure(jobs(arguments.quick))
    if not arguments.quick:
        on_grids = _measure(grid_jobs())
        bench.write(on_grids, RESULTS / "grids.json")
        (RESULTS / "grids.md").write_text(grid_table(on_grids) + "\n")
    if rows and not arguments.quick:
        bench.write(rows, RESULTS / "mask_build.json")
        (RESULTS / "mask_build.md").write_text(tables(rows) + "\n")
        plot(rows, RESULTS / "mask_build.png")
    too_large = [r for r in rows if r["case"] == ACCEPTANCE and r["peak_mb"] >= MAX_MB]
    for row in slow(rows + on_grids):
        print("NOT accepted: {case}, {tokens} tokens: {cpu_seconds:.3f} s of CPU".format(**row))
    for row in too_large:
        print("NOT accepted: {case}, {tokens} tokens: {peak_mb:.0f} MB".format(**row))
    accepted = not too_large and not slow(rows + on_grids)
    if accepted:
        print(f"accepted: a million tokens under {MAX_SECONDS} s, {ACCEPTANCE} under {MAX_MB} MB")
    return 0 if accepted else 1


if __name__ == "__main__":
    sys.exit(main())
