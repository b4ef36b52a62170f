"""Landmark attention: the definition as a loop, its gradients, and a planted block."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.models import attention
from sparse_attn.selection import landmark
from tests.ops.test_token_select import largest
from tests.selection import rules

RULE = landmark.Landmark(block_kv=8)


def jitted(f):
    return jax.jit(f, compiler_options=rules.COMPILER_OPTIONS)


def weights_by_definition(q, keys, block):
    """The weight of each token for the last query, from the paper: `q [H]`, `keys [t + 1, H]`."""
    z = keys @ q / np.sqrt(len(q))
    t, weights = len(keys) - 1, np.zeros(len(keys))
    own = t // block
    regular = [s for s in range(own * block, t + 1) if s % block != block - 1]
    marks = [j * block + block - 1 for j in range(own)]
    group = np.exp(z[regular + marks])
    group /= group.sum()
    weights[regular] = group[: len(regular)]
    for gate, mark in zip(group[len(regular) :], marks, strict=True):
        inside = list(range(mark - block + 1, mark))
        part = np.exp(z[inside])
        weights[inside] = gate * part / part.sum()
    return weights


def by_definition(q, k, v, block):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, n in np.ndindex(*q.shape[:3]):
        keys = k[b, : t + 1, n // 2]
        weights = weights_by_definition(q[b, t, n], keys, block)
        np.testing.assert_allclose(weights.sum(), 1)
        out[b, t, n] = weights @ v[b, : t + 1, n // 2]
    return out


def test_output_is_the_definition_and_all_blocks_are_the_training_form():
    q, k, v = rules.inputs(batch=2, length=45)
    out = jitted(RULE.attend)(q, k, v)
    np.testing.assert_allclose(out, by_definition(q, k, v, 8), atol=2e-5)
    every = dataclasses.replace(RULE, top_k=10_000)
    np.testing.assert_allclose(jitted(every.attend)(q, k, v), out, atol=1e-5)
    few = dataclasses.replace(RULE, top_k=2)
    assert np.abs(jitted(few.attend)(q, k, v) - out).max() > 0.01
    # Landmarks have no weight of their own: the rest sums to 1.
    ones = jnp.where(np.arange(45)[:, None, None] % 8 == 7, 100.0, jnp.ones_like(v))
    np.testing.assert_allclose(jitted(few.attend)(q, k, ones), 1, atol=1e-5)


@pytest.mark.slow
def test_gradients_are_those_of_the_naive_form():
    length, block = 29, 8
    q, k, v = rules.inputs(1, batch=1, length=length, heads=2, kv_heads=2)
    at = np.arange(length)
    regular = at % block != block - 1
    own = at[:, None] // block == at // block
    earlier = at[:, None] // block > at // block

    def naive(q, k, v):
        z = jnp.exp(jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8))
        near = z * (own & regular & (at <= at[:, None]))
        gates = z * (earlier & ~regular)
        total = (near + gates).sum(-1, keepdims=True)
        inside = z * (earlier & regular)
        same = (at[:, None] // block == at // block).astype(np.float32)
        sums = inside @ same
        weights = near / total + inside / jnp.where(sums == 0, 1, sums) * (gates @ same) / total
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    def gradients(f):
        return jitted(jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2)))(q, k, v)

    want = gradients(naive)
    for top_k in (None, 100):
        rule = dataclasses.replace(RULE, top_k=top_k)
        for mine, theirs in zip(gradients(rule.attend), want, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_one_block_is_plain_attention():
    q, k, v = rules.inputs(2, length=20)
    wide = landmark.Landmark(block_kv=21)
    np.testing.assert_allclose(jitted(wide.attend)(q, k, v), rules.dense(q, k, v), atol=2e-5)


def test_the_block_behind_an_aligned_landmark_is_read():
    length, block, dim = 512, 32, 32
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, length, 4, dim)) * 0.5
    needles = rng.integers(0, 8, (4, 16))
    queries = 256 + 16 * np.arange(16) + 7
    for head, i in np.ndindex(4, 16):
        direction = rng.standard_normal(dim)
        q[0, queries[i], head] = 2 * direction
        k[0, needles[head, i] * block + block - 1, head] += direction
    rule = landmark.Landmark(block_kv=block, top_k=4)
    chosen = np.asarray(jitted(rule.lists)(*map(jnp.float32, (q, k))))
    assert all(needles[h, i] in chosen[0, queries[i], h] for h, i in np.ndindex(4, 16))


def test_causal_and_documents_are_rows_of_their_own():
    q, k, v = rules.inputs(3, batch=1, length=40)
    rule = dataclasses.replace(RULE, top_k=1)
    attend = jitted(rule.attend)
    out = attend(q, k, v)
    for t in (11, 15, 23):
        later = (np.arange(40) > t)[:, None, None]
        changed = attend(*(jnp.where(later, 5 * x[:, ::-1], x) for x in (q, k, v)))
        np.testing.assert_array_equal(changed[:, : t + 1], out[:, : t + 1])
    ids = jnp.array([[1] * 16 + [2] * 19 + [0] * 5])
    packed = jitted(lambda *x: rule.attend(*x, segment_ids=ids))(q, k, v)
    np.testing.assert_allclose(packed[:, :16], out[:, :16], atol=1e-6)
    alone = attend(*(x[:, 16:35] for x in (q, k, v)))
    np.testing.assert_allclose(packed[:, 16:35], alone, atol=2e-5)
    assert not np.asarray(packed[:, 35:]).any()


def test_a_layer_of_a_model_attends_by_it():
    fields = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope_base": None}
    layer = attention.SelfAttention(pattern=RULE, **fields)
    x = jax.random.normal(jax.random.key(0), (1, 24, 16))
    params = jitted(layer.init)(jax.random.key(1), x)
    q, k, v = (
        np.einsum("BTD,DNH->BTNH", x, params["params"][name]["kernel"])
        for name in ("query", "key", "value")
    )
    heads = by_definition(q, k, v, RULE.block_kv)
    want = np.einsum("BTNH,NHD->BTD", heads, params["params"]["out"]["kernel"])
    np.testing.assert_allclose(jitted(layer.apply)(params, x), want, atol=1e-5)
    capped = attention.SelfAttention(pattern=RULE, logits_soft_cap=20.0, **fields)
    with pytest.raises(ValueError, match="logits_soft_cap must be None for landmark"):
        jax.eval_shape(capped.init, jax.random.key(1), x)


@pytest.mark.parametrize("top_k", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_no_array_grows_as_queries_times_keys(top_k, monkeypatch):
    from sparse_attn.ops.token_select import lists

    monkeypatch.setitem(lists._AT_ONCE, "cpu", 1 << 16)
    rule = landmark.Landmark(block_kv=64, top_k=top_k)

    def size(length):
        shapes = [jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (2, 1, 1)]
        grad = jax.grad(lambda *x: rule.attend(*x).sum(), (0, 1, 2))
        return largest(grad, *shapes)

    small, large = size(1 << 12), size(1 << 15)
    assert large < 8.5 * small
    assert large < (1 << 30) / 100


def test_wrong_fields_are_named():
    for fields, message in [
        ({"block_kv": 1}, "block_kv=1 must be an int >= 2"),
        ({"top_k": 0}, "top_k=0 must be an int >= 1"),
        ({"block_q": 8}, "block_q=8 must be 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            landmark.Landmark(**fields)
    q, k, v = rules.inputs(length=16, kv_len=20)
    with pytest.raises(ValueError, match="must have the length of q"):
        RULE.attend(q, k, v)
