"""Presets: what each layer of a published model sees, as pictures, densities and reach."""

import math

import numpy as np
import pytest

from sparse_attn import patterns
from sparse_attn.models import presets
from sparse_attn.ops import pooled
from sparse_attn.patterns import per_head
from tests.patterns import on_grid

SHAPES = {name: (4, 4) if p.axes != 3 else (4, 4, 4) for name, p in presets.PRESETS.items()}


def heads_of(layer):
    return layer.patterns if isinstance(layer, per_head.PerHead) else (layer,)


def dense(name, pattern, shape):
    """Element mask over queries and keys of the grids, without registers."""
    first = presets.PRESETS[name].registers or 0
    keys = pooled.key_grid(pattern) or shape
    mask = on_grid.dense(pattern, first + math.prod(shape), first + math.prod(keys))
    return mask[first:, first:]


def density(name, shape=(8, 8), window=4):
    layers = presets.schedule(name, shape, window=window).patterns
    return [[dense(name, h, shape).mean() for h in heads_of(layer)] for layer in layers]


# What the query at (1, 1) of a 4 x 4 grid sees with windows of 2: a line per layer, its rows side
# by side; heads that differ are joined by "|".
SEEN = {
    "full": ["#### #### #### ####"],
    "neighborhood": ["##.. ##.. .... ...."],
    "dinat": ["##.. ##.. .... ....", ".... .#.# .... .#.#"],
    "swin": ["##.. ##.. .... ....", ".... .##. .##. ...."],
    "axial": [".... #### .... ....", ".#.. .#.. .#.. .#.."],
    "criss_cross": [".#.. #### .#.. .#.."],
    "halonet": ["###. ###. ###. ...."],
    "maxvit": ["##.. ##.. .... ....", ".... .#.# .... .#.#"],
    "nest": ["##.. ##.. .... ....", "#### #### #### ####"],
    "davit": ["##.. ##.. .... ...."],
    "cat": [".... #### .... ....|.#.. .#.. .#.. .#.."] * 2,
    "style_swin": ["##.. ##.. .... ....|.... .##. .##. ...."],
    "twins": ["##.. ##.. .... ....", "## ##"],
    "pvt": ["## ##"],
    "hilo": ["##.. ##.. .... ....|## ##"],
    "vil": ["#### #### #### ####"],
    "clear": [".#.. ###. .#.. ...."],
    "inf_dit": ["##.. ##.. .... ...."],
    "dsvt": [".... ##.. .... ....", ".#.. .#.. .... ...."],
    "flat_former": [
        *(".... ##.. .... ....", ".#.. .#.. .... ....", ".... .##. .... ....",
          ".... .#.. .#.. ...."),
    ],
    "skate_former": [
        "##.. ##.. .... ....|.#.# .#.# .... ....|.... ##.. .... ##..|.... .#.# .... .#.#"
    ],
    "uniformer": ["##.. ##.. .... ...."] * 2 + ["#### #### #### ####"] * 2,
    # Four frames of 4 x 4; the query is in the second one.
    "divided_space_time": [
        " ".join([".... .#.. .... ...."] * 4),
        ".... .... .... .... #### #### #### ####" + 8 * " ....",
    ],
    "ultra_gen": [
        " ".join(["##.. ##.. .... ...."] * 4),
        " ".join([".... .##. .##. ...."] * 4),
    ],
    "simple_gvr": [
        " ".join(["##.. ##.. .... ...."] * 2) + 8 * " ....",
        4 * ".... " + " ".join(["##.. ##.. .... ...."] * 2) + 4 * " ....",
    ],
    "seer": [" ".join(["##.. ##.. .... ...."] * 2) + 8 * " ...."],
}  # fmt: skip


@pytest.mark.parametrize("name", presets.PRESETS)
def test_what_a_query_sees(name):
    shape = SHAPES[name]
    query = np.ravel_multi_index((1,) * len(shape), shape)
    lines = []
    for layer in presets.schedule(name, shape, window=2).patterns:
        pictures = []
        for head in heads_of(layer):
            row = np.where(dense(name, head, shape)[query], "#", ".")
            width = (pooled.key_grid(head) or shape)[-1]
            pictures.append(" ".join("".join(x) for x in row.reshape(-1, width)))
        lines.append("|".join(dict.fromkeys(pictures)))
    assert lines == SEEN[name]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_config_can_say_it(name):
    made = presets.schedule(name, SHAPES[name], window=2)
    assert patterns.parse(made.expression()) == made


@pytest.mark.parametrize(
    "name, expected",
    [
        ("neighborhood", [[16 / 64]]),
        ("dinat", [[16 / 64]] * 2),
        # A window of the shifted layer keeps 4 * 4, 4 * 2 or 2 * 2 of its tokens.
        ("swin", [[16 / 64], [(16**2 + 4 * 8**2 + 4 * 4**2) / 64**2]]),
        ("axial", [[8 / 64]] * 2),
        ("criss_cross", [[15 / 64]]),
        ("maxvit", [[16 / 64]] * 2),
        ("nest", [[16 / 64], [1.0]]),
        ("davit", [[16 / 64]]),
        ("cat", [[16 / 64] * 4, [14 / 64] * 4]),  # Shifted strips of 2 are 1, 2, 2, 2, 1.
        ("twins", [[16 / 64], [1.0]]),
        ("hilo", [[16 / 64, 16 / 64, 1.0, 1.0]]),
        ("dsvt", [[8 / 64]] * 2),
        ("skate_former", [[16 / 64] * 4]),
    ],
)
def test_densities(name, expected):
    assert density(name) == expected


@pytest.mark.parametrize(
    "name, layers", [("axial", 2), ("maxvit", 2), ("twins", 2), ("criss_cross", 2), ("nest", 2)]
)
def test_two_layers_reach_every_token_from_every_token(name, layers):
    reach = np.eye(64, dtype=int)
    for pattern in presets.schedule(name, (8, 8), window=4).patterns * layers:
        mask = dense(name, pattern, (8, 8)).astype(int)
        if keys := pooled.key_grid(pattern):  # A window's mean is made of its tokens.
            rows, columns = np.divmod(np.arange(64), 8)
            cell = rows * keys[0] // 8 * keys[1] + columns * keys[1] // 8
            mask = mask[:, cell]
        if layers:
            reach, layers = np.minimum(mask @ reach, 1), layers - 1
    assert reach.all()


def test_windows_that_never_move_never_leave_their_window():
    (layer,) = presets.schedule("davit", (8, 8), window=4).patterns
    mask = dense("davit", layer, (8, 8)).astype(int)
    np.testing.assert_array_equal(mask @ mask > 0, mask > 0)


def test_wrong_names_and_shapes_are_named():
    with pytest.raises(ValueError, match="name='swim' must be one of full, neighborhood"):
        presets.schedule("swim", (8, 8), window=4)
    with pytest.raises(ValueError, match=r"shape=\(8, 8\) must have 3 axes for 'seer'"):
        presets.schedule("seer", (8, 8), window=4)
    with pytest.raises(ValueError, match=r"window=\(4,\) must have one entry per axis"):
        presets.schedule("swin", (8, 8), window=(4,))
