"""SelfAttention: rotary positions, grouped heads and what it passes on to `attend`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.models import attention
from sparse_attn.ops import attend as attend_lib
from sparse_attn.patterns import causal, local, per_head


def test_rope_is_the_rotation_of_the_paper():
    x = np.random.default_rng(0).standard_normal((1, 5, 2, 6)).astype(np.float32)
    positions = np.array([[0, 1, 7, 100, 3]])
    expected = np.empty_like(x)
    for t, position in enumerate(positions[0]):
        for i in range(3):  # Pairs (i, i + 3) turn by position * base^(-2i / 6).
            angle = position * 10_000.0 ** (-2 * i / 6)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            expected[0, t][:, [i, i + 3]] = x[0, t][:, [i, i + 3]] @ turn.T
    got = jax.jit(attention.rope)(x, positions)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_rope_scores_depend_on_differences_only():
    q, k = np.random.default_rng(1).standard_normal((2, 1, 8, 1, 16)).astype(np.float32)
    scores, rope = [], jax.jit(attention.rope)
    for shift in (0, 50):
        positions = np.arange(8)[None] + shift
        rotated = [np.asarray(rope(x, positions)) for x in (q, k)]
        scores.append(np.einsum("BTNH,BSNH->BNTS", *rotated))
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


def test_rope_needs_an_even_head_dim():
    with pytest.raises(ValueError, match="head_dim=3 must be even"):
        attention.rope(jnp.ones((1, 2, 1, 3)), jnp.zeros((1, 2), jnp.int32))


@pytest.mark.parametrize("sink_logits", [pytest.param(None, marks=pytest.mark.slow), "learned"])
def test_layer_is_projections_rope_attend_projection(sink_logits):
    pattern = per_head.PerHead((local.Local(window=3), causal.Causal()))
    layer = attention.SelfAttention(
        num_heads=4, num_kv_heads=2, head_dim=8, pattern=pattern, logits_soft_cap=5.0,
        sink_logits=sink_logits,
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((2, 20, 24)).astype(np.float32)
    positions = np.broadcast_to(np.arange(20)[::-1], (2, 20))
    segments = np.array([[1] * 12 + [2] * 8, [1] * 15 + [0] * 5])
    params = jax.jit(layer.init)(jax.random.key(1), x)["params"]
    sinks = None
    if sink_logits is not None:
        assert params["sink_logits"].shape == (4,)
        sinks = params["sink_logits"] = jnp.array([0.5, -1.0, 2.0, 0.0])

    @jax.jit
    def expected(x, positions, segments, params):
        q, k, v = (
            jnp.einsum("BTD,DNH->BTNH", x, params[name]["kernel"])
            for name in ("query", "key", "value")
        )
        heads = attend_lib.attend(
            attention.rope(q, positions),
            attention.rope(k, positions),
            v,
            mask=pattern,
            segment_ids=segments,
            logits_soft_cap=5.0,
            sink_logits=sinks,
            impl="reference",
        )
        return jnp.einsum("BTNH,NHD->BTD", heads, params["out"]["kernel"])

    got = jax.jit(layer.apply)({"params": params}, x, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(got, expected(x, positions, segments, params), atol=2e-5)


def test_unknown_choices_are_refused():
    def layer(**kwargs):
        return attention.SelfAttention(
            num_heads=2, num_kv_heads=1, head_dim=4, pattern=causal.Causal(), **kwargs
        )

    inputs = jax.random.key(0), jnp.ones((1, 4, 8))
    with pytest.raises(ValueError, match="sink_logits='on' must be one of"):
        jax.eval_shape(layer(sink_logits="on").init, *inputs)
    with pytest.raises(ValueError, match="impl='no_such'"):
        jax.eval_shape(layer(impl="no_such").init, *inputs)


def test_equal_patterns_share_a_compilation():
    traces = []

    @jax.jit
    def trace_counter(x):
        traces.append(1)
        return x

    @jax.jit
    def run(layer, x):
        trace_counter(x)
        return layer.apply(layer.init(jax.random.key(0), x), x)

    run = jax.jit(run.__wrapped__, static_argnums=0)
    for _ in range(2):
        layer = attention.SelfAttention(
            num_heads=2, num_kv_heads=1, head_dim=4, pattern=local.Local(window=4)
        )
        run(layer, jnp.ones((1, 8, 8)))
    assert run._cache_size() == 1
