"""Local and global latent layers against the up-projected form, by a loop and by dense softmax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.models import transformer
from sparse_attn.models.mixers import nsa, nsa_latent
from sparse_attn.patterns import base as patterns_base
from sparse_attn.train import flops, tasks
from tests.models import test_nsa
from tests.ops import contract
from tests.train import tiny

GLOBAL, LOCAL = nsa_latent.EXAMPLES
SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
LENGTH, WIDTH = 45, 12
ALL = dataclasses.replace(GLOBAL, top_k=6, gates="none", branches=("selected",))
GATED = ("value_compress_out", "gate_out")
jit = functools.partial(jax.jit, compiler_options=contract.COMPILER_OPTIONS)


@functools.cache
def variables_of(rule):
    layer = rule.layer(**SIZES, impl="reference")
    return jit(layer.init)(jax.random.key(1), jnp.zeros((1, 16, WIDTH)))


def made(rule, length=LENGTH, *, impl="reference", seed=0):
    x = np.random.default_rng(seed).standard_normal((1, length, WIDTH)) * 2
    return rule.layer(**SIZES, impl=impl), variables_of(rule), jnp.asarray(x, jnp.float32)


def up_projected(rule, params, latents, name, xp=np):
    """Keys or values `[T, N, size]` of the latents `[T, K, c]` of one row, head by head."""
    up = params[f"{name}_up"]  # [K, c, N, size]
    count, _, heads, _ = up.shape
    if rule.is_local:
        return xp.einsum("tkc,kcnh->tnh", latents, up) / count**0.5
    of = [n * count // heads for n in range(heads)]
    return xp.stack([latents[:, of[n]] @ up[of[n], :, n] for n in range(heads)], 1)


def projected(rule, params, x, xp=np):
    """Queries `[T, N, H]`, latents `[T, K, c]` and the shared key `[T, R]` of one row `[T, D]`."""
    _, rope_dim = rule.sizes(SIZES["head_dim"])
    q, latents, k_rope = (
        xp.einsum("td,dnh->tnh", x, params[name]["kernel"])
        for name in ("query", "latent", "key_rope")
    )
    q = xp.concatenate([q[..., :-rope_dim], rotated(q[..., -rope_dim:], xp)], -1)
    return q, latents, rotated(k_rope, xp)[:, 0]


def rotated(x, xp):
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * 10_000.0 ** (-np.arange(half) / half)
    sin, cos = np.sin(angle)[:, None], np.cos(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return xp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def dense(rule, params, x, visible):
    """One row by dense softmax over the pairs of `visible [T, T]`, in the up-projected form."""
    q, latents, k_rope = projected(rule, params, x, jnp)
    k = up_projected(rule, params, latents, "key", jnp)
    k = jnp.concatenate([k, jnp.repeat(k_rope[:, None], k.shape[1], 1)], -1)
    v = up_projected(rule, params, latents, "value", jnp)
    logits = jnp.einsum("tnh,snh->nts", q, k) * SIZES["head_dim"] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), -1)
    return jnp.einsum("nts,snh,nhd->td", weights, v, params["out"]["kernel"])


def causal_and_band():
    back = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    return back >= 0, (back >= 0) & (back < LOCAL.window)


def by_definition(rule, params, x):
    """A global layer, query by query in float64: output `[T, D]`, the choice `[T, K]` as sets."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    x = np.asarray(x, np.float64)
    q, latents, k_rope = projected(rule, params, x)
    length, heads, dim = q.shape
    count, width = latents.shape[1:]
    size, stride, block = rule.compress_block, rule.stride, rule.block_kv
    keys = np.concatenate([latents, np.repeat(k_rope[:, None], count, 1)], -1)

    def phi(tokens, name):  # [n, l, K, X] -> [n, K, X]
        tokens = tokens + params[f"{name}_positions"][:, None]
        hidden = test_nsa.gelu(np.einsum("nlkh,lhf->nkf", tokens, params[f"{name}_compress_in"]))
        return hidden @ params[f"{name}_compress_out"]

    def with_rope(latents, ropes):
        k = up_projected(rule, params, latents, "key")
        return np.concatenate([k, np.repeat(ropes, heads // count, 1)], -1)

    starts = np.arange(0, length - size + 1, stride)
    blocks = [np.stack([y[i : i + size] for i in starts]) for y in (keys, latents)]
    compressed = phi(blocks[0], "key")
    # Two key (value) arrays: of compressed blocks, and of tokens.
    k_blocks = with_rope(compressed[..., :width], compressed[..., width:])
    v_blocks = up_projected(rule, params, phi(blocks[1], "value"), "value")
    k_tokens = with_rope(latents, keys[..., width:])
    v_tokens = up_projected(rule, params, latents, "value")
    hidden = x @ params["gate_in"]
    hidden = hidden * test_nsa.sigmoid(hidden)
    gates = test_nsa.sigmoid(np.einsum("tf,fnc->tnc", hidden, params["gate_out"]))
    out, chosen = np.zeros_like(q), [[None] * count for _ in range(length)]
    for t in range(length):
        past = starts + size - 1 <= t
        for g in range(count):
            group = range(g * heads // count, (g + 1) * heads // count)
            importance = np.zeros(-(-length // block))
            for n in group if past.any() else ():
                p = test_nsa.softmax(k_blocks[past, n] @ q[t, n] / np.sqrt(dim))
                out[t, n] = gates[t, n, 0] * (p @ v_blocks[past, n])
                for i, weight in zip(starts[past], p, strict=True):
                    for strip in range(i, i + size, stride):
                        importance[strip // block] += weight
            own = t // block
            forced = [j for j in range(own + 1) if j < rule.initial or j > own - rule.local]
            rest = sorted(set(range(own + 1)) - set(forced), key=lambda j: (-importance[j], j))
            chosen[t][g] = {*forced, *rest[: rule.top_k - len(forced)]}
            at = [s for s in range(t + 1) if s // block in chosen[t][g]]
            for n in group:
                p = test_nsa.softmax(k_tokens[at, n] @ q[t, n] / np.sqrt(dim))
                out[t, n] += gates[t, n, 1] * (p @ v_tokens[at, n])
    return np.einsum("tnh,nhd->td", out, params["out"]["kernel"]), chosen


def test_a_global_layer_is_the_definition_on_up_projected_latents():
    layer, variables, x = made(GLOBAL, impl=None)
    got, kept = jit(functools.partial(layer.apply, mutable="intermediates"))(variables, x)
    want, chosen = by_definition(GLOBAL, variables["params"], x[0])
    np.testing.assert_allclose(got[0], want, atol=3e-5)
    mine = np.asarray(kept["intermediates"]["selected"][0][0])
    assert all({*mine[t, g]} - {-1} == chosen[t][g] for t, g in np.ndindex(mine.shape[:2]))


def test_a_local_layer_is_dense_attention_in_a_band():
    layer, variables, x = made(LOCAL, impl=None)
    want = dense(LOCAL, variables["params"], x[0], causal_and_band()[1])
    np.testing.assert_allclose(jit(layer.apply)(variables, x)[0], want, atol=1e-5)


def test_all_blocks_of_a_global_layer_are_dense_causal_attention():
    layer, variables, x = made(ALL, impl=None)
    want = dense(ALL, variables["params"], x[0], causal_and_band()[0])
    np.testing.assert_allclose(jit(layer.apply)(variables, x)[0], want, atol=1e-5)
    # With the other branch in place, which adds nothing, and all gates at one half.
    layer, variables, x = made(dataclasses.replace(GLOBAL, top_k=6))
    zeros = {name: jnp.zeros_like(variables["params"][name]) for name in GATED}
    variables = {"params": variables["params"] | zeros}
    want = dense(GLOBAL, variables["params"], x[0], causal_and_band()[0]) / 2
    np.testing.assert_allclose(jit(layer.apply)(variables, x)[0], want, atol=1e-5)


@pytest.mark.parametrize("latents, group", [(1, 4), (2, 2)], ids=["mla", "gla"])
def test_absorbed_projections_are_the_up_projected_form(latents, group):
    rng = np.random.default_rng(0)
    shapes = (
        (2, 9, latents, 5),
        (2, 9, latents * group, 3),
        *((latents, 5, group, h) for h in (3, 7)),
    )
    c, q, key_up, value_up = (jnp.asarray(rng.standard_normal(x), jnp.float32) for x in shapes)

    def attend(q, k, v):
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
        weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k), -1)
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    @jit
    def both(q, c):
        keys, values = (nsa_latent.up_project(c, up) for up in (key_up, value_up))
        absorbed = attend(nsa_latent.absorb(q, key_up), c, c)
        return nsa_latent.read_out(absorbed, value_up), attend(q, keys, values)

    got, want = both(q, c)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", nsa_latent.EXAMPLES, ids=["global", "local"])
def test_no_output_follows_a_later_token(rule):
    test_nsa.check_no_output_follows_a_later_token(*made(rule, 48))


@pytest.mark.parametrize("rule", nsa_latent.EXAMPLES, ids=["global", "local"])
def test_documents_are_rows_of_their_own(rule):
    layer, variables, x = made(rule, 48)
    # The first is as long as three blocks, so that blocks lie alike in both.
    ids = np.array([[1] * 24 + [2] * 19 + [0] * 5])
    apply, x = jit(layer.apply), np.asarray(x)
    places = np.concatenate([np.arange(24), np.arange(24)])[None]
    got = np.asarray(apply(variables, x, positions=places, segment_ids=ids))
    np.testing.assert_allclose(got[:, :24], apply(variables, x[:, :24]), atol=2e-5)
    np.testing.assert_allclose(got[:, 24:43], apply(variables, x[:, 24:43]), atol=2e-5)
    assert not got[:, 43:].any()


def gradients(f, params, x):
    weight = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    return jit(jax.grad(lambda p, x: (f(p, x) * weight).sum(), (0, 1)))(params, x)


def assert_same(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max())),
        got, want,
    )  # fmt: skip
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


@pytest.mark.parametrize("rule", [ALL, LOCAL], ids=["global", "local"])
def test_gradients_are_those_of_dense_attention(rule):
    layer, variables, x = made(rule, impl=None)
    visible = causal_and_band()[1 if rule.is_local else 0]
    names = {"query", "latent", "key_rope", "key_up", "value_up", "out"}
    params = {name: x for name, x in variables["params"].items() if name in names}
    others = {name: x for name, x in variables["params"].items() if name not in names}
    got = gradients(lambda p, x: layer.apply({"params": p | others}, x), params, x)
    assert_same(got, gradients(lambda p, x: dense(rule, p, x[0], visible)[None], params, x))
    if not rule.is_local:  # A head reads the latent of its own group alone.
        used = np.abs(got[0]["key_up"]).max((1, 3)) > 0
        np.testing.assert_array_equal(
            used, [[True, True, False, False], [False, False, True, True]]
        )


@pytest.mark.slow
def test_gradients_of_a_global_layer_reach_all_its_parameters():
    def of(impl):
        layer, variables, x = made(GLOBAL, impl=impl)
        return gradients(lambda p, x: layer.apply({"params": p}, x), variables["params"], x)

    got = of("xla")
    assert_same(got, of("reference"))
    for path, grad in jax.tree_util.tree_leaves_with_path(got):
        assert np.abs(grad).max() > 1e-4, path


def test_a_token_of_the_schedule_takes_half_of_the_cache_of_nsa_or_less():
    pair = nsa_latent.NsaLatent(), nsa_latent.NsaLatent(branches=nsa_latent.LOCAL)
    for heads, dim in ((1, 64), (4, 64), (4, 128)):
        sizes = {"num_kv_heads": heads, "head_dim": dim}
        for length in (64, 512, 4096, 1 << 17):
            mine = sum(rule.cache_per_token(length, **sizes) for rule in pair) / 2
            assert mine <= 0.5 * nsa.Nsa().cache_per_token(length, **sizes)
    # As the arrays of a layer have it: K latents and one rotated key a token, and its window's.
    sizes = {"num_kv_heads": 4, "head_dim": 64}
    token = 4 * 64 + 32
    assert pair[1].cache_per_token(1024, **sizes) == token * 512 / 1024
    assert pair[0].cache_per_token(1024, **sizes) == token + 63 * 4 * (64 + 32 + 64) / 1024
    # Of NSA: keys and values of tokens, and of compressed blocks, and its window's.
    assert nsa.Nsa().cache_per_token(1024, **sizes) == 2 * 4 * 64 * (1 + 63 / 1024 + 512 / 1024)
    shared = nsa.Nsa(keys="shared").cache_per_token(1024, **sizes)
    assert shared == 2 * 4 * 64 * (1 + 63 / 1024)


SHORT = "nsa_latent(block_kv=4, top_k=3, compress_block=4, stride=2)"
SCHEDULE = f"per_layer((nsa_latent(branches=('window',), window=4), {SHORT}))"


def test_layers_alternate_in_a_model():
    model = tiny.model(pattern=patterns_base.parse(SCHEDULE), head_dim=8)
    assert model.config.largest_layer() == patterns_base.parse(SHORT)
    tokens = next(tiny.Batches())["inputs"]
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    layers = variables["params"]["layers"]["attention"]
    assert layers["key_up"].shape == (2, 1, 8, 2, 4)
    assert layers["gate_out"].shape == (2, 8, 2, 3)
    for layer_loop in transformer.LAYER_LOOPS:
        model = tiny.model(pattern=model.config.pattern, head_dim=8, layer_loop=layer_loop)
        assert jax.eval_shape(model.apply, variables, tokens).shape == (*tokens.shape, tiny.VOCAB)


@pytest.mark.slow
def test_a_model_trains():
    """Of a local and a global layer, on packed documents."""
    tiny.check_it_learns(tiny.model(pattern=patterns_base.parse(SCHEDULE), head_dim=8))


def test_config_names_it():
    sizes = {"num_layers": 4, "embed_dim": 32, "num_heads": 4, "num_kv_heads": 2}
    made = tasks.build_model({"pattern": SCHEDULE, **sizes}, vocab_size=64)
    entries = tuple(p.expression() for p in patterns_base.parse(SCHEDULE).patterns)
    assert tasks.build_model({"pattern": entries, **sizes}, vocab_size=64) == made
    assert [p.is_local for p in made.config.layer_patterns()] == [True, False, True, False]
    assert flops.attention_cost(made.config, context=64, batch_size=1)["block_density"] > 0


@pytest.mark.parametrize(
    "other", ["causal()", "nsa()", "nsa_latent(branches=('window',), rope_dim=4)"]
)
def test_what_it_does_not_alternate_with(other):
    pattern = patterns_base.parse(f"per_layer(({other}, nsa_latent()))")
    with pytest.raises(ValueError, match="one of them must have the parameters of all others"):
        transformer.TransformerConfig(vocab_size=64, pattern=pattern)


def test_text_round_trip_and_wrong_fields():
    for rule in nsa_latent.EXAMPLES:
        assert patterns_base.parse(rule.expression()) == rule
        assert rule.causal
    for fields, message in [
        ({"branches": nsa.BRANCHES}, r"must be \('window',\) for a local layer, or of"),
        ({"keys": "per_branch"}, "keys='per_branch' must be 'shared'"),
        ({"latent_dim": 0}, "latent_dim=0 must be"),
        ({"top_k": 2}, r"top_k=2 must be >= initial \+ local = 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            nsa_latent.NsaLatent(**fields)
    for rope_dim in (3, 8):
        with pytest.raises(ValueError, match=f"rope_dim={rope_dim} must be even and < head_dim=8"):
            nsa_latent.NsaLatent(rope_dim=rope_dim).layer(**SIZES)
