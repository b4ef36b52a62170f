import numpy as np
import pytest

from sparse_attn.patterns import axial, causal
from tests.patterns import on_grid

Axial = axial.Axial


def test_picture_of_a_row_a_column_and_both():
    row, column = Axial((4, 4), (1,)), Axial((4, 4), (0,))
    assert on_grid.seen_from(row, (1, 2)) == ["....", "##Q#", "....", "...."]
    assert on_grid.seen_from(column, (1, 2)) == ["..#.", "..Q.", "..#.", "..#."]
    assert on_grid.seen_from(row | column, (1, 2), (4, 4)) == ["..#.", "##Q#", "..#.", "..#."]


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 4)])
def test_union_of_all_axes_is_the_axial_mask(shape):
    pattern, size = Axial(shape, (0,)), int(np.prod(shape))
    for axis in range(1, len(shape)):
        pattern = pattern | Axial(shape, (axis,))
    want = on_grid.by_loop(shape, lambda q, k: sum(a != b for a, b in zip(q, k)) <= 1)
    np.testing.assert_array_equal(on_grid.dense(pattern, size), want)
    assert on_grid.pairs(pattern, size) == size * (sum(shape) - len(shape) + 1)


def test_two_layers_connect_all_positions():
    row, column = (on_grid.dense(Axial((5, 6), (a,)), 30).astype(int) for a in (1, 0))
    assert ((row @ column) > 0).all()
    assert not (row > 0).all()


def test_frames_and_time_of_a_video():
    inside, through = Axial((3, 2, 4), (1, 2)), Axial((3, 2, 4), (-3,))
    assert through.axes == (0,)
    np.testing.assert_array_equal(
        on_grid.dense(inside, 24), np.kron(np.eye(3, dtype=bool), np.ones((8, 8), bool))
    )
    np.testing.assert_array_equal(
        on_grid.dense(through, 24), np.kron(np.ones((3, 3), bool), np.eye(8, dtype=bool))
    )


def test_autoregressive_stack_sees_every_earlier_pixel_and_no_other():
    """Rows above as context, shifted by a row; masked row and column inside, shifted by a pixel."""
    height, width = 4, 5
    size = height * width

    def layer(pattern):
        return on_grid.dense(pattern, size).astype(int)

    row, column = Axial((height, width), (1,)), Axial((height, width), (0,))
    # Outer: whole rows, columns of earlier rows; then each row receives the row above it.
    above = np.eye(size, k=-width, dtype=int)
    context = above @ layer(column & causal.Causal()) @ layer(row)
    shifted = np.eye(size, k=-1, dtype=int)
    # A row's first pixel has no left neighbour in its row.
    shifted[::width] = 0
    inner = layer(row & causal.Causal()) @ shifted
    reach = (context + inner) > 0
    np.testing.assert_array_equal(reach, np.tri(size, k=-1, dtype=bool))


@pytest.mark.parametrize("axes", [(), (2,), (0, 0), (0, -2)])
def test_wrong_axes(axes):
    with pytest.raises(ValueError, match="must be different axes of shape="):
        Axial((4, 5), axes)
