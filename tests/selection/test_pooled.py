"""Pooled scores: means of ragged blocks, special tokens, planted matches of two views."""

import jax.numpy as jnp
import numpy as np

from sparse_attn.masks import block_mask
from sparse_attn.patterns import full, global_tokens
from sparse_attn.selection import pooled
from tests.selection import rules


def test_means_are_over_the_tokens_that_there_are():
    length, block = 20, 8
    q, k, _ = rules.inputs(length=length, heads=2, kv_heads=1)
    rule = pooled.Pooled(block_q=block, block_kv=block, top_k=1)
    means = [
        np.stack([np.asarray(x)[:, i : i + block].mean(1) for i in range(0, length, block)], 1)
        for x in (q, k)
    ]
    want = np.einsum("binh,bjh->bnij", means[0], means[1][:, :, 0]) / np.sqrt(8)
    blocks = rule._blocks(np.ones((3, 3), int), q, k, None, None)
    np.testing.assert_allclose(rule.scores(q, k, blocks), want, atol=1e-5)


def test_tokens_of_two_views_that_match_are_kept_and_special_ones_see_everything():
    # Two views of 8 blocks; block i of the one shows what block (3 i) % 8 of the other shows.
    matches = [(i, 8 + 3 * i % 8) for i in range(8)]
    pairs = [*matches, *((j, i) for i, j in matches)]
    q, k = rules.planted(512, block=32, pairs=pairs, heads=2)
    rule = pooled.Pooled(
        block_q=32, block_kv=32, pattern=full.Full(), top_k=2,
        always=global_tokens.GlobalTokens(tokens=5),
    )  # fmt: skip
    kept = rules.chosen(rule, q, k)[0] > 0
    assert kept[:, 0].all()
    assert kept[:, :, 0].all()
    found = np.mean([[kept[head, i, j] for i, j in pairs] for head in range(2)])
    assert found >= 0.95
    assert kept[:, 1:].mean() <= 0.25  # 75 % of the blocks are left out.


def test_choice_is_made_once_for_the_heads_of_a_kv_head():
    q, k, _ = rules.inputs(3, length=96)
    rule = pooled.Pooled(block_q=8, block_kv=8, top_k=2, tables="kv")
    mask = rules.select(rule, q, k)
    assert mask.num_tables == 2
    # Two heads that agree are followed, whatever the third and fourth say.
    q = q.at[:, :, 1].set(q[:, :, 0])
    one = rules.chosen(pooled.Pooled(block_q=8, block_kv=8, top_k=2), q, k)
    np.testing.assert_array_equal(rules.chosen(rule, q, k)[:, 0], one[:, 0])


def test_golden_choice():
    q, k = rules.planted(32, block=4, pairs=[(5, 1), (6, 3), (7, 0)])
    rule = pooled.Pooled(block_q=4, block_kv=4, top_p=0.5)
    grid = block_mask.block_states(rules.select(rule, q, k))
    rows = ["".join(".+#"[state] for state in row) for row in grid[5:]]
    assert rows == [".#...+..", "...#..+.", "#......+"]


def test_more_mass_keeps_more_blocks():
    q, k, _ = rules.inputs(4, length=128)
    kept = None
    for p in (0.2, 0.5, 0.9, 1.0):
        more = rules.chosen(pooled.Pooled(block_q=16, block_kv=16, top_p=p), q, k) > 0
        assert kept is None or (more | ~kept).all()
        kept = more
    assert jnp.all(jnp.asarray(kept[0, 0]) == np.tri(8, dtype=bool))
