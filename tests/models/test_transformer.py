"""The whole decoder: what it may see, that the forms of its loop agree, that it learns."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_attn.models import dtypes, transformer
from sparse_attn.ops import tiles
from sparse_attn.patterns import causal, dilated, local, per_head, per_layer, sinks
from sparse_attn.train import state

# The reference compiles fastest; what this file tests does not depend on the backend of `attend`,
# but for one pass through the default one.
TINY = transformer.TransformerConfig(
    vocab_size=40, num_layers=3, embed_dim=16, num_heads=2, num_kv_heads=1, mlp_dim=32,
    impl="reference",
)  # fmt: skip
WINDOW = local.Local(window=3)
SCHEDULES = {
    "window and sinks": WINDOW | sinks.Sinks(tokens=2),
    "dilated": dilated.Dilated(window=2, dilation=4),
    "per head": per_head.PerHead((WINDOW, dilated.Dilated(window=2, dilation=3))),
    "per layer": per_layer.PerLayer((local.Local(window=2), local.Local(window=5))),
}


def build(**changes):
    return transformer.Transformer(dataclasses.replace(TINY, **changes))


@functools.cache
def tokens_of(length, batch=1, vocab_size=TINY.vocab_size, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, vocab_size)


@functools.cache
def params_of(**changes):
    # At the start all residual branches are small; larger weights make every path count.
    params = jax.jit(build(**changes).init)(jax.random.key(0), tokens_of(8))["params"]
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) * (1 + (x.ndim > 2))), params)


def apply(model, params, tokens, **kwargs):
    return jax.jit(model.apply)({"params": params}, tokens, **kwargs)


def reachable(config, length):
    """`[T, T]`: whether any path through the layers leads from input j to output i."""
    q, kv = np.arange(length)[:, None], np.arange(length)[None, :]
    reach = np.eye(length, dtype=bool)
    for pattern in config.layer_patterns():
        heads = pattern.patterns if isinstance(pattern, per_head.PerHead) else (pattern,)
        layer = np.eye(length, dtype=bool)  # The residual stream.
        for head in heads:
            layer |= np.asarray(head.mask_fn(q, kv))
        reach = (layer.astype(int) @ reach.astype(int)) > 0
    return reach


# The other two reach the layers as these do, a pattern and one for each layer.
every_schedule = pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(x, id=name, marks=pytest.mark.slow if name in ("dilated", "per head") else ())
        for name, x in SCHEDULES.items()
    ],
)


@every_schedule
def test_gradient_is_zero_exactly_outside_the_receptive_field(schedule):
    length = 24
    # A token of its own at each place: its embedding's gradient is the gradient of that place.
    model = build(pattern=schedule, output="untied")
    params = params_of(output="untied")
    tokens = jnp.arange(length)[None]

    @jax.jit
    def influence(i):
        def logits_at(embedding):
            logits = model.apply({"params": {**params, "embedding": embedding}}, tokens)
            return logits[0, i] @ jax.random.normal(jax.random.key(1), (TINY.vocab_size,))

        return jnp.abs(jax.grad(logits_at)(params["embedding"])[:length]).max(-1)

    got = np.stack([influence(i) for i in range(length)])
    inside = reachable(model.config, length)
    assert (got[~inside] == 0).all()
    assert (got[inside] > 0).all()


def test_receptive_field_through_the_block_sparse_backend():
    # 300 tokens are three blocks of 128: most blocks of the window are never touched.
    window, length = 40, 300
    config = dataclasses.replace(
        TINY, pattern=local.Local(window=window), output="untied", vocab_size=length, impl=None
    )
    model = transformer.Transformer(config)
    tokens = jnp.arange(length)[None]
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]

    @jax.jit
    def influence(i):
        def logits_at(embedding):
            logits = model.apply({"params": {**params, "embedding": embedding}}, tokens)
            return logits[0, i] @ jax.random.normal(jax.random.key(1), (length,))

        return jnp.abs(jax.grad(logits_at)(params["embedding"])).max(-1)

    for i in (0, 100, 200, 299):
        first = max(0, i - TINY.num_layers * (window - 1))
        assert np.asarray(influence(i)).nonzero()[0].tolist() == list(range(first, i + 1))


@every_schedule
def test_future_tokens_change_nothing(schedule):
    model = build(pattern=schedule)
    params = params_of()
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    tokens = np.asarray(tokens_of(33))
    before = np.asarray(apply(tokens))
    for t in (0, 1, 16, 32):
        changed = tokens.copy()
        changed[0, t] = (tokens[0, t] + 1) % TINY.vocab_size
        after = np.asarray(apply(changed))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t] != before[:, t]).any()


def test_packed_documents_are_as_if_alone():
    model = build(pattern=WINDOW | sinks.Sinks(tokens=1))
    lengths = (9, 1, 14)
    tokens = np.asarray(tokens_of(sum(lengths) + 4))
    segments = np.repeat([1, 2, 3, 0], [*lengths, 4])[None]
    positions = np.concatenate([np.arange(n) for n in (*lengths, 4)])[None]
    # The window is relative; sinks are places in the row, so only the first document has them.
    packed = apply(model, params_of(), tokens, segment_ids=segments, positions=positions)
    packed = np.asarray(packed)
    alone_pattern = {0: model.config.pattern, 1: WINDOW, 2: WINDOW}
    start = 0
    for number, length in enumerate(lengths):
        alone = apply(
            build(pattern=alone_pattern[number]), params_of(), tokens[:, start : start + length]
        )
        np.testing.assert_allclose(packed[:, start : start + length], alone, atol=2e-5)
        start += length


@pytest.mark.parametrize(
    "shape",
    [
        dict(vocab_size=384, num_layers=2, embed_dim=32, num_heads=2, dtype="bfloat16"),
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in (
                dict(vocab_size=384, num_layers=4, embed_dim=160, num_heads=4, head_dim=32),
                dict(vocab_size=2000, num_layers=12, embed_dim=256, num_heads=2, output="untied"),
            )
        ),
    ],
    ids=["tiny", "small", "large"],
)
def test_initial_loss_is_that_of_a_uniform_guess(shape):
    model = transformer.Transformer(transformer.TransformerConfig(impl="reference", **shape))
    inputs = jnp.asarray(np.asarray(tokens_of(65, 4, shape["vocab_size"]))[:, :-1])
    targets = jnp.asarray(np.asarray(tokens_of(65, 4))[:, 1:])

    @jax.jit
    def loss(key):
        return state.token_losses(model.apply(model.init(key, inputs), inputs), targets).mean()

    uniform = math.log(shape["vocab_size"])
    assert abs(float(loss(jax.random.key(0))) - uniform) < 0.02 * uniform


def loss_and_grads(config, params, tokens):
    model = transformer.Transformer(config)

    def loss(params):
        logits = model.apply({"params": params}, tokens[:, :-1])
        return state.token_losses(logits, tokens[:, 1:]).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_trees_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=0), a, b)


FOUR_LAYERS = per_layer.PerLayer((WINDOW, causal.Causal()))
VARIANTS = {
    "remat block": (dict(), dict(remat="block")),
    "remat dots": (dict(), dict(remat="dots")),
    "unrolled": (dict(), dict(layer_loop="unroll")),
    "cycle unrolled": (dict(pattern=FOUR_LAYERS), dict(layer_loop="unroll")),
    "cycle remat": (dict(pattern=FOUR_LAYERS), dict(remat="block", layer_loop="unroll")),
}

FAST_VARIANTS = ("remat dots", "cycle remat")


@functools.cache
def of_four_layers(**fields):
    config = dataclasses.replace(TINY, num_layers=4, **fields)
    return loss_and_grads(config, params_of(num_layers=4), tokens_of(17, 2))


@pytest.mark.parametrize(
    "base, change",
    [
        # Of each field both values are met by the other two.
        pytest.param(*x, id=name, marks=() if name in FAST_VARIANTS else pytest.mark.slow)
        for name, x in VARIANTS.items()
    ],
)
def test_forms_of_the_layer_loop_agree(base, change):
    assert_trees_close(of_four_layers(**base, **change), of_four_layers(**base), 2e-6)


def test_a_schedule_is_applied_in_its_order():
    # Equal to a hand-written pass over the layers, so that no layer gets another one's pattern.
    schedule = per_layer.PerLayer((WINDOW, causal.Causal()))
    config = dataclasses.replace(TINY, num_layers=4, pattern=schedule)
    params, tokens = params_of(num_layers=4), np.asarray(tokens_of(24))

    @functools.partial(jax.jit, static_argnums=0)
    def block(pattern, params, x):
        return transformer.Block(config, pattern).apply(
            {"params": params}, x, jnp.arange(24)[None], None
        )

    x = np.asarray(params["embedding"])[tokens] * config.embed_dim**0.5
    for i, pattern in enumerate((WINDOW, causal.Causal(), WINDOW, causal.Causal())):
        layer = jax.tree.map(lambda a, i=i: np.asarray(a)[i], params["layers"])
        x, _ = block(pattern, layer, x)
    x = jax.jit(transformer.RMSNorm().apply)({"params": params["final_norm"]}, x)
    expected = np.asarray(x) @ np.asarray(params["embedding"]).T
    got = apply(transformer.Transformer(config), params, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_scan_compiles_one_cycle():
    def count(config):
        model = transformer.Transformer(config)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens_of(8))
        text = jax.jit(model.apply).lower(params, tokens_of(8)).as_text()
        return text.count("stablehlo.dot_general")

    once = count(dataclasses.replace(TINY, num_layers=2))
    assert count(dataclasses.replace(TINY, num_layers=12)) == once
    cycle = dataclasses.replace(TINY, num_layers=12, pattern=FOUR_LAYERS)
    assert count(cycle) < 2.5 * once < count(dataclasses.replace(cycle, layer_loop="unroll"))


def test_parameters_do_not_depend_on_schedule_loop_or_remat():
    def init(**fields):
        return jax.jit(build(num_layers=4, **fields).init)(jax.random.key(3), tokens_of(8))

    plain = init()
    for change in (
        dict(pattern=FOUR_LAYERS),
        dict(layer_loop="unroll", remat="block", dtype="bfloat16"),
    ):
        jax.tree.map(np.testing.assert_array_equal, init(**change), plain)


def test_parameter_paths_and_shapes_are_the_documented_ones():
    model = build(sink_logits="learned", output="untied")
    params = jax.eval_shape(model.init, jax.random.key(0), tokens_of(8))
    got = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(params["params"])
    }
    assert got == {
        "embedding": (40, 16),
        "layers/attention_norm/scale": (3, 16),
        "layers/attention/query/kernel": (3, 16, 2, 8),
        "layers/attention/key/kernel": (3, 16, 1, 8),
        "layers/attention/value/kernel": (3, 16, 1, 8),
        "layers/attention/out/kernel": (3, 2, 8, 16),
        "layers/attention/sink_logits": (3, 2),
        "layers/mlp_norm/scale": (3, 16),
        "layers/mlp/gate/kernel": (3, 16, 32),
        "layers/mlp/up/kernel": (3, 16, 32),
        "layers/mlp/down/kernel": (3, 32, 16),
        "final_norm/scale": (16,),
        "output": (40, 16),
    }
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
    tokens, params = tokens_of(33, 2), params_of()
    exact = np.asarray(apply(build(), params, tokens))
    model = build(dtype="bfloat16")
    rough = apply(model, params, tokens)
    assert rough.dtype == jnp.float32
    assert 1e-5 < np.abs(np.asarray(rough) - exact).max() < 0.1
    grads = jax.eval_shape(jax.grad(lambda p: model.apply({"params": p}, tokens).sum()), params)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_soft_caps_bound_the_logits():
    params = jax.tree.map(lambda x: np.asarray(x) * 30, params_of())
    capped = np.asarray(apply(build(logits_soft_cap=3.0), params, tokens_of(8)))
    free = np.asarray(apply(build(), params, tokens_of(8)))
    assert np.abs(capped).max() <= 3.0 < np.abs(free).max()
    np.testing.assert_allclose(capped, 3 * np.tanh(free / 3), atol=1e-4)
    assert (apply(build(attention_soft_cap=0.1), params, tokens_of(8)) != free).any()


@pytest.mark.slow  # 200 steps; test_golden.py holds the losses of 20.
def test_overfits_one_batch():
    model = build(pattern=WINDOW | sinks.Sinks(tokens=1), embed_dim=32, mlp_dim=64)
    tokens = tokens_of(33, 2)
    inputs = tokens[:, :-1]
    batch = dict(
        inputs=inputs,
        targets=tokens[:, 1:],
        weights=jnp.ones(inputs.shape),
        segment_ids=jnp.ones_like(inputs),
        positions=jnp.broadcast_to(jnp.arange(32), inputs.shape),
    )
    optimizer = optax.adam(5e-3)
    train_state = state.create(model, optimizer, key=jax.random.key(0), length=32)
    step = state.make_train_step(model, optimizer)
    for _ in range(200):
        train_state, metrics = step(train_state, batch)
    assert float(metrics["loss"]) < 0.05


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_layers=0), "num_layers=0 must be >= 1"),
        (dict(embed_dim=15), "num_heads=2 must divide embed_dim=15"),
        (dict(num_heads=3, head_dim=4, num_kv_heads=2), "num_kv_heads=2 must divide num_heads=3"),
        (dict(head_dim=5), "head_dim=5 must be even"),
        (dict(dtype="float16"), "dtype='float16' must be one of"),
        (dict(remat="full"), "remat='full' must be one of"),
        (dict(layer_loop="auto"), "layer_loop='auto' must be one of"),
        (dict(output="shared"), "output='shared' must be one of"),
        (dict(pattern="causal()"), "pattern='causal\\(\\)' must be a Pattern"),
    ],
)
def test_wrong_fields_are_named(change, message):
    fields = {"vocab_size": 40, "num_heads": 2, "embed_dim": 16} | change
    with pytest.raises(ValueError, match=message):
        transformer.TransformerConfig(**fields)


@pytest.mark.parametrize("platform, dtype", [("cpu", "float32"), ("gpu", "bfloat16")])
def test_auto_computes_in_the_dtype_of_the_device(platform, dtype):
    with tiles.assume(tiles.Target(platform, "any")):
        assert jnp.dtype(dtypes.of("auto")) == dtype
        assert dtypes.of("float32") is jnp.float32
