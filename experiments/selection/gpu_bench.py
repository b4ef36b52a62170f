"""Times MoBA and NSA, stage by stage, beside dense causal attention of cuDNN.

    python -m experiments.selection.gpu_bench [--out DIR] [--lengths N ...] [--only moba nsa]
                             [--memory N] [--impl NAME] [--kernel NAME] [--best xla] [--tiny]
    python -m experiments.selection.gpu_report    # table and picture of the stored results

Every stage is a program of its own; arrays are bfloat16 and random, so neighbouring queries choose
unlike blocks, which is the hardest case for packing them. Backward = both passes minus forward.
Where torch and fla-core are installed, its NSA is timed on the same lists (`fla_nsa.py`).
`--memory` runs all stages of a method, forward and backward, as one program at that length.
`--tiny` runs all of it on a CPU in a minute, to see that it runs. One JSON file has all results:
times (milliseconds), the temporary memory of each program (bytes) and the largest error against
the dense definition on a short row.
"""

import argparse
import functools
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.kernels import bench
from experiments.kernels.gpu_bench import median_ms
from experiments.selection import fla_nsa, gpu_report
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import scoring
from sparse_attn.ops.token_select import attend as select_lib
from sparse_attn.ops.token_select import compress, lists
from sparse_attn.patterns import causal, local

LENGTHS = (8192, 32768, 65536)
CAUSAL = causal.Causal()
# Heads (queries, keys), head dimension, blocks; NSA's are the paper's [arXiv:2502.11089, sec. 4].
# MoBA's top-k is 8: its authors count the own block, which `top_k` here does not.
MOBA = {"heads": 16, "kv_heads": 16, "dim": 128, "block": 128, "top_k": 7}
NSA = {
    "heads": 64, "kv_heads": 4, "dim": 128, "block": 64, "top_k": 16, "window": 512,
    "size": 32, "stride": 16,
}  # fmt: skip
TINY = {
    "moba": {"heads": 4, "kv_heads": 2, "dim": 16, "block": 16, "top_k": 2},
    "nsa": {
        "heads": 4, "kv_heads": 1, "dim": 16, "block": 16, "top_k": 4, "window": 16, "size": 8,
        "stride": 4,
    },
}  # fmt: skip


class Clock:
    """Compiles and times programs of one row; an error is a result and ends nothing else."""

    def __init__(self, row: dict[str, Any]):
        self._row = row

    def note(self, name: str, value: Any) -> None:
        """Writes a fact into the row."""
        self._row[name] = value

    def forward(self, name: str, fn, *args) -> Any:
        """Times `fn(*args)` as `<name>_fwd_ms`; returns its result, or None after an error."""
        return self._time(f"{name}_fwd", fn, *args)

    def backward(self, name: str, fn, *floats, others: tuple = ()) -> None:
        """Times forward and backward together and writes `<name>_bwd_ms`, the difference.

        `others` are arguments without gradient: as constants XLA would sort them while compiling.
        """

        def both(floats, others, dout):
            return jax.vjp(lambda *floats: fn(*floats, *others), *floats)[1](dout)

        dout = random_like(jax.eval_shape(fn, *floats, *others))
        self._time(f"{name}_both", both, floats, others, dout)
        found = [self._row.pop(f"{name}_both_ms", None), self._row.get(f"{name}_fwd_ms")]
        if None not in found:
            self._row[f"{name}_bwd_ms"] = found[0] - found[1]

    def both(self, fn, *args) -> None:
        """Times `fn(*args)`, which makes outputs and gradients, as `both_ms`."""
        self._time("both", fn, *args)

    def _time(self, name, fn, *args):
        try:
            compiled = jax.jit(fn).lower(*args).compile()
            self._row[f"{name}_ms"] = median_ms(compiled, *args)
            memory = compiled.memory_analysis()
            self._row[f"{name}_temp_bytes"] = getattr(memory, "temp_size_in_bytes", None)
            print(f"  {name}: {self._row[f'{name}_ms']:.3f} ms", flush=True)
            return compiled(*args)
        except Exception as error:
            self._row[f"{name}_error"] = f"{type(error).__name__}: {str(error)[:500]}"
            print(f"  {name}: {self._row[f'{name}_error'][:200]}", flush=True)
            return None


def arrays(sizes: dict[str, int], length: int) -> list[jax.Array]:
    """q, k, v."""
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (sizes["heads"], sizes["kv_heads"], sizes["kv_heads"])
    return [
        jax.random.normal(key, (1, length, n, sizes["dim"]), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    ]


def random_like(shapes: Any) -> Any:
    """Gradients of results with these shapes and dtypes, as the next layer gives them."""
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape, x.dtype), shapes)


def dense(clock: Clock, q, k, v) -> None:
    """Causal attention by cuDNN (on a GPU), the measure."""
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    attention = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=implementation
    )
    clock.forward("dense", attention, q, k, v)
    clock.backward("dense", attention, q, k, v)


class Backend(NamedTuple):
    """What runs: `ops.attend` on `kernel`, lists on `impl`, which is None for the best one."""

    impl: str | None
    kernel: str | None

    @property
    def for_lists(self) -> dict[str, str | None]:
        return {"impl": self.impl, "kernel": self.kernel if self.impl == "by_block" else None}


def selected_attention(clock: Clock, backend: Backend, block, q, k, v, selected) -> None:
    """Attention by lists, and the ordering of entries by block that is part of it."""
    inputs = select_lib.validate(q, k, v, selected, block, CAUSAL, None, None)
    module = select_lib._choose(inputs, **backend.for_lists)
    clock.note("impl", module.__name__.rsplit(".", 1)[-1])

    def plan(selected):
        return module.plan(select_lib.validate(q, k, v, selected, block, CAUSAL, None, None))

    if hasattr(module, "plan"):
        clock.forward("plan", plan, selected)

    def attention(q, k, v, selected):
        return select_lib.attend(q, k, v, selected=selected, block=block, **backend.for_lists)

    clock.forward("attention", attention, q, k, v, selected)
    clock.backward("attention", attention, q, k, v, others=(selected,))


def moba(clock: Clock, sizes, backend: Backend, q, k, v) -> None:
    """Mixture of block attention: scoring, selection, attention."""
    block, blocks = sizes["block"], -(-k.shape[1] // sizes["block"])

    def score(q, k):
        means = scoring.pool(k, block, jnp.ones((1, k.shape[1]), bool))

        def largest(end, _, q):
            z = scoring.logits(q, means[:, : -(-end // block)])
            return jnp.moveaxis(z, 1, 2).max(-1, keepdims=True)

        return lists.by_prefix(largest, q, count=1, elements=lambda end: q.shape[2] * blocks)

    choose = functools.partial(lists.by_mean_key, block=block, top_k=sizes["top_k"])
    gpu = lists.kernels()
    if gpu is None or not gpu.takes_gate(q, blocks, sizes["top_k"] + 1):
        clock.forward("scoring", score, q, k)  # Else one kernel scores and selects.
    selected = clock.forward("scoring_and_selection", choose, q, k)
    if selected is not None:
        selected_attention(clock, backend, block, q, k, v, selected)


def all_of_moba(sizes, backend: Backend, q, k, v) -> jax.Array:
    """All stages of `moba`."""
    selected = lists.by_mean_key(q, k, block=sizes["block"], top_k=sizes["top_k"])
    return select_lib.attend(q, k, v, selected=selected, block=sizes["block"], **backend.for_lists)


def all_of_nsa(sizes, backend: Backend, q, k, v) -> jax.Array:
    """All stages of `nsa`, with gates of one."""
    strides, block = compress.Strides(sizes["size"], sizes["stride"]), sizes["block"]
    keys, values = (strides.windows(x).astype(jnp.float32).mean(2).astype(x.dtype) for x in (k, v))
    out, lse = attend_lib.attend(
        q, keys, values, mask=strides, return_lse=True, impl=backend.kernel
    )
    selected = compress.choose_blocks(
        q, keys, lse, strides=strides, block=block, top_k=sizes["top_k"]
    )
    out += attend_lib.attend(q, k, v, mask=local.Local(sizes["window"]), impl=backend.kernel)
    return out + select_lib.attend(q, k, v, selected=selected, block=block, **backend.for_lists)


def memory(clock: Clock, name: str, sizes, backend: Backend, q, k, v) -> None:
    """Both passes of all stages in one program; `both_temp_bytes` is what it needs besides."""
    method = {"moba": all_of_moba, "nsa": all_of_nsa}[name]
    whole = functools.partial(method, sizes, backend)

    def both(dout, *floats):
        return jax.vjp(whole, *floats)[1](dout)

    clock.both(both, random_like(jax.eval_shape(whole, q, k, v)), q, k, v)


def nsa(clock: Clock, sizes, backend: Backend, q, k, v) -> Any:
    """Native sparse attention with mean compression: three branches, scoring and selection.

    Returns the lists of blocks, or None after an error.
    """
    strides, kernel = compress.Strides(sizes["size"], sizes["stride"]), backend.kernel
    names = {"block": sizes["block"], "top_k": sizes["top_k"]}

    def mean(x):
        return strides.windows(x).astype(jnp.float32).mean(2).astype(x.dtype)

    def compressed(q, k, v):
        return attend_lib.attend(q, mean(k), mean(v), mask=strides, return_lse=True, impl=kernel)

    def window(q, k, v):
        return attend_lib.attend(q, k, v, mask=local.Local(window=sizes["window"]), impl=kernel)

    def choose(q, k, lse):
        return compress.choose_blocks(q, mean(k), lse, strides=strides, **names)

    def score(q, k, lse):
        keys = mean(k)

        def weigh(end, _, xs):
            (q, lse), count = xs, strides.count(end)
            z = scoring.logits(q, keys[:, :count])
            p = jnp.exp(z - jnp.moveaxis(lse, 2, 1)[..., None])
            p = p.reshape(1, keys.shape[2], -1, *p.shape[2:]).sum(2)
            p = compress.importance(p, strides, names["block"], -(-end // names["block"]))
            return jnp.moveaxis(p, 1, 2).max(-1, keepdims=True)

        def weigh_by_kernel(end, positions, _):
            parts = gpu.block_scores(
                q, keys, lse, positions[:1], positions.size, strides=strides, block=names["block"],
                blocks=-(-end // names["block"]), scale=q.shape[3] ** -0.5,
            )  # fmt: skip
            return parts[:, 0, :, :, :1]  # All are computed, and one is kept.

        gpu = lists.kernels()
        if gpu is not None and gpu.takes_scores(q, keys, strides, **names):
            numbers = keys.shape[2] * gpu.overlaps(strides, names["block"])
            return lists.by_prefix(
                weigh_by_kernel, lse, count=1,
                elements=lambda end: numbers * -(-end // names["block"]),
            )  # fmt: skip
        return lists.by_prefix(
            weigh, (q, lse), count=1, elements=lambda end: q.shape[2] * strides.count(end)
        )

    for name, branch in (("compressed", compressed), ("window", window)):
        found = clock.forward(name, branch, q, k, v)
        clock.backward(name, branch, q, k, v)
        if name == "compressed":
            lse = found[1] if found is not None else jnp.zeros(q.shape[:3])
    clock.forward("scoring", score, q, k, lse)
    selected = clock.forward("scoring_and_selection", choose, q, k, lse)
    if selected is not None:
        selected_attention(clock, backend, names["block"], q, k, v, selected)
    return selected


METHODS = {"moba": (MOBA, moba), "nsa": (NSA, nsa)}


def error_on_a_short_row(sizes, backend: Backend) -> float | str:
    """Largest difference to the dense definition, of lists drawn at random."""
    q, k, v = arrays(sizes, 1000)
    shape = (1, 1000, sizes["kv_heads"], sizes["top_k"])
    selected = jax.random.randint(jax.random.key(1), shape, 0, -(-1000 // sizes["block"]))
    options = {"selected": selected, "block": sizes["block"]}
    try:
        got = select_lib.attend(q, k, v, **backend.for_lists, **options)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:500]}"
    floats = [x.astype(jnp.float32) for x in (q, k, v)]
    want = select_lib.attend(*floats, impl="reference", **options)
    return float(jnp.abs(got.astype(jnp.float32) - want).max())


def fla_rows(sizes, length: int, selected) -> dict[str, Any]:
    """What `fla_nsa.time_fla` measures, or why it does not."""
    try:
        found = fla_nsa.time_fla(sizes, length, selected)
    except Exception as error:  # Its package is missing, or it does not take this.
        found = {"fla_error": f"{type(error).__name__}: {str(error)[:500]}"}
    print(f"  {found}", flush=True)
    return found


def totals(row: dict[str, Any]) -> None:
    """Adds the sums over stages and the speed-ups over dense attention."""
    branches = [n for n in ("compressed", "window", "attention") if f"{n}_fwd_ms" in row]
    if {"scoring_fwd_ms", "scoring_and_selection_fwd_ms"} <= set(row):
        row["selection_fwd_ms"] = row["scoring_and_selection_fwd_ms"] - row["scoring_fwd_ms"]
    complete = "attention_fwd_ms" in row and (row["method"] == "moba" or len(branches) == 3)
    if complete and "scoring_and_selection_fwd_ms" in row:
        row["fwd_ms"] = sum(row[f"{n}_fwd_ms"] for n in (*branches, "scoring_and_selection"))
    if complete and all(f"{n}_bwd_ms" in row for n in branches):
        row["bwd_ms"] = sum(row[f"{n}_bwd_ms"] for n in branches)
    for way in ("fwd", "bwd"):
        if f"{way}_ms" in row and f"dense_{way}_ms" in row:
            row[f"{way}_speed_up"] = row[f"dense_{way}_ms"] / row[f"{way}_ms"]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="experiments/selection/results", help="folder")
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens")
    parser.add_argument("--memory", type=int, help="tokens of the run of all stages together")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    on_gpu = jax.default_backend() == "gpu"
    parser.add_argument("--impl", choices=select_lib.BACKENDS, help="backend of the lists")
    parser.add_argument(
        "--kernel", default="pallas_gpu" if on_gpu else None, help="backend of `ops.attend`"
    )
    parser.add_argument(
        "--best", choices=("xla",), help="what scores and selects; default: as the op does"
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    options = parser.parse_args(arguments)
    if options.best == "xla":
        lists.kernels = lambda: None
    backend = Backend(options.impl, options.kernel)
    lengths = options.lengths or ((256,) if options.tiny else LENGTHS)
    rows: list[dict[str, Any]] = []
    path = pathlib.Path(options.out) / "gpu_bench.json"
    for name in options.only:
        sizes, method = METHODS[name]
        sizes = TINY[name] if options.tiny else sizes
        error = error_on_a_short_row(sizes, backend)
        for length in lengths:
            print(f"{name} {length}", flush=True)
            row = {"method": name, "length": length, "kernel": options.kernel, **sizes}
            row["best"] = "xla" if lists.kernels() is None else "kernels"
            row["error"] = error
            clock, (q, k, v) = Clock(row), arrays(sizes, length)
            dense(clock, q, k, v)
            selected = method(clock, sizes, backend, q, k, v)
            if selected is not None and on_gpu:
                row |= fla_rows(sizes, length, selected)
            totals(row)
            rows.append(row)
            # After every row: a run that is cut off keeps what it has.
            bench.write(rows, path)
    for name in options.only if options.memory else ():
        sizes = TINY[name] if options.tiny else METHODS[name][0]
        row = {"method": name, "length": options.memory, "kernel": options.kernel, **sizes}
        print(f"{name} {options.memory}, all stages", flush=True)
        memory(Clock(row), name, sizes, backend, *arrays(sizes, options.memory))
        rows.append(row)
        bench.write(rows, path)
    gpu_report.show(path)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
