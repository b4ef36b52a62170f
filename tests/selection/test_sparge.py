"""Sparge: blocks without a good mean are never skipped; smooth grids are sparse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.masks import curves
from sparse_attn.ops import kept_mass, scoring
from sparse_attn.patterns import full
from sparse_attn.selection import sparge
from tests.selection import rules

BLOCK = 16


def test_mean_cosine_is_over_all_pairs():
    q, _, _ = rules.inputs(batch=1, length=20)
    unit = np.asarray(q) / np.linalg.norm(q, axis=-1, keepdims=True)
    got = sparge.mean_cosine(q, BLOCK, jnp.ones((1, 20), bool))
    for i, tokens in enumerate((unit[0, :16], unit[0, 16:])):
        want = np.einsum("inh,jnh->ijn", tokens, tokens).mean((0, 1))
        np.testing.assert_allclose(got[0, i], want, atol=1e-6)


def test_blocks_that_are_not_alike_are_never_skipped():
    q, k = rules.planted(256, block=BLOCK, pairs=[(i, (3 * i) % 16) for i in range(16)], heads=2)
    rng = np.random.default_rng(1)
    odd_rows, odd_columns = [5, 11], [2, 9]
    for x, odd in ((q, odd_rows), (k, odd_columns)):
        noise = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
        which = np.isin(np.arange(256) // BLOCK, odd)[None, :, None, None]
        q, k = (jnp.where(which, noise, y) if y is x else y for y in (q, k))
    rule = sparge.Sparge(
        block_q=BLOCK, block_kv=BLOCK, top_p=0.5, similarity=0.3, pattern=full.Full(), always=None
    )
    kept = rules.chosen(rule, q, k)[0] > 0
    assert kept[:, odd_rows].all()
    assert kept[:, :, odd_columns].all()
    rest = np.delete(np.delete(kept, odd_rows, 1), odd_columns, 2)
    assert rest.mean() < 0.3


def smooth_image(side, dim, seed=0):
    """Tokens of an image whose features change slowly: `[1, side**2, 1, dim]`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = [
        np.cos(2 * np.pi * (a * x + b * y) + c)
        for a, b, c in zip(*rng.uniform(-1.5, 1.5, (2, dim)), rng.uniform(0, 6.3, dim))
    ]
    return np.stack(waves, -1).reshape(1, side * side, 1, dim).astype(np.float32)


def test_half_of_a_smooth_image_is_skipped_at_five_percent_error():
    side, dim = 32, 16
    q = k = jnp.asarray(smooth_image(side, dim) * 2.0)
    v = jnp.asarray(smooth_image(side, dim, seed=1))
    rule = sparge.Sparge(
        block_q=BLOCK, block_kv=BLOCK, top_p=0.98, similarity=0.6, pattern=full.Full()
    )
    order = curves.Hilbert((side, side))
    got = rules.attend(rule, q, k, v, order=order)
    want = jax.nn.dot_product_attention(q, k, v)
    assert float(jnp.abs(got - want).sum() / jnp.abs(want).sum()) < 0.05
    moved = [x[:, order.forward] for x in (q, k)]
    density = kept_mass.density(rules.select(rule, *moved), full.Full())
    assert float(density[0, 0]) <= 0.5
    # In row-major order no block is alike, and all are kept.
    assert float(kept_mass.density(rules.select(rule, q, k), full.Full())[0, 0]) == 1


def two_stages(rule, q, k, v, **options):
    return jax.jit(lambda *x: rule.attend_in_two_stages(*x, **options))(q, k, v)


def test_no_filter_is_masked_attention():
    q, k, v = rules.inputs(batch=1, length=50)
    rule = sparge.Sparge(block_q=BLOCK, block_kv=BLOCK, top_p=0.5, similarity=0.06)
    got, skipped = two_stages(rule, q, k, v, skip_below=None)
    mask = rules.select(rule, q, k)
    assert (mask.kv_counts[0, 0, -1] < 4).all()
    np.testing.assert_allclose(got, rules.attend_masked(q, k, v, mask)[0], atol=2e-5)
    assert (skipped == 0).all()


def test_the_error_of_the_second_stage_is_bounded():
    q, k, v = rules.inputs(3, batch=1, length=256)
    q = jnp.repeat(q[:, ::BLOCK], BLOCK, 1) * 1.5  # Queries that agree about blocks.
    rule = sparge.Sparge(block_q=BLOCK, block_kv=BLOCK, top_p=1.0, pattern=full.Full())
    want = two_stages(rule, q, k, v, skip_below=None)[0]
    parts = []
    for below in (-2.0, -6.0):
        got, skipped = two_stages(rule, q, k, v, skip_below=below, rows_per_group=4)
        parts.append(float(skipped.mean()))
        bound = BLOCK * np.exp(below) * np.abs(v).max()  # for each skipped block
        assert np.abs(got - want).max() <= 256 // BLOCK * bound
        assert np.abs(got - want).max() > 0
    assert parts[0] > parts[1] > 0


@pytest.mark.slow
def test_eight_bits_change_little():
    q, k, v = rules.inputs(5, batch=1, length=64, dim=32)
    rule = sparge.Sparge(block_q=BLOCK, block_kv=BLOCK, top_p=1.0)
    exact, low, lowest = (
        two_stages(rule, q / 2, k, v, skip_below=None, bits=b)[0] for b in (None, 8, 4)
    )
    size = jnp.abs(exact).sum()
    assert float(jnp.abs(low - exact).sum() / size) < 0.02
    assert float(jnp.abs(lowest - exact).sum() / size) > 0.02


def test_wrong_fields_are_named():
    q, k, v = rules.inputs(batch=1, length=20)
    for options, message in [
        ({"skip_below": 1.0}, r"skip_below=1\.0 must be < 0"),
        ({"rows_per_group": 3}, "rows_per_group=3 must divide block_q=128"),
    ]:
        with pytest.raises(ValueError, match=message):
            sparge.Sparge(top_p=0.5).attend_in_two_stages(q, k, v, **options)
    with pytest.raises(ValueError, match=r"similarity=2\.0 must be >= -1 and <= 1"):
        sparge.Sparge(top_p=0.5, similarity=2.0)
    with pytest.raises(ValueError, match="tables='kv' must be 'query'"):
        sparge.Sparge(top_p=0.5, tables="kv")


def test_pool_of_nothing_is_zero():
    out = scoring.pool(jnp.ones((1, 4, 1, 2)), 2, np.array([[True, True, False, False]]))
    assert out[0, :, 0].tolist() == [[1, 1], [0, 0]]
