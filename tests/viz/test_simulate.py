"""The tile simulator: the paper's numbers, a brute force over pairs, and the real block lists."""

import itertools
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn import patterns
from sparse_attn.masks import reorder, stats
from sparse_attn.patterns import neighborhood, permuted
from sparse_attn.viz import simulate

# Attention is 60.7 % of a HunyuanVideo step; its end-to-end speed-ups by the authors' simulator
# [arXiv:2504.16922, tables 1 and 4], by window and stride.
HUNYUAN_SHARE = 0.607
HUNYUAN = {
    ((30, 40, 40), (1, 1, 1)): 1.21,
    ((30, 40, 40), (1, 1, 8)): 1.44,
    ((30, 40, 40), (1, 32, 8)): 1.55,
    ((18, 24, 24), (1, 1, 1)): 1.73,
    ((18, 24, 24), (2, 1, 1)): 1.78,
    ((18, 24, 24), (1, 1, 8)): 1.99,
    ((18, 24, 24), (2, 1, 8)): 2.02,
    ((18, 24, 24), (1, 8, 8)): 2.17,
    ((18, 24, 24), (2, 8, 8)): 2.20,
    ((18, 24, 24), (16, 8, 8)): 2.23,
}


@pytest.mark.parametrize(("window", "stride"), HUNYUAN)
def test_the_numbers_of_the_paper(window, stride):
    video = neighborhood.Neighborhood((30, 48, 80), window, stride=stride)
    bound = simulate.simulate_tiles(video, (4, 8, 8), (2, 8, 8)).bound
    end_to_end = 1 / (1 - HUNYUAN_SHARE + HUNYUAN_SHARE / bound)
    assert end_to_end == pytest.approx(HUNYUAN[window, stride], abs=0.015)


def by_pairs(pattern, q_tile, kv_tile, kv_tiling):
    """Visits of each query tile from the mask of all pairs, tiles of residue classes apart."""
    tokens = list(itertools.product(*map(range, pattern.shape)))
    at = np.arange(len(tokens))
    seen = pattern.mask_fn(at[:, None], at[None])

    def classes(token):
        return tuple(x % pattern.period(a) for a, x in enumerate(token))

    def inside(token):
        return tuple(x // pattern.period(a) for a, x in enumerate(token))

    members = {}
    for i, token in enumerate(tokens):
        tile = tuple(x // t for x, t in zip(inside(token), q_tile, strict=True))
        members.setdefault((classes(token), tile), []).append(i)
    visits = []
    for queries in members.values():
        keys = [tokens[j] for j in np.nonzero(seen[queries].any(0))[0]]
        origin = [0] * len(q_tile)
        if kv_tiling == "dynamic":
            origin = np.min([inside(k) for k in keys], 0)
        visits.append(
            len(
                {
                    (
                        classes(k),
                        *((x - o) // t for x, o, t in zip(inside(k), origin, kv_tile, strict=True)),
                    )
                    for k in keys
                }
            )
        )
    return visits, int(seen.sum())


@st.composite
def cases(draw):
    axes = draw(st.integers(1, 3))
    most = {1: 40, 2: 11, 3: 6}[axes]
    fields = {"shape": [], "kernel_size": [], "stride": [], "dilation": [], "causal_axes": []}
    for _ in range(axes):
        dilation = draw(st.integers(1, 3))
        length = draw(st.integers(dilation, most))
        kernel = draw(st.integers(1, length // dilation))
        values = (length, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans()))
        for name, value in zip(fields, values, strict=True):
            fields[name].append(value)
    tiles = [tuple(draw(st.integers(1, 5)) for _ in range(axes)) for _ in range(2)]
    return (
        {k: tuple(v) for k, v in fields.items()},
        *tiles,
        draw(st.sampled_from(simulate.KV_TILINGS)),
    )


@hypothesis.settings(max_examples=60)
@hypothesis.given(cases())
def test_counts_are_those_of_all_pairs(case):
    fields, q_tile, kv_tile, kv_tiling = case
    pattern = neighborhood.Neighborhood(**fields)
    found = simulate.simulate_tiles(pattern, q_tile, kv_tile, kv_tiling=kv_tiling)
    visits, pairs = by_pairs(pattern, q_tile, kv_tile, kv_tiling)
    assert found.q_tiles == len(visits)
    assert found.visited == sum(visits)
    assert found.visited_max == max(visits)
    assert found.pairs == pairs


@pytest.mark.parametrize(
    ("expression", "tile"),
    [
        ("neighborhood(shape=(32, 48), kernel_size=(7, 10), stride=(2, 5))", (4, 8)),
        ("neighborhood(shape=(8, 16, 16), kernel_size=(3, 5, 5))", (2, 4, 8)),
        ("swin(shape=(16, 32), window_size=8, shift=4)", (8, 4)),
        ("axial(shape=(16, 16), axes=(1,))", (4, 4)),
    ],
)
def test_visits_are_the_active_blocks_of_reordered_tokens(expression, tile):
    pattern = patterns.parse(expression)
    block = math.prod(tile)
    moved = permuted.permute(pattern, reorder.Tiles(pattern.shape, tile))
    counted = stats.of(moved, q_len=math.prod(pattern.shape), block_q=block, block_kv=block)
    found = simulate.simulate_tiles(pattern, tile, tile)
    assert found.visited == counted.active_blocks
    assert found.executed_over_useful == pytest.approx(
        counted.block_density / counted.token_density
    )


@hypothesis.given(
    st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12),
    st.sampled_from(simulate.KV_TILINGS),
)  # fmt: skip
def test_the_closed_form_is_the_most_that_is_counted_inside(kernel, stride, q, kv, kv_tiling):
    stride = min(stride, kernel)
    if kv_tiling == "static" and q % stride and stride % q:
        with pytest.raises(ValueError, match="must divide"):
            simulate.interior_visits(kernel, stride, q, kv, kv_tiling=kv_tiling)
        return
    # Long enough that all alignments occur away from the borders.
    length = 4 * (math.lcm(stride, q, kv) + kernel + stride + q)
    pattern = neighborhood.Neighborhood((length,), kernel, stride=stride)
    first = pattern.window(0, np.arange(length), length)[0]
    visits = []
    for start in range(0, length - q + 1, q):
        low, high = first[start], first[start + q - 1] + kernel
        if kernel < low and high < length - kernel:
            tiles = high - low if kv_tiling == "dynamic" else (high - 1) // kv - low // kv + 1
            visits.append(-(-tiles // kv) if kv_tiling == "dynamic" else tiles)
    want = simulate.interior_visits(kernel, stride, q, kv, kv_tiling=kv_tiling)
    assert max(visits) == want


@pytest.mark.parametrize(("kv_tiling", "kernel"), [("static", 24), ("dynamic", 16)])
def test_perfectly_block_sparse_cases_mask_nothing(kv_tiling, kernel):
    # Dynamic: key tiles divide the window and query tiles the stride. Static tiles have to agree
    # with where windows begin besides: 24 keys begin 8 before their group, 16 begin 4 before.
    pattern = neighborhood.Neighborhood((64, 64), kernel_size=kernel, stride=8)
    found = simulate.simulate_tiles(pattern, (8, 4), (8, 8), kv_tiling=kv_tiling)
    assert found.executed_over_useful == 1
    assert found.bound == found.mean_bound == found.flop_bound == (64 / kernel) ** 2


def test_malformed_arguments():
    pattern = neighborhood.Neighborhood((8, 8), kernel_size=3)
    with pytest.raises(ValueError, match=r"must be a grids\.WindowPattern"):
        simulate.simulate_tiles(patterns.parse("causal()"), 2, 2)
    with pytest.raises(ValueError, match=r"q_tile=\(2, 2, 2\) must have one entry per axis"):
        simulate.simulate_tiles(pattern, (2, 2, 2), 2)
    with pytest.raises(ValueError, match="kv_tiling='lazy'"):
        simulate.simulate_tiles(pattern, 2, 2, kv_tiling="lazy")
    with pytest.raises(ValueError, match="kv_tile=0"):
        simulate.simulate_tiles(pattern, 2, 0)
