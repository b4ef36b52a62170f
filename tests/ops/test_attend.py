"""`attend`: argument errors, the choice of a backend, and `merge_lse`."""

import logging

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from sparse_attn.masks import block_mask, lower
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from sparse_attn.ops.block_sparse import reference, xla
from sparse_attn.patterns import causal, local, per_head

CAUSAL = causal.Causal()
TPU = tiles.Target("tpu", "TPU v5 lite")
GPU = tiles.Target("gpu", "NVIDIA A100", "8.0")


@pytest.fixture
def untyped():
    """Shape errors reach `attend` itself, as for users: tests check annotations first."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def arguments(**changed):
    q = jnp.zeros((2, 8, 4, 16))
    k = v = jnp.zeros((2, 8, 2, 16))
    return {"q": q, "k": k, "v": v, "mask": CAUSAL} | changed


ERRORS = {
    "q_rank": ({"q": jnp.zeros((8, 4, 16))}, r"q\.shape=\(8, 4, 16\) must be \[batch, length"),
    "empty": ({"k": jnp.zeros((2, 0, 2, 16))}, r"k\.shape=\(2, 0, 2, 16\) must be"),
    "dtype": ({"q": jnp.zeros((2, 8, 4, 16), jnp.int32)}, r"q\.dtype=int32 must .* bfloat16"),
    "wide": ({"q": np.zeros((2, 8, 4, 16))}, r"q\.dtype=float64 must .* bfloat16"),
    "mixed": ({"k": jnp.zeros((2, 8, 2, 16), jnp.bfloat16)}, r"k\.dtype=bfloat16 must be q's"),
    "k_dim": ({"k": jnp.zeros((2, 8, 2, 8))}, r"k\.shape=\(2, 8, 2, 8\) must be \[2, S, K, 16\]"),
    "k_batch": ({"k": jnp.zeros((1, 8, 2, 16))}, r"k\.shape=\(1, 8, 2, 16\) must be"),
    "v_length": ({"v": jnp.zeros((2, 7, 2, 16))}, r"v\.shape=\(2, 7, 2, 16\) must begin as"),
    "groups": (
        {"k": jnp.zeros((2, 8, 3, 16)), "v": jnp.zeros((2, 8, 3, 16))},
        "k has 3 heads, which must divide q's 4",
    ),
    "mask": ({"mask": np.ones((8, 8), bool)}, "mask must be a Pattern, a PerHead, a BlockMask"),
    "soft_cap": ({"logits_soft_cap": 0.0}, r"logits_soft_cap=0\.0 must be > 0, or None"),
    "sinks": ({"sink_logits": jnp.zeros(3)}, r"sink_logits\.shape=\(3,\) must be \(4,\)"),
    "bias": ({"key_bias": jnp.zeros((2, 7))}, r"key_bias\.shape=\(2, 7\) must be \(2, 8\) or"),
    "ids_shape": (
        {"segment_ids": jnp.zeros((2, 7), jnp.int32)},
        r"segment_ids of shape \(2, 7\) .* must be integers of shape \(2, 8\)",
    ),
    "ids_dtype": ({"segment_ids": jnp.zeros((2, 8))}, "segment_ids .* float32 must be integers"),
    "positions": (
        {"positions": jnp.zeros(9, jnp.int32)},
        r"positions of shape \(9,\) .* \(8,\) or \(1, 8\) or \(2, 8\)",
    ),
    "pair": (
        {"k": jnp.zeros((2, 9, 2, 16)), "v": jnp.zeros((2, 9, 2, 16)),
         "segment_ids": jnp.ones((2, 8), jnp.int32)},
        "segment_ids must be a pair .* q has 8 tokens and k has 9",
    ),
    "per_head": ({"mask": (CAUSAL,) * 3}, "mask has 3 patterns, q has 4 heads"),
    "per_head_cycle": ({"mask": per_head.PerHead((CAUSAL,) * 3)}, "num_heads=4 must be a multiple"),
    "mask_size": (
        {"mask": lower.lower(CAUSAL, q_len=9)},
        "mask is for 9 queries and 9 keys; q has 8, k has 8",
    ),
    "mask_tables": (
        {"mask": lower.lower((CAUSAL, local.Local(window=2)), q_len=8)},
        "mask has a table for each of 2 heads, q has 4",
    ),
    "mask_heads": (
        {"mask": block_mask.from_array(np.ones((3, 8, 8), bool))},
        "mask has 3 tables, which must divide num_heads=4",
    ),
    "mask_batch": (
        {"mask": block_mask.from_block_states(
            np.full((3, 1, 1, 1), 2), rule=CAUSAL, q_len=8, kv_len=8, block_q=8, block_kv=8)},
        "mask is for a batch of 3, q has 2",
    ),
    "mask_positions": (
        {"mask": lower.lower(CAUSAL, q_len=8), "positions": jnp.arange(8)},
        "positions needs mask to be a Pattern",
    ),
    "heads_positions": (
        {"mask": (CAUSAL,) * 4, "positions": jnp.arange(8)},
        "positions needs mask to be one Pattern",
    ),
    "impl": ({"impl": "cuda"}, "impl='cuda' must be None or one of reference, xla"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_argument_error_names_the_argument_and_what_is_allowed(untyped, name):
    changed, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        attend_lib.attend(**arguments(**changed))


def test_arrays_of_wrong_rank_are_caught_by_the_annotations_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        attend_lib.attend(**arguments(q=jnp.zeros((8, 4, 16))))


@pytest.fixture
def chosen(monkeypatch):
    """Names of the backends that ran; they return zeros."""
    ran = []

    def fake(name):
        def forward(inputs):
            ran.append(name)
            return jnp.zeros_like(inputs.q), jnp.zeros(inputs.q.shape[:3])

        return forward

    for module, name in ((reference, "reference"), (xla, "xla")):
        monkeypatch.setattr(module, "forward", fake(name))
    attend_lib._log_choice.cache_clear()
    return ran


def test_the_reference_is_never_chosen_by_itself(chosen):
    attend_lib.attend(**arguments())
    attend_lib.attend(**arguments(), impl="reference")
    assert chosen == ["xla", "reference"]


def test_kernels_not_yet_checked_on_their_device_run_only_when_named(chosen):
    with tiles.assume(GPU):
        attend_lib.attend(**arguments())
    assert chosen == ["xla"]


def test_a_refused_kernel_falls_back_to_xla_and_says_why(chosen, monkeypatch, caplog):
    def refuse(name):
        def module(wanted):
            if wanted == "xla":
                return xla
            raise NotImplementedError(f"impl={wanted!r} has no such device")

        return module(name)

    monkeypatch.setattr(attend_lib, "_module", refuse)
    with tiles.assume(TPU), caplog.at_level(logging.INFO, logger=attend_lib.__name__):
        for scale in (1.0, 2.0):  # Two programs, chosen for anew.
            attend_lib.attend(**arguments(scale=scale))
    assert chosen == ["xla", "xla"]
    (record,) = caplog.records  # Logged once, with the reasons.
    assert record.getMessage().startswith("attend uses backend xla")
    assert "pallas_tpu: impl='pallas_tpu' has no such device" in record.getMessage()


def test_the_choice_is_logged_once(chosen, caplog):
    with caplog.at_level(logging.INFO, logger=attend_lib.__name__):
        for scale in (1.0, 2.0, 3.0):
            attend_lib.attend(**arguments(scale=scale))
    assert [r.getMessage() for r in caplog.records] == ["attend uses backend xla"]


def test_a_named_backend_refuses_with_its_reason(monkeypatch):
    def check(inputs):
        raise NotImplementedError("no such device")

    monkeypatch.setattr(xla, "check", check)
    with pytest.raises(NotImplementedError, match="impl='xla': no such device"):
        attend_lib.attend(**arguments(), impl="xla")
    with pytest.raises(NotImplementedError, match=r"no backend takes these .* xla: no such"):
        attend_lib.attend(**arguments())


@pytest.mark.parametrize("backend", [b for b in attend_lib.backends() if "_" in b])
def test_a_kernel_for_another_device_refuses_on_cpu(backend):
    if jax.default_backend() != "cpu":
        pytest.skip("on an accelerator this backend may run; the contract covers it")
    with pytest.raises(NotImplementedError, match=f"impl='{backend}'"):
        attend_lib.attend(**arguments(), impl=backend)


def test_a_missing_dependency_is_a_refusal(monkeypatch):
    def missing(name):
        raise ImportError("No module named 'jax_triton'")

    monkeypatch.setattr(attend_lib.importlib, "import_module", missing)
    with pytest.raises(NotImplementedError, match="cannot be imported: No module named"):
        attend_lib._module("xla")


def test_calls_outside_of_jit_that_are_alike_are_traced_once(chosen):
    states = jnp.ones((1, 1, 1, 1), jnp.int32)
    for mask in (
        causal.Causal(),
        (causal.Causal(),) * 4,
        block_mask.from_block_states(
            states, rule=causal.Causal(), q_len=8, kv_len=8, block_q=16, block_kv=16
        ),
    ):
        chosen.clear()
        for _ in range(2):
            attend_lib.attend(**arguments(mask=mask))
        assert chosen == ["xla"]
        attend_lib.attend(**arguments(mask=mask), impl="reference")
        assert chosen == ["xla", "reference"]


def _pieces(count, seed=0):
    """Attention to `count` disjoint sets of keys, and to their union."""
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 40, 2, 8)), jnp.float32) for _ in range(3))
    owner = rng.integers(0, count, (40, 40))
    owner[:5] = 0  # Some rows have one piece only,
    masks = [(owner == i) & (np.arange(40) > 2)[:, None] for i in range(count)]  # some have none.
    block = {"block_q": 16, "block_kv": 16}

    def run(array, q, k, v):
        mask = block_mask.from_array(array, **block)
        return attend_lib.attend(q, k, v, mask=mask, return_lse=True)

    return (q, k, v), masks, run


@pytest.mark.parametrize("count", [1, 3])
def test_merge_lse_equals_attention_to_the_union(count):
    qkv, masks, run = _pieces(count)

    @jax.jit
    def both(*qkv):
        parts = attend_lib.merge_lse([run(m, *qkv) for m in masks])
        return parts, run(np.logical_or.reduce(masks), *qkv)

    (merged, lse), (out, want) = jax.tree.map(np.asarray, both(*qkv))
    np.testing.assert_allclose(merged, out, atol=2e-6)
    np.testing.assert_allclose(lse, want, atol=2e-6)
    assert (merged[:, :3] == 0).all()
    assert (lse[:, :3] == -np.inf).all()


def test_merge_lse_has_the_gradients_of_the_union():
    qkv, masks, run = _pieces(2)

    def merged(*qkv):
        out, lse = attend_lib.merge_lse([run(m, *qkv) for m in masks])
        return (out**2).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

    def whole(*qkv):
        out, lse = run(np.logical_or.reduce(masks), *qkv)
        return (out**2).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

    got, want = (jax.jit(jax.grad(f, (0, 1, 2)))(*qkv) for f in (merged, whole))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_merge_lse_rejects_nothing_and_unequal_shapes():
    one = (jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 2, 1)))
    other = (jnp.zeros((1, 3, 1, 4)), jnp.zeros((1, 3, 1)))
    for pieces in ([], [one, other]):
        with pytest.raises(ValueError, match="pieces must be one or more of equal shapes"):
            attend_lib.merge_lse(pieces)


def test_assume_is_undone():
    before = tiles.target()
    with tiles.assume(TPU):
        assert tiles.target() == TPU
    with pytest.raises(ZeroDivisionError), tiles.assume(TPU):
        1 / 0  # noqa: B018
    assert tiles.target() == before
