import numpy as np
import pytest

from sparse_attn.patterns import full, joint, swin
from tests.patterns import on_grid

Joint = joint.Joint
WINDOWS = swin.Swin(shape=(4, 4), window_size=2)


def test_picture(draw):
    windows = swin.Swin(shape=(2, 2), window_size=(1, 2))
    assert draw(Joint(windows, tokens=2), 6, 6) == [
        "######",
        "######",
        "####..",
        "####..",
        "##..##",
        "##..##",
    ]
    assert draw(Joint(windows, tokens=2, sees="prefix"), 6, 6)[:3] == ["##....", "##....", "####.."]
    assert draw(Joint(windows, tokens=2, seen_by="prefix"), 6, 6) == [
        "######",
        "######",
        "..##..",
        "..##..",
        "....##",
        "....##",
    ]


@pytest.mark.parametrize("sees", ["everyone", "prefix"])
@pytest.mark.parametrize("seen_by", ["everyone", "prefix"])
def test_blocks_of_the_mask(sees, seen_by):
    mask = on_grid.dense(Joint(WINDOWS, tokens=5, sees=sees, seen_by=seen_by), 21)
    assert mask[:5, :5].all()
    assert (mask[:5, 5:] == (sees == "everyone")).all()
    assert (mask[5:, :5] == (seen_by == "everyone")).all()
    np.testing.assert_array_equal(mask[5:, 5:], on_grid.dense(WINDOWS, 16))


def test_anchors_and_windows_of_a_large_image():
    """Keys of a high-resolution query: its window and all low-resolution tokens."""
    pattern = Joint(swin.Swin((8, 8), 4), tokens=16, sees="prefix")
    keys = on_grid.dense(pattern, 80).sum(1)
    assert (keys[16:] == 4 * 4 + 16).all()
    assert (keys[:16] == 16).all()
    whole = Joint(swin.Swin((8, 8), 8), tokens=16)
    assert on_grid.dense(whole, 80).all()


def test_patches_do_not_depend_on_detection_tokens():
    pattern = Joint(swin.Swin((4, 6), 2, 1), tokens=3, seen_by="prefix")
    mask = on_grid.dense(pattern, 27)
    assert mask[:3].all()
    assert not mask[3:, :3].any()


def test_what_is_causal_and_what_may_be_empty():
    assert not Joint(full.Full(), tokens=1).causal
    assert not Joint(WINDOWS & ~WINDOWS, tokens=1).may_be_empty
    assert Joint(WINDOWS & ~WINDOWS, tokens=1, seen_by="prefix").may_be_empty


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tokens": 0}, "tokens=0 must be an int >= 1"),
        ({"tokens": 1, "sees": "all"}, "sees='all' must be one of 'everyone', 'prefix'"),
        ({"tokens": 1, "seen_by": "none"}, "seen_by='none' must be one of"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Joint(WINDOWS, **fields)
