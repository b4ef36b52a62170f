"""Rules with attention of their own: any length, gradients, small floats, what is counted."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.masks import stats
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base, hyper, pbs
from tests.selection import definitions, rules

jit = functools.partial(jax.jit, compiler_options=rules.COMPILER_OPTIONS)
# Those that keep single tokens, or give weights of their own; the others are in `test_reordered`.
FINE = ("Dhsa", "DynamicMask", "Landmark", "MmInference", "Spatial")
# These two have a mask, but attend to other keys than those they are given.
DEFINED = [
    # Halved once or twice: every part is a program to compile.
    dataclasses.replace(r, least=24) if isinstance(r, hyper.Hyper) else r
    for r in (*rules.OWN, *rules.MASKS["moba_conv"], *rules.MASKS["psa"])
]
# Multiples of no block; the first of the list comes first.
LENGTHS = st.builds(
    lambda blocks, rest: 8 * blocks + rest, st.sampled_from([5, 7, 3, 1, 0]), st.integers(1, 7)
)


def more(rule, q, k):
    """What the attention of a rule takes beside q, k and v."""
    name = type(rule).__name__
    if name == "Spatial":
        coords = definitions.coords(rule, q)
        return {
            "coords": jnp.broadcast_to(coords, (q.shape[0], *coords.shape)),
            "impl": "reference",
        }
    if name == "Routing":
        return {"centroids": definitions.centroids(q), "impl": "reference"}
    if isinstance(rule, pbs.Reordered) or name == "Psa":
        return {"impl": "reference"}
    params = rules.params(rule, q, k)
    return {"params": params} if params else {}


def test_they_are_no_masks():
    assert all(isinstance(rule, base.OwnAttention) for rule in rules.OWN)
    with pytest.raises(NotImplementedError, match="call attend, not select"):
        rules.OWN[0].select(*rules.inputs()[:2])


def test_keys_of_a_row_are_counted():
    """The bound is what the last query of a long row can read."""
    for text, keys in [
        ("landmark(block_kv=16, top_k=2)", 3 * 16 + 64),
        ("dynamic_mask(top_k=40)", 40),
        ("dhsa(top_k=40)", 40),
    ]:
        counted = stats.of(patterns_base.parse(text).at_most(1024))
        assert counted.keys_per_row_max == keys


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", [r for r in rules.OWN if type(r).__name__ in FINE], ids=lambda r: r.expression()
)
def test_any_length_and_small_floats(rule):
    q, k, v = rules.inputs(batch=2, length=1)
    ones = jit(lambda *x: rule.attend(*x, **more(rule, q, k)))(q, k, jnp.ones_like(v))
    np.testing.assert_allclose(ones, len(getattr(rule, "branches", (1,))), atol=1e-5)
    small = [x.astype(jnp.bfloat16) for x in rules.inputs(batch=2, length=23)]
    options = more(rule, *small[:2])
    attend = jit(lambda *x: rule.attend(*x, **options))
    got = attend(*small)
    assert got.dtype == jnp.bfloat16
    # Against float32 arithmetic on the same numbers; a few queries choose another key.
    want = attend(*(x.astype(jnp.float32) for x in small))
    error = np.abs(got.astype(jnp.float32) - want).max(-1)
    assert np.quantile(error, 0.8) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("rule", DEFINED, ids=lambda r: r.expression())
@hypothesis.given(length=LENGTHS)
@hypothesis.settings(max_examples=2)
def test_any_length_is_the_definition_with_its_gradients(rule, length):
    q, k, v = rules.inputs(length, batch=2, length=length)
    dout = np.random.default_rng(1).standard_normal(q.shape)

    def run(f):
        def loss(*x):
            out = f(*x)
            return (out * dout).sum(), out

        grads, out = jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        return out, *grads

    options = more(rule, q, k)
    got = run(lambda *x: rule.attend(*x, **options))
    want = run(definitions.of(rule, q, k, v))
    for name, mine, theirs in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4, rtol=1e-4, err_msg=name)
    if length > 40:  # The budget leaves something out.
        assert np.abs(got[0] - rules.dense(q, k, v, causal=rule.pattern.causal)).max() > 0.1
