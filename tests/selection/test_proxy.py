"""ProxyAttn: exact scores where a group is one head, shared ranking, budgets by temperature."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import kept_mass, scoring
from sparse_attn.selection import base, pooled, proxy
from tests.selection import rules


def test_groups_of_one_head_have_the_exact_maxima_of_blocks():
    q, k, _ = rules.inputs(batch=1, length=50)
    got = proxy.Proxy(block_q=16, block_kv=8, group=1).block_maxima(q, k)
    logits = np.where(np.tri(50, dtype=bool), scoring.logits(q, k), -np.inf)
    want = np.full((1, 4, 4, 7), -np.inf)
    for i, j in np.ndindex(4, 7):
        tile = logits[:, :, i * 16 : i * 16 + 16, j * 8 : j * 8 + 8]
        want[:, :, i, j] = tile.max((2, 3))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_identical_heads_choose_alike():
    q, k, _ = rules.inputs(1, batch=1, length=64, heads=1, kv_heads=1)
    kept = rules.chosen(
        proxy.Proxy(block_q=16, block_kv=16, group=4, gamma=0.6), jnp.repeat(q, 4, 2), k
    )
    assert (kept == kept[:, :1]).all()


def heads_with_heavy_keys(length=2048, dim=64):
    """Four heads whose queries all look for the same scattered keys, each at a temperature."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, length, 1, dim)) * 0.3
    q[..., 0] += 4
    k[rng.choice(length, 12, replace=False), :, 0] += 12
    q = q + rng.standard_normal((length, 4, dim)) * 0.1
    q = q * np.array([0.6, 0.8, 1.2, 2.0])[:, None]
    return (jnp.asarray(x, jnp.float32)[None] for x in (q, k))


@pytest.mark.slow
def test_each_head_keeps_its_mass_and_more_than_pooled_scores_at_its_density():
    q, k = heads_with_heavy_keys()
    mask = rules.select(proxy.Proxy(block_q=128, block_kv=128, group=4, gamma=0.95), q, k)
    mass = kept_mass.kept_mass(q, k, mask, dense=base.CAUSAL).mean((0, 1))
    assert (mass >= 0.95).all()
    counts = np.asarray(mask.kv_counts[0, :, -1])
    assert counts[-1] <= counts[0]
    assert counts.min() < 16
    # The mean of 128 keys says less about one heavy key among them.
    density = kept_mass.density(mask, base.CAUSAL)
    for top_k in range(16):
        rule = pooled.Pooled(block_q=128, block_kv=128, top_k=top_k)
        other = rules.select(rule, q, k)
        if float(kept_mass.density(other, base.CAUSAL).mean()) >= float(density.mean()):
            break
    assert mass.mean() > kept_mass.kept_mass(q, k, other, dense=base.CAUSAL).mean()


def test_group_must_divide_the_heads():
    with pytest.raises(ValueError, match="group=3 must divide the 4 query heads"):
        rules.select(proxy.Proxy(group=3), *rules.inputs()[:2])
