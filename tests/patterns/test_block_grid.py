import numpy as np
import pytest

from sparse_attn.patterns import block_grid
from tests.patterns import on_grid

BlockGrid = block_grid.BlockGrid


def test_picture_of_block_and_grid():
    assert on_grid.seen_from(BlockGrid((4, 4), block=2), (1, 2)) == ["..##", "..Q#", "....", "...."]
    assert on_grid.seen_from(BlockGrid((4, 4), grid=2), (1, 2)) == ["....", "#.Q.", "....", "#.#."]


def test_density_and_brute_force():
    height, width = 8, 12
    block, grid = BlockGrid((height, width), block=4), BlockGrid((height, width), grid=4)
    assert on_grid.pairs(block, 96) == on_grid.pairs(grid, 96) == 96 * 16
    want = on_grid.by_loop((8, 12), lambda q, k: q[0] % 2 == k[0] % 2 and q[1] % 3 == k[1] % 3)
    np.testing.assert_array_equal(on_grid.dense(grid, 96), want)


def test_one_pair_of_layers_connects_everything():
    block, grid = (
        on_grid.dense(p, 96).astype(int)
        for p in (BlockGrid((8, 12), block=(2, 3)), BlockGrid((8, 12), grid=4))
    )
    assert ((block @ grid) > 0).all()


def test_one_block_is_dense():
    assert on_grid.dense(BlockGrid((6, 5), block=(6, 5)), 30).all()
    assert on_grid.dense(BlockGrid((6, 5), grid=(6, 5)), 30).all()


def test_cells_that_do_not_divide_the_axis():
    mask = on_grid.dense(BlockGrid((10,), grid=4), 10)
    assert [np.flatnonzero(mask[q]).tolist() for q in (0, 1)] == [[0, 3, 6, 9], [1, 4, 7]]


def test_four_partitions_cover_the_grid_once_each():
    heads = block_grid.skate_former((8, 12), (4, 3), num_heads=8).for_heads(8)
    assert len(set(heads)) == 4
    for pattern in heads:
        mask = on_grid.dense(pattern, 96)
        groups = {tuple(np.flatnonzero(row)) for row in mask}
        assert sorted(t for group in groups for t in group) == list(range(96))
        assert all(len(group) == 12 for group in groups)
    with pytest.raises(ValueError, match="num_heads=6 must be a multiple of 4"):
        block_grid.skate_former((8, 12), (4, 3), num_heads=6)


@pytest.mark.parametrize("fields", [{}, {"block": 2, "grid": 2}, {"block": (2, None)}])
def test_each_axis_is_one_of_the_two(fields):
    with pytest.raises(ValueError, match="give exactly one of the two for axis"):
        BlockGrid((4, 4), **fields)
