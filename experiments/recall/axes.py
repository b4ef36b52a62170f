"""Recall under four kinds of attention, all of it and a band of it; see README.md.

python -m experiments.recall.axes [--out DIR]    # 24 small models, minutes on one core
"""

import argparse
import itertools
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments.kernels import bench
from experiments.recall import side_by_side
from sparse_attn.data.synthetic import attention_axes, catalog
from sparse_attn.patterns import base as patterns_base

RESULTS = pathlib.Path(__file__).parent / "results"
LENGTH, PAIRS, BAND, SEEDS = 32, 4, 4, 3
STEPS, BATCH, TEST, RATE = 600, 64, 512, 1e-2
# (causal, cross) -> the band: BAND places around the own one, or around that of the other stream.
BANDS = {
    (True, False): f"local(window={BAND})",
    (False, False): f"local(reach=({BAND}, {BAND}))",
    (True, True): f"local(window={LENGTH // 2 + BAND})",
    (False, True): f"local(window={LENGTH // 2 + BAND + 1}) & ~local(window={LENGTH // 2 - BAND})",
}


def task_of(*, causal: bool, cross: bool) -> attention_axes.AttentionAxes:
    return attention_axes.AttentionAxes(length=LENGTH, num_pairs=PAIRS, causal=causal, cross=cross)


def pattern_of(task: attention_axes.AttentionAxes, kind: str) -> patterns_base.Pattern:
    """All that the axis shows, or the "band" of it.

    >>> pattern_of(task_of(causal=True, cross=False), "band").expression()
    '(causal() & local(window=4))'
    """
    if kind == "all":
        return task.pattern
    return task.pattern & patterns_base.parse(BANDS[task.causal, task.cross])


def run(
    task: attention_axes.AttentionAxes, pattern: patterns_base.Pattern, *, steps: int, test: int
) -> list[float]:
    """Test accuracy of one layer behind a short convolution, for each seed; trained together."""
    model = side_by_side.one_layer(task.vocab_size, pattern)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    train, drawn = (
        side_by_side.of_seeds(task, SEEDS, split=split, rows=rows)
        for split, rows in (("train", BATCH), ("test", test))
    )
    params = side_by_side.train(model, keys, train, length=task.length, steps=steps, rate=RATE)

    @jax.jit
    @jax.vmap
    def accuracy(params, batch):
        return side_by_side.accuracy(model.apply({"params": params}, batch["inputs"]), batch)

    return np.asarray(accuracy(params, next(drawn)), float).tolist()


def shown(task: attention_axes.AttentionAxes, pattern: patterns_base.Pattern) -> float:
    """The share of test questions whose pair the pattern shows: what a model can know.

    A key at a place holds the two tokens before it too: a value is found there or one place later.

    >>> task = task_of(causal=True, cross=False)
    >>> shown(task, task.pattern)
    1.0
    """
    at = np.arange(task.length, dtype=np.int32)
    mask = np.broadcast_to(pattern.mask_fn(at[:, None], at), (task.length,) * 2)
    batch = next(catalog.Batches(task, split="test", seed=0, batch_size=256))
    seen = []
    for inputs, targets, weights in zip(batch["inputs"], batch["targets"], batch["weights"]):
        values = {int(token): place for place, token in enumerate(inputs)}  # Each stands once.
        for t in np.flatnonzero(weights):
            place = values[int(targets[t])]
            seen.append(mask[t, place : place + 2].any())
    return float(np.mean(seen))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--test", type=int, default=TEST, help="test rows")
    options = parser.parse_args(argv)
    results: list[dict[str, Any]] = []
    for causal, cross in itertools.product((True, False), repeat=2):
        task = task_of(causal=causal, cross=cross)
        for kind in ("all", "band"):
            began, pattern = time.perf_counter(), pattern_of(task, kind)
            found = run(task, pattern, steps=options.steps, test=options.test)
            name = f"{'causal' if causal else 'noncausal'} {'cross' if cross else 'self'}"
            results.append(
                {
                    "axis": name, "attention": kind, "pattern": pattern.expression(),
                    "accuracy": found, "shown": shown(task, pattern), "chance": task.chance,
                    "seconds": round(time.perf_counter() - began, 1),
                }
            )  # fmt: skip
            print(
                name, kind, np.round(found, 3).tolist(), f"{results[-1]['shown']:.3f}", flush=True
            )
    rows = [
        {
            "axis": r["axis"], "attention": r["attention"],
            "accuracy": f"{np.mean(r['accuracy']):.2f} "
            f"({min(r['accuracy']):.2f} to {max(r['accuracy']):.2f})",
            "pair in sight": f"{r['shown']:.2f}", "guess": f"{r['chance']:.2f}",
        }
        for r in results
    ]  # fmt: skip
    bench.write(results, options.out / "axes.json")
    (options.out / "axes.md").write_text(bench.table(rows) + "\n")
    print(bench.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
