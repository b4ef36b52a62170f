import itertools

import numpy as np
import pytest

from sparse_attn.masks import lower
from sparse_attn.parallel import balance
from sparse_attn.patterns import causal, full, global_tokens, local, per_head


def lowered(pattern, length=1024, block=64):
    return lower.lower(pattern, q_len=length, block_q=block, block_kv=block)


def test_zigzag_balances_a_causal_mask_exactly():
    mask = lowered(causal.Causal())
    # 16 rows of 1 .. 16 blocks on 4 ranks: the last has 13 + 14 + 15 + 16 of 136.
    assert balance.imbalance([mask], kind="text", ranks=4) == 58 / (136 / 4)
    assert balance.imbalance([mask], kind="zigzag", ranks=4) == 1.0
    assert balance.imbalance([mask], kind="balanced", ranks=4) == 1.0


def test_balanced_helps_where_zigzag_does_not():
    # Global tokens in the first rows see everything: half of the work is in one block.
    mask = lowered(local.Local(window=64) | global_tokens.GlobalTokens(tokens=64))
    kinds = {k: balance.imbalance([mask], kind=k, ranks=8) for k in balance.ORDERS}
    assert kinds["balanced"] == min(kinds.values())
    assert kinds["balanced"] < kinds["zigzag"]
    assert balance.imbalance([lowered(full.Full())], kind="text", ranks=8) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_assignment_is_near_the_best_one(seed):
    work = np.random.default_rng(seed).integers(1, 20, 8)
    held = balance.assign(work, ranks=2)
    assert sorted(held.ravel()) == list(range(8))
    best = min(max(sum(c), work.sum() - sum(c)) for c in itertools.combinations(work.tolist(), 4))
    assert work[held].sum(1).max() <= 4 / 3 * best


def test_heads_that_share_a_table_count_each():
    window = local.Local(window=64)
    heads = per_head.PerHead((window, causal.Causal(), causal.Causal(), causal.Causal()))
    expected = balance.costs(lowered(window)) + 3 * balance.costs(lowered(causal.Causal()))
    np.testing.assert_array_equal(balance.costs(lowered(heads)), expected / 4)


def test_layers_count_alike_whatever_the_masks_of_their_heads():
    window, dense = lowered(local.Local(window=64)), lowered(causal.Causal())
    heads = lowered(per_head.PerHead((causal.Causal(), local.Local(window=64))))
    loads = [
        (balance.costs(window) + 1.5 * balance.costs(dense) + balance.costs(window) / 2)
        .reshape(4, 4).sum(1)
    ]  # fmt: skip
    found = balance.imbalance([window, heads, dense], kind="text", ranks=4)
    assert found == pytest.approx(np.max(loads) / np.mean(loads))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'random' must be one of text, zigzag, balanced"):
        balance.order("random", [], ranks=2)
    with pytest.raises(ValueError, match="16 query blocks must be a multiple of the 3 ranks"):
        balance.order("balanced", [lowered(causal.Causal())], ranks=3)
    with pytest.raises(ValueError, match="16 query blocks must be a multiple of 6 chunks"):
        balance.imbalance([lowered(causal.Causal())], kind="zigzag", ranks=3)
