"""Keys averaged over cells: against loops, per head, with shared KV heads."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import pooled
from sparse_attn.patterns import cross_grid, full, per_head, swin

SHAPE, KEYS = (5, 6), (2, 3)
TOKENS = 30
COARSE = cross_grid.CrossGrid(SHAPE, KEYS, reach=None)


def qkv(num_heads=4, num_kv_heads=4, seed=0):
    rng = np.random.default_rng(seed)
    sizes = (num_heads, num_kv_heads, num_kv_heads)
    return [jnp.asarray(rng.standard_normal((2, TOKENS, n, 8)), jnp.float32) for n in sizes]


def average_by_loop(x):
    cells = np.zeros((x.shape[0], *KEYS, *x.shape[2:]), np.float64)
    counts = np.zeros(KEYS)
    for i, (row, column) in enumerate(itertools.product(*map(range, SHAPE))):
        cell = row * KEYS[0] // SHAPE[0], column * KEYS[1] // SHAPE[1]
        cells[:, *cell] += np.asarray(x)[:, i]
        counts[cell] += 1
    assert sorted(counts.ravel()) == [4, 4, 4, 6, 6, 6]  # 5 rows are cut into 3 and 2.
    return (cells / counts[..., None, None]).reshape(x.shape[0], -1, *x.shape[2:])


def test_average():
    x = qkv()[1]
    np.testing.assert_allclose(pooled.average(x, SHAPE, KEYS), average_by_loop(x), atol=1e-6)
    with pytest.raises(ValueError, match=r"30 tokens must be a grid \(5, 6\) that \(6, 3\)"):
        pooled.average(x, SHAPE, (6, 3))


@pytest.mark.parametrize(
    "num_kv_heads, block", [(4, 8), pytest.param(2, None, marks=pytest.mark.slow)]
)
def test_heads_with_windows_beside_heads_with_means(num_kv_heads, block):
    q, k, v = qkv(num_kv_heads=num_kv_heads)
    windows = swin.Swin(SHAPE, 3)
    mask = per_head.PerHead((windows, COARSE))
    got = pooled.attend_pooled(q, k, v, mask=mask, block=block, impl="reference")
    k, v = (jnp.asarray(np.repeat(np.asarray(x), 4 // num_kv_heads, 2)) for x in (k, v))
    fine = attend_lib.attend(q, k, v, mask=windows, impl="reference")
    means = [jnp.asarray(average_by_loop(x), jnp.float32) for x in (k, v)]
    coarse = attend_lib.attend(q, *means, mask=full.Full(), impl="reference")
    expected = np.where(np.arange(4)[:, None] % 2 == 0, fine, coarse)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_cells_of_one_token_are_plain_attention():
    q, k, v = qkv()
    cells = cross_grid.CrossGrid(SHAPE, SHAPE, reach=None)
    assert not pooled.is_pooled(cells)
    got = pooled.attend_pooled(q, k, v, mask=per_head.PerHead((cells,)), impl="reference")
    expected = attend_lib.attend(q, k, v, mask=full.Full(), impl="reference")
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_every_token_has_a_gradient_through_its_mean():
    q, k, v = qkv()
    sinks = jnp.zeros(4)

    def total(k, v):
        out = pooled.attend_pooled(
            q, k, v, mask=COARSE, sink_logits=sinks, logits_soft_cap=5.0, impl="reference"
        )
        return (out * q).sum()

    for gradient in jax.tree.map(np.asarray, jax.jit(jax.grad(total, (0, 1)))(k, v)):
        assert (np.abs(gradient).sum((2, 3)) > 0).all()
        # Tokens of one cell are interchangeable.
        np.testing.assert_allclose(gradient[:, 0], gradient[:, 7], atol=1e-6)
