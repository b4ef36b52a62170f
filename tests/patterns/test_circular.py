import numpy as np
import pytest

from sparse_attn.masks import lower, stats
from sparse_attn.patterns import axial, circular, joint
from tests.patterns import on_grid

Circular = circular.Circular


def test_picture_of_a_disc():
    assert on_grid.seen_from(Circular((8, 8), 3), (3, 4)) == [
        "....#...",
        "..#####.",
        "..#####.",
        ".###Q###",
        "..#####.",
        "..#####.",
        "....#...",
        "........",
    ]
    assert on_grid.seen_from(Circular((4, 4), 1), (0, 0)) == ["Q#..", "#...", "....", "...."]


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 5])
def test_inside_keys_are_the_lattice_points_of_the_disc(radius):
    side = 2 * radius + 1
    keys = on_grid.dense(Circular((side, side), radius), side * side).sum(1)[side * side // 2]
    offsets = range(-radius, radius + 1)
    assert keys == sum(y * y + x * x <= radius**2 for y in offsets for x in offsets)


def test_radius_of_the_diagonal_is_dense():
    assert on_grid.dense(Circular((4, 5), 5), 20).all()
    assert not on_grid.dense(Circular((4, 5), 4), 20).all()


def test_text_in_front_sees_and_is_seen_by_all():
    mask = on_grid.dense(joint.Joint(Circular((5, 6), 2), tokens=7), 37)
    assert mask[:7].all()
    assert mask[:, :7].all()
    np.testing.assert_array_equal(mask[7:, 7:], on_grid.dense(Circular((5, 6), 2), 30))


def test_discs_inside_the_frames_of_a_video():
    pattern = Circular((3, 4, 5), 2) & axial.Axial((3, 4, 5), (1, 2))
    want = np.kron(np.eye(3, dtype=bool), on_grid.dense(Circular((4, 5), 2), 20))
    np.testing.assert_array_equal(on_grid.dense(pattern, 60), want)


def test_a_million_tokens_are_lowered_exactly():
    pattern = Circular((1024, 1024), 8)
    mask = lower.lower(pattern, q_len=1 << 20)
    inside = sum(y * y + x * x <= 64 for y in range(-8, 9) for x in range(-8, 9))
    row = stats.keys_per_row(lower.lower(Circular((64, 64), 8), q_len=4096))
    assert row.reshape(64, 64)[8:-8, 8:-8].tolist() == [[inside] * 48] * 48
    # A line of 1024 is 8 blocks. Of the 17 lines, those 8 away meet the disc in one point.
    assert int(mask.kv_counts[0, 0, 8 * 500 + 3]) == 15 * 3 + 2


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"radius": -1}, "radius=-1 must be an int >= 0"),
        ({"radius": 2, "shape": (20000, 2)}, "must be an int >= 1 and <= 16384"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Circular(**{"shape": (4, 4), **fields})
