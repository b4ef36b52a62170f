"""The choice of blocks by Triton kernels, in Triton's interpreter, against XLA and NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton

from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from sparse_attn.ops.token_select import compress, lists, triton_choose
from tests.ops import triton_compile, triton_shim

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1: run with JAX_PLATFORMS=cpu", allow_module_level=True)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter's time goes by operations, whatever their size."""
    monkeypatch.setattr(triton_choose, "scores_tile", lambda *_: triton_choose.Tile(128, 32, 4, 1))
    monkeypatch.setattr(triton_choose, "rows_tile", lambda _: triton_choose.Rows(64, 1))


def in_kernels(f, *args):
    """`f(*args)` in the kernels, which must be there."""
    with triton_shim.environment():
        assert lists.kernels() is not None
        return jax.tree.map(np.asarray, f(*args))


# --- The best of rows -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, count",
    [((1,), 3), ((2, 3, 9), 5), ((7, 33), 40), ((2, 130), 16), ((1, 5000), 3)],
    ids=str,
)
def test_best_is_top_k(shape, count):
    rng = np.random.default_rng(0)
    scores = rng.integers(-2, 3, shape).astype(np.float32)  # Few values: many are equal.
    scores[rng.random(shape) < 0.2] = -0.0
    for value in (np.nan, np.inf, -np.inf):
        scores[rng.random(shape) < 0.1] = value
    candidates, forced = (jnp.asarray(rng.random(shape) < p) for p in (0.7, 0.1))
    want = np.asarray(lists.best(jnp.asarray(scores), count, candidates, forced))
    got = in_kernels(lists.best, jnp.asarray(scores), count, candidates, forced)
    np.testing.assert_array_equal(got, want)
    assert got.shape == (*shape[:-1], min(count, shape[-1]))


def test_best_of_rows_without_candidates_is_nothing():
    scores, no = jnp.ones((3, 20)), jnp.zeros((3, 20), bool)
    assert (in_kernels(lists.best, scores, 4, no, ~no) == -1).all()


def test_longer_rows_and_lists_are_sorted():
    with triton_shim.environment():
        gpu = lists.kernels()
        assert gpu.takes_rows(16, 1 << 14)
        assert not gpu.takes_rows(16, (1 << 14) + 1)
        assert not gpu.takes_rows(65, 128)
        found = lists.best(jnp.arange(100.0), 70, jnp.ones(100, bool), jnp.zeros(1, bool))
    np.testing.assert_array_equal(found, np.arange(99, 29, -1))


def test_no_kernels_where_they_cannot_run():
    assert lists.kernels() is None
    for target in (tiles.Target("gpu", "a GPU"), tiles.Target("gpu", "Tesla V100", "7.0")):
        with triton_shim.environment(), tiles.assume(target):
            assert lists.kernels() is None
    with triton_shim.environment():
        mesh = jax.sharding.AbstractMesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
        with jax.sharding.use_abstract_mesh(mesh):
            assert lists.kernels() is None
        one = jax.sharding.AbstractMesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
        with jax.sharding.use_abstract_mesh(one):
            assert lists.kernels() is not None


@pytest.mark.parametrize("count", [1, 9])
def test_blocks_listed_again_or_missing_are_left_out(count):
    selected = np.random.default_rng(0).integers(-2, 12, (2, 20, 2, count)).astype(np.int32)
    got = in_kernels(lambda x: lists.kernels().once(x, 10), jnp.asarray(selected))
    for row, mine in zip(selected.reshape(-1, count), got.reshape(-1, count), strict=True):
        assert mine.tolist() == [
            b if 0 <= b < 10 and b not in row[:i] else -1 for i, b in enumerate(row)
        ]


# --- Blocks by the weights of compressed keys -----------------------------------------------------

# Batch, tokens, query and KV heads, head dimension; size and stride of compressed keys, block.
CASES = [
    ((2, 75, 6, 2, 16, 8, 4, 16), False),
    ((1, 41, 16, 1, 16, 16, 4, 8), True),
    ((1, 70, 2, 2, 24, 4, 4, 8), True),
    ((1, 150, 1, 1, 16, 2, 1, 2), True),
    ((1, 20, 2, 1, 16, 32, 16, 64), False),
    ((1, 140, 5, 1, 16, 4, 2, 2), False),
]
FAST = CASES[1:2]


def problem(shape, documents, dtype=np.float32):
    batch, length, heads, kv_heads, dim, size, stride, block = shape
    rng = np.random.default_rng(0)
    strides = compress.Strides(size=size, stride=stride)
    q = jnp.asarray(rng.standard_normal((batch, length, heads, dim)) * 2, dtype)
    k = jnp.asarray(rng.standard_normal((batch, length, kv_heads, dim)), dtype)
    keys = jax.jit(lambda k: strides.windows(k).astype(jnp.float32).mean(2).astype(dtype))(k)
    ids = None
    if documents:
        ids = np.sort(rng.integers(1, 4, (batch, length)), axis=1).astype(np.int32)
        ids[:, length - length // 8 :] = 0
        ids = jnp.asarray(ids)

    @jax.jit
    def attend(q, keys, ids):
        pair = None if ids is None else (ids, strides.documents(ids))
        return attend_lib.attend(
            q, keys, keys, mask=strides, segment_ids=pair, return_lse=True, impl="reference"
        )[1]

    return q, keys, attend(q, keys, ids), ids, strides, block


def scores_in_float64(q, keys, lse, ids, strides, block):
    """`[B, T, K, blocks]` as eq. 9 sums them, one compressed key after the other."""
    q, keys, lse = (np.asarray(x, np.float64) for x in (q, keys, lse))
    batch, length, _, dim = q.shape
    kv_heads, blocks = keys.shape[2], -(-length // block)
    z = np.einsum("BTKGH,BnKH->BTKGn", q.reshape(batch, length, kv_heads, -1, dim), keys)
    at = np.arange(length)[:, None]
    seen = np.broadcast_to(
        strides.mask_fn(at, np.arange(keys.shape[1])), (batch, length, z.shape[4])
    )
    if ids is not None:
        seen = seen & (
            np.asarray(jax.jit(strides.documents)(ids))[:, None] == np.asarray(ids)[..., None]
        )
    with np.errstate(over="ignore", invalid="ignore"):
        p = np.exp(z * dim**-0.5 - lse.reshape(*z.shape[:4], 1))
    p = np.where(seen[:, :, None, None], p, 0).sum(3)
    scores = np.zeros((batch, length, kv_heads, blocks + strides.size))
    for i in range(keys.shape[1]):
        for part in range(strides.size // strides.stride):
            scores[..., (i + part) * strides.stride // block] += p[..., i]
    return scores[..., :blocks]


@pytest.mark.parametrize(
    "shape, documents",
    [pytest.param(*c, marks=() if c in FAST else pytest.mark.slow, id=str(c)) for c in CASES],
)
def test_scores_and_choice(shape, documents):
    q, keys, lse, ids, strides, block = problem(shape, documents)
    batch, length, _, dim = q.shape
    blocks = -(-length // block)
    want = scores_in_float64(q, keys, lse, ids, strides, block)
    starts = (
        jnp.zeros((batch, length), jnp.int32)
        if ids is None
        else jax.jit(compress.document_starts)(ids)
    )

    def score(at):
        found = None if ids is None else (ids, starts, strides.documents(ids))
        gpu = lists.kernels()
        return gpu.whole(
            gpu.block_scores(
                q, keys, lse, at[None], length - length // 5, strides=strides, block=block,
                blocks=blocks, scale=dim**-0.5, documents=found,
            )
        )  # fmt: skip

    at = np.arange(blocks)
    own = np.arange(length)[:, None] // block
    candidates = (np.asarray(starts)[..., None] // block <= at) & (at <= own)
    start = length // 5  # A chunk that starts inside a tile and a block.
    got = in_kernels(jax.jit(score), jnp.int32(start))
    for g, w, c in zip(got, want[:, start:], candidates[:, start:], strict=True):
        g, w = (np.moveaxis(x, 1, 2)[c] for x in (g, w))
        np.testing.assert_allclose(g, w, rtol=3e-6, atol=1e-7)
    choose = functools.partial(
        compress.choose_blocks, q, keys, lse, strides=strides, block=block, top_k=5,
        segment_ids=ids,
    )  # fmt: skip
    np.testing.assert_array_equal(
        in_kernels(jax.jit(lambda: choose())), jax.jit(lambda: choose())()
    )


def test_best_of_many_blocks():
    blocks = 1100
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((1, 1, 3, 1, blocks)).astype(np.float32)
    scores[0, 0, 1, 0, 5] = np.nan

    def choose():
        return lists.kernels().best_blocks(
            jnp.asarray(scores), jnp.array([blocks - 3]), 4, block=1, initial=1, local=1
        )

    at = np.arange(blocks)
    own = np.arange(blocks - 3, blocks)[:, None]
    want = lists.best(jnp.asarray(scores[0, 0, :, 0]), 4, at <= own, (at == 0) | (at == own))
    np.testing.assert_array_equal(in_kernels(choose)[0, :, 0], want)


def test_choice_of_half_precision_in_chunks(monkeypatch):
    q, keys, lse, ids, strides, block = problem((2, 41, 6, 2, 16, 8, 4, 8), True, np.float16)
    monkeypatch.setitem(lists._AT_ONCE, "gpu", 800)
    monkeypatch.setattr(lists, "_PREFIX", 20)
    choose = functools.partial(compress.choose_blocks, strides=strides, block=block, top_k=3)
    want = jax.jit(lambda: choose(q, keys, lse, segment_ids=ids))()
    got = in_kernels(jax.jit(lambda: choose(q, keys, lse, segment_ids=ids)))
    np.testing.assert_array_equal(got, want)


def test_keys_that_nobody_sees_are_never_read():
    q, keys, lse, _, strides, block = problem((1, 41, 2, 1, 16, 8, 4, 8), False)
    keys = keys.at[:, 6:].set(jnp.nan)  # From token 31 on, and no query before is affected.
    choose = functools.partial(compress.choose_blocks, strides=strides, block=block, top_k=3)
    np.testing.assert_array_equal(in_kernels(choose, q, keys, lse), jax.jit(choose)(q, keys, lse))


def test_shapes_that_the_scores_kernel_does_not_take():
    q, keys = (jnp.zeros((1, 100, n, 16)) for n in (2, 1))
    with triton_shim.environment():
        takes = lists.kernels().takes_scores
        assert takes(q, keys, compress.Strides(8, 4), 16, 4)
        assert not takes(q, keys, compress.Strides(8, 4), 12, 4)  # 3 strides to a block
        assert not takes(q, keys, compress.Strides(8, 4), 16, 65)
        assert not takes(jnp.zeros((1, 100, 2, 512)), keys, compress.Strides(8, 4), 16, 4)


# --- The gate of MoBA -----------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [False, True])
def test_gate(documents, monkeypatch):
    # Three tiles of queries for two programs; or two parts of the row.
    monkeypatch.setattr(lists, "_GATE_PREFIX", 20 if documents else 43)
    monkeypatch.setattr(triton_choose, "_GATES", 1)
    monkeypatch.setattr(triton_choose, "gate_tile", lambda _: triton_choose.Gate(16, 2, 4))
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((2, 43, n, 24)), jnp.float16) for n in (4, 2))
    # Scores that are all equal, infinite, and NaN.
    q, k = q.at[0, 35].set(0).at[1, 40, :, 0].set(1), k.at[1, 10, 0, 0].set(jnp.inf)
    k = k.at[1, 20].set(jnp.nan)
    ids = None
    if documents:
        ids = jnp.asarray(np.sort(rng.integers(0, 4, (2, 43)), axis=1)[:, ::-1].copy(), jnp.int32)
    choose = functools.partial(lists.by_mean_key, q, k, block=8, top_k=3, segment_ids=ids)
    np.testing.assert_array_equal(in_kernels(choose), jax.jit(lambda: choose())())


@pytest.mark.parametrize(
    "blocks, sign, documents", [(16, 1, False), (16, -1, True), (200, 1, False), (200, -1, True)]
)
def test_gate_takes_scores_that_differ_below_its_bits_in_order_of_place(blocks, sign, documents):
    """What counts is a score less its lowest bits, as many as a place has."""
    width = 1 << (blocks - 1).bit_length()
    rng = np.random.default_rng(0)
    # Scores 1 + j / 2 ** 23, the lowest bits of a float32; j / 2 ** 24 is a float16.
    steps = rng.integers(0, 4, blocks) * width + rng.integers(0, width, blocks)
    k = np.zeros((1, blocks, 1, 16), np.float16)
    k[0, :, 0, 0], k[0, :, 0, 1] = sign, sign * steps * 2.0**-24
    q = np.zeros((1, blocks, 1, 16), np.float16)
    q[..., 0], q[..., 1] = 1, 2
    scores = (k.astype(np.float32) * q).sum(-1)[0, :, 0]
    np.testing.assert_array_equal(scores, sign * (1 + steps * np.float32(2) ** -23))
    # Of two negative numbers, the larger one has the smaller bits.
    parts = (steps if sign > 0 else -1 - steps) // width
    ids = jnp.ones((1, blocks), jnp.int32) if documents else None
    choose = functools.partial(lists.by_mean_key, block=1, top_k=6, segment_ids=ids)
    got = in_kernels(choose, jnp.asarray(q), jnp.asarray(k))[0, :, 0]
    plain = np.asarray(choose(jnp.asarray(q), jnp.asarray(k)))[0, :, 0]
    for t in range(blocks):
        want = np.argsort(-parts[:t], kind="stable")[:6]
        assert got[t].tolist() == [t, *want, *[-1] * (6 - len(want))]
        exact = np.argsort(-scores[:t], kind="stable")[:6]
        assert plain[t].tolist() == [t, *exact, *[-1] * (6 - len(exact))]
    assert (got != plain).any()


@pytest.mark.slow
def test_gate_of_float32_and_of_many_blocks_takes_rows():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 30, 2, 8))
    choose = functools.partial(lists.by_mean_key, q, k, block=4, top_k=3)
    np.testing.assert_array_equal(in_kernels(choose), jax.jit(lambda: choose())())


# --- Transformations ------------------------------------------------------------------------------


def test_vmap_and_gradients():
    q, keys, lse, ids, strides, block = problem((2, 20, 2, 1, 16, 8, 4, 8), True)

    def f(q, half, keys, lse, ids):
        chosen = compress.choose_blocks(
            q, keys, lse, strides=strides, block=block, top_k=3, segment_ids=ids
        )
        own = lists.by_mean_key(half, half, block=block, top_k=2, segment_ids=ids)
        near = lists.best(q[..., 0], 2, jnp.ones(1, bool), jnp.zeros(1, bool))
        return (q**2).sum(), (chosen, own, near)

    # Keys are the same for all of the mapped axis.
    arrays = (q[:, None], q[:, None].astype(jnp.float16), keys[:1], lse[:, None], ids[:, None])

    def mapped():
        both = jax.value_and_grad(f, has_aux=True)
        return jax.jit(jax.vmap(both, in_axes=(0, 0, None, 0, 0)))(*arrays)

    (_, chosen), gradients = in_kernels(mapped)
    for got, want in zip(chosen, mapped()[0][1], strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(gradients, 2 * arrays[0], rtol=1e-6)


# --- Compilation ----------------------------------------------------------------------------------

CELLS = [
    {"capability": "9.0", "widths": [512], "tokens": 2048, "means": 64},
    {"capability": "9.0", "widths": [256, 2048, 16384], "tokens": 32768},
    {"capability": "8.9", "tokens": 65536, "dim": 256, "documents": True, "group": 3},
    {"capability": "8.0", "tokens": 4096, "dtype": "float32"},
]


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(c, marks=pytest.mark.slow if at else (), id=str(c))
        for at, c in enumerate(CELLS)
    ],
)
def test_kernels_compile_for(cell, tmp_path):
    reports = triton_compile.reports({"choose": cell}, tmp_path)
    exact = cell.get("dtype") == "float32"
    assert {"scores_kernel", "blocks_kernel"} <= {r["kernel"] for r in reports}
    # Instead of the gate, where operands are too wide for it.
    wide = exact or cell.get("dim") == 256
    assert ("gate_kernel" in {r["kernel"] for r in reports}) != wide
    for report in reports:
        multiplies = report["kernel"] in ("scores_kernel", "gate_kernel") and not exact
        assert (report["matrix"] > 0) == multiplies, report
