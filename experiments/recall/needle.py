"""A needle at every depth of rows of several lengths: where is it found, where can it be?

    python -m experiments.recall.needle [--out DIR] [--steps N]    # minutes on one core

The grid of depth and length of [arXiv:2404.06654]. One layer of attention behind a convolution of 3
tokens, trained on needles anywhere in rows of the longest length, three seeds; its accuracy at each
cell stands beside what `viz.receptive_field` says: whether the last token depends on the value.
"""

import argparse
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments.kernels import bench
from experiments.recall import side_by_side
from sparse_attn.data.synthetic import catalog, needle
from sparse_attn.models import transformer
from sparse_attn.patterns import base as patterns_base
from sparse_attn.viz import receptive_field

RESULTS = pathlib.Path(__file__).parent / "results"
METHODS = {
    "full": "causal()",
    "window 16": "local(window=16)",
    "sinks + window 16": "local(window=16) | sinks(tokens=4)",
    "dilated": "local(window=4) | dilated(window=8, dilation=6)",
}
VOCAB, SEEDS = 96, 3
LENGTHS, DEPTHS = (16, 32, 48, 64), tuple(i / 8 for i in range(9))
STEPS, BATCH, TEST, RATE = 400, 64, 512, 1e-2


def task_of(length: int, depth: float | None = None) -> needle.Needle:
    return needle.Needle(vocab_size=VOCAB, length=length, depth=depth)


def in_reach(pattern: patterns_base.Pattern, task: needle.Needle) -> bool:
    """Whether the question depends on the needle's value, which the convolution carries on.

    >>> window = patterns_base.parse("local(window=4)")
    >>> [in_reach(window, task_of(16, depth)) for depth in (0.0, 0.5, 1.0)]
    [False, False, True]
    """
    value = task.needle_place() + 1
    field = receptive_field(pattern, task.length, num_layers=1, queries=[task.length - 1])
    return bool(field.reached[-1, value : value + side_by_side.SHORT_CONV].any())


def train(pattern: patterns_base.Pattern, *, steps: int) -> tuple[transformer.Transformer, Any]:
    """The model, and its parameters `[seeds, ..]`."""
    model, task = side_by_side.one_layer(VOCAB, pattern), task_of(LENGTHS[-1])
    params = side_by_side.train(
        model, jax.random.split(jax.random.key(0), SEEDS),
        side_by_side.of_seeds(task, SEEDS, split="train", rows=BATCH),
        length=task.length, steps=steps, rate=RATE,
    )  # fmt: skip
    return model, params


def accuracy_of(model: transformer.Transformer) -> Any:
    """`test(params [seeds, ..], batch)`, the accuracy of each seed on the same rows."""

    def test(params, batch):
        return side_by_side.accuracy(model.apply({"params": params}, batch["inputs"]), batch)

    return jax.jit(jax.vmap(test, (0, None)))


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: length by depth, mean of the seeds; in brackets where the needle is out of reach.

    >>> cell = {"method": "full", "length": 16, "depth": 0.5, "accuracy": [1.0], "in_reach": False}
    >>> print(table([cell]).splitlines()[-1])
    | full   | 16     | (1.00) |
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for c in cells:
        row = rows.setdefault(
            (c["method"], c["length"]), {"method": c["method"], "tokens": c["length"]}
        )
        mean = f"{np.mean(c['accuracy']):.2f}"
        row[f"{c['depth']:g}"] = mean if c["in_reach"] else f"({mean})"
    return bench.table(list(rows.values()))


def draw(cells: list[dict[str, Any]], path: pathlib.Path) -> None:
    """A panel per method, depth by length; a cross where the needle is out of reach."""
    from matplotlib import figure

    methods = list(dict.fromkeys(c["method"] for c in cells))
    lengths, depths = (sorted({c[name] for c in cells}) for name in ("length", "depth"))
    fig = figure.Figure(figsize=(3.2 * len(methods), 3.4), layout="constrained")
    panels = fig.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for ax, method in zip(panels, methods, strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for c in (c for c in cells if c["method"] == method):
            at = depths.index(c["depth"]), lengths.index(c["length"])
            grid[at] = np.mean(c["accuracy"])
            if not c["in_reach"]:
                ax.plot(at[1], at[0], "x", color="tab:red")
        shown = ax.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        ax.set(title=method, xlabel="tokens")
        ax.set_xticks(range(len(lengths)), lengths)
        ax.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
    panels[0].set_ylabel("depth of the needle")
    fig.colorbar(shown, ax=panels, label="accuracy")
    fig.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--test", type=int, default=TEST, help="test rows of a cell")
    options = parser.parse_args(argv)
    tasks = [task_of(length, depth) for length in LENGTHS for depth in DEPTHS]
    drawn = [
        next(catalog.Batches(task, split="test", seed=0, batch_size=options.test)) for task in tasks
    ]
    cells: list[dict[str, Any]] = []
    for method, expression in METHODS.items():
        began, pattern = time.perf_counter(), patterns_base.parse(expression)
        model, params = train(pattern, steps=options.steps)
        test = accuracy_of(model)
        cells += [
            {
                "method": method, "length": task.length, "depth": task.depth,
                "accuracy": np.asarray(test(params, batch), float).tolist(),
                "in_reach": in_reach(pattern, task), "chance": task.chance,
            }
            for task, batch in zip(tasks, drawn, strict=True)
        ]  # fmt: skip
        print(f"{method}: {time.perf_counter() - began:.0f} s", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    bench.write({"steps": options.steps, "test": options.test, "cells": cells},
                options.out / "needle.json")  # fmt: skip
    (options.out / "needle.md").write_text(table(cells) + "\n")
    draw(cells, options.out / "needle.png")
    print(table(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
