"""A selector where a model has a pattern: in a layer, in a schedule, in a config."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.models import attention, transformer
from sparse_attn.patterns import base as patterns_base
from sparse_attn.train import flops, tasks
from tests.selection import rules
from tests.train import tiny

POOLED = "pooled(block_q=4, block_kv=4, top_k=1)"


def config(pattern, **fields):
    return tiny.model(pattern=patterns_base.parse(pattern), **fields)


def test_layer_selects_from_rotated_queries_and_keys():
    rule = patterns_base.parse("seer(block_q=8, block_kv=8, top_k=1)")
    layer = attention.SelfAttention(
        num_heads=4, num_kv_heads=2, head_dim=8, pattern=rule, impl="reference"
    )
    x = jax.random.normal(jax.random.key(0), (2, 40, 24))
    ids = jnp.array([[1] * 16 + [2] * 24, [1] * 32 + [0] * 8])
    jit = functools.partial(jax.jit, compiler_options=rules.COMPILER_OPTIONS)
    params = jit(layer.init)(jax.random.key(1), x)["params"]
    assert params["gate_query"].shape == (4, 8, 8)
    assert params["gate_key"].shape == (2, 24, 8)
    q, k, v = (
        jnp.einsum("BTD,DNH->BTNH", x, params[name]["kernel"]) for name in ("query", "key", "value")
    )
    rotate = jit(lambda x: attention.rope(x, jnp.broadcast_to(jnp.arange(40), (2, 40))))
    q, k = rotate(q), rotate(k)
    gate = {name: params[name] for name in ("gate_query", "gate_key")}
    heads, _ = rules.attend_masked(q, k, v, rules.select(rule, q, k, ids, gate), ids)
    want = jnp.einsum("BTNH,NHD->BTD", heads, params["out"]["kernel"])
    got = jit(layer.apply)({"params": params}, x, segment_ids=ids)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(
    "pattern",
    [
        f"per_layer(({POOLED}, causal()))",
        *(
            pytest.param(text, marks=pytest.mark.slow)
            for text in (POOLED, "landmark(block_kv=4, top_k=1)")
        ),
    ],
)
def test_a_model_trains(pattern):
    tiny.check_it_learns(config(pattern))


def test_parameters_do_not_depend_on_a_rule_without_parameters():
    shapes = [
        jax.eval_shape(lambda m=model: m.init(jax.random.key(0), jnp.zeros((1, 16), jnp.int32)))
        for model in (config(POOLED), config("causal()"))
    ]
    assert shapes[0] == shapes[1]


def test_layers_with_parameters_are_all_alike():
    seer = "seer(block_q=4, block_kv=4, top_k=1)"
    shapes = jax.eval_shape(
        lambda: config(seer).init(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))
    )
    assert shapes["params"]["layers"]["attention"]["gate_query"].shape == (2, 2, 8, 8)
    with pytest.raises(ValueError, match="all layers must have seer"):
        config(f"per_layer((causal(), {seer}))")


def test_config_names_a_rule_and_refuses_one_that_looks_ahead():
    sizes = {"num_layers": 2, "embed_dim": 16, "num_heads": 2}
    made = tasks.build_model({"pattern": POOLED, **sizes}, vocab_size=64)
    assert made.config.pattern == patterns_base.parse(POOLED)
    with pytest.raises(ValueError, match=r"pattern=vertical_slash\(\) must be causal"):
        tasks.build_model({"pattern": "vertical_slash()", **sizes}, vocab_size=64)
    with pytest.raises(ValueError, match="did you mean 'pooled'"):
        tasks.build_model({"pattern": "poled(top_k=1)", **sizes}, vocab_size=64)


def test_flops_are_those_of_the_budget():
    made = transformer.TransformerConfig(
        vocab_size=64, num_layers=1, embed_dim=16, num_heads=2, pattern=patterns_base.parse(POOLED)
    )
    cost = flops.attention_cost(made, context=32, batch_size=1)
    assert cost["block_density"] == (1 + 7 * 2) / 64
