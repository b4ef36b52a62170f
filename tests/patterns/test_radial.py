import math

import numpy as np
import pytest

from sparse_attn.masks import stats
from sparse_attn.patterns import radial
from tests.patterns import on_grid

Radial = radial.Radial


def rule(tokens, sinks):
    """The equation of the paper, in real numbers."""

    def seen(q, k):
        distance = abs(q[0] - k[0])
        octave = 2 ** math.floor(math.log2(max(distance, 1)))
        band = octave <= tokens and abs(q[1] - k[1]) + 1 <= tokens / octave
        kept = distance % math.ceil(octave / tokens) == 0 and q[1] == k[1]
        return band or kept or k[0] < sinks

    return seen


@pytest.mark.parametrize("shape, sinks", [((9, 6), 1), ((20, 3), 0), ((33, 1), 2), ((2, 8), 1)])
def test_mask_is_the_equation(shape, sinks):
    got = on_grid.dense(Radial(shape, sinks), shape[0] * shape[1])
    np.testing.assert_array_equal(got, on_grid.by_loop(shape, rule(shape[1], sinks)))


def test_picture_of_one_query():
    assert on_grid.seen_from(Radial((8, 8), sink_frames=0), (0, 3)) == [
        "###Q####",
        "########",
        "#######.",
        "#######.",
        "..###...",
        "..###...",
        "..###...",
        "..###...",
    ]
    assert on_grid.seen_from(Radial((8, 4)), (7, 0)) == [
        "####",  # the sink
        "#...",
        "#...",
        "#...",
        "##..",
        "##..",
        "####",
        "Q###",
    ]


def test_one_frame_is_dense():
    assert on_grid.dense(Radial((1, 40)), 40).all()


def test_symmetric_apart_from_the_sink():
    mask = on_grid.dense(Radial((9, 6), sink_frames=0), 54)
    np.testing.assert_array_equal(mask, mask.T)


def test_pairs_grow_as_n_log_n():
    """Keys per query over log2(frames) stay within a narrow band, where dense ones double."""
    tokens = 16
    keys = [
        stats.of(Radial((frames, tokens), 0), q_len=frames * tokens).keys_per_row_mean
        for frames in (16, 32, 64, 128)
    ]
    per_octave = [k / math.log2(f) for k, f in zip(keys, (16, 32, 64, 128))]
    assert max(per_octave) / min(per_octave) < 1.25
    assert keys[-1] / keys[0] < 2.2  # against 8 times the tokens


def test_blocks_hold_every_visible_pair_and_their_overhead_is_known():
    counted = stats.of(Radial((12, 64)), q_len=768)
    assert counted.token_density < counted.block_density <= 1
    assert counted.keys_per_row_min > 0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"shape": (4, 4, 4)}, "must be .frames, tokens per frame."),
        ({"shape": (4, 4), "sink_frames": -1}, "sink_frames=-1 must be an int >= 0"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Radial(**fields)
