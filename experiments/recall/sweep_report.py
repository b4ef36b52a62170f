"""Tables, pictures and JSON of a sweep of configs/recall.py, from its run folders; see README.md.

python -m experiments.recall.sweep_report WORKDIR [--out DIR] [--name NAME]
"""

import argparse
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.kernels import bench
from sparse_attn.viz import plots, tables

RESULTS = pathlib.Path(__file__).parent / "results"
BYTES = 4  # of a float32 number in the KV cache
SHARES = (0.25, 0.5, 1.0)  # of the least compute that a method was trained with


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The finished runs of a sweep, one flat record each."""
    runs = []
    for path in sorted(workdir.glob("*/summary.json")):
        summary = tables.read_json(path.parent, "summary.json")
        config = tables.read_json(path.parent, "config.json")
        if not summary.get("finished"):
            continue
        method, _, task = summary["name"].rpartition(", ")
        model, steps = config["model"], summary["steps"]
        tokens = summary["tokens"] / steps
        flops = 6 * summary["params"] * tokens + summary["useful_flops"]
        seen = summary["token_density"] * summary["row_tokens"]
        numbers = 2 * model["num_layers"] * model["num_kv_heads"] * model["head_dim"]
        at, accuracy = tables.series(tables.read_metrics(path.parent), tables.ACCURACY)
        runs.append(
            {
                "method": method,
                "task": task,
                "lr": config["optim"]["lr"],
                "seed": config["seed"],
                "accuracy": summary["test_accuracy"],
                "chance": summary["chance"],
                "pattern": summary["pattern"],
                "density": summary["token_density"],
                "kv_bytes": seen * numbers * BYTES,
                "flops": flops * steps,
                "curve": [[step * flops, y] for step, y in zip(at, accuracy, strict=True)],
            }
        )
    return runs


def cells(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each method and task: the seeds at the rate that is best in their mean.

    >>> run = dict(method="full", task="mqar", chance=0.1, density=0.5, kv_bytes=8, flops=1.0,
    ...            curve=[[1.0, 0.0]], pattern="causal()")
    >>> runs = [run | dict(lr=lr, seed=s, accuracy=lr * s) for lr in (0.1, 0.2) for s in (1, 3)]
    >>> [(c["lr"], round(c["mean"], 2), c["low"], c["seeds"]) for c in cells(runs)]
    [(0.2, 0.4, 0.2, 2)]
    """
    found = []
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in runs):
        mine = [r for r in runs if (r["task"], r["method"]) == (task, method)]
        by_rate: dict[float, list[dict]] = {}
        for r in mine:
            by_rate.setdefault(r["lr"], []).append(r)
        best = max(by_rate.values(), key=lambda rs: statistics.mean(r["accuracy"] for r in rs))
        accuracies = [r["accuracy"] for r in best]
        found.append(
            {name: best[0][name] for name in ("task", "method", "pattern", "lr", "chance")}
            | {name: best[0][name] for name in ("density", "kv_bytes", "flops")}
            | {
                "mean": statistics.mean(accuracies),
                "low": min(accuracies),
                "high": max(accuracies),
                "seeds": len(best),
                "rates": len(by_rate),
                "curve": np.mean([r["curve"] for r in best], 0).tolist(),
            }
        )
    return found


def at_flops(cell: dict[str, Any], flops: float) -> float:
    """Mean accuracy of a cell after this much training, linear between evaluations.

    >>> at_flops({"chance": 0.1, "curve": [[10.0, 0.5], [20.0, 0.7]]}, 15.0)
    0.6
    """
    x, y = np.transpose([[0.0, cell["chance"]], *cell["curve"]])
    return round(float(np.interp(flops, x, y)), 4)


def main_table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: methods by tasks, mean (least to most); density and bytes of the first task."""
    tasks = list(dict.fromkeys(c["task"] for c in found))
    rows = []
    for method in dict.fromkeys(c["method"] for c in found):
        mine = {c["task"]: c for c in found if c["method"] == method}
        first = mine.get(tasks[0]) or next(iter(mine.values()))
        row = {"method": method, "density": f"{first['density']:.1%}"}
        row["KV bytes a query"] = f"{first['kv_bytes']:,.0f}"
        rows.append(row | {t: _accuracy(mine.get(t)) for t in tasks})
    chances = {c["task"]: f"{c['chance']:.2f}" for c in found}
    rows.append({"method": "chance"} | chances)
    return bench.table(rows)


def iso_table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: accuracy at equal training FLOPs; the most is what all methods of a task reach."""
    rows = []
    for task in dict.fromkeys(c["task"] for c in found):
        mine = [c for c in found if c["task"] == task]
        budget = min(c["flops"] for c in mine)
        for share in SHARES:
            row = {"task": task, "GFLOPs": f"{share * budget / 1e9:.1f}"}
            rows.append(row | {c["method"]: f"{at_flops(c, share * budget):.2f}" for c in mine})
    return bench.table(rows)


def _accuracy(cell):
    if cell is None:
        return "not run"
    return f"{cell['mean']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})"


def draw(found: Sequence[dict[str, Any]], stem: pathlib.Path) -> None:
    """Writes `<stem>_density.png`, `<stem>_kv.png` and `<stem>_isoflop.png`."""
    tasks = list(dict.fromkeys(c["task"] for c in found))

    def panels(line):
        return {t: {c["method"]: line(c) for c in found if c["task"] == t} for t in tasks}

    def point(name, factor):
        return lambda c: ([factor * c[name]], [c["mean"]])

    for name, line, label in (
        ("density", point("density", 100), "density, % of all pairs"),
        ("kv", point("kv_bytes", 1), "KV bytes read per query"),
        ("isoflop", lambda c: ([x / 1e9 for x, _ in c["curve"]], [y for _, y in c["curve"]]),
         "training GFLOPs"),
    ):  # fmt: skip
        plots.curves(panels(line), f"{stem}_{name}.png", x_label=label)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=pathlib.Path, help="of launch.py")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--name", default="sweep", help="start of the names of the files")
    options = parser.parse_args(argv)
    runs = read(options.workdir)
    if not runs:
        print(f"no finished run in {options.workdir}: start `launch.py --config=configs/recall.py`")
        return 1
    found, stem = cells(runs), options.out / options.name
    text = [
        f"{len(runs)} runs; mean over the seeds (least to most) at the rate that is best in the "
        "mean. Density and bytes are those of the first task; a method that chooses counts the "
        "most it may read, without what the choice reads.",
        main_table(found),
        "At equal training FLOPs (6 per parameter and token, and those of visible pairs), linear "
        "between evaluations:",
        iso_table(found),
    ]
    bench.write({"cells": found, "runs": runs}, f"{stem}.json")
    stem.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    draw(found, stem)
    print("\n\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
