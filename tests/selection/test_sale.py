"""SALE: 4-bit logits, a needle that means do not see, the threshold."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import kept_mass, scoring
from sparse_attn.selection import base, pooled, sale
from tests.selection import rules


def test_four_bits_estimate_logits():
    q, k, _ = rules.inputs(batch=1, length=256, dim=64)
    exact = np.asarray(scoring.logits(q, k)).ravel()
    rounded = np.asarray(scoring.logits(sale.rounded(q, 4), sale.rounded(k, 4))).ravel()
    assert np.corrcoef(exact, rounded)[0, 1] > 0.95
    assert len(np.unique(np.asarray(sale.rounded(q, 4))[0, 0, 0])) <= 15


@pytest.mark.slow
def test_needles_are_kept_where_means_miss_them_and_density_falls_with_the_threshold():
    length, block, dim, trials = 4096, 64, 32, 4
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, length, trials, dim))
    needles = rng.integers(1, 60, trials)  # Blocks of keys, for the last row of blocks.
    for head, needle in enumerate(needles):
        direction = rng.standard_normal(dim)
        k[0, needle * block + 7, head] = 1.5 * direction
        q[0, -20, head] = 1.5 * direction
    q, k = jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32)
    kept, densities = [], []
    for threshold in (0.02, 1.0, 8.0):
        rule = sale.Sale(
            block_q=block, block_kv=block, sink_tokens=4, window=16, threshold=threshold
        )
        mask = rules.select(rule, q, k)
        kept.append(rules.states(mask)[0] > 0)
        densities.append(float(kept_mass.density(mask, base.CAUSAL).mean()))
    assert (kept[0] | ~kept[1]).all()
    assert (kept[1] | ~kept[2]).all()
    assert densities[0] > densities[1] >= densities[2]
    assert densities[2] <= 0.1
    assert kept[2][np.arange(trials), -1, needles].all()
    means = pooled.Pooled(block_q=block, block_kv=block, top_k=5)  # 6 of 64 blocks.
    missed = rules.chosen(means, q, k)[0] == 0
    assert missed[np.arange(trials), -1, needles].mean() >= 0.5


def test_wrong_fields_are_named():
    with pytest.raises(ValueError, match=r"threshold=-1\.0 must be >= 0"):
        sale.Sale(threshold=-1.0)
    with pytest.raises(ValueError, match="bits=1 must be between 2 and 8"):
        sale.Sale(bits=1)
