"""AnchorAttention: anchors by brute force, stripes against the best blocks of 128 keys."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import kept_mass, scoring
from sparse_attn.selection import ada_spa, anchor, base
from tests.selection import rules


@pytest.mark.parametrize("first, window", [(0, 3), (16, 3), (32, 40)])
def test_logits_of_the_region_are_those_of_its_keys(first, window):
    q, k, _ = rules.inputs(batch=1, length=48)
    rule = anchor.Anchor(block_q=16, sink_tokens=4, window=window)
    blocks = rule._blocks(rule._states(48, 48), q, k, None, None)
    got = rule.region_logits(q[:, first : first + 16], k, jnp.int32(first), blocks)
    logits = np.asarray(scoring.logits(q[:, first : first + 16], k))
    back = np.arange(first, first + 16)[:, None] - np.arange(48)
    seen = (back >= 0) & ((back < window) | (np.arange(48) < 4))
    for reduce in (np.max, lambda x, axis: np.exp(x).sum(axis)):
        want = reduce(np.where(seen, logits, -np.inf), axis=-1)
        np.testing.assert_allclose(reduce(np.asarray(got), axis=-1), want, rtol=1e-4)


def test_planted_columns_are_kept_at_less_density_than_the_best_blocks_need():
    length, dim = 1024, 32
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, length, dim)) * 0.3
    q[:, 0] += 6
    k[rng.choice(length, 24, replace=False), 0] += 9
    k[:2, 0] += 9  # Something the anchor can hold on to.
    q, k = (jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k))
    densities, kept_before, mass = [], np.zeros(1, bool), None
    for theta in (1.0, 4.0, 16.0):
        rule = anchor.Anchor(block_q=128, theta=theta, sink_tokens=16, window=16)
        mask = rules.select(rule, q, k)
        kept = rules.states(mask) > 0
        assert (kept | ~kept_before).all()
        kept_before = kept
        densities.append(float(kept_mass.density(mask, base.CAUSAL)[0, 0]))
        if theta == 4.0:
            mass = float(kept_mass.kept_mass(q, k, mask, dense=base.CAUSAL).mean())
    assert densities[0] < densities[2]
    assert mass >= 0.95
    # The best blocks of 128 keys: so many per row that they keep as much.
    best = ada_spa.AdaSpa(block_q=128, block_kv=128, top_k=1, pattern=base.CAUSAL)
    masses = np.sort(np.asarray(best.masses(q, k))[0, 0], -1)[:, ::-1]
    top_k = 1 + (np.cumsum(masses, -1).mean(0) < mass).sum()
    rows = np.arange(1, 9)
    assert densities[1] < 0.5 * np.minimum(rows, top_k).sum() / rows.sum()


def test_wrong_fields_are_named():
    with pytest.raises(ValueError, match="window=0 must be an int >= 1"):
        anchor.Anchor(window=0)
