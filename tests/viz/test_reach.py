"""Receptive fields: gradients through a real model, both algorithms, and a million tokens."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn import patterns
from sparse_attn.models import transformer
from sparse_attn.viz import reach

SCHEDULES = (
    "per_layer((local(window=4), dilated(window=3, dilation=5)))",
    "per_layer((per_head((strided(stride=6, part='column'), local(window=3))), chunked(size=8)))",
    "fixed(stride=8, part='summary', summary_tokens=2)",  # Most queries do not see themselves.
    "local(reach=(2, 1)) | global_tokens(tokens=1)",
)


def gradients(schedule, length, num_layers):
    """Which inputs of the residual stream each output has a gradient with respect to."""
    config = transformer.TransformerConfig(
        vocab_size=8, num_layers=num_layers, embed_dim=8, num_heads=2, mlp_dim=8,
        pattern=schedule, impl="reference",
    )  # fmt: skip
    blocks = [transformer.Block(config, pattern) for pattern in config.layer_patterns()]
    x = jax.random.normal(jax.random.key(0), (1, length, 8))
    places = jnp.arange(length)[None]

    @jax.jit
    def found(key, x):
        params = blocks[0].init(key, x, places, None)  # Layers may share them.

        def run(x):
            for block in blocks:
                x, _ = block.apply(params, x, places, None)
            return x[0] @ jnp.arange(1.0, 9)

        return jnp.abs(jax.jacrev(run)(x))[:, 0].sum(-1) > 0

    return np.asarray(found(jax.random.key(1), x))


def test_reach_is_where_gradients_flow():
    schedule = patterns.parse(
        "per_layer((per_head((strided(stride=6, part='column'), local(window=3))),"
        " fixed(stride=8, part='summary', summary_tokens=2)))"
    )
    field = reach.receptive_field(schedule, 24, num_layers=3)
    np.testing.assert_array_equal(field.reached, gradients(schedule, 24, 3))
    assert not field.reached.all()


@pytest.mark.parametrize("expression", SCHEDULES)
@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_following_some_queries_down_finds_what_the_matrix_does(
    expression, num_layers, monkeypatch
):
    monkeypatch.setattr(reach, "_BLOCK", 16)
    schedule = patterns.parse(expression)
    whole = reach.receptive_field(schedule, 203, num_layers=num_layers)
    queries = [0, 3, 100, 202]
    some = reach.receptive_field(schedule, 203, num_layers=num_layers, queries=queries)
    np.testing.assert_array_equal(some.reached, whole.reached[queries])
    monkeypatch.setattr(reach, "_FEW", 0)  # Now the matrix follows the same queries.
    assert (
        some.layers
        == reach.receptive_field(schedule, 203, num_layers=num_layers, queries=queries).layers
    )


def test_layers_by_hand():
    field = reach.receptive_field(patterns.parse("local(window=3)"), 8, num_layers=4)
    assert [(x.back, x.ahead, x.complete) for x in field.layers] == [
        (2, 0, 3), (4, 0, 5), (6, 0, 7), (7, 0, 8),
    ]  # fmt: skip
    assert field.layers[0].coverage == (1 + 2 + 6 * 3) / 36
    assert field.first_full_layer == 4
    two_sided = reach.receptive_field(patterns.parse("local(reach=(0, 2))"), 8, num_layers=1)
    assert (two_sided.layers[0].back, two_sided.layers[0].ahead) == (0, 2)
    assert two_sided.layers[0].coverage == (6 * 3 + 2 + 1) / 64


def test_what_is_never_reached():
    schedule = patterns.parse("per_layer((chunked(size=4), local(window=2)))")
    field = reach.receptive_field(schedule, 12)
    # Layer 2 looks one token back, at what layer 1 gathered in its chunk.
    assert field.unreachable(8).tolist() == [0, 1, 2, 3]
    assert field.unreachable(9).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert "query 11 does not reach 8 tokens: 0-7" in str(field)
    with pytest.raises(ValueError, match="query=3 must be one that was followed"):
        reach.receptive_field(schedule, 12, queries=[8]).unreachable(3)


def test_the_order_of_the_layers_counts():
    first = reach.receptive_field(patterns.parse("per_layer((chunked(size=4), causal()))"), 12)
    last = reach.receptive_field(patterns.parse("per_layer((causal(), chunked(size=4)))"), 12)
    assert [x.first_full_layer for x in (first, last)] == [2, 1]
    assert first.layers[0] != last.layers[0]


@pytest.mark.parametrize("expression", ["local(window=4096) | sinks(tokens=64)", "causal()"])
def test_a_million_tokens(expression):
    tracemalloc.start()
    field = reach.receptive_field(patterns.parse(expression), 1 << 20, num_layers=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if expression == "causal()":
        assert field.first_full_layer == 1
    else:
        window = [1 + n * 4095 for n in (1, 2, 3)]
        wanted = [(64 + n) / (1 << 20) for n in window]
        assert [x.coverage for x in field.layers] == pytest.approx(wanted)
    assert peak < 1.5e9  # The lists of the causal mask; a T x T array of bits has 137 GB.


def test_malformed_arguments():
    pattern = patterns.parse("causal()")
    with pytest.raises(ValueError, match="must be a Pattern or a PerHead"):
        reach.receptive_field([pattern, "causal()"], 8)
    for changes, message in (
        ({"num_layers": 0}, "num_layers=0"),
        ({"queries": [8]}, r"queries=\[8\] must be"),
        ({"queries": []}, r"queries=\[\] must be"),
    ):
        with pytest.raises(ValueError, match=message):
            reach.receptive_field(pattern, 8, **changes)
