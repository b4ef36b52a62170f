import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.masks import layout


@hypothesis.given(
    lengths=st.lists(st.sampled_from([1, 2, 2, 2, 5]), min_size=1, max_size=40),
    seed=st.integers(0, 99),
)
def test_steps_are_a_table_and_arithmetic_alike(lengths, seed):
    rng = np.random.default_rng(seed)
    steady = rng.random(len(lengths)) < rng.choice([0, 0.9, 1])
    values = np.where(steady, 3 * np.arange(len(lengths)), rng.integers(-2, 2, len(lengths)))
    starts = np.cumsum(lengths) - lengths
    steps = layout.Steps(starts, values)
    position = np.arange(210, dtype=np.int32)
    want = np.append(np.repeat(values, lengths), np.full(210 - sum(lengths), values[-1]))
    np.testing.assert_array_equal(steps(position), want)
    np.testing.assert_array_equal(steps(jnp.asarray(position)), want)


@pytest.mark.parametrize(
    "lengths, terms",
    [([64] * 5000, 1), ([30, 576] * 1000, 2), ([7] + [64] * 5000 + [9], 2), (range(1, 60), 58)],
)
def test_equal_segments_are_one_term(lengths, terms):
    starts = np.cumsum(lengths) - lengths
    steps = layout.Steps(starts, starts)
    assert steps.num_terms == terms
    position = np.random.default_rng(0).integers(0, starts[-1] + 99, 500).astype(np.int32)
    np.testing.assert_array_equal(jax.jit(steps)(position), steps(position))


def test_steps_far_away():
    """No overflow of int32 where positions are as large as they may be."""
    steps = layout.Steps(np.arange(0, 1 << 30, 1 << 20), np.arange(1 << 10))
    assert int(jax.jit(steps)(np.int32(2**31 - 1))) == (1 << 10) - 1


@pytest.mark.parametrize("size", [1, 2, 7, 64, 100])
def test_range_extremes(size):
    rng = np.random.default_rng(size)
    values = rng.integers(-50, 50, size)
    lo = rng.integers(0, size, 200)
    hi = lo + 1 + (rng.random(200) * (size - lo)).astype(int)
    extremes = layout.RangeExtremes(values)
    for got, want in ((extremes.least, min), (extremes.greatest, max)):
        brute = [want(values[a:b]) for a, b in zip(lo, hi, strict=True)]
        np.testing.assert_array_equal(got(lo, hi), brute)
        np.testing.assert_array_equal(jax.jit(got)(lo, hi), brute)


def test_pack_places_each_token_in_its_slot():
    slots = np.array([0, 10, 12, 40])
    lengths = np.array([[3, 0, 5, 1], [10, 2, 0, 0], [0, 0, 0, 2]])
    got = jax.jit(lambda n: layout.pack(slots, n, length=14))(jnp.asarray(lengths))
    for row, counts in zip(got, lengths, strict=True):
        want = np.concatenate([s + np.arange(n) for s, n in zip(slots, counts, strict=True)])
        np.testing.assert_array_equal(row[: len(want)], want)
        # What follows goes on in the last slot.
        more = slots[-1] + counts[-1] + np.arange(14 - len(want))
        np.testing.assert_array_equal(row[len(want) :], more)
    np.testing.assert_array_equal(layout.pack(slots, lengths[0], length=14), got[0])
