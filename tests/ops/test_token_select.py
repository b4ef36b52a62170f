"""Every backend of the op against float64: forward, lse, all gradients, any lists."""

import dataclasses
import functools
from typing import Any

import hypothesis
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops.token_select import attend as select_lib
from sparse_attn.ops.token_select import by_block, lists, xla
from sparse_attn.ops.token_select import plan as plan_lib
from sparse_attn.patterns import causal, full
from tests.ops import contract, oracle

CAUSAL = causal.Causal()


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem by its sizes; `tables` lists, `count` blocks in each."""

    name: str
    q_len: int = 70
    kv_len: int | None = None
    heads: int = 4
    kv_heads: int = 2
    tables: int = 2
    count: int = 3
    block: int = 16
    batch: int = 2
    dims: tuple[int, int] = (16, 24)
    documents: bool = False
    pattern: Any = CAUSAL
    dtype: Any = np.float32
    poison: bool = False

    @property
    def keys(self) -> int:
        return self.q_len if self.kv_len is None else self.kv_len


CASES = [
    Case("group_of_two"),
    Case("lists_per_query_head", tables=4, batch=1),
    Case("group_of_three", heads=3, kv_heads=1, tables=1, batch=1),
    Case("fewer_keys", kv_len=50, batch=1),
    Case("more_keys", kv_len=90, batch=1),
    Case("one_query", q_len=1, kv_len=20),
    Case("one_block", q_len=33, block=64, count=2),
    Case("odd_blocks", q_len=45, block=7, batch=1),
    Case("documents", documents=True),
    Case("documents_and_lists_per_query_head", documents=True, tables=4, batch=1),
    Case("two_sided", pattern=full.Full(), batch=1),
    Case("float16", dtype=np.float16),
    Case("bfloat16", dtype=jnp.bfloat16, batch=1),
    Case("poisoned", poison=True, batch=1),
]
REFUSALS = {
    ("by_block", "two_sided"): "takes pattern=causal",
    ("triton_gpu", "odd_blocks"): "block=7 must be a multiple of 16",
}
FAST = {"documents_and_lists_per_query_head", "poisoned"}


def build(case, seed=0):
    rng = np.random.default_rng(seed)
    length, keys, tables = case.q_len, case.keys, case.tables

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32).astype(case.dtype)

    q = normal(case.batch, length, case.heads, case.dims[0])
    k, v = (normal(case.batch, keys, case.kv_heads, width) for width in case.dims)
    # Blocks listed twice, after the query and past the end, and places that are not used.
    size = (case.batch, length, tables, case.count)
    selected = rng.integers(-2, -(-keys // case.block) + 2, size).astype(np.int32)
    q_pos, kv_pos = np.arange(length), np.arange(keys)
    chosen = (selected[..., None] == kv_pos // case.block).any(3)
    seen = chosen.swapaxes(1, 2) & np.asarray(case.pattern.mask_fn(q_pos[:, None], kv_pos[None]))
    ids = None
    if case.documents:
        ids = np.sort(rng.integers(1, 4, (case.batch, length)), axis=1).astype(np.int32)
        ids[:, -length // 10 :] = 0
        seen = seen & ((ids[:, :, None] == ids[:, None]) & (ids[:, :, None] != 0))[:, None]
    visible = np.repeat(seen, case.heads // tables, axis=1)
    if case.poison:  # A key that nobody sees, in a block that many list.
        hidden = keys // 2
        visible[:, :, :, hidden] = False
        seen_blocks = selected == hidden // case.block
        selected[seen_blocks & (np.arange(length) >= hidden)[None, :, None, None]] = -1
        gone = (kv_pos // case.block == hidden // case.block)[None] & (q_pos >= hidden)[:, None]
        visible = visible & ~gone
        k[:, hidden], v[:, hidden] = np.nan, np.inf
    dout = normal(case.batch, length, case.heads, case.dims[1])
    dlse = rng.standard_normal(dout.shape[:3]).astype(np.float32)
    return q, k, v, selected, ids, visible, dout, dlse


@functools.partial(jax.jit, static_argnums=0, compiler_options=contract.COMPILER_OPTIONS)
def _both(static, q, k, v, selected, ids, dout, dlse):
    impl, block, pattern = static

    def f(q, k, v):
        return select_lib.attend(
            q, k, v, selected=selected, block=block, pattern=pattern, segment_ids=ids,
            return_lse=True, impl=impl,
        )  # fmt: skip

    results, pull = jax.vjp(f, q, k, v)
    return *results, *pull((dout, dlse))


def check(case, impl, seed=0):
    q, k, v, selected, ids, visible, dout, dlse = build(case, seed)
    got = oracle.Results(
        *map(
            np.asarray, _both((impl, case.block, case.pattern), q, k, v, selected, ids, dout, dlse)
        )
    )
    scale = q.shape[-1] ** -0.5
    want = oracle.attention(q, k, v, visible, dout, dlse, scale=scale)
    contract.compare(got, want, case.dtype, extra=0.0 if case.dtype == np.float32 else 0.02)


@pytest.mark.parametrize("impl", select_lib.BACKENDS)
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=() if c.name in FAST else pytest.mark.slow) for c in CASES],
)
def test_backend_meets_contract(case, impl):
    env = contract.environment(impl if impl == "triton_gpu" else "xla")
    if env.reason is not None:
        pytest.skip(env.reason)
    with env.enter():
        if reason := REFUSALS.get((impl, case.name)):
            with pytest.raises(NotImplementedError, match=reason):
                check(case, impl)
            return
        check(case, impl)


@pytest.mark.slow
def test_some_places_of_the_lists_at_a_time(monkeypatch):
    monkeypatch.setitem(by_block._AT_ONCE, "cpu", 1)
    case = Case("in_steps", count=4, block=8, batch=1)
    q, k, v, selected = build(case)[:4]
    inputs = select_lib.validate(*map(jnp.asarray, (q, k, v, selected)), 8, CAUSAL, None, None)
    assert by_block._Shape.of(inputs).steps == 4
    check(case, "by_block")


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["xla", "by_block"])
@hypothesis.given(
    q_len=st.integers(1, 60), kv_len=st.integers(1, 60), block=st.integers(1, 40),
    heads=st.sampled_from([(1, 1, 1), (4, 2, 2), (4, 2, 4), (6, 2, 2), (5, 1, 1)]),
    count=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
@hypothesis.settings(max_examples=4)
def test_any_lengths_and_blocks(impl, q_len, kv_len, block, heads, count, seed):
    n, kv, tables = heads
    case = Case("drawn", q_len, kv_len, n, kv, tables, count, block, batch=1, dims=(8, 4))
    check(case, impl, seed)


def test_all_blocks_are_dense():
    q, k, v = (jnp.asarray(x) for x in build(Case("dense", kv_heads=2, batch=1))[:3])
    everything = jnp.broadcast_to(jnp.arange(5), (1, 70, 2, 5))

    @functools.partial(jax.jit, compiler_options=contract.COMPILER_OPTIONS)
    def both(q, k, v):
        lists_too = {"selected": everything, "block": 16, "impl": "by_block"}
        return (
            attend_lib.attend(q, k, v, mask=CAUSAL, return_lse=True, impl="reference"),
            select_lib.attend(q, k, v, **lists_too, return_lse=True),
        )

    want, got = both(q, k, v)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6)


@pytest.mark.parametrize("count", [1, 9, 40])
def test_blocks_listed_again_or_missing_are_left_out(count):
    rng = np.random.default_rng(0)
    selected = rng.integers(-2, 12, (1, 20, 2, count)).astype(np.int32)
    found = np.asarray(jax.jit(select_lib._once, static_argnums=1)(jnp.asarray(selected), 10))
    for row, got in zip(selected.reshape(-1, count), found.reshape(-1, count), strict=True):
        first = [b if 0 <= b < 10 and b not in row[:i] else -1 for i, b in enumerate(row)]
        if count > select_lib._COMPARED:
            first = sorted(set(first) - {-1}, reverse=True)
            got = got[got >= 0]
        assert got.tolist() == first


def test_wrong_arguments_are_named():
    q, k, v, selected = map(jnp.asarray, build(Case("wrong", batch=1))[:4])
    arguments = {"q": q, "k": k, "v": v, "selected": selected, "block": 16, "pattern": CAUSAL}
    arguments |= {"segment_ids": None, "scale": None}
    for change, message in [
        ({"block": 0}, "block=0 must be an int >= 1"),
        ({"selected": selected[:, :, :1]}, r"selected of shape \(1, 70, 1, 3\)"),
        ({"selected": selected * 1.0}, "must be integers"),
        ({"pattern": "causal()"}, "must be a Pattern"),
        ({"k": k[:, :, :, :4]}, "k.shape="),
    ]:
        with pytest.raises(ValueError, match=message):
            select_lib.validate(**{**arguments, **change})
    attend = functools.partial(select_lib.attend, q, k, v, selected=selected, block=16)
    with pytest.raises(ValueError, match="impl='fast' must be None or one of reference, xla, by_b"):
        attend(impl="fast")
    for impl in ("reference", "xla"):
        with pytest.raises(NotImplementedError, match="kernel='xla' must be None"):
            attend(impl=impl, kernel="xla")
    with pytest.raises(NotImplementedError, match="impl='by_block': impl='pallas_gpu'"):
        attend(impl="by_block", kernel="pallas_gpu")


def test_plan_is_a_stable_sort_in_whole_tiles(monkeypatch):
    rng = np.random.default_rng(0)
    length, tables, count, tile, blocks = 100, 2, 3, 4, 7
    selected = rng.integers(-1, blocks, (2, length, tables, count)).astype(np.int32)
    selected[..., 0] = np.where(selected[..., 0] == 5, 0, selected[..., 0])  # One block has most.
    plans = []
    for chunk, at_once in ((16, 1 << 40), (16, 1 << 9), (1000, 1)):
        monkeypatch.setattr(plan_lib, "_CHUNKS", (chunk, chunk))
        monkeypatch.setitem(plan_lib._AT_ONCE, "cpu", at_once)
        plan = jax.jit(functools.partial(plan_lib.plan, tile=tile, blocks=blocks))
        plans.append(plan(jnp.asarray(selected)))
    plan = jax.tree.map(np.asarray, plans[0])
    for other in plans[1:]:
        jax.tree.map(np.testing.assert_array_equal, plan, jax.tree.map(np.asarray, other))
    for b, u in np.ndindex(2, tables):
        key, entry, place = selected[b, :, u].ravel(), plan.entry[b, u], plan.place[b, u].ravel()
        np.testing.assert_array_equal(entry[place[key >= 0]], np.flatnonzero(key >= 0))
        assert (place[key < 0] >= entry.size).all()
        found = np.full(plan.block.shape[2], blocks)
        for block in range(blocks):
            first, number = plan.starts[b, u, block], plan.counts[b, u, block]
            mine = entry[first * tile : (first + number) * tile]
            want = np.flatnonzero(key == block)
            np.testing.assert_array_equal(mine[: want.size], want)
            assert (mine[want.size :] == key.size).all()
            assert number == -(-want.size // tile)
            found[first : first + number] = block
        np.testing.assert_array_equal(plan.block[b, u], found)


def test_plan_holds_no_array_of_entries_times_blocks():
    """Compiled: what is compared with what is never in memory."""

    def per_entry(length):
        selected = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.int32)
        fn = jax.jit(lambda s: plan_lib.plan(s, tile=8, blocks=length // 64).entry)
        memory = fn.lower(selected).compile().memory_analysis()
        return memory.temp_size_in_bytes / (4 * selected.size)

    assert per_entry(1 << 13) < 48
    assert per_entry(1 << 16) < 48


def test_plan_refuses_what_int32_cannot_count():
    selected = jax.ShapeDtypeStruct((1, 1 << 26, 1, 16), jnp.int32)
    with pytest.raises(NotImplementedError, match=r"1073741824 entries .* more than int32 counts"):
        jax.eval_shape(lambda s: plan_lib.plan(s, tile=8, blocks=1 << 20), selected)


def test_the_best_are_forced_then_best_then_first():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (3, 50, 9)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = -0.0
    scores[rng.random(scores.shape) < 0.1] = np.nan
    candidates, forced = (rng.random((3, 50, 9)) < p for p in (0.6, 0.2))
    found = np.asarray(lists.best(jnp.asarray(scores), 5, candidates, forced))
    for at in np.ndindex(3, 50):
        value = np.where(np.isnan(scores[at]), -1, scores[at])
        order = np.argsort(-np.where(forced[at], 9, value), stable=True)
        want = [i for i in order.tolist() if candidates[at][i]][:5]
        assert found[at].tolist() == want + [-1] * (5 - len(want))


@pytest.mark.slow
def test_the_bench_runs(tmp_path):
    from experiments.selection import gpu_bench

    options = ["--tiny", "--only", "moba", "--memory", "64", "--out", str(tmp_path)]
    row, together = gpu_bench.main(options)
    assert not [name for name in (*row, *together) if name.endswith("_error")]
    assert together["both_temp_bytes"] > 0
    assert row["error"] < 0.05
    assert {"scoring_fwd_ms", "selection_fwd_ms", "fwd_ms", "bwd_ms", "dense_bwd_ms"} <= set(row)
    assert (tmp_path / "gpu_bench.json").is_file()


# --- Memory and work ------------------------------------------------------------------------------


def largest(function, *shapes):
    """Numbers in the largest array of a traced function, those of inner functions included."""

    def is_jaxpr(x):
        return isinstance(x, (jax.extend.core.ClosedJaxpr, jax.extend.core.Jaxpr))

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (x.aval.size for x in equation.outvars)
            for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
                if is_jaxpr(value):
                    yield from sizes(getattr(value, "jaxpr", value))

    return max(sizes(jax.make_jaxpr(function)(*shapes).jaxpr))


def shapes(length, count=4):
    floats = [jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (2, 1, 1)]
    return *floats, jax.ShapeDtypeStruct((1, length, 1, count), jnp.int32)


def gradient(impl):
    def f(q, k, v, selected):
        def loss(*x):
            return select_lib.attend(*x, selected=selected, block=64, impl=impl).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    return f


@pytest.mark.parametrize("impl", ["xla", "by_block"])
def test_no_array_grows_as_queries_times_keys(impl, monkeypatch):
    for module in (xla, by_block):
        monkeypatch.setitem(module._AT_ONCE, "cpu", 1 << 16)
    small, large = (largest(gradient(impl), *shapes(n)) for n in (1 << 12, 1 << 15))
    assert large < 8.5 * small
    assert large < (1 << 30) / 100
    # The measure can fail: the definition holds T x S.
    assert largest(gradient("reference"), *shapes(256)) >= 256 * 256


@pytest.mark.parametrize("impl", ["xla", "by_block"])
def test_work_follows_the_lists(impl):
    """Steps and tiles, not clocks: four times as long a row has four times as many."""
    if impl == "xla":
        counts = []
        for length in (1 << 12, 1 << 14):
            inputs = _abstract_inputs(length)
            counts.append(jax.eval_shape(lambda i=inputs: xla._chunks(i))[0].shape[0])
    else:
        counts = [by_block._Shape.of(_abstract_inputs(n)) for n in (1 << 12, 1 << 14)]
        counts = [c.tiles * c.steps for c in counts]
        assert counts[1] * by_block._ROWS <= 1.3 * (1 << 14) * 4 * 2
    assert 3 * counts[0] <= counts[1] <= 4 * counts[0]


def _abstract_inputs(length):
    q, k, v, selected = (jnp.zeros(s.shape, s.dtype) for s in shapes(length))
    return select_lib.validate(q, k, v, selected, 64, CAUSAL, None, None)
