"""AdaSpa: exact masses, the best mask there is, budgets that move between heads."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import kept_mass, scoring
from sparse_attn.patterns import full
from sparse_attn.selection import ada_spa, pooled
from tests.selection import rules


def rule(**fields):
    return ada_spa.AdaSpa(block_q=16, block_kv=16, **fields)


@pytest.mark.slow
def test_masses_from_the_lse_are_sums_of_the_dense_map():
    q, k, v = rules.inputs(batch=1, length=50)
    _, lse = attend_lib.attend(q, k, v, mask=full.Full(), return_lse=True, impl="reference")
    dense = np.asarray(scoring.mass(scoring.logits(q, k), np.ones(1, bool)))
    dense = np.pad(dense, ((0, 0), (0, 0), (0, 14), (0, 14))).reshape(1, 4, 4, 16, 4, 16)
    want = dense.sum((3, 5)) / np.array([16, 16, 16, 2])[:, None]
    for given in (None, lse):
        got = np.asarray(rule(top_k=1).masses(q, k, given))
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_allclose(got.sum(-1), 1, atol=1e-5)


@pytest.mark.slow
def test_no_other_blocks_have_more_mass():
    q, k, _ = rules.inputs(1, batch=1, length=128)
    masses = np.asarray(rule(top_k=1).masses(q, k))
    for top_k in (1, 3):
        kept = rules.chosen(rule(top_k=top_k), q, k) > 0
        best = np.sort(masses, -1)[..., -top_k:].sum(-1)
        np.testing.assert_allclose(np.where(kept, masses, 0).sum(-1), best, rtol=1e-6)
        other = pooled.Pooled(
            block_q=16, block_kv=16, top_k=top_k, pattern=full.Full(), always=None
        )
        own, others = (
            kept_mass.kept_mass(q, k, rules.select(x, q, k), dense=full.Full(), num_queries=128)
            for x in (rule(top_k=top_k), other)
        )
        assert own.mean() > others.mean()


@pytest.mark.slow
def test_reallocation_keeps_the_number_of_blocks_and_does_not_lower_the_recall():
    q, k, _ = rules.inputs(2, batch=1, length=128)
    q = jnp.repeat(q[:, ::16], 16, 1) * jnp.array([0.02, 0.1, 2.0, 4.0])[:, None]
    masses = rule(top_k=1).masses(q, k)
    budgets = ada_spa.reallocate(masses, 3)
    assert sum(budgets) == 12
    assert budgets[0] > 3 > budgets[3]
    before, after = (
        np.where(rules.chosen(rule(top_k=b), q, k) > 0, masses, 0).sum() for b in (3, budgets)
    )
    assert after > before


@pytest.mark.slow
def test_blocks_found_with_an_earlier_lse_are_nearly_the_same():
    q, k, v = rules.inputs(3, batch=1, length=256)
    rng = np.random.default_rng(0)
    old = [x * (1 + 0.01 * jnp.asarray(rng.standard_normal(x.shape), x.dtype)) for x in (q, k)]
    _, lse = attend_lib.attend(*old, v, mask=full.Full(), return_lse=True, impl="reference")
    every = np.ones(1, bool)
    cached = scoring.top_k(rule(top_k=1).masses(q, k, lse), 4, every)
    fresh = scoring.top_k(rule(top_k=1).masses(q, k), 4, every)
    assert float((cached & fresh).sum() / fresh.sum()) >= 0.95
    stale = scoring.top_k(rule(top_k=1).masses(q[:, ::-1], k, lse), 4, every)
    assert float((stale & fresh).sum() / fresh.sum()) < 0.95


def test_budget_of_a_head_never_leaves_the_map():
    assert ada_spa.reallocate(jnp.full((1, 2, 1, 3), 1 / 3), 1) == (1, 1)
    with pytest.raises(ValueError, match="top_k=0 must be an int >= 1"):
        ada_spa.reallocate(jnp.full((1, 2, 1, 3), 1 / 3), 0)
