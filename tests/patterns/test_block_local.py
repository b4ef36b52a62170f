import jax
import numpy as np
import pytest

from sparse_attn.masks import lower
from sparse_attn.ops import attend
from sparse_attn.patterns import block_local, causal, chunked, halo
from tests.patterns import on_grid

BlockLocal = block_local.BlockLocal


def test_picture(draw):
    assert draw(BlockLocal(size=3)) == [
        "#.......",
        "##......",
        "###.....",
        "####....",
        "#####...",
        "######..",
        "...####.",
        "...#####",
    ]


def test_equals_a_causal_halo_and_chunks():
    length, size = 40, 6
    np.testing.assert_array_equal(
        on_grid.dense(BlockLocal(size=size, before=2), length),
        on_grid.dense(halo.Halo((length,), size, halo=2 * size) & causal.Causal(), length),
    )
    np.testing.assert_array_equal(
        on_grid.dense(BlockLocal(size=size, before=0), length),
        on_grid.dense(chunked.Chunked(size=size), length),
    )


def test_pairs_in_closed_form(pairs):
    size, blocks, before = 16, 7, 2
    own, earlier = size * (size + 1) // 2, size * size
    whole = sum(min(i, before) for i in range(blocks))
    assert pairs(BlockLocal(size, before), size * blocks) == blocks * own + whole * earlier


def test_cost_of_a_schedule_is_the_formula(pairs):
    """An eighth of the layers full, n = 32 blocks: 79% fewer scores than all layers full."""
    size, num_layers = 16, 8
    length = 32 * size
    schedule = block_local.mixed_spans(size, num_layers, full_layers=[0])
    spent = sum(pairs(schedule.for_layer(i), length) for i in range(num_layers))
    dense = num_layers * pairs(causal.Causal(), length)
    formula = (length**2 / 2 + (num_layers - 1) * 1.5 * length * size) / (
        num_layers * length**2 / 2
    )
    assert round(1 - formula, 3) == 0.793
    assert spent / dense == pytest.approx(formula, abs=0.005)


@pytest.mark.parametrize("full_layers, reaches", [((), False), ((0,), True), ((2,), True)])
def test_one_full_layer_lets_the_last_token_reach_the_first(full_layers, reaches):
    size, num_layers = 4, 3
    schedule = block_local.mixed_spans(size, num_layers, full_layers=full_layers)
    length = (num_layers + 2) * size

    def last_output(x):
        for layer in range(num_layers):
            x = attend.attend(x, x, x, mask=schedule.for_layer(layer), impl="reference")
        return x[0, -1].sum()

    slope = jax.jit(jax.grad(last_output))(jax.random.normal(jax.random.key(0), (1, length, 1, 4)))
    assert (slope[0, 0] != 0).any() == reaches
    assert (slope[0, (num_layers + 1) * size - 1 :] != 0).all()


def test_schedule_places_the_full_layers():
    schedule = block_local.mixed_spans(8, 4, full_layers=(0, 3), before=2)
    local = BlockLocal(size=8, before=2)
    assert schedule.patterns == (causal.Causal(), local, local, causal.Causal())


def test_a_million_tokens_take_few_blocks():
    mask = lower.lower(BlockLocal(size=1024), q_len=1 << 20)
    assert mask.kv_counts.sum() == 1024 * 8 * 9 // 2 + 1023 * 8 * 8


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: BlockLocal(size=0), "size=0 must be an int >= 1"),
        (lambda: BlockLocal(size=4, before=-1), "before=-1 must be an int >= 0"),
        (lambda: block_local.mixed_spans(4, 2, full_layers=[0, 2]), "full_layers=.2. must be in"),
        (lambda: block_local.mixed_spans(4, 0, full_layers=[]), "num_layers=0 must be an int"),
    ],
)
def test_wrong_fields(call, message):
    with pytest.raises(ValueError, match=message):
        call()
