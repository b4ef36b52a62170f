"""MoBA: the definition as a loop over queries, its two parts, and a needle."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import attend as attend_lib
from sparse_attn.patterns import full
from sparse_attn.selection import moba
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


def test_wrong_fields_are_named():
    with pytest.raises(ValueError, match="block_q=8 must be 1"):
        moba.Moba(block_q=8, block_kv=8, top_k=1)
    with pytest.raises(ValueError, match=r"pattern=full\(\) must be causal"):
        moba.Moba(block_kv=8, top_k=1, pattern=full.Full())
