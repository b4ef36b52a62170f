"""Tables and picture of the GPU benchmark of selection, from its results file; see README.md.

python -m experiments.selection.gpu_report [--results FILE]
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from experiments.kernels import bench

RESULTS = pathlib.Path(__file__).parent / "results" / "gpu_bench.json"
STAGES = {
    "fwd": ("scoring_and_selection", "compressed", "window", "attention"),
    "bwd": ("compressed", "window", "attention"),
}
# Parts of the stage before them, where they are programs of their own.
PARTS = {"scoring_and_selection": ("scoring", "selection"), "attention": ("plan",)}


def report(rows, environment: dict[str, Any]) -> str:
    """Markdown: milliseconds of the stages of each pass, and of all stages in one program."""
    parts = [f"{environment['device']}, commit {environment['commit']}, milliseconds."]
    stages = [row for row in rows if not any(name.startswith("both_") for name in row)]
    for way, names in STAGES.items():
        table = []
        for row in stages:
            cells = {"method": row["method"], "tokens": row["length"]}
            for name in names:
                cells[name.replace("_", " ")] = row.get(f"{name}_{way}_ms", "")
                parts_of = PARTS.get(name, ()) if way == "fwd" else ()
                cells |= {f"of it {n}": row.get(f"{n}_{way}_ms", "") for n in parts_of}
            cells |= {"all": row.get(f"{way}_ms", ""), "dense": row.get(f"dense_{way}_ms", "")}
            cells["dense / all"] = row.get(f"{way}_speed_up", "")
            if any(f"fla_{way}_ms" in r for r in stages):
                cells["fla attention"] = row.get(f"fla_attention_{way}_ms", "")
                cells["fla all"] = row.get(f"fla_{way}_ms", "")
            table.append(cells)
        parts += [{"fwd": "Forward", "bwd": "Backward"}[way], bench.table(table)]
    together = [
        {
            "method": row["method"], "tokens": row["length"], "both passes": row["both_ms"],
            "GB besides inputs and gradients": row["both_temp_bytes"] / 1e9,
        }
        for row in rows
        if "both_ms" in row
    ]  # fmt: skip
    if together:
        parts += ["All stages in one program, forward and backward", bench.table(together)]
    return "\n\n".join(parts)


def plot(rows, path: pathlib.Path) -> None:
    """Stacked bars of the stages beside dense attention, by method, pass and length.

    Rows with an error are left out; without any other, nothing is written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if {"fwd_speed_up", "bwd_speed_up"} <= set(row)]
    if not rows:
        return
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, 2 * len(methods), figsize=(4 * len(methods) + 4, 4))
    cases = [(method, way) for method in methods for way in STAGES]
    for axis, (method, way) in zip(axes, cases, strict=True):
        mine = [row for row in rows if row["method"] == method]
        below = [0.0] * len(mine)
        for color, name in enumerate(STAGES["fwd"]):
            if name not in STAGES[way]:
                continue
            # Of the dense time, so that lengths fit in one picture.
            heights = [row.get(f"{name}_{way}_ms", 0.0) / row[f"dense_{way}_ms"] for row in mine]
            axis.bar(
                range(len(mine)), heights, bottom=below, color=f"C{color}",
                label=name.replace("_", " "),
            )  # fmt: skip
            below = [a + b for a, b in zip(below, heights, strict=True)]
        axis.axhline(1, color="black", linewidth=1, linestyle="--", label="dense (cuDNN)")
        axis.set_xticks(range(len(mine)), [f"{row['length'] // 1024}k" for row in mine])
        axis.set_title(f"{method}, {'forward' if way == 'fwd' else 'backward'}")
    axes[0].set_ylabel("time / time of dense attention")
    axes[-2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(path: pathlib.Path) -> None:
    """Prints the tables of a results file; writes them and the picture beside it."""
    content = json.loads(path.read_text())
    text = report(content["results"], content["environment"])
    path.with_suffix(".md").write_text(text + "\n")
    plot(content["results"], path.with_suffix(".png"))
    print(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    show(parser.parse_args(argv).results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
