"""The Triton backend on a real GPU: the contract suite, and its speed beside FlexAttention.

    python -m experiments.kernels.triton_check contract --shards 8    # every case, in 8 processes
    python -m experiments.kernels.triton_check time --out results/triton.json
    python -m experiments.kernels.triton_check sweep                  # tiles of each kernel
    python -m experiments.kernels.triton_check flex                   # needs torch

Times are medians in milliseconds; backward is (forward and backward) - forward.
"""

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn import attend
from sparse_attn.masks import block_mask, lower
from sparse_attn.ops.block_sparse import inputs as inputs_lib
from sparse_attn.patterns import causal, full, global_tokens, local, neighborhood, sinks

LENGTH, HEADS, DIM = 16384, 16, 128


def random_blocks(density: float, seed: int = 0) -> block_mask.BlockMask:
    """Causal 128-blocks drawn per head, the diagonal always among them."""
    rng = np.random.default_rng(seed)
    rows = LENGTH // 128
    kept = np.tril(rng.random((HEADS, rows, rows)) < density)
    state = np.where(kept, 2, 0)
    state[:, np.arange(rows), np.arange(rows)] = 1
    return block_mask.from_block_states(
        state, rule=causal.Causal(), q_len=LENGTH, kv_len=LENGTH, block_q=128, block_kv=128
    )


def documents(mean: int, seed: int = 0) -> np.ndarray:
    """Segment ids of packed documents of exponential length."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(np.maximum(rng.exponential(mean, LENGTH // 16).astype(int), 16))
    return np.searchsorted(ends, np.arange(LENGTH), side="right").astype(np.int32)[None] + 1


WORKLOADS = {
    "full": lambda: {"mask": full.Full()},
    "causal": lambda: {"mask": causal.Causal()},
    "window 1024": lambda: {"mask": local.Local(window=1024)},
    "window 512 both, 64 global": lambda: {
        "mask": local.Local(reach=(512, 512)) | global_tokens.GlobalTokens(tokens=64)
    },
    "window 1024, 64 sinks": lambda: {"mask": local.Local(window=1024) | sinks.Sinks(tokens=64)},
    "documents 2048": lambda: {"mask": causal.Causal(), "segment_ids": documents(2048)},
    "neighbours 13x13 on 128x128": lambda: {
        "mask": neighborhood.Neighborhood(shape=(128, 128), kernel_size=13)
    },
    "random 10 %": lambda: {"mask": random_blocks(0.1)},
    "random 30 %": lambda: {"mask": random_blocks(0.3)},
    "random 60 %": lambda: {"mask": random_blocks(0.6)},
}


def milliseconds(f, *args, batches: int = 7) -> float:
    """Median time of a call, several calls in flight so that dispatch is hidden."""
    jax.block_until_ready(f(*args))
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    calls = max(3, min(50, int(0.03 / (time.perf_counter() - start))))
    times = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            result = f(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return 1e3 * statistics.median(times)


def problem(heads=HEADS, kv_heads=HEADS, dim=DIM, dtype=jnp.bfloat16):
    """Random q, k, v and dout."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(1, LENGTH, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True)]


def measure(name: str, **sizes) -> dict:
    """Forward and backward times of one workload."""
    arguments = WORKLOADS[name]()
    call = functools.partial(attend, impl="triton_gpu", **arguments)
    q, k, v, dout = problem(**sizes)

    @jax.jit
    def both(q, k, v, dout):
        out, pull = jax.vjp(call, q, k, v)
        return out, pull(dout)

    forward = milliseconds(jax.jit(call), q, k, v)
    return {
        "name": name,
        **sizes,
        "forward": forward,
        "backward": milliseconds(both, q, k, v, dout) - forward,
    }


def time_all(out: pathlib.Path | None) -> None:
    """Times all workloads, and causal and window for D = 64 and GQA."""
    cells = [(name, {}) for name in WORKLOADS]
    for name in ("causal", "window 1024"):
        cells += [(name, {"dim": 64}), (name, {"heads": 32, "kv_heads": 8})]
    rows = []
    for name, sizes in cells:
        row = measure(name, **sizes)
        rows.append(row)
        print(f"{name:30s} {sizes!s:32s} {row['forward']:7.3f} {row['backward']:7.3f}", flush=True)
        if out is not None:  # After every row: a run that is cut short keeps what it has.
            out.parent.mkdir(parents=True, exist_ok=True)
            report = {"device": jax.devices()[0].device_kind, "unit": "ms", "rows": rows}
            out.write_text(json.dumps(report, indent=1))


def sweep() -> None:
    """Each kernel alone, for several tiles; "forward" also on masks with many PARTIAL blocks."""
    partial = ("neighbours 13x13 on 128x128", "window 512 both, 64 global")
    for name in ("causal", "window 1024", *partial):
        sweep_one(128, name, {"forward": [(128, 64, 8, 3), (128, 128, 8, 3)]})
    tiles = {
        "forward": [(128, 128, 8, 3), (128, 128, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3)],
        "dq": [(128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 3)],
        "dkv": [(64, 128, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2), (64, 128, 4, 3)],
    }
    sweep_one(64, "causal", tiles)


def sweep_one(dim: int, name: str, candidates: dict) -> None:
    """Prints the time of each kernel for each (queries, keys, warps, stages)."""
    from sparse_attn.ops.block_sparse import triton_gpu

    chosen = triton_gpu._tiles
    q, k, v, dout = problem(dim=dim)
    mask = lower.lower(WORKLOADS[name]()["mask"], q_len=LENGTH)

    def inputs(q, k, v):
        return inputs_lib.Inputs(q, k, v, mask, *[None] * 6, dim**-0.5, None)

    out, lse = jax.jit(lambda q, k, v: triton_gpu.forward(inputs(q, k, v)))(q, k, v)
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)

    def run(q, k, v, lse, dout, delta, kernel):
        if kernel == "forward":
            return triton_gpu.forward(inputs(q, k, v))
        grads = triton_gpu.backward(inputs(q, k, v), lse, dout, delta)
        return grads.dq if kernel == "dq" else (grads.dk, grads.dv)

    for kernel, options in candidates.items():
        for option in options:
            tile = {kernel: triton_gpu.Tile(*option)}
            triton_gpu._tiles = lambda i, tile=tile: chosen(i)._replace(**tile)
            call = jax.jit(functools.partial(run, kernel=kernel))
            try:
                took = f"{milliseconds(call, q, k, v, lse, dout, delta, batches=3):.3f}"
            except Exception as error:  # A tile may not fit: the table says so.
                took = f"{type(error).__name__}: {str(error)[:60]}"
            print(f"D={dim} {name:28s} {kernel:8s} {option} {took}", flush=True)
    triton_gpu._tiles = chosen


def flex(names=("causal", "window 1024", "random 30 %")) -> None:
    """FlexAttention on the same masks."""
    import torch
    from torch.nn.attention import flex_attention as flex_lib

    q, k, v, dout = (
        torch.randn(1, HEADS, LENGTH, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    compiled = torch.compile(flex_lib.flex_attention, dynamic=False)
    states = torch.tensor(
        np.stack([block_mask.block_states(random_blocks(0.3), table=h) for h in range(HEADS)]) > 0
    ).cuda()
    rules = {
        "causal": lambda b, h, q, kv: q >= kv,
        "window 1024": lambda b, h, q, kv: (q >= kv) & (q - kv < 1024),
        "random 30 %": lambda b, h, q, kv: (q >= kv) & states[h, q // 128, kv // 128],
    }
    for name in names:
        heads = HEADS if name.startswith("random") else None
        mask = torch.compile(flex_lib.create_block_mask)(rules[name], None, heads, LENGTH, LENGTH)

        def forward(mask=mask):
            return compiled(q, k, v, block_mask=mask)

        def timed(f):
            for _ in range(3):
                f()
            times = []
            for _ in range(15):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                f()
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
            return statistics.median(times)

        out = forward()
        back = timed(lambda out=out: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
        print(f"flex {name:25s} {timed(forward):7.3f} {back:7.3f}", flush=True)


def contract(shards: int, shard: int | None) -> int:
    """All cases of the contract suite; the number that fail."""
    if shard is None:
        commands = [
            [sys.executable, "-m", __spec__.name, "contract", f"--shards={shards}", f"--shard={i}"]
            for i in range(shards)
        ]
        return sum(p.wait() for p in [subprocess.Popen(c) for c in commands])
    from tests.ops import contract as suite

    failures = 0
    for case in suite.CASES[shard::shards]:
        try:
            suite.check(case, "triton_gpu")
        except Exception as error:
            failures += 1
            print(f"FAIL {case.name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    print(f"shard {shard}: {len(suite.CASES[shard::shards])} cases, {failures} failed", flush=True)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["contract", "time", "sweep", "flex"])
    parser.add_argument("--out", type=pathlib.Path, default=None)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--shard", type=int, default=None)
    arguments = parser.parse_args()
    match arguments.what:
        case "contract":
            sys.exit(contract(arguments.shards, arguments.shard))
        case "time":
            time_all(arguments.out)
        case "sweep":
            sweep()
        case "flex":
            flex()


if __name__ == "__main__":
    main()
