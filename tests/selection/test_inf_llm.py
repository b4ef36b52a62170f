"""InfLLM v2: scores by brute force, a planted key, one choice per group, decode as prefill."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.patterns import local, sinks
from sparse_attn.selection import base, inf_llm
from tests.selection import rules


def test_scores_are_those_of_a_loop_over_windows():
    length, dim = 40, 8
    q, k, _ = rules.inputs(batch=1, length=length, heads=4, kv_heads=2, dim=dim)
    rule = inf_llm.InfLlm(block_kv=8, kernel=6, stride=3, top_k=1, always=base.DIAGONAL)
    blocks = rule._blocks(rule._states(length, length), q, k, None, None)
    got = np.asarray(rule.block_scores(q, np.arange(length), k, blocks))
    starts = list(range(0, length - 5, 3))
    want, probabilities = np.zeros((1, 2, length, 5)), {}
    for t, head in np.ndindex(length, 4):
        ended = [s for s in starts if s + 5 <= t]
        if not ended:
            continue
        means = np.stack([np.asarray(k)[0, s : s + 6, head // 2].mean(0) for s in ended])
        weights = np.exp(means @ np.asarray(q)[0, t, head] / np.sqrt(dim))
        # The probabilities of a window are summed over the group before the maximum: keep them.
        for s, weight in zip(ended, weights / weights.sum(), strict=True):
            probabilities[head // 2, t, s] = probabilities.get((head // 2, t, s), 0) + weight
    for (group, t, s), share in probabilities.items():
        for block in range(s // 8, (s + 5) // 8 + 1):
            want[0, group, t, block] = max(want[0, group, t, block], share)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_planted_key_of_twice_the_query_is_among_the_best_four_blocks():
    trials, length, dim = 64, 4096, 128
    rng = np.random.default_rng(0)
    rule = inf_llm.InfLlm()
    found = 0
    score = jax.jit(lambda q, k, blocks: rule.block_scores(q, jnp.array([length - 1]), k, blocks))
    for _ in range(trials // 8):
        q = rng.standard_normal((8, 1, 1, dim)).astype(np.float32)
        k = rng.standard_normal((8, length, 1, dim)).astype(np.float32)
        at = rng.integers(0, length - 64, 8)
        k[np.arange(8), at, 0] = 2 * q[:, 0, 0]
        blocks = base.Blocks(None, None, np.ones((1, 1), bool), np.ones((1, length), bool))
        best = np.argsort(-np.asarray(score(q, k, blocks))[:, 0, 0], -1)[:, :4]
        found += (best == (at // 64)[:, None]).any(-1).sum()
    assert found == trials


def test_a_group_shares_its_blocks_sinks_and_window_are_in_and_decoding_chooses_alike():
    q, k, _ = rules.inputs(1, batch=1, length=96)
    always = local.Local(window=20) | sinks.Sinks(tokens=1)
    rule = inf_llm.InfLlm(block_kv=8, kernel=4, stride=2, top_k=2, always=always)
    mask = rules.select(rule, q, k)
    assert mask.num_tables == k.shape[2]
    kept = rules.states(mask)[0] > 0
    t = np.arange(96)
    assert kept[:, :, 0].all()
    assert kept[:, t, t // 8].all()
    assert kept[:, t, np.maximum(t - 19, 0) // 8].all()
    for step in (41, 95):
        row = rules.chosen(rule, q[:, : step + 1], k[:, : step + 1])[0, :, -1] > 0
        np.testing.assert_array_equal(row, kept[:, step, : row.shape[-1]])


@pytest.mark.slow
def test_gradients_are_zero_where_no_query_looks():
    q, k, v = rules.inputs(2, batch=1, length=48, heads=2, kv_heads=1)
    rule = inf_llm.InfLlm(block_kv=8, kernel=4, stride=2, top_k=1, always=base.DIAGONAL)
    q = q.at[:, 24:].set(q[:, 24:25])  # Later queries look at one block beside their own.
    kept = rules.chosen(rule, q, k)[0, 0] > 0
    seen_late = kept[24:, :3].any(0)
    assert not seen_late.all()

    def loss(k, v):
        return (rule.attend(q, k, v, impl="reference")[:, 24:] ** 2).sum()

    grads = jax.jit(jax.grad(loss, (0, 1)), compiler_options=rules.COMPILER_OPTIONS)(k, v)
    for grad in grads:
        size = np.abs(grad)[0, :24].reshape(3, -1).max(-1)
        assert np.isfinite(size).all()
        np.testing.assert_array_equal(size > 0, seen_late)
