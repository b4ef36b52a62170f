import numpy as np
import pytest

from sparse_attn.patterns import dilated, local


def test_picture(draw):
    assert draw(dilated.Dilated(window=3, dilation=2)) == [
        "#.......",
        ".#......",
        "#.#.....",
        ".#.#....",
        "#.#.#...",
        ".#.#.#..",
        "..#.#.#.",
        "...#.#.#",
    ]


def test_dilation_1_is_a_window(draw):
    assert draw(dilated.Dilated(window=3, dilation=1)) == draw(local.Local(window=3))


def test_pairs(pairs):
    for length, window, dilation in ((100, 5, 7), (100, 40, 9), (64, 1, 3)):
        want = sum(max(0, length - j * dilation) for j in range(window))
        assert pairs(dilated.Dilated(window=window, dilation=dilation), length) == want


def test_a_late_position_does_not_overflow():
    pattern = dilated.Dilated(window=2**15, dilation=2**15)
    late = np.int32(2**31 - 1)
    back = np.array([0, 1, 2**15, 2**30 - 2**15, 2**30], np.int32)
    assert pattern.mask_fn(late, late - back).tolist() == [True, False, True, True, False]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"window": 0, "dilation": 2}, "window=0 must be an int >= 1"),
        ({"window": 2, "dilation": 0}, "dilation=0 must be an int >= 1"),
        ({"window": 2**20, "dilation": 2**20}, r"\(window - 1\) \* dilation=.* must be .* <= 2147"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        dilated.Dilated(**fields)
