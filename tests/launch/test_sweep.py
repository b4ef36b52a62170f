import pytest

from sparse_attn.launch import sweep


def test_product_takes_every_combination_last_fastest():
    points = sweep.product(sweep.over("a", [1, 2]), sweep.over("b", "xyz"), sweep.fixed("c", None))
    assert [(p["a"], p["b"]) for p in points] == [(a, b) for a in (1, 2) for b in "xyz"]
    assert all(p["c"] is None for p in points)


def test_product_of_nothing_is_one_empty_point():
    assert sweep.product() == [{}]
    assert sweep.product(sweep.over("a", []), sweep.over("b", [1])) == []


def test_zipit_pairs_in_order():
    points = sweep.zipit(sweep.over("a", [1, 2]), sweep.over("b", [3, 4]))
    assert points == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]


def test_zipit_names_the_lengths():
    with pytest.raises(ValueError, match=r"lengths=\[2, 3\] must all be equal"):
        sweep.zipit(sweep.over("a", [1, 2]), sweep.over("b", [1, 2, 3]))


def test_chain_keeps_order_and_repeats():
    assert sweep.chain(sweep.over("a", [2]), sweep.over("a", [1, 2])) == [
        {"a": 2},
        {"a": 1},
        {"a": 2},
    ]


@pytest.mark.parametrize("combine", [sweep.product, sweep.zipit])
def test_one_key_is_set_once(combine):
    with pytest.raises(ValueError, match="key='a' must be set by one sweep only"):
        combine(sweep.over("a", [1]), sweep.over("a", [2]))


def test_combinators_nest_and_take_generators():
    inner = sweep.zipit(sweep.over("a", iter([1, 2])), sweep.over("b", iter([3, 4])))
    points = sweep.chain(sweep.product(inner, sweep.over("c", range(2))), (p for p in [{}]))
    assert len(points) == 5
    assert points[1] == {"a": 1, "b": 3, "c": 1}
    assert points[-1] == {}
