"""Portable blockwise attention on this CPU, beside the dense reference and JAX's own attention.

python -m experiments.kernels.cpu_bench [--lengths 2048 8192] [--masks NAME ...] [--calls 5]
"""

import argparse
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from experiments.kernels import bench
from sparse_attn import patterns
from sparse_attn.masks import block_mask, lower
from sparse_attn.ops import attend as attend_lib

RESULTS = pathlib.Path(__file__).parent / "results"
HEADS, HEAD_DIM, BLOCK = 4, 64, 128


def random_states(length: int, density: float) -> np.ndarray:
    """Blocks drawn at a density, the diagonal always: what a selector would choose."""
    blocks = length // BLOCK
    chosen = np.random.default_rng(0).random((blocks, blocks)) < density
    return np.where(chosen | np.eye(blocks, dtype=bool), 2, 0)


def masks(length: int) -> dict[str, block_mask.BlockMask]:
    """The masks that are measured, by name."""
    named = {
        "window 512": "local(window=512)",
        "sinks 64 + window 512": "local(window=512) | sinks(tokens=64)",
        "causal": "causal()",
        "full": "full()",
    }
    found = {n: lower.lower(patterns.parse(text), q_len=length) for n, text in named.items()}
    for density in (0.1, 0.3):
        found[f"random blocks {density:.0%}"] = block_mask.from_block_states(
            random_states(length, density), rule=patterns.parse("full()"),
            q_len=length, kv_len=length, block_q=BLOCK, block_kv=BLOCK,
        )  # fmt: skip
    found["random blocks 10%, run-time"] = jax.tree.map(jnp.asarray, found["random blocks 10%"])
    return found


def elements(mask: block_mask.BlockMask, segment_ids) -> jax.Array:
    """The T x S mask that dense attention needs, bool [B or 1, 1, T, S], made beforehand."""
    at = np.arange(mask.q_len, dtype=np.int32)
    states = block_mask.block_states(mask).repeat(mask.block_q, 0).repeat(mask.block_kv, 1)
    found = (states == 2) | ((states == 1) & mask.rule(0).mask_fn(at[:, None], at[None]))
    if segment_ids is not None:
        found = found & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return jnp.asarray(found).reshape(-1, 1, mask.q_len, mask.kv_len)


def functions(impl: str, mask: block_mask.BlockMask, segment_ids) -> dict[str, Any]:
    """Jitted forward, and forward with the gradients of q, k and v, both of (mask, q, k, v, dout).

    A static block mask is a constant of the program, everything else its argument.
    """

    def forward(given, q, k, v, dout):
        if impl == "jax.nn":
            return jax.nn.dot_product_attention(q, k, v, mask=given)
        used = mask if mask.is_static else given
        return attend_lib.attend(q, k, v, mask=used, segment_ids=segment_ids, impl=impl)

    def both(given, q, k, v, dout):
        out, pull = jax.vjp(lambda *x: forward(given, *x, dout), q, k, v)
        return out, pull(dout)

    return {"forward": jax.jit(forward), "forward + backward": jax.jit(both)}


def measure(name, mask, batch: int, calls: int, segment_ids=None) -> Iterator[dict[str, Any]]:
    """One row per pass: medians of the implementations, in turns, and their ratios."""
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (batch, mask.q_len, HEADS, HEAD_DIM)) for key in keys]
    given = None if mask.is_static else mask
    dense = elements(mask, segment_ids)
    for which in ("forward", "forward + backward"):
        calls_of = {
            impl: (functions(impl, mask, segment_ids)[which], given, *arrays)
            for impl in ("xla", "reference")
        }
        calls_of["jax.nn"] = (functions("jax.nn", mask, None)[which], dense, *arrays)
        times = bench.time_side_by_side(calls_of, calls=calls, warmup=1)
        medians = {impl: t.median for impl, t in times.items()}
        yield {
            "mask": name,
            "tokens": mask.q_len,
            "batch": batch,
            "pass": which,
            **{f"{impl} ms": median for impl, median in medians.items()},
            "spread ms": {impl: t.spread for impl, t in times.items()},
            "x reference": medians["reference"] / medians["xla"],
            "x jax.nn": medians["jax.nn"] / medians["xla"],
            "ms": {impl: t.ms for impl, t in times.items()},
        }
        jax.clear_caches()


def rows(lengths: list[int], names: list[str] | None, calls: int) -> Iterator[dict[str, Any]]:
    for length in lengths:
        found = masks(length)
        for name in found if names is None else names:
            mask = found[name]
            density = float((block_mask.block_states(mask) != 0).mean())
            for row in measure(name, mask, 1, calls):
                yield {**row, "block density": density}
    if names is not None:
        return
    # What the quickstart trains with: short sequences in a batch, packed documents.
    documents = jnp.asarray(np.repeat(np.arange(1, 5), 128)[None].repeat(8, 0), jnp.int32)
    for name, text in (("window 128", "local(window=128)"), ("causal", "causal()")):
        mask = lower.lower(patterns.parse(text), q_len=512)
        density = float((block_mask.block_states(mask) != 0).mean())
        for suffix, ids in (("", None), (", documents", documents)):
            for row in measure(name + suffix, mask, 8, calls, ids):
                yield {**row, "block density": density}


def plot(results: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Speed-up over the dense reference by block density; the line is what skipped blocks allow."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, which in zip(axes, ("forward", "forward + backward"), strict=True):
        for length in sorted({r["tokens"] for r in results}):
            mine = [r for r in results if r["tokens"] == length and r["pass"] == which]
            axis.scatter(
                [r["block density"] for r in mine], [r["x reference"] for r in mine],
                label=f"{length} tokens",
            )  # fmt: skip
        density = np.geomspace(0.02, 1)
        axis.plot(density, 1 / density, color="grey", linewidth=1, label="1 / block density")
        axis.set(xscale="log", yscale="log", xlabel="block density", title=which)
    axes[0].set_ylabel("times faster than the dense reference")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--masks", nargs="+", help=f"default: all of {', '.join(masks(2048))}")
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    results = []
    for row in rows(arguments.lengths, arguments.masks, arguments.calls):
        results.append(row)
        print(_shown(results[-1:]).splitlines()[-1], flush=True)
    path = bench.write(results, arguments.out / "cpu.json")
    plot(results, arguments.out / "cpu.png")
    print(_shown(results))
    print(f"wrote {path} and {path.with_suffix('.png')}")


def _shown(results) -> str:
    hidden = ("ms", "spread ms")
    return bench.table([{k: v for k, v in r.items() if k not in hidden} for r in results])


if __name__ == "__main__":
    main()
