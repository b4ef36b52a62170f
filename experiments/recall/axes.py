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
import jax.numpy as jnp
import numpy as np
import optax

from experiments.kernels import bench
from sparse_attn.data.synthetic import attention_axes, catalog
from sparse_attn.models import transformer
from sparse_attn.patterns import base as patterns_base
from sparse_attn.train import state

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
    model = transformer.Transformer(
        transformer.TransformerConfig(
            vocab_size=task.vocab_size, num_layers=1, embed_dim=32, num_heads=1, mlp_dim=64,
            pattern=pattern, block=4, impl="reference", rope_base=None, short_conv=3,
        )
    )  # fmt: skip
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 15 + 1, steps + 1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.95))
    example = jnp.zeros((1, task.length), jnp.int32)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    params = jax.jit(jax.vmap(lambda key: model.init(key, example)["params"]))(keys)
    moments = jax.vmap(optimizer.init)(params)

    def of(batches):
        drawn = [next(x) for x in batches]
        return {n: np.stack([x[n] for x in drawn]) for n in ("inputs", "targets", "weights")}

    @jax.jit
    @jax.vmap
    def step(params, moments, batch):
        _, _, grads = state.loss_and_grads(model, params, batch)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    @jax.jit
    @jax.vmap
    def accuracy(params, batch):
        logits = model.apply({"params": params}, batch["inputs"])
        right = (logits.argmax(-1) == batch["targets"]) * batch["weights"]
        return right.sum() / batch["weights"].sum()

    train = [catalog.Batches(task, split="train", seed=s, batch_size=BATCH) for s in range(SEEDS)]
    for _ in range(steps):
        params, moments = step(params, moments, of(train))
    tests = [catalog.Batches(task, split="test", seed=s, batch_size=test) for s in range(SEEDS)]
    return np.asarray(accuracy(params, of(tests)), float).tolist()


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
