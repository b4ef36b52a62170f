"""Tables of the recall study from its results files; see README.md.

python -m experiments.recall.report [--results FOLDER]
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from experiments.kernels import bench
from experiments.recall import mqar_gpu

RESULTS = pathlib.Path(__file__).parent / "results"
# Read off a figure of the authors' code for another, harder mix of lengths (up to 256 pairs) with
# a convolution in front [arXiv:2402.18668, fig. 2], so the order compares and the values do not.
PUBLISHED = {"full": 1.0, "window 16": 0.15, "window 64": 0.51}


def in_sight(method: str, length: int, first_layer: str, test: int = 3000) -> float | None:
    """`mqar_gpu.in_sight` of the study's test examples at a length.

    >>> in_sight("full", 64, "attention", test=10)
    1.0
    """
    setting = mqar_gpu.Setting(train=1, test=test)
    places = mqar_gpu.data_of(length, setting)["test"]["places"]
    return mqar_gpu.in_sight(method, places, first_layer)


def table(cells: Sequence[dict[str, Any]], width: int, first_layer: str) -> str:
    """Markdown: mean accuracy (least to most of the seeds) by method and length, at one width.

    >>> cell = {"method": "full", "length": 64, "width": 128, "density": 0.5, "accuracy": 1.0,
    ...         "low": 0.99, "high": 1.0}
    >>> print(table([cell], 128, "attention").splitlines()[-1])
    | full   | 0.5           | 1              | 1.00 (0.99 to 1.00) | 1                 |
    """
    mine = [c for c in cells if c["width"] == width]
    lengths = sorted({c["length"] for c in mine})
    methods = list(dict.fromkeys(c["method"] for c in mine))
    # What a method sees is compared at one length: the largest at which all have run.
    common = [t for t in lengths if sum(c["length"] == t for c in mine) == len(methods)]
    at = (common or lengths)[-1]
    rows = []
    for method in methods:
        by_length = {c["length"]: c for c in mine if c["method"] == method}
        seen = in_sight(method, at, first_layer)
        density = by_length[at]["density"] if at in by_length else None
        row = {
            "method": method,
            f"density at {at}": density or ("chosen" if seen is None else ""),
            f"in sight at {at}": "chosen" if seen is None else seen,
        }
        for length in lengths:
            cell = by_length.get(length)
            row[f"T={length}"] = "not run" if cell is None else _accuracy(cell)
        rows.append(row | {"published (Based)": PUBLISHED.get(method, "")})
    return bench.table(rows)


def _accuracy(cell):
    return f"{cell['accuracy']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})"


def describe(content: dict[str, Any]) -> str:
    """Markdown of a results file: what was run where, and a table per width."""
    setting, cells = content["results"]["setting"], content["results"]["cells"]
    first_layer = setting.get("first_layer", "attention")
    text = [
        f"{content['environment']['device']}; {first_layer} first; "
        f"{setting['steps']} steps of {setting['batch']} examples, vocabulary {setting['vocab']}; "
        "best of the learning rates, mean of the seeds (least to most)."
    ]
    for width in sorted({c["width"] for c in cells}):
        text += [f"Width {width}", table(cells, width, first_layer)]
    return "\n\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder")
    folder = parser.parse_args(argv).results
    paths = sorted(folder.glob("mqar_*.json"))
    if not paths:
        print(
            f"no {folder}/mqar_*.json: run `python -m experiments.recall.mqar_gpu` on a GPU first"
        )
        return 1
    for path in paths:
        text = describe(json.loads(path.read_text()))
        path.with_suffix(".md").write_text(text)
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
