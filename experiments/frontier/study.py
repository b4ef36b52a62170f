"""Sparse attention put into models that were trained dense, by size, task, length, density.

python -m experiments.frontier.study [--out DIR] [--work DIR]    # minutes, see README.md

The protocol of [arXiv:2504.17768] with models of thousands of parameters. Trained models are kept
in WORK and finished cells in OUT/frontier.json, so a command that was stopped goes on.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.frontier import report
from experiments.kernels import bench
from experiments.recall import side_by_side
from sparse_attn.data.synthetic import catalog
from sparse_attn.masks import block_mask
from sparse_attn.models import attention, transformer
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import causal, local, sinks
from sparse_attn.selection import base as selection_base
from sparse_attn.train import flops, state

RESULTS = pathlib.Path(__file__).parent / "results"
VOCAB, BLOCK = 128, 4
TASKS = {
    "needle": "needle(vocab_size={v}, length={t})",
    "mqar": "mqar(vocab_size={v}, length={t}, num_pairs=8)",
    "variable_tracking": "variable_tracking(vocab_size={v}, length={t}, hops=2)",
}
RULES = ("window and sinks", "vertical_slash", "pooled", "moba", "oracle")
DENSE, DENSE_PATTERN = "dense", causal.Causal()


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all cells of one results file share."""

    sizes: tuple[int, ...] = (12, 14, 16, 32)  # embed_dim, and that of the one head
    lengths: tuple[int, ...] = (48, 96)  # tested; trained is the last
    budgets: tuple[int, ...] = (8, 16, 32)  # tokens that a query may see, about
    seeds: int = 3  # of the weights and the training rows; test rows are the same
    steps: int = 400
    batch: int = 32
    test: int = 256
    rate: float = 1e-2

    @classmethod
    def tiny(cls) -> "Setting":
        """For tests: seconds on a CPU."""
        return cls(sizes=(8,), lengths=(32,), budgets=(8,), seeds=2, steps=2, batch=2, test=4)


def model_of(size: int, pattern: Any = DENSE_PATTERN) -> transformer.Transformer:
    """Two layers behind short convolutions, no positions: rows may have any length.

    >>> model_of(8).config.num_layers
    2
    """
    return transformer.Transformer(
        transformer.TransformerConfig(
            vocab_size=VOCAB, num_layers=2, embed_dim=size, num_heads=1, mlp_dim=2 * size,
            pattern=pattern, block=BLOCK, impl="reference", rope_base=None, short_conv=3,
        )
    )  # fmt: skip


def rule_of(name: str, budget: int) -> Any:
    """The pattern or selector of about `budget` tokens a query.

    >>> rule_of("window and sinks", 16)
    Or(a=Local(window=12, reach=None), b=Sinks(tokens=4))
    """
    if name == DENSE:
        return DENSE_PATTERN
    if name == "window and sinks":
        return local.Local(window=budget - BLOCK) | sinks.Sinks(tokens=BLOCK)
    fields = {"block_kv": BLOCK, "pattern": patterns_base.parse("causal()")}
    if name != "moba":
        fields["block_q"] = BLOCK
    if name == "vertical_slash":  # A diagonal crosses two blocks of a row, a column one.
        lines = budget // (3 * BLOCK) + 1
        fields |= {"columns": lines, "diagonals": lines, "probe": 2 * BLOCK}
    else:
        fields["top_k"] = budget // BLOCK - 1  # Beside the diagonal.
    if name == "oracle":
        name, fields["always"] = "ada_spa", selection_base.DIAGONAL
    return patterns_base.find(name, "sparse_attn.selection")(**fields)


def task_of(name: str, length: int) -> Any:
    return catalog.parse(TASKS[name].format(v=VOCAB, t=length))


def batches(length: int, size: int, *, split: str, seed: int = 0) -> Any:
    """Endless batches `[tasks, rows, T]` of all tasks."""
    return side_by_side.batches(
        [
            catalog.Batches(task_of(name, length), split=split, seed=seed, batch_size=size)
            for name in TASKS
        ]
    )


def train(size: int, setting: Setting, seed: int) -> Any:
    """Parameters `[tasks, ...]` of one dense model per task, trained side by side."""
    length = setting.lengths[-1]
    return side_by_side.train(
        model_of(size),
        jax.random.split(jax.random.key(size + 1000 * seed), len(TASKS)),
        batches(length, setting.batch, split="train", seed=seed),
        length=length, steps=setting.steps, rate=setting.rate,
    )  # fmt: skip


def trained(size: int, setting: Setting, seed: int, work: pathlib.Path) -> Any:
    """Parameters from WORK, or trained and put there."""
    path = work / f"{size}_{setting.lengths[-1]}_{setting.steps}_{setting.batch}_{seed}.npz"
    if not path.exists():
        params = train(size, setting, seed)
        work.mkdir(parents=True, exist_ok=True)
        np.savez(path, *jax.tree.leaves(params))
    example = jnp.zeros((1, setting.lengths[-1]), jnp.int32)
    shapes = jax.eval_shape(model_of(size).init, jax.random.key(0), example)["params"]
    with np.load(path) as arrays:
        leaves = [jnp.asarray(arrays[f"arr_{i}"]) for i in range(len(arrays.files))]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def share_of(mask: block_mask.BlockMask) -> jax.Array:
    """Causal pairs in the listed blocks of a run-time mask / all causal pairs, mean of tables."""
    lists = mask.kv_indices.reshape(*mask.kv_counts.shape, -1)
    kept = (lists[..., None] == jnp.arange(mask.num_cols)).any(-2)
    rows, columns = (jnp.arange(n) * b for n, b in (
        (kept.shape[-2], mask.block_q), (kept.shape[-1], mask.block_kv),
    ))  # fmt: skip
    ahead = rows[:, None] + jnp.arange(mask.block_q) + 1  # Keys that each query of a row may see.
    pairs = jnp.clip(ahead[:, None] - columns[:, None], 0, mask.block_kv).sum(-1)
    return (jnp.where(kept, pairs, 0).sum((-2, -1)) / pairs.sum()).mean()


def measure(
    model: transformer.Transformer, models: list[Any], data: Any
) -> tuple[np.ndarray, float]:
    """Accuracies `[tasks, seeds]`, and the density: visible pairs / causal pairs, mean of layers.

    `models` are the parameters of each seed.
    """
    pattern, length = model.config.pattern, data["inputs"].shape[-1]
    counted = isinstance(pattern, selection_base.Selector) and not hasattr(pattern, "top_k")

    def keep(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.method_name == "_mask" and isinstance(context.module, attention.SelfAttention):
            context.module.sow("intermediates", "share", share_of(out))
        return out

    @jax.jit
    @jax.vmap
    def run(params, batch):
        inputs = {"params": params}, batch["inputs"]
        if counted:
            with nn.intercept_methods(keep):
                logits, kept = model.apply(*inputs, mutable=["intermediates"])
            share = jnp.stack(jax.tree.leaves(kept)).mean()
        else:
            logits, share = model.apply(*inputs), 0.0
        return side_by_side.accuracy(logits, batch), share

    accuracies, shares = zip(*(run(params, data) for params in models), strict=True)
    by_task = np.stack(accuracies, 1).astype(float)
    if counted:
        return by_task, float(np.mean(shares))
    cost = flops.attention_cost(model.config, context=length, batch_size=1)
    return by_task, cost["token_density"] * 2 * length / (length + 1)


def forward_flops(model: transformer.Transformer, params: int, length: int, density: float):
    """FLOPs of a row: 2 per parameter and token, 4 per visible pair and dimension and layer.

    >>> forward_flops(model_of(8), 1000, 3, 0.5)  # 3 of 6 causal pairs
    6192.0
    """
    config = model.config
    pairs = density * length * (length + 1) / 2
    each = 4 * config.num_heads * config.head_dim * config.num_layers
    return float(2 * params * length + each * pairs)


def plan(setting: Setting) -> list[tuple[int, int, str, int | None]]:
    """(size, length, rule, budget) of all cells; dense first."""
    rules = [(DENSE, None), *((r, b) for r in RULES for b in setting.budgets)]
    return [(s, t, *rule) for s in setting.sizes for t in setting.lengths for rule in rules]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/frontier"))
    parser.add_argument("--tiny", action="store_true", help="a model of seconds, to see it run")
    options = parser.parse_args(argv)
    setting, path = Setting.tiny() if options.tiny else Setting(), options.out / "frontier.json"
    content = {"setting": json.loads(json.dumps(dataclasses.asdict(setting))), "cells": []}
    if path.exists():
        before = json.loads(path.read_text())["results"]
        if before["setting"] != content["setting"]:
            raise ValueError(f"{path} is of another setting; move it away, or give another --out")
        content = before
    done = {(c["size"], c["length"], c["rule"], c["budget"]) for c in content["cells"]}
    loaded, data = {}, {}
    for cell in plan(setting):
        size, length, name, budget = cell
        if cell in done:
            continue
        began = time.perf_counter()
        if size not in loaded:
            seeds = range(setting.seeds)
            loaded = {size: [trained(size, setting, seed, options.work) for seed in seeds]}
            print(f"size {size}: trained, {time.perf_counter() - began:.0f} s", flush=True)
        if length not in data:
            data[length] = next(batches(length, setting.test, split="test"))
        model = model_of(size, rule_of(name, budget or 0))
        count = state.num_params(loaded[size][0]) // len(TASKS)
        by_task, density = measure(model, loaded[size], data[length])
        content["cells"] += [
            {
                "size": size, "params": count, "length": length, "rule": name, "budget": budget,
                "task": task, "accuracy": float(seeds.mean()), "by_seed": seeds.tolist(),
                "chance": task_of(task, length).chance,
                "density": density, "flops": forward_flops(model, count, length, density),
            }
            for task, seeds in zip(TASKS, by_task, strict=True)
        ]  # fmt: skip
        bench.write(content, path)
        told = ", ".join(f"{t} {a:.2f}" for t, a in zip(TASKS, by_task.mean(1), strict=True))
        print(f"{size} {length} {name} {budget}: density {density:.2f}, {told}", flush=True)
    return report.main(["--results", str(path)])


if __name__ == "__main__":
    sys.exit(main())
