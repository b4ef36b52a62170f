"""Comparisons: numbers that make densities equal, the table and the picture."""

import numpy as np
import pytest

from sparse_attn import patterns, viz
from sparse_attn.masks import stats
from sparse_attn.viz import comparison, show


@pytest.mark.parametrize(
    ("template", "density"),
    [
        ("local(window={n})", 0.1),
        ("chunked(size={n})", 0.03),
        ("neighborhood(shape=(10, 20), kernel_size={n})", 0.2),  # No pattern above 10.
        ("local(window=4) | sinks(tokens={n})", 0.3),
    ],
)
def test_the_number_that_comes_nearest(template, density):
    def of(n):
        return stats.of(patterns.parse(template.replace("{n}", str(n))), q_len=200).token_density

    best = comparison.solve(template, 200, density)
    texts = (template.replace("{n}", str(n)) for n in range(201))
    chosen = next(n for n, text in enumerate(texts) if n and patterns.parse(text) == best)
    near = [abs(of(n) - density) for n in (chosen - 1, chosen, chosen + 1)]
    assert near[1] == min(near)


def test_long_sequences_are_sampled():
    found = comparison.solve("local(window={n})", 1 << 17, 0.01)
    exact = stats.of(found, q_len=1 << 17).token_density
    assert exact == pytest.approx(0.01, rel=0.01)


def test_entries_keep_their_order_and_get_the_density_of_the_first_fixed_one():
    same = viz.compare(
        [
            "chunked(size={n})", patterns.parse("local(window=20)"),
            "strided(stride=8, part='column')",
        ],
        256, block=32, heads=2, device="v5e",
    )  # fmt: skip
    assert [found.pattern for found in same.costs][1:] == [
        "local(window=20)", "strided(stride=8, part='column')",
    ]  # fmt: skip
    first, second, third = (found.token_density for found in same.costs)
    assert first == pytest.approx(second, rel=0.05)
    assert third < second
    # Chunks never see past their border; windows do after 14 layers; strides see their column.
    assert same.layers == (None, 14, None)
    assert [row[-1] for row in same.rows()] == ["> 16", "14", "> 16"]
    assert len(str(same).splitlines()) == 5
    assert same.markdown().count("\n| ") == 4
    assert comparison.NOTE in same.markdown()


def test_the_picture_has_a_block_map_per_pattern():
    same = viz.compare(["causal()", "local(window=64)"], 256, block=64)
    figure = same.show()
    assert [axis.get_title() for axis in figure.axes] == ["causal()", "local(window=64)"]
    np.testing.assert_array_equal(
        figure.axes[1].images[0].get_array(), show.image(same.patterns[1], 256, 64)
    )
    assert "bound" in figure.axes[1].get_xlabel()


def test_malformed_arguments():
    with pytest.raises(ValueError, match="entries must be"):
        viz.compare([], 64)
    with pytest.raises(ValueError, match="density=None must be given"):
        viz.compare(["local(window={n})"], 64)
    with pytest.raises(ValueError, match="is no pattern for any n"):
        viz.compare(["lokal(window={n})"], 64, density=0.1)
