"""Patterns drawn on their grid: golden text, what the figure shows, and orders."""

import math

import numpy as np
import pytest

from sparse_attn import patterns, viz
from sparse_attn.masks import curves, reorder
from sparse_attn.viz import grid

CORNER = """\
neighborhood(shape=(5, 6), kernel_size=3)
query (4, 0) sees 9 of 30 tokens
············
············
██████······
██████······
◉◉████······"""

VIDEO = """\
neighborhood(shape=(3, 4, 3), kernel_size=(2, 3, 1), causal_axes=(True, False, False))
query (1, 1, 0) sees 6 of 36 tokens
0       1       2
██····  ██····  ······
██····  ◉◉····  ······
██····  ██····  ······
······  ······  ······"""

BLIND = """\
(~local(window=1) & local(reach=(2, 2)))
query (3,) sees 4 of 8 tokens
··████○○████····"""


@pytest.mark.parametrize(
    ("expression", "query", "shape", "want"),
    [
        ("neighborhood(shape=(5, 6), kernel_size=3)", (4, 0), None, CORNER),
        (
            "neighborhood(shape=(3, 4, 3), kernel_size=(2, 3, 1), "
            "causal_axes=(True, False, False))",
            (1, 1, 0), None, VIDEO,
        ),
        ("~local(window=1) & local(reach=(2, 2))", (3,), (8,), BLIND),
    ],
)  # fmt: skip
def test_golden_text(expression, query, shape, want):
    assert viz.on_grid(patterns.parse(expression), query, shape=shape) == want


def test_reordered_tokens_stand_where_they_belong():
    near = "neighborhood(shape=(6, 8), kernel_size=3)"
    plain = grid.visible(patterns.parse(near), (2, 7))[0]
    for order in ("('tiles', (6, 8), (2, 4))", "('tiles', (6, 8), None, (1, 0))"):
        moved = patterns.parse(f"permuted({near}, {order})")
        np.testing.assert_array_equal(grid.visible(moved, (2, 7))[0], plain)


def test_a_prefix_is_counted_apart():
    text = viz.on_grid(patterns.parse("joint(swin(shape=(4, 4), window_size=2), tokens=3)"), (0, 3))
    assert "query (0, 3) sees 4 of 16 tokens and 3 of 3 in front\n····██◉◉\n····████" in text


def test_keys_on_a_grid_of_their_own_have_no_query():
    seen, marked = grid.visible(
        patterns.parse("cross_grid(shape=(8, 8), key_shape=(4, 4), reach=1)"), (5, 0)
    )
    assert seen.shape == (4, 4)
    np.testing.assert_array_equal(np.nonzero(seen.any(1))[0], [1, 2, 3])
    assert not marked.any()


def test_figures_have_a_panel_per_frame(tmp_path):
    video = patterns.parse("neighborhood(shape=(20, 4, 5), kernel_size=(3, 3, 3))")
    figure = viz.show_on_grid(video, [(10, 1, 1), (0, 0, 0)])
    titles = [axis.get_title() for axis in figure.axes if axis.axison]
    assert titles == [f"frame {f}" for f in (9, 10, 11, 0, 1, 2)]
    drawn = figure.axes[1].images[0].get_array()
    seen, _ = grid.visible(video, (10, 1, 1))
    np.testing.assert_array_equal((drawn == 255).all(-1), ~seen[10])
    assert drawn[1, 1].tolist() == grid._COLORS[2].tolist()
    figure.savefig(tmp_path / "grid.png")
    image = viz.show_on_grid(patterns.parse("swin(shape=(4, 4), window_size=2)"), [(0, 0)])
    assert image.axes[0].get_title() == "query (0, 0) sees 4 of 16 tokens"


@pytest.mark.parametrize("order", [reorder.Tiles((6, 6), (3, 2)), curves.Gilbert((5, 7))])
def test_orders_are_drawn_by_block_and_as_a_path(order):
    left, right = viz.show_order(order, block=6).axes
    colors = np.asarray(left.images[0].get_array())
    assert len(np.unique(colors)) == math.ceil(order.size / 6)
    across, down = right.lines[0].get_data()
    np.testing.assert_array_equal(np.ravel_multi_index((down, across), order.shape), order.forward)


def test_malformed_arguments():
    near = patterns.parse("neighborhood(shape=(4, 4), kernel_size=3)")
    with pytest.raises(ValueError, match=r"query=\(4, 0\) must be a coordinate"):
        viz.on_grid(near, (4, 0))
    with pytest.raises(ValueError, match=r"query=\(1,\) must be a coordinate"):
        viz.on_grid(near, (1,))
    with pytest.raises(ValueError, match="shape=None must be given"):
        viz.on_grid(patterns.parse("causal()"), (1, 1))
    with pytest.raises(ValueError, match="at most three axes"):
        viz.on_grid(patterns.parse("causal()"), (0, 0, 0, 0), shape=(2, 2, 2, 2))
    with pytest.raises(ValueError, match="two axes"):
        viz.show_order(reorder.Tiles((2, 2, 2)), block=2)
