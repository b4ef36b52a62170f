"""The laws of `Selector`, applied to the EXAMPLES of every rule in the folder."""

import copy
import dataclasses

import hypothesis
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import kept_mass
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base
from tests.ops import oracle
from tests.selection import rules

LENGTH = 50  # A multiple of no block.
FIRST = [examples[0] for examples in rules.MASKS.values()]
# One example is enough where what is judged is the pipeline around the scores.
every_example = pytest.mark.parametrize("rule", rules.EXAMPLES, ids=lambda r: r.expression())
# Other examples of a rule add little where one says what a rule must do.
every_example_slowly = pytest.mark.parametrize(
    "rule",
    [pytest.param(r, marks=() if r in FIRST else pytest.mark.slow) for r in rules.EXAMPLES],
    ids=lambda r: r.expression(),
)
every_rule = pytest.mark.parametrize("rule", FIRST, ids=lambda r: type(r).__name__)
# Where a rule adds little to the pipeline: two in the fast lane, all of them in the slow one.
FAST = ("Pooled", "XAttention")


def slowly(chosen):
    return pytest.mark.parametrize(
        "rule",
        [
            pytest.param(r, marks=() if type(r).__name__ in FAST else pytest.mark.slow)
            for r in chosen
        ],
        ids=lambda r: type(r).__name__,
    )


every_rule_slowly = slowly(FIRST)
# A rule that attends to other keys than it is given is held against those in its own tests.
every_mask = slowly([r for r in FIRST if type(r).__name__ not in ("MobaConv", "Psa")])


def check_kept(rule, kept, q_len, kv_len):
    """Kept blocks are candidates in the pattern's own state, and the guard is among them."""
    allowed = rules.lowered(rule, rule.pattern, q_len, kv_len)
    assert np.isin(kept, (0, 1, 2)).all()
    assert ((kept == 0) | (kept == allowed)).all()
    if rule.always is not None:
        guard = (rules.lowered(rule, rule.always, q_len, kv_len) > 0) & (allowed > 0)
        assert (kept > 0)[..., guard].all()


def test_rules_and_patterns_have_names_of_their_own():
    assert not set(rules.NAMES) & set(patterns_base.discover())


@pytest.mark.parametrize("rule", rules.EXAMPLES + rules.OWN, ids=lambda r: r.expression())
def test_equality_hash_and_text_round_trip(rule):
    twin = copy.deepcopy(rule)
    assert twin == rule
    assert hash(twin) == hash(rule)
    assert patterns_base.parse(rule.expression()) == rule
    assert patterns_base.parse(rule.expression(), rules.PACKAGE) == rule
    assert str(rule) == rule.expression()
    assert (rules.EXAMPLES + rules.OWN).count(rule) == 1
    name = type(rule).__module__.rsplit(".", 1)[-1]
    assert type(rule) is patterns_base.find(name, rules.PACKAGE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.block_q = 3


@every_example
def test_choice(rule):
    """What is kept, for each head by itself, and that later tokens change nothing before them."""
    q, k, _ = rules.inputs(batch=1, length=LENGTH)
    changed_from = 2 * max(rule.block_q, rule.block_kv)
    later = (np.arange(LENGTH) >= changed_from)[None, :, None, None]
    q, k = (jnp.concatenate([x, jnp.where(later, -3 * x[:, ::-1], x)]) for x in (q, k))
    kept = rules.chosen(rule, q, k)
    check_kept(rule, kept, LENGTH, LENGTH)
    tables = {"one": 1, "kv": 2, "query": 4}[getattr(rule, "tables", "query")]
    assert kept.shape[:2] == (2, tables)
    assert rule.causal == (rule.pattern.causal and not rule.looks_ahead)
    if rule.causal:
        before = slice(0, changed_from // rule.block_q)
        np.testing.assert_array_equal(kept[0, :, before], kept[1, :, before])
    # The bound holds, and it is no bound that says nothing: budgets leave something out.
    most = rules.states(rule.at_most(LENGTH)) > 0
    assert ((kept > 0).sum(-1) <= most.sum(-1)).all()
    dense = rules.lowered(rule, rule.pattern, LENGTH, LENGTH) > 0
    assert (kept > 0).mean() < dense.mean()


@every_example_slowly
def test_a_budget_for_everything_is_dense(rule):
    q, k, _ = rules.inputs(1, length=LENGTH)
    kept = rules.chosen(rules.keep_all(rule), q * 20, k)  # Masses that underflow count as well.
    dense = rules.lowered(rule, rule.pattern, LENGTH, LENGTH)
    np.testing.assert_array_equal(kept, np.broadcast_to(dense, kept.shape))


@every_example_slowly
def test_ties_go_to_the_lower_index(rule):
    q, k, _ = rules.inputs(2, length=LENGTH)
    kept = rules.chosen(rule, q * 0, k) > 0  # Every key scores the same.
    np.testing.assert_array_equal(kept, rules.chosen(rule, q * 0, k) > 0)
    if getattr(rule, "top_k", None) is None:
        return
    allowed = rules.lowered(rule, rule.pattern, LENGTH, LENGTH) > 0
    guard = np.zeros_like(allowed)
    if rule.always is not None:
        guard = (rules.lowered(rule, rule.always, LENGTH, LENGTH) > 0) & allowed
    free = allowed & ~guard
    if type(rule).__name__ not in (
        "XAttention",
        "AdaSpa",
    ):  # There a block at the edge has less of the mass.
        want = guard | (free & (np.cumsum(free, 1) <= rule.top_k))
        np.testing.assert_array_equal(kept, np.broadcast_to(want, kept.shape))


@every_mask
def test_attention_and_gradients_are_those_of_the_masked_reference(rule):
    q, k, v = rules.inputs(3, batch=1, length=34)
    gate = rules.params(rule, q, k)
    dout = np.random.default_rng(4).standard_normal(q.shape)

    def loss(q, k, v, gate):
        return (rule.attend(q, k, v, params=gate, impl="reference") * dout).sum()

    grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)), compiler_options=rules.COMPILER_OPTIONS)
    value, (dq, dk, dv, dgate) = grad(q, k, v, gate)
    kept = rules.chosen(rule, q, k)
    seen = np.repeat(rules.visible(rule, kept, 34, 34), 4 // kept.shape[1], axis=1)
    want = oracle.attention(q, k, v, seen, dout, np.zeros(q.shape[:3]), scale=8**-0.5)
    np.testing.assert_allclose(value, (want.out * dout).sum(), rtol=1e-4, atol=1e-4)
    for got, expected in ((dq, want.dq), (dk, want.dk), (dv, want.dv)):
        np.testing.assert_allclose(got, expected, atol=2e-4)
    assert all((x == 0).all() for x in jax.tree.leaves(dgate))  # No gradient through a choice.


@slowly([r for r in FIRST if getattr(r, "tables", "query") != "kv"])
def test_heads_that_share_keys_choose_as_if_they_did_not(rule):
    q, k, _ = rules.inputs(5, length=LENGTH)
    gate = rules.params(rule, q, k)
    alone = {x: np.repeat(y, 2, 0) if y.shape[0] == 2 else y for x, y in gate.items()}
    np.testing.assert_array_equal(
        rules.chosen(rule, q, k, gate=gate),
        rules.chosen(rule, q, jnp.repeat(k, 2, axis=2), gate=alone),
    )


@every_rule_slowly
def test_vmap_is_a_loop(rule):
    q, k, _ = rules.inputs(6, batch=4, length=LENGTH)
    want = rules.chosen(rule, q, k)
    q, k = (x.reshape(2, 2, *x.shape[1:]) for x in (q, k))
    gate = rules.params(rule, q[0], k[0])
    mapped = jax.jit(
        jax.vmap(lambda q, k: rule.select(q, k, params=gate)),
        compiler_options=rules.COMPILER_OPTIONS,
    )(q, k)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], mapped)
        np.testing.assert_array_equal(rules.states(one), want[2 * i : 2 * i + 2])


@every_rule
def test_documents_and_padding(rule):
    q, k, _ = rules.inputs(7, batch=1, length=64)
    ids = np.array([[1] * 16 + [2] * 32 + [0] * 16], np.int32)
    if rule.looks_ahead:
        with pytest.raises(ValueError, match="segment_ids must be None"):
            rules.select(rule, q, k, ids)
        return
    # Entry 1: whatever padding holds, nan too. Entry 2: another first document.
    padding, first = ((ids == i)[..., None, None] for i in (0, 1))
    q, k = (
        jnp.concatenate([x, jnp.where(padding, jnp.nan, x), jnp.where(first, -x[:, ::-1], x)])
        for x in (q, k)
    )
    kept = rules.chosen(rule, q, k, jnp.asarray(np.repeat(ids, 3, 0))) > 0
    np.testing.assert_array_equal(kept[0], kept[1])
    second = slice(16 // rule.block_q, 48 // rule.block_q)
    np.testing.assert_array_equal(kept[0, :, second], kept[2, :, second])
    assert kept[0, :, second].any(-1).all()
    row, column = (np.arange(64).reshape(-1, b)[:, 0] for b in (rule.block_q, rule.block_kv))
    foreign = (ids[0, row][:, None] != ids[0, column]) | (ids[0, row] == 0)[:, None]
    assert not kept[..., foreign].any()


@every_rule
def test_no_array_grows_as_the_attention_map(rule):
    length = 8192
    if rule.block_q == 1:  # Its lists are T * S / block_kv long, which the docstring says.
        rule = dataclasses.replace(rule, block_kv=64)
    if hasattr(rule, "group"):
        rule = dataclasses.replace(rule, group=1)
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 2), jnp.bfloat16) for heads in (1, 1)]
    gate = rule.params_like(1, 1, 2)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (x.aval.size for x in equation.outvars)
            for value in jax.tree.leaves(
                equation.params, is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)
            ):
                if isinstance(value, jax.extend.core.ClosedJaxpr):
                    yield from sizes(value.jaxpr)

    traced = jax.make_jaxpr(lambda q, k: rule.select(q, k, params=gate))(*shapes)
    assert max(sizes(traced.jaxpr)) < length**2 / 8


@pytest.mark.slow
@every_example
@hypothesis.given(lengths=rules.RAGGED)
@hypothesis.settings(max_examples=2)
def test_any_length(rule, lengths):
    q_len, kv_len = rules.ragged(rule, lengths)
    q, k, v = rules.inputs(8, batch=1, length=q_len, kv_len=kv_len, heads=2, kv_heads=1, dim=4)
    mask = rules.select(rule, q, k)
    kept = rules.states(mask)
    check_kept(rule, kept, q_len, kv_len)
    out, lse = rules.attend_masked(q, k, v, mask)
    seen = np.repeat(rules.visible(rule, kept, q_len, kv_len), 2 // kept.shape[1], axis=1)
    nothing = np.zeros(q.shape), np.zeros(q.shape[:3])
    want = oracle.attention(q, k, v, seen, *nothing, scale=0.5)
    np.testing.assert_allclose(out, want.out, atol=1e-5)
    np.testing.assert_allclose(lse, want.lse, atol=1e-5)


def test_wrong_fields_are_named():
    pooled = patterns_base.find("pooled", rules.PACKAGE)
    for fields, message in [
        ({}, "give exactly one"),
        ({"top_k": 1, "top_p": 0.5}, "give exactly one"),
        ({"top_p": 1.5}, "top_p=1.5 must be > 0 and <= 1"),
        ({"top_k": -1}, "top_k=-1 must be an int >= 0"),
        ({"top_k": 1, "block_q": 64}, "block_kv=128 must divide block_q=64"),
        ({"top_k": 1, "min_blocks": 2}, "min_blocks=2 must be None"),
        ({"top_k": 1, "tables": "both"}, "tables='both' must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            pooled(**fields)
    with pytest.raises(ValueError, match=r"top_k=\(1, 2\) must have one value for each of 4"):
        rules.select(pooled(top_k=(1, 2), block_q=16, block_kv=16), *rules.inputs()[:2])
    with pytest.raises(ValueError, match=r"params=\[\] must be \['gate_key', 'gate_query'\]"):
        patterns_base.find("seer", rules.PACKAGE)(top_k=1).select(*rules.inputs()[:2])


def test_budgets_of_single_heads():
    pooled = patterns_base.find("pooled", rules.PACKAGE)(top_k=(0, 1, 2, 3), block_q=8, block_kv=8)
    q, k, _ = rules.inputs(9, length=64)
    kept = rules.chosen(pooled, q, k) > 0
    assert (kept[:, :, -1].sum(-1) == np.array([1, 2, 3, 4])).all()


def test_overlap_of_heads_and_of_layers():
    pooled = patterns_base.find("pooled", rules.PACKAGE)(top_k=2, block_q=8, block_kv=8)
    first, second = (rules.select(pooled, *rules.inputs(seed, length=48)[:2]) for seed in (9, 10))
    flat = [(rules.states(m) > 0).reshape(2, 4, -1) for m in (first, second)]
    for other, sets in ((None, (flat[0], flat[0])), (second, flat)):
        got = kept_mass.overlap(first, other)
        for b, u, v in np.ndindex(2, 4, 4):
            one, two = sets[0][b, u], sets[1][b, v]
            np.testing.assert_allclose(got[b, u, v], (one & two).sum() / (one | two).sum())
    fewer = rules.select(pooled, *rules.inputs(length=40)[:2])
    with pytest.raises(ValueError, match=r"=\(2, 5, 5\), must have \(2, 6, 6\)"):
        kept_mass.overlap(first, fewer)


def test_base_is_abstract():
    q, k, _ = rules.inputs(length=20)
    with pytest.raises(NotImplementedError, match="Selector must define keep"):
        base.Selector().select(q, k)
    with pytest.raises(NotImplementedError, match="BlockScores must define scores"):
        base.BlockScores(top_k=1).select(q, k)
