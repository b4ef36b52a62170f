"""FlexPrefill: which heads are believed, and how much mass is kept."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import kept_mass
from sparse_attn.patterns import causal
from sparse_attn.selection import flex_prefill
from tests.selection import rules
from tests.selection.test_m_inference import LENGTH, block_head, line_head, stack

BLOCK = 16


def rule(**fields):
    return flex_prefill.FlexPrefill(block_q=BLOCK, block_kv=BLOCK, **fields)


def heads():
    return stack(block_head(), line_head(columns=(37, 90)))


def test_blocks_are_believed_where_they_are_uniform_and_columns_are_not():
    divergence = np.asarray(rule().divergence(*heads()))[0]
    assert divergence[0] < 0.1 < divergence[1]


@pytest.mark.slow
def test_the_believed_head_keeps_its_blocks_and_the_other_one_its_columns():
    q, k = heads()
    # Every divergence is below 1 and none below 0.
    taken, by_blocks, by_lines = (
        rules.chosen(rule(tau=tau), q, k)[0] > 0 for tau in (0.1, 1.0, 0.0)
    )
    assert (by_blocks != by_lines).any((1, 2)).all()
    np.testing.assert_array_equal(taken[0], by_blocks[0])
    np.testing.assert_array_equal(taken[1], by_lines[1])
    planted = np.eye(LENGTH // BLOCK, dtype=bool)
    rows = np.arange(1, LENGTH // BLOCK)
    planted[rows, (5 * rows + 2) % rows] = True
    np.testing.assert_array_equal(taken[0], planted)
    for column in (37 // BLOCK, 90 // BLOCK):  # In every row that may see it.
        assert taken[1, column:, column].all()


def test_divergence_is_that_of_the_definition():
    q, k, _ = rules.inputs(length=64, heads=1, kv_heads=1, batch=1)
    logits = np.asarray(q[0, -BLOCK:, 0] @ k[0, :, 0].T, np.float64) / np.sqrt(8)
    hidden = np.arange(64)[None] > np.arange(48, 64)[:, None]
    weights = np.exp(np.where(hidden, -np.inf, logits))
    true = (weights / weights.sum(1, keepdims=True)).mean(0).reshape(4, BLOCK).sum(1)
    means = np.asarray(k)[0, :, 0].reshape(4, BLOCK, 8).mean(1)
    pooled = np.exp(np.asarray(q)[0, -BLOCK:, 0].mean(0) @ means.T / np.sqrt(8))
    pooled /= pooled.sum()
    middle = (true + pooled) / 2
    want = sum((x * np.log(x / middle)).sum() for x in (true, pooled)) / 2
    np.testing.assert_allclose(rule().divergence(q, k)[0, 0], np.sqrt(want), atol=1e-5)


def test_kept_mass_is_gamma_and_density_grows_with_it():
    q, k = heads()
    densities = []
    for gamma in (0.3, 0.6, 0.9):
        mask = rules.select(rule(gamma=gamma), q, k)
        mass = kept_mass.kept_mass(q, k, mask, dense=causal.Causal(), num_queries=LENGTH)
        # Blocks: gamma of the whole map. Lines: gamma of what the probe sees.
        assert np.asarray(mass)[0, :, 0].mean() >= gamma
        assert np.asarray(mass)[0, -BLOCK:, 1].mean() >= gamma
        densities.append(np.asarray(kept_mass.density(mask, causal.Causal()))[0])
    assert (np.diff(densities, axis=0) >= 0).all()


def test_flat_heads_get_more_blocks_than_peaked_ones():
    q, k = heads()
    q = jnp.concatenate([q, q * 0.05], 2)
    k = jnp.concatenate([k, k], 2)
    density = kept_mass.density(rules.select(rule(gamma=0.8), q, k), causal.Causal())[0]
    assert (density[2:] > 1.3 * density[:2]).all()


def test_wrong_fields_are_named():
    with pytest.raises(ValueError, match=r"gamma=0\.0 must be > 0 and <= 1"):
        rule(gamma=0.0)
    with pytest.raises(ValueError, match=r"tau=-1\.0 must be >= 0"):
        rule(tau=-1.0)
