import numpy as np
import pytest

from sparse_attn.masks import block_mask, lower, stats
from sparse_attn.patterns import frame_tiles
from tests.patterns import on_grid

FrameTiles = frame_tiles.FrameTiles


def test_picture(draw):
    assert draw(FrameTiles(shape=(4, 2), references=2)) == [
        "########",
        "########",
        "##" + "##" + "##" + "..",
        "##" + "##" + "##" + "..",
        "########",
        "########",
        "##" + ".." + "##" + "##",
        "##" + ".." + "##" + "##",
    ]


@pytest.mark.parametrize("frames", [1, 4, 7, 12])
def test_density_is_the_closed_form(frames):
    for k in range(frames + 1):
        pattern = FrameTiles((frames, 3), k)
        want = frames * (2 * k + 1) - k * k - k
        assert on_grid.pairs(pattern, frames * 3) == 9 * want
        seen = np.eye(frames, dtype=bool)
        for reference in (i * frames // k for i in range(k)):
            seen[reference] = seen[:, reference] = True
        loop = np.kron(seen, np.ones((3, 3), bool))
        np.testing.assert_array_equal(on_grid.dense(pattern, frames * 3), loop)


def test_all_frames_as_references_are_dense():
    assert on_grid.dense(FrameTiles((5, 4), 5), 20).all()


def test_frames_of_whole_blocks_need_no_element_masks():
    mask = lower.lower(FrameTiles((6, 32), 2), q_len=192, block_q=32, block_kv=32)
    assert mask.kv_partial_counts.sum() == 0
    assert (block_mask.block_states(mask) > 0).sum() == 6 * 5 - 4 - 2


def test_cost_is_linear_in_the_frames():
    pairs = [
        stats.of(FrameTiles((f, 8), 2), q_len=8 * f, block_q=8, block_kv=8).active_blocks
        for f in (16, 32, 64)
    ]
    assert pairs[2] - pairs[1] == 2 * (pairs[1] - pairs[0])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"shape": (5,), "references": 1}, "must be .frames, tokens per frame"),
        ({"shape": (5, 2), "references": 6}, "references=6 must be an int >= 0 and <= 5"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        FrameTiles(**fields)
