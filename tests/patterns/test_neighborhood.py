import itertools
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.masks import block_mask, lower, stats
from sparse_attn.patterns import neighborhood
from tests.patterns import on_grid

Neighborhood = neighborhood.Neighborhood


def nearest_keys(length, kernel, stride, dilation, causal):
    """Keys of each query along one axis, by search: written from NATTEN's documentation.

    Tokens of one residue modulo the dilation form a sequence of their own. A stride group is
    `stride` consecutive queries of it. Without causality the group's middle query (the right one of
    two, the last one of a cut group) picks, of all runs of `kernel` tokens that fit, the one whose
    centre is nearest. With causality its last query sees itself and `kernel - 1` tokens before it;
    the others see what of these is not after themselves.
    """
    keys = [set() for _ in range(length)]
    for residue in range(dilation):
        tokens = list(range(residue, length, dilation))
        for group in (tokens[i : i + stride] for i in range(0, len(tokens), stride)):
            if causal:
                last = tokens.index(group[-1]) if len(group) == stride else len(tokens) - 1
                for q in group:
                    first = max(0, last - kernel + 1)
                    keys[q] = {t for t in tokens[first:] if t <= q}
                continue
            middle = tokens.index(group[min(stride // 2, len(group) - 1)])
            runs = range(len(tokens) - kernel + 1)
            # An even run has its centre right of the middle: one key more before than after.
            first = min(runs, key=lambda run: abs(run + kernel // 2 - middle))
            for q in group:
                keys[q] = set(tokens[first : first + kernel])
    return keys


@st.composite
def axes(draw, most=24):
    length = draw(st.integers(1, most))
    dilation = draw(st.integers(1, min(4, length)))
    kernel = draw(st.integers(1, length // dilation))
    return length, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans())


@hypothesis.settings(max_examples=300)
@hypothesis.given(axis=axes(most=40))
def test_one_axis_is_the_documented_rule(axis):
    length, kernel, stride, dilation, causal = axis
    got = on_grid.dense(Neighborhood((length,), kernel, stride, dilation, causal), length)
    want = [[k in keys for k in range(length)] for keys in nearest_keys(*axis)]
    np.testing.assert_array_equal(got, want)
    if not causal:
        assert (got.sum(1) == kernel).all()


@hypothesis.settings(max_examples=40)
@hypothesis.given(grid=st.lists(axes(most=6), min_size=2, max_size=3))
def test_more_axes_are_the_product(grid):
    shape, kernel, stride, dilation, causal = (tuple(x) for x in zip(*grid))
    pattern = Neighborhood(shape, kernel, stride, dilation, causal)
    size = int(np.prod(shape))
    keys = [nearest_keys(*axis) for axis in grid]
    want = on_grid.by_loop(shape, lambda q, k: all(k[a] in keys[a][q[a]] for a in range(len(q))))
    np.testing.assert_array_equal(on_grid.dense(pattern, size), want)
    mask = lower.lower(pattern, q_len=size, block_q=5, block_kv=7)
    np.testing.assert_array_equal(stats.keys_per_row(mask), want.sum(1))


def test_picture_of_corner_edge_and_inside():
    pattern = Neighborhood(shape=(4, 4), kernel_size=3)
    assert on_grid.seen_from(pattern, (0, 0)) == ["Q##.", "###.", "###.", "...."]
    assert on_grid.seen_from(pattern, (1, 3)) == [".###", ".##Q", ".###", "...."]
    assert on_grid.seen_from(pattern, (2, 1)) == ["....", "###.", "#Q#.", "###."]


def test_picture_of_stride_dilation_and_causality():
    strided = Neighborhood(shape=(1, 8), kernel_size=(1, 4), stride=(1, 4))
    assert on_grid.seen_from(strided, (0, 3)) == ["###Q...."]
    assert on_grid.seen_from(strided, (0, 4)) == ["....Q###"]
    dilated = Neighborhood(shape=(4, 8), kernel_size=2, dilation=2)
    assert on_grid.seen_from(dilated, (3, 5)) == ["........", "...#.#..", "........", "...#.Q.."]
    causal = Neighborhood(shape=(4, 4), kernel_size=(2, 3), causal_axes=(True, False))
    assert on_grid.seen_from(causal, (2, 2)) == ["....", ".###", ".#Q#", "...."]
    assert not causal.causal
    assert Neighborhood(shape=(4, 4), kernel_size=3, causal_axes=True).causal


def test_density_is_the_kernel_over_the_grid():
    for shape, kernel, more in (
        ((16, 20), (5, 4), {}),
        ((16, 20), (5, 4), {"dilation": (3, 2)}),
        ((8, 6, 10), (3, 6, 5), {"stride": (2, 3, 5)}),
    ):
        size = int(np.prod(shape))
        assert on_grid.pairs(Neighborhood(shape, kernel, **more), size) == size * np.prod(kernel)


def test_kernel_of_the_whole_grid_is_dense():
    for kernel in ((6, 7), None, (None, 7)):
        assert on_grid.dense(Neighborhood((6, 7), kernel), 42).all()


def test_dilation_is_the_same_rule_on_every_residue_grid():
    dilated = on_grid.dense(Neighborhood((7, 10), (3, 2), dilation=(2, 3)), 70)
    for residue in itertools.product(range(2), range(3)):
        rows, cols = np.arange(7)[residue[0] :: 2], np.arange(10)[residue[1] :: 3]
        at = (rows[:, None] * 10 + cols).ravel()
        alone = on_grid.dense(Neighborhood((len(rows), len(cols)), (3, 2)), len(at))
        np.testing.assert_array_equal(dilated[np.ix_(at, at)], alone)
        assert dilated[at].sum() == alone.sum()  # and nothing outside of it


def test_stride_of_the_kernel_is_blocked_attention():
    blocked = on_grid.by_loop(
        (6, 8), lambda q, k: q[0] // 3 == k[0] // 3 and q[1] // 4 == k[1] // 4
    )
    pattern = Neighborhood((6, 8), (3, 4), stride=(3, 4))
    np.testing.assert_array_equal(on_grid.dense(pattern, 48), blocked)


def test_inside_queries_see_the_same_offsets():
    mask = on_grid.dense(Neighborhood((9, 9), 5), 81).reshape(9, 9, 9, 9)
    for y, x in itertools.product(range(2, 7), repeat=2):
        np.testing.assert_array_equal(mask[y, x, y - 2 : y + 3, x - 2 : x + 3], True)


def test_window_is_moved_inward_in_space_and_whole_in_time():
    frames, height, width, h, w = 3, 6, 7, 4, 3
    mask = on_grid.dense(Neighborhood((frames, height, width), (None, h, w)), 126)
    assert (mask.sum(1) == frames * h * w).all()

    def rule(q, k):
        starts = [np.clip(q[a] - s // 2, 0, n - s) for a, s, n in ((1, h, height), (2, w, width))]
        return starts[0] <= k[1] < starts[0] + h and starts[1] <= k[2] < starts[1] + w

    np.testing.assert_array_equal(mask, on_grid.by_loop((frames, height, width), rule))


def test_grids_behind_each_other_do_not_mix():
    pattern = Neighborhood((4, 5), 3)
    mask = on_grid.dense(pattern, 60)
    one = on_grid.dense(pattern, 20)
    np.testing.assert_array_equal(mask, np.kron(np.eye(3, dtype=bool), one))


@pytest.mark.parametrize(
    "shape, kernel",
    [((1 << 20,), 1024), ((1024, 1024), 13), ((128, 96, 80), 5)],
    ids=["1d", "2d", "3d"],
)
def test_a_million_tokens_are_lowered_in_row_major_order(shape, kernel):
    pattern, size = Neighborhood(shape, kernel), int(np.prod(shape))
    start = time.process_time()
    mask = lower.lower(pattern, q_len=size)
    assert time.process_time() - start < 5  # 0.1 to 0.5 s alone; machines are shared
    # Exactly the blocks that hold a visible pair, checked for some rows by evaluating them.
    for row in np.random.default_rng(0).integers(0, mask.num_rows, 6):
        q_pos = np.arange(row * 128, row * 128 + 128, dtype=np.int32)
        start, count = mask.kv_starts[0, 0, row], mask.kv_counts[0, 0, row]
        listed = np.sort(mask.kv_indices[0, 0, start : start + count])
        near = np.arange(max(0, listed[0] - 2), min(mask.num_cols, listed[-1] + 3))
        kv_pos = (near[:, None] * 128 + np.arange(128)).astype(np.int32)
        some = pattern.mask_fn(q_pos[:, None, None], kv_pos[None]).any((0, 2))
        np.testing.assert_array_equal(near[some], listed)


def test_block_lists_of_a_block_sparse_setting_are_full():
    """A stride and a kernel of whole tiles leave no PARTIAL block, when tiles are blocks."""
    from sparse_attn.masks import reorder
    from sparse_attn.patterns import permuted

    pattern = Neighborhood((32, 32), kernel_size=24, stride=8)
    tiled = permuted.permute(pattern, reorder.Tiles((32, 32), (8, 8)))
    mask = lower.lower(tiled, q_len=1024, block_q=64, block_kv=64)
    assert mask.kv_partial_counts.sum() == 0
    states = block_mask.block_states(mask)
    assert states.sum() == 2 * 16 * 9


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kernel_size": 0}, "kernel_size=0 must be an int >= 1"),
        ({"kernel_size": 9}, "kernel_size=9 times dilation=1 must be <= 8, the length of axis 0"),
        ({"kernel_size": 3, "dilation": 3}, "kernel_size=3 times dilation=3 must be <= 8"),
        ({"kernel_size": 3, "stride": 4}, "stride=4 must be <= kernel_size=3, axis 0"),
        ({"kernel_size": (3, 3, 3)}, "must have one entry per axis of shape="),
        ({"kernel_size": 3, "causal_axes": (True,)}, "must be a bool, or one per axis"),
        ({"kernel_size": 3, "shape": ()}, "must be ints >= 1, one per axis"),
        ({"kernel_size": 3, "shape": (8, 0)}, "must be an int >= 1"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Neighborhood(**{"shape": (8, 9), **fields})


def test_equal_entries_are_one_number():
    assert Neighborhood((8, 8), (3, 3), stride=(1, 1)) == Neighborhood((8, 8), 3)
