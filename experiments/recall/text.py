"""Bits per byte of a run on text, by place and of what repeats; see README.md.

python -m experiments.recall.text RUN [RUN ...] [--ngram 4] [--edges 0 64 256 1024]
"""

import argparse
import pathlib
import sys
from typing import Any

from experiments.kernels import bench
from sparse_attn.train import breakdown, tasks
from sparse_attn.viz import inspect_run


def of_run(folder: pathlib.Path, *, edges: tuple[int, ...], n: int) -> tuple[str, dict[str, Any]]:
    """The run's name and parts, from its newest checkpoint and its own validation batches."""
    run = inspect_run.load_for_inspection(folder)
    task = tasks.of(run.config)
    if not isinstance(task, tasks.Text):
        raise ValueError(f"{folder} must be a run on text")
    task.open_data()
    parts = breakdown.breakdown(run.model, run.params, task.eval_batches, edges=edges, n=n)
    return f"{run.config['name']} ({folder.name})", parts


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Markdown: bits per byte of the parts by run.

    >>> print(table({"a": {"all": {"bits_per_byte": 2.0, "bytes": 1e3}}}).splitlines()[-1])
    | all  | 1,000 | 2.000 |
    """
    rows = []
    for part in dict.fromkeys(part for parts in runs.values() for part in parts):
        size = next(parts[part]["bytes"] for parts in runs.values() if part in parts)
        row = {"part": part, "bytes": f"{size:,.0f}"}
        for name, parts in runs.items():
            row[name] = f"{parts[part]['bits_per_byte']:.3f}" if part in parts else ""
        rows.append(row)
    return bench.table(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=pathlib.Path, nargs="+", help="run folders")
    parser.add_argument("--ngram", type=int, default=4, help="tokens of a run that may repeat")
    parser.add_argument("--edges", type=int, nargs="+", default=[0, 64, 256, 1024])
    options = parser.parse_args(argv)
    edges = tuple(options.edges)
    found = dict(of_run(folder, edges=edges, n=options.ngram) for folder in options.runs)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
