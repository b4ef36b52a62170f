"""PSA: levels are exact on constant pools, better than leaving out, and never look ahead."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import attend as attend_lib
from sparse_attn.selection import base, pooled, psa
from tests.selection import rules

RULE = psa.Psa(block_q=8, block_kv=8, counts=(1, 1, 1, 1))


@functools.partial(jax.jit, static_argnums=0, compiler_options=rules.COMPILER_OPTIONS)
def attend(rule, q, k, v, levels=None):
    return rule.attend(q, k, v, levels=levels, return_lse=True)


def dense(q, k, v):
    return attend_lib.attend(q, k, v, mask=base.CAUSAL, return_lse=True, impl="reference")


def test_level_0_everywhere_is_dense():
    q, k, v = rules.inputs(length=50)
    got = attend(psa.Psa(block_q=8, block_kv=8, counts=(10_000,)), q, k, v)
    for a, b in zip(got, dense(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("length", [64, pytest.param(50, marks=pytest.mark.slow)])
def test_any_levels_are_dense_where_keys_and_values_are_constant_in_a_pool(length):
    q, k, v = rules.inputs(1, batch=1, length=length)
    k, v = (jnp.repeat(x[:, ::8], 8, 1)[:, :length] for x in (k, v))
    blocks = -(-length // 8)
    levels = np.random.default_rng(0).integers(0, 4, (1, 4, blocks, blocks))
    levels[..., np.arange(blocks), np.arange(blocks)] = 0  # Cut by the diagonal.
    levels = np.where(np.tri(blocks, dtype=bool), levels, -1)
    got = attend(RULE, q, k, v, levels=jnp.asarray(levels))
    for a, b in zip(got, dense(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_levels_follow_the_ranks():
    q, k, _ = rules.inputs(2, batch=1, length=64)
    rule = psa.Psa(block_q=8, block_kv=8, counts=(1, 2, 1))
    blocks = rule._blocks(rule._states(64, 64), q, k, None, None)
    levels = np.asarray(rule.levels(q, k, blocks))[0, :, -1]
    assert (levels[:, -1] == 0).all()
    scores = np.asarray(pooled.Pooled(block_q=8, block_kv=8, top_k=1).scores(q, k, blocks))
    order = np.argsort(-scores[0, :, -1, :7], -1)
    got = np.take_along_axis(levels[:, :7], order, -1)
    assert (got == np.array([0, 1, 1, 2, -1, -1, -1])).all()


@pytest.mark.slow
def test_the_error_is_lower_than_that_of_whole_blocks_at_the_same_number_of_keys():
    length = 512
    q, k = rules.planted(length, block=16, pairs=[(i, i // 2) for i in range(8, 32)], gain=3.0)
    v = rules.inputs(3, batch=1, length=length, heads=1, kv_heads=1, dim=32)[2]
    want = dense(q, k, v)[0]
    levels = attend(psa.Psa(block_q=16, block_kv=16, counts=(2, 2, 4, 8)), q, k, v)[0]
    whole = attend(psa.Psa(block_q=16, block_kv=16, counts=(5,)), q, k, v)[0]  # 2+1+1+1 blocks.
    errors = [float(jnp.square(x - want).mean()) for x in (levels, whole)]
    assert errors[0] < 0.9 * errors[1]


def test_no_average_holds_a_later_key():
    q, k, v = rules.inputs(4, batch=1, length=64)
    later = (np.arange(64) >= 40)[None, :, None, None]
    changed = [jnp.where(later, -3 * x, x) for x in (q, k, v)]
    one, other = (attend(RULE, *x)[0] for x in ((q, k, v), changed))
    np.testing.assert_array_equal(one[:, :40], other[:, :40])
    # Inside a block too: with the choice held fixed, query 43 does not feel keys 44 and on.
    blocks = RULE._blocks(RULE._states(64, 64), q, k, None, None)
    levels = RULE.levels(q, k, blocks)
    k2, v2 = (jnp.where((np.arange(64) >= 44)[None, :, None, None], -3 * x, x) for x in (k, v))
    one, other = (attend(RULE, q, *x, levels=levels)[0] for x in ((k, v), (k2, v2)))
    np.testing.assert_array_equal(one[:, :44], other[:, :44])


def test_wrong_fields_are_named():
    with pytest.raises(ValueError, match=r"counts=\(1, -1\) must be ints >= 0"):
        psa.Psa(counts=(1, -1))
    with pytest.raises(ValueError, match="8 divides block_kv=4"):
        psa.Psa(block_kv=4, counts=(1, 1, 1, 1))
