"""Columns, diagonals and the search that gives each head its rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import scoring
from sparse_attn.patterns import local, sinks
from sparse_attn.selection import m_inference, pooled, vertical_slash
from tests.ops import oracle
from tests.selection import rules

LENGTH, BLOCK, DIM = 256, 16, 64


def line_head(columns=(), distances=(), seed=0):
    """q, k `[length, dim]`: attention on a few columns and at a few distances."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, LENGTH, DIM)) * 0.1
    q[:, 0] += 8
    k[list(columns), 0] += 8
    code = rng.standard_normal((2 * LENGTH, DIM - 1))
    for distance in distances:
        q[:, 1:] += code[:LENGTH]
        k[:, 1:] += code[distance : distance + LENGTH]
    return q, k


def block_head(seed=0):
    pairs = [(row, (5 * row + 2) % row) for row in range(1, LENGTH // BLOCK)]
    q, k = rules.planted(LENGTH, block=BLOCK, pairs=pairs, dim=DIM, gain=10.0, seed=seed)
    return np.asarray(q)[0, :, 0], np.asarray(k)[0, :, 0]


def a_shape_head():
    # The first tokens, and a bump over small distances from slow rotations.
    q, k = line_head(columns=(0, 1, 2))
    angles = np.arange(LENGTH)[:, None] * np.linspace(0.05, 0.35, 10)
    turn = np.concatenate([np.cos(angles), np.sin(angles)], 1) * 2.5
    q[:, 8:28] += turn
    k[:, 8:28] += turn
    return q, k


def stack(*heads):
    return (jnp.asarray(np.stack(x, 1)[None], jnp.float32) for x in zip(*heads))


def test_planted_columns_and_diagonals_are_recovered_from_the_last_queries():
    q, k = stack(line_head(columns=(37, 90), distances=(50,)))
    rule = vertical_slash.VerticalSlash(
        block_q=BLOCK, block_kv=BLOCK, columns=2, diagonals=1, probe=64, always=None
    )
    shares = vertical_slash.probe(rule, q, k, 64)
    columns = scoring.top_k(shares.sum(2), 2, np.ones(1, bool))
    sums = np.asarray(vertical_slash.diagonal_sums(shares, LENGTH))[0, 0]
    assert np.flatnonzero(columns[0, 0]).tolist() == [37, 90]
    assert sums.argmax() - (LENGTH - 1) == 50
    kept = rules.chosen(rule, q, k)[0, 0] > 0
    q_at, kv_at = np.mgrid[:LENGTH, :LENGTH]
    seen = ((kv_at == 37) | (kv_at == 90) | (q_at - kv_at == 50)) & (kv_at <= q_at)
    by_block = seen.reshape(LENGTH // BLOCK, BLOCK, -1, BLOCK).any((1, 3))
    # A column above the diagonal of a block is kept there too: the block has others below it.
    extra = kept & ~by_block
    assert (kept | ~by_block).all()
    assert not np.tril(extra, -1).any()


@pytest.mark.parametrize("q_len, kv_len", [(40, 40), (23, 37), (37, 23)])
def test_blocks_that_lines_cross_are_brute_force(q_len, kv_len):
    rng = np.random.default_rng(q_len)
    columns = rng.random((1, 2, kv_len)) < 0.05
    diagonals = rng.random((1, 2, q_len + kv_len - 1)) < 0.05
    rule = vertical_slash.VerticalSlash(block_q=16, block_kv=8)
    got = vertical_slash.crossed(rule, jnp.asarray(columns), jnp.asarray(diagonals), q_len)
    q_at, kv_at = np.mgrid[:q_len, :kv_len]
    for head in range(2):
        seen = columns[0, head][kv_at] | diagonals[0, head][q_at - kv_at + kv_len - 1]
        want = [
            [seen[i : i + 16, j : j + 8].any() for j in range(0, kv_len, 8)]
            for i in range(0, q_len, 16)
        ]
        np.testing.assert_array_equal(got[0, head], want)


def test_search_gives_each_head_the_rule_it_is_built_from():
    q, k = stack(a_shape_head(), line_head(columns=(37, 90), distances=(70,)), block_head())
    blocks = {"block_q": BLOCK, "block_kv": BLOCK}
    candidates = (
        local.Local(window=32) | sinks.Sinks(tokens=4),
        vertical_slash.VerticalSlash(columns=2, diagonals=1, **blocks),
        pooled.Pooled(top_k=2, **blocks),
    )
    found = m_inference.search(q, k, candidates)
    assert found.heads == candidates
    assert found.looks_ahead
    assert not m_inference.MInference(heads=candidates[2:], **blocks).looks_ahead


def test_each_head_follows_its_rule():
    q, k, _ = rules.inputs(1, length=64)
    blocks = {"block_q": BLOCK, "block_kv": BLOCK}
    one, two = (pooled.Pooled(top_k=n, **blocks) for n in (1, 2))
    window = local.Local(window=20)
    mixed = m_inference.MInference(heads=(two, window, one, two), **blocks)
    kept = rules.chosen(mixed, q, k)
    np.testing.assert_array_equal(kept[:, ::3], rules.chosen(two, q, k)[:, ::3])
    np.testing.assert_array_equal(kept[:, 2], rules.chosen(one, q, k)[:, 2])
    assert ((kept[:, 1] > 0) == (rules.lowered(mixed, window, 64, 64) > 0)).all()


@pytest.mark.slow
def test_heads_of_all_kinds_are_the_masked_reference_with_its_gradients():
    q, k, v = rules.inputs(2, batch=1, length=60)
    blocks = {"block_q": BLOCK, "block_kv": BLOCK}
    shape = local.Local(window=20) | sinks.Sinks(tokens=4)
    few, more = (vertical_slash.VerticalSlash(columns=n, diagonals=n - 1, **blocks) for n in (1, 2))
    heads = (few, shape, pooled.Pooled(top_k=1, **blocks), more)
    mixed = m_inference.MInference(heads=heads, **blocks)
    alone = [
        rules.lowered(mixed, x, 60, 60)[None] if x is shape else rules.chosen(x, q, k)[:, head]
        for head, x in enumerate(heads)
    ]
    seen = rules.visible(mixed, np.stack(alone, 1), 60, 60)
    assert len({x.tobytes() for x in seen[0]}) == 4
    dout = np.random.default_rng(3).standard_normal(q.shape)

    def loss(q, k, v):
        out = mixed.attend(q, k, v, impl="reference")
        return (out * dout).sum(), out

    grads, out = jax.jit(
        jax.grad(loss, (0, 1, 2), has_aux=True), compiler_options=rules.COMPILER_OPTIONS
    )(q, k, v)
    want = oracle.attention(q, k, v, seen, dout, np.zeros(q.shape[:3]), scale=8**-0.5)
    np.testing.assert_allclose(out, want.out, atol=2e-5)
    for mine, theirs in zip(grads, (want.dq, want.dk, want.dv), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)


def test_rules_must_fit_each_other():
    with pytest.raises(ValueError, match="must be one or more patterns or selectors"):
        m_inference.MInference()
    with pytest.raises(ValueError, match=r"pooled\(block_q=256, top_k=1\) must have block_q=128"):
        m_inference.MInference(heads=(pooled.Pooled(top_k=1, block_q=256),))
    with pytest.raises(ValueError, match="must have a selector among them"):
        m_inference.search(*rules.inputs()[:2], (local.Local(window=2),))
