"""Checks the kernels for lists of blocks on an NVIDIA GPU at real sizes, against float32.

    python -m experiments.selection.gpu_check [--shards 6] [--out DIR] [--only NAME ...] [--tiny]

Forward, lse and all gradients of lists drawn at random (the first block and the own one in every
list, blocks listed again, after the query, and none), lengths that are multiples of nothing, and
repeats that must agree bit by bit. The reference is dense: the heads of one list and some queries
at a time. Ends with the number of failed cases; the results file has the errors of each. `--tiny`
has small sizes, for an interpreter.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # Shards share the GPU.

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels import bench
from sparse_attn.ops import softmax
from sparse_attn.ops.token_select import attend as select_lib
from sparse_attn.ops.token_select import triton_gpu
from sparse_attn.patterns import base, causal, full, local

REPEATS = 5
CAUSAL = causal.Causal()
# Relative errors allowed (Frobenius norm): a few roundings of the inputs' type.
ALLOWED = {"bfloat16": 1e-2, "float16": 1.5e-3, "float32": 2e-5}
_QUERIES = 512  # Of the reference at a time.


@dataclasses.dataclass(frozen=True)
class Check:
    """One call: `tables` lists of `count` blocks; `at_once` is None for the backend's own."""

    name: str
    length: int = 4133
    kv_len: int | None = None
    heads: int = 16
    kv_heads: int = 16
    tables: int = 16
    block: int = 128
    count: int = 9
    dims: tuple[int, int] = (128, 128)
    dtype: str = "bfloat16"
    batch: int = 1
    documents: bool = False
    pattern: base.Pattern = CAUSAL
    at_once: int | None = None

    @property
    def keys(self) -> int:
        return self.length if self.kv_len is None else self.kv_len


_NSA = {"heads": 64, "kv_heads": 4, "tables": 4, "block": 64, "count": 16}
CHECKS = (
    Check("nsa", **_NSA),
    Check("moba"),
    Check("moba, grouped queries", kv_heads=4),
    Check("tables between", heads=32, kv_heads=2, tables=8, count=5, batch=2),
    Check("nsa, documents", **_NSA, documents=True),
    Check("moba, documents", documents=True, batch=2),
    Check("nsa, float16", **_NSA, dtype="float16"),
    Check("nsa, some places at a time", **_NSA, at_once=1 << 27),
    Check("all heads in one list", heads=96, kv_heads=1, tables=1, block=64, count=8),
    Check("group of three", length=2089, heads=6, kv_heads=2, tables=2, block=48),
    Check("narrow heads", heads=32, kv_heads=4, tables=4, dims=(64, 64), block=64),
    Check("unlike heads", heads=8, kv_heads=4, tables=4, dims=(192, 128), block=64),
    Check("wide heads", length=2089, heads=8, kv_heads=2, tables=2, dims=(256, 256), block=64),
    Check("odd heads", length=2089, heads=8, kv_heads=2, tables=2, dims=(80, 48), block=32),
    Check("two-sided", length=2089, pattern=full.Full()),
    Check("window", length=2089, pattern=local.Local(window=300)),
    Check("fewer keys", kv_len=1037, pattern=full.Full()),
    Check("more keys", length=1037, kv_len=4133),
    Check("float32", length=1037, heads=8, kv_heads=2, tables=2, block=64, dtype="float32"),
    Check("one query", length=1, kv_len=300, pattern=full.Full()),
)  # fmt: skip
TINY = (
    Check("nsa", 37, None, 4, 2, 2, 16, 3, (16, 24), "float32", at_once=1 << 12, documents=True),
    Check("moba", 37, None, 2, 2, 2, 32, 3, (16, 16)),
)


def inputs_of(check: Check) -> tuple[dict[str, Any], Any, Any]:
    """Arguments of `attend`, and the cotangents of out and lse."""
    rng, keys = np.random.default_rng(0), iter(jax.random.split(jax.random.key(0), 5))

    def normal(*shape, dtype=check.dtype):
        return jax.random.normal(next(keys), shape, dtype)

    q = normal(check.batch, check.length, check.heads, check.dims[0])
    k, v = (normal(check.batch, check.keys, check.kv_heads, width) for width in check.dims)
    size = (check.batch, check.length, check.tables, check.count)
    selected = rng.integers(-1, -(-check.keys // check.block) + 1, size)
    selected[..., 0] = 0
    selected[..., 1] = (np.arange(check.length) // check.block)[:, None]
    ids = None
    if check.documents:
        ids = np.sort(rng.integers(1, 7, (check.batch, check.length)), axis=1)
        ids[:, -check.length // 40 :] = 0
        ids = jnp.asarray(ids, jnp.int32)
    arguments = {
        "q": q, "k": k, "v": v, "selected": jnp.asarray(selected, jnp.int32), "segment_ids": ids
    }  # fmt: skip
    dout = normal(check.batch, check.length, check.heads, check.dims[1])
    return arguments, dout, normal(check.batch, check.length, check.heads, dtype="float32")


def program(check: Check, arguments, dout, dlse):
    """A call without arguments: out, lse and gradients."""

    @jax.jit
    def run(floats, others):
        def f(q, k, v):
            out, lse = select_lib.attend(
                q, k, v, **others, block=check.block, pattern=check.pattern, return_lse=True,
                impl="triton_gpu",
            )  # fmt: skip
            return out.astype(jnp.float32), lse

        (out, lse), pull = jax.vjp(f, *floats)
        # An empty row's lse is -inf, and its cotangent means nothing.
        grads = pull((dout.astype(jnp.float32), jnp.where(lse == -jnp.inf, 0, dlse)))
        return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

    floats = tuple(arguments[n] for n in "qkv")
    others = {n: arguments[n] for n in ("selected", "segment_ids")}
    return functools.partial(run, floats, others)


@functools.partial(jax.jit, static_argnums=0)
def _one_list(check: Check, b, u, arguments, dout, dlse):
    """The heads `[T, G, ..]` of list u of batch entry b, dense and float32, some queries at a time.

    Gives out, lse and dq of these heads, and dk and dv `[S, ..]` of their KV head.
    """
    group, shared = check.heads // check.tables, check.tables // check.kv_heads
    pad = -check.length % min(_QUERIES, check.length)

    def pieces(x, fill=0):
        x = jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1)), constant_values=fill)
        return x.reshape(-1, min(_QUERIES, check.length), *x.shape[1:])

    def of_heads(x):
        return jax.lax.dynamic_slice_in_dim(x[b], u * group, group, 1).astype(jnp.float32)

    k, v = (arguments[n][b][:, u // shared].astype(jnp.float32) for n in "kv")
    selected, ids = arguments["selected"][b, :, u], arguments["segment_ids"]
    ids = jnp.ones((check.length,), jnp.int32) if ids is None else ids[b]
    kv_ids = jnp.ones((check.keys,), jnp.int32) if arguments["segment_ids"] is None else ids
    kv_pos = jnp.arange(check.keys)

    def some(sums, xs):
        q, dout, dlse, selected, ids, q_pos = xs
        listed = (selected[..., None] == jnp.arange(-(-check.keys // check.block))).any(1)
        seen = listed[:, kv_pos // check.block] & check.pattern.mask_fn(q_pos[:, None], kv_pos)
        seen = seen & (ids[:, None] == kv_ids) & (ids[:, None] != 0)

        def f(q, k, v):
            logits = jnp.einsum("cgh,sh->cgs", q, k, precision="highest") * check.dims[0] ** -0.5
            weights, lse = softmax.masked(logits, seen[:, None])
            return jnp.einsum("cgs,sh->cgh", weights, v, precision="highest"), lse

        (out, lse), pull = jax.vjp(f, q, k, v)
        dq, *more = pull((dout, jnp.where(lse == -jnp.inf, 0, dlse)))
        return [a + b for a, b in zip(sums, more, strict=True)], (out, lse, dq)

    xs = (
        *(pieces(of_heads(x)) for x in (arguments["q"], dout, dlse)),
        pieces(selected, -1), pieces(ids), pieces(jnp.arange(check.length)),
    )  # fmt: skip
    sums, found = jax.lax.scan(some, [jnp.zeros_like(k), jnp.zeros_like(v)], xs)
    found = [x.reshape(-1, *x.shape[2:])[: check.length] for x in found]
    return *found, *sums


def reference(check: Check, arguments, dout, dlse) -> dict[str, jax.Array]:
    """The same as `program`, dense."""
    found = [
        [_one_list(check, b, u, arguments, dout, dlse) for u in range(check.tables)]
        for b in range(check.batch)
    ]
    shared = check.tables // check.kv_heads
    total = {}
    for i, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        rows = [[of_list[i] for of_list in entry] for entry in found]
        if i < 3:  # Heads `[T, G, ..]` side by side.
            total[name] = jnp.stack([jnp.concatenate(entry, 1) for entry in rows])
        else:  # Those of a KV head are added.
            sums = [[sum(e[u : u + shared]) for u in range(0, len(e), shared)] for e in rows]
            total[name] = jnp.stack([jnp.stack(entry, 1) for entry in sums])
    return total


def run(check: Check) -> dict[str, Any]:
    """Errors of one check, whether repeats agree, and whether all of it is as it must be."""
    inputs = inputs_of(check)
    usual = triton_gpu._AT_ONCE
    triton_gpu._AT_ONCE = check.at_once or usual
    try:
        call = program(check, *inputs)
        mine = call()
        equal = all(
            bool(jnp.array_equal(x, mine[name], equal_nan=True))
            for _ in range(REPEATS - 1)
            for name, x in call().items()
        )
    finally:
        triton_gpu._AT_ONCE = usual
    errors = {}
    for name, want in reference(check, *inputs).items():
        got, empty = mine[name].astype(jnp.float32), want == -jnp.inf
        same = jnp.array_equal(got == -jnp.inf, empty)
        got, want = jnp.where(empty, 0, got), jnp.where(empty, 0, want)
        error = jnp.linalg.norm(got - want) / jnp.maximum(jnp.linalg.norm(want), 1e-9)
        errors[name] = float(error) if same else float("inf")
    good = all(e <= ALLOWED[check.dtype] for e in errors.values()) and equal
    return {**_fields(check), "errors": errors, "repeats_equal": equal, "ok": bool(good)}


def _fields(check):
    return {**dataclasses.asdict(check), "pattern": check.pattern.expression()}


def guarded(check: Check) -> dict[str, Any]:
    """The result of `run`; an error is a result, and the other checks still count."""
    try:
        return run(check)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:500]}"
        return {**_fields(check), "ok": False, "error": text}


def main(arguments: list[str] | None = None) -> int:
    """Runs the checks; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="experiments/selection/results", help="folder of the file")
    parser.add_argument("--only", nargs="+", help="names of checks")
    parser.add_argument("--shards", type=int, default=6, help="processes, for all checks")
    parser.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help="small sizes, for an interpreter")
    options = parser.parse_args(arguments)
    if options.shard is not None:
        for check in CHECKS[options.shard :: options.shards]:
            bench.shard_result(guarded(check))
        return 0
    if options.tiny or options.only:
        checks = TINY if options.tiny else [c for c in CHECKS if c.name in options.only]
        found = map(guarded, checks)
    else:
        checks = CHECKS
        found = bench.in_shards("experiments.selection.gpu_check", options.shards)
    results = []
    for result in found:
        shown = {n: float(f"{e:.2g}") for n, e in result.get("errors", {}).items()}
        shown |= {n: result[n] for n in ("repeats_equal", "error") if n in result}
        print("ok  " if result["ok"] else "FAIL", result["name"], json.dumps(shown), flush=True)
        results.append(result)
    name = bench.file_stem(jax.devices()[0].device_kind)
    bench.write(results, pathlib.Path(options.out) / f"gpu_check_{name}.json")
    print(f"{len(results)} of {len(checks)} checks ran")
    return sum(not r["ok"] for r in results) + len(checks) - len(results)


if __name__ == "__main__":
    sys.exit(main())
