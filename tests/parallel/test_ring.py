import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparse_attn.parallel import ring


def follow(route, ranks):
    """Runs a route on part numbers: what each rank uses at each step, and what came home."""
    before = list(range(ranks))
    used, home = {}, np.zeros((ranks, ranks), int)  # home[owner, user]
    carried = [set() for _ in range(ranks)]
    for step in route.steps:
        if step:
            sent = [(before, pair) for pair in route.relayed[step]]
            sent += [(range(ranks), pair) for pair in route.direct[step]]
            assert len({pair[1] for _, pair in sent}) == len(sent)  # One sender each.
            now = {to: parts[source] for parts, (source, to) in sent}
            chains = {to: carried[source] for source, to in route.relayed[step] if step > 1}
            before = [now.get(r) for r in range(ranks)]
            carried = [chains.get(r, set()) | ({r} if r in now else set()) for r in range(ranks)]
        used |= {(r, before[r]): step for r in range(ranks) if before[r] is not None}
        for source, owner in route.home[step] if step else ():
            assert before[source] == owner
            home[owner, list(carried[source])] += 1
    return used, home


@given(hnp.arrays(bool, st.integers(1, 7).map(lambda n: (n, n))))
def test_every_pair_is_served_once_and_its_gradient_comes_home_once(pairs):
    ranks = len(pairs)
    route = ring.Route(pairs)
    used, home = follow(route, ranks)
    away = pairs & ~np.eye(ranks, dtype=bool)
    needed = {(r, c) for r, c in np.argwhere(away).tolist()}
    assert {pair for pair in used if pair[0] != pair[1]} == needed
    np.testing.assert_array_equal(home, away.T)
    moves = sum(len(route.relayed[s]) + len(route.direct[s]) for s in route.steps if s)
    assert moves == away.sum()


def test_a_sink_is_handed_on_from_neighbour_to_neighbour():
    pairs = np.eye(4, dtype=bool)
    pairs[:, 0] = True
    route = ring.Route(pairs)
    assert route.relayed[1:] == [((0, 1),), ((1, 2),), ((2, 3),)]
    assert not any(route.direct)
    assert route.home[1:] == [(), (), ((3, 0),)]  # One journey home, with the gradients of all.


def test_a_stride_comes_straight_from_the_owner():
    pairs = np.eye(6, dtype=bool) | np.eye(6, k=-2, dtype=bool)
    route = ring.Route(pairs)
    assert route.steps == [0, 2]
    assert route.relayed[2] == ()
    assert route.direct[2] == ((0, 2), (1, 3), (2, 4), (3, 5))


def test_dense_attention_is_the_usual_ring():
    route = ring.Route(np.ones((4, 4), bool))
    around = ((3, 0), (0, 1), (1, 2), (2, 3))
    assert route.relayed[1:] == [around] * 3
    assert not any(route.direct)
    assert sorted(route.home[3]) == sorted(around)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_visible_is_nothing_to_send(ranks):
    route = ring.Route(np.zeros((ranks, ranks), bool))
    assert route.steps == [0]
    assert not any((*route.relayed, *route.direct, *route.home))
