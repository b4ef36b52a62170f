"""The laws of `Pattern`, applied to the EXAMPLES of every file in a package of patterns.

`PATTERN_PACKAGE=my_patterns pytest tests/patterns/test_contract.py` runs them on another package.
"""

import copy
import dataclasses
import functools
import importlib
import os

import hypothesis
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.masks import block_mask, lower, stats
from sparse_attn.patterns import base

PACKAGE = os.environ.get("PATTERN_PACKAGE", "sparse_attn.patterns")
EMPTY, PARTIAL, FULL = 0, 1, 2

NAMES = base.discover(PACKAGE)
EXAMPLES = [e for n in NAMES for e in importlib.import_module(f"{PACKAGE}.{n}").EXAMPLES]
PATTERNS = [e for e in EXAMPLES if isinstance(e, base.Pattern)]

# (q_len, kv_len, block_q, block_kv): dividing and not, wide, tall, one block, one query, 1 x 1.
SHAPES = [
    (64, 64, 16, 16),
    (61, 61, 16, 8),
    (37, 90, 16, 32),
    (90, 37, 8, 16),
    (200, 200, 128, 128),
    (100, 100, 7, 9),
    (1, 50, 16, 16),
    (23, 23, 1, 1),
]

# What every kernel language has. `//` and `%` of jnp come with sign and select_n.
KERNEL_PRIMITIVES = {
    "add", "sub", "mul", "div", "rem", "neg", "sign", "and", "or", "not", "xor", "eq", "ne", "lt",
    "le", "gt", "ge", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical",
    "convert_element_type", "broadcast_in_dim", "jit", "pjit",
}  # fmt: skip


def examples(values):
    return pytest.mark.parametrize("pattern", values, ids=lambda p: p.expression())


def positions(length, start=0):
    return np.arange(start, start + length, dtype=np.int32)


def dense(pattern, q_len, kv_len, q_start=0, kv_start=0):
    q_pos, kv_pos = positions(q_len, q_start), positions(kv_len, kv_start)
    return pattern.mask_fn(q_pos[:, None], kv_pos[None, :])


def random_positions(seed, length, most=300):
    return np.random.default_rng(seed).integers(0, most, length).astype(np.int32)


def traced(function, *arrays):
    """What JAX gets from the traced function, one operation after the other.

    Patterns have few operations, and share their programs; each as a program of its own is what
    takes long, and what the tests of `ops` compile.
    """
    jaxpr = jax.make_jaxpr(function)(*arrays)
    (out,) = jax.extend.core.jaxpr_as_fun(jaxpr)(*map(jnp.asarray, arrays))
    return out


def count_blocks(mask, block_q, block_kv):
    """Visible pairs and area of every block of a dense mask."""

    def by_block(array):
        rows = np.add.reduceat(array.astype(int), np.arange(0, len(array), block_q), 0)
        return np.add.reduceat(rows, np.arange(0, array.shape[1], block_kv), 1)

    return by_block(mask), by_block(np.ones_like(mask))


def states_of_lists(starts, counts, partial_counts, indices, num_others):
    """Block states from ragged lists, with everything the lists promise checked on the way."""
    grid = np.zeros((len(counts), num_others), int)
    claimed = np.zeros(len(indices), bool)
    for row, (start, count, partial) in enumerate(zip(starts, counts, partial_counts)):
        assert 0 <= partial <= count
        listed = indices[start : start + count]
        assert len(listed) == count
        assert not claimed[start : start + count].any()
        claimed[start : start + count] = True
        assert (np.diff(listed[:partial]) > 0).all()
        assert (np.diff(listed[partial:]) > 0).all()
        assert len(set(listed.tolist())) == count
        assert count == 0 or (listed.min() >= 0 and listed.max() < num_others)
        grid[row, listed[:partial]] = PARTIAL
        grid[row, listed[partial:]] = FULL
    assert (indices[~claimed] == -1).all()
    return grid


def check_lowering(mask, want):
    """The lists hold exactly the blocks that `want`, the dense mask, has; by row and by column."""
    visible, area = count_blocks(want, mask.block_q, mask.block_kv)
    states = np.where(visible == area, FULL, np.where(visible > 0, PARTIAL, EMPTY))
    if mask.kv_len % mask.block_kv:  # Never FULL over the edge: the rule hides what is not there.
        states[:, -1] = np.minimum(states[:, -1], PARTIAL)
    by_row = states_of_lists(
        *(x[0, 0] for x in (mask.kv_starts, mask.kv_counts, mask.kv_partial_counts)),
        mask.kv_indices[0, 0],
        mask.num_cols,
    )
    by_col = states_of_lists(
        *(x[0, 0] for x in (mask.q_starts, mask.q_counts, mask.q_partial_counts)),
        mask.q_indices[0, 0],
        mask.num_rows,
    )
    np.testing.assert_array_equal(by_row, states)
    np.testing.assert_array_equal(by_col, states.T)
    np.testing.assert_array_equal(block_mask.block_states(mask), states)
    assert mask.max_kv == (states > 0).sum(1).max()
    assert mask.max_q == (states > 0).sum(0).max()
    for name in block_mask.ARRAYS:
        assert getattr(mask, name) is None or getattr(mask, name).dtype == np.int32


@pytest.mark.parametrize("name", NAMES)
def test_module_holds_a_class_of_its_name_with_examples(name):
    cls = base.find(name, PACKAGE)
    made = importlib.import_module(f"{PACKAGE}.{name}").EXAMPLES
    assert made
    assert all(type(example) is cls for example in made)
    assert cls.__doc__


@examples(EXAMPLES)
def test_equality_hash_and_text_round_trip(pattern):
    twin = copy.deepcopy(pattern)
    assert twin == pattern
    assert hash(twin) == hash(pattern)
    classes = {cls.__name__: cls for cls in (base.And, base.Or, base.Not, *map(type, EXAMPLES))}
    assert eval(repr(pattern), classes) == pattern
    assert base.parse(pattern.expression(), PACKAGE) == pattern
    assert "\n" not in pattern.expression()
    assert EXAMPLES.count(pattern) == 1
    for field in dataclasses.fields(pattern):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(pattern, field.name, None)


@examples(PATTERNS)
def test_equal_patterns_share_one_jit_entry(pattern):
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def visible(rule, x):
        traced.append(rule)
        return rule.mask_fn(x, x)

    visible.trace(pattern, positions(8))
    visible.trace(copy.deepcopy(pattern), positions(8))
    assert len(traced) == 1


@examples(PATTERNS)
def test_mask_fn_broadcasts(pattern):
    q_pos, kv_pos = random_positions(0, 12), random_positions(1, 9)
    want = np.array([[bool(pattern.mask_fn(q, k)) for k in kv_pos] for q in q_pos])
    got = pattern.mask_fn(q_pos[:, None], kv_pos[None, :])
    assert got.dtype == bool
    np.testing.assert_array_equal(got, want)
    # A scalar on either side, equal shapes, and batch axes.
    np.testing.assert_array_equal(pattern.mask_fn(q_pos[3], kv_pos), want[3])
    np.testing.assert_array_equal(pattern.mask_fn(q_pos, kv_pos[5]), want[:, 5])
    np.testing.assert_array_equal(pattern.mask_fn(q_pos[:9], kv_pos), np.diag(want[:9]))
    batch = pattern.mask_fn(q_pos.reshape(2, 6, 1), np.stack([kv_pos, kv_pos])[:, None, :])
    np.testing.assert_array_equal(batch, want.reshape(2, 6, 9))


@examples(PATTERNS)
def test_mask_fn_is_the_same_in_numpy_jax_and_traced(pattern):
    q_pos, kv_pos = random_positions(2, 50)[:, None], random_positions(3, 60)[None, :]
    want = pattern.mask_fn(q_pos, kv_pos)
    np.testing.assert_array_equal(
        pattern.mask_fn(q_pos.astype(np.int64), kv_pos.astype(np.int64)), want
    )
    got = pattern.mask_fn(jnp.asarray(q_pos), jnp.asarray(kv_pos))
    assert got.dtype == bool
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(traced(pattern.mask_fn, q_pos, kv_pos), want)


@examples(PATTERNS)
def test_mask_fn_uses_only_what_a_kernel_has(pattern):
    def primitives(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for value in equation.params.values():
                if isinstance(value, jax.extend.core.ClosedJaxpr):
                    yield from primitives(value.jaxpr)

    traced = jax.make_jaxpr(pattern.mask_fn)(positions(4)[:, None], positions(5)[None, :])
    assert set(primitives(traced.jaxpr)) <= KERNEL_PRIMITIVES
    assert all(np.ndim(c) == 0 for c in traced.consts), "a kernel cannot close over an array"


@examples(PATTERNS)
def test_mask_fn_judges_positions_not_indices(pattern):
    big = dense(pattern, 120, 120)
    order = np.random.default_rng(4).permutation(120).astype(np.int32)
    permuted = pattern.mask_fn(order[:, None], order[None, :])
    np.testing.assert_array_equal(permuted, big[np.ix_(order, order)])
    for q_start, kv_start in ((64, 0), (77, 50), (0, 90)):
        shard = dense(pattern, 30, 20, q_start, kv_start)
        np.testing.assert_array_equal(shard, big[q_start : q_start + 30, kv_start : kv_start + 20])


@examples(PATTERNS)
def test_lowering_is_brute_force(pattern):
    for shape in SHAPES:
        q_len, kv_len, block_q, block_kv = shape
        mask = lower.lower(pattern, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv)
        assert (mask.q_len, mask.kv_len, mask.block_q, mask.block_kv) == shape
        check_lowering(mask, dense(pattern, q_len, kv_len))


@examples(PATTERNS)
def test_counts_are_brute_force(pattern):
    for q_len, kv_len, block_q, block_kv in SHAPES[1:4]:
        want = dense(pattern, q_len, kv_len)
        got = stats.of(pattern, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv)
        keys = want.sum(1)
        visible, _ = count_blocks(want, block_q, block_kv)
        assert got.token_density == want.sum() / want.size
        assert got.block_density == (visible > 0).mean()
        assert got.active_blocks == (visible > 0).sum()
        assert (got.keys_per_row_min, got.keys_per_row_max) == (keys.min(), keys.max())
        assert got.keys_per_row_mean == keys.mean()
        assert got.empty_rows == (keys == 0).sum()


@examples(PATTERNS)
def test_no_row_is_empty_unless_the_pattern_says_so(pattern):
    if not pattern.may_be_empty:
        for length in (1, 2, 50, 200):
            assert dense(pattern, length, length).any(1).all()


@examples(PATTERNS)
def test_causal_says_whether_the_future_is_hidden(pattern):
    assert pattern.causal == (not np.triu(dense(pattern, 200, 200), 1).any())


def random_ranges(seed, length, count=400):
    """Half-open ranges inside [0, length), short ones as likely as long ones."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, length, count)
    span = np.exp(rng.uniform(0, np.log(length), count)).astype(int)
    return low, np.minimum(low + span, length)


STARTS = [(0, 0), (1, 0), (0, 40), (200, -150), (1 << 20, 0), (1 << 20, -150)]


@examples(PATTERNS)
def test_block_state_is_conservative_and_exact_where_it_says(pattern):
    for start, ahead in STARTS:
        check_block_state(pattern, start, ahead)


def check_block_state(pattern, start, ahead):
    """Against the pairs of random ranges from `start`, of keys `ahead` of the queries."""
    seed = start + ahead + 1000
    length, kv_start = 96, max(0, start + ahead)
    mask = dense(pattern, length, length, start, kv_start)
    table = np.pad(mask.astype(int).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    (q_lo, q_hi), (kv_lo, kv_hi) = random_ranges(seed, length), random_ranges(seed + 1, length)
    visible = table[q_hi, kv_hi] - table[q_lo, kv_hi] - table[q_hi, kv_lo] + table[q_lo, kv_lo]
    area = (q_hi - q_lo) * (kv_hi - kv_lo)
    truth = np.where(visible == area, FULL, np.where(visible > 0, PARTIAL, EMPTY))
    ranges = [
        x.astype(np.int32) for x in (q_lo + start, q_hi + start, kv_lo + kv_start, kv_hi + kv_start)
    ]
    state = np.asarray(pattern.block_state(*ranges))
    assert np.isin(state, (EMPTY, PARTIAL, FULL)).all()
    loose = state != truth
    assert (np.broadcast_to(state, truth.shape)[loose] == PARTIAL).all()
    assert not (pattern.block_state_exact and loose.any())


@examples(PATTERNS)
def test_block_state_traces(pattern):
    # The shapes of test_mask_fn_is_the_same_in_numpy_jax_and_traced, for its programs.
    q_lo, kv_lo = positions(50)[:, None] * 8, positions(60)[None, :] * 8
    ranges = q_lo, q_lo + 8, kv_lo, kv_lo + 8
    visible, area = count_blocks(dense(pattern, 400, 480), 8, 8)
    truth = np.where(visible == area, FULL, np.where(visible > 0, PARTIAL, EMPTY))
    state = np.broadcast_to(traced(pattern.block_state, *ranges), truth.shape)
    assert (state[state != truth] == PARTIAL).all()


combinations = st.recursive(
    st.sampled_from(PATTERNS),
    lambda inner: st.one_of(
        st.builds(base.And, inner, inner),
        st.builds(base.Or, inner, inner),
        st.builds(base.Not, inner),
    ),
    max_leaves=5,
)


def evaluate(pattern, q_len, kv_len):
    """The dense mask of a combination from the dense masks of its leaves, by NumPy's operators."""
    match pattern:
        case base.And(a=a, b=b):
            return evaluate(a, q_len, kv_len) & evaluate(b, q_len, kv_len)
        case base.Or(a=a, b=b):
            return evaluate(a, q_len, kv_len) | evaluate(b, q_len, kv_len)
        case base.Not(a=a):
            return ~evaluate(a, q_len, kv_len)
    return dense(pattern, q_len, kv_len)


@hypothesis.given(
    pattern=combinations,
    q_len=st.integers(1, 90),
    kv_len=st.integers(1, 90),
    block_q=st.integers(1, 40),
    block_kv=st.integers(1, 40),
)
def test_algebra_is_boolean_algebra(pattern, q_len, kv_len, block_q, block_kv):
    want = evaluate(pattern, q_len, kv_len)
    np.testing.assert_array_equal(dense(pattern, q_len, kv_len), want)
    mask = lower.lower(pattern, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv)
    check_lowering(mask, want)
    np.testing.assert_array_equal(stats.keys_per_row(mask), want.sum(1))
    square = evaluate(pattern, q_len, q_len)
    assert pattern.may_be_empty or square.any(1).all()
    assert not (pattern.causal and np.triu(square, 1).any())
    assert base.parse(pattern.expression(), PACKAGE) == pattern
