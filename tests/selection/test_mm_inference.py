"""MMInference: a planted grid is found and moved together; modalities apart give the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import attend as attend_lib
from sparse_attn.patterns import local
from sparse_attn.selection import base, mm_inference, pooled
from tests.ops import oracle
from tests.selection import rules

jit = functools.partial(jax.jit, compiler_options=rules.COMPILER_OPTIONS)
STRIDES = (5, 8, 16, 24, 32)


def planted(stride, phase, *, length=768, dim=16, seed=0):
    """q, k of one head whose queries look at the keys `phase, phase + stride, ...`."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, length, dim)) * 0.3
    direction = rng.standard_normal(dim)
    direction *= 6 / np.linalg.norm(direction)
    q += direction
    k[phase::stride] += direction
    return q, k


def test_a_planted_grid_is_found_and_fills_its_part_of_the_blocks():
    grids = [(8, 3), (16, 3), (24, 11), (32, 0)]
    heads = [planted(*g, seed=i) for i, g in enumerate(grids)]
    q, k = (jnp.asarray(np.stack(x, 1)[None], jnp.float32) for x in zip(*heads, strict=True))
    rule = mm_inference.MmInference(strides=STRIDES)
    assert rule.probe == 64
    stride, phase = jit(rule.grid)(q, k)
    assert list(zip(stride[0].tolist(), phase[0].tolist(), strict=True)) == grids
    order, on_grid = jit(rule.plan)(q, k)
    for head, (step, _) in enumerate(grids):
        block = 768 // step // 4  # So that the grid fills whole blocks.
        touched = np.asarray(on_grid)[0, head].reshape(-1, block).any(-1)
        assert touched.mean() == 1 / step
        in_place = np.zeros(768, bool)
        in_place[np.asarray(order)[0, head][on_grid[0, head]]] = True
        assert in_place.reshape(-1, step).any(-1).all()  # Before, blocks as long hold one each.


@pytest.mark.slow
def test_a_planted_grid_has_most_of_the_mass():
    q, k = (jnp.asarray(x, jnp.float32)[None, :, None] for x in planted(24, 11))
    alone = mm_inference.MmInference(strides=STRIDES, always=None)
    _, lse = jit(lambda q, k: alone.attend(q, k, k, return_lse=True))(q, k)
    _, dense = attend_lib.attend(q, k, k, mask=base.CAUSAL, return_lse=True)
    assert np.exp(lse - dense)[:, 64:].mean() > 0.9


@pytest.mark.slow
def test_what_is_seen_is_the_grid_and_always():
    q, k, v = rules.inputs(batch=2, length=50)
    rule = mm_inference.EXAMPLES[0]
    assert not np.array_equal(jit(rule.plan)(q, k)[0][0, 0], np.arange(50))
    stride, phase = (np.asarray(x)[..., None, None] for x in jit(rule.grid)(q, k))
    at = np.arange(50)
    seen = (at - phase) % stride == 0
    seen = (seen | rule.always.mask_fn(at[:, None], at)) & (at <= at[:, None])
    dout, dlse = np.random.default_rng(4).standard_normal(q.shape), np.zeros(q.shape[:3])

    def loss(q, k, v):
        out, lse = rule.attend(q, k, v, return_lse=True, impl="reference")
        return (out * dout).sum(), (out, lse)

    (_, (out, lse)), grads = jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    want = oracle.attention(q, k, v, seen, dout, dlse, scale=8**-0.5)
    np.testing.assert_allclose(out, want.out, atol=2e-5)
    np.testing.assert_allclose(lse, want.lse, atol=2e-5)
    for mine, theirs in zip(grads, (want.dq, want.dk, want.dv), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)


def test_no_output_follows_a_later_token_beside_what_the_last_queries_choose(monkeypatch):
    q, k, v = rules.inputs(1, batch=1, length=50)
    rule = mm_inference.EXAMPLES[0]
    grid = jit(rule.grid)(q, k)
    monkeypatch.setattr(mm_inference.MmInference, "grid", lambda *_: grid)
    attend = jit(lambda q, k, v: rule.attend(q, k, v, impl="reference"))
    out = attend(q, k, v)
    for t in (5, 20, 31):
        later = (np.arange(50) > t)[:, None, None]
        changed = attend(*(jnp.where(later, 5 * x[:, ::-1], x) for x in (q, k, v)))
        np.testing.assert_array_equal(changed[:, : t + 1], out[:, : t + 1])
        assert np.abs(changed - out)[:, t + 1 :].max() > 0.1


def test_modalities_apart_are_the_row_as_it_was():
    q, k, v = rules.inputs(2, batch=1, length=40)
    kinds = ["text"] * 5 + ["video"] * 14 + ["text"] * 4 + ["video"] * 10 + ["text"] * 7

    def split(pairs):
        f = functools.partial(
            mm_inference.attend_by_modality, kinds=kinds, rules=pairs, impl="reference"
        )
        return jit(f)(q, k, v)

    dense = rules.dense(q, k, v)
    np.testing.assert_allclose(split({}), dense, atol=2e-5)
    # A window among the frames alone: text still sees, and is seen, as before.
    window = local.Local(window=3)
    video = np.array(kinds) == "video"
    at = np.arange(40)
    seen = at <= at[:, None]
    seen &= ~(video[:, None] & video) | (at > at[:, None] - 3)
    nothing = np.zeros(q.shape), np.zeros(q.shape[:3])
    seen = np.broadcast_to(seen, (1, 4, 40, 40))
    want = oracle.attention(q, k, v, seen, *nothing, scale=8**-0.5)
    np.testing.assert_allclose(split({("video", "video"): window}), want.out, atol=2e-5)
    every = pooled.Pooled(block_q=8, block_kv=8, top_k=10_000)
    for pairs, message in [
        ({("video", "sound"): window}, "must be a pair of"),
        ({("video", "text"): every}, "must be a pattern: pooled"),
    ]:
        with pytest.raises(ValueError, match=message):
            split(pairs)


@pytest.mark.slow
def test_a_modality_can_have_a_selector():
    q, k, v = rules.inputs(3, batch=1, length=24)
    kinds = ["text"] * 5 + ["video"] * 14 + ["text"] * 5
    every = pooled.Pooled(block_q=8, block_kv=8, top_k=10_000)
    attend = functools.partial(
        mm_inference.attend_by_modality, kinds=kinds, rules={("video", "video"): every},
        impl="reference",
    )  # fmt: skip
    got = jit(attend)(q, k, v)
    np.testing.assert_allclose(got, rules.dense(q, k, v), atol=2e-5)


def test_wrong_fields_are_named():
    for fields, message in [
        ({}, r"strides=\(\) must be one or more"),
        ({"strides": (0,)}, "must be an int >= 1"),
        ({"strides": (4,), "block_q": 64, "block_kv": 64}, "block_q=64 must be 128"),
    ]:
        with pytest.raises(ValueError, match=message):
            mm_inference.MmInference(**fields)
