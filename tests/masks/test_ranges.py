import numpy as np

from sparse_attn.masks import ranges, reorder


def test_aligned_and_other_ranges_are_told_apart_alike(monkeypatch):
    lo = np.array([8, 0, 8, 16, 0])
    hi = np.minimum(lo + 8, 20)
    found = ranges.different_ranges(lo, hi)
    monkeypatch.setattr(ranges, "_MANY", 0)  # By sorting, as ranges of any other kind.
    for a, b in zip(found, ranges.different_ranges(lo, hi)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(found[1][found[2]], hi)


def test_pieces_hold_every_place_of_a_range_once():
    order = reorder.Tiles((6, 10), (4, 4), dilation=(1, 2))
    lo, hi = np.array([3, 0, 17, 3]), np.array([41, 60, 18, 41])
    found = ranges.Ranges(order, lo, hi)
    assert len(found.lo) == 3
    np.testing.assert_array_equal(found.is_box(), [False, True, True, False])
    pieces = found.pieces(found.which)
    places = np.zeros(4, int)
    for i in range(pieces.count):
        volume = 1
        for span in pieces.boxes(i, pieces.which):
            runs, rest = np.divmod(np.asarray(span.hi) - span.lo, span.step)
            volume = volume * (runs * span.width + np.minimum(rest, span.width))
        places += np.where(pieces.there[i][pieces.which], volume, 0)
    np.testing.assert_array_equal(places, hi - lo)
