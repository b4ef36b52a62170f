import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.masks import curves, lower, reorder, stats
from sparse_attn.patterns import (
    axial,
    block_grid,
    causal,
    circular,
    frame_tiles,
    halo,
    joint,
    local,
    neighborhood,
    per_head,
    permuted,
    radial,
    swin,
)
from tests.patterns import on_grid

PATTERNS = (
    neighborhood.Neighborhood((6, 8), (3, 5)),
    neighborhood.Neighborhood((6, 8), 2, stride=2, dilation=(3, 2)),
    swin.Swin((6, 8), 4, 2),
    halo.Halo((6, 8), 3, 1),
    axial.Axial((6, 8), (0,)),
    block_grid.BlockGrid((6, 8), grid=(3, 2)),
    circular.Circular((6, 8), 2),
    radial.Radial((6, 8)),
    frame_tiles.FrameTiles((6, 8), 2),
    local.Local(window=9),
    causal.Causal() & neighborhood.Neighborhood((6, 8), 3),
    ~(local.Local(window=5) | swin.Swin((6, 8), 2)),
)
ORDERS = (
    reorder.Tiles((6, 8), (2, 4)),
    reorder.Tiles((6, 8), (4, 3), (1, 0)),
    reorder.Tiles((6, 8), axes=(1, 0)),
    reorder.Tiles((6, 8), (2, 2), dilation=(3, 2)),
    reorder.Tiles((6, 8), (3, 3), dilation=(4, 3)),
    curves.Hilbert((6, 8)),
)


@hypothesis.settings(max_examples=50)
@hypothesis.given(
    pattern=st.sampled_from(PATTERNS),
    order=st.sampled_from(ORDERS),
    block_q=st.integers(1, 24),
    block_kv=st.integers(1, 24),
    grids=st.integers(1, 2),
)
def test_mask_and_blocks_are_those_of_the_permuted_mask(pattern, order, block_q, block_kv, grids):
    size = grids * 48
    at = np.concatenate([order.forward + 48 * i for i in range(grids)])
    want = on_grid.dense(pattern, size)[np.ix_(at, at)]
    moved = permuted.permute(pattern, order)
    np.testing.assert_array_equal(on_grid.dense(moved, size), want)
    mask = lower.lower(moved, q_len=size, block_q=block_q, block_kv=block_kv)
    np.testing.assert_array_equal(stats.keys_per_row(mask), want.sum(1))
    starts = [np.arange(0, size, b) for b in (block_q, block_kv)]
    visible = np.add.reduceat(np.add.reduceat(want.astype(int), starts[0], 0), starts[1], 1)
    assert mask.kv_counts.sum() == (visible > 0).sum()


def test_windows_become_blocks_of_the_diagonal():
    moved = permuted.permute(swin.Swin((4, 4), 2), reorder.Tiles((4, 4), (2, 2)))
    lines = ["".join("#" if x else "." for x in row) for row in on_grid.dense(moved, 16)]
    assert lines[:8] == ["####............"] * 4 + ["....####........"] * 4


def test_permute_enters_heads_and_prefix():
    order = reorder.Tiles((4, 4), (2, 2))
    heads = per_head.PerHead((swin.Swin((4, 4), 2), causal.Causal()))
    moved = permuted.permute(heads, order)
    assert [type(p.pattern).__name__ for p in moved.patterns] == ["Swin", "Causal"]
    front = joint.Joint(swin.Swin((4, 4), 2), tokens=3)
    at = np.concatenate([np.arange(3), 3 + order.forward])
    want = on_grid.dense(front, 19)[np.ix_(at, at)]
    np.testing.assert_array_equal(on_grid.dense(permuted.permute(front, order), 19), want)


def ratio(pattern, order, block):
    """Pairs in active blocks for each visible pair, of which a query has its kernel's."""
    size, ndim = int(np.prod(pattern.shape)), len(pattern.shape)
    kernel = pattern.kernel_size
    visible = size * np.prod(kernel if isinstance(kernel, tuple) else (kernel,) * ndim)
    moved = permuted.permute(pattern, order)
    mask = lower.lower(moved, q_len=size, block_q=block, block_kv=block)
    return mask.kv_counts.sum() * block * block / visible


@pytest.mark.parametrize(
    "shape, kernel, tile, block, most",
    [
        ((128, 128), 17, (8, 8), 64, 2.0),
        ((128, 128), 33, (8, 8), 64, 1.5),
        ((128, 128), 33, (16, 8), 128, 1.8),
        ((16, 48, 64), (9, 17, 17), (4, 4, 4), 64, 1.85),
        ((32, 48, 64), (17, 17, 17), (8, 4, 4), 128, 1.98),
    ],
)
def test_tiles_bring_executed_pairs_below_twice_the_visible_ones(shape, kernel, tile, block, most):
    pattern = neighborhood.Neighborhood(shape, kernel)
    assert ratio(pattern, reorder.Tiles(shape, tile), block) < most
    assert ratio(pattern, reorder.Tiles(shape), block) > 1.2 * most


def test_small_windows_come_near_the_bound_of_square_query_blocks():
    """64 queries in a square see (8 + 12)**2 keys together: 2.4 times what one of them sees."""
    pattern = neighborhood.Neighborhood((128, 128), 13)
    assert ratio(pattern, reorder.Tiles((128, 128)), 64) > 9
    assert (20 / 13) ** 2 < 3.2  # keys of the union to keys of one, and whole tiles around it
    for order in (reorder.Tiles((128, 128), (8, 8)), curves.Hilbert((128, 128))):
        assert ratio(pattern, order, 64) < 3.2


def test_dilated_neighbourhoods_are_dense_blocks_in_group_order():
    pattern = neighborhood.Neighborhood((64, 64), 9, dilation=4)
    plain = ratio(pattern, reorder.Tiles((64, 64), (8, 8)), 64)
    assert ratio(pattern, reorder.Tiles((64, 64), (4, 4), dilation=(4, 4)), 16) < 3
    assert ratio(pattern, reorder.Tiles((64, 64), (8, 8), dilation=(4, 4)), 64) < plain / 6


def test_hilbert_order_has_fewer_blocks_than_raster_order_for_windows_and_anchors():
    pattern = joint.Joint(swin.Swin((32, 32), 8), tokens=64)
    blocks = [
        stats.of(p, q_len=64 + 1024, block_q=64, block_kv=64).active_blocks
        for p in (pattern, permuted.permute(pattern, curves.Hilbert((32, 32))))
    ]
    assert blocks[1] == 16 + 16 + 17  # one block per window, and the row and column of anchors
    assert blocks[0] > 1.5 * blocks[1]


@pytest.mark.parametrize(
    "shape, kernel, tile",
    [((1024, 1024), (13, 13), (8, 16)), ((128, 96, 80), (5, 7, 7), (4, 4, 8))],
    ids=["2d", "3d"],
)
def test_a_million_tokens_are_lowered_in_tiles(shape, kernel, tile):
    pattern = neighborhood.Neighborhood(shape, kernel)
    moved = permuted.permute(pattern, reorder.Tiles(shape, tile))
    start = time.process_time()
    mask = lower.lower(moved, q_len=int(np.prod(shape)))
    assert time.process_time() - start < 5  # 0.1 to 0.4 s alone; machines are shared
    # A tile is a block here, so its neighbours are a box of tiles around it, but at borders.
    rows = [t // n for t, n in zip(shape, tile)]
    inner = np.ravel_multi_index([r // 2 for r in rows], rows)
    around = [2 * -(-(k // 2) // t) + 1 for k, t in zip(kernel, tile)]
    assert int(mask.kv_counts[0, 0, inner]) == np.prod(around)


@pytest.mark.parametrize(
    "pattern, order, message",
    [
        (swin.Swin((4, 4), 2), reorder.Tiles((4, 5)), "must have the shape of Swin"),
        (swin.Swin((4, 4), 2), curves.Gilbert((4, 4)), "has no closed form"),
        (swin.Swin((4, 4), 2), ("spiral", (4, 4)), "must begin with one of 'tiles'"),
    ],
)
def test_wrong_fields(pattern, order, message):
    with pytest.raises(ValueError, match=message):
        permuted.Permuted(pattern, order)
