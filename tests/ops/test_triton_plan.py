"""The plan by Triton kernels, in Triton's interpreter, against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton

from sparse_attn.ops.token_select import plan as plan_lib
from sparse_attn.ops.token_select import triton_plan
from tests.ops import triton_compile, triton_shim

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1: run with JAX_PLATFORMS=cpu", allow_module_level=True)

SMALL = triton_plan.Sizes(32, 1, 2, 16, 1)


def lists(shape, blocks, seed=0):
    selected = np.random.default_rng(seed).integers(-1, blocks, shape)
    return np.where(selected == 1, 0, selected).astype(np.int32)  # Block 1 is empty.


CASES = {
    "several_chunks": (lists((2, 37, 3, 5), 20), 4, 20, SMALL),
    "one_chunk": (lists((1, 7, 2, 3), 6), 2, 6, SMALL),
    "one_block": (np.zeros((1, 70, 1, 1), np.int32), 16, 1, SMALL),
    "all_of_the_last_block": (np.full((1, 300, 1, 1), 40, np.int32), 1, 41, None),
    "nothing": (np.full((1, 9, 1, 4), -1, np.int32), 8, 17, SMALL),
    "large_tiles": (lists((1, 40, 2, 2), 5), 128, 5, SMALL),
    "usual_sizes": (lists((1, 150, 2, 9), 70), 64, 70, None),
    "larger_chunks": (lists((1, 400, 1, 2), 1100), 4, 1100, None),
}  # fmt: skip


def assert_equal(got, want):
    """The same plan, as far as kernels say it."""
    assert got.place is None
    assert got.block is None
    np.testing.assert_array_equal(got.starts, want.starts)
    np.testing.assert_array_equal(got.counts, want.counts)
    assert got.entry.shape == want.entry.shape
    tile = got.entry.shape[2] // want.block.shape[2]
    used = np.repeat(np.asarray(want.block) < want.counts.shape[2], tile, axis=2)
    np.testing.assert_array_equal(np.asarray(got.entry)[used], np.asarray(want.entry)[used])


@pytest.mark.parametrize("name", CASES)
def test_plan_is_that_of_xla(name, monkeypatch):
    selected, tile, blocks, sizes = CASES[name]
    if sizes is not None:
        monkeypatch.setattr(triton_plan, "sizes", lambda blocks: sizes)
    want = plan_lib.plan(jnp.asarray(selected), tile=tile, blocks=blocks)
    with triton_shim.environment():
        got = triton_plan.plan(jnp.asarray(selected), tile=tile, blocks=blocks)
    assert_equal(got, want)


@pytest.mark.parametrize("blocks, parts, most", [(7, 1, 5), (300, 2, 3), (129, 1, 1)], ids=str)
def test_segments_are_the_tiles_of_each_block(blocks, parts, most):
    selected = jnp.asarray(lists((2, 40, 2, 3), blocks))
    tile = 4
    plan = plan_lib.plan(selected, tile=tile, blocks=blocks)
    with triton_shim.environment():
        found = triton_plan.segments(plan, tile=tile, parts=parts, most=most)
    work, starts, counts = map(np.asarray, found)
    assert counts.min() == 0  # block 1
    for b, u in np.ndindex(2, 2):
        for block in range(blocks):
            first, number = (np.asarray(x)[b, u, block] * parts for x in (plan.starts, plan.counts))
            at = starts[b, u, block] + np.arange(counts[b, u, block])
            pieces = work[b, u, at]
            assert (pieces[:, 0] == block).all()
            np.testing.assert_array_equal(pieces[:, 1], first + most * np.arange(at.size))
            np.testing.assert_array_equal(pieces[:-1, 2], most)
            assert pieces[:, 2].sum() == number
        used = counts[b, u].sum()
        assert (work[b, u, used:] == work[b, u, used:] * [1, 1, 0]).all()  # No tiles.
        assert (work[b, u, used:, 0] == blocks).all()  # A block that does not exist.
        assert used <= work.shape[2]


def test_too_many_blocks_are_planned_by_xla():
    blocks = triton_plan._MOST_BLOCKS + 1
    selected = jnp.asarray(lists((1, 9, 1, 2), blocks))
    want = plan_lib.plan(selected, tile=2, blocks=blocks)
    got = triton_plan.plan(selected, tile=2, blocks=blocks)  # Needs no Triton.
    assert_equal(got, want)


def test_too_many_entries_are_refused():
    selected = jax.ShapeDtypeStruct((1, 1 << 26, 1, 16), jnp.int32)
    with pytest.raises(NotImplementedError, match="more than int32 counts"):
        jax.eval_shape(lambda s: triton_plan.plan(s, tile=1 << 20, blocks=1 << 10), selected)


@pytest.mark.parametrize(
    "cell",
    [
        {"capability": "9.0", "blocks": 256, "places": 9, "tile": 64},
        pytest.param(
            {"capability": "8.0", "blocks": 4096, "places": 16, "tile": 2}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_kernels_compile_for(cell, tmp_path):
    reports = triton_compile.reports({"plan": cell}, tmp_path)
    assert [r["kernel"] for r in reports] == [
        "count_kernel", "sum_kernel", "tiles_kernel", "place_kernel"
    ]  # fmt: skip
