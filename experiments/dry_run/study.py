"""What `configs/lm.py` needs on the TPUs it is meant for, from the TPU compiler, without a TPU.

    python -m experiments.dry_run.study            # everything, about half an hour on 2 cores
    python -m experiments.dry_run.study --only=10m # cases whose name has this; the others stay
    python -m experiments.dry_run.study --table    # the Markdown again

Runs `launch.py --dry-run` per case and writes results/dry_run.json, results/dry_run.md.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is installed and there is no TPU.

from configs import lm
from experiments.kernels import bench
from sparse_attn.train import exits

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results" / "dry_run.json"
GIB = 2**30
# More than the topologies that configs/lm.py names: as few chips of the newer kind.
MORE = [("1.3b", variant, "v6e:8x8", "fsdp=-1") for variant in ("window", "dense")]


def cases() -> list[tuple[str, str, str, str]]:
    """(size, pattern, topology, mesh axes)."""
    named = [
        (size, variant, run["topology"], run["axes"])
        for size, run in lm.RUNS.items()
        for variant in ("window", "dense")
    ]
    return named + MORE


def command(size: str, variant: str, topology: str, axes: str) -> list[str]:
    """Of one case; the mesh is named where it is not the config's."""
    mesh = [] if axes == lm.RUNS[size]["axes"] else [f"--config.mesh.axes={axes}"]
    spec = f"--config=configs/lm.py:{size},{variant}"
    return ["python", "launch.py", spec, *mesh, "--dry-run", f"--topology={topology}"]


def measure(case: tuple[str, str, str, str]) -> dict[str, Any]:
    """The report of one case.

    Raises:
      RuntimeError: there is none.
    """
    start = time.perf_counter()
    told = command(*case)
    done = subprocess.run(
        [sys.executable, *told[1:], "--json"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode not in (exits.ExitCode.FINISHED, exits.ExitCode.OUT_OF_MEMORY):
        raise RuntimeError(f"{' '.join(told)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    report = json.loads(done.stdout.splitlines()[-1])
    # Cases can be measured one by one (`--only`): each says with what it was.
    environment = bench.environment()
    return report | {
        "case": list(case),
        "command": " ".join(told),
        "seconds": time.perf_counter() - start,
        **{name: environment[name] for name in ("packages", "commit", "changed_files", "date")},
    }


def lines_of(reports: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One line per case, by column."""
    lines = []
    for r in reports:
        size, variant, topology, _ = r["case"]
        mesh = " ".join(f"{k}={v}" for k, v in r["mesh"].items() if v > 1)
        blocks = sum(x["block_density"] * (x["last"] - x["first"] + 1) for x in r["layers"])
        memory, collectives = r.get("memory"), r.get("collectives", {})
        lines.append(
            {
                "model": size, "attention": variant, "on": topology,
                "mesh": mesh + (f", {r['sequence']}" if r["sequence"] else ""),
                "parameters": f"{r['params'] / 1e6:,.1f} M",
                "tokens a step": f"{r['tokens_per_step']:,}",
                "blocks": f"{100 * blocks / (r['layers'][-1]['last'] + 1):.1f} %",
                "TFLOP useful": f"{r['useful_flops'] / 1e12:,.0f}",
                "executed": f"{r['executed_flops'] / 1e12:,.0f}",
                "dense": f"{r['dense_flops'] / 1e12:,.0f}",
                "s at peak": f"{r['seconds_at_peak']:.3f}",
                "GiB a device": f"{memory['total'] / GIB:.1f} of {r['limit_bytes'] / GIB:.0f}"
                if r["fits"] else "does not fit",
                "collectives, GiB": ", ".join(
                    f"{k} {v['bytes'] / GIB:.2f}" for k, v in collectives.items()
                    if v["bytes"] > 0.005 * GIB
                ),
                "compile, s": f"{r['compile_s']:.0f}",
            }
        )  # fmt: skip
    return lines


def table(reports: list[dict[str, Any]]) -> str:
    """Markdown, one line per case."""
    return bench.table(lines_of(reports))


def readme_table(reports: list[dict[str, Any]]) -> str:
    """The table of the largest size in README.md."""
    columns = (
        "attention", "on", "mesh", "blocks", "TFLOP useful", "executed", "dense", "s at peak",
        "GiB a device", "collectives, GiB",
    )  # fmt: skip
    lines = lines_of([r for r in reports if r["case"][0] == "1.3b"])
    return bench.table([{name: line[name] for name in columns} for line in lines])


def docstring_rows(reports: list[dict[str, Any]]) -> list[str]:
    """The table in the docstring of configs/lm.py."""
    found = {tuple(r["case"]): r for r in reports}
    rows = []
    for size, run in lm.RUNS.items():
        used = []
        for variant in ("window", "dense"):
            report = found[size, variant, run["topology"], run["axes"]]
            fits = report["fits"]
            used.append(f"{report['memory']['total'] / GIB:.1f} GiB" if fits else "does not fit")
        shape = f"{run['rows']} x {run['context']}"
        rows.append(
            f"| {size} | {shape} | {run['topology']} | {run['axes']} | {used[0]} | {used[1]} |"
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="parts of the names of cases")
    parser.add_argument("--table", action="store_true", help="writes the Markdown and stops")
    options = parser.parse_args()
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    chosen = [] if options.table else cases()
    for case in chosen:
        if options.only is None or any(part in " ".join(case) for part in options.only):
            found[case] = measure(case)
            print(f"{' '.join(case)}: {found[case]['seconds']:.0f} s", flush=True)
    # Read now, not before: another process may have added cases in these minutes.
    known = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else []
    found = {tuple(r["case"]): r for r in known} | found
    reports = [found[case] for case in cases() if case in found]
    if not options.table:
        bench.write(reports, RESULTS)
    RESULTS.with_suffix(".md").write_text(table(reports) + "\n")
    print(table(reports))
    if len(reports) == len(cases()):
        print("\n".join(docstring_rows(reports)))
        print(readme_table(reports))
    else:
        print("not all yet")
    return 0 if all(r["fits"] for r in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
