"""The portable backend beyond the contract: random masks, JAX's transformations, cost."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.masks import block_mask, lower
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from sparse_attn.ops.block_sparse import xla
from sparse_attn.patterns import causal, local, per_head, sinks
from tests.ops import contract, problems

ENV = contract.Environment()
CAUSAL = causal.Causal()


def draw_segments(rng, batch, length, longest):
    """Document ids of random lengths from 1 on, padding at the end now and then."""
    lengths = rng.integers(1, longest + 1, (batch, length))
    ids = np.stack([np.repeat(np.arange(1, length + 1), x)[:length] for x in lengths])
    ids[rng.random((batch, 1)) * length * 1.5 < np.arange(length)] = 0
    return ids.astype(np.int32)


@functools.cache
def _fixed_shape(block, kind):
    """A compiled runner for masks and documents of any content at one shape."""
    case = contract.Case(
        f"drawn_{kind}_{block}", q_len=100, kv_len=130, heads=4, batch=2, traced=True
    )
    problem = contract.build(case, ENV)
    problem = dataclasses.replace(
        problem, mask=_drawn_mask(0, block, kind, 0.5)[0], segment_ids=_drawn_ids(0)
    )
    return problem, contract.runner(problem, "xla", traced=True)


def _drawn_ids(seed, longest=30):
    rng = np.random.default_rng(seed)
    return draw_segments(rng, 2, 100, longest), draw_segments(rng, 2, 130, longest)


def _drawn_mask(seed, block, kind, density):
    """A run-time mask of a density, and the pairs it shows."""
    rng = np.random.default_rng(seed)
    nq, nk = -(-100 // block), -(-130 // block)
    if kind == "bits":
        array = rng.random((100, 130)) < density
        array[rng.random(100) < 0.1] = False
        whole = rng.random((nq, nk)).repeat(block, 0).repeat(block, 1)[:100, :130]
        array = (array | (whole < density / 2)) & (whole < 0.5 + density)
        mask = block_mask.from_array(array, block_q=block, block_kv=block)
        slots = nq * nk + 1  # As many as any mask of this shape can need.
        bits = np.zeros((1, 1, slots, block, block), np.uint8)
        bits[:, :, : mask.bits.shape[2]] = mask.bits
        return dataclasses.replace(mask, bits=bits), array[None, None]
    grid = (rng.random((2, 2, nq, nk)) < density).astype(np.int32)
    mask = block_mask.from_block_states(
        grid, rule=CAUSAL, q_len=100, kv_len=130, block_q=block, block_kv=block
    )
    active = grid.repeat(block, 2).repeat(block, 3)[:, :, :100, :130] != 0
    rule = problems.evaluate(CAUSAL, np.arange(100), np.arange(130))
    return mask, (active & rule)[:, [0, 0, 1, 1]]


def _check_drawn(seed, block, kind, density, longest):
    problem, call = _fixed_shape(block, kind)
    mask, visible = _drawn_mask(seed, block, kind, density)
    ids = _drawn_ids(seed, longest)
    visible = np.broadcast_to(visible, problem.visible.shape) & problems.same_document(*ids)
    problem = dataclasses.replace(problem, mask=mask, segment_ids=ids, visible=visible)
    contract.compare(call(problem), contract.solve(problem), np.float32)


_DRAWN = {
    "seed": st.integers(0, 2**16),
    "density": st.sampled_from([0.0, 0.02, 0.2, 0.6, 1.0]),
    "longest": st.sampled_from([1, 3, 40, 200]),
}


@pytest.mark.parametrize("block, kind", [(16, "bits"), (64, "states")])
@hypothesis.settings(max_examples=12)
@hypothesis.given(**_DRAWN)
def test_drawn_masks_and_documents(block, kind, seed, density, longest):
    _check_drawn(seed, block, kind, density, longest)


@pytest.mark.slow
@pytest.mark.parametrize(
    "block, kind", [(16, "states"), (32, "bits"), (64, "bits"), (128, "states")]
)
@hypothesis.settings(max_examples=15)
@hypothesis.given(**_DRAWN)
def test_many_drawn_masks_and_documents(block, kind, seed, density, longest):
    _check_drawn(seed, block, kind, density, longest)


_PATTERNS = (
    CAUSAL,
    local.Local(window=1),
    local.Local(window=33),
    local.Local(reach=(None, 2)),
    problems.FULL,
    problems.HOLE,
    sinks.Sinks(tokens=3) & ~local.Local(window=2),
    CAUSAL & ~CAUSAL,
    per_head.PerHead((local.Local(window=9), problems.STREAM)),
)


@st.composite
def cases(draw):
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (3, 2)]))
    pattern = draw(st.sampled_from(_PATTERNS))
    if isinstance(pattern, per_head.PerHead) and kv_heads * group % 2:
        pattern = pattern.for_head(0)
    q_len, kv_len = draw(st.integers(1, 257)), draw(st.none() | st.integers(1, 257))
    block_q, block_kv = (draw(st.sampled_from([16, 32, 64, 128])) for _ in range(2))
    kv_len = q_len if kv_len is None else kv_len

    def lowered(rng, case, env):
        per = isinstance(pattern, per_head.PerHead)
        patterns = pattern.for_heads(case.heads) if per else (pattern,)
        at = np.arange(q_len), np.arange(kv_len)
        visible = np.stack([problems.evaluate(p, *at) for p in patterns])
        sizes = {"block_q": block_q, "block_kv": block_kv}
        what = patterns if per else pattern
        return lower.lower(what, q_len=q_len, kv_len=kv_len, **sizes), visible

    changes = [problems.biased(hidden=0.2)] if draw(st.booleans()) else []
    changes += [problems.with_sinks] if draw(st.booleans()) else []
    changes += [problems.with_cap(3.0)] if draw(st.booleans()) else []
    if q_len == kv_len and draw(st.booleans()):
        longest = draw(st.sampled_from([1, 7, 100]))
        changes.append(lambda rng, problem, case: _with_documents(rng, problem, longest))
    return contract.Case(
        f"case_{draw(st.integers(0, 9))}", lowered,
        batch=draw(st.integers(1, 2)), q_len=q_len, kv_len=kv_len, heads=kv_heads * group,
        kv_heads=kv_heads, change=problems.chain(*changes),
    )  # fmt: skip


def _with_documents(rng, problem, longest):
    ids = draw_segments(rng, *problem.q.shape[:2], longest)
    visible = problem.visible & problems.same_document(ids, ids)
    return dataclasses.replace(problem, segment_ids=ids, visible=visible)


def _check_case(case):
    problem = contract.build.__wrapped__(case, ENV)
    contract.compare(contract.run(problem, "xla"), contract.solve(problem), np.float32)


@hypothesis.settings(max_examples=5)
@hypothesis.given(cases())
def test_drawn_shapes(case):
    _check_case(case)


@pytest.mark.slow
@hypothesis.settings(max_examples=20)
@hypothesis.given(cases())
def test_many_drawn_shapes(case):
    _check_case(case)


# --- JAX's transformations ------------------------------------------------------------------------


def _arrays(*lead, length=70, heads=2, kv_heads=1, dim=8):
    rng = np.random.default_rng(0)
    shapes = [(*lead, 1, length, n, dim) for n in (heads, kv_heads, kv_heads)]
    return tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)


def _loss(q, k, v, mask, **kwargs):
    return (attend_lib.attend(q, k, v, mask=mask, **kwargs) ** 2).sum()


def _assert_trees_close(got, want):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), got, want)


def test_vmap_over_arrays_equals_a_loop():
    q, k, v = _arrays(3)
    grad = jax.grad(_loss, (0, 1, 2))
    got = jax.jit(jax.vmap(lambda *x: grad(*x, problems.STREAM)))(q, k, v)
    one = jax.jit(lambda *x: grad(*x, problems.STREAM))
    want = [one(*x) for x in zip(*map(np.asarray, (q, k, v)))]
    _assert_trees_close(got, jax.tree.map(lambda *x: np.stack(x), *want))


def test_vmap_over_run_time_masks_equals_a_loop():
    q, k, v = _arrays(3, length=64)
    grid = np.random.default_rng(1).integers(0, 2, (3, 4, 4)).astype(np.int32)

    def grad(grid, *x):
        mask = block_mask.from_block_states(
            grid, rule=CAUSAL, q_len=64, kv_len=64, block_q=16, block_kv=16
        )
        return jax.grad(_loss, (0, 1, 2))(*x, mask)

    got = jax.jit(jax.vmap(grad))(grid, q, k, v)
    one = jax.jit(grad)
    want = [one(*x) for x in zip(grid, *map(np.asarray, (q, k, v)))]
    _assert_trees_close(got, jax.tree.map(lambda *x: np.stack(x), *want))


def test_checkpoint_and_scan_over_layers():
    """As a model uses it: rematerialised inside a scan over layers, documents closed over."""
    q, k, v = _arrays(3)
    ids = jnp.repeat(jnp.arange(1, 8), 10)[None]

    def layer(x, weights):
        k, v = weights
        return x + attend_lib.attend(x, k, v, mask=problems.WINDOW, segment_ids=ids), None

    def scanned(x, k, v):
        return (jax.lax.scan(jax.checkpoint(layer), x, (k, v))[0] ** 2).sum()

    def unrolled(x, k, v):
        for i in range(3):
            x, _ = layer(x, (k[i], v[i]))
        return (x**2).sum()

    got, want = (jax.jit(jax.grad(f, (0, 1, 2)))(q[0], k, v) for f in (scanned, unrolled))
    _assert_trees_close(got, want)


def test_without_jit():
    q, k, v = _arrays()
    got = jax.grad(_loss, (0, 1, 2))(q, k, v, problems.STREAM)
    want = jax.jit(lambda *x: jax.grad(_loss, (0, 1, 2))(*x, problems.STREAM))(q, k, v)
    _assert_trees_close(got, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_products_in_the_input_dtype_on_accelerators(dtype):
    case = dataclasses.replace(contract.BY_NAME["bfloat16"], name=f"operands_{dtype.__name__}")
    case = dataclasses.replace(case, dtype=dtype)
    with tiles.assume(tiles.Target("tpu", "TPU v5 lite")):
        contract.check(case, "xla")


# --- Cost -----------------------------------------------------------------------------------------


def _gradient_program(mask, length):
    x = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)

    def grad(q, k, v):
        return jax.grad(_loss, (0, 1, 2))(q, k, v, mask)

    return jax.jit(grad).lower(x, x, x).compile(compiler_options=contract.COMPILER_OPTIONS)


def test_memory_is_linear_and_the_program_does_not_grow():
    small, large = (_gradient_program(local.Local(window=256), n) for n in (1024, 16384))
    bytes_of_tile_row = 16384 * 16384
    assert large.memory_analysis().temp_size_in_bytes < bytes_of_tile_row / 4
    assert len(large.as_text()) < 1.2 * len(small.as_text())


def test_time_follows_the_active_blocks():
    """Trip counts, not clocks: the steps a static mask takes are what its counts say."""
    mask = lower.lower(local.Local(window=256), q_len=8192)
    inputs = _inputs(mask)
    lay = xla._layout(inputs)
    steps = -(-np.asarray(mask.kv_counts) // lay.chunk)
    assert steps.sum() * lay.chunk <= 1.5 * mask.kv_counts.sum()
    units = xla._units(mask, lay)
    assert units.count.sum() == mask.kv_counts.sum()


def _inputs(mask, heads=4, kv_heads=4):
    from sparse_attn.ops.block_sparse import inputs as inputs_lib

    q = jnp.zeros((1, mask.q_len, heads, 64))
    k = jnp.zeros((1, mask.kv_len, kv_heads, 64))
    return inputs_lib.Inputs(q, k, k, mask, *[None] * 6, 1.0, None)


@pytest.mark.parametrize(
    "tables, heads, kv_heads, slots, kv_slots",
    [
        ((0,) * 8, 8, 2, 1, 1),
        ((0, 0, 0, 0, 1, 1, 1, 1), 8, 2, 2, 2),
        ((0, 0, 1, 1, 0, 0, 1, 1), 8, 2, 4, 2),
        ((0, 1) * 4, 8, 2, 8, 2),
        ((0, 0, 1, 1), 4, 4, 2, 2),
        ((0, 0, 0, 1, 1, 1), 6, 3, 6, 3),  # Tables that cut through a group of heads.
    ],
)
def test_heads_with_one_table_run_together(tables, heads, kv_heads, slots, kv_slots):
    patterns = tuple(local.Local(window=3 + t) for t in tables)
    mask = lower.lower(patterns, q_len=64, block_q=16, block_kv=16)
    lay = xla._layout(_inputs(mask, heads, kv_heads))
    assert (lay.slots, lay.kv_slots) == (slots, kv_slots)
    assert lay.slots * lay.kv_heads * lay.group * (heads // kv_heads) == heads * (heads // kv_heads)
    contract.check(
        contract.Case(f"tables_{tables}", patterns, heads=heads, kv_heads=kv_heads, q_len=64), "xla"
    )
