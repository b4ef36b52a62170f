import pytest

from sparse_attn import patterns
from sparse_attn.masks import stats
from sparse_attn.patterns import causal, local, per_head

WINDOW = local.Local(window=4)


def test_heads_cycle_through_the_patterns():
    heads = per_head.PerHead((causal.Causal(), WINDOW))
    assert heads.for_heads(4) == (causal.Causal(), WINDOW, causal.Causal(), WINDOW)
    with pytest.raises(ValueError, match="num_heads=3 must be a multiple of the 2 patterns"):
        heads.for_heads(3)


def test_causal_if_all_heads_are():
    assert per_head.PerHead((causal.Causal(), WINDOW)).causal
    assert not per_head.PerHead((causal.Causal(), ~WINDOW)).causal


def test_text_round_trip():
    text = "per_head((causal(), local(window=4) | sinks(tokens=1)))"
    heads = patterns.parse(text)
    assert heads.patterns[0] == causal.Causal()
    assert patterns.parse(heads.expression()) == heads


def test_counts_are_means_over_the_heads():
    heads = per_head.PerHead((causal.Causal(), WINDOW, WINDOW))
    both = [stats.of(p, q_len=64, block_q=16, block_kv=16) for p in (causal.Causal(), WINDOW)]
    got = stats.of(heads, q_len=64, block_q=16, block_kv=16)
    assert got.keys_per_row_mean == (64 * 65 // 2 + 2 * (10 + 60 * 4)) / 3 / 64
    assert got.active_blocks == (both[0].active_blocks + 2 * both[1].active_blocks) / 3
    assert (got.keys_per_row_min, got.keys_per_row_max) == (1, 64)
    assert got.imbalance == 4 / (got.active_blocks / 4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [(), ("local",), (per_head.PerHead((WINDOW,)),)])
def test_wrong_fields(wrong):
    with pytest.raises(ValueError, match="must be one or more patterns"):
        per_head.PerHead(wrong)
