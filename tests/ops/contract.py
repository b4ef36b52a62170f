"""The contract of `attend`: the environment each backend runs in, what it refuses, one check.

`check(case, backend)` compares forward, lse and every gradient with the float64 oracle. A backend
joins by existing in `attend.backends()`; what it refuses must be listed in `REFUSALS`.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import packaging.version

from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from tests.ops import oracle, problems

# What a test of one backend needs of the problems.
Case, Environment, Problem = problems.Case, problems.Environment, problems.Problem
CASES, BY_NAME, build = problems.CASES, problems.BY_NAME, problems.build

# Most of the time goes into compiling programs that run once: on CPU, optimise them less.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


@contextlib.contextmanager
def _tpu():
    from jax.experimental.pallas import tpu as pltpu

    with (
        tiles.assume(tiles.Target("tpu", "TPU v5 lite")),
        pltpu.force_tpu_interpret_mode(),
    ):
        yield


@contextlib.contextmanager
def _hopper():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with (
        tiles.assume(tiles.Target("gpu", "NVIDIA H200", "9.0")),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()),
    ):
        yield


def environment(backend: str) -> Environment:
    """The environment of a backend; one without an entry here runs as it is."""
    on_gpu = jax.default_backend() == "gpu"
    match backend:
        case "pallas_tpu":
            if jax.default_backend() == "tpu":
                return Environment(head_dim=128, block=128)
            return Environment(_tpu, head_dim=32, block=128, interpreted=True)
        case "pallas_gpu":
            native = {"dtype": jnp.bfloat16, "head_dim": 64, "block": 64}
            if on_gpu:
                return Environment(**native)
            if packaging.version.parse(jax.__version__) < packaging.version.parse("0.11.2"):
                needs = "its interpreter needs jax >= 0.11.2 (Python >= 3.12)"
                return Environment(reason=f"{needs}, this is {jax.__version__}")
            return Environment(_hopper, interpreted=True, **native)
        case "triton_gpu":
            native = {"dtype": jnp.float16, "head_dim": 32, "block": 64}
            if on_gpu:
                return Environment(**native)
            if importlib.util.find_spec("triton") is None:
                return Environment(reason="its interpreter needs triton, which exists for Linux")
            from tests.ops import triton_shim  # Before the kernels, which it has interpreted.

            return Environment(triton_shim.environment, interpreted=True, **native)
    return Environment()


# Backend -> {case name: what its refusal says}. A case refused but not listed fails, and so does a
# case listed but not refused: this table is what each backend cannot do.
REFUSALS: dict[str, dict[str, str]] = {
    "pallas_gpu": {"float32": "not float32"},
}


def solve(problem: Problem) -> oracle.Results:
    """What the oracle says."""
    return oracle.attention(
        problem.q, problem.k, problem.v, problem.visible, problem.dout, problem.dlse,
        key_bias=problem.key_bias, sink_logits=problem.sink_logits,
        scale=problem.q.shape[-1] ** -0.5 if problem.scale is None else problem.scale,
        soft_cap=problem.logits_soft_cap,
    )  # fmt: skip


_solve_case = functools.lru_cache(maxsize=256)(lambda case, env: solve(build(case, env)))


def runner(problem: Problem, impl: str | None, *, traced: bool = False) -> Callable:
    """`f(problem) -> Results` of a backend: one jitted forward and backward for problems of these
    shapes, that differ in their arrays only; `traced` makes the mask an array too."""
    fixed = None if traced else problem.mask
    names = ("q", "k", "v", "key_bias", "sink_logits")

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def both(floats, others, mask, dout, dlse):
        def f(floats):
            return attend_lib.attend(
                **floats, mask=fixed if mask is None else mask,
                segment_ids=others[0], positions=others[1], scale=problem.scale,
                logits_soft_cap=problem.logits_soft_cap, return_lse=True, impl=impl,
            )  # fmt: skip

        results, pull = jax.vjp(f, floats)
        return results, pull((dout, dlse))[0]

    def call(problem: Problem) -> oracle.Results:
        floats = {n: getattr(problem, n) for n in names if getattr(problem, n) is not None}
        mask = problem.mask if traced else None
        arguments = (
            floats, (problem.segment_ids, problem.positions), mask, problem.dout, problem.dlse
        )  # fmt: skip
        results, grads = both(*jax.tree.map(jnp.asarray, arguments))
        (out, lse), grads = jax.tree.map(np.asarray, (results, grads))
        return oracle.Results(out, lse, *(grads.get(name) for name in names))

    return call


def run(problem: Problem, impl: str | None, *, traced: bool = False) -> oracle.Results:
    """What a backend says about one problem."""
    return runner(problem, impl, traced=traced)(problem)


@functools.lru_cache(maxsize=64)
def plain(case: Case, env: Environment) -> oracle.Results:
    """A dense computation in the case's own precision, by JAX: the measure of its rounding."""
    problem = build(case, env)
    cap, low = problem.logits_soft_cap, problem.q.dtype
    scale = problem.q.shape[-1] ** -0.5 if problem.scale is None else problem.scale
    group = case.heads // case.kv_heads
    bias = problem.key_bias
    bias = 0.0 if bias is None else bias.reshape(case.batch, -1, 1, case.keys)

    def dense(floats):
        q, k, v = floats
        k, v = (jnp.repeat(x, group, 2) for x in (k, v))
        logits = jnp.einsum("btnh,bsnh->bnts", q, k) * jnp.asarray(scale, low)
        # A float16 product overflows before it is scaled; a measure must stay a number.
        scaled_first = jnp.einsum("btnh,bsnh->bnts", q * jnp.asarray(scale, low), k)
        logits = jnp.where(jnp.isfinite(logits), logits, scaled_first)
        if cap is not None:
            logits = jnp.asarray(cap, low) * jnp.tanh(logits / jnp.asarray(cap, low))
        logits = jnp.where(problem.visible, logits.astype(jnp.float32) + bias, -jnp.inf)
        top = jnp.maximum(logits.max(-1, keepdims=True), -1e30)
        if problem.sink_logits is not None:
            sink = jnp.asarray(problem.sink_logits)[:, None, None]
            top = jnp.maximum(top, sink)
        top = jax.lax.stop_gradient(top)
        weights = jnp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        if problem.sink_logits is not None:
            total = total + jnp.exp(sink - top)
        empty = total == 0
        safe = jnp.where(empty, 1, total)
        out = jnp.einsum("bnts,bsnh->btnh", (weights / safe).astype(low), v)
        lse = jnp.where(empty, -jnp.inf, top + jnp.log(safe))
        return out, lse[..., 0].swapaxes(1, 2)

    @jax.jit
    def both(floats, cotangents):
        results, pull = jax.vjp(dense, floats)
        return *results, *pull(cotangents)[0]

    arrays = both((problem.q, problem.k, problem.v), (problem.dout, problem.dlse))
    return oracle.Results(*map(np.asarray, arrays))


# Absolute errors allowed for values of order 1: (out and lse, gradients).
FLOORS = {"float32": (1e-5, 1e-4), "float16": (2e-3, 4e-3), "bfloat16": (1e-2, 2e-2)}


def compare(got: oracle.Results, want: oracle.Results, dtype, measure=None, extra=0.0) -> None:
    """Asserts closeness: 2 x the error of a plain dense computation (`measure`) plus a floor."""
    forward, backward = FLOORS[np.dtype(dtype).name]
    for name, mine, truth in zip(want._fields, got, want, strict=True):
        assert (mine is None) == (truth is None), name
        if truth is None:
            continue
        assert mine.shape == truth.shape, (name, mine.shape, truth.shape)
        mine = np.asarray(mine, np.float64)
        empty = truth == -np.inf
        np.testing.assert_array_equal(mine == -np.inf, empty, err_msg=f"{name}: empty rows")
        mine, truth = np.where(empty, 0, mine), np.where(empty, 0, truth)
        assert np.isfinite(mine).all(), f"{name} has {(~np.isfinite(mine)).sum()} non-finite values"
        floor = extra + (forward if name in ("out", "lse") else backward)
        bound = floor * max(1.0, np.abs(truth).max())
        if measure is not None and getattr(measure, name) is not None:
            theirs = np.where(empty, 0, np.asarray(getattr(measure, name), np.float64))
            bound += 2 * np.abs(theirs - truth).max()
        error = np.abs(mine - truth).max()
        assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g}"


def check(case: Case | str, backend: str) -> None:
    """Runs one case on one backend and compares it with the oracle, or with `REFUSALS`."""
    case = BY_NAME[case] if isinstance(case, str) else case
    env = environment(backend)
    problem = build(case, env)
    expected = REFUSALS.get(backend, {}).get(case.name)
    with env.enter():
        try:
            got = run(problem, backend, traced=case.traced)
        except NotImplementedError as error:
            got, refusal = None, str(error)
    if got is None:
        assert expected, f"{backend} refuses {case.name}, REFUSALS does not list it: {refusal}"
        assert expected in refusal, f"{backend} refuses {case.name} for another reason: {refusal}"
        return
    assert not expected, f"{backend} takes {case.name}: remove it from REFUSALS ({expected})"
    dtype = problem.q.dtype
    measure = plain(case, env) if dtype != np.float32 else None
    compare(got, _solve_case(case, env), dtype, measure, extra=case.logits * 2**-21)
