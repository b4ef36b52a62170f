"""The workloads of the GPU benchmark that are not patterns of the library."""

import numpy as np

from experiments.kernels import gpu_workloads


def test_the_tiled_neighbourhood_is_a_neighbourhood_and_its_blocks_hold_it():
    side, reach = 32, 6
    pattern = gpu_workloads.TiledNeighbourhood(side=side, reach=reach)
    position = np.arange(side**2, dtype=np.int32)
    near = np.abs(np.subtract.outer(np.arange(side), np.arange(side))) <= reach
    grid = np.einsum("ij,kl->ikjl", near, near).reshape(side**2, side**2)
    # Where the tokens lie: the second and third tile of keys are the first two of queries.
    tile, inside = position // 64, position % 64
    row, col = tile // 4 * 8 + inside // 8, tile % 4 * 8 + inside % 8
    q_place, kv_place = row * side + col, row * side + (col - 8) % side
    visible = pattern.mask_fn(position[:, None], position[None])
    np.testing.assert_array_equal(visible, grid[np.ix_(q_place, kv_place)])
    mask = pattern.lowered()
    blocks = visible.reshape(8, 128, 8, 128).any((1, 3))
    for at, wanted in enumerate(blocks):
        start, count = mask.kv_starts[0, 0, at], mask.kv_counts[0, 0, at]
        assert set(np.nonzero(wanted)[0]) <= set(mask.kv_indices[0, 0, start : start + count])
    # Two tiles of queries inside the grid see four columns of tiles, which are two blocks.
    assert mask.kv_counts.max() == 6
