"""Densities and bounds of the speed-up of every pattern at one common setting; see README.md.

python -m experiments.pattern_table.study    # about 2 minutes on 2 cores
"""

import dataclasses
import importlib
import itertools
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Lists are made on the host: ask for no device.

from experiments.kernels import bench
from sparse_attn import patterns
from sparse_attn.masks import curves, grids, lower, reorder, stats
from sparse_attn.patterns import (
    ancestors,
    base,
    causal,
    full,
    joint,
    neighborhood,
    per_layer,
    permuted,
    segmented,
)
from sparse_attn.viz import tables

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parents[1] / "docs" / "patterns.md"

BLOCK = 64  # tokens, of queries and of keys
LENGTH = 16384  # tokens: of a sequence, of an image of 128 x 128, of a video of 16 x 32 x 32
SHAPES = {1: (LENGTH,), 2: (128, 128), 3: (16, 32, 32)}

# Each pattern at about one window: 1024 tokens of a sequence, 32 x 32 or 33 x 33 tokens of an
# image, 9 x 17 x 17 (or 8 x 16 x 16) of a video. Patterns without a line here are found by their
# module and enter with their first example, on the grid of the same number of axes.
CASES = (
    "full()",
    "causal()",
    "prefix(tokens=1024)",
    "local(window=1024)",
    "local(reach=(512, 512))",
    "local(window=1024) | sinks(tokens=64)",
    "sinks(tokens=64)",
    "global_tokens(tokens=64)",
    "dilated(window=1024, dilation=4)",
    "strided(stride=128, part='row')",
    "strided(stride=128, part='column')",
    "fixed(stride=128, part='block')",
    "fixed(stride=128, part='summary', summary_tokens=8)",
    "chunked(size=1024)",
    "random_blocks(block=64, num_blocks=16)",
    "block_local(size=512)",
    "shifted_groups(size=1024, shift=512)",
    "sharded(size=64, stride=16, shard=0, local_blocks=4)",
    "elastic_window(alpha=512, beta=0.03125, length=16384)",
    "retrieval_heads((True, False, False, False), window=1024, sink_tokens=64)",
    "combiner(size=128)",
    "per_head((local(window=1024), causal()))",
    "per_layer((local(window=1024), local(window=1024), local(window=1024), causal()))",
    "neighborhood((128, 128), 33)",
    "neighborhood((128, 128), 33, stride=16)",
    "neighborhood((128, 128), 33, dilation=3)",
    "neighborhood((16, 32, 32), (9, 17, 17))",
    "neighborhood((16, 32, 32), (8, 16, 16), stride=(4, 4, 4))",
    "swin((128, 128), 32)",
    "swin((128, 128), 32, 16)",
    "swin((16, 32, 32), (8, 16, 16), (4, 8, 8))",
    "halo((128, 128), 16, 8)",
    "axial((128, 128), (1,)) | axial((128, 128), (0,))",
    "axial((16, 32, 32), (0,))",
    "block_grid((128, 128), block=32)",
    "block_grid((128, 128), grid=32)",
    "circular((128, 128), 18)",
    "joint(swin((128, 128), 32), tokens=64)",
    "cross_grid((128, 128), (32, 32), reach=4)",
    "radial((16, 1024))",
    "frame_tiles((16, 32, 32), references=2)",
)

# Keys of patterns whose keys are summaries: one per block of `size` tokens.
KEYS = {"combiner(size=128)": LENGTH // 128}

# What is no pattern of its own: `permuted` is the reordering that the table applies.
LEFT_OUT = ("permuted",)

# The neighbourhoods whose executed / useful pairs are reported, from small to large.
NEIGHBORHOODS = (
    ((128, 128), 7),
    ((128, 128), 13),
    ((128, 128), 17),
    ((128, 128), 25),
    ((128, 128), 33),
    ((16, 32, 32), (5, 9, 9)),
    ((16, 32, 32), (9, 9, 9)),
    ((16, 32, 32), (5, 17, 17)),
    ((16, 32, 32), (9, 17, 17)),
)


def cases() -> list[Any]:
    """The patterns of `CASES`, and an example of every other pattern that there is."""
    known = [
        *map(patterns.parse, CASES),
        segmented.block_rank(512, [960] * 16, 512),
        ancestors.shared_prefix(8192, [1024] * 8),
    ]
    return known + [_on_common_grid(x) for x in examples_of_others(known, LEFT_OUT)]


def examples_of_others(known: Sequence[Any], left_out: Sequence[str] = ()) -> list[Any]:
    """The first example of every pattern that is in none of the `known` ones."""
    used = {type(x).__module__.rsplit(".", 1)[-1] for case in known for x in leaves(case)}
    names = [name for name in base.discover() if name not in {*used, *left_out}]
    return [importlib.import_module(f"sparse_attn.patterns.{name}").EXAMPLES[0] for name in names]


def leaves(pattern) -> Iterator[Any]:
    """The pattern and all patterns it is made of."""
    yield pattern
    if dataclasses.is_dataclass(pattern):
        for field in dataclasses.fields(pattern):
            value = getattr(pattern, field.name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, base.Expression):
                    yield from leaves(part)


def _on_common_grid(example):
    if isinstance(example, grids.GridPattern) and example.shape == example.kv_shape:
        return dataclasses.replace(example, shape=SHAPES[len(example.shape)])
    return example


def orders(pattern) -> list[reorder.Reordering]:
    """Orders that may bring the tokens of a pattern together, besides the order it has.

    On grids: tiles of `BLOCK` tokens in all shapes, orders of the axes, dilation groups, Hilbert
    curves. On sequences: the residue classes of a dilation or a stride.
    """
    on_grid = [x for x in leaves(pattern) if isinstance(x, grids.GridPattern)]
    if any(x.shape != x.kv_shape for x in on_grid):
        return []  # Queries and keys stand in orders of their own.
    if not on_grid:
        steps = {getattr(x, name, 1) for x in leaves(pattern) for name in ("dilation", "stride")}
        return [reorder.Tiles((LENGTH,), dilation=step) for step in sorted(steps - {1})]
    shape = on_grid[0].shape
    steps = {tuple(x.period(i) for i in range(len(shape))) for x in on_grid if hasattr(x, "period")}
    steps = sorted(step for step in steps if max(step) > 1)
    found = [reorder.Tiles(shape, axes=a) for a in itertools.permutations(range(len(shape)))][1:]
    found += [reorder.Tiles(shape, dilation=step) for step in steps]
    for step in (None, *steps):
        found += [reorder.Tiles(shape, tile, dilation=step) for tile in _tiles(shape)]
    return found + ([curves.Hilbert(shape)] if len(shape) == 2 else [])


def _tiles(shape):
    sides = [2**i for i in range(BLOCK.bit_length())]
    for tile in itertools.product(sides, repeat=len(shape)):
        if math.prod(tile) == BLOCK and all(t <= n for t, n in zip(tile, shape, strict=True)):
            yield tile


def lengths(pattern) -> tuple[int, int]:
    """Tokens of queries and of keys at the common setting."""
    prefix = pattern.tokens if isinstance(pattern, joint.Joint) else 0
    if isinstance(pattern, grids.GridPattern):
        return math.prod(pattern.shape), math.prod(pattern.kv_shape)
    return LENGTH + prefix, KEYS.get(pattern.expression(), LENGTH + prefix)


def block_mask(pattern, order: reorder.Reordering | None = None):
    """The block lists at the common setting, of tokens in `order`."""
    q_len, kv_len = lengths(pattern)
    moved = pattern if order is None else permuted.permute(pattern, order)
    return lower.lower(moved, q_len=q_len, kv_len=kv_len, block_q=BLOCK, block_kv=BLOCK)


def active_blocks(mask) -> float:
    """Active blocks per head."""
    heads = stats.heads_of_tables(mask)
    return float(mask.kv_counts[0].sum(-1) @ heads) / sum(heads)


def measure(pattern) -> dict[str, Any]:
    """One row: densities in the order that the pattern has and in the best one, and the bound."""
    if isinstance(pattern, per_layer.PerLayer):
        return _mean([measure(p) for p in pattern.patterns]) | {"pattern": pattern.expression()}
    q_len, kv_len = lengths(pattern)
    counted = stats.of(block_mask(pattern))
    blocks = {None: counted.active_blocks}
    blocks |= {order: active_blocks(block_mask(pattern, order)) for order in orders(pattern)}
    best = min(blocks, key=blocks.get)
    dense = causal.Causal() if pattern.causal else full.Full()
    dense = lower.lower(dense, q_len=q_len, kv_len=kv_len, block_q=BLOCK, block_kv=BLOCK)
    return {
        "pattern": pattern.expression(),
        "causal": pattern.causal,
        "queries": q_len,
        "keys": kv_len,
        "token_density": counted.token_density,
        "block_density": counted.block_density,
        "best_order": None if best is None else describe(best),
        "best_block_density": counted.block_density * blocks[best] / blocks[None],
        "speed_up_bound": active_blocks(dense) / blocks[best],
    }


def _mean(rows):
    """The row of a schedule of layers; work adds up, so that bounds are averaged inversely."""
    mean = {
        key: sum(row[key] for row in rows) / len(rows)
        for key in ("token_density", "block_density", "best_block_density")
    }
    bound = len(rows) / sum(1 / row["speed_up_bound"] for row in rows)
    return rows[0] | mean | {"speed_up_bound": bound, "causal": all(r["causal"] for r in rows)}


def describe(order: reorder.Reordering) -> str:
    """An order in a few words.

    >>> describe(reorder.Tiles((8, 8), (2, 4), dilation=2))
    'groups 2x2, tiles 2x4'
    >>> describe(reorder.Tiles((8, 8), axes=(1, 0)))
    'axes 1, 0'
    """
    if isinstance(order, curves.Hilbert):
        return "Hilbert curve"
    by = {name: "x".join(map(str, getattr(order, name) or ())) for name in ("dilation", "tile")}
    words = [f"{word} {by[name]}" for name, word in (("dilation", "groups"), ("tile", "tiles"))
             if by[name]]  # fmt: skip
    if order.axes:
        words.append(f"axes {', '.join(map(str, order.axes))}")
    return ", ".join(words)


def neighbourhood_rows() -> list[dict[str, Any]]:
    """Executed over useful pairs of the neighbourhoods, row by row and in the best tiles."""
    rows = []
    for shape, kernel in NEIGHBORHOODS:
        row = measure(neighborhood.Neighborhood(shape, kernel))
        sides = kernel if isinstance(kernel, tuple) else (kernel,) * len(shape)
        rows.append(
            {
                "grid": "x".join(map(str, shape)),
                "kernel": "x".join(map(str, sides)),
                "row_major": row["block_density"] / row["token_density"],
                "order": row["best_order"],
                "reordered": row["best_block_density"] / row["token_density"],
            }
        )
    return rows


def page(results: dict[str, Any]) -> str:
    """docs/patterns.md from the contents of the results file."""
    rows = [
        (
            f"`{row['pattern']}`",
            "causal" if row["causal"] else "all",
            f"{row['token_density']:.4f}",
            f"{row['block_density']:.4f}",
            row["best_order"] or "as it is",
            f"{row['best_block_density']:.4f}",
            f"{row['best_block_density'] / row['token_density']:.2f}",
            f"{row['speed_up_bound']:.1f}",
        )
        for row in results["patterns"]
    ]
    header = ("pattern", "keys", "token density", "block density", "best order",
              "block density in it", "executed / useful", "bound of the speed-up")  # fmt: skip
    near = [
        (
            r["grid"],
            r["kernel"],
            f"{r['row_major']:.2f}",
            r["order"] or "as it is",
            f"{r['reordered']:.2f}",
        )
        for r in results["neighbourhoods"]
    ]
    near_header = ("grid", "kernel", "row by row", "best order", "in it")
    text = (HERE / "page.md").read_text()
    return text.format(
        block=BLOCK,
        length=LENGTH,
        patterns=tables.markdown(header, rows),
        neighbourhoods=tables.markdown(near_header, near),
    )


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """One line per pattern: token density, block density, and block density in the best order."""
    from matplotlib import pyplot

    rows = sorted(rows, key=lambda row: row["best_block_density"])
    figure, axis = pyplot.subplots(figsize=(10, 0.24 * len(rows) + 1), layout="constrained")
    at = range(len(rows))
    for key, marker, label in (
        ("block_density", "o", "block density"),
        ("best_block_density", "D", "block density in the best order"),
        ("token_density", "|", "token density"),
    ):
        axis.scatter([row[key] for row in rows], at, marker=marker, s=28, label=label)
    for y, row in enumerate(rows):
        axis.plot([row["token_density"], row["block_density"]], [y, y], color="gray", linewidth=0.6)
    names = [
        row["pattern"] if len(row["pattern"]) < 72 else row["pattern"][:69] + "..." for row in rows
    ]
    axis.set_yticks(at, names, fontsize=6.5, family="monospace")
    axis.set(xscale="log", xlabel=f"density, blocks of {BLOCK} x {BLOCK} tokens")
    axis.margins(y=0.01)
    axis.grid(axis="x", linewidth=0.3)
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> int:
    rows = []
    for pattern in cases():
        rows.append(measure(pattern))
        print("{pattern}: {token_density:.4f}, {best_block_density:.4f}".format(**rows[-1]))
    results = {"patterns": rows, "neighbourhoods": neighbourhood_rows()}
    bench.write(results, RESULTS / "pattern_table.json")
    plot(rows, RESULTS / "pattern_table.png")
    PAGE.write_text(page(results))
    print(f"written to {RESULTS} and {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
