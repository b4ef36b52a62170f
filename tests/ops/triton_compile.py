"""Compiles the Triton kernels for an NVIDIA GPU that is not there; a program, as interpretation is
decided once per process.

    TRITON_INTERPRET=0 python -m tests.ops.triton_compile '{"capability": "9.0", "head_dim": 64}'
    TRITON_INTERPRET=0 python -m tests.ops.triton_compile '{"capability": "9.0", "group": 16}'

Prints one JSON line per kernel: its name, shared memory (bytes) and matrix instructions.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton
from triton.backends.compiler import GPUTarget

from sparse_attn import attend
from sparse_attn.masks import block_mask
from sparse_attn.ops import tiles
from sparse_attn.ops.token_select import attend as select_lib
from sparse_attn.ops.token_select import compress, lists, triton_plan
from sparse_attn.patterns import causal, local

# Capability -> bytes of shared memory that one program may take.
SHARED = {"8.0": 163 << 10, "8.9": 99 << 10, "9.0": 227 << 10, "12.0": 99 << 10}
_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32", "uint8": "u8"}


def reports(cell: dict[str, Any], cache: pathlib.Path) -> list[dict[str, Any]]:
    """What this program prints for a cell; every kernel fits the shared memory of its device."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton_compile", json.dumps(cell)],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    (inner,) = [cell[name] for name in ("choose", "plan") if name in cell] or [cell]
    capability = inner["capability"]
    for report in found:
        assert report["shared"] <= SHARED[capability], report
    return found


def triton_call(*args, kernel, out_shape, grid, num_warps, num_stages, **constants):
    """`jax_triton.triton_call` that compiles and returns zeros."""
    assert all(n > 0 for n in grid)
    arguments = [*args, *out_shape]
    signature, aligned = {}, {}
    for at, (name, x) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        signature[name] = "i32" if isinstance(x, int) else f"*{_TYPES[x.dtype.name]}"
        if not isinstance(x, int):
            aligned[(at,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    capability = int(float(tiles.target().compute_capability) * 10)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    text = compiled.asm["ptx"]
    report = {
        "kernel": kernel.__name__,
        "shared": compiled.metadata.shared,
        "matrix": text.count("wgmma.mma_async") + text.count("mma.sync"),
    }
    print(json.dumps(report))
    return tuple(jnp.zeros(s.shape, s.dtype) for s in out_shape)


def compile_cell(
    capability, head_dim, dtype="bfloat16", mask="window", everything=False, v_head_dim=None
):
    """Compiles the kernels of one call of `attend` and of its gradient."""
    length, heads, kv_heads = 300, 4, 2
    masks = {
        "window": local.Local(window=70),
        "per_head": (local.Local(window=70), causal.Causal()) * 2,
        "bits": block_mask.from_array(np.tri(length, dtype=bool), block_q=64, block_kv=64),
    }
    options = {}
    if everything:
        options = {
            "segment_ids": jnp.ones((1, length), jnp.int32),
            "key_bias": jnp.zeros((1, length)),
            "sink_logits": jnp.zeros(heads),
            "logits_soft_cap": 30.0,
        }
    call = functools.partial(attend, mask=masks[mask], impl="triton_gpu", **options)
    _compile(call, capability, length, (heads, kv_heads), (head_dim, v_head_dim), dtype)


def compile_lists(
    capability, group, head_dim=128, block=64, tables=1, dtype="bfloat16", documents=False,
    v_head_dim=None,
):  # fmt: skip
    """Compiles the kernels of one call of `token_select` and of its gradient; `group` heads of
    each list, and `tables` lists of each of two KV heads."""
    length = 300
    ids = jnp.ones((1, length), jnp.int32) if documents else None
    call = functools.partial(
        select_lib.attend, selected=jnp.zeros((1, length, 2 * tables, 3), jnp.int32), block=block,
        segment_ids=ids, impl="triton_gpu",
    )  # fmt: skip
    _compile(call, capability, length, (2 * tables * group, 2), (head_dim, v_head_dim), dtype)


def _compile(call, capability, length, heads, dims, dtype):
    width, v_width = dims[0], dims[1] or dims[0]
    shapes = [(1, length, n, d) for n, d in zip((*heads, heads[1]), (width, width, v_width))]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]
    sys.modules["jax_triton"] = sys.modules[__name__]
    with tiles.assume(tiles.Target("gpu", "assumed", capability)):
        jax.eval_shape(
            lambda *x: jax.vjp(call, *x)[1](jnp.zeros((*shapes[0][:3], v_width), dtype)), *arrays
        )


def compile_choice(
    capability, widths=(), tokens=32768, means=512, dim=128, group=16, dtype="bfloat16",
    documents=False,
):  # fmt: skip
    """Compiles what chooses blocks: rows of some widths, and NSA and MoBA at a length."""
    sys.modules["jax_triton"] = sys.modules[__name__]
    q, k = (jax.ShapeDtypeStruct((1, tokens, n, dim), dtype) for n in (group, 1))
    strides = compress.Strides(size=32, stride=16)
    keys = jax.ShapeDtypeStruct((1, strides.count(tokens), 1, dim), dtype)
    lse = jax.ShapeDtypeStruct((1, tokens, group), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32) if documents else None
    by_scores = functools.partial(compress.choose_blocks, strides=strides, block=64, top_k=16)
    by_mean = functools.partial(lists.by_mean_key, block=tokens // means, top_k=8)
    with tiles.assume(tiles.Target("gpu", "assumed", capability)):
        for width in widths:
            row = jax.ShapeDtypeStruct((1000, width), jnp.float32)
            jax.eval_shape(lambda x: lists.best(x, 16, x > 0, x > 1), row)
        jax.eval_shape(lambda q, k, lse, ids: by_scores(q, k, lse, segment_ids=ids),
                       q, keys, lse, ids)  # fmt: skip
        jax.eval_shape(lambda q, k, ids: by_mean(q, k, segment_ids=ids), q, k, ids)


def compile_plan(capability, blocks, places, tile):
    """Compiles what plans lists of 32768 queries."""
    sys.modules["jax_triton"] = sys.modules[__name__]
    selected = jax.ShapeDtypeStruct((1, 32768, 2, places), jnp.int32)
    with tiles.assume(tiles.Target("gpu", "assumed", capability)):
        jax.eval_shape(lambda x: triton_plan.plan(x, tile=tile, blocks=blocks), selected)


if __name__ == "__main__":
    cell = json.loads(sys.argv[1])
    if "choose" in cell:
        compile_choice(**cell["choose"])
    elif "plan" in cell:
        compile_plan(**cell["plan"])
    else:
        (compile_lists if "group" in cell else compile_cell)(**cell)
