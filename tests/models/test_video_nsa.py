"""VideoNSA: rows of text are dense, those of a video native sparse attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.models import attention
from sparse_attn.models.mixers import nsa, video_nsa
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import causal
from tests.ops import contract

jit = functools.partial(jax.jit, compiler_options=contract.COMPILER_OPTIONS)
RULE = video_nsa.EXAMPLES[0]
SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "impl": "reference"}
LENGTH = 45
VIDEO = np.isin(np.arange(LENGTH), np.arange(5, 30))


def made(rule):
    layer = rule.layer(**SIZES)
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, 12)) * 2
    return layer, jit(layer.init)(jax.random.key(1), x), x


def dense(params, x):
    """The base model's attention, which ignores the parameters it does not have."""
    names = ("query", "key", "value", "out")
    layer = attention.SelfAttention(pattern=causal.Causal(), **SIZES)
    return jit(layer.apply)({"params": {n: params["params"][n] for n in names}}, x)


def test_rows_of_text_are_the_base_model():
    layer, params, x = made(RULE)
    out, base = jit(layer.apply)(params, x), dense(params, x)
    np.testing.assert_array_equal(out[:, ~VIDEO], base[:, ~VIDEO])
    assert np.abs(out - base)[:, VIDEO].max() > 0.1


@pytest.mark.slow
def test_rows_of_a_video_are_nsa():
    layer, params, x = made(RULE)
    out = jit(layer.apply)(params, x)
    fields = {f.name: getattr(RULE, f.name) for f in dataclasses.fields(nsa.Nsa)}
    sparse = jit(nsa.Nsa(**fields).layer(**SIZES).apply)(params, x)
    np.testing.assert_allclose(out[:, VIDEO], sparse[:, VIDEO], atol=1e-6)


@pytest.mark.slow
def test_a_row_of_text_is_the_base_model():
    layer, params, x = made(dataclasses.replace(RULE, video=()))
    np.testing.assert_array_equal(jit(layer.apply)(params, x), dense(params, x))


@pytest.mark.slow
def test_all_blocks_of_the_selection_alone_are_dense_for_videos_too():
    rule = dataclasses.replace(RULE, branches=("selected",), gates="none", top_k=6)
    layer, params, x = made(rule)
    np.testing.assert_allclose(jit(layer.apply)(params, x), dense(params, x), atol=2e-5)


@pytest.mark.slow
def test_gates_are_parts_and_all_parameters_get_a_gradient():
    layer, params, x = made(RULE)
    _, kept = jit(functools.partial(layer.apply, mutable="intermediates"))(params, x)
    gates = np.asarray(kept["intermediates"]["gates"][0])
    assert gates.shape == (3, 2, LENGTH, 4, 1)
    assert ((gates >= 0) & (gates <= 1)).all()
    assert gates.std() > 0.01
    grads = jit(jax.grad(lambda p: jnp.sin(layer.apply(p, x)).sum()))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 1e-4, path


@pytest.mark.slow
def test_keys_of_a_query():
    rule = dataclasses.replace(RULE, video=((5, 400),))
    length = 400
    layer = rule.layer(**SIZES)
    x = jax.random.normal(jax.random.key(0), (1, length, 12))
    params = jit(layer.init)(jax.random.key(1), x)
    _, kept = jit(functools.partial(layer.apply, mutable="intermediates"))(params, x)
    selected = np.asarray(kept["intermediates"]["selected"][0])
    blocks = (selected[0, -1] >= 0).sum(-1)
    compressed = rule.strides.mask_fn(length - 1, np.arange(rule.strides.count(length))).sum()
    counted = blocks * rule.block_kv + rule.window + compressed
    assert (counted == rule.most_keys(length)).all()
    assert rule.most_keys(length) == 3 * 8 + 8 + 199


def test_text_round_trip_and_wrong_fields():
    for rule in video_nsa.EXAMPLES:
        assert patterns_base.parse(rule.expression()) == rule
    assert video_nsa.VideoNsa(video=((0, 20), (30, 99))).is_video(40).sum() == 30
    for length in (3, 20, 45):
        at = np.arange(length)
        seen = RULE.text_rows(length).mask_fn(at[:, None], at)
        want = (at <= at[:, None]) & ~RULE.is_video(length)[:, None]
        np.testing.assert_array_equal(seen, want)
    for fields, message in [
        ({"video": ((5, 5),)}, "must be spans in order"),
        ({"video": ((5, 9), (8, 12))}, "must be spans in order"),
        ({"video": ((5,),)}, "must be pairs of ints"),
        ({"block_kv": 40}, "block_kv=40 must be a multiple of stride=16"),
    ]:
        with pytest.raises(ValueError, match=message):
            video_nsa.VideoNsa(**fields)
