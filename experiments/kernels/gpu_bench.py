"""Times our GPU kernels beside FlexAttention, cuDNN and JAX's own Mosaic attention.

One run on a GPU makes one table, a JSON file and a plot, named after the kernels and the device:

    python -m experiments.kernels.gpu_bench [--kernel triton_gpu] [--out DIR] [--only NAME ...]

Backward times include `delta = sum(dout * out)`. Effective TFLOP/s count 4 D flops per visible
pair forward and 10 D backward; active-block TFLOP/s count the pairs of the blocks that are run.
"""

import argparse
import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU.

import jax
import jax.numpy as jnp

from experiments.kernels import bench, gpu_workloads
from sparse_attn.masks import segments
from sparse_attn.ops.block_sparse import inputs as inputs_lib

_BUDGET_MS, _ROUNDS = 40.0, 5  # Milliseconds of work per measurement; the median of so many.


def median_ms(fn, *args) -> float:
    """Time of one call among many that are in flight together: the device's, not the host's."""
    jax.block_until_ready(fn(*args))
    start = time.perf_counter()
    jax.block_until_ready([fn(*args) for _ in range(3)])
    calls = max(3, min(50, int(_BUDGET_MS / (1e3 * (time.perf_counter() - start) / 3))))
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            result = fn(*args)
        jax.block_until_ready(result)
        times.append(1e3 * (time.perf_counter() - start) / calls)
    return statistics.median(times)


def _arrays(work, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (work.heads, work.kv_heads, work.kv_heads, work.heads)
    return [
        jax.random.normal(key, (1, work.q_len, n, work.head_dim), dtype)
        for key, n in zip(keys, heads, strict=True)
    ]


def ours(work, kernel: str):
    """Compiled forward and backward of a backend of ours, the mask and the time to build it."""
    backend = importlib.import_module(f"sparse_attn.ops.block_sparse.{kernel}")
    started = time.perf_counter()
    mask, ids = work.lowered(), work.segment_ids()
    build_ms = 1e3 * (time.perf_counter() - started)
    if ids is not None:
        ids = jnp.asarray(ids)
        restrict = jax.jit(lambda ids: segments.restrict(mask, ids, ids))
        mask = jax.block_until_ready(restrict(ids))
        build_ms = median_ms(restrict, ids)

    def inputs(q, k, v, mask):
        return inputs_lib.Inputs(
            q, k, v, mask, ids, ids, None, None, None, None, work.head_dim**-0.5, None
        )

    def forward(q, k, v, mask):
        return backend.forward(inputs(q, k, v, mask))

    def backward(q, k, v, mask, out, lse, dout):
        delta = jnp.einsum("bthd,bthd->bth", out.astype(jnp.float32), dout.astype(jnp.float32))
        return backend.backward(inputs(q, k, v, mask), lse, dout, delta)

    # Static lists are constants of the program, run-time lists its arguments.
    static = mask if mask.is_static else None
    given = None if mask.is_static else mask

    def pick(m):
        return static if m is None else m

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.eval_shape(lambda: _arrays(work))]
    q, k, v, dout = shapes
    lse = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    given_shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
    run_forward = jax.jit(lambda q, k, v, m: forward(q, k, v, pick(m)))
    run_backward = jax.jit(lambda q, k, v, m, o, s, do: backward(q, k, v, pick(m), o, s, do))
    forward_ = run_forward.lower(q, k, v, given_shape).compile()
    backward_ = run_backward.lower(q, k, v, given_shape, dout, lse, dout).compile()
    return {
        "mask": work.lowered(), "build_ms": build_ms, "given": given,
        "forward": forward_, "backward": backward_,
    }  # fmt: skip


def time_ours(work, compiled) -> dict:
    """Milliseconds and rates of our kernels."""
    q, k, v, dout = _arrays(work)
    given = compiled["given"]
    out, lse = compiled["forward"](q, k, v, given)
    fwd = median_ms(compiled["forward"], q, k, v, given)
    bwd = median_ms(compiled["backward"], q, k, v, given, out, lse, dout)
    visible, active = work.pairs(compiled["mask"])
    flops = 4 * work.head_dim * visible
    return {
        "fwd_ms": fwd, "bwd_ms": bwd, "build_ms": compiled["build_ms"],
        "fwd_tflops": flops / fwd / 1e9, "bwd_tflops": 2.5 * flops / bwd / 1e9,
        "fwd_active_tflops": 4 * work.head_dim * active / fwd / 1e9,
        "bwd_active_tflops": 10 * work.head_dim * active / bwd / 1e9,
        "density": visible / work.heads / work.q_len**2,
    }  # fmt: skip


def time_cudnn(work) -> dict:
    """cuDNN through `jax.nn.dot_product_attention`; backward = both minus forward."""
    if work.cudnn is None:
        return {}
    q, k, v, dout = _arrays(work)

    def attention(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **work.cudnn)

    def both(q, k, v, dout):
        return jax.vjp(attention, q, k, v)[1](dout)

    fwd = median_ms(jax.jit(attention), q, k, v)
    return {"cudnn_fwd_ms": fwd, "cudnn_bwd_ms": median_ms(jax.jit(both), q, k, v, dout) - fwd}


def time_mosaic(work) -> dict:
    """JAX's in-tree Mosaic GPU attention, float16, forward."""
    if work.name not in ("full", "causal", "causal, D 64"):
        return {}
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    q, k, v, _ = _arrays(work, jnp.float16)
    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2, causal="causal" in work.name
    )
    scaled = q * jnp.float16(work.head_dim**-0.5)  # It has no scale of its own.
    fwd = median_ms(
        jax.jit(lambda q, k, v: attention_mgpu.attention(q, k, v, config)), scaled, k, v
    )
    return {"mosaic_fwd_ms": fwd}


def compile_flex(work, time_build: bool) -> dict:
    """torch FlexAttention, compiled, with the same rule at block 128: its forward and backward.

    `time_build` compiles what builds its mask too, which takes minutes, and times that.
    """
    import torch
    from torch.nn.attention import flex_attention as flex

    torch._dynamo.config.cache_size_limit = 64
    shape = (1, work.heads, work.q_len, work.head_dim)
    kv_shape = (1, work.kv_heads, work.q_len, work.head_dim)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for s in (shape, kv_shape, kv_shape)
    )
    dout = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    rule, mask, build = work.flex(torch, "cuda"), None, 0.0 if time_build else None
    if rule is not None:
        build_mask = flex.create_block_mask
        if time_build:
            build_mask = torch.compile(build_mask)
        heads = work.heads if work.name.startswith("random") else None

        def make():
            return build_mask(rule, None, heads, work.q_len, work.q_len, device="cuda")

        mask = make()
        if time_build:
            torch.cuda.synchronize()
            started = time.perf_counter()
            mask = make()
            torch.cuda.synchronize()
            build = 1e3 * (time.perf_counter() - started)
        torch.cuda.empty_cache()  # Uncompiled, it made every pair; others need the memory.
    attention = torch.compile(flex.flex_attention, dynamic=False)
    gqa = work.heads != work.kv_heads

    def forward():
        return attention(q, k, v, block_mask=mask, enable_gqa=gqa)

    out = forward()

    def backward():
        return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    backward()
    torch.cuda.synchronize()
    return {"calls": (forward, backward, build)}


def time_flex(calls) -> dict:
    """Milliseconds of what `compile_flex` made."""
    from triton import testing

    forward, backward, build = calls
    fwd, bwd = (
        testing.do_bench(f, warmup=20, rep=_BUDGET_MS, return_mode="median")
        for f in (forward, backward)
    )
    built = {} if build is None else {"flex_build_ms": build}
    return {"flex_fwd_ms": fwd, "flex_bwd_ms": bwd, **built}


def _guarded(fn, *args) -> dict:
    try:
        return fn(*args)
    except Exception as error:  # One missing baseline must not lose the others.
        return {f"{fn.__name__}_error": f"{type(error).__name__}: {str(error)[:300]}"}


def _ratio(a, b):
    return a / b if a and b else ""


def _row(result) -> dict:
    get = result.get
    return {
        "workload": result["workload"],
        "fwd ms": get("fwd_ms", ""), "TF/s": get("fwd_tflops", ""),
        "active": get("fwd_active_tflops", ""),
        "Flex/ours": _ratio(get("flex_fwd_ms"), get("fwd_ms")),
        "cuDNN/ours": _ratio(get("cudnn_fwd_ms"), get("fwd_ms")),
        "Mosaic/ours": _ratio(get("mosaic_fwd_ms"), get("fwd_ms")),
        "bwd ms": get("bwd_ms", ""), "bwd TF/s": get("bwd_tflops", ""),
        "bwd active": get("bwd_active_tflops", ""),
        "Flex/ours bwd": _ratio(get("flex_bwd_ms"), get("bwd_ms")),
        "cuDNN/ours bwd": _ratio(get("cudnn_bwd_ms"), get("bwd_ms")),
        "build ms": get("build_ms", ""), "Flex build": get("flex_build_ms", ""),
    }  # fmt: skip


def plot(results, path) -> None:
    """Bars of effective TFLOP/s, forward and backward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(15, 6), sharey=True)
    names = [r["workload"] for r in results]
    for axis, way in zip(axes, ("fwd", "bwd"), strict=True):
        for i, (label, key) in enumerate(
            (
                ("ours", f"{way}_ms"),
                ("FlexAttention", f"flex_{way}_ms"),
                ("cuDNN", f"cudnn_{way}_ms"),
            )
        ):
            rates = [
                r[f"{way}_tflops"] * r[f"{way}_ms"] / r[key] if r.get(key) else 0 for r in results
            ]
            axis.barh([y + 0.27 * i for y in range(len(names))], rates, 0.27, label=label)
        axis.set_title({"fwd": "forward", "bwd": "backward"}[way])
        axis.set_xlabel("effective TFLOP/s")
        axis.set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _work(name: str, kernel: str) -> None:
    """Compiles one workload, waits for a line on stdin, times it and prints the result."""
    (work,) = (w for w in gpu_workloads.WORKLOADS if w.name == name)
    # FlexAttention first: importing jax-triton takes the compiler's cache folder from torch.
    flex = _guarded(compile_flex, work, kernel == "pallas_gpu")
    compiled = ours(work, kernel)
    print("READY", flush=True)
    sys.stdin.readline()
    result = {"workload": work.name, **_guarded(time_ours, work, compiled)}
    for baseline in (time_cudnn, time_mosaic):
        result |= _guarded(baseline, work)
    result |= _guarded(time_flex, flex["calls"]) if "calls" in flex else flex
    print("RESULT " + json.dumps(result), flush=True)


def _answer(process, word: str) -> str:
    """The rest of the first line of a process that begins with `word`; "" if it ends before."""
    for line in process.stdout:
        if line.startswith(word):
            return line[len(word) :].strip()
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="experiments/kernels/results", help="folder of the files")
    parser.add_argument("--only", nargs="*", help="names (or parts of names) of workloads")
    parser.add_argument("--kernel", choices=("pallas_gpu", "triton_gpu"), default="pallas_gpu")
    parser.add_argument("--show", type=pathlib.Path, help="only table and plot this results file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        _work(options.work, options.kernel)
        return
    if options.show is not None:
        print(show(options.show))
        return
    chosen = [
        w
        for w in gpu_workloads.WORKLOADS
        if options.only is None or any(name in w.name for name in options.only)
    ]
    # A process each: compiling takes far longer than timing. All compile at the same time; they
    # are timed one after the other, when nobody compiles.
    command = [sys.executable, "-m", "experiments.kernels.gpu_bench", "--kernel", options.kernel]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, "--work", work.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment,
        )
        for work in chosen
    ]  # fmt: skip
    for process in processes:
        _answer(process, "READY")
    results = []
    for work, process in zip(chosen, processes, strict=True):
        try:
            process.stdin.write("go\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass
        found = _answer(process, "RESULT ")
        process.wait()
        results.append(json.loads(found) if found else {"workload": work.name, "error": "ended"})
        print(_short(results[-1]), flush=True)
    stem = f"{options.kernel}_{bench.file_stem(jax.devices()[0].device_kind)}"
    print(show(bench.write(results, pathlib.Path(options.out) / f"{stem}.json")))


def show(path: pathlib.Path) -> str:
    """The table of a results file; it and the plot are written beside the file."""
    content = json.loads(path.read_text())
    plot([r for r in content["results"] if "fwd_ms" in r], path.with_suffix(".png"))
    table = bench.table([_row(r) for r in content["results"]])
    where = content["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    text = f"{where['device']}, {versions}, {where['date']}\n\n{table}\n"
    path.with_suffix(".md").write_text(text)
    return table


def _short(result) -> dict:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}


if __name__ == "__main__":
    main()
