"""What packing queries would cost beside keeping keys still, counted on lists of blocks.

    python -m experiments.selection.packing [--out DIR] [--tokens N]    # a minute on one core

Two ways to attend to one list per query: a program has a tile of neighbouring queries and visits
every block that any of them lists, hiding it from the others (packing); or it has a block and
visits the queries that list it (`by_block`, `triton_gpu`: keys stay). Counted are the products of
both, as multiples of those that the lists ask for, and the reads of a block of keys per listed
block. Lists are those of native sparse attention at the paper's sizes, of random arrays and of
arrays whose neighbours look for the same topic.
"""

import argparse
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels import bench
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops.token_select import compress, plan

RESULTS = pathlib.Path(__file__).parent / "results"
GROUP, DIM, BLOCK, TOP_K = 16, 32, 64, 16  # Query heads of a KV head, their dimension.
STRIDES = compress.Strides(size=32, stride=16)
TILES = (1, 4, 8, 16, 64)  # Queries; 4 of 16 heads are the 64 rows that a Hopper product has.


def arrays(kind: str, length: int) -> tuple[jax.Array, jax.Array]:
    """q `[1, T, GROUP, DIM]`, k `[1, T, 1, DIM]`: "random", or "topics" in runs of 16 to 64."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((length, n, DIM)) for n in (GROUP, 1))
    if kind == "topics":
        runs = rng.integers(16, 65, length // 16)
        topic = np.repeat(rng.integers(0, 64, len(runs)), runs)[:length]
        centres = 1.5 * rng.standard_normal((64, 1, DIM))[topic]
        q, k = centres + 0.5 * q, centres + 0.5 * k
    return jnp.asarray(q, jnp.float32)[None], jnp.asarray(k, jnp.float32)[None]


def lists_of(q: jax.Array, k: jax.Array) -> np.ndarray:
    """The blocks `[T, TOP_K]` of each query, -1 = none."""
    keys = STRIDES.windows(k).mean(2)
    _, lse = attend_lib.attend(q, keys, keys, mask=STRIDES, return_lse=True, impl="xla")
    chosen = compress.choose_blocks(q, keys, lse, strides=STRIDES, block=BLOCK, top_k=TOP_K)
    return np.asarray(chosen[0, :, 0])


def packed(lists: np.ndarray, queries: int) -> tuple[float, float]:
    """Products and block reads of tiles of `queries`, as multiples of what the lists ask for.

    >>> packed(np.array([[0, 1], [1, 2], [3, -1], [3, 4]]), 2)
    (1.4285714285714286, 0.7142857142857143)
    """
    listed = (lists >= 0).sum()
    tiles = lists.reshape(-1, queries * lists.shape[1])
    union = sum(len(np.unique(tile[tile >= 0])) for tile in tiles)
    return float(queries * union / listed), float(union / listed)


def by_block(lists: np.ndarray, queries: int, blocks: int) -> tuple[float, float]:
    """As `packed`, of tiles of `queries` entries that list the same block.

    >>> by_block(np.array([[0, 1], [1, 2], [3, -1], [3, 4]]), 2, 5)
    (1.4285714285714286, 0.7142857142857143)
    """
    listed = (lists >= 0).sum()
    found = plan.plan(jnp.asarray(lists)[None, :, None], tile=queries, blocks=blocks)
    tiles = int(found.counts.sum())
    return float(queries * tiles / listed), float(tiles / listed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--tokens", type=int, default=32768)
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for kind in ("random", "topics"):
        lists = lists_of(*arrays(kind, options.tokens))
        for queries in TILES:
            products, reads = packed(lists, queries)
            kept, kept_reads = by_block(lists, queries, -(-options.tokens // BLOCK))
            rows.append(
                {
                    "arrays": kind, "queries of a tile": queries, "packed: products": products,
                    "packed: block reads": reads, "keys stay: products": kept,
                    "keys stay: block reads": kept_reads,
                }
            )  # fmt: skip
    bench.write({"tokens": options.tokens, "rows": rows}, options.out / "packing.json")
    (options.out / "packing.md").write_text(bench.table(rows) + "\n")
    print(bench.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
