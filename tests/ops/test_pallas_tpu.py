"""Properties of the TPU kernels beside the contract, in interpret mode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.masks import block_mask, lower, segments
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from sparse_attn.ops.block_sparse import tpu_launch, tpu_steps
from sparse_attn.patterns import causal, full, local, sinks
from tests.ops import contract, problems

STREAM = local.Local(window=150) | sinks.Sinks(tokens=3)


@pytest.fixture(autouse=True)
def interpreted():
    with contract.environment("pallas_tpu").enter():
        yield


def problem(name="stream", mask=STREAM, *, change=None, **sizes):
    sizes = {"q_len": 300, "heads": 2, "kv_heads": 1, **sizes}
    case = problems.Case(name, mask, change=change, dtype=jnp.float32, **sizes)
    return problems.build(case, contract.environment("pallas_tpu"))


def run(made, **changes):
    return contract.run(dataclasses.replace(made, **changes), "pallas_tpu")


def expand(mask, table=0):
    """Element mask [M, 1, T, S] of the block states of a table."""
    states = [block_mask.block_states(mask, batch=m, table=table) for m in range(mask.batch)]
    states = np.stack(states)
    states = states.repeat(mask.block_q, 1).repeat(mask.block_kv, 2)
    states = states[:, None, : mask.q_len, : mask.kv_len]
    by_rule = mask.rule(0).mask_fn(np.arange(mask.q_len)[:, None], np.arange(mask.kv_len)[None])
    return (states == 2) | ((states == 1) & by_rule)


def use_tiles(monkeypatch, *choices):
    monkeypatch.setattr(tiles, "tpu_tiles", lambda **_: choices)


# A block in a tile, equal to it, and over it, for a square, a wide and a tall tile.
TILES = [
    pytest.param(tile, block, id=f"{tile}-{block}", marks=() if fast else pytest.mark.slow)
    for tile in ((128, 128), (128, 256), (384, 128))
    for block in (16, 64, 128, 384)
    if (tile, block)
    not in (
        ((128, 128), 64),
        ((128, 256), 16),
        ((128, 256), 128),
        ((384, 128), 64),
    )
    for fast in ((tile, block) == ((128, 256), 64),)
]


@pytest.mark.parametrize("tile, block", TILES)
def test_any_tile_runs_any_block(monkeypatch, tile, block):
    """Blocks smaller than tiles are packed, larger ones split: the mask stays the same."""
    use_tiles(monkeypatch, tile)
    rng = np.random.default_rng(block)
    grid = rng.integers(0, 3, (2, 1, *(-(-300 // block),) * 2)).astype(np.int32)
    grid[..., 0] = 0
    mask = block_mask.from_block_states(
        grid, rule=causal.Causal(), q_len=300, kv_len=300, block_q=block, block_kv=block
    )
    visible = expand(mask)
    made = problem(f"tiles {tile} {block}", batch=2)
    made = dataclasses.replace(made, mask=mask, visible=np.broadcast_to(visible, (2, 2, 300, 300)))
    want = contract.solve(made)
    contract.compare(run(made), want, np.float32)
    contract.compare(contract.run(made, "pallas_tpu", traced=True), want, np.float32)


@pytest.mark.parametrize(
    "traced", (pytest.param(False, marks=pytest.mark.slow), True), ids=("static", "run_time")
)
def test_list_beyond_scalar_memory_runs_in_chunks(monkeypatch, traced):
    use_tiles(monkeypatch, (128, 128))
    grid = np.random.default_rng(0).integers(0, 3, (2, 2, 3, 3)).astype(np.int32)
    mask = block_mask.from_block_states(
        grid, rule=causal.Causal(), q_len=300, kv_len=300, block_q=128, block_kv=128
    )
    made = dataclasses.replace(problem("chunks", batch=2, kv_heads=2), mask=mask)
    whole = contract.run(made, "pallas_tpu", traced=traced)
    monkeypatch.setattr(tiles, "tpu_smem_words", lambda: 12)
    chunked = contract.run(made, "pallas_tpu", traced=traced)
    for name, a, b in zip(whole._fields, whole, chunked, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_row_beyond_scalar_memory_is_refused_with_the_number(monkeypatch):
    use_tiles(monkeypatch, (128, 128))
    monkeypatch.setattr(tiles, "tpu_smem_words", lambda: 4)
    made = problem("refused", full.Full())
    with pytest.raises(NotImplementedError, match="may list 3 steps, SMEM holds 2"):
        run(made)


def build(mask, *, tables=((0,),), by="rows", tile=128, words=1 << 16, parts=1):
    return tpu_steps.build(
        mask, np.asarray(tables), by=by, tile_q=tile, tile_kv=tile, smem_words=words, parts=parts
    )


@pytest.mark.parametrize("by", ("rows", "cols"))
def test_steps_are_the_active_tiles(by):
    """One step per active tile, none for the longest row's sake, and none twice."""
    mask = lower.lower(STREAM, q_len=2000, block_q=128, block_kv=128)
    steps = build(mask, by=by)
    assert steps.totals.tolist() == [mask.kv_counts.sum()] == [steps.outer.size]
    inner = steps.inner[0] >> tpu_steps.SHIFT
    pairs = np.stack([steps.outer[0], inner] if by == "rows" else [inner, steps.outer[0]])
    states = steps.inner[0] & tpu_steps.STATE
    np.testing.assert_array_equal(states, block_mask.block_states(mask)[tuple(pairs)])


@pytest.mark.parametrize(
    "traced", (pytest.param(False, marks=pytest.mark.slow), True), ids=("static", "run_time")
)
def test_far_blocks_are_gathered(traced):
    """Single blocks of a selection: four tiles of keys make a step; the mask stays the same.

    By run-time lists two heads share a table and their keys, else each adds to dk and dv alone.
    """
    heads = 2 if traced else 4
    grid = np.random.default_rng(0).integers(0, 3, (1, heads, 6, 7)).astype(np.int32)
    grid[0, 0, 2] = 0
    mask = block_mask.from_block_states(
        grid, rule=causal.Causal(), q_len=700, kv_len=800, block_q=128, block_kv=128
    )
    made = problem("far", q_len=700, kv_len=800, heads=4, kv_heads=2)
    visible = np.concatenate([expand(mask, table) for table in range(heads)], 1)
    visible = visible.repeat(4 // heads, 1)
    made = dataclasses.replace(made, mask=mask, visible=visible)
    got = contract.run(made, "pallas_tpu", traced=traced)
    contract.compare(got, contract.solve(made), np.float32)
    steps = build(mask, tables=[(i,) for i in range(heads)], parts=4)
    rows = np.maximum(mask.kv_counts, 1)
    assert steps.totals.tolist() == [(-(-rows // 4)).sum()]


def test_a_step_knows_that_the_one_before_writes_its_tile():
    """dk and dv of a tile are read again only when the write of the last active step is over."""
    grid = np.array([[2, 0, 0], [0, 2, 2], [0, 0, 2], [0, 0, 0], [0, 2, 0]])
    mask = block_mask.from_block_states(
        grid, rule=full.Full(), q_len=640, kv_len=384, block_q=128, block_kv=128
    )
    for parts, again in ((1, [1, 0, 0, 1, 0, 1]), (2, [1, 1, 0, 0, 1, 1, 0, 0, 1, 1])):
        flags = build(mask, parts=parts).inner[0] & tpu_steps.AGAIN
        np.testing.assert_array_equal(flags > 0, again)


def build_traced(mask, *ids):
    """`build` on traced tables, restricted to documents where `ids` are given."""

    @jax.jit
    def arrays(mask, *ids):
        steps = build(segments.restrict(mask, *ids, *ids) if ids else mask)
        return steps.outer[0], steps.inner[0], steps.words, steps.totals[0]

    return arrays(jax.tree.map(jnp.asarray, mask), *ids)


def test_run_time_steps_are_the_static_ones():
    mask = lower.lower(STREAM, q_len=1000, block_q=64, block_kv=64)
    again = dataclasses.replace(mask, rules=(causal.Causal(),))  # No longer what `lower` made.
    static, (outer, inner, words, total) = build(again), build_traced(again)
    assert int(total) == int(static.totals[0])
    np.testing.assert_array_equal(outer[:total], static.outer[0])
    np.testing.assert_array_equal(inner[:total], static.inner[0])
    np.testing.assert_array_equal(words[0, : total * static.num_words], static.words[0])


def test_documents_drop_steps():
    """The number of steps follows the documents of the batch, not the static bound."""
    mask = lower.lower(causal.Causal(), q_len=1024, block_q=128, block_kv=128)
    ids = jnp.repeat(jnp.arange(1, 9, dtype=jnp.int32), 128)[None]
    outer, _, _, total = build_traced(mask, ids)
    assert (int(total), len(outer)) == (8, 36 + 8)  # One spare step per row, for empty ones.


def test_heads_that_differ_cost_their_own_tiles():
    patterns = (local.Local(window=100), causal.Causal())
    mask = lower.lower(patterns, q_len=1024, block_q=128, block_kv=128)
    steps = build(mask, tables=((0,), (1,)))
    assert steps.totals.tolist() == [15 + 36]


def test_million_tokens_fit_scalar_memory():
    wide = local.Local(window=4096) | sinks.Sinks(tokens=64)
    mask = tpu_steps.at_tiles(lower.lower(wide, q_len=1 << 20), 256, 512)
    words = tiles.tpu_smem_words()
    for by in ("rows", "cols"):
        steps = tpu_steps.build(
            mask, np.zeros((1, 1), int), by=by, tile_q=256, tile_kv=512, smem_words=words
        )
        assert steps.outer.shape[1] * (2 + steps.num_words) <= words
        assert steps.totals.sum() >= mask.kv_counts.sum()


def test_large_groups_go_head_by_head(monkeypatch):
    monkeypatch.setattr(tpu_launch, "_MAX_GROUP", 1)
    made = problem("head by head", heads=3, change=problems.biased(per_head=True))
    contract.compare(run(made), contract.solve(made), np.float32)


def test_vmap_over_run_time_masks():
    """Each entry of a vmapped batch has its own lists."""
    grids = jnp.asarray(np.random.default_rng(1).integers(0, 3, (2, 2, 2)), jnp.int32)
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 1, 200, 1, 32)).astype(np.float32)

    def one(impl, grid, q, k, v):
        mask = block_mask.from_block_states(
            grid, rule=causal.Causal(), q_len=200, kv_len=200, block_q=128, block_kv=128
        )

        def f(q):
            return (attend_lib.attend(q, k, v, mask=mask, impl=impl) ** 2).sum()

        return jax.value_and_grad(f)(q)

    got = jax.jit(jax.vmap(lambda *x: one("pallas_tpu", *x)))(grids, q, k, v)
    want = jax.jit(jax.vmap(lambda *x: one("reference", *x)))(grids, q, k, v)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4)


def test_refuses_what_it_cannot_do():
    made = problem("bits", STREAM)
    array = np.ones((300, 300), bool)
    mask = block_mask.from_array(array, block_q=32, block_kv=32)
    with pytest.raises(NotImplementedError, match="masks from arrays need blocks of a multiple"):
        run(made, mask=mask)
    with (
        tiles.assume(tiles.Target("cpu", "cpu")),
        pytest.raises(NotImplementedError, match="needs a TPU"),
    ):
        run(made)
