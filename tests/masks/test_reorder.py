import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.masks import curves, reorder


@st.composite
def tiles(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    tile = draw(st.none() | st.tuples(*(st.integers(1, 5) for _ in shape)))
    axes = draw(st.none() | st.permutations(range(len(shape))).map(tuple))
    dilation = draw(st.none() | st.tuples(*(st.integers(1, 4) for _ in shape)))
    return "tiles", shape, tile, axes, dilation


SPECS = tiles() | st.sampled_from(
    [
        ("hilbert", (4, 4)),
        ("hilbert", (8, 8)),
        ("hilbert", (8, 24)),
        ("hilbert", (12, 8), 2),
        ("hilbert", (3, 5)),
    ]
)


def by_sorting(order):
    """The order that sorting by (remainders, tiles, offsets) gives: no arithmetic of places."""
    ndim = len(order.shape)
    at = np.indices(order.shape).reshape(ndim, -1)
    axes = range(ndim) if order.axes is None else order.axes
    step = np.array(order.dilation or (1,) * ndim)[:, None]
    side = np.array(order.tile or order.shape)[:, None]
    keys = []
    for values in (at % step, at // step // side, at // step % side):
        keys += [values[axis] for axis in axes]
    return np.lexsort(keys[::-1])


@hypothesis.settings(max_examples=150)
@hypothesis.given(spec=tiles())
def test_tiles_are_the_sorted_order(spec):
    order = reorder.make(spec)
    np.testing.assert_array_equal(order.forward, by_sorting(order))


@hypothesis.settings(max_examples=80)
@hypothesis.given(spec=SPECS)
def test_forward_and_inverse_are_permutations(spec):
    order = reorder.make(spec)
    at = np.arange(order.size)
    np.testing.assert_array_equal(np.sort(order.forward), at)
    np.testing.assert_array_equal(order.forward[order.inverse], at)
    np.testing.assert_array_equal(order.inverse[order.forward], at)
    assert order.forward.dtype == order.inverse.dtype == np.int32
    assert order.forward is order.forward  # one table, built once
    assert not order.forward.flags.writeable
    assert reorder.make(order.spec) == order
    assert hash(reorder.make(order.spec)) == hash(order)
    # The next grid of the sequence has the same order.
    np.testing.assert_array_equal(order.index(at + order.size), order.forward + order.size)


def members(span):
    """How many coordinates a span has, by counting them."""
    return sum((x - span.lo) % span.step < span.width for x in range(span.lo, span.hi))


@hypothesis.settings(max_examples=120)
@hypothesis.given(spec=SPECS, data=st.data())
def test_spans_hold_their_places_and_pieces_are_boxes(spec, data):
    order = reorder.make(spec)
    lo = data.draw(st.integers(0, 2 * order.size - 1))
    hi = data.draw(st.integers(lo + 1, 2 * order.size))
    coords = order.coords(np.arange(lo, hi))
    for at, span in zip(coords, order.spans(np.array([lo]), np.array([hi])), strict=True):
        in_class = (at - span.lo) % span.step < span.width
        assert ((at >= span.lo) & (at < span.hi) & in_class).all()
    if order.pieces_exact:
        starts, stops = order.pieces(np.array([lo]), np.array([hi]))
        places = []
        for start, stop in zip(starts[0], stops[0], strict=True):
            if start < stop:
                spans = order.spans(start, stop)
                assert math.prod(map(members, spans)) == stop - start
                places += range(start, stop)
        assert sorted(places) == list(range(lo, hi))


@pytest.mark.parametrize(
    "order",
    [
        reorder.Tiles((5, 7), (2, 3), (1, 0)),
        reorder.Tiles((7, 6), (2, 2), dilation=(2, 3)),
        curves.Hilbert((8, 16)),
    ],
    ids=lambda o: str(o.spec),
)
def test_coords_trace_and_agree(order):
    at = np.arange(2 * order.size, dtype=np.int32)
    for got, want in zip(jax.jit(order.coords)(at), order.coords(at), strict=True):
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, want)


def test_dilation_groups_are_the_strided_subgrids():
    order = reorder.Tiles((4, 6), dilation=(2, 3))
    grid = np.arange(24).reshape(4, 6)
    want = [grid[r::2, c::3].ravel() for r in range(2) for c in range(3)]
    np.testing.assert_array_equal(order.forward, np.concatenate(want))


def test_hilbert_walks_to_neighbours_and_keeps_squares_together():
    order = curves.Hilbert((16, 16))
    y, x = np.divmod(order.forward, 16)
    assert (abs(np.diff(y)) + abs(np.diff(x)) == 1).all()
    for side in (2, 4, 8):
        at = order.forward.reshape(-1, side * side)
        corners = {(a // 16 // side, a % 16 // side) for a in at[:, 0].tolist()}
        assert len(corners) == (16 // side) ** 2
        for y, x in zip(*np.divmod(at, 16)):
            assert np.ptp(y) == np.ptp(x) == side - 1


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_boxes_of_aligned_hilbert_blocks_are_tight(block):
    order = curves.Hilbert((32, 64))
    starts = np.arange(0, order.size, block)
    _, rows, cols = order.spans(starts, starts + block)
    np.testing.assert_array_equal((rows.hi - rows.lo) * (cols.hi - cols.lo), block)


@pytest.mark.parametrize("shape", [(1, 5), (2, 3), (5, 8), (9, 6), (7, 13), (16, 10)])
def test_gilbert_visits_every_token_by_short_steps(shape):
    order = curves.Gilbert(shape)
    np.testing.assert_array_equal(np.sort(order.forward), np.arange(order.size))
    np.testing.assert_array_equal(order.forward[order.inverse], np.arange(order.size))
    y, x = np.divmod(order.forward, shape[1])
    steps = abs(np.diff(y)) + abs(np.diff(x))
    assert steps.max() <= 2
    assert (steps > 1).sum() <= 1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: reorder.Tiles((4, 4), (2,)), "tile=.2,. must have one int per axis"),
        (lambda: reorder.Tiles((4, 4), (0, 2)), "tile=.0, 2. must be >= 1 along every axis"),
        (lambda: reorder.Tiles((4, 4), axes=(0, 0)), "axes=.0, 0. must be an order of .0, 1."),
        (lambda: reorder.Tiles((4, 0)), "shape=.4, 0. must be ints >= 1"),
        (lambda: reorder.Tiles((1 << 16, 1 << 16)), "must hold fewer than 2..31 tokens"),
        (lambda: curves.Hilbert((8, 8, 8)), "must have 2 axes"),
        (lambda: curves.Hilbert((8, 12), side=8), "side=8 must be a power of two that divides"),
        (lambda: reorder.make(("rows", (4, 4))), "must begin with one of 'tiles', 'hilbert'"),
        (lambda: reorder.make(("tiles", (4, 4), 1, None, None, 5)), "positional arguments"),
    ],
)
def test_wrong_orders(make, message):
    with pytest.raises(ValueError, match=message):
        make()
