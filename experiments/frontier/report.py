"""Tables and pictures of experiments/frontier from its results file; see README.md.

python -m experiments.frontier.report [--results FILE]
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from experiments.kernels import bench
from sparse_attn.viz import plots

RESULTS = pathlib.Path(__file__).parent / "results" / "frontier.json"
ORACLE, DENSE = "oracle", "dense"


def table(cells: Sequence[dict[str, Any]], length: int) -> str:
    """Markdown: rules and budgets by tasks and sizes, at one length: mean (least of the seeds).

    >>> cell = {"size": 8, "length": 64, "rule": "dense", "budget": None, "task": "needle",
    ...         "accuracy": 0.5, "by_seed": [0.4, 0.6], "density": 1.0}
    >>> print(table([cell], 64).splitlines()[-1])
    | dense | 100%    | 0.50 (0.40) |
    """
    mine = [c for c in cells if c["length"] == length]
    rows = []
    for rule, budget in dict.fromkeys((c["rule"], c["budget"]) for c in mine):
        same = [c for c in mine if (c["rule"], c["budget"]) == (rule, budget)]
        density = sum(c["density"] for c in same) / len(same)
        row = {"rule": rule if budget is None else f"{rule}, {budget}"}
        row["density"] = f"{density:.0%}"
        rows.append(row | {f"{c['task']} {c['size']}": _accuracy(c) for c in same})
    names = list(dict.fromkeys(name for row in rows for name in row))
    return bench.table([{name: row.get(name, "") for name in names} for row in rows])


def _accuracy(cell):
    return f"{cell['accuracy']:.2f} ({min(cell['by_seed']):.2f})"


def frontier(cells: Sequence[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """Per task: (size, density) that no other beats in accuracy at as few FLOPs, cheapest first.

    Of each size, budget and task the best rule counts, but not the oracle.
    """
    found = []
    for task in dict.fromkeys(c["task"] for c in cells):
        mine = [
            c for c in cells
            if c["task"] == task and c["length"] == length and c["rule"] != ORACLE
        ]  # fmt: skip
        best = -1.0
        for c in sorted(mine, key=lambda c: (c["flops"], -c["accuracy"])):
            if c["accuracy"] > best:
                best = c["accuracy"]
                found.append(c)
    return found


def frontier_table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: the cells of `frontier`."""
    return bench.table(
        [
            {
                "task": c["task"],
                "size": c["size"],
                "rule": c["rule"] if c["budget"] is None else f"{c['rule']}, {c['budget']}",
                "density": f"{c['density']:.0%}",
                "MFLOPs a row": f"{c['flops'] / 1e6:.2f}",
                "accuracy": _accuracy(c),
            }
            for c in found
        ]
    )


def draw(cells: Sequence[dict[str, Any]], stem: pathlib.Path) -> None:
    """Writes `<stem>_density.png` (the largest size) and `<stem>_isoflop.png` (the best rule)."""
    length, size = max(c["length"] for c in cells), max(c["size"] for c in cells)
    tasks = list(dict.fromkeys(c["task"] for c in cells))
    density: dict[str, dict] = {task: {} for task in tasks}
    iso: dict[str, dict] = {task: {} for task in tasks}
    for task in tasks:
        mine = [c for c in cells if c["task"] == task and c["length"] == length]
        for rule in dict.fromkeys(c["rule"] for c in mine):
            line = [c for c in mine if c["size"] == size and c["rule"] in (rule, DENSE)]
            line.sort(key=lambda c: c["density"])
            if rule != DENSE:
                density[task][rule] = (
                    [100 * c["density"] for c in line], [c["accuracy"] for c in line]
                )  # fmt: skip
        for one in dict.fromkeys(c["size"] for c in mine):
            points = []
            for budget in dict.fromkeys(c["budget"] for c in mine):
                same = [
                    c for c in mine
                    if (c["size"], c["budget"]) == (one, budget) and c["rule"] != ORACLE
                ]  # fmt: skip
                best = max(same, key=lambda c: c["accuracy"])
                points.append((best["flops"] / 1e6, best["accuracy"]))
            x, y = zip(*sorted(points), strict=True)
            iso[task][f"size {one}"] = (list(x), list(y))
    plots.curves(density, f"{stem}_density.png", x_label="density, % of causal pairs")
    plots.curves(iso, f"{stem}_isoflop.png", x_label="MFLOPs a row, the last point is dense")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    path = parser.parse_args(argv).results
    if not path.exists():
        print(f"no {path}: run `python -m experiments.frontier.study` first")
        return 1
    cells = json.loads(path.read_text())["results"]["cells"]
    text = []
    for length in sorted({c["length"] for c in cells}, reverse=True):
        title = f"Length {length}: accuracy by task and size, mean of the seeds (least of them)"
        text += [title, table(cells, length)]
    text += [
        "Most accuracy for the FLOPs of a row, at the largest length (the oracle left out)",
        frontier_table(frontier(cells, max(c["length"] for c in cells))),
    ]
    path.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    draw(cells, path.with_suffix(""))
    print("\n\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
