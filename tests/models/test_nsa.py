"""NSA against a loop over queries in float64, written from the paper's equations."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.models import attention, transformer
from sparse_attn.models.mixers import nsa
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from sparse_attn.ops.token_select import compress, lists
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import causal
from sparse_attn.train import flops, tasks
from tests.ops import contract
from tests.ops.test_token_select import largest
from tests.train import tiny

RULE, MEAN = nsa.EXAMPLES
jit = functools.partial(jax.jit, compiler_options=contract.COMPILER_OPTIONS)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(z):
    weights = np.exp(z - z.max(initial=-np.inf))
    return weights / weights.sum()


def rotated(x):
    """Pairs (i, i + H/2) of `[T, heads, H]` turned by t * 10000 ** (-2i / H)."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * 10_000.0 ** (-np.arange(half) / half)
    sin, cos = np.sin(angle)[:, None], np.cos(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def by_definition(rule, params, x):
    """One row `[T, D]` of one document: output `[T, D]` and the choice `[T, K]` as sets."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    x = np.asarray(x, np.float64)

    def project(name):
        return np.einsum("td,dnh->tnh", x, params[name]["kernel"])

    q, k, v = rotated(project("query")), {}, {}
    for branch in nsa.BRANCHES:
        own = rule.keys == "per_branch" and branch != "selected"
        suffix = f"_{branch}" if own else ""
        k[branch], v[branch] = rotated(project(f"key{suffix}")), project(f"value{suffix}")
    length, heads, dim = q.shape
    kv_heads = k["window"].shape[1]
    size, stride, block = rule.compress_block, rule.stride, rule.block_kv

    def phi(tokens, name):  # eq. 7: one vector of `size` tokens [l, H]
        if rule.compress == "mean":
            return tokens.mean(0)
        tokens = tokens + params[f"{name}_positions"]
        hidden = gelu(np.einsum("lh,lhf->f", tokens, params[f"{name}_compress_in"]))
        return hidden @ params[f"{name}_compress_out"]

    out = np.zeros_like(q)
    chosen = [[None] * kv_heads for _ in range(length)]
    gates = np.ones((length, heads, 3))
    if rule.gates == "learned":
        hidden = x @ params["gate_in"]
        hidden = hidden * sigmoid(hidden)
        gates = sigmoid(np.einsum("tf,fnc->tnc", hidden, params["gate_out"]))
    for t in range(length):
        starts = [i for i in range(0, length, stride) if i + size - 1 <= t]
        if set(rule.branches) == {"window"}:
            starts = []  # Nothing is compressed, and there is nothing to compress it with.
        for g in range(kv_heads):
            group = range(g * heads // kv_heads, (g + 1) * heads // kv_heads)
            keys = np.array([phi(k["compressed"][i : i + size, g], "key") for i in starts])
            values = np.array([phi(v["compressed"][i : i + size, g], "value") for i in starts])
            importance = np.zeros(-(-length // block))
            compressed = {n: np.zeros(dim) for n in group}
            for n in group if starts else ():
                p = softmax(keys @ q[t, n] / np.sqrt(dim))  # eq. 8
                compressed[n] = p @ values
                for i, weight in zip(starts, p, strict=True):  # eq. 9 and 10: shared strides
                    for strip in range(i, i + size, stride):
                        importance[strip // block] += weight
            own = t // block
            forced = [j for j in range(own + 1) if j < rule.initial or j > own - rule.local]
            rest = sorted(set(range(own + 1)) - set(forced), key=lambda j: (-importance[j], j))
            taken = {*forced, *rest[: rule.top_k - len(forced)]}  # eq. 11
            chosen[t][g] = taken
            seen = {
                "selected": [s for s in range(t + 1) if s // block in taken],
                "window": list(range(max(0, t - rule.window + 1), t + 1)),
            }
            for n in group:
                results = {"compressed": compressed[n]}
                for branch, at in seen.items():
                    p = softmax(k[branch][at, g] @ q[t, n] / np.sqrt(dim))
                    results[branch] = p @ v[branch][at, g]
                for c, branch in enumerate(nsa.BRANCHES):  # eq. 5
                    if branch in rule.branches:
                        out[t, n] += gates[t, n, c] * results[branch]
    return np.einsum("tnh,nhd->td", out, params["out"]["kernel"]), chosen


def over_all_pairs(rule, params, x, chosen):
    """`by_definition` with its choice, over all pairs of tokens at once in jnp, for gradients."""
    length = len(x)
    size, stride, at = rule.compress_block, rule.stride, np.arange(length)
    tokens = np.arange(0, length - size + 1, stride)[:, None] + np.arange(size)

    def turned(x):
        half = x.shape[-1] // 2
        angle = at[:, None] * 10_000.0 ** (-np.arange(half) / half)
        pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
        return jnp.concatenate([pairs.real, pairs.imag], -1)

    def of(branch):
        own = rule.keys == "per_branch" and branch != "selected"
        names = (f"{name}_{branch}" if own else name for name in ("key", "value"))
        k, v = (jnp.tensordot(x, params[name]["kernel"], 1) for name in names)
        return turned(k), v

    def phi(x, name):
        x = x[tokens]  # [n, l, K, H]
        if rule.compress == "mean":
            return x.mean(1)
        z = x + params[f"{name}_positions"][:, None]
        z = jnp.einsum("nlkh,lhf->nkf", z, params[f"{name}_compress_in"])
        z = z / (1 + jnp.exp(-2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        return z @ params[f"{name}_compress_out"]

    q = turned(jnp.tensordot(x, params["query"]["kernel"], 1))

    def attend(k, v, seen):  # [T, S], or for each KV head
        group = q.shape[1] // k.shape[1]
        k, v = (jnp.repeat(x, group, 1) for x in (k, v))
        seen = np.broadcast_to(seen, (q.shape[1] // group, *np.shape(seen)[-2:])).repeat(group, 0)
        z = jnp.where(seen, jnp.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[2]), -1e30)
        p = jnp.where(seen, jnp.exp(z - z.max(-1, keepdims=True)), 0)
        return jnp.einsum("nts,snh->tnh", p / jnp.maximum(p.sum(-1, keepdims=True), 1e-30), v)

    taken = np.array([[[s // rule.block_kv in blocks for s in at] for blocks in t] for t in chosen])
    k, v = of("compressed")
    outs = (
        attend(phi(k, "key"), phi(v, "value"), tokens[:, -1] <= at[:, None]),
        attend(*of("selected"), np.moveaxis(taken, 1, 0) & (at <= at[:, None])),
        attend(*of("window"), (at <= at[:, None]) & (at > at[:, None] - rule.window)),
    )
    gates = jnp.ones((length, q.shape[1], 3))
    if rule.gates == "learned":
        hidden = x @ params["gate_in"]
        hidden = hidden / (1 + jnp.exp(-hidden))
        gates = 1 / (1 + jnp.exp(-jnp.tensordot(hidden, params["gate_out"], 1)))
    out = sum(gates[..., c, None] * x for c, x in enumerate(outs))
    return jnp.einsum("tnh,nhd->td", out, params["out"]["kernel"])


def layer_of(rule, impl=None, heads=4, kv_heads=2, dim=8, short_conv=None):
    return rule.layer(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, impl=impl, short_conv=short_conv
    )


@functools.cache  # The same for all lengths and backends.
def variables_of(rule, **sizes):
    layer = layer_of(rule, "reference", **sizes)
    return jit(layer.init)(jax.random.key(1), jnp.zeros((1, 16, 12)))


def made(rule, length, *, batch=1, seed=0, impl=None, **sizes):
    layer = layer_of(rule, impl, **sizes)
    x = np.random.default_rng(seed).standard_normal((batch, length, 12)) * 2
    x = jnp.asarray(x, jnp.float32)
    return layer, variables_of(rule, **sizes), x


def check(rule, length, seed=0, **sizes):
    layer, variables, x = made(rule, length, seed=seed, **sizes)
    got, kept = jit(functools.partial(layer.apply, mutable="intermediates"))(variables, x)
    want, chosen = by_definition(rule, variables["params"], x[0])
    np.testing.assert_allclose(got[0], want, atol=3e-5)
    if "selected" in rule.branches:
        mine = np.asarray(kept["intermediates"]["selected"][0][0])
        assert all({*mine[t, g]} - {-1} == chosen[t][g] for t, g in np.ndindex(mine.shape[:2]))


@pytest.mark.parametrize(
    "rule, length",
    [(RULE, 45), pytest.param(MEAN, 61, marks=pytest.mark.slow)],
    ids=["mlp", "mean"],
)
def test_layer_is_the_definition(rule, length):
    check(rule, length)


@pytest.mark.slow
@pytest.mark.parametrize("branches", [*((b,) for b in nsa.BRANCHES), nsa.BRANCHES[1:]])
def test_each_branch_can_run_alone(branches):
    check(nsa.Nsa(**{**vars(RULE), "branches": branches}), 45)


@pytest.mark.slow
@hypothesis.given(
    length=st.integers(1, 70), seed=st.integers(0, 9), rule=st.sampled_from(nsa.EXAMPLES),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 4), (6, 2)]),
)  # fmt: skip
@hypothesis.settings(max_examples=4)
def test_any_length(length, seed, rule, heads):
    check(rule, length, seed, heads=heads[0], kv_heads=heads[1])


def check_no_output_follows_a_later_token(layer, variables, x):
    """Of rows of 48 tokens."""
    apply, x = jit(layer.apply), np.asarray(x)
    before = np.asarray(apply(variables, x))
    for t in (5, 17, 31):
        later = (np.arange(48) > t)[None, :, None]
        after = np.asarray(apply(variables, np.where(later, 5 * x[:, ::-1] + 1, x)))
        np.testing.assert_allclose(after[:, : t + 1], before[:, : t + 1], atol=1e-6)
        assert np.abs(after[:, t + 1 :] - before[:, t + 1 :]).max() > 0.1


def test_no_output_follows_a_later_token():
    check_no_output_follows_a_later_token(*made(RULE, 48, impl="reference"))


def test_documents_are_rows_of_their_own():
    layer, variables, x = made(RULE, 48, impl="reference")
    # The first is as long as three blocks, so that blocks lie alike in both.
    ids = np.array([[1] * 24 + [2] * 19 + [0] * 5])
    apply = jit(layer.apply)
    # Rotations speak of differences; compressed keys are of rotated ones, so positions restart.
    places, x = np.concatenate([np.arange(24), np.arange(24)])[None], np.asarray(x)
    got = np.asarray(apply(variables, x, positions=places, segment_ids=ids))
    np.testing.assert_allclose(got[:, :24], apply(variables, x[:, :24]), atol=2e-5)
    np.testing.assert_allclose(got[:, 24:43], apply(variables, x[:, 24:43]), atol=2e-5)
    assert not np.asarray(got[:, 43:]).any()


def test_gradients_are_those_of_the_masked_definition():
    """Through gates, compression and all branches, by the dense reference of both ops."""
    grads = {}
    for impl in ("reference", "xla"):
        layer, variables, x = made(RULE, 45, impl=impl)
        weight = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)

        def loss(params, x, layer=layer, weight=weight):
            return (layer.apply({"params": params}, x) * weight).sum()

        grads[impl] = jit(jax.grad(loss, (0, 1)))(variables["params"], x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max())),
        grads["xla"], grads["reference"],
    )  # fmt: skip
    for path, grad in jax.tree_util.tree_leaves_with_path(grads["xla"]):
        assert np.isfinite(grad).all()
        assert np.abs(grad).max() > 1e-4, path


@pytest.mark.slow
@pytest.mark.parametrize("rule", nsa.EXAMPLES, ids=["mlp", "mean"])
def test_gradients_are_those_of_the_equations(rule):
    """Of x and of all parameters: projections, gates, positions and both layers of compression."""
    layer, variables, x = made(rule, 45, impl="reference")
    params, weight = variables["params"], np.random.default_rng(2).standard_normal(x.shape[1:])
    want, chosen = by_definition(rule, params, x[0])

    def run(f):
        def loss(params, x):
            out = f(params, x)
            return (out * weight).sum(), out

        return jit(jax.grad(loss, (0, 1), has_aux=True))(params, x[0])

    mine, _ = run(lambda params, x: layer.apply({"params": params}, x[None])[0])
    theirs, out = run(lambda params, x: over_all_pairs(rule, params, x, chosen))
    np.testing.assert_allclose(out, want, atol=3e-5)
    theirs = dict(jax.tree_util.tree_leaves_with_path(theirs))
    for path, grad in jax.tree_util.tree_leaves_with_path(mine):
        most = np.abs(theirs[path]).max()
        assert most > 1e-3, path
        np.testing.assert_allclose(grad, theirs[path], atol=2e-5 * most + 2e-5, err_msg=str(path))


@pytest.mark.parametrize("short_conv", [None, 3])
def test_all_blocks_without_gates_are_dense_attention_of_the_same_weights(short_conv):
    rule = patterns_base.parse(
        "nsa(block_kv=8, top_k=6, window=8, compress_block=4, stride=4, compress='mean', "
        "branches=('selected',), gates='none', keys='shared')"
    )
    layer, variables, x = made(rule, 45, batch=2, impl="reference", short_conv=short_conv)
    dense = attention.SelfAttention(
        num_heads=4, num_kv_heads=2, head_dim=8, pattern=causal.Causal(), impl="reference",
        short_conv=short_conv,
    )  # fmt: skip
    want = jit(dense.init)(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, want) == jax.tree.map(jnp.shape, variables)
    ids = jnp.array([[1] * 45, [1] * 20 + [2] * 25])
    got, wanted = (jit(m.apply)(want, x, segment_ids=ids) for m in (layer, dense))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


SMALL = "nsa(block_kv=4, top_k=3, window=4, compress_block=4, stride=2)"


def test_a_schedule_with_static_layers_shares_the_parameters():
    """Every layer holds all parameters; static ones ignore those they do not have."""
    mixed = tiny.model(pattern=patterns_base.parse(f"per_layer((local(window=6), {SMALL}))"))
    tokens = jnp.asarray(next(tiny.Batches())["inputs"])
    variables = jit(mixed.init)(jax.random.key(0), tokens)
    assert variables["params"]["layers"]["attention"]["gate_out"].shape == (2, 8, 2, 3)
    logits = jit(mixed.apply)(variables, tokens)
    # Without the mixer's own parameters, the first layer alone is left as it was.
    names = {"query", "key", "value", "out"}
    layers = variables["params"]["layers"]
    plain = {k: v for k, v in layers["attention"].items() if k in names}
    dense = {"params": variables["params"] | {"layers": layers | {"attention": plain}}}
    window = tiny.model(pattern=patterns_base.parse("local(window=6)"))
    static = jit(window.apply)(variables, tokens)
    np.testing.assert_array_equal(static, jit(window.apply)(dense, tokens))
    assert np.abs(static - logits).max() > 1e-3


@pytest.mark.slow
def test_a_model_trains():
    pattern = patterns_base.parse(f"per_layer((local(window=6), {SMALL}))")
    tiny.check_it_learns(tiny.model(pattern=pattern))


def test_config_names_it():
    sizes = {"num_layers": 2, "embed_dim": 16, "num_heads": 2}
    made = tasks.build_model({"pattern": ("causal()", "nsa(top_k=8)"), **sizes}, vocab_size=64)
    assert made.config.layer_patterns()[1] == nsa.Nsa(top_k=8)
    assert flops.attention_cost(made.config, context=64, batch_size=1)["block_density"] > 0
    # Layers with the same parameters may differ in what needs none.
    tasks.build_model({"pattern": ("nsa(top_k=8)", "nsa()"), **sizes}, vocab_size=64)
    with pytest.raises(ValueError, match="one of them must have the parameters of all others"):
        tasks.build_model({"pattern": ("nsa(keys='shared')", "nsa()"), **sizes}, vocab_size=64)
    with pytest.raises(ValueError, match="sink_logits must be None for nsa"):
        transformer.TransformerConfig(
            vocab_size=64, pattern=nsa.Nsa(), sink_logits="learned"
        ).largest_layer().layer(sink_logits="learned")


def test_text_round_trip_and_wrong_fields():
    for rule in nsa.EXAMPLES:
        assert patterns_base.parse(rule.expression()) == rule
        assert rule.causal
    for fields, message in [
        ({"block_kv": 40}, "block_kv=40 must be a multiple of stride=16"),
        ({"compress_block": 128}, "compress_block=128 must be <= block_kv=64"),
        ({"top_k": 2}, r"top_k=2 must be >= initial \+ local = 3"),
        ({"branches": ("all",)}, r"branches=\('all',\) must be one or more of"),
        ({"gates": "on"}, "gates='on' must be one of"),
        ({"block_q": 64}, "block_q=64 must be 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            nsa.Nsa(**fields)


# --- Memory ---------------------------------------------------------------------------------------


def largest_of_gradient(layer, shape, dtype=jnp.float32):
    """Numbers in the largest array of the program that makes the gradient of the parameters."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]

    def gradient(params, x):
        return jax.grad(lambda p: layer.apply({"params": p}, x).sum())(params)

    return largest(gradient, params, x)


def test_no_array_grows_as_queries_times_keys(monkeypatch):
    from sparse_attn.ops.token_select import by_block, xla

    for module in (lists, by_block, xla):
        monkeypatch.setitem(module._AT_ONCE, "cpu", 1 << 16)
    rule = nsa.Nsa(block_kv=64, top_k=4, window=64)
    layer = layer_of(rule, heads=2, kv_heads=1)

    with tiles.assume(tiles.Target("cpu", "cpu")):
        small, large = (largest_of_gradient(layer, (1, n, 16)) for n in (1 << 12, 1 << 15))
    # Compressed keys see T * S / stride pairs, as lists of blocks of 128 x 128 of them.
    assert large < 8.5 * small
    assert large < (1 << 30) / 50


@pytest.mark.slow
def test_128k_tokens_at_the_size_of_a_large_layer():
    """As a GPU would run it, forward and backward: steps as large as they are there."""
    rule = nsa.Nsa()
    layer = rule.layer(num_heads=64, num_kv_heads=4, head_dim=128, impl="xla", dtype=jnp.bfloat16)

    with tiles.assume(tiles.Target("gpu", "a GPU")):
        shapes = [(1, n, 64) for n in (1 << 14, 1 << 17)]
        small, large = (largest_of_gradient(layer, x, jnp.bfloat16) for x in shapes)
    # A step has as many numbers whatever the length; each query head alone has 1 << 30 compressed
    # pairs.
    assert large < 1.2 * small
    assert 4 * large < 5 << 30


def test_choice_does_not_depend_on_the_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((2, 50, n, 8)), jnp.float32) for n in (4, 2))
    strides = compress.Strides(size=4, stride=2)
    keys = jit(lambda k: strides.windows(k).mean(2))(k)
    lse = attend_lib.attend(q, keys, keys, mask=strides, return_lse=True, impl="reference")[1]

    def choose():
        f = functools.partial(compress.choose_blocks, strides=strides, block=4, top_k=5)
        return jit(f)(q, keys, lse)

    whole = choose()
    monkeypatch.setitem(lists._AT_ONCE, "cpu", 1 << 10)
    monkeypatch.setattr(lists, "_PREFIX", 20)
    np.testing.assert_array_equal(choose(), whole)
