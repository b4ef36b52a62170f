import math

import hypothesis
import numpy as np
from hypothesis import strategies as st

from sparse_attn.masks import grids, reorder
from sparse_attn.patterns import block_grid, circular, neighborhood

EMPTY, PARTIAL, FULL = 0, 1, 2


@st.composite
def dilated(draw):
    """A pattern of residue classes, and an order that brings the classes together."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    step = tuple(draw(st.integers(1, min(n, 4))) for n in shape)
    if draw(st.booleans()):
        kernel = tuple(draw(st.integers(1, n // d) | st.none()) for n, d in zip(shape, step))
        causal = tuple(draw(st.booleans()) for _ in shape)
        pattern = neighborhood.Neighborhood(shape, kernel, dilation=step, causal_axes=causal)
    else:
        cells = tuple(-(-n // d) for n, d in zip(shape, step))
        pattern = block_grid.BlockGrid(shape, grid=cells)
        step = tuple(pattern.period(axis) for axis in range(len(shape)))
    tile = draw(st.none() | st.tuples(*(st.integers(1, 4) for _ in shape)))
    axes = draw(st.none() | st.permutations(range(len(shape))).map(tuple))
    return pattern, reorder.Tiles(shape, tile, axes, step)


@hypothesis.settings(max_examples=80)
@hypothesis.given(case=dilated(), data=st.data())
def test_states_are_exact_where_residue_classes_stand_together(case, data):
    pattern, order = case
    assert pattern.exact_in(order)
    length = 2 * math.prod(pattern.shape)
    cuts = st.tuples(st.integers(0, length - 1), st.integers(1, length)).map(
        lambda x: (x[0], min(x[0] + x[1], length))
    )
    ranges = np.array(data.draw(st.lists(st.tuples(cuts, cuts), min_size=1, max_size=12)))
    (q_lo, q_hi), (kv_lo, kv_hi) = ranges.transpose(1, 2, 0)
    orders = order, order
    got = grids.state_of_places(pattern, orders, q_lo, q_hi, kv_lo, kv_hi)
    at = np.arange(length)
    mask = grids.mask_at(pattern, orders, at[:, None], at)
    for state, ((a, b), (c, d)) in zip(got, ranges):
        seen = mask[a:b, c:d]
        assert state == (FULL if seen.all() else PARTIAL if seen.any() else EMPTY)


def test_other_orders_and_patterns_do_not_claim_to_be_exact():
    groups = reorder.Tiles((8, 8), dilation=2)
    assert not circular.Circular((8, 8), 2).exact_in(groups)
    assert not neighborhood.Neighborhood((8, 8), 3).exact_in(groups)
    assert not neighborhood.Neighborhood((8, 8), 2, dilation=3).exact_in(groups)
    assert neighborhood.Neighborhood((8, 8), 2, dilation=3).exact_in(reorder.Tiles((8, 8), 4))
