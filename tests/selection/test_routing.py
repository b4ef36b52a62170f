"""Routing attention: one cluster is dense, sizes, positions, and centroids that find topics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import attend as attend_lib
from sparse_attn.patterns import sinks
from sparse_attn.selection import base, routing
from tests.selection import rules


def attend(rule, centroids, q, k, v):
    run = jax.jit(
        lambda q, k, v: rule.attend(q, k, v, centroids=centroids, impl="reference"),
        compiler_options=rules.COMPILER_OPTIONS,
    )
    return run(q, k, v)


def centroids_for(heads, count, dim, seed=0):
    x = np.random.default_rng(seed).standard_normal((heads, count, dim))
    return jnp.asarray(x, jnp.float32)


def test_one_cluster_of_all_tokens_is_dense():
    q, k, v = rules.inputs(length=50)
    got = attend(routing.Routing(size=10_000), centroids_for(4, 1, 8), q, k, v)
    dense = [routing.on_sphere(x) for x in (q, k)]
    want = attend_lib.attend(*dense, v, mask=base.CAUSAL, impl="reference")
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_outputs_are_means_over_the_clusters_of_a_token():
    q, k, v = rules.inputs(1, batch=1, length=40)
    rule, centroids = routing.Routing(size=12), centroids_for(4, 4, 8)
    got = np.asarray(attend(rule, centroids, q, k, v))
    q_at, kv_at = (np.asarray(rule.members(x, centroids))[0] for x in (q, jnp.repeat(k, 2, 2)))
    assert q_at.shape == (4, 4, 12)
    assert (np.diff(q_at) > 0).all()
    x, y = (np.asarray(routing.on_sphere(z), np.float64)[0] for z in (q, k))
    want, times = np.zeros((40, 4, 8)), np.zeros((40, 4))
    for n, c in np.ndindex(4, 4):
        for t in q_at[n, c]:
            keys = [s for s in kv_at[n, c] if s <= t]
            times[t, n] += 1
            if keys:
                weights = np.exp(y[keys, n // 2] @ x[t, n] / np.sqrt(8))
                want[t, n] += weights @ np.asarray(v)[0, keys, n // 2] / weights.sum()
    assert (times == 0).any()
    assert (times > 1).any()
    np.testing.assert_allclose(got[0], want / np.maximum(times, 1)[..., None], atol=2e-5)


def test_values_of_later_tokens_do_not_matter():
    # Clusters are chosen by all tokens; inside them the order of positions holds.
    q, k, v = rules.inputs(2, batch=1, length=40)
    rule, centroids = routing.Routing(size=12), centroids_for(4, 4, 8)
    changed = jnp.where((np.arange(40) >= 25)[None, :, None, None], -3 * v, v)
    one, other = (attend(rule, centroids, q, k, x) for x in (v, changed))
    np.testing.assert_array_equal(one[:, :25], other[:, :25])
    assert np.abs(one - other)[:, 25:].max() > 0.1


def test_centroids_find_topics_and_route_their_tokens_together():
    topics, size, dim = 8, 64, 32
    rng = np.random.default_rng(0)
    means = routing.on_sphere(jnp.asarray(rng.standard_normal((1, topics, 1, dim)), jnp.float32))
    topic = rng.permutation(np.arange(topics).repeat(size))

    def batch():
        noise = rng.standard_normal((1, topics * size, 1, dim)) * 0.5
        return jnp.asarray(np.asarray(means)[:, topic] + noise, jnp.float32)

    # From one token of each topic, as far from the mean as tokens are.
    first = routing.on_sphere(batch())[0, :, 0]
    start = jnp.stack([first[np.flatnonzero(topic == i)[0]] for i in range(topics)])[None]
    now = start
    for _ in range(40):
        now = routing.moved_centroids(now, batch(), batch(), decay=0.9)
    target = np.asarray(means)[0, :, 0]

    def distance(x):
        return np.linalg.norm(np.asarray(x)[0] - target, axis=-1).mean()

    assert distance(now) < 0.5 * distance(start)
    members = np.asarray(routing.Routing(size=size).members(batch(), now))[0, 0]
    together = np.zeros((len(topic), len(topic)), bool)
    for taken in members:
        together[np.ix_(taken, taken)] = True
    assert together[topic[:, None] == topic].mean() >= 0.9


def test_wrong_fields_are_named():
    with pytest.raises(ValueError, match="size=0 must be an int >= 1"):
        routing.Routing(size=0)
    with pytest.raises(ValueError, match=r"always=sinks\(tokens=1\) must be None"):
        routing.Routing(always=sinks.Sinks(tokens=1))
