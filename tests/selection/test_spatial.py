"""Spatial sparse attention: a loop over voxels, their order, uneven cubes, and the window."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.selection import base, spatial
from tests.ops import oracle
from tests.selection import rules

jit = functools.partial(jax.jit, compiler_options=rules.COMPILER_OPTIONS)
RULE = spatial.EXAMPLES[0]
LENGTH = 50


def voxels(seed=0, length=LENGTH, padding=0):
    """Distinct voxels in random order: two cubes are crowded, others hold one or a few."""
    rng = np.random.default_rng(seed)
    crowded = np.stack(np.unravel_index(rng.choice(128, 30, replace=False), (4, 4, 8)), -1)
    rest = np.stack(np.unravel_index(rng.permutation(12**3), (12, 12, 12)), -1)
    rest = rest[(rest[:, 0] >= 4) | (rest[:, 1] >= 4)][: length - 30 - padding]
    found = rng.permutation(np.concatenate([crowded, rest]))
    return np.concatenate([found, np.full((padding, 3), -1)]).astype(np.int32)


def masks(rule, q, k, coords):
    """Element masks `[N, T, T]` of the selected branch and of the window, in float64 loops."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    real = (coords >= 0).all(-1)
    cubes = [tuple(x) if ok else None for x, ok in zip(coords // rule.edge, real, strict=True)]
    names = sorted({x for x in cubes if x is not None})
    members = {x: [s for s, cube in enumerate(cubes) if cube == x] for x in names}
    length, heads, dim = q.shape
    selected, window = np.zeros((2, heads, length, length), bool)
    for t in np.flatnonzero(real):
        for g in range(k.shape[1]):
            group = range(g * heads // k.shape[1], (g + 1) * heads // k.shape[1])
            means = np.array([k[members[x], g].mean(0) for x in names])
            weights = np.zeros(len(names))
            for n in group:
                p = np.exp(means @ q[t, n] / np.sqrt(dim))
                weights += p / p.sum()
            for i in np.argsort(-weights, kind="stable")[: rule.top_k]:
                selected[np.ix_(group, [t], members[names[i]])] = True
        window[:, t] = (np.abs(coords - coords[t]).max(-1) <= rule.window) & real
    return selected, window


@pytest.mark.parametrize("branch", ["selected", pytest.param("window", marks=pytest.mark.slow)])
def test_branches_are_the_masked_definition_with_its_gradients(branch):
    q, k, v = rules.inputs(batch=1, length=LENGTH)
    coords = voxels(padding=4)
    sizes = np.unique(coords[coords[:, 0] >= 0] // RULE.edge, axis=0, return_counts=True)[1]
    assert sizes.min() == 1
    assert sizes.max() >= 14
    dout = np.random.default_rng(1).standard_normal(q.shape)
    seen = masks(RULE, q[0], k[0], coords)[branch == "window"]
    rule = dataclasses.replace(RULE, branches=(branch,))

    def loss(q, k, v):
        out = rule.attend(q, k, v, coords=jnp.asarray(coords)[None])
        return (out * dout).sum(), out

    grads, out = jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    want = oracle.attention(q, k, v, seen[None], dout, np.zeros(q.shape[:3]), scale=8**-0.5)
    np.testing.assert_allclose(out, want.out, atol=2e-5)
    for mine, theirs in zip(grads, (want.dq, want.dk, want.dv), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)


def test_all_cubes_of_the_selection_alone_are_dense():
    q, k, v = rules.inputs(1, batch=2, length=LENGTH)
    coords = jnp.asarray(np.stack([voxels(0), voxels(1)]))
    gates = jnp.broadcast_to(jnp.array([0.0, 1.0, 0.0]), (2, LENGTH, 4, 3))
    rule = dataclasses.replace(RULE, top_k=27, branches=("compressed", "selected"))
    got = jit(lambda *x: rule.attend(*x, coords=coords, gates=gates))(q, k, v)
    np.testing.assert_allclose(got, rules.dense(q, k, v, causal=False), atol=2e-5)


@pytest.mark.slow
def test_compressed_branch_attends_to_means_of_cubes_and_gates_weigh():
    q, k, v = rules.inputs(2, batch=1, length=LENGTH)
    coords = voxels()
    at = np.unique(coords // RULE.edge, axis=0, return_inverse=True)[1]
    means = [
        np.stack([np.asarray(x)[0, at == i].mean(0) for i in range(at.max() + 1)])[None]
        for x in (k, v)
    ]
    want = rules.dense(q, *means, causal=False)
    gates = jnp.broadcast_to(jnp.array([0.5, 0.0, 0.0]), (1, LENGTH, 4, 3))
    rule = dataclasses.replace(RULE, branches=("compressed",))
    got = jit(lambda *x: rule.attend(*x, coords=jnp.asarray(coords)[None], gates=gates))(q, k, v)
    np.testing.assert_allclose(got, want / 2, atol=2e-5)


@pytest.mark.slow
def test_the_order_of_voxels_does_not_matter_and_too_many_cubes_are_told():
    q, k, v = rules.inputs(3, batch=1, length=LENGTH)
    coords = voxels()
    rule = dataclasses.replace(RULE, max_blocks=27)
    attend = jit(lambda rule, q, k, v, coords: rule.attend(q, k, v, coords=coords[None]),
                 static_argnums=0)  # fmt: skip
    order = np.random.default_rng(0).permutation(LENGTH)
    moved = attend(rule, *(x[:, order] for x in (q, k, v)), jnp.asarray(coords[order]))
    out = attend(rule, q, k, v, jnp.asarray(coords))
    np.testing.assert_array_equal(moved, out[:, order])
    few = dataclasses.replace(rule, max_blocks=3)
    assert np.isnan(attend(few, q, k, v, jnp.asarray(coords))).all()


def test_wrong_fields_are_named():
    for fields, message in [
        ({"edge": 0}, "edge=0 must be an int >= 1"),
        ({"resolution": 2048}, "resolution=2048 must be less"),
        ({"branches": ("all",)}, "must be one or more of"),
        ({"pattern": base.CAUSAL}, r"pattern=causal\(\) must be full\(\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            spatial.Spatial(**fields)
