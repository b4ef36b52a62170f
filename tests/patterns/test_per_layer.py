import pytest

from sparse_attn import patterns
from sparse_attn.patterns import causal, local, per_head, per_layer

WINDOW = local.Local(window=4)


def test_layers_cycle_through_the_entries():
    schedule = per_layer.PerLayer((WINDOW, WINDOW, causal.Causal()))
    assert [schedule.for_layer(i) == causal.Causal() for i in range(7)] == [
        False, False, True, False, False, True, False,
    ]  # fmt: skip


def test_entries_may_differ_by_head():
    schedule = patterns.parse("per_layer((per_head((causal(), local(window=4))), causal()))")
    assert schedule.for_layer(0) == per_head.PerHead((causal.Causal(), WINDOW))
    assert patterns.parse(schedule.expression()) == schedule
    assert schedule.causal
    assert not per_layer.PerLayer((causal.Causal(), ~WINDOW)).causal


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [(), ("local",)])
def test_wrong_fields(wrong):
    with pytest.raises(ValueError, match="must be one or more patterns, PerHeads or selectors"):
        per_layer.PerLayer(wrong)
