"""Samples: greedy equals argmax of full passes, under any pattern; settings do what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.patterns import local, sinks
from sparse_attn.train import generate
from tests.train import tiny


@pytest.fixture(scope="module")
def trained():
    model = tiny.model(pattern=local.Local(window=3) | sinks.Sinks(tokens=2))
    params = tiny.new_state(model, tiny.optimizer()).params
    return model, jax.tree.map(lambda x: x * 3 if x.ndim > 2 else x, params)


def test_greedy_is_the_argmax_of_full_passes(trained):
    model, params = trained
    prompts = [[1, 2, 3, 4, 5], [7]]
    got = generate.generate(
        model, params, prompts, length=6, temperature=0.0, key=jax.random.key(0)
    )
    for prompt, tokens in zip(prompts, got, strict=True):
        assert tokens[: len(prompt)].tolist() == prompt
        logits = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens)[None])
        best = logits[0].argmax(-1)
        assert tokens[len(prompt) :].tolist() == best[len(prompt) - 1 : -1].tolist()
        assert len(tokens) == len(prompt) + 6


def test_equal_keys_give_equal_samples(trained):
    model, params = trained
    a, b, c = (
        generate.generate(model, params, [[1, 2]], length=12, key=jax.random.key(seed))[0].tolist()
        for seed in (0, 0, 1)
    )
    assert a == b != c
    assert a[:2] == [1, 2]


def test_no_length_gives_the_prompt(trained):
    model, params = trained
    (got,) = generate.generate(model, params, [[4, 5]], length=0, key=jax.random.key(0))
    assert got.tolist() == [4, 5]


def test_top_k_and_temperature_shape_the_draw():
    logits = jnp.broadcast_to(jnp.array([0.0, 1.0, 2.0, 3.0]), (4000, 4))

    def shares(**settings):
        tokens = generate.sample_token(logits, jax.random.key(0), **settings)
        return np.bincount(np.asarray(tokens), minlength=4) / 4000

    def softmax(x):
        return np.exp(x) / np.exp(x).sum()

    np.testing.assert_allclose(
        shares(temperature=1.0, top_k=None), softmax(np.arange(4.0)), atol=0.03
    )
    np.testing.assert_allclose(
        shares(temperature=2.0, top_k=None), softmax(np.arange(4.0) / 2), atol=0.03
    )
    np.testing.assert_allclose(
        shares(temperature=1.0, top_k=2), [0, 0, *softmax(np.arange(2.0))], atol=0.03
    )
    assert shares(temperature=0.0, top_k=None)[3] == 1
    assert shares(temperature=1.0, top_k=10)[0] > 0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompts=[]), "prompts must be one or more"),
        (dict(prompts=[[1], []]), "prompts must be one or more"),
        (dict(length=-1), "length=-1 must be >= 0"),
        (dict(temperature=-0.5), "temperature=-0.5 must be >= 0"),
        (dict(top_k=0), "top_k=0 must be >= 1"),
    ],
)
def test_wrong_settings_are_named(trained, change, message):
    settings = dict(prompts=[[1]], length=1, key=jax.random.key(0)) | change
    with pytest.raises(ValueError, match=message):
        generate.generate(*trained, settings.pop("prompts"), **settings)
