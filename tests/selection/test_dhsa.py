"""DHSA: exact scores of chunks of one token, the scale of chunks, and a needle in a ragged one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import scoring
from sparse_attn.selection import base, dhsa
from tests.selection import rules

jit = functools.partial(jax.jit, compiler_options=rules.COMPILER_OPTIONS)


def test_chunks_of_one_token_keep_the_best_keys():
    length, top_k = 60, 7
    q, k, _ = rules.inputs(batch=1, length=length)
    rule = dhsa.Dhsa(top_k=top_k, length=1, window=1)
    every = jnp.arange(length, dtype=jnp.int32)[None]
    found = np.asarray(jit(rule.lists)(q, k, every))
    scores = np.asarray(scoring.logits(q, k))
    for t, n in np.ndindex(length, 4):
        want = np.argsort(-scores[0, n, t, : t + 1], kind="stable")[:top_k]
        assert {*found[0, t, n]} - {-1} == {*want}
        assert (found[0, t, n] >= 0).sum() == min(top_k, t + 1)


def test_a_budget_for_everything_is_dense_and_a_small_one_is_the_masked_reference():
    q, k, v = rules.inputs(1, batch=1, length=50)
    everything = dhsa.Dhsa(top_k=10_000, length=8, window=4)
    got = jit(everything.attend)(q, k, v)
    np.testing.assert_allclose(got, rules.dense(q, k, v), atol=2e-5)
    rule = dhsa.Dhsa(top_k=9, length=8, window=4)
    lists = jit(rule.lists)(q, k)
    kept = (np.asarray(lists)[..., None] == np.arange(50)).any(3)
    assert (kept.sum(-1) == np.minimum(np.arange(50) + 1, 9)[:, None]).all()
    logits = np.where(np.moveaxis(kept, 2, 1), np.asarray(scoring.logits(q, k)), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    want = np.einsum("bnts,bsnh->btnh", weights, np.repeat(v, 2, 2))
    np.testing.assert_allclose(jit(rule.attend)(q, k, v), want, atol=2e-5)


def test_no_output_follows_a_later_chunk_nor_the_value_of_a_later_token():
    # All keys decide where chunks are cut, and a chunk scores as a whole.
    q, k, v = rules.inputs(2, batch=1, length=50)
    rule = dhsa.Dhsa(top_k=9, length=8, window=4)
    chunks = jit(rule.chunks)(k)
    attend = jit(lambda q, k, v: rule.attend(q, k, v, chunks=chunks))
    out = attend(q, k, v)
    starts = np.flatnonzero(np.diff(chunks[0])) + 1
    assert len(starts) > 3
    for start, changes in [*((t, (1, 1, 1)) for t in starts), *((t, (0, 0, 1)) for t in (11, 30))]:
        later = (np.arange(50) >= start)[:, None, None]
        changed = attend(
            *(jnp.where(later & bool(c), 5 * x[:, ::-1], x) for x, c in zip((q, k, v), changes))
        )
        np.testing.assert_array_equal(changed[:, :start], out[:, :start])
        assert np.abs(changed - out)[:, start:].max() > 0.1


def test_noise_scores_alike_in_chunks_of_any_length():
    rng = np.random.default_rng(0)
    k = jnp.asarray(rng.standard_normal((1, 4096, 1, 16)), jnp.float32)
    q = rng.standard_normal(16)
    spread = {}
    for size in (1, 16, 64):
        chunks = jnp.arange(4096, dtype=jnp.int32)[None] // size
        found = np.asarray(dhsa.scaled_means(k[:, : 64 * size], chunks[:, : 64 * size], 64))
        spread[size] = (found[0, :, 0] @ q).var() / (q @ q)
    # 64 draws of a variance: within 3 of its standard errors, 0.18 each.
    assert all(0.47 < x < 1.53 for x in spread.values())
    assert spread[64] / 64 < 0.1 * spread[1]  # As it would be for plain means.


def test_a_needle_in_a_ragged_chunk_is_kept():
    trials, length, dim, budget = 60, 256, 32, 32
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, trials, length, 1, dim))
    runs = []
    for trial in range(trials):
        size, start = rng.integers(6, 20), rng.integers(10, 200)
        direction = rng.standard_normal(dim)
        direction /= np.linalg.norm(direction)
        k[trial, start : start + size, 0] += 6 * direction
        q[trial, -8:, 0] += 8 * direction
        runs.append(range(start, start + size))  # The needle is in the middle of them.
    rule = dhsa.Dhsa(top_k=budget, length=16, window=6)
    assert budget / length == 0.125
    found = np.asarray(jit(rule.lists)(*map(jnp.float32, (q, k))))[:, -1, 0]
    kept = [np.isin(run, row) for run, row in zip(runs, found, strict=True)]
    assert np.mean([x[len(x) // 2] for x in kept]) >= 0.95
    assert np.mean(np.concatenate(kept)) >= 0.9  # Their edges are found to a token or two.


def test_wrong_fields_are_named():
    for fields, message in [
        ({"top_k": 0}, "top_k=0 must be an int >= 1"),
        ({"block_kv": 8}, "block_kv=8 must"),
        ({"pattern": base.EVERYTHING}, r"pattern=full\(\) must be causal"),
    ]:
        with pytest.raises(ValueError, match=message):
            dhsa.Dhsa(**fields)
