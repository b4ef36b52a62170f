import jax
import numpy as np
import pytest

from sparse_attn.masks import lower
from sparse_attn.ops import attend
from sparse_attn.patterns import causal, chunked, shifted_groups, sinks
from tests.patterns import on_grid

ShiftedGroups = shifted_groups.ShiftedGroups


def test_picture(draw):
    assert draw(ShiftedGroups(size=4, shift=2)) == [
        "#.......",
        "##......",
        "..#.....",
        "..##....",
        "..###...",
        "..####..",
        "......#.",
        "......##",
    ]


@pytest.mark.parametrize("size, shift", [(8, 4), (6, 1), (5, 3), (4, 4)])
def test_mask_is_that_of_the_rolled_sequence_without_what_wrapped(size, shift):
    """Roll, cut in groups, attend causally by place; then drop pairs that the roll turned round."""
    length = 8 * size
    token = np.roll(np.arange(length), -shift)
    place = np.arange(length)
    same = place[:, None] // size == place // size
    wrapped = (token[:, None] < token) != (place[:, None] < place)
    rolled = same & (place <= place[:, None]) & ~wrapped
    want = np.zeros_like(rolled)
    want[np.ix_(token, token)] = rolled
    np.testing.assert_array_equal(on_grid.dense(ShiftedGroups(size, shift), length), want)


def test_pairs_in_closed_form(pairs):
    size, groups = 16, 5
    length = size * groups
    plain, shifted = shifted_groups.heads(size, 2).patterns
    assert pairs(plain, length) / length**2 == (size + 1) / (2 * length)
    half = size // 2
    assert pairs(shifted, length) == (groups - 1) * size * (size + 1) // 2 + half * (half + 1)


def test_a_whole_shift_is_none_and_one_plain_group_is_causal():
    length = 24
    np.testing.assert_array_equal(
        on_grid.dense(ShiftedGroups(size=5, shift=5), length),
        on_grid.dense(chunked.Chunked(size=5), length),
    )
    np.testing.assert_array_equal(
        on_grid.dense(shifted_groups.heads(length, 2).patterns[0], length),
        on_grid.dense(causal.Causal(), length),
    )


def test_no_output_depends_on_a_later_token():
    """The slope of every output by every token is 0 for later ones, and finite."""
    length, heads = 32, shifted_groups.heads(8, 2)

    @jax.jit
    @jax.jacrev
    def slopes(x):
        out = attend.attend(x, x, x, mask=heads, impl="reference")
        return out[0].sum(-1)  # [T, N] by x [1, T, N, H]

    slope = np.asarray(slopes(jax.random.normal(jax.random.key(0), (1, length, 2, 4))))
    assert np.isfinite(slope).all()
    depends = (slope[:, :, 0] != 0).any((3, 4))  # [query, head, token]
    for head, pattern in enumerate(heads.patterns):
        np.testing.assert_array_equal(depends[:, head], on_grid.dense(pattern, length))
        assert not np.triu(depends[:, head], 1).any()


def test_two_layers_cross_the_borders():
    """Alternating heads spread information over all groups; one kind of head alone never does."""
    plain, shifted = (on_grid.dense(p, 64).astype(int) for p in shifted_groups.heads(8, 2).patterns)
    both = np.linalg.matrix_power(plain + shifted, 15) > 0
    np.testing.assert_array_equal(both, on_grid.dense(causal.Causal(), 64))
    np.testing.assert_array_equal(np.linalg.matrix_power(plain, 15) > 0, plain > 0)


def test_halves_of_the_heads_and_a_smaller_share():
    plain, moved = chunked.Chunked(size=8), ShiftedGroups(size=8, shift=4)
    assert shifted_groups.heads(8, 4).patterns == (plain, plain, moved, moved)
    assert shifted_groups.heads(8, 4, shifted_heads=1).patterns == (plain, plain, plain, moved)
    assert shifted_groups.heads(8, 3, shifted_heads=3).patterns == (moved,) * 3


def test_first_tokens_are_seen_by_all_groups():
    first = sinks.Sinks(tokens=3)
    for with_sinks, without in zip(
        shifted_groups.heads(8, 2, sink_tokens=3).patterns, shifted_groups.heads(8, 2).patterns
    ):
        mask = on_grid.dense(with_sinks, 40)
        np.testing.assert_array_equal(mask[:, :3], on_grid.dense(first, 40)[:, :3])
        np.testing.assert_array_equal(mask[:, 3:], on_grid.dense(without, 40)[:, 3:])


def test_a_million_tokens_take_few_blocks():
    mask = lower.lower(ShiftedGroups(size=4096, shift=2048), q_len=1 << 20)
    side = 4096 // 128
    half = side // 2
    assert mask.kv_counts.sum() == 255 * side * (side + 1) // 2 + half * (half + 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ShiftedGroups(size=0, shift=1), "size=0 must be an int >= 1"),
        (lambda: ShiftedGroups(size=4, shift=0), "shift=0 must be an int >= 1"),
        (lambda: ShiftedGroups(size=4, shift=5), "shift=5 must be .* <= 4"),
        (lambda: shifted_groups.heads(1, 2), "size=1 must be an int >= 2"),
        (lambda: shifted_groups.heads(4, 2, shifted_heads=3), "shifted_heads=3 must be .* <= 2"),
        (lambda: shifted_groups.heads(4, 2, sink_tokens=0), "tokens=0 must be an int >= 1"),
    ],
)
def test_wrong_fields(call, message):
    with pytest.raises(ValueError, match=message):
        call()
