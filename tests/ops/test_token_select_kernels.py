"""Lists of blocks on the accelerators' kernels, by their interpreters where there is no device."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from sparse_attn.ops.token_select import attend as select_lib
from sparse_attn.ops.token_select import lists
from sparse_attn.patterns import causal, full, local
from tests.ops import contract, oracle, triton_compile
from tests.ops import test_token_select as cases_lib


def _cells():
    for kernel in attend_lib.backends():
        env = contract.environment(kernel)
        if kernel in ("reference", "xla"):
            continue  # The contract of the op has run on these.
        marks = [pytest.mark.slow] if env.interpreted or env.reason else []
        if env.reason is not None:
            marks.append(pytest.mark.skip(reason=f"{kernel}: {env.reason}"))
        # Interpreters of Triton take minutes for the many tiles of this op.
        if kernel == "triton_gpu" and env.interpreted:
            marks.append(pytest.mark.skip(reason="triton_gpu: runs on an NVIDIA GPU"))
        yield pytest.param(kernel, id=kernel, marks=marks)


@pytest.mark.parametrize("kernel", list(_cells()))
def test_kernel_runs_the_lists(kernel):
    env = contract.environment(kernel)
    rng = np.random.default_rng(0)
    length, block = 150, max(64, env.block or 0)
    q, k, v, dout = (
        jnp.asarray(rng.standard_normal((1, length, n, env.head_dim)), env.dtype)
        for n in (4, 2, 2, 4)
    )
    dlse = jnp.asarray(rng.standard_normal(q.shape[:3]), jnp.float32)
    selected = rng.integers(-1, -(-length // block), (1, length, 2, 2)).astype(np.int32)

    @jax.jit
    def both(q, k, v):
        def f(q, k, v):
            return select_lib.attend(
                q, k, v, selected=jnp.asarray(selected), block=block, return_lse=True,
                impl="by_block", kernel=kernel,
            )  # fmt: skip

        results, pull = jax.vjp(f, q, k, v)
        return *results, *pull((dout, dlse))

    with env.enter():
        got = oracle.Results(*map(np.asarray, both(q, k, v)))
    at = np.arange(length)
    seen = (selected[..., None] == at // block).any(3).swapaxes(1, 2) & np.tri(length, dtype=bool)
    want = oracle.attention(
        *map(np.asarray, (q, k, v)), np.repeat(seen, 2, 1), np.asarray(dout), np.asarray(dlse),
        scale=env.head_dim**-0.5,
    )  # fmt: skip
    contract.compare(got, want, q.dtype, extra=0.0 if q.dtype == jnp.float32 else 0.02)


# --- The kernels of triton_gpu --------------------------------------------------------------------


@pytest.fixture
def triton_gpu():
    """The backend, where it runs."""
    env = contract.environment("triton_gpu")
    if env.reason is not None:
        pytest.skip(env.reason)
    from sparse_attn.ops.token_select import triton_gpu

    cases_lib._both.clear_cache()  # Sizes of tiles are no part of its key.
    with env.enter():
        yield triton_gpu
    cases_lib._both.clear_cache()


CASES = [
    # Blocks in parts, more tiles of a block than a program takes, and several tables a KV head.
    cases_lib.Case("parts", 75, None, 4, 1, 2, 4, 48, 1, pattern=local.Local(window=40)),
    cases_lib.Case("group_of_16", 20, None, 16, 1, 1, 2, 16, 1, dims=(16, 16)),
    cases_lib.Case("group_of_32", 12, None, 32, 1, 1, 2, 16, 1, dims=(16, 16)),
    cases_lib.Case("group_of_three", 30, None, 6, 2, 2, 3, 32, 2, dims=(24, 8)),
    cases_lib.Case("group_of_one", 60, None, 2, 2, 2, 3, 32, 1, documents=True),
    cases_lib.Case("tables_between", 50, None, 8, 2, 4, 3, 16, 1, pattern=full.Full()),
    cases_lib.Case("bfloat16", 60, None, 4, 2, 4, 3, 32, 1, dtype=jnp.bfloat16),
    cases_lib.Case("poisoned", 60, None, 4, 2, 4, 3, 32, 1, poison=True),
]
FAST = {"parts"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=() if c.name in FAST else pytest.mark.slow) for c in CASES],
)
def test_small_tiles_segments_and_steps(case, triton_gpu, monkeypatch):
    small = triton_gpu.Tile(rows=32, keys=32, tiles=2, warps=4, stages=1)
    sizes = triton_gpu.Tiles(small, small._replace(rows=16, tiles=3), triton_gpu.Sum(128, 2, 1))
    monkeypatch.setattr(triton_gpu, "_tiles", lambda inputs: sizes)
    monkeypatch.setattr(
        triton_gpu, "_AT_ONCE", 2 * case.batch * case.q_len * case.heads * max(case.dims)
    )
    cases_lib.check(case, "triton_gpu")


def test_dq_of_few_rows_is_flipped_on_hopper(triton_gpu):
    """Its products have 64 rows at least: elsewhere the same tile is not flipped."""
    case = cases_lib.Case("few_rows", 40, None, 6, 2, 2, 3, 32, 1, dtype=jnp.float16)
    inputs = select_lib.validate(
        *map(jnp.asarray, cases_lib.build(case)[:4]), 32, causal.Causal(), None, None
    )
    tile = triton_gpu.Tile(rows=32, keys=32, tiles=2, warps=4, stages=1)
    assert not triton_gpu._flipped(inputs, tile)
    with tiles.assume(tiles.Target("gpu", "NVIDIA H200", "9.0")):
        assert triton_gpu._flipped(inputs, tile)
        assert not triton_gpu._flipped(inputs, tile._replace(rows=64))
        small = triton_gpu.Tiles(tile, tile, triton_gpu.Sum(128, 2, 1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_gpu, "_tiles", lambda inputs: small)
            cases_lib.check(case, "triton_gpu")


def test_hopper_takes_large_blocks_of_wide_heads(triton_gpu):
    q = jnp.zeros((1, 300, 4, 256), jnp.bfloat16)
    inputs = select_lib.validate(
        q, q, q, jnp.zeros((1, 300, 4, 2), jnp.int32), 128, causal.Causal(), None, None
    )
    with tiles.assume(tiles.Target("gpu", "NVIDIA H200", "9.0")):
        triton_gpu.check(inputs, None)


def test_gradients_where_the_lists_depend_on_the_queries(triton_gpu):
    """The plan is no part of what is differentiated, though it comes from what is."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 40, 2, 16), jnp.float16)

    def f(impl, q, k, v):
        selected = lists.by_mean_key(q, k, block=16, top_k=1)
        out = select_lib.attend(q, k, v, selected=selected, block=16, impl=impl)
        return out.astype(jnp.float32).sum()

    want, got = (
        jax.jit(jax.grad(functools.partial(f, impl), argnums=(0, 1, 2)))(q, k, v)
        for impl in ("xla", "triton_gpu")
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_repeats_are_equal_bit_by_bit(triton_gpu):
    case = cases_lib.Case("repeats", 30, None, 4, 2, 4, 3, 16, 1, dtype=jnp.bfloat16)
    q, k, v, selected, ids, _, dout, dlse = cases_lib.build(case)
    arguments = (("triton_gpu", 16, causal.Causal()), q, k, v, selected, ids, dout, dlse)
    first, second = (cases_lib._both(*arguments) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("array, value", [("k", np.nan), ("v", np.inf)])
def test_visible_nan_spoils_who_sees_it_and_no_other(array, value, triton_gpu):
    case = cases_lib.Case("spoiled", 40, None, 2, 1, 1, 2, 16, 1, dims=(16, 16))
    q, k, v, selected, ids, _, dout, dlse = cases_lib.build(case)
    {"k": k, "v": v}[array][:, 20, :, 3] = value
    mine, theirs = (
        cases_lib._both((impl, 16, causal.Causal()), q, k, v, selected, ids, dout, dlse)
        for impl in ("triton_gpu", "xla")
    )
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        np.testing.assert_allclose(np.nan_to_num(a), np.nan_to_num(b), atol=1e-5)
    assert np.isnan(mine[0]).any()
    assert not np.isnan(mine[0]).all()


def test_best_backend_of_a_gpu(triton_gpu):
    """`triton_gpu`, and where it refuses, with its reason, `by_block`."""

    def choose(block=16, kernel=None, dtype=jnp.float16, dim=16, impl=None):
        q = jnp.zeros((1, 40, 2, dim), dtype)
        selected = jnp.zeros((1, 40, 2, 2), jnp.int32)
        inputs = select_lib.validate(q, q, q, selected, block, causal.Causal(), None, None)
        return select_lib._choose(inputs, impl, kernel).__name__.rsplit(".", 1)[-1]

    assert choose() == "triton_gpu"
    assert choose(block=24, kernel="xla") == "by_block"
    for options, reason in [
        ({"kernel": "triton_gpu"}, "kernel='triton_gpu' must be None"),
        ({"block": 256}, "block=256 must be a multiple of 16 up to 128; by_block takes any"),
        ({"dim": 288}, "head_dim=288 is over 256"),
        ({"block": 128, "dim": 256, "dtype": jnp.float32}, "in float32 does not fit the shared"),
    ]:
        with pytest.raises(NotImplementedError, match=reason):
            choose(impl="triton_gpu", **options)
    with (
        tiles.assume(tiles.Target("cpu", "cpu")),
        pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, the target is cpu"),
    ):
        choose(impl="triton_gpu")


@pytest.mark.slow
def test_the_check_for_a_gpu_runs(triton_gpu, tmp_path, capsys, monkeypatch):
    from experiments.selection import gpu_check

    monkeypatch.setattr(gpu_check, "REPEATS", 2)
    assert gpu_check.main(["--tiny", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("ok   ") == len(gpu_check.TINY)
    (path,) = tmp_path.glob("gpu_check_*.json")
    results = json.loads(path.read_text())["results"]
    assert [r["name"] for r in results] == [c.name for c in gpu_check.TINY]
    assert all(set(r["errors"]) == {"out", "lse", "dq", "dk", "dv"} for r in results)


CELLS = [
    {"capability": "9.0", "group": 2, "block": 16, "head_dim": 16, "documents": True},
    {"capability": "9.0", "group": 16},
    {"capability": "9.0", "group": 1, "block": 128, "documents": True},
    {"capability": "8.0", "group": 3, "block": 48, "head_dim": 256, "v_head_dim": 80},
    {"capability": "8.9", "group": 2, "block": 128, "head_dim": 128},
]


@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, id=str(c), marks=pytest.mark.slow if i else ()) for i, c in enumerate(CELLS)],
)
def test_kernels_compile_for(cell, tmp_path):
    """As of the block kernels: the compiler takes them, and they fit the device."""
    reports = triton_compile.reports(cell, tmp_path)
    plan = ["once", "count", "sum", "tiles", "place"]
    passes = ["segment", "forward", "merge", "segment", "backward", "merge", "sum", "sum"]
    names = [*plan, *passes]
    assert [r["kernel"].removesuffix("_kernel") for r in reports] == names
    for report in reports:
        products = report["kernel"] in ("forward_kernel", "backward_kernel")
        products = products and cell.get("dtype") != "float32"
        assert (report["matrix"] > 0) == products, report
