"""MoBA: the definition as a loop over queries, its two parts, and a needle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.models import attention
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops.token_select import attend as select_lib
from sparse_attn.ops.token_select import by_block, lists, xla
from sparse_attn.patterns import full
from sparse_attn.selection import moba
from tests.ops.test_token_select import largest
from tests.selection import rules


def by_definition(q, k, v, block, top_k):
    """Every query by itself, float64: the mean of each past block, the best of them, softmax."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, dim = q.shape
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, n in np.ndindex(batch, length, heads):
        own = t // block
        keys, values = k[b, :, n // 2], v[b, :, n // 2]
        gate = [keys[i * block : (i + 1) * block].mean(0) @ q[b, t, n] for i in range(own)]
        taken = [*np.argsort(gate)[::-1][:top_k], own]
        at = [s for s in range(t + 1) if s // block in taken]
        weights = np.exp(keys[at] @ q[b, t, n] / np.sqrt(dim))
        out[b, t, n] = weights @ values[at] / weights.sum()
    return out


def test_output_is_the_definition_and_its_two_parts_merged():
    length, block, top_k = 70, 16, 2
    q, k, v = rules.inputs(batch=1, length=length)
    rule = moba.Moba(block_kv=block, top_k=top_k)
    want = by_definition(q, k, v, block, top_k)
    np.testing.assert_allclose(rules.attend(rule, q, k, v), want, atol=2e-5)
    mask = rules.select(rule, q, k)
    own = rules.select(moba.Moba(block_kv=block, top_k=0), q, k)
    past = moba.Moba(block_kv=block, top_k=top_k, always=None)
    parts = [rules.attend_masked(q, k, v, m) for m in (own, rules.select(past, q, k))]
    merged, lse = attend_lib.merge_lse(parts)
    np.testing.assert_allclose(merged, want, atol=2e-5)
    np.testing.assert_allclose(lse, rules.attend_masked(q, k, v, mask)[1], atol=2e-5)


def test_no_choice_follows_a_later_token():
    # Query t must not feel any token after it: not even those of its own block, through a mean.
    q, k, _ = rules.inputs(1, batch=1, length=48)
    rule = moba.Moba(block_kv=16, top_p=0.5)
    kept = rules.chosen(rule, q, k)
    for t in (17, 24, 40):
        later = (np.arange(48) > t)[None, :, None, None]
        changed = rules.chosen(rule, *(jnp.where(later, 5 * x[:, ::-1], x) for x in (q, k)))
        np.testing.assert_array_equal(changed[:, :, : t + 1], kept[:, :, : t + 1])


def test_planted_needle_blocks_are_found():
    length, block, dim = 512, 32, 32
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, length, 4, dim)) * 0.5
    needles = rng.integers(0, 8, (4, 16))  # Of 16 queries in the second half, for each head.
    queries = 256 + 16 * np.arange(16) + 7
    for head, i in np.ndindex(4, 16):
        direction = rng.standard_normal(dim)
        q[0, queries[i], head] += 3 * direction
        start = needles[head, i] * block
        k[0, start + 3 : start + 11, head] += direction / 2
    mask = rules.chosen(moba.Moba(block_kv=block, top_k=3), *map(jnp.float32, (q, k)))
    found = [[mask[0, h, queries[i], needles[h, i]] > 0 for i in range(16)] for h in range(4)]
    assert np.mean(found) >= 0.95


def test_lists_are_the_choice_and_attend_to_the_definition(monkeypatch):
    monkeypatch.setattr(lists, "_PREFIX", 20)
    length, block = 70, 16
    q, k, v = rules.inputs(batch=2, length=length)
    ids = jnp.array([[1] * 30 + [2] * 40, [1] * 50 + [3] * 12 + [0] * 8])
    rule = moba.Moba(block_kv=block, top_k=2)
    for segment_ids in (None, ids):
        taken = np.asarray(jax.jit(rule.lists)(q, k, segment_ids=segment_ids))
        kept = rules.chosen(rule, q, k, segment_ids) > 0
        mine = (taken[..., None] == np.arange(5)).any(3).swapaxes(1, 2)
        real = np.ones((2, length), bool) if segment_ids is None else np.asarray(ids) != 0
        np.testing.assert_array_equal(mine & real[:, None, :, None], kept & real[:, None, :, None])
    out = select_lib.attend(q, k, v, selected=rule.lists(q, k), block=block, impl="xla")
    for b in range(2):
        want = by_definition(q[b : b + 1], k[b : b + 1], v[b : b + 1], block, 2)
        np.testing.assert_allclose(out[b : b + 1], want, atol=2e-5)
    with pytest.raises(ValueError, match="must be moba with one top_k"):
        moba.Moba(block_kv=8, top_p=0.5).lists(q, k)


@pytest.mark.slow
def test_gradients_by_lists_equal_those_of_the_masked_reference():
    q, k, v = rules.inputs(3, batch=1, length=40)
    rule = moba.Moba(block_kv=8, top_k=2)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=rules.COMPILER_OPTIONS)
    def gradients(by_lists, *x):
        def loss(q, k, v):
            if by_lists:
                out = select_lib.attend(
                    q, k, v, selected=rule.lists(q, k), block=8, impl="by_block"
                )
            else:
                out = rule.attend(q, k, v, impl="reference")
            return jnp.sin(out).sum()

        return jax.grad(loss, (0, 1, 2))(*x)

    for mine, want in zip(gradients(True, q, k, v), gradients(False, q, k, v), strict=True):
        np.testing.assert_allclose(mine, want, atol=3e-5)


def test_a_layer_takes_the_lists():
    layers = [
        attention.SelfAttention(
            num_heads=4, num_kv_heads=2, head_dim=8, pattern=moba.Moba(block_kv=8, top_k=top_k),
            impl="reference", logits_soft_cap=cap,
        )
        for top_k, cap in [(2, None), (2, 1e6)]
    ]  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (1, 40, 24))
    jit = functools.partial(jax.jit, compiler_options=rules.COMPILER_OPTIONS)
    params = jit(layers[0].init)(jax.random.key(1), x)
    by_lists, by_mask = (jit(layer.apply)(params, x) for layer in layers)
    np.testing.assert_allclose(by_lists, by_mask, atol=1e-5)
    traced = [str(jax.make_jaxpr(layer.apply)(params, x)) for layer in layers]
    assert ["top_k" in text for text in traced] == [True, False]


@pytest.mark.parametrize("by_lists", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_by_lists_no_array_grows_as_queries_times_keys(by_lists, monkeypatch):
    for module in (lists, by_block, xla):
        monkeypatch.setitem(module._AT_ONCE, "cpu", 1 << 16)
    layer = attention.SelfAttention(
        num_heads=2, num_kv_heads=1, head_dim=8, pattern=moba.Moba(block_kv=64, top_k=3),
        logits_soft_cap=None if by_lists else 50.0,
    )  # fmt: skip

    def gradient(params, x):
        return jax.grad(lambda p: layer.apply(p, x).sum())(params)

    def size(length):
        x = jax.ShapeDtypeStruct((1, length, 16), jnp.float32)
        return largest(gradient, jax.eval_shape(layer.init, jax.random.key(0), x), x)

    small, large = size(1 << 12), size(1 << 15)
    assert (large < 8.5 * small) == by_lists  # The mask of single queries is T * S / block_kv.
    assert (large < (1 << 30) / 100) == by_lists


def test_wrong_fields_are_named():
    with pytest.raises(ValueError, match="block_q=8 must be 1"):
        moba.Moba(block_q=8, block_kv=8, top_k=1)
    with pytest.raises(ValueError, match=r"pattern=full\(\) must be causal"):
        moba.Moba(block_kv=8, top_k=1, pattern=full.Full())
