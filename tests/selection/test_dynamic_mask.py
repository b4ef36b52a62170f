"""Dynamic mask attention: the keys that each query keeps, by sorting, and its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.data.synthetic import mqar
from sparse_attn.ops import best_keys
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import dynamic_mask
from sparse_attn.train import state
from tests.ops import oracle
from tests.ops.test_token_select import largest
from tests.selection import rules
from tests.train import tiny

jit = functools.partial(jax.jit, compiler_options=rules.COMPILER_OPTIONS)


def kept_by_definition(scores, keep, ids=None):
    """Element mask `[B, K, T, T]`: for every query, its earlier keys sorted by their scores."""
    scores = np.asarray(scores)
    batch, length, heads = scores.shape
    ids = np.ones((batch, length), int) if ids is None else np.asarray(ids)
    seen = np.zeros((batch, heads, length, length), bool)
    for b, g, t in np.ndindex(batch, heads, length):
        keys = [s for s in range(t + 1) if ids[b, s] == ids[b, t] != 0]
        best = sorted(keys, key=lambda s: (-scores[b, s, g], s))[:keep]
        seen[b, g, t, best] = True
    return seen


@pytest.mark.parametrize("block", [16, pytest.param(7, marks=pytest.mark.slow)])
def test_output_and_gradients_are_those_of_the_element_mask(block):
    """Blocks of queries read few keys; the definition masks single ones."""
    q, k, v = rules.inputs(batch=2, length=45)
    keep = 6
    rng = np.random.default_rng(1)
    scores = jnp.asarray(rng.integers(-4, 5, (2, 45, 2)) / 2, jnp.float32)  # With ties.
    ids = jnp.array([[1] * 45, [1] * 14 + [2] * 25 + [0] * 6])
    dout = rng.standard_normal(q.shape)

    def loss(q, k, v, scores):
        out = best_keys.attend(q, k, v, scores=scores, keep=keep, segment_ids=ids, block=block)
        return (out * dout).sum(), out

    grads, out = jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, scores)
    seen = kept_by_definition(scores, keep, ids)
    assert (seen[0].sum(-1) == np.minimum(np.arange(45) + 1, keep)).all()
    bias = np.moveaxis(np.asarray(scores), 2, 1).repeat(2, 1)
    want = oracle.attention(
        q, k, v, seen.repeat(2, 1), dout, np.zeros(q.shape[:3]), key_bias=bias, scale=8**-0.5
    )
    np.testing.assert_allclose(out, want.out, atol=2e-5)
    dscores = np.moveaxis(want.dkey_bias.reshape(2, 2, 2, 45).sum(2), 1, 2)
    for mine, theirs in zip(grads, (want.dq, want.dk, want.dv, dscores), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)


def test_all_keys_without_a_score_are_dense_and_the_rule_trains_its_scores():
    q, k, v = rules.inputs(2, length=40)
    rule = dynamic_mask.DynamicMask(top_k=100)
    params = jax.tree.map(jnp.asarray, rule.params_like(4, 2, 8))
    still = params | {"decay": jnp.zeros(2)}
    attend = jit(lambda *x: rule.attend(*x[:3], params=x[3], block=16))
    np.testing.assert_allclose(attend(q, k, v, still), rules.dense(q, k, v), atol=2e-5)
    few = dynamic_mask.DynamicMask(top_k=5)
    grads = jit(jax.grad(lambda p: jnp.sin(few.attend(q, k, v, params=p, block=16)).sum()))(params)
    for grad in jax.tree.leaves(grads):
        assert np.isfinite(grad).all()
        assert np.abs(grad).min() > 0


def test_no_output_follows_a_later_token():
    q, k, v = rules.inputs(3, batch=1, length=40)
    rule = dynamic_mask.DynamicMask(top_k=4)
    params = rule.params_like(4, 2, 8)
    attend = jit(lambda q, k, v: rule.attend(q, k, v, params=params, block=16))
    out = attend(q, k, v)
    for t in (5, 20, 31):
        later = (np.arange(40) > t)[:, None, None]
        changed = attend(*(jnp.where(later, 5 * x[:, ::-1], x) for x in (q, k, v)))
        np.testing.assert_array_equal(changed[:, : t + 1], out[:, : t + 1])
        assert np.abs(changed - out)[:, t + 1 :].max() > 0.1


@pytest.mark.slow
def test_associative_recall_is_learned():
    task = mqar.Mqar(vocab_size=64, length=32, num_pairs=4)
    pattern = patterns_base.parse("dynamic_mask(top_k=12)")
    model = tiny.model(vocab_size=64, num_layers=1, embed_dim=32, short_conv=3, pattern=pattern)
    optimizer, losses = tiny.optimizer(steps=200), []
    step = state.make_train_step(model, optimizer)
    now = state.create(model, optimizer, key=jax.random.key(0), length=32)
    assert now.params["layers"]["attention"]["step"].shape == (1, 1, 16, 1)
    start = now.params["layers"]["attention"]["step"] + 0
    rng = np.random.default_rng(0)
    for _ in range(200):
        examples = [task.example(rng) for _ in range(16)]
        batch = {name: np.stack([x[name] for x in examples]) for name in examples[0]}
        batch["segment_ids"] = np.ones((16, 32), np.int32)
        batch["positions"] = np.tile(np.arange(32, dtype=np.int32), (16, 1))
        now, metrics = step(now, batch)
        losses.append(float(metrics["loss"]))
    # Who knows which tokens are values, and no more, has log(32) = 3.47.
    assert np.mean(losses[-20:]) < np.log(32) - 0.4
    assert np.abs(now.params["layers"]["attention"]["step"] - start).max() > 0.01


def test_no_array_grows_as_queries_times_keys():
    def size(length):
        shapes = [jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (2, 1, 1)]
        shapes.append(jax.ShapeDtypeStruct((1, length, 1), jnp.float32))

        def loss(q, k, v, scores):
            return best_keys.attend(q, k, v, scores=scores, keep=64).sum()

        return largest(jax.grad(loss, (0, 1, 2, 3)), *shapes)

    small, large = size(1 << 12), size(1 << 15)
    assert large < 8.5 * small
    assert large < (1 << 30) / 100
