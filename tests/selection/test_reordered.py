"""Rules that move tokens by their content: PBS, Sparse VideoGen2, HyperAttention, routing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.models import attention
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import kept_mass, scoring
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import chunked
from sparse_attn.selection import base, hyper, mm_inference, pbs, routing, svg2
from tests.selection import rules

REORDERED = [r for r in rules.OWN if isinstance(r, pbs.Reordered)]
every_rule = pytest.mark.parametrize("rule", REORDERED, ids=lambda r: type(r).__name__)


def jitted(f):
    return jax.jit(f, compiler_options=rules.COMPILER_OPTIONS)


def dense(q, k, v, pattern):
    return attend_lib.attend(q, k, v, mask=pattern, return_lse=True, impl="reference")


def mass(rule, q, k, **options):
    """Part of the dense mass of each query that an exact rule keeps, `[B, T, N]`."""
    _, kept = jitted(lambda q, k: rule.attend(q, k, k, return_lse=True, **options))(q, k)
    return np.exp(kept - dense(q, k, k, rule.pattern)[1])


@every_rule
def test_they_have_no_mask_and_a_layer_says_so(rule):
    with pytest.raises(NotImplementedError, match="call attend, not select"):
        rule.select(*rules.inputs()[:2])
    layer = attention.SelfAttention(num_heads=2, num_kv_heads=2, head_dim=8, pattern=rule)
    with pytest.raises(NotImplementedError, match="moves tokens or keeps single ones"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 16, 16)))
    assert not rule.causal


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(r, marks=pytest.mark.slow if isinstance(r, mm_inference.MmInference) else ())
        for r in REORDERED
        if not isinstance(r, routing.Routing)  # In its own tests.
    ],
    ids=lambda r: type(r).__name__,
)
def test_a_budget_for_everything_is_dense_with_its_gradients(rule):
    q, k, v = rules.inputs(1, batch=2, length=50)
    changes = {
        pbs.Pbs: {"top_k": 10_000},
        svg2.Svg2: {"top_p": 1.0},
        hyper.Hyper: {"block_q": 64, "block_kv": 64, "samples": None, "least": 32},
        mm_inference.MmInference: {"always": base.CAUSAL},
    }[type(rule)]
    rule = dataclasses.replace(rule, **changes)

    def loss(f):
        def value(q, k, v):
            out, lse = f(q, k, v)
            return (out**2).sum() + lse.sum(), (out, lse)

        return jitted(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(q, k, v)

    (_, got), grads = loss(lambda *x: rule.attend(*x, return_lse=True, impl="reference"))
    (_, want), want_grads = loss(lambda *x: dense(*x, rule.pattern))
    for a, b in zip((*got, *grads), (*want, *want_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)


def test_pbs_is_causal_and_exact_for_any_order_inside_segments():
    q, k, v = rules.inputs(2, batch=1, length=64)
    rule = pbs.Pbs(block_q=8, block_kv=8, segment=16, top_k=10_000)
    rng = np.random.default_rng(0)
    order = np.stack([np.concatenate([16 * s + rng.permutation(16) for s in range(4)])] * 4)[None]
    got = jitted(lambda q, k, v: rule.attend(q, k, v, key_order=jnp.asarray(order)))(q, k, v)
    np.testing.assert_allclose(got, dense(q, k, v, base.CAUSAL)[0], atol=2e-5)
    own = np.asarray(jitted(rule.key_order)(q, k)).reshape(4, 4, 16)
    np.testing.assert_array_equal(np.sort(own), np.arange(64).reshape(1, 4, 16).repeat(4, 0))
    # With a budget and one order, what comes later changes nothing.
    few = dataclasses.replace(rule, top_k=1)
    changed = [jnp.where(np.arange(64)[:, None, None] >= 40, -x, x) for x in (q, k, v)]
    outs = [
        jitted(lambda q, k, v: few.attend(q, k, v, key_order=jnp.asarray(order)))(*x)
        for x in ((q, k, v), changed)
    ]
    np.testing.assert_array_equal(outs[0][:, :40], outs[1][:, :40])
    assert np.abs(outs[0] - outs[1])[:, 40:].max() > 0.1


@pytest.mark.slow
def test_pbs_sorts_scattered_heavy_keys_into_few_blocks():
    length, dim = 2048, 32
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, length, dim)) * 0.3
    q[:, 0] += 6
    k[rng.choice(length, 128, replace=False), 0] += 6
    q, k = (jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k))
    # 1 of 5 causal blocks of 32: of 32.5 on average, 2.5 of the own segment and 4 more.
    rule = pbs.Pbs(block_q=32, block_kv=32, segment=128, top_k=4)
    order = jnp.arange(length)[None, None]
    kept = mass(rule, q, k).mean()
    in_place = mass(rule, q, k, key_order=order).mean()
    assert kept > in_place + 0.1


def clusters(count, size, dim, seed=0, spread=0.3, scale=3.0):
    """q, k `[1, count * size, 1, dim]` around shared centres, shuffled each for itself."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((count, dim))
    centres *= scale / np.linalg.norm(centres, axis=-1, keepdims=True) * dim**0.25
    draws = [
        (centres.repeat(size, 0) + spread * rng.standard_normal((count * size, dim)))[
            rng.permutation(count * size)
        ]
        for _ in range(2)
    ]
    return (jnp.asarray(x, jnp.float32)[None, :, None] for x in draws)


@pytest.mark.slow
def test_svg2_keeps_the_mass_of_a_mixture_at_low_density_and_more_than_blocks_in_place():
    q, k = clusters(16, 64, 32)
    rule = svg2.Svg2(block_q=32, block_kv=32, q_clusters=24, kv_clusters=24, top_p=0.9)
    _, _, mask, _ = jitted(rule.plan)(q, k)
    density = float(kept_mass.density(mask, base.EVERYTHING).mean())
    kept = mass(rule, q, k).mean()
    assert kept >= 0.9
    assert density <= 0.3
    pooled = patterns_base.find("pooled", rules.PACKAGE)
    in_place = pooled(
        block_q=32, block_kv=32, top_k=int(np.ceil(density * 32)), pattern=base.EVERYTHING,
        always=None,
    )  # fmt: skip
    other = kept_mass.kept_mass(q, k, rules.select(in_place, q, k), dense=base.EVERYTHING)
    assert kept > other.mean() + 0.2


def test_svg2_goes_on_from_earlier_centroids():
    q, k = clusters(8, 16, 16, seed=1)
    rule = svg2.Svg2(block_q=16, block_kv=16, q_clusters=8, kv_clusters=8, top_p=0.5, iterations=20)
    *_, means = jitted(rule.plan)(q, k)
    once = dataclasses.replace(rule, iterations=1)
    *_, again = jitted(once.plan)(q, k, means)
    for a, b in zip(means, again, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    *_, fresh = jitted(once.plan)(q, k)
    assert np.abs(fresh[0] - means[0]).max() > 0.1


@pytest.mark.slow
def test_hyper_finds_clusters_that_order_in_place_does_not():
    q, k = clusters(64, 64, 64, spread=0.05)
    rule = hyper.Hyper(pattern=base.EVERYTHING, samples=None)
    kept = mass(rule, q, k).mean()
    window = chunked.Chunked(size=256, two_sided=True)
    in_place = np.exp(dense(q, k, k, window)[1] - dense(q, k, k, base.EVERYTHING)[1]).mean()
    assert kept >= 0.75
    assert in_place < 0.1


@pytest.mark.slow
def test_hyper_recursion_is_exact_where_all_its_parts_are():
    q, k, v = rules.inputs(3, batch=1, length=90)
    rule = hyper.Hyper(block_q=128, block_kv=128, samples=None, least=24)
    got = jitted(lambda q, k, v: rule.attend(q, k, v, impl="reference"))(q, k, v)
    np.testing.assert_allclose(got, dense(q, k, v, base.CAUSAL)[0], atol=2e-5)


@pytest.mark.slow
def test_hyper_follows_no_later_key_and_no_later_half():
    # In the rectangle of two halves, a query's place among the others depends on all of them.
    q, k, v = rules.inputs(5, batch=1, length=40)
    rule = hyper.Hyper(block_q=8, block_kv=8, samples=4, planes=3, least=12)
    attend = jitted(lambda q, k, v: rule.attend(q, k, v, impl="reference"))
    out = attend(q, k, v)
    for t, queries in [(7, False), (13, False), (33, False), (20, True), (10, True)]:
        later = (np.arange(40) >= t)[:, None, None]
        moved = [jnp.where(later, 5 * x[:, ::-1], x) for x in (q, k, v)]
        changed = attend(moved[0] if queries else q, *moved[1:])
        np.testing.assert_array_equal(changed[:, :t], out[:, :t])
        assert np.abs(changed - out)[:, t:].max() > 0.1


@pytest.mark.slow
def test_hyper_estimates_the_rest_without_bias_and_better_with_more_samples():
    q, k, v = rules.inputs(4, batch=1, length=64, heads=1, kv_heads=1)
    q = q / 2
    exact = np.exp(dense(q, k, v, base.EVERYTHING)[1])[0, :, 0]
    spread = []
    for samples in (8, 64):
        rule = hyper.Hyper(
            block_q=8, block_kv=8, planes=3, samples=samples, pattern=base.EVERYTHING
        )
        keys = jax.random.split(jax.random.key(0), 200)
        lses = jitted(
            jax.vmap(lambda key, r=rule: r.attend(q, k, v, key=key, return_lse=True, impl="xla")[1])
        )(keys)
        sums = np.exp(np.asarray(lses)[:, 0, :, 0]).mean(1)  # One number a draw: of all queries.
        error = sums.std(ddof=1) / np.sqrt(len(keys))
        assert abs(sums.mean() - exact.mean()) < 2 * error
        spread.append(sums.std())
    assert spread[1] < spread[0] / 2


def test_gray_neighbours_differ_in_one_plane():
    x = jnp.asarray(np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), -1).reshape(1, 8, 1, 3))
    order = hyper.lsh_order(x.astype(jnp.float32), jnp.eye(3))[0, 0]
    steps = np.abs(np.diff(np.asarray(x)[0, order, 0], axis=0)).sum(-1)
    assert (steps == 2).all()


def test_k_means_finds_planted_clusters():
    q, _ = clusters(8, 32, 16)
    ids, _ = svg2.k_means(q[:, :, 0], 12, 10)
    share = np.asarray(scoring.logits(q, q))[0, 0]
    together = share > 0.5 * np.median(np.diag(share))
    same = np.asarray(ids)[0][:, None] == np.asarray(ids)[0]
    assert (together | ~same).mean() > 0.99


def test_wrong_fields_are_named():
    for rule, fields, message in [
        (pbs.Pbs, {"segment": 100, "top_k": 1}, "segment=100 must be a multiple of block_q=128"),
        (pbs.Pbs, {}, "give exactly one"),
        (pbs.Pbs, {"top_k": 1, "pattern": base.EVERYTHING}, "must be causal"),
        (svg2.Svg2, {"top_p": 1.5}, "top_p=1.5 must be"),
        (svg2.Svg2, {"pattern": base.CAUSAL}, "must be full"),
        (hyper.Hyper, {"block_q": 512}, "block_q=512 must be block_kv=256"),
        (hyper.Hyper, {"samples": 0}, "samples=0 must be an int >= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            rule(**fields)
