"""Rules with attention of their own: any length, small floats, and a repetition of heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.masks import stats
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base
from tests.selection import rules

jit = functools.partial(jax.jit, compiler_options=rules.COMPILER_OPTIONS)
# Those that keep single tokens, or give weights of their own; the others are in `test_reordered`.
FINE = ("Dhsa", "DynamicMask", "Landmark", "MmInference", "Spatial")


def more(rule, q, k):
    """What the attention of a rule takes beside q, k and v."""
    name = type(rule).__name__
    if name == "Spatial":
        side = rule.resolution
        places = np.random.default_rng(0).permutation(side**3)[: q.shape[1]]
        coords = np.stack(np.unravel_index(places, (side,) * 3), -1).astype(np.int32)
        return {
            "coords": jnp.broadcast_to(coords, (q.shape[0], *coords.shape)),
            "impl": "reference",
        }
    if name == "MmInference":
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
