"""HiP: what a hierarchical search finds where scores are smooth, and what it costs."""

import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.selection import ada_spa, base, hip
from tests.selection import rules


@pytest.mark.slow
def test_smooth_scores_are_searched_nearly_as_well_as_by_all_of_them():
    length, block, dim, top_k = 1024, 16, 16, 8
    rng = np.random.default_rng(0)
    angle = np.arange(length)[:, None] / length * rng.uniform(2, 12, dim // 2) * 2 * np.pi
    k = np.concatenate([np.cos(angle), np.sin(angle)], 1) * 2
    q = k[rng.permutation(length // block).repeat(block) * block] * 2
    q, k = (jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k))
    common = {"block_q": block, "block_kv": block, "always": None, "top_k": top_k}
    masses = ada_spa.AdaSpa(pattern=base.CAUSAL, **common).masses(q, k)[0, 0]
    kept = rules.chosen(hip.Hip(**common), q, k)[0, 0] > 0
    best = np.sort(np.asarray(masses), -1)[:, ::-1][:, :top_k].sum(-1)
    found = np.where(kept, masses, 0).sum(-1)
    rows = np.arange(len(kept))
    assert (kept.sum(-1) == np.minimum(rows + 1, top_k)).all()
    assert found.sum() / best.sum() >= 0.9
    even = masses[-1, :: 64 // top_k].sum()  # Blocks at equal distances find far less.
    assert found[-1] > 2 * even


def products(jaxpr):
    """Numbers that matrix products make, in all turns of loops."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += equation.outvars[0].aval.size
        assert equation.primitive.name != "while"  # Nobody could say how often.
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)
        ):
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                total += turns * products(value.jaxpr)
    return total


@pytest.mark.parametrize("top_k", [4, 16])
def test_number_of_scored_keys_grows_with_the_logarithm(top_k):
    block, heads = 4, 2
    rule = hip.Hip(block_q=block, block_kv=block, top_k=top_k)
    for blocks in (16, 64, 512):
        q = jax.ShapeDtypeStruct((1, blocks * block, heads, 2), jnp.float32)
        logits = products(jax.make_jaxpr(rule.select)(q, q).jaxpr)
        keys = logits / (heads * block * blocks)  # One row of blocks; each with all its queries.
        assert keys == 2 * top_k * math.log2(blocks / top_k)
    assert rule.steps(3) == 0
