"""Attention mass that selection rules keep, against density, beside the oracle; see README.md.

python -m experiments.selection.study    # trains a small model first; minutes on 2 cores
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import io
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from configs import quickstart
from experiments.kernels import bench
from sparse_attn.masks import block_mask
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import kept_mass
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import local, sinks
from sparse_attn.selection import ada_spa, base, m_inference, pbs, pooled
from sparse_attn.train import exits
from sparse_attn.train import main as train_main
from sparse_attn.viz import inspect_run

RESULTS = pathlib.Path(__file__).parent / "results"
LENGTH, BLOCK, DIM, HEADS = 1024, 32, 32, 4
DENSITIES = (0.1, 0.2, 0.4)
ORACLE = "oracle"  # The same number of blocks in each row: those with most true mass.
BOUND = "best blocks"  # As many in each row and head as serve best.
COUNTS = (0, 1, 2, 4, 8, 16)
PARTS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
# name in `selection/` -> (fields that stay, fields that are swept, each a list of equal length)
CAUSAL: dict[str, tuple[dict[str, Any], dict[str, tuple]]] = {
    ORACLE: ({}, {"top_k": COUNTS}),
    "pooled": ({}, {"top_k": COUNTS}),
    "x_attention": ({"stride": 8}, {"top_k": COUNTS}),
    "seer": ({}, {"top_k": COUNTS}),
    "sparge": ({"similarity": 0.3}, {"top_p": PARTS}),
    "flex_prefill": ({"tau": 0.3}, {"gamma": PARTS}),
    "vertical_slash": (
        {"probe": BLOCK},
        {"columns": (1, 2, 4, 8, 16, 32), "diagonals": (1, 4, 16, 32, 64, 128)},
    ),
    "m_inference": ({}, {"budget": (1, 2, 4, 8, 16)}),
    "hip": ({"always": base.DIAGONAL}, {"top_k": COUNTS[1:]}),
    "proxy": ({"group": 2}, {"gamma": PARTS}),
    "anchor": (
        {"block_kv": 1, "sink_tokens": 4, "window": 1},
        {"theta": (-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)},
    ),
    "sale": (
        {"sink_tokens": 4, "window": 1},
        {"threshold": (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)},
    ),
    "draft": ({"always": base.DIAGONAL}, {"density": (0.07, 0.1, 0.2, 0.3, 0.5)}),
    "nabla": ({"always": base.DIAGONAL}, {"top_p": PARTS}),
    "bi_former": ({"always": base.DIAGONAL}, {"top_k": COUNTS[1:]}),
    "moba": ({"block_q": 1}, {"top_k": COUNTS}),
    "moba_conv": ({"block_q": 1}, {"top_k": COUNTS}),
    "inf_llm": (
        {"block_q": 1, "kernel": 16, "stride": 8, "always": base.DIAGONAL},
        {"top_k": COUNTS},
    ),
    "pbs": ({"segment": 4 * BLOCK}, {"top_k": COUNTS}),
    "dhsa": (
        {"block_q": 1, "block_kv": 1, "length": 16},
        {"top_k": (16, 32, 64, 128, 256, 512)},
    ),
}  # fmt: skip
FULL: dict[str, tuple[dict[str, Any], dict[str, tuple]]] = {
    ORACLE: ({}, {"top_k": COUNTS[1:]}),
    "pooled": ({}, {"top_k": COUNTS[1:]}),
    "draft": ({}, {"density": (0.03, 0.1, 0.2, 0.3, 0.5)}),
    "nabla": ({}, {"top_p": PARTS}),
    "bi_former": ({}, {"top_k": COUNTS[1:]}),
    "v_moba": ({"block_q": 1}, {"top_p": PARTS}),
    "svg2": ({"q_clusters": 24, "kv_clusters": 24}, {"top_p": PARTS}),
    "hyper": ({"samples": None}, {"block_q": (32, 64, 128, 256), "block_kv": (32, 64, 128, 256)}),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Input:
    """Queries and keys to measure on, and others of the same kind to train or search with."""

    name: str
    pattern: patterns_base.Pattern
    q: jax.Array
    k: jax.Array
    other_q: jax.Array
    other_k: jax.Array


def needles(seed: int) -> tuple[jax.Array, jax.Array]:
    """Noise, in which each block of queries looks for 3 runs of 4 keys at random earlier places."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 1, LENGTH, HEADS, DIM)) * 0.5
    for head in range(HEADS):
        for row in range(1, LENGTH // BLOCK):
            direction = rng.standard_normal(DIM)
            direction /= np.linalg.norm(direction)
            q[0, row * BLOCK : (row + 1) * BLOCK, head] += 6 * direction
            for start in rng.integers(0, row * BLOCK - 3, 3):
                k[0, start : start + 4, head] += 5 * direction
    return jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32)


def topics(seed: int, *, shuffled: bool) -> tuple[jax.Array, jax.Array]:
    """16 topics in runs of 16 to 64 tokens, or in random order; tokens look for their topic."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(16, 65, LENGTH // 16)
    topic = np.repeat(rng.integers(0, 16, len(lengths)), lengths)[:LENGTH]
    topic = rng.permutation(topic) if shuffled else topic
    centres = rng.standard_normal((16, HEADS, DIM)) * 0.9
    q, k = (centres[topic] + 0.4 * rng.standard_normal((LENGTH, HEADS, DIM)) for _ in range(2))
    return jnp.asarray(q, jnp.float32)[None], jnp.asarray(k, jnp.float32)[None]


def trained(folder: pathlib.Path) -> None:
    """Trains the quickstart's dense model with rows of LENGTH bytes."""
    config = quickstart.get_config("full,small")
    config.data.context = LENGTH
    with contextlib.redirect_stdout(io.StringIO()):
        code = train_main.train(config, folder)
    if code != exits.ExitCode.FINISHED:
        raise RuntimeError(f"training ended with {code!r}")


def inputs(run: inspect_run.InspectedRun) -> Iterator[Input]:
    """The four inputs; of the trained model, a layer near the middle."""
    yield Input("needles", base.CAUSAL, *needles(0), *needles(1))
    coherent = (topics(seed, shuffled=False) for seed in (0, 1))
    yield Input("topics in runs", base.CAUSAL, *(x for pair in coherent for x in pair))
    layer, text = len(run.model.config.layer_patterns()) // 2, inspect.getsource(argparse)
    found = [run.attend_to(text[i * LENGTH * 8 :][: 2 * LENGTH]) for i in range(2)]
    yield Input(
        "trained model", base.CAUSAL,
        *(jnp.asarray(x[layer])[None] for a in found for x in (a.queries, a.keys)),
    )  # fmt: skip
    shuffled = (topics(seed, shuffled=True) for seed in (0, 1))
    yield Input("topics, shuffled", base.EVERYTHING, *(x for pair in shuffled for x in pair))


def made(name: str, given: Input, fields: dict[str, Any]) -> Any:
    """The rule with these fields; what it trains or searches it gets from the other input."""
    fields = {"block_q": BLOCK, "block_kv": BLOCK, "pattern": given.pattern} | fields
    if name == "m_inference":
        budget, blocks = fields.pop("budget"), {n: fields[n] for n in ("block_q", "block_kv")}
        search = patterns_base.find("vertical_slash", "sparse_attn.selection")
        candidates = (
            local.Local(window=BLOCK * budget) | sinks.Sinks(tokens=4),
            search(**blocks, columns=budget, diagonals=4 * budget, probe=BLOCK),
            pooled.Pooled(**blocks, top_k=budget),
        )
        return m_inference.search(given.other_q, given.other_k, candidates)
    if name == ORACLE:
        always = base.DIAGONAL if given.pattern.causal else None
        return ada_spa.AdaSpa(**fields, always=always)
    if name == "pooled" and not given.pattern.causal:
        fields["always"] = None
    return patterns_base.find(name, "sparse_attn.selection")(**fields)


@functools.partial(jax.jit, static_argnums=0)
def select(rule: base.Selector, q, k, params):
    return rule.select(q, k, params=params)


def distilled(rule: Any, given: Input, steps: int = 60) -> dict[str, jax.Array]:
    """The gate of `seer` after some steps of Adam on the other input."""
    import optax  # Only here: nothing else of the study trains.

    heads, kv_heads, dim = given.q.shape[2], given.k.shape[2], given.q.shape[3]
    gate = jax.tree.map(jnp.asarray, rule.params_like(heads, kv_heads, dim))
    optimizer = optax.adam(0.01)

    @jax.jit
    def step(gate, state):
        grads = jax.grad(rule.distillation_loss)(gate, given.other_q, given.other_k)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(gate, updates), state

    state = optimizer.init(gate)
    for _ in range(steps):
        gate, state = step(gate, state)
    return gate


def measure(name: str, rule: Any, given: Input, params: Any) -> tuple[float, float]:
    """(visible pairs / dense pairs, mean part of the dense mass of a query) of a rule."""
    q, k = given.q, given.k
    if isinstance(rule, base.OwnAttention):
        return by_lse(rule, given)
    mask = select(rule, q, k, params)
    kept = kept_mass.kept_mass(q, k, mask, dense=given.pattern, num_queries=LENGTH)
    return pairs(mask) / dense_pairs(given), float(kept.mean())


def by_lse(rule: base.OwnAttention, given: Input) -> tuple[float, float]:
    """`measure` for rules without a mask: mass from the lse, pairs from what they say of it."""
    q, k = given.q, given.k
    _, lse = jax.jit(lambda q, k: rule.attend(q, k, k, return_lse=True))(q, k)
    _, dense = attend_lib.attend(q, k, k, mask=given.pattern, return_lse=True)
    name = type(rule).__name__
    if name == "Hyper":
        seen = LENGTH * rule.block_q
    elif name == "Svg2":
        seen = pairs(rule.plan(q, k)[2])
    elif name == "Dhsa":
        seen = float((rule.lists(q, k) >= 0).sum((1, 3)).mean())
    else:
        order = rule.key_order(q, k)
        heads = q.shape[2]
        far = rule.blocks_rule.select(pbs.fold(q), pbs.moved(k, order, heads))
        seen = pairs(far) + LENGTH * (rule.segment + 1) / 2
    return seen / dense_pairs(given), float(jnp.exp(lse - dense).mean())


def dense_pairs(given: Input) -> float:
    return LENGTH * (LENGTH + 1) / 2 if given.pattern.causal else float(LENGTH**2)


def pairs(mask: block_mask.BlockMask) -> float:
    """Visible pairs of tokens, the mean over tables."""
    position = np.arange(LENGTH, dtype=np.int32)
    seen = np.asarray(mask.rule(0).mask_fn(position[:, None], position[None]))
    seen = np.broadcast_to(seen, (LENGTH, LENGTH))
    tiles = seen.reshape(mask.num_rows, mask.block_q, mask.num_cols, mask.block_kv).sum((1, 3))
    listed = [
        block_mask.block_states(mask, batch=b, table=u) > 0
        for b in range(mask.batch)
        for u in range(mask.num_tables)
    ]
    return float(np.mean([(tiles * x).sum() for x in listed]))


def curve(name: str, given: Input, spec: tuple[dict, dict]) -> dict[str, Any]:
    """All points of one rule on one input, by density."""
    fixed, swept = spec
    points, params = [], None
    for i in range(len(next(iter(swept.values())))):
        now = {field: values[i] for field, values in swept.items()}
        rule = made(name, given, fixed | now)
        if name == "seer":
            params = distilled(rule, given) if params is None else params
        elif isinstance(rule, base.Selector):
            params = rule.params_like(given.q.shape[2], given.k.shape[2], given.q.shape[3])
        density, recall = measure(name, rule, given, params)
        points.append({"fields": now, "density": density, "recall": recall})
    points.sort(key=lambda p: p["density"])
    return {"input": given.name, "rule": name, "points": points}


def recall_at(points: list[dict], density: float) -> float | None:
    """Linear between the measured points on both sides of a density; None outside of them."""
    x, y = ([p[key] for p in points] for key in ("density", "recall"))
    return float(np.interp(density, x, y)) if x[0] <= density <= x[-1] else None


def table(results: list[dict]) -> str:
    """Markdown: recall of each rule at some densities, for each input."""
    names = list(dict.fromkeys(r["input"] for r in results))
    parts = []
    for name in names:
        mine = [r for r in results if r["input"] == name]
        rows = []
        for r in sorted(mine, key=lambda r: -(recall_at(r["points"], DENSITIES[1]) or 0)):
            row = {"rule": r["rule"]}
            for density in DENSITIES:
                value = recall_at(r["points"], density)
                row[f"at {density:.0%}"] = "-" if value is None else f"{value:.3f}"
            low, high = (r["points"][i]["density"] for i in (0, -1))
            rows.append(row | {"densities measured": f"{low:.1%} to {high:.1%}"})
        parts.append(f"### {name}\n\n{bench.table(rows)}\n")
    return "\n".join(parts)


def plot(results: list[dict], path: pathlib.Path) -> None:
    """One panel per input: recall against density, oracle and bound thick and black."""
    from matplotlib import figure

    names = list(dict.fromkeys(r["input"] for r in results))
    rules = [r for r in dict.fromkeys(r["rule"] for r in results) if r not in (ORACLE, BOUND)]
    picture = figure.Figure(figsize=(13, 10), layout="constrained")
    panels = picture.subplots(2, 2, sharey=True).ravel()
    for axes, name in zip(panels, names, strict=False):
        for r in (r for r in results if r["input"] == name):
            x, y = ([p[key] for p in r["points"]] for key in ("density", "recall"))
            if r["rule"] in (ORACLE, BOUND):
                style = "k-o" if r["rule"] == ORACLE else "k--"
                axes.plot(x, y, style, linewidth=2.2, markersize=4, label=r["rule"])
                continue
            i = rules.index(r["rule"])
            style = ("-", "--", ":")[i // 10]
            axes.plot(x, y, style, color=f"C{i % 10}", marker=".", linewidth=1.2, label=r["rule"])
        axes.set(title=name, xlabel="visible pairs / dense pairs", xlim=(0, 0.6), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("part of the attention mass kept")
    panels[2].set_ylabel("part of the attention mass kept")
    by_label = {
        label: line for axes in panels
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }  # fmt: skip
    picture.legend(by_label.values(), by_label.keys(), loc="outside right upper", frameon=False)
    picture.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=pathlib.Path, help="a finished run of that model; no training"
    )
    folder = parser.parse_args(argv).run
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = pathlib.Path(scratch, "run")
            trained(folder)
        run = inspect_run.load_for_inspection(folder)
        if run.config["data"]["context"] != LENGTH:
            raise ValueError(f"--run={folder} must have data.context={LENGTH}")
        given = list(inputs(run))
    kept = ("pattern", "steps", "params", "eval_loss")
    model = {key: run.summary[key] for key in kept if key in run.summary}
    print(f"trained: {model}", flush=True)
    results = []
    for each in given:
        results.append(best_blocks(each))
        for name, spec in (CAUSAL if each.pattern.causal else FULL).items():
            results.append(curve(name, each, spec))
            ends = [results[-1]["points"][i] for i in (0, -1)]
            text = " to ".join(f"{p['recall']:.3f} at {p['density']:.1%}" for p in ends)
            print(f"{each.name}, {name}: {text}", flush=True)
    settings = {"length": LENGTH, "block": BLOCK, "model": model}
    bench.write({"settings": settings, "curves": results}, RESULTS / "recall.json")
    (RESULTS / "recall.md").write_text(table(results))
    plot(results, RESULTS / "recall.png")
    print(f"\n{table(results)}\nwritten to {RESULTS}")
    return 0 if none_is_above_the_bound(results) else 1


def best_blocks(given: Input) -> dict[str, Any]:
    """The most that any mask of whole blocks in place keeps, whatever its rows and heads hold.

    Blocks in the order of true mass per visible pair; between two points a part of a block counts,
    so that no choice of blocks can be above the line.
    """
    rule = ada_spa.AdaSpa(block_q=BLOCK, block_kv=BLOCK, pattern=given.pattern, top_k=1)
    masses = np.asarray(rule.masses(given.q, given.k), np.float64)[0] * BLOCK / LENGTH
    position = np.arange(LENGTH, dtype=np.int32)
    seen = given.pattern.mask_fn(position[:, None], position[None])
    tiles = np.broadcast_to(seen, (LENGTH, LENGTH)).reshape(-1, BLOCK, LENGTH // BLOCK, BLOCK)
    sizes = np.broadcast_to(tiles.sum((1, 3)) / dense_pairs(given), masses.shape)
    order = np.argsort(-(masses / np.maximum(sizes, 1e-30)).ravel(), kind="stable")
    density, recall = (np.cumsum(x.ravel()[order]) / len(masses) for x in (sizes, masses))
    at = np.unique(np.round(np.geomspace(1, (sizes > 0).sum(), 120)).astype(int)) - 1
    points = [{"density": float(density[i]), "recall": float(recall[i])} for i in at]
    return {
        "input": given.name,
        "rule": BOUND,
        "points": [{"density": 0.0, "recall": 0.0}, *points],
    }


def none_is_above_the_bound(results: list[dict]) -> bool:
    """Whether no rule that chooses whole blocks in place keeps more than `best_blocks`.

    Between two points of the stored line the true one is a little above it: 0.005 are allowed.
    """
    finer = {"moba", "moba_conv", "inf_llm", "v_moba", "anchor", "pbs", "svg2", "hyper", "dhsa"}
    good = True
    for r in results:
        best = next(x for x in results if x["input"] == r["input"] and x["rule"] == BOUND)
        for p in r["points"] if r["rule"] not in finer else ():
            limit = recall_at(best["points"], min(p["density"], 1.0))
            if limit is None or p["recall"] > limit + 0.005:
                print(f"{r['input']}, {r['rule']}: {p} is above the bound, {limit}")
                good = False
    return good


if __name__ == "__main__":
    sys.exit(main())
