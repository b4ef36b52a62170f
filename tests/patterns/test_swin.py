import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import attend as attend_lib
from sparse_attn.patterns import swin
from tests.patterns import exact, on_grid

Swin = swin.Swin


def test_picture_of_regular_and_shifted_windows():
    regular, shifted = swin.two_layers((8, 8), 4)
    assert on_grid.seen_from(regular, (1, 5))[:5] == [
        "....####",
        "....#Q##",
        "....####",
        "....####",
        "........",
    ]
    assert on_grid.seen_from(shifted, (2, 3)) == [
        "........",
        "........",
        "..#Q##..",
        "..####..",
        "..####..",
        "..####..",
        "........",
        "........",
    ]
    assert on_grid.seen_from(shifted, (0, 7)) == ["......#Q", "......##"] + ["........"] * 6


def rolled_windows(x, size, shift):
    """The paper's program: pad, roll, cut windows, mask regions; [tokens, tokens] visibility."""
    height, width = x.shape
    padded = np.full((-(-height // size) * size, -(-width // size) * size), -1)
    padded[:height, :width] = x
    rolled = np.roll(padded, (-shift, -shift), (0, 1))
    region = np.zeros_like(rolled)
    slices = [slice(0, -size), slice(-size, -shift), slice(-shift, None)]
    for i, rows in enumerate(slices):
        for j, cols in enumerate(slices):
            region[rows, cols] = 3 * i + j

    def windows(a):
        rows, cols = a.shape[0] // size, a.shape[1] // size
        return a.reshape(rows, size, cols, size).swapaxes(1, 2).reshape(-1, size * size)

    mask = np.zeros((x.size, x.size), bool)
    for tokens, regions in zip(windows(rolled), windows(region), strict=True):
        tokens, regions = tokens[tokens >= 0], regions[tokens >= 0]
        mask[np.ix_(tokens, tokens)] = regions[:, None] == regions
    return mask


@pytest.mark.parametrize("shape, size, shift", [((8, 12), 4, 2), ((9, 14), 4, 1), ((7, 7), 3, 1)])
def test_shifted_windows_are_roll_window_and_region_mask(shape, size, shift):
    want = rolled_windows(np.arange(np.prod(shape)).reshape(shape), size, shift)
    got = on_grid.dense(Swin(shape, size, shift), int(np.prod(shape)))
    np.testing.assert_array_equal(got, want)


def test_attention_in_windows_is_attention_under_the_mask():
    shape, size, length = (7, 10), 4, 70
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, length, 2, 8)).astype(np.float32)
    out = attend_lib.attend(*map(jnp.asarray, (q, k, v)), mask=Swin(shape, size, 2))
    allowed = rolled_windows(np.arange(length).reshape(shape), size, 2)
    np.testing.assert_allclose(out[0], exact.attention(q[0], k[0], v[0], allowed), atol=1e-5)


def test_density():
    assert on_grid.pairs(Swin((8, 12), 4), 96) == 96 * 16
    assert on_grid.pairs(Swin((4, 6, 6), (None, 3, 2)), 144) == 144 * 4 * 3 * 2


def test_a_window_of_the_grid_is_dense_and_is_not_shifted():
    assert on_grid.dense(Swin((6, 5), 7, 3), 30).all()
    assert on_grid.dense(Swin((6, 5), None), 30).all()


def test_style_swin_splits_the_heads():
    heads = swin.style_swin((8, 8), 4, num_heads=6).for_heads(6)
    assert heads[:3] == (Swin((8, 8), 4),) * 3
    assert heads[3:] == (Swin((8, 8), 4, 2),) * 3
    both = on_grid.dense(heads[0], 64) | on_grid.dense(heads[-1], 64)
    assert both[27].sum() == 16 + 16 - 4  # of token (3, 3): the windows share their corner
    with pytest.raises(ValueError, match="num_heads=3 must be even"):
        swin.style_swin((8, 8), 4, num_heads=3)


def test_rectangles_and_their_shift():
    wide, tall = swin.rectangles((8, 8), (2, 4), num_heads=2).patterns
    assert on_grid.pairs(wide, 64) == on_grid.pairs(tall, 64) == 64 * 8
    moved, _ = swin.rectangles((8, 8), (2, 4), num_heads=2, layer=1).patterns
    assert on_grid.seen_from(moved, (0, 0))[:2] == ["Q#......", "........"]
    # Both orientations and the shift connect everything in a few layers.
    step = np.zeros((64, 64), bool)
    for layer in (0, 1):
        for p in swin.rectangles((8, 8), (2, 4), 2, layer=layer).patterns:
            step |= on_grid.dense(p, 64)
    assert (np.linalg.matrix_power(step.astype(int), 5) > 0).all()


def test_half_windows_join_over_the_shifts():
    still, moved = (swin.half_windows((8, 8), (s, s)) for s in (0, 2))
    assert on_grid.pairs(still, 64) == 64 * 64 // 4
    reach = (on_grid.dense(still, 64) | on_grid.dense(moved, 64)).astype(int)
    assert ((reach @ reach @ reach) > 0).all()


def test_temporal_units_reach_further_with_every_second_layer():
    shape = (8, 4, 4)
    units = [
        on_grid.dense(swin.temporal_units(shape, 4, 3, shift=s), 128).reshape(8, 16, 8, 16)
        for s in (0, 2)
    ]
    frames = [u.any((1, 3)) for u in units]
    assert (frames[0].sum(1) == 4).all()
    assert ((frames[0].astype(int) @ frames[1]) > 0)[0].sum() > 4
    whole = swin.temporal_units((4, 3, 3), 4, 3)
    assert on_grid.dense(whole, 36).all()


def test_past_frames():
    want = on_grid.by_loop(
        (3, 4, 4), lambda q, k: k[0] <= q[0] and q[1] // 2 == k[1] // 2 and q[2] // 2 == k[2] // 2
    )
    np.testing.assert_array_equal(on_grid.dense(swin.past_frames((3, 4, 4), (2, 2)), 48), want)
    frames = on_grid.dense(swin.past_frames((3, 4, 4), (4, 4)), 48).reshape(3, 16, 3, 16)
    np.testing.assert_array_equal(frames.all((1, 3)), np.tri(3, dtype=bool))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"window_size": 0}, "window_size=0 must be an int >= 1"),
        ({"window_size": 4, "shift": 4}, "shift=4 must be < window_size=4, axis 0"),
        ({"window_size": 4, "shift": -1}, "shift=-1 must be an int >= 0"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Swin(shape=(8, 8), **fields)
