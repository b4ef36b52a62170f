"""The gate of SeerAttention: its target, its start and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_attn.selection import pooled, seer
from tests.selection import rules

BLOCK = 16


@pytest.mark.parametrize("length", [40, 32])
def test_target_is_the_block_wise_maximum_of_dense_attention(length):
    q, k, _ = rules.inputs(length=length)
    rule = seer.Seer(block_q=16, block_kv=8, top_k=1)
    k_heads = np.repeat(np.asarray(k, np.float64), 2, 2)
    logits = np.einsum("btnh,bsnh->bnts", np.asarray(q, np.float64), k_heads) / np.sqrt(8)
    weights = np.exp(np.where(np.tri(length, dtype=bool), logits, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    want = np.stack(
        [
            np.stack(
                [weights[:, :, i : i + 16, j : j + 8].max((2, 3)) for j in range(0, length, 8)], -1
            )
            for i in range(0, length, 16)
        ],
        2,
    )
    np.testing.assert_allclose(seer.max_pooled(rule, q, k), want, atol=1e-5)


def test_an_untrained_gate_chooses_as_pooled_does():
    q, k, _ = rules.inputs(1, length=100)
    fields = {"block_q": BLOCK, "block_kv": BLOCK, "top_p": 0.6}
    np.testing.assert_array_equal(
        rules.chosen(seer.Seer(**fields), q, k), rules.chosen(pooled.Pooled(**fields), q, k)
    )


def needles(seed, batch, length, dim):
    """Attention follows single tokens, which a mean over their block hides."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, batch, length, 1, dim)) * 0.5
    # Queries of a block look along one of four axes; one token of some block answers each.
    axis = rng.integers(0, 4, (batch, length // BLOCK))
    rows = np.repeat(axis, BLOCK, 1)
    q[:, :, 0] += 5 * np.eye(dim)[rows]
    for b in range(batch):
        for a in range(4):
            k[b, rng.integers(0, length // 2), 0, a] += 6
            # Blocks that are a little alike in the mean are no match.
            start = rng.integers(0, length // BLOCK) * BLOCK
            k[b, start : start + BLOCK, 0, a] += 0.9
    return jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32)


def test_distillation_beats_mean_pooling():
    length, dim = 256, 16
    rule = seer.Seer(block_q=BLOCK, block_kv=BLOCK, top_k=1)
    gate = jax.tree.map(jnp.asarray, rule.params_like(1, 1, dim))
    optimiser = optax.adam(2e-2)

    @jax.jit
    def step(gate, state, q, k):
        loss, grads = jax.value_and_grad(rule.distillation_loss)(gate, q, k)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(gate, updates), state, loss

    state, losses = optimiser.init(gate), []
    for i in range(150):
        gate, state, loss = step(gate, state, *needles(i, 4, length, dim))
        losses.append(float(loss))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])

    q, k = needles(1000, 4, length, dim)
    target = np.asarray(seer.max_pooled(rule, q, k))
    recall = []
    for params in (rule.params_like(1, 1, dim), gate):
        kept = rules.chosen(rule, q, k, gate=params) > 0
        recall.append((target * kept).sum() / target.sum())
    assert recall[1] > recall[0] + 0.05


def test_distillation_trains_the_gate_alone():
    q, k, _ = rules.inputs(2, length=48)
    rule = seer.Seer(block_q=BLOCK, block_kv=BLOCK, top_k=1)
    gate = rule.params_like(4, 2, 8)
    grads, dq, dk = jax.tree.map(
        np.asarray, jax.jit(jax.grad(rule.distillation_loss, (0, 1, 2)))(gate, q, k)
    )
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))
    assert not dq.any()
    assert not dk.any()
