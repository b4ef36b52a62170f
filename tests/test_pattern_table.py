"""The table of patterns holds every pattern, and docs/patterns.md shows what the study counted."""

import json

import pytest

from experiments.pattern_table import study
from sparse_attn.masks import reorder
from sparse_attn.patterns import axial, base, causal, full, local, neighborhood, per_layer

RESULTS = json.loads((study.RESULTS / "pattern_table.json").read_text())["results"]


def test_every_pattern_is_in_the_table():
    used = {
        type(x).__module__.rsplit(".", 1)[-1] for case in study.cases() for x in study.leaves(case)
    }
    assert used - {"base"} == set(base.discover()) - set(study.LEFT_OUT)


def test_a_pattern_without_a_case_enters_with_its_example(monkeypatch):
    monkeypatch.setattr(study, "CASES", ("full()",))
    found = {type(case): case for case in study.cases()}
    assert found[local.Local] == local.EXAMPLES[0]
    assert found[neighborhood.Neighborhood].shape == study.SHAPES[1]


def test_the_page_is_not_stale():
    assert study.PAGE.read_text() == study.page(RESULTS), (
        "run: python -m experiments.pattern_table.study"
    )


@pytest.mark.parametrize("grid, kernel", [("128x128", "33x33"), ("16x32x32", "9x17x17")])
def test_tiles_bring_neighbourhoods_under_2(grid, kernel):
    (row,) = (r for r in RESULTS["neighbourhoods"] if (r["grid"], r["kernel"]) == (grid, kernel))
    assert row["reordered"] < 2 < row["reordered"] * 2
    # Counted again, without the search: the least number of tiles that the windows touch.
    shape, sides = (tuple(map(int, text.split("x"))) for text in (grid, kernel))
    tile = tuple(map(int, row["order"].removeprefix("tiles ").split("x")))
    blocks = useful = 1
    for length, side, width in zip(shape, sides, tile):
        firsts = [min(max(at - side // 2, 0), length - side) for at in range(length)]
        touched = 0
        for start in range(0, length, width):
            low, high = firsts[start], firsts[start + width - 1] + side - 1
            touched += high // width - low // width + 1
        blocks, useful = blocks * touched * width**2, useful * length * side
    assert row["reordered"] == pytest.approx(blocks / useful)


def test_dense_attention_is_its_own_bound():
    for pattern in (full.Full(), causal.Causal()):
        row = study.measure(pattern)
        assert row["speed_up_bound"] == 1
        assert row["best_order"] is None


def test_columns_of_a_stride_become_diagonal_blocks():
    (row,) = (r for r in RESULTS["patterns"] if "'column'" in r["pattern"])
    assert row["best_order"] == "groups 128"
    # 128 classes of two blocks, causal: three blocks of 256 x 256.
    assert row["best_block_density"] == pytest.approx(128 * 3 / 256**2)


def test_layers_are_averaged():
    one, other = local.Local(window=64), causal.Causal()
    row = study.measure(per_layer.PerLayer((one, other)))
    parts = [study.measure(x) for x in (one, other)]
    assert row["token_density"] == pytest.approx(sum(p["token_density"] for p in parts) / 2)
    assert row["speed_up_bound"] == pytest.approx(2 / sum(1 / p["speed_up_bound"] for p in parts))


def test_orders_fit_the_pattern():
    assert study.orders(causal.Causal()) == []
    assert reorder.Tiles((16, 32, 32), axes=(1, 2, 0)) in study.orders(
        axial.Axial((16, 32, 32), (0,))
    )
    groups = study.orders(neighborhood.Neighborhood((128, 128), 9, dilation=2))
    assert reorder.Tiles((128, 128), (8, 8), dilation=(2, 2)) in groups
