"""Which attention recalls? MQAR at the settings of Zoology's Figure 2, batched on one GPU.

    python -m experiments.recall.mqar_gpu --out DIR [--budget-s 1200] [--resume FILE]
    python -m experiments.recall.mqar_gpu --tiny --out DIR    # a minute on a CPU

[arXiv:2312.04927, sec. 4, app. E] A cell is (method, length, width). All its runs, three seeds and
four learning rates, are one program (`jax.vmap`); the next programs compile meanwhile. Results are
written after each cell to DIR/mqar_FIRST.json; with `--resume` cells that are in FILE are not run
again. FIRST is the first of two layers: a convolution, as where windows were published
[arXiv:2402.18668, fig. 2], or attention, as where full attention was: two layers of attention take
some 10,000 steps to find each other.
Unlike the originals: fewer steps with a warm-up, no dropout, no second norm in a block, and rates
that fall with the width for all but the embedding.
"""

import argparse
import concurrent.futures
import json
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.kernels import bench
from experiments.recall import dense
from sparse_attn.data.synthetic import mqar

SEEDS = (0, 1, 2)
RATES = tuple(np.logspace(-4, -2, 4).tolist())
WEIGHT_DECAY, WARM_UP = 0.1, 0.05
# The original ends a run there; a cell ends when one rate is there for all seeds, or at this part
# of what a method can know (`in_sight`).
SOLVED = 0.99
PAIRS = {64: 4, 128: 8, 256: 16}
# From what tells most to what costs most.
GRID = (
    (256, 128), (128, 128), (64, 128), (256, 64), (64, 64), (128, 64),
    (256, 256), (64, 256), (128, 256), (64, 512), (128, 512), (256, 512),
)  # fmt: skip
ADAM = optax.scale_by_adam()
EMBEDDING = (jax.tree_util.DictKey("embedding"),)
_COMPILING = 4  # Programs at a time.


class Cell(NamedTuple):
    """All seeds and rates of one method, length and width."""

    method: str
    length: int
    width: int


class Setting(NamedTuple):
    """What all cells of one results file share."""

    first_layer: str = "attention"
    steps: int = 2000
    batch: int = 128
    chunk: int = 100
    evals: int = 10
    vocab: int = 8192
    train: int = 100_000
    test: int = 3000
    # All but the embedding learns at `base_width / width` of the rate [arXiv:2203.03466, table 3],
    # so that one grid of rates fits all widths; None: at the rate.
    base_width: int | None = None

    @classmethod
    def tiny(cls, first_layer: str) -> "Setting":
        """For tests: seconds on a CPU."""
        sizes = {"steps": 8, "batch": 4, "chunk": 4, "evals": 2, "vocab": 128}
        return cls(first_layer, **sizes, train=64, test=24, base_width=64)


def model_of(cell: Cell, setting: Setting) -> dense.Recaller:
    """The model; a static pattern is an argument of the program, not a part of it."""
    rule = dense.rule_of(cell.method)
    rule = None if dense.is_static(rule) else rule
    return dense.Recaller(
        rule=rule, vocab_size=setting.vocab, width=cell.width, first_layer=setting.first_layer
    )


def data_of(length: int, setting: Setting) -> dict[str, dict[str, np.ndarray]]:
    """`train` and `test` arrays `[seeds, examples, ...]`; every seed has data of its own."""
    pairs = PAIRS.get(length, length // 16)
    task = mqar.Mqar(
        vocab_size=setting.vocab, length=length, num_pairs=pairs, power_a=0.01, filler="zero"
    )
    data = {}
    for split, (name, size) in enumerate((("train", setting.train), ("test", setting.test))):
        drawn = [task.batch(np.random.default_rng((s, split, length)), size) for s in SEEDS]
        data[name] = {key: np.stack([x[key] for x in drawn]) for key in drawn[0]}
    return data


def in_sight(rule: Any, places: np.ndarray, first_layer: str) -> float | None:
    """The part of the questions at `places [..., pairs]` whose value the last layer sees.

    A convolution carries a pair to the token after its value as well; one head looks for pairs in
    one of the two places, and the one that shows more counts. None for a selector, which chooses.

    >>> places = np.array([[6, 20]])  # Values at 1 and 3; after the convolution also at 2 and 4.
    >>> window, dilated = dense.rule_of("window 16"), dense.rule_of("dilated")
    >>> in_sight(window, places, "convolution"), in_sight(dilated, places, "attention")
    (0.5, 0.0)
    """
    if not dense.is_static(rule):
        return None
    mask = dense.mask_of(rule, places.max() + 1)
    values = 2 * np.arange(places.shape[-1]) + 1  # Where the values of the pairs stand.
    seen = mask[places, values].mean()
    if first_layer == "convolution":
        seen = max(seen, mask[places, values + 1].mean())
    return float(seen)


def programs(cell: Cell, setting: Setting):
    """`start(seeds)`, `train(state, data, rows, steps, rates, mask)`, `test(params, data, mask)`.

    State and results are `[seeds, rates, ..]`, data `[seeds, examples, ..]`.
    """
    model = model_of(cell, setting)

    def init(seed):
        tokens, places = (jnp.zeros((1, n), jnp.int32) for n in (cell.length, 1))
        mask = jnp.ones((cell.length, cell.length), bool)
        params = model.init(jax.random.key(seed), tokens, places, mask)["params"]
        return params, ADAM.init(params)

    def loss_of(params, batch, mask):
        logits = model.apply({"params": params}, batch["inputs"], batch["places"], mask)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["answers"])
        return losses.mean()

    def one_step(state, batch, rate, step, mask):
        params, moments = state
        grads = jax.grad(loss_of)(params, batch, mask)
        updates, moments = ADAM.update(grads, moments)
        done = step / setting.steps
        rate *= jnp.minimum(1, done / WARM_UP) * (0.5 + 0.5 * jnp.cos(jnp.pi * done))
        inner = rate if setting.base_width is None else rate * setting.base_width / cell.width

        def moved(path, p, u):
            return p - (rate if path == EMBEDDING else inner) * (u + WEIGHT_DECAY * p)

        return jax.tree_util.tree_map_with_path(moved, params, updates), moments

    # State is [seeds, rates, ...]; the data belong to the seed.
    over_rates = jax.vmap(one_step, (0, None, 0, None, None))
    over_seeds = jax.vmap(over_rates, (0, 0, None, None, None))

    def train(state, data, rows, steps, rates, mask):
        def body(state, now):
            batch_rows, step = now
            batch = jax.tree.map(lambda x: jax.vmap(lambda a, r: a[r])(x, batch_rows), data)
            return over_seeds(state, batch, rates, step, mask), None

        return jax.lax.scan(body, state, (rows, steps))[0]

    def right(params, batch, mask):
        logits = model.apply({"params": params}, batch["inputs"], batch["places"], mask)
        return (logits.argmax(-1) == batch["answers"]).mean()

    def test(params, data, mask):
        parts = max(1, setting.test // (2 * setting.batch))
        size = setting.test // parts
        pieces = jax.tree.map(
            lambda x: x[:, : parts * size].reshape(len(SEEDS), parts, size, -1).swapaxes(0, 1), data
        )
        each = jax.vmap(jax.vmap(right, (0, None, None)), (0, 0, None))
        return jax.lax.map(lambda piece: each(params, piece, mask), pieces).mean(0)

    def start(seeds):
        every = jnp.repeat(seeds[:, None], len(RATES), 1)
        return jax.vmap(jax.vmap(init))(every)

    return start, train, test


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def compiled(cell: Cell, setting: Setting):
    """The compiled programs of a cell."""
    start, train, test = programs(cell, setting)
    length = cell.length
    pairs, seeds = PAIRS.get(length, length // 16), len(SEEDS)

    def data(size):
        return {
            name: jax.ShapeDtypeStruct((seeds, size, n), jnp.int32)
            for name, n in (("inputs", length), ("places", pairs), ("answers", pairs))
        }

    state = jax.eval_shape(start, jnp.arange(seeds))
    mask = jax.ShapeDtypeStruct((length, length), jnp.bool_)
    rows = jax.ShapeDtypeStruct((setting.chunk, seeds, setting.batch), jnp.int32)
    steps = jax.ShapeDtypeStruct((setting.chunk,), jnp.float32)
    rates = jax.ShapeDtypeStruct((len(RATES),), jnp.float32)
    return (
        jax.jit(start).lower(jax.ShapeDtypeStruct((seeds,), jnp.int32)).compile(),
        jax.jit(train, donate_argnums=0)
        .lower(state, data(setting.train), rows, steps, rates, mask)
        .compile(),
        jax.jit(test).lower(state[0], data(setting.test), mask).compile(),
    )


def program_of(cell: Cell) -> Cell:
    """The cell whose programs this one runs: static patterns share those of full attention."""
    static = dense.is_static(dense.rule_of(cell.method))
    return cell._replace(method="full") if static else cell


def order_of(seed: int, setting: Setting) -> np.ndarray:
    """Rows of the training set `[steps, batch]`, shuffled anew in every epoch."""
    rng = np.random.default_rng((seed, 2))
    needed = setting.steps * setting.batch
    epochs = [rng.permutation(setting.train) for _ in range(-(-needed // setting.train))]
    return np.concatenate(epochs)[:needed].reshape(setting.steps, setting.batch)


def run_cell(cell: Cell, setting: Setting, data: Any, programs_of: Any) -> dict[str, Any]:
    """Trains and tests all runs of a cell; the accuracies of each are `[seed][rate]`."""
    start, train, test = programs_of
    rule = dense.rule_of(cell.method)
    visible = dense.mask_of(rule, cell.length)
    mask, rates = jnp.asarray(visible), jnp.asarray(RATES, jnp.float32)
    rows = np.stack([order_of(s, setting) for s in SEEDS], 1)
    began, step, best, curve = time.perf_counter(), 0, None, []
    state = start(jnp.arange(len(SEEDS)))
    known = in_sight(rule, np.asarray(data["test"]["places"]), setting.first_layer)
    # Two layers of attention hand on what the last one does not see.
    known = 1.0 if known is None or setting.first_layer == "attention" else known
    every = max(setting.chunk, setting.steps // setting.evals // setting.chunk * setting.chunk)
    while step < setting.steps:
        steps = np.arange(step, step + setting.chunk)
        now = (jnp.asarray(rows[steps], jnp.int32), jnp.asarray(steps, jnp.float32))
        state = train(state, data["train"], *now, rates, mask)
        step += setting.chunk
        if step % every and step < setting.steps:
            continue
        accuracy = np.asarray(test(state[0], data["test"], mask), np.float64)
        best = accuracy if best is None else np.maximum(best, accuracy)
        curve.append([step, float(accuracy.mean(0).max())])
        if (best.min(0) >= SOLVED * known).any():
            break
    rate = int(best.mean(0).argmax())
    return {
        **cell._asdict(),
        "rule": dense.METHODS[cell.method],
        "density": None if not dense.is_static(rule) else float(visible.mean()),
        "accuracy": float(best[:, rate].mean()),
        "low": float(best[:, rate].min()),
        "high": float(best[:, rate].max()),
        "rate": RATES[rate],
        "by_seed_and_rate": best.round(4).tolist(),
        "curve": curve,
        "steps": step,
        "seconds": round(time.perf_counter() - began, 2),
    }


def plan(lengths: Any, widths: Any, methods: Any, done: Any) -> list[Cell]:
    """Cells that are still to run, in the order in which they tell most."""
    cells = [Cell(m, t, d) for t, d in GRID if t in lengths and d in widths for m in methods]
    return [cell for cell in cells if cell not in done]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--resume", type=pathlib.Path, help="results of an earlier call")
    parser.add_argument("--first", choices=dense.FIRST_LAYERS, help="default: convolution")
    parser.add_argument("--budget-s", type=float, default=1200, help="starts no cell after this")
    parser.add_argument("--steps", type=int, help="default: 2000")
    parser.add_argument("--batch", type=int, help="default: 128")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(PAIRS))
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 128, 256, 512])
    parser.add_argument("--methods", nargs="*", default=list(dense.METHODS))
    parser.add_argument("--tiny", action="store_true", help="one short cell per method, on a CPU")
    options = parser.parse_args(argv)
    began = time.perf_counter()
    asked = {"first_layer": options.first, "steps": options.steps, "batch": options.batch}
    asked = {name: value for name, value in asked.items() if value is not None}
    if options.tiny and (options.resume or {"steps", "batch"} & set(asked)):
        parser.error("--tiny has sizes of its own: leave --resume, --steps and --batch out")
    setting = Setting("convolution", base_width=64)._replace(**asked)
    cells_done: dict[Cell, dict] = {}
    if options.resume:
        content = json.loads(options.resume.read_text())["results"]
        setting = Setting(**content["setting"])
        for name, value in asked.items():
            if value != getattr(setting, name):
                parser.error(
                    f"{options.resume} has {name}={getattr(setting, name)!r}, not {value!r}: leave "
                    "the flag out to go on with it, or --resume to start anew"
                )
        cells_done = {Cell(c["method"], c["length"], c["width"]): c for c in content["cells"]}
    cells = plan(options.lengths, options.widths, options.methods, cells_done)
    if options.tiny:
        setting = Setting.tiny(setting.first_layer)
        cells = [Cell(method, 64, 64) for method in options.methods]
    print(f"{len(cells)} cells", flush=True)
    data: dict[int, Any] = {}
    pool = concurrent.futures.ThreadPoolExecutor(_COMPILING)
    ahead: dict[Cell, concurrent.futures.Future] = {}
    for i, cell in enumerate(cells):
        if time.perf_counter() - began > options.budget_s:
            break
        for later in map(program_of, cells[i : i + 3 * _COMPILING]):
            if later not in ahead:
                ahead[later] = pool.submit(compiled, later, setting)
        if cell.length not in data:
            data[cell.length] = jax.device_put(data_of(cell.length, setting))
        try:
            programs_of = ahead[program_of(cell)].result()
            cells_done[cell] = run_cell(cell, setting, data[cell.length], programs_of)
        except Exception as error:  # One method that fails must not lose the others.
            print(f"FAILED {cell}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        result = cells_done[cell]
        print(
            f"{cell.method:18} T={cell.length} D={cell.width}: {result['accuracy']:.3f} "
            f"({result['low']:.3f} to {result['high']:.3f}) rate {result['rate']:.1e}, "
            f"{result['steps']} steps, {result['seconds']:.1f} s", flush=True,
        )  # fmt: skip
        content = {"setting": setting._asdict(), "cells": list(cells_done.values())}
        bench.write(content, options.out / f"mqar_{setting.first_layer}.json")
    pool.shutdown(wait=False, cancel_futures=True)
    left = [cell for cell in cells if cell not in cells_done]
    print(f"{len(left)} cells left; {time.perf_counter() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
