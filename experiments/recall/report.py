"""Tables and pictures of the recall study from its results files; see README.md.

python -m experiments.recall.report [--results FOLDER]
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.kernels import bench
from experiments.recall import dense, mqar_gpu
from sparse_attn.data.synthetic import mqar
from sparse_attn.masks import stats
from sparse_attn.patterns import local
from sparse_attn.viz import plots

RESULTS = pathlib.Path(__file__).parent / "results"
BYTES = 2  # of a bfloat16 number of a key or a value
# Windows behind a convolution, width 128, as read off a figure of the authors' code, by window
# [arXiv:2402.18668, fig. 2]; and their test set, equal parts of these lengths and pairs.
PUBLISHED = {8: 0.08, 16: 0.15, 32: 0.31, 64: 0.51, 128: 0.66, 256: 0.80, 512: 0.94, 1024: 1.0}
MIX = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))


def in_sight(method: str, length: int, first_layer: str, test: int = 3000) -> float | None:
    """`mqar_gpu.in_sight` of the study's test examples at a length.

    >>> in_sight("full", 64, "attention", test=10)
    1.0
    """
    return mqar_gpu.in_sight(dense.rule_of(method), _places(length, test), first_layer)


@functools.cache
def _places(length, test):
    return mqar_gpu.data_of(length, mqar_gpu.Setting(train=1, test=test))["test"]["places"]


def keys_read(method: str, length: int) -> float:
    """Keys that a query reads, in the mean over a row; of a selector as many as it may.

    NSA's compressed keys are among them, the means by which others choose are not.

    >>> keys_read("window 16", 64), keys_read("pooled top-k", 64)
    (14.125, 22.5)
    """
    rule = dense.rule_of(method)
    if dense.is_static(rule):
        return float(dense.mask_of(rule, length).sum(1).mean())
    return length * stats.of(rule.at_most(length)).token_density


def table(cells: Sequence[dict[str, Any]], width: int, first_layer: str) -> str:
    """Markdown: mean accuracy (least to most of the seeds) by method and length, at one width.

    >>> cell = {"method": "full", "length": 64, "width": 128, "density": 0.5, "accuracy": 1.0,
    ...         "low": 0.99, "high": 1.0}
    >>> row = table([cell], 128, "attention").splitlines()[-1]
    >>> [x.strip() for x in row.split("|")][3:7]  # Keys, bytes, in sight, accuracy.
    ['32.5', '16,640', '1', '1.00 (0.99 to 1.00)']
    """
    mine = [c for c in cells if c["width"] == width]
    lengths = sorted({c["length"] for c in mine})
    rows = []
    for method in dict.fromkeys(c["method"] for c in mine):
        by_length = {c["length"]: c for c in mine if c["method"] == method}
        # What a method reads is compared at one length.
        longest = lengths[-1]
        keys = keys_read(method, longest)
        row = {
            "method": method,
            f"density at {longest}": keys / longest,
            f"keys of {longest}": keys,
            f"KV bytes of {longest}": f"{2 * width * BYTES * keys:,.0f}",
        }
        for length in lengths:
            seen, cell = in_sight(method, length, first_layer), by_length.get(length)
            row[f"in sight at T={length}"] = "chosen" if seen is None else seen
            row[f"T={length}"] = "not run" if cell is None else _accuracy(cell)
        rows.append(row)
    return bench.table(rows)


def published(test: int = 1000) -> str:
    """Markdown: what was published for windows beside what they show of the same test set.

    >>> print(published(test=20).splitlines()[-1])
    | all    | 1         | 1        |
    """
    seen = {window: [] for window in PUBLISHED}
    for length, pairs in MIX:
        task = mqar.Mqar(vocab_size=8192, length=length, num_pairs=pairs, power_a=0.01)
        places = task.batch(np.random.default_rng(0), test)["places"]
        for window, shares in seen.items():
            rule = local.Local(window=window)
            shares.append(mqar_gpu.in_sight(rule, places, "convolution"))
    rows = [
        {"window": str(w), "published": PUBLISHED[w], "in sight": float(np.mean(shares))}
        for w, shares in seen.items()
    ]
    # Full attention, at every width of the grid [arXiv:2312.04927, fig. 2].
    return bench.table([*rows, {"window": "all", "published": 1.0, "in sight": 1.0}])


def draw(cells: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Accuracy by width, a panel per length and a line per method, as in Zoology's figure 2."""
    panels: dict[str, dict[str, Any]] = {}
    for cell in sorted(cells, key=lambda c: (c["length"], c["width"])):
        lines = panels.setdefault(f"{cell['length']} tokens", {})
        x, y = lines.setdefault(cell["method"], ([], []))
        x.append(cell["width"])
        y.append(cell["accuracy"])
    plots.curves(panels, path, x_label="width")


def draw_keys(cells: Sequence[dict[str, Any]], width: int, path: pathlib.Path) -> None:
    """Accuracy against the keys that a query reads, a panel per length, at one width."""
    panels: dict[str, dict[str, Any]] = {}
    for cell in sorted(cells, key=lambda c: c["length"]):
        if cell["width"] == width:
            point = [keys_read(cell["method"], cell["length"])], [cell["accuracy"]]
            panels.setdefault(f"{cell['length']} tokens", {})[cell["method"]] = point
    plots.curves(panels, path, x_label="keys a query reads")


def _accuracy(cell):
    return f"{cell['accuracy']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})"


def describe(content: dict[str, Any]) -> str:
    """Markdown of a results file: what was run where, and a table per width."""
    setting, cells = content["results"]["setting"], content["results"]["cells"]
    first_layer = setting.get("first_layer", "attention")
    text = [
        f"{content['environment']['device']}; {first_layer} first; "
        f"{setting['steps']} steps of {setting['batch']} examples, vocabulary {setting['vocab']}; "
        "best of the learning rates, mean of the seeds (least to most). Keys and bytes (of keys "
        "and values in bfloat16) are those that a query reads in the mean over a row; NSA's "
        "compressed keys are among them, the means by which others choose blocks are not."
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
        content = json.loads(path.read_text())
        text = describe(content)
        path.with_suffix(".md").write_text(text)
        cells = content["results"]["cells"]
        draw(cells, path.with_suffix(".png"))
        widths = sorted({c["width"] for c in cells})
        draw_keys(
            cells, 128 if 128 in widths else widths[0], path.with_name(f"{path.stem}_keys.png")
        )
        print(text)
    text = published()
    (folder / "mqar_published.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
