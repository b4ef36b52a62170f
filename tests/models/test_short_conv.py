"""The convolution before attention: what it computes, and that the model keeps it in its place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.models import attention, short_conv, transformer
from sparse_attn.parallel import attention as parallel_lib
from sparse_attn.parallel import mesh
from sparse_attn.patterns import local
from sparse_attn.train import optim

CONFIG = transformer.TransformerConfig(
    vocab_size=40, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, impl="reference",
    pattern=local.Local(window=2), rope_base=None, short_conv=3,
)  # fmt: skip


def test_it_is_the_convolution_of_every_channel():
    x = np.random.default_rng(0).standard_normal((2, 9, 2, 3)).astype(np.float32)
    taps = np.random.default_rng(1).standard_normal((3, 2, 3)).astype(np.float32)
    out = short_conv.short_conv(jnp.asarray(x), jnp.asarray(taps))
    for head, dim in np.ndindex(2, 3):
        expected = [np.convolve(row, taps[:, head, dim])[:9] for row in x[..., head, dim]]
        np.testing.assert_allclose(out[..., head, dim], expected, atol=1e-5)


def test_documents_of_a_row_are_as_if_alone():
    model = transformer.Transformer(dataclasses.replace(CONFIG, num_layers=1))
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, 40)
    params, apply = jax.jit(model.init)(jax.random.key(1), tokens), jax.jit(model.apply)
    packed = apply(params, tokens, segment_ids=jnp.array([[1] * 5 + [2] * 7]))
    np.testing.assert_allclose(packed[:, 5:], apply(params, tokens[:, 5:]), atol=1e-5)
    whole = apply(params, tokens)
    assert np.abs(whole[:, 5] - packed[:, 5]).max() > 1e-3


def test_each_layer_reaches_two_tokens_further():
    model = transformer.Transformer(CONFIG)
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, 39)
    rows = np.repeat(np.asarray(tokens), 13, 0)
    rows[np.arange(12), np.arange(12)] += 1
    out = jax.jit(lambda *x: model.init_with_output(*x)[0])(jax.random.key(1), rows)
    out = np.asarray(out)[:, -1]
    changed = np.abs(out[:12] - out[12]).max(-1) > 0
    # Two layers of a window of 2 behind 3 taps: each sees the token and 3 before it.
    np.testing.assert_array_equal(changed, np.arange(12) >= 11 - 2 * 3)


def test_its_taps_are_no_matrices_and_lie_with_their_heads():
    shapes = jax.eval_shape(
        transformer.Transformer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
    )["params"]
    found = shapes["layers"]["attention"]
    assert found["query_taps"].shape == (2, 3, 2, 8)
    assert found["value_taps"].shape == (2, 3, 1, 8)
    decayed = optim.decay_mask(shapes)["layers"]["attention"]
    assert not any(decayed[f"{name}_taps"] for name in ("query", "key", "value"))
    specs = mesh.parameter_specs(shapes)["layers"]["attention"]
    assert tuple(specs["key_taps"]) == (None, None, "tensor", None)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="short_conv=0 must be >= 1"):
        dataclasses.replace(CONFIG, short_conv=0)
    layer = attention.SelfAttention(
        num_heads=1, num_kv_heads=1, head_dim=4, pattern=local.Local(window=2), short_conv=2,
        tokens=parallel_lib.Tokens(order=(1, 0)),
    )  # fmt: skip
    with pytest.raises(ValueError, match="short_conv=2 must be None for tokens in another order"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 8, 4)))
