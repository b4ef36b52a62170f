"""The Triton backend on CPU: kernel bodies in Triton's interpreter, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl

from sparse_attn import attend
from sparse_attn.masks import block_mask, lower
from sparse_attn.ops import tiles
from sparse_attn.ops.block_sparse import triton_gpu, triton_rules
from sparse_attn.patterns import base, causal, full, local, per_head, sinks
from tests.ops import problems, triton_compile, triton_shim

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1: run with JAX_PLATFORMS=cpu", allow_module_level=True)


def test_masked_nan_and_inf_never_leak():
    q, k, v, dout = jax.random.normal(jax.random.key(0), (4, 1, 50, 2, 16))
    mask = lower.lower(local.Local(window=9), q_len=50, block_q=32, block_kv=32)

    @jax.jit
    def run(k, v):
        out, pull = jax.vjp(lambda *x: attend(*x, mask=mask, impl="triton_gpu"), q, k, v)
        return out, *pull(dout.at[:, 40:].set(0))

    with triton_shim.environment():
        clean = run(k, v)
        bad_k, bad_v = np.array(k), np.array(v)
        bad_k[0, 45, 0, 3], bad_k[0, 49, 1, 0] = np.nan, -np.inf
        bad_v[0, 44, 0, 0], bad_v[0, 47, 1, 1] = np.nan, np.inf
        spoiled = run(bad_k, bad_v)
    # Keys from 44 on are seen by queries from 44 on only: those are nan, and no other.
    assert np.isnan(spoiled[0][:, 44:]).any()
    for a, b in zip(clean, spoiled, strict=True):
        np.testing.assert_array_equal(a[:, :36], b[:, :36])
    np.testing.assert_array_equal(clean[0][:, :44], spoiled[0][:, :44])
    np.testing.assert_array_equal(clean[1][:, :44], spoiled[1][:, :44])


def test_blocks_of_any_size():
    """Neither powers of two nor multiples of a tile; more blocks than a tile holds."""
    q, k, v, dout = jax.random.normal(jax.random.key(1), (4, 1, 90, 1, 8))
    pattern = local.Local(window=50)

    def run(impl, mask):
        @jax.jit
        def both(q, k, v, dout):
            out, pull = jax.vjp(lambda *x: attend(*x, mask=mask, impl=impl), q, k, v)
            return out, *pull(dout)

        return both(q, k, v, dout)

    want = run("reference", pattern)
    for block_q, block_kv in ((48, 20), (90, 12)):
        mask = lower.lower(pattern, q_len=90, block_q=block_q, block_kv=block_kv)
        with triton_shim.environment():
            got = run("triton_gpu", mask)
        for a, b in zip(want, got, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


@dataclasses.dataclass(frozen=True)
class _Arithmetic(base.Pattern):
    """Most primitives a rule may use, with negative operands."""

    def mask_fn(self, q_pos, kv_pos):
        gap = q_pos - kv_pos
        near = (gap // 7 == -1) | (gap % 5 == 3) | (abs(gap) < 2) | (-gap > 9)
        hashed = ((q_pos * 2654435 ^ kv_pos << 3) >> 4) & 1
        far = (jnp.clip(gap, -4, 4) ** 2 == 16) & (jnp.sign(gap) * 1 == 1)
        odd = jnp.where(gap > 0, q_pos, kv_pos) % 2 == 1
        return (near ^ (hashed == 1)) & ~(far & odd) | (jnp.maximum(q_pos, kv_pos) == 11)


@dataclasses.dataclass(frozen=True)
class _Table(base.Pattern):
    """Looks positions up in an array, which has no translation."""

    def mask_fn(self, q_pos, kv_pos):
        return jnp.arange(64)[q_pos] < kv_pos


@dataclasses.dataclass(frozen=True)
class _Wave(base.Pattern):
    def mask_fn(self, q_pos, kv_pos):
        return jnp.sin(q_pos * 1.0) > 0


@triton.jit
def _evaluate(table, out, RULE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    visible = RULE(at[:, None], at[None, :], table)
    tl.store(out + at[:, None] * SIZE + at[None, :], visible.to(tl.int8))


def _interpreted(rules, table):
    (visible,) = triton_shim.triton_call(
        table, kernel=_evaluate, out_shape=[jax.ShapeDtypeStruct((64, 64), jnp.int8)], grid=(1,),
        num_warps=1, num_stages=1, RULE=triton_rules.rule_of(rules), SIZE=64,
    )  # fmt: skip
    return np.asarray(visible) != 0


def _examples():
    for name in base.discover():
        module = __import__(f"sparse_attn.patterns.{name}", fromlist=["EXAMPLES"])
        for pattern in module.EXAMPLES:
            yield from getattr(pattern, "patterns", (pattern,))


@pytest.mark.parametrize("pattern", list(dict.fromkeys((*_examples(), _Arithmetic()))), ids=repr)
def test_rule_is_mask_fn(pattern):
    want = problems.evaluate(pattern, np.arange(64), np.arange(64))
    np.testing.assert_array_equal(_interpreted((pattern,), 0), want)


def test_table_selects_the_rule():
    window = local.Local(window=5)
    rules = (window, full.Full(), window, ~full.Full(), sinks.Sinks(tokens=3))
    for table, pattern in enumerate(rules):
        want = problems.evaluate(pattern, np.arange(64), np.arange(64))
        np.testing.assert_array_equal(_interpreted(rules, table), want)


@pytest.mark.parametrize(
    "pattern, reason",
    [
        (_Table(), r"mask_fn of test_triton_gpu\(\) makes an array \(.*int32\[64\]"),
        (_Wave(), "mask_fn of .* computes in float32"),
        (per_head.PerHead((causal.Causal(), _Wave())), "computes in float32"),
    ],
)
def test_rules_without_translation_are_refused_by_name(pattern, reason):
    q = k = v = jnp.ones((1, 20, 2, 16))
    with triton_shim.environment(), pytest.raises(NotImplementedError, match=reason):
        attend(q, k, v, mask=pattern, impl="triton_gpu")


def test_refusals():
    q = jnp.ones((1, 20, 2, 16))

    def call(q=q):
        return attend(q, q, q, mask=causal.Causal(), impl="triton_gpu")

    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, the target is cpu"):
        call()
    with (
        triton_shim.environment("Tesla V100", "7.0"),
        pytest.raises(NotImplementedError, match=r"needs compute capability 8.0 .* has 7.0"),
    ):
        call()
    with (
        triton_shim.environment(),
        pytest.raises(NotImplementedError, match="head_dim=288 is over 256"),
    ):
        call(jnp.ones((1, 20, 2, 288)))
    if jax.default_backend() == "cpu":
        with (
            tiles.assume(tiles.Target("gpu", "NVIDIA A100", "8.0")),
            pytest.raises(NotImplementedError, match="needs jax-triton, which cannot be imported"),
        ):
            call()


def test_static_programs_begin_with_the_longest():
    pattern = local.Local(window=16) | sinks.Sinks(tokens=16)
    patterns = (pattern, local.Local(window=16), pattern, pattern)
    mask = lower.lower(patterns, q_len=256, block_q=16, block_kv=16)
    rows = triton_gpu._programs(mask, "kv", 4, 2)
    assert rows.shape == (1, 4 * 16, 1, 6)
    head, block, table, _, partial, listed = rows[0, :, 0].T
    assert len(set(zip(head.tolist(), block.tolist(), strict=True))) == 64
    np.testing.assert_array_equal(table, np.array([0, 1, 0, 0])[head])
    np.testing.assert_array_equal(listed, mask.kv_counts[0][table, block])
    np.testing.assert_array_equal(partial, mask.kv_partial_counts[0][table, block])
    columns = triton_gpu._programs(mask, "q", 4, 2)
    assert columns.shape == (1, 2 * 16, 2, 6)
    # The column of the sinks is long; the others follow by KV head, each by falling work.
    work = columns[0, :, :, 5].sum(-1)
    np.testing.assert_array_equal(columns[0, :2, 0, 1], 0)
    assert (work[:2] > 2 * work.mean()).all()
    np.testing.assert_array_equal(columns[0, 2:, 0, 0] // 2, np.repeat([0, 1], 15))
    assert (np.diff(work[2:17]) <= 0).all()
    np.testing.assert_array_equal(columns[0, :, :, 0] // 2, columns[0, :, :1, 0] // 2 + [[0, 0]])


def test_run_time_programs_of_a_head_begin_with_the_longest():
    states = np.random.default_rng(0).integers(0, 3, (2, 1, 16, 16)).astype(np.int32)
    mask = block_mask.from_block_states(
        jnp.asarray(states), rule=causal.Causal(), q_len=256, kv_len=256, block_q=16, block_kv=16
    )
    for side, owners in (("kv", 4), ("q", 2)):
        programs = jax.jit(lambda mask, side=side: triton_gpu._programs(mask, side, 4, 2))(mask)
        programs = np.asarray(programs)
        assert programs.shape == (2, owners * 16, 4 // owners, 6)
        by_head = programs.reshape(2, owners, 16, 4 // owners, 6)
        np.testing.assert_array_equal(
            np.sort(by_head[..., 0, 1]), np.tile(np.arange(16), (2, owners, 1))
        )
        heads = np.arange(4).reshape(1, owners, 1, -1)
        np.testing.assert_array_equal(by_head[..., 0], np.broadcast_to(heads, by_head.shape[:-1]))
        assert (np.diff(by_head[..., 5].sum(-1)) <= 0).all()
        counts = np.asarray(getattr(mask, f"{side}_counts"))[:, 0]
        for m in range(2):
            np.testing.assert_array_equal(by_head[m, ..., 5], counts[m][by_head[m, ..., 1]])


# Every capability; the widest heads, which take the most memory, where it is least and most; and
# each way to see: by a rule, by one of several, by bits.
CELLS = [
    {"capability": "8.9", "head_dim": 64, "everything": False},
    {"capability": "8.9", "head_dim": 256, "everything": True},
    {"capability": "9.0", "head_dim": 128, "everything": True},
    {"capability": "9.0", "head_dim": 256, "mask": "bits"},
    {"capability": "9.0", "head_dim": 80, "v_head_dim": 128, "dtype": "float16"},
    {"capability": "12.0", "head_dim": 16, "mask": "per_head"},
    {"capability": "8.0", "head_dim": 128, "dtype": "float32", "everything": True},
]
FAST_CELL = {"capability": "8.9", "head_dim": 64, "everything": False}


@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, marks=() if c == FAST_CELL else pytest.mark.slow, id=str(c)) for c in CELLS],
)
def test_kernels_compile_for(cell, tmp_path):
    """The compiler refuses code that the interpreter runs; and a tile must fit the device."""
    reports = triton_compile.reports(cell, tmp_path)
    assert [r["kernel"] for r in reports] == ["forward_kernel", "backward_kernel"]
    for report in reports:
        assert (report["matrix"] > 0) == (cell.get("dtype") != "float32"), report
