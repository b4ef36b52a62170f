"""Time and memory of making block lists, from 8k to 1M tokens; see README.md.

    python -m experiments.mask_build.study            # all cases, about 5 minutes
    python -m experiments.mask_build.study --quick    # the acceptance case alone

Every number comes from a process of its own, so that a peak is the peak of that case.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Lists are made on the host: ask for no device.

from experiments.kernels import bench
from sparse_attn import patterns
from sparse_attn.masks import lower
from sparse_attn.patterns import base

RESULTS = pathlib.Path(__file__).parent / "results"
LENGTHS = (8192, 32768, 131072, 1048576)
BLOCK = 128
REPEATS = 3

ACCEPTANCE = "local(window=4096) | sinks(tokens=64)"
MAX_SECONDS, MAX_MB = 1.0, 500.0

# Patterns of sequences, at sizes that fit a million tokens. A new pattern joins by a line here.
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
    "local(window=512) | global_tokens(tokens=64) & causal()"
    " | random_blocks(block=128, num_blocks=3)",
    "per_head((local(window=4096), causal() & ~local(window=4096)))",
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
    lower._lower.cache_clear()
    mask = lower.lower(pattern, q_len=length, block_q=BLOCK, block_kv=BLOCK)
    return int(mask.kv_counts.sum(dtype="int64"))


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
    seconds = []
    for _ in range(REPEATS if builder == "sparse_attn" else 1):
        start = time.perf_counter()
        active = BUILDERS[builder](case, length)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
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


def jobs(quick: bool) -> list[tuple[str, str, int]]:
    """(builder, case, tokens) of everything to measure."""
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the acceptance case alone")
    parser.add_argument("--one", nargs=3, metavar=("BUILDER", "CASE", "TOKENS"), help="in here")
    arguments = parser.parse_args()
    if arguments.one:
        builder, case, length = arguments.one
        print(json.dumps(measure_here(builder, case, int(length))))
        return 0
    rows = []
    for job in jobs(arguments.quick):
        rows.append(measure(*job))
        print(
            "{case}, {tokens} tokens, {builder}: {seconds:.3f} s, {added_mb:.0f} MB".format(
                **rows[-1]
            )
        )
    accepted = next(r for r in rows if (r["case"], r["tokens"]) == (ACCEPTANCE, LENGTHS[-1]))
    good = accepted["seconds"] < MAX_SECONDS and accepted["peak_mb"] < MAX_MB
    print(
        f"\n{ACCEPTANCE} at {LENGTHS[-1]} tokens: {accepted['seconds']:.3f} s (< {MAX_SECONDS}), "
        f"{accepted['peak_mb']:.0f} MB for the whole process (< {MAX_MB:.0f}): "
        f"{'accepted' if good else 'NOT accepted'}"
    )
    if not arguments.quick:
        bench.write(rows, RESULTS / "mask_build.json")
        (RESULTS / "mask_build.md").write_text(tables(rows) + "\n")
        plot(rows, RESULTS / "mask_build.png")
        print(f"\n{tables(rows)}\n\nwritten to {RESULTS}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
