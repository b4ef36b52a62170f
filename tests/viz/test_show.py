"""Block maps: golden text, exact pixels, and a million tokens without a T x S array."""

import re
import tracemalloc

import jax
import numpy as np
import pytest

from sparse_attn import patterns
from sparse_attn.masks import block_mask, lower
from sparse_attn.viz import show

WHITE, LIGHT, DARK = [255, 255, 255], [136, 176, 222], [23, 55, 114]

BIGBIRD = """\
((local(window=96) | (global_tokens(tokens=64) & causal())) | random_blocks(block=64, num_blocks=1))
512 queries (down) x 512 keys in blocks of 64 x 64: █ full ▒ partial · empty
▒▒··············
██▒▒············
████▒▒··········
██▒▒▒▒▒▒········
██··██▒▒▒▒······
██····▒▒▒▒▒▒····
██······▒▒▒▒▒▒··
██········██▒▒▒▒
token density 0.2935, block density 0.4062 (16 partial + 10 full of 64 blocks)
keys per query 1 to 224, mean 150.2; queries without keys 0; imbalance 1.23"""

SUMMARY = """\
fixed(stride=100, part='summary', summary_tokens=10)
512 queries (down) x 512 keys in blocks of 16 x 16: █ full ▒ partial · empty
"""

HEADS = """\
layers 0, 2 of 3: head 0 of 2: causal()
8 queries (down) x 8 keys in blocks of 4 x 4: █ full ▒ partial · empty
▒▒··
██▒▒
token density 0.5625, block density 0.75 (2 partial + 1 full of 4 blocks)
keys per query 1 to 8, mean 4.5; queries without keys 0; imbalance 1.33

layers 0, 2 of 3: head 1 of 2: chunked(size=4, two_sided=True)
8 queries (down) x 8 keys in blocks of 4 x 4: █ full ▒ partial · empty
██··
··██
token density 0.5, block density 0.5 (0 partial + 2 full of 4 blocks)
keys per query 4 to 4, mean 4.0; queries without keys 0; imbalance 1.00

layer 1 of 3: full()
8 queries (down) x 8 keys in blocks of 4 x 4: █ full ▒ partial · empty
████
████
token density 1, block density 1 (0 partial + 4 full of 4 blocks)
keys per query 8 to 8, mean 8.0; queries without keys 0; imbalance 1.00"""


def test_print_shows_expression_map_and_counts():
    pattern = patterns.parse(
        "local(window=96) | global_tokens(tokens=64) & causal() "
        "| random_blocks(block=64, num_blocks=1)"
    )
    assert str(pattern) == BIGBIRD
    assert patterns.parse(str(pattern).splitlines()[0]) == pattern


def test_heads_and_layers_have_a_map_each():
    schedule = patterns.parse(
        "per_layer((per_head((causal(), chunked(size=4, two_sided=True))), full(),"
        " per_head((causal(), chunked(size=4, two_sided=True)))))"
    )
    assert show.text(schedule, 8, 4) == HEADS
    assert "layers 0, 2 of 3: head 1 of 2" in str(schedule)


def test_large_maps_are_grouped():
    lines = show.text(patterns.parse("local(window=64)"), 1 << 14, 64).splitlines()
    assert "one character = 4 x 4 blocks" in lines[1]
    drawn = lines[2:-2]
    assert len(drawn) == 64
    assert drawn[0] == "▒" + "·" * 63
    assert drawn[9] == "·" * 8 + "▒▒" + "·" * 54
    grouped = show.text(patterns.parse("causal()"), 1 << 14, 64).splitlines()[2:-2]
    assert grouped[9] == "█" * 9 + "▒" + "·" * 54


def test_empty_queries_are_counted():
    text = show.text(
        patterns.parse("fixed(stride=100, part='summary', summary_tokens=10)"), 512, 16
    )
    assert text.startswith(SUMMARY)
    assert "queries without keys 90;" in text


def test_rectangles_and_uneven_ends():
    assert show.text(patterns.parse("causal()"), 5, 2, kv_len=9).splitlines()[2:5] == [
        "▒▒········",
        "██▒▒······",
        "████▒▒····",
    ]


def test_html_is_escaped_text():
    drawn = patterns.parse("strided(stride=4, part='row')")._repr_html_()
    assert drawn.startswith("<pre")
    assert "part=&#x27;row&#x27;" in drawn
    assert "▒▒" in drawn


def test_a_block_mask_is_drawn_with_its_own_blocks():
    array = np.zeros((2, 4, 6), bool)
    array[0, :2] = True
    array[1, 3, 5] = True
    mask = block_mask.from_array(array, block_q=2, block_kv=2)
    assert [title for title, _ in show.panels(mask)] == ["head 0 of 2: array", "head 1 of 2: array"]
    text = show.text(mask)
    assert "██████\n······\n" in text
    assert "······\n····▒▒\n" in text


def test_a_block_mask_takes_no_lengths_and_must_be_static():
    mask = lower.lower(patterns.parse("causal()"), q_len=64)
    with pytest.raises(ValueError, match="q_len=8, block=None, kv_len=None must be None"):
        show.text(mask, 8)
    with pytest.raises(ValueError, match="must be static"):
        show.image(jax.tree.map(jax.numpy.asarray, mask))


def test_pixels():
    got = show.image(patterns.parse("causal()"), 384, 128)
    want = [[LIGHT, WHITE, WHITE], [DARK, LIGHT, WHITE], [DARK, DARK, LIGHT]]
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, want)


def test_few_active_blocks_stay_visible():
    pixels = show.image(patterns.parse("local(window=1)"), 1 << 17, 64, max_pixels=32)
    assert pixels.shape == (32, 32, 3)
    off = ~np.eye(32, dtype=bool)
    assert (pixels[off] == 255).all()
    assert (pixels[~off] < 220).any(-1).all()


def test_heads_are_blended_and_layers_refused():
    heads = patterns.parse("per_head((full(), full(), causal()))")
    pixels = show.image(heads, 256, 128)
    assert pixels[1, 0].tolist() == DARK
    assert DARK[0] < pixels[0, 1, 0] < WHITE[0]
    with pytest.raises(ValueError, match="for_layer"):
        show.image(patterns.parse("per_layer((causal(),))"), 256)


@pytest.mark.parametrize(
    "text", ["local(window=4096) | sinks(tokens=64)", "strided(stride=1024, part='column')"]
)
def test_a_million_tokens(text):
    tracemalloc.start()
    pixels = show.image(patterns.parse(text), 1 << 20)
    drawn = show.text(patterns.parse(text), 1 << 20, 128)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pixels.shape == (512, 512, 3)
    assert (pixels[np.triu_indices(512, 1)] == 255).all()
    assert (pixels[np.arange(512), np.arange(512)] < 230).any(-1).all()
    assert "one character = 128 x 128 blocks" in drawn
    assert peak < 300e6  # Strides: 4.2 million active blocks, 60 bytes each while they are sorted.


def test_uncounted_tokens_are_said_to_be():
    drawn = show.text(patterns.parse("strided(stride=64, part='column')"), 1 << 17, 128)
    assert "token density not counted (too many partial blocks), block density 0.5005" in drawn


def test_figures_have_a_panel_per_distinct_head(tmp_path):
    figure = show.show(patterns.parse("per_head((causal(), local(window=64), causal()))"), 1024)
    titles = [axis.get_title().replace("\n", " ") for axis in figure.axes]
    assert titles == ["heads 0, 2 of 3: causal()", "head 1 of 3: local(window=64)"]
    np.testing.assert_array_equal(
        figure.axes[0].images[0].get_array(), show.image(patterns.parse("causal()"), 1024)
    )
    assert re.search(r"token density\s+0.5005", figure.axes[0].get_xlabel())
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
