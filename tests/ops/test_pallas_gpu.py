"""The Hopper kernels without a GPU: refusals, that every cell lowers for CUDA, sharing out.

Their numbers are checked by the contract suite in the interpreter (test_contract.py), and on a GPU
by `python -m experiments.kernels.gpu_check`.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.masks import block_mask, lower
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import plgpu_compat, tiles
from sparse_attn.ops.block_sparse import gpu_walk, pallas_gpu, vjp
from sparse_attn.ops.block_sparse import inputs as inputs_lib
from sparse_attn.patterns import causal, local
from tests.ops import contract, problems

HOPPER = tiles.Target("gpu", "NVIDIA H200", "9.0")
WINDOW = local.Local(window=200)

needs_mosaic = pytest.mark.skipif(
    plgpu_compat.missing() is not None, reason=f"Mosaic GPU {plgpu_compat.missing()}"
)


def make_inputs(mask, *, dim=64, dtype=jnp.bfloat16, heads=2, kv_heads=2, length=512):
    q, k, v = (
        jax.ShapeDtypeStruct((1, length, n, dim), dtype) for n in (heads, kv_heads, kv_heads)
    )
    return inputs_lib.Inputs(q, k, v, mask, *(None,) * 6, dim**-0.5, None)


@needs_mosaic
@pytest.mark.parametrize(
    "target, change, reason",
    [
        (tiles.Target("cpu", "cpu"), {}, "needs an NVIDIA Hopper GPU"),
        (tiles.Target("gpu", "NVIDIA A100", "8.0"), {}, r"A100 \(8.0\)"),
        (tiles.Target("gpu", "NVIDIA B200", "10.0"), {}, "Hopper"),
        (HOPPER, {"dtype": jnp.float32}, "not float32"),
        (HOPPER, {"dim": 320}, "head_dim <= 256"),
    ],
)
def test_refuses_with_the_reason(target, change, reason):
    mask = lower.lower(WINDOW, q_len=512)
    with tiles.assume(target), pytest.raises(NotImplementedError, match=reason):
        pallas_gpu.check(make_inputs(mask, **change))


@needs_mosaic
def test_refuses_blocks_that_are_no_tiles():
    mask = lower.lower(WINDOW, q_len=512, block_kv=48)
    with tiles.assume(HOPPER), pytest.raises(NotImplementedError, match="block_kv=48"):
        pallas_gpu.check(make_inputs(mask))


def test_refuses_older_jax(monkeypatch):
    monkeypatch.setattr(plgpu_compat, "_OLDEST", (99, 0, 0))
    with tiles.assume(HOPPER), pytest.raises(NotImplementedError, match=r"needs jax >= 0.11.2"):
        pallas_gpu.check(make_inputs(lower.lower(WINDOW, q_len=512)))


@needs_mosaic
@pytest.mark.parametrize("impl", [None, "pallas_gpu"])
def test_hopper_takes_it(impl):
    inputs = make_inputs(lower.lower(WINDOW, q_len=512))
    with tiles.assume(HOPPER):
        assert attend_lib.choose(inputs, impl) is pallas_gpu


CELLS = [*itertools.product(
    (64, 128, 256), (64, 128), (jnp.bfloat16, jnp.float16), (1, 4), ("static", "run_time")
)]  # fmt: skip
# Every pair of a block, a group and a kind of tables is in these four.
FAST = [
    (128, block, jnp.bfloat16, group, "static" if (block == 64) == (group == 1) else "run_time")
    for block in (64, 128)
    for group in (1, 4)
]


@needs_mosaic
@pytest.mark.parametrize(
    "dim, block, dtype, group, tables",
    [pytest.param(*c, marks=() if c in FAST else pytest.mark.slow) for c in CELLS],
)
def test_lowers_for_cuda(dim, block, dtype, group, tables):
    mask = lower.lower(WINDOW, q_len=500, block_q=block, block_kv=block)
    inputs = make_inputs(mask, dim=dim, dtype=dtype, heads=group, kv_heads=1, length=500)
    assert gpu_walk.group_parts(inputs) == group  # So few columns that all heads are split.
    _lower_for_cuda(inputs, static=tables == "static")


def _lower_for_cuda(inputs, static=True):
    mask = inputs.mask
    arrays = {} if static else vjp._split(jax.tree.map(jnp.asarray, mask))[1]

    def both(q, k, v, dout, arrays):
        call = inputs._replace(q=q, k=k, v=v, mask=dataclasses.replace(mask, **arrays))
        with tiles.assume(HOPPER):
            pallas_gpu.check(call)
        out, lse = pallas_gpu.forward(call)
        return out, pallas_gpu.backward(call, lse, dout, lse)[:3]

    exported = jax.export.export(jax.jit(both), platforms=["cuda"])(*inputs[:3], inputs.q, arrays)
    assert exported.mlir_module().count("mosaic_gpu") >= 3  # Forward, dq, and dk with dv.


@needs_mosaic
def test_whole_groups_lower(monkeypatch):
    monkeypatch.setattr(gpu_walk, "SPLIT_BELOW", 0)
    mask = lower.lower(WINDOW, q_len=500)
    inputs = make_inputs(mask, dim=128, heads=4, kv_heads=1, length=500)
    assert gpu_walk.group_parts(inputs) == 1
    _lower_for_cuda(inputs)


@needs_mosaic
@pytest.mark.parametrize(
    "dim, v_dim",
    [(80, 48), *(pytest.param(*dims, marks=pytest.mark.slow) for dims in ((64, 128), (192, 128)))],
)
def test_values_of_another_width_lower(dim, v_dim):
    inputs = make_inputs(lower.lower(WINDOW, q_len=512), dim=dim)
    inputs = inputs._replace(v=jax.ShapeDtypeStruct((1, 512, 2, v_dim), jnp.bfloat16))

    def both(q, k, v):
        call = inputs._replace(q=q, k=k, v=v)
        out, lse = pallas_gpu.forward(call)
        return pallas_gpu.backward(call, lse, out, lse)[:3]

    assert jax.export.export(jax.jit(both), platforms=["cuda"])(*inputs[:3])


@needs_mosaic
@pytest.mark.parametrize("rule", [causal.Causal() & ~WINDOW, ~(WINDOW | ~causal.Causal())])
def test_rules_with_not_lower(rule):
    inputs = make_inputs(lower.lower(rule, q_len=512))

    def forward(q, k, v):
        return pallas_gpu.forward(inputs._replace(q=q, k=k, v=v))

    assert jax.export.export(jax.jit(forward), platforms=["cuda"])(*inputs[:3])


@pytest.mark.parametrize("heads, lists, masks, batch, own, rows", [
    (4, 1, 1, 2, 128, 128), (4, 4, 1, 1, 128, 64), (2, 1, 3, 3, 256, 128), (2, 2, 2, 2, 16, 16),
])  # fmt: skip
def test_every_program_is_served_once_longest_first(heads, lists, masks, batch, own, rows):
    lengths = np.random.default_rng(0).integers(0, 9, (masks, lists, 5))
    items, costs = gpu_walk._items(lengths, batch, heads, own, rows, np)
    split = own // rows
    want = set(itertools.product(range(batch), range(heads), range(5), range(5 * split)))
    want = {item for item in want if item[3] // split == item[2]}
    assert {tuple(item) for item in items.tolist()} == want
    assert len(items) == len(want)
    assert (np.diff(costs) <= 0).all()
    for (b, h, row, _), cost in zip(items, costs, strict=True):
        assert cost == lengths[b if masks > 1 else 0, h * lists // heads, row]


def test_uneven_programs_are_shared_out_evenly():
    costs = np.sort(np.r_[np.full(3, 100.0), np.random.default_rng(0).integers(1, 9, 200)])[::-1]
    items = np.arange(len(costs))[:, None]
    shared, bounds = gpu_walk._share_out(items, costs, 7)
    assert sorted(shared[:, 0]) == list(range(len(costs)))
    loads = [costs[shared[a:b, 0]].sum() for a, b in itertools.pairwise(bounds)]
    assert max(loads) <= max(costs.max(), costs.sum() / 7) + 9


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("blocks", [(64, 128), (256, 256), (192, 32)])
def test_mask_blocks_and_tiles_are_independent(blocks):
    mask = problems.blocks(local.Local(window=70), *blocks)
    case = problems.Case("tiles", mask, q_len=300, heads=1, kv_heads=1)
    contract.check(case, "pallas_gpu")


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("schedule", [(64, 3, 1), (128, 2, 2)])
def test_schedules_agree(schedule):
    rng = np.random.default_rng(0)
    states = rng.integers(0, 3, (2, 3, 3))
    mask = block_mask.from_block_states(
        states, rule=causal.Causal(), q_len=384, kv_len=384, block_q=128, block_kv=128
    )
    q, k, v = (jnp.asarray(rng.standard_normal((1, 384, 2, 64)), jnp.float16) for _ in range(3))
    inputs = inputs_lib.Inputs(q, k, v, mask, *(None,) * 6, 0.125, None)
    schedule = gpu_walk.Schedule(*schedule)
    with contract.environment("pallas_gpu").enter():
        out, lse = jax.jit(lambda: pallas_gpu.forward(inputs))()
        other, other_lse = jax.jit(lambda: pallas_gpu.forward(inputs, schedule=schedule))()
    np.testing.assert_allclose(other, out, atol=2e-3)
    np.testing.assert_allclose(other_lse, lse, atol=1e-5)


def _spy(monkeypatch, name):
    """Arguments and results of the calls of a function of gpu_walk, filled in as they happen."""
    calls, original = [], getattr(gpu_walk, name)

    def spied(*args):
        calls.append((args, original(*args)))
        return calls[-1][1]

    monkeypatch.setattr(gpu_walk, name, spied)
    return calls


@needs_mosaic
@pytest.mark.parametrize("block, length, parts", [
    (128, 50, 4),
    pytest.param(32, 70, 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_groups_in_parts_agree_and_repeat(block, length, parts, monkeypatch):
    calls = _spy(monkeypatch, "group_parts")
    mask = problems.blocks(causal.Causal(), 64, block)
    case = problems.Case("parts", mask, q_len=length, heads=4, kv_heads=1)
    env = contract.environment("pallas_gpu")
    problem = problems.build(case, env)
    with env.enter():
        run = contract.runner(problem, "pallas_gpu")
        first, second = run(problem), run(problem)
    assert {found for _, found in calls} == {parts}
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)
    contract.compare(first, contract.solve(problem), problem.q.dtype, contract.plain(case, env))
