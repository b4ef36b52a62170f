import numpy as np
import pytest

from sparse_attn.patterns import halo, local, swin
from tests.patterns import on_grid

Halo = halo.Halo


def test_picture_inside_and_at_the_corner():
    pattern = Halo(shape=(8, 8), block=2, halo=1)
    assert on_grid.seen_from(pattern, (2, 5)) == [
        "........",
        "...####.",
        "...##Q#.",
        "...####.",
        "...####.",
        "........",
        "........",
        "........",
    ]
    assert on_grid.seen_from(pattern, (0, 0))[:4] == [
        "Q##.....",
        "###.....",
        "###.....",
        "........",
    ]


def test_inside_keys_are_the_block_and_its_halo():
    mask = on_grid.dense(Halo((12, 12), block=4, halo=3), 144).reshape(12, 12, 144)
    assert (mask[4:8, 4:8].sum(-1) == (4 + 2 * 3) ** 2).all()
    assert mask[0, 0].sum() == (4 + 3) ** 2  # zero padding: nothing outside of the grid


def test_no_halo_is_window_attention():
    for shape in ((8, 8), (7, 10)):
        size = int(np.prod(shape))
        got = on_grid.dense(Halo(shape, block=4), size)
        np.testing.assert_array_equal(got, on_grid.dense(swin.Swin(shape, 4), size))


def test_blocks_of_one_are_windows_of_single_pixels():
    want = on_grid.by_loop((6, 7), lambda q, k: max(abs(q[0] - k[0]), abs(q[1] - k[1])) <= 2)
    np.testing.assert_array_equal(on_grid.dense(Halo((6, 7), block=1, halo=2), 42), want)


def test_one_axis_is_a_blocked_sliding_window():
    got = on_grid.dense(Halo((30,), block=1, halo=4, after=2), 30)
    np.testing.assert_array_equal(got, on_grid.dense(local.Local(reach=(4, 2)), 30))
    blocked = on_grid.by_loop((30,), lambda q, k: q[0] // 5 * 5 - 3 <= k[0] < q[0] // 5 * 5 + 8)
    np.testing.assert_array_equal(on_grid.dense(Halo((30,), block=5, halo=3), 30), blocked)


def test_unidirectional_blocks_see_left_above_and_above_left():
    pattern = halo.unidirectional((8, 8), 4)
    assert on_grid.seen_from(pattern, (5, 5)) == ["########"] * 5 + ["#####Q##"] + ["########"] * 2
    want = on_grid.by_loop(
        (8, 12), lambda q, k: q[0] // 4 - k[0] // 4 in (0, 1) and q[1] // 4 - k[1] // 4 in (0, 1)
    )
    np.testing.assert_array_equal(on_grid.dense(halo.unidirectional((8, 12), 4), 96), want)


def test_frame_diagonals_of_a_video():
    frames, tokens = 3, 10
    for pattern, rule in (
        (
            halo.frame_diagonal(frames, tokens, 2),
            lambda q, k: q[0] == k[0] and abs(q[1] - k[1]) <= 2,
        ),
        (halo.frame_multi_diagonal(frames, tokens, 1), lambda q, k: abs(q[1] - k[1]) <= 1),
    ):
        want = on_grid.by_loop((frames, tokens), rule)
        np.testing.assert_array_equal(on_grid.dense(pattern, 30), want)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"block": 0}, "block=0 must be an int >= 1"),
        ({"block": 2, "halo": -1}, "halo=-1 must be an int >= 0"),
        ({"block": 2, "halo": (1, 2, 3)}, "must have one entry per axis"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Halo(shape=(8, 8), **fields)
