"""Rules for images and video: Draft, NABLA, VMoBA and BiFormer on planted and smooth grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import reordered, scoring
from sparse_attn.patterns import local
from sparse_attn.selection import ada_spa, bi_former, draft, nabla, v_moba
from tests.selection import rules


def field(shape, dim, width, seed):
    """Smoothed noise of unit variance on a grid `(frames, height, width)`: `[1, T, 1, dim]`."""
    x = np.random.default_rng(seed).standard_normal((*shape, dim))
    kernel = np.exp(-0.5 * (np.arange(-3 * width, 3 * width + 1) / width) ** 2)
    for axis in (1, 2):
        x = sum(w * np.roll(x, i, axis) for i, w in enumerate(kernel))
    return jnp.asarray((x / x.std()).reshape(1, -1, 1, dim), jnp.float32)


def mass_of(kept, masses):
    return float(np.where(kept, masses, 0).sum(-1).mean())


@pytest.mark.slow
def test_draft_keeps_nearly_what_the_best_patches_have_on_a_smooth_video():
    shape, patch, dim = (2, 32, 128), (8, 16), 16
    q, k = (field(shape, dim, 8, seed) * 1.5 for seed in (0, 1))
    rule = draft.Draft(density=0.1)
    exact = ada_spa.AdaSpa(top_k=1)
    kept, share = {}, {}
    for name, order in (("rows", None), ("patches", draft.patches(shape, patch))):
        x, y = (q, k) if order is None else (reordered.permute(z, order) for z in (q, k))
        masses = np.asarray(exact.masses(x, y))[0, 0]
        chosen = rules.chosen(rule, x, y)[0, 0] > 0
        assert chosen.sum() == np.ceil(0.1 * chosen.size)
        kept[name] = mass_of(chosen, masses)
        share[name] = np.sort(masses.ravel())[::-1][: chosen.sum()].sum() / len(masses)
    assert kept["patches"] >= 0.95 * share["patches"]
    assert kept["patches"] >= 1.5 * kept["rows"]


def test_draft_is_exact_where_patches_are_constant():
    shape, patch = (2, 8, 8), (4, 4)
    order = draft.patches(shape, patch)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 8, 2, 8)) * 2, jnp.float32) for _ in range(2))
    q, k = (jnp.repeat(x, 16, 1) for x in (q, k))  # In the order of patches.
    kept = rules.chosen(draft.Draft(block_q=16, block_kv=16, density=0.25), q, k)[0] > 0
    masses = np.asarray(ada_spa.AdaSpa(block_q=16, block_kv=16, top_k=1).masses(q, k))[0]
    for head in range(2):
        best = np.sort(masses[head].ravel())[-16]
        np.testing.assert_array_equal(kept[head], masses[head] >= best)
    assert order.size == q.shape[1]


@pytest.mark.parametrize(
    "order",
    [
        draft.patches((2, 7, 10), (4, 4)),
        *v_moba.partitions((4, 6, 6), 3, (4, 3), (3, 4, 4)),
    ],
    ids=lambda order: str(order.tile),
)
def test_orders_are_permutations_and_all_blocks_are_dense_attention(order):
    length = order.size
    assert (order.forward[order.inverse] == np.arange(length)).all()
    q, k, v = rules.inputs(batch=1, length=length, heads=2, kv_heads=1)
    rule = draft.Draft(block_q=16, block_kv=16, density=1.0)
    got = rules.attend(rule, q, k, v, order=order)
    want = jax.nn.dot_product_attention(q, k, v)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_nabla_rows_have_their_mass_adapt_and_hold_the_window():
    q, k, _ = rules.inputs(batch=1, length=128)
    peaked = (np.arange(128) < 64)[None, :, None, None]
    q = jnp.where(peaked, 4 * q, 0.1 * q)
    fields = {"block_q": 16, "block_kv": 16, "top_p": 0.8}
    kept = rules.chosen(nabla.Nabla(**fields), q, k)[0] > 0
    low = scoring.logits(*(scoring.pool(x, 16, np.ones((1, 128), bool)) for x in (q, k)))
    share = np.asarray(scoring.mass(low, np.ones(1, bool)))[0]
    assert (np.where(kept, share, 0).sum(-1) >= 0.8 - 1e-6).all()
    smallest = (np.cumsum(np.sort(share, -1)[..., ::-1], -1) < 0.8 - 1e-6).sum(-1) + 1
    np.testing.assert_array_equal(kept.sum(-1), smallest)
    assert kept[:, :4].sum() < kept[:, 4:].sum()
    window = local.Local(window=20)
    union = rules.chosen(nabla.Nabla(**fields, always=window), q, k)[0] > 0
    near = rules.lowered(nabla.Nabla(**fields), window, 128, 128) > 0
    np.testing.assert_array_equal(union, kept | near)


def test_v_moba_gives_blocks_to_queries_with_clear_matches():
    q, k, _ = rules.inputs(1, batch=1, length=128, heads=2, kv_heads=2)
    peaked = (np.arange(128) % 2 == 0)[None, :, None, None]
    q = jnp.where(peaked, 0.7 * q, 0.05 * q)
    kept = rules.chosen(v_moba.VMoba(block_kv=16, top_p=0.4), q, k)[0] > 0
    assert (kept.sum(-1) >= 1).all()
    assert kept[:, ::2].sum() > 1.5 * kept[:, 1::2].sum()
    scores = scoring.logits(q, scoring.pool(k, 16, np.ones((1, 128), bool)))[0]
    share = np.asarray(scoring.mass(scores.reshape(2, -1), np.ones(1, bool))).reshape(kept.shape)
    best = share == share.max(-1, keepdims=True)
    for head in range(2):
        needed = np.sort(share[head].ravel())[::-1]
        needed = needed[: (np.cumsum(needed) < 0.4).sum() + 1][-1]
        np.testing.assert_array_equal(kept[head], (share[head] >= needed) | best[head])


def test_bi_former_finds_the_region_of_a_matching_patch_for_all_heads():
    # Region i of the one half of the image shows what region pairs[i] shows.
    pairs = [(i, (5 * i + 3) % 16) for i in range(16)]
    q, k = rules.planted(256, block=16, pairs=pairs, heads=2)
    rule = bi_former.BiFormer(block_q=16, block_kv=16, top_k=1)
    mask = rules.select(rule, q, k)
    assert mask.num_tables == 1
    kept = rules.states(mask)[0, 0] > 0
    assert all(kept[i, j] for i, j in pairs)
    assert (kept.sum(-1) == 1).all()
    more = rules.select(bi_former.BiFormer(block_q=16, block_kv=16, top_k=5), q, k)
    assert (np.asarray(more.kv_counts) * 16 == 5 * 256 // 16).all()  # k H W / S^2 tokens.


def test_one_region_is_dense():
    q, k, v = rules.inputs(2, length=48)
    rule = bi_former.BiFormer(block_q=48, block_kv=48, top_k=1)
    assert (rules.chosen(rule, q, k) > 0).shape == (2, 1, 1, 1)
    got = rules.attend(rule, q, k, v)
    np.testing.assert_allclose(got, rules.dense(q, k, v, causal=False), atol=2e-5)


def test_wrong_fields_are_named():
    with pytest.raises(ValueError, match=r"density=1\.5 must be > 0 and <= 1"):
        draft.Draft(density=1.5)
    with pytest.raises(ValueError, match=r"top_p=1\.5 must be > 0 and <= 1"):
        v_moba.VMoba(top_p=1.5)
