import math

import numpy as np
import pytest

from sparse_attn.patterns import cross_grid
from tests.patterns import on_grid

CrossGrid = cross_grid.CrossGrid


def dense(pattern):
    return on_grid.dense(pattern, math.prod(pattern.shape), math.prod(pattern.key_shape))


def test_picture_of_pooled_and_of_finer_keys():
    pooled = dense(CrossGrid((4, 4), (2, 2)))
    assert [np.flatnonzero(row).tolist() for row in pooled[[0, 3, 6, 15]]] == [[0], [1], [1], [3]]
    finer = dense(CrossGrid((2, 2), (4, 4)))
    assert np.flatnonzero(finer[1]).tolist() == [2, 3, 6, 7]
    around = dense(CrossGrid((8, 8), (4, 4), reach=1))[9].reshape(4, 4).astype(int)  # (1, 1)
    np.testing.assert_array_equal(around, [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4])


@pytest.mark.parametrize("shape, keys, reach", [((6, 8), (3, 2), 1), ((4, 3), (9, 7), 0)])
def test_brute_force(shape, keys, reach):
    def rule(q, k):
        return all(
            q[a] * keys[a] // shape[a] - reach
            <= k[a]
            < math.ceil((q[a] + 1) * keys[a] / shape[a]) + reach
            for a in range(2)
        )

    want = on_grid.by_loop(shape, rule, keys)
    np.testing.assert_array_equal(dense(CrossGrid(shape, keys, reach)), want)


def test_super_tokens_have_at_most_nine_per_pixel():
    keys = dense(CrossGrid((12, 12), (4, 4), reach=1)).sum(1)
    assert keys.max() == 9
    assert keys.min() == 4


def test_regions_of_whole_cells_cover_each_fine_token_once():
    assert (dense(CrossGrid((3, 4), (9, 8))).sum(0) == 1).all()


def test_every_query_sees_every_pooled_key():
    mask = dense(CrossGrid((6, 6), (3, 2), reach=None))
    assert mask.shape == (36, 6)  # H * W / (k1 * k2) keys
    assert mask.all()


def test_equal_grids_and_no_reach_are_the_identity():
    np.testing.assert_array_equal(dense(CrossGrid((3, 4), (3, 4))), np.eye(12, dtype=bool))


def test_views_see_their_own_image():
    mask = dense(CrossGrid((3, 2), (3, 5), reach=(0, None)))
    np.testing.assert_array_equal(mask, np.kron(np.eye(3, dtype=bool), np.ones((2, 5), bool)))


def test_wrong_fields():
    with pytest.raises(ValueError, match="must have the axes of shape="):
        CrossGrid((4, 4), (4,))
    with pytest.raises(ValueError, match="reach=-1 must be an int >= 0"):
        CrossGrid((4, 4), (2, 2), reach=-1)
