"""Checks the Hopper kernels on a Hopper GPU at real sizes, against float32 dense attention.

    python -m experiments.kernels.gpu_check [--shards 8] [--out DIR]

Every cell (head_dim, block, dtype, group, static or run-time lists) and every feature: forward,
lse and all gradients, lengths that are multiples of nothing, empty rows and columns, and repeats
that must agree bit by bit. The reference runs on one KV head at a time.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # Shards share the GPU.

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels import bench
from sparse_attn.masks import block_mask, lower
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops.block_sparse import inputs as inputs_lib
from sparse_attn.ops.block_sparse import pallas_gpu, reference, vjp
from sparse_attn.patterns import causal, local

REPEATS = 20
# Relative errors allowed (Frobenius norm): a few roundings of the inputs' type.
ALLOWED = {"bfloat16": 1e-2, "float16": 1.5e-3}


@dataclasses.dataclass(frozen=True)
class Check:
    """One call. `mask` names a maker below; `extra` names optional arguments of `attend`."""

    head_dim: int = 128
    v_dim: int | None = None
    block_q: int = 128
    block_kv: int = 128
    dtype: str = "bfloat16"
    group: int = 1
    kv_heads: int = 2
    traced: bool = False
    mask: str = "holes"
    extra: tuple[str, ...] = ()
    batch: int = 1
    q_len: int = 2089
    kv_len: int = 2089


def _holes(check, rng):
    """Causal blocks drawn at random, with empty rows, empty columns and a loose rule."""
    nq, nk = -(-check.q_len // check.block_q), -(-check.kv_len // check.block_kv)
    q_lo = np.arange(nq)[:, None] * check.block_q
    kv_hi = (np.arange(nk)[None] + 1) * check.block_kv
    states = np.where(kv_hi <= q_lo + 1, 2, 1) * (rng.random((nq, nk)) < 0.6)
    states[rng.integers(nq)] = 0
    states[:, rng.integers(nk)] = 0
    return block_mask.from_block_states(
        states.astype(np.int32), rule=causal.Causal(), q_len=check.q_len, kv_len=check.kv_len,
        block_q=check.block_q, block_kv=check.block_kv,
    )  # fmt: skip


def _mask(check, rng):
    if check.mask == "bits":
        shape = (check.kv_heads * check.group, check.q_len, check.kv_len)
        array = rng.random(shape) < 0.2
        array[:, :300] = array[:, :, 700:800] = False
        return block_mask.from_array(array, block_q=check.block_q, block_kv=check.block_kv)
    sizes = {
        "q_len": check.q_len, "kv_len": check.kv_len,
        "block_q": check.block_q, "block_kv": check.block_kv,
    }  # fmt: skip
    patterns = {
        "window": local.Local(window=300),
        "late": causal.Causal() & ~local.Local(window=500),
        "causal": causal.Causal(),
        "per head": tuple(
            local.Local(window=50 * (h + 1)) if h % 2 else causal.Causal()
            for h in range(check.kv_heads * check.group)
        ),
    }
    return (
        _holes(check, rng) if check.mask == "holes" else lower.lower(patterns[check.mask], **sizes)
    )


def _inputs(check):
    rng = np.random.default_rng(0)
    heads, extra = check.kv_heads * check.group, check.extra

    def normal(*shape, dtype=check.dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q = normal(check.batch, check.q_len, heads, check.head_dim)
    k = normal(check.batch, check.kv_len, check.kv_heads, check.head_dim)
    v = normal(check.batch, check.kv_len, check.kv_heads, check.v_dim or check.head_dim)
    mask = _mask(check, rng)
    if check.traced:
        mask = jax.tree.map(jnp.asarray, mask)
    ids = positions = None
    if "segments" in extra:
        ids = np.sort(rng.integers(1, 7, (check.batch, check.q_len)), axis=1)
        ids[:, -100:] = 0
    if "positions" in extra:
        mask, positions = local.Local(window=300), jnp.asarray(rng.permutation(check.q_len))
    bias = normal(check.batch, heads, check.kv_len, dtype="float32") if "bias" in extra else None
    if bias is not None:
        bias = jnp.where(jnp.arange(check.kv_len) % 11 == 0, -jnp.inf, bias)
    inputs = attend_lib.validate(
        q, k, v, mask, None if ids is None else jnp.asarray(ids, jnp.int32), positions, bias, None,
        20.0 if "cap" in extra else None,
        normal(heads, dtype="float32") if "sinks" in extra else None,
    )  # fmt: skip
    dout = normal(check.batch, check.q_len, heads, v.shape[-1])
    return inputs, dout, normal(check.batch, check.q_len, heads, dtype="float32")


def _program(backend, inputs, dout, dlse):
    """A call without arguments: out, lse and the gradients of what is differentiable, as a dict."""
    names = ("q", "k", "v", "key_bias", "sink_logits")
    floats = {n: getattr(inputs, n) for n in names if getattr(inputs, n) is not None}

    def run(floats, mask):
        def f(floats):
            out, lse = vjp.run(backend, inputs._replace(**floats, mask=mask))
            return out.astype(jnp.float32), lse

        (out, lse), pull = jax.vjp(f, floats)
        # An empty row's lse is -inf, and its cotangent means nothing.
        gradients = pull((dout.astype(jnp.float32), jnp.where(lse == -jnp.inf, 0, dlse)))[0]
        return {"out": out, "lse": lse, **{f"d{n}": g for n, g in gradients.items()}}

    if inputs.mask.is_static:
        return functools.partial(jax.jit(lambda floats: run(floats, inputs.mask)), floats)
    return functools.partial(jax.jit(run), floats, inputs.mask)


def _reference(inputs, dout, dlse):
    """The same from float32 dense attention, one KV head at a time."""
    group = inputs_lib.group_size(inputs)
    tables = inputs.mask.tables_of_heads(inputs.q.shape[2])
    parts = []
    for g in range(inputs.k.shape[2]):
        heads = slice(g * group, (g + 1) * group)
        bias, sinks = inputs.key_bias, inputs.sink_logits
        piece = inputs._replace(
            q=inputs.q[:, :, heads].astype(jnp.float32),
            k=inputs.k[:, :, g : g + 1].astype(jnp.float32),
            v=inputs.v[:, :, g : g + 1].astype(jnp.float32),
            mask=dataclasses.replace(inputs.mask, head_tables=tuple(tables[heads].tolist())),
            key_bias=bias if bias is None or bias.shape[1] == 1 else bias[:, heads],
            sink_logits=None if sinks is None else sinks[heads],
        )
        parts.append(_program(reference, piece, dout[:, :, heads], dlse[:, :, heads])())
    axes = {"dkey_bias": 1, "dsink_logits": 0}
    return {
        name: np.concatenate([np.asarray(p[name]) for p in parts], axis=axes.get(name, 2))
        for name in parts[0]
    }


def run(check: Check) -> dict:
    """Errors of one check, whether repeats agree, and whether all of it is as it must be."""
    inputs, dout, dlse = _inputs(check)
    pallas_gpu.check(inputs)
    call = _program(pallas_gpu, inputs, dout, dlse)
    mine = {name: np.asarray(x) for name, x in call().items()}
    equal = all(
        np.array_equal(np.asarray(x), mine[name], equal_nan=True)
        for _ in range(REPEATS - 1)
        for name, x in call().items()
    )
    truth = _reference(inputs, dout, dlse)
    errors = {}
    for name, x in truth.items():
        got, want = np.asarray(mine[name], np.float64), np.asarray(x, np.float64)
        empty = want == -np.inf
        if not np.array_equal(got == -np.inf, empty):
            errors[name] = float("inf")
            continue
        got, want = np.where(empty, 0, got), np.where(empty, 0, want)
        errors[name] = float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-9))
        if not np.isfinite(got).all():
            errors[name] = float("nan")
    good = all(e <= ALLOWED[check.dtype] for e in errors.values()) and equal
    return {**dataclasses.asdict(check), "errors": errors, "repeats_equal": equal, "ok": good}


def checks() -> list[Check]:
    """Every cell, then every feature."""
    cells = [
        Check(d, None, block, block, dtype, group, traced=traced)
        for d, block, dtype, group, traced in itertools.product(
            (64, 128, 256), (64, 128), ("bfloat16", "float16"), (1, 4), (False, True)
        )
    ]
    features = [
        Check(mask="causal", q_len=8192, kv_len=8192),
        Check(mask="late", q_len=4099, kv_len=4099),
        Check(mask="window", batch=2, group=3, extra=("segments",)),
        Check(mask="causal", extra=("bias", "sinks")),
        Check(mask="window", group=2, extra=("cap", "bias", "sinks"), head_dim=64),
        Check(mask="window", extra=("positions",)),
        Check(mask="per head", group=2),
        Check(mask="bits"),
        Check(mask="bits", traced=True, block_q=64, block_kv=64),
        Check(mask="causal", q_len=1037, kv_len=3001, block_q=256, block_kv=64),
        Check(mask="window", block_q=32, block_kv=16, q_len=777, kv_len=777),
        Check(mask="causal", head_dim=80, v_dim=48),
        Check(mask="window", head_dim=192, v_dim=128, group=2),
        Check(mask="window", head_dim=64, v_dim=128),
        Check(mask="window", q_len=1, kv_len=1, block_q=16, block_kv=16),
    ]
    return cells + features


def name_of(result: Mapping[str, Any]) -> str:
    """What tells the check of a result from others: the fields that are not the usual ones.

    >>> name_of(dataclasses.asdict(Check(64, mask="causal", extra=("bias", "sinks"))))
    'head_dim=64 mask=causal extra=bias,sinks'
    >>> name_of(dataclasses.asdict(Check()))
    'as usual'
    """
    told = []
    for field in dataclasses.fields(Check):
        value = result[field.name]
        if value != field.default:
            value = ",".join(value) if field.name == "extra" else value
            told.append(f"{field.name}={value}")
    return " ".join(told) or "as usual"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=8, help="processes")
    parser.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", default="experiments/kernels/results", help="folder of the file")
    options = parser.parse_args()
    if options.shard is not None:
        for check in checks()[options.shard :: options.shards]:
            try:
                result = run(check)
            except Exception as error:  # The other checks still count.
                result = {**dataclasses.asdict(check), "ok": False, "error": str(error)[:500]}
            bench.shard_result(result)
        return
    results = []
    for result in bench.in_shards("experiments.kernels.gpu_check", options.shards):
        results.append(result)
        told = f"{len(results)} of {len(checks())}"
        print("ok  " if result["ok"] else "FAIL", told, name_of(result), flush=True)
    name = bench.file_stem(jax.devices()[0].device_kind)
    bench.write(results, pathlib.Path(options.out) / f"gpu_check_{name}.json")
    bad = [r for r in results if not r["ok"]]
    worst = {}
    for result in results:
        for name, error in result.get("errors", {}).items():
            key = (result["dtype"], name)
            worst[key] = max(worst.get(key, 0.0), error)
    print(bench.table([{"dtype": d, "result": n, "worst error": e} for (d, n), e in worst.items()]))
    print(f"{len(results)} of {len(checks())} checks ran, {len(bad)} failed")
    for result in bad:
        print(json.dumps(result))
    sys.exit(bool(bad) or len(results) != len(checks()))


if __name__ == "__main__":
    main()
