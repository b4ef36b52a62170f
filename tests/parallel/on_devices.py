"""Run by test_devices.py in a process of its own: eight simulated devices compute what one does."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.masks import block_mask, lower, reorder
from sparse_attn.models import transformer
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import reordered
from sparse_attn.parallel import attention, balance, mesh, split
from sparse_attn.patterns import causal, local, neighborhood, per_head, per_layer, sinks
from sparse_attn.train import optim
from sparse_attn.train import state as state_lib

B, T, N, K, H = 2, 64, 4, 2, 8
WINDOW = local.Local(window=10)
MASKS = {
    "causal": causal.Causal(),
    "window": WINDOW,
    "sinks": WINDOW | sinks.Sinks(tokens=2),
    "per_head": per_head.PerHead((WINDOW, causal.Causal())),
    "per_kv_head": per_head.PerHead((WINDOW, WINDOW, causal.Causal(), causal.Causal())),
    "not_causal": local.Local(reach=(4, 9)),
    "array": block_mask.from_array(
        np.random.default_rng(0).random((T, T)) < 0.2, block_q=8, block_kv=8
    ),
}
# Three documents and padding, which cut the ranks' parts at other places than the ranks do.
IDS = np.repeat([[1, 1, 1, 2, 2, 3, 3, 0]], T // 8, 1).repeat(B, 0).astype(np.int32)


def numbers(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


Q, KEYS, V = numbers(0, B, T, N, H), numbers(1, B, T, K, H), numbers(2, B, T, K, H)
BIAS, SINKS = numbers(3, B, N, T), numbers(4, N)
DOUT, DLSE = numbers(5, B, T, N, H), numbers(6, B, T, N)


def value_and_grads(mask, *, tokens=None, ids=IDS, impl=None):
    """A number that depends on out and lse, and its gradients, in the order of the text."""
    order = np.arange(T) if tokens is None else tokens.places(T)
    attend = attend_lib.attend
    if tokens is not None:

        def attend(*args, **options):
            return attention.attend(*args, tokens=tokens, **options)

    def value(q, k, v, bias, sink_logits):
        out, lse = attend(
            q, k, v, mask=mask, segment_ids=None if ids is None else jnp.asarray(ids[:, order]),
            key_bias=bias, sink_logits=sink_logits, return_lse=True, impl=impl,
        )  # fmt: skip
        return (out * DOUT[:, order]).sum() + (lse * DLSE[:, order]).sum()

    args = (*(x[:, order] for x in (Q, KEYS, V)), BIAS[..., order], SINKS)
    number, grads = jax.jit(jax.value_and_grad(value, argnums=range(5)))(*args)
    back = np.argsort(order)
    return number, (*(g[:, back] for g in grads[:3]), grads[3][..., back], grads[4])


def assert_same(a, b, *, tolerance=1e-5, floor=1.0):
    """Equal up to `tolerance` of the largest number of each array, or of `floor`."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = max(floor, float(jnp.abs(y).max()))
        np.testing.assert_allclose(x, y, atol=tolerance * scale, rtol=0)


@functools.cache
def on_one_device(name, **options):
    return value_and_grads(MASKS[name], **options)


def check(name, axes, scheme, order, **options):
    tokens = tokens_of(MASKS[name], axes, scheme, order)
    with jax.set_mesh(mesh.make(axes)):
        result = value_and_grads(MASKS[name], tokens=tokens, **options)
    assert_same(result, on_one_device(name, **options))


CASES = [
    ("per_head", "data=2,seq=2,tensor=2", "ring", "zigzag"),
    # A scheme meets every mask, every order and a mesh with and without split heads.
    ("causal", "seq=4,tensor=2", "ring", "zigzag"),
    ("window", "seq=8", "ring", "text"),
    ("sinks", "data=2,seq=4", "ring", "text"),
    ("per_head", "seq=2,tensor=4", "ring", "text"),
    ("not_causal", "seq=4,tensor=2", "ring", "balanced"),
    ("array", "fsdp=2,seq=4", "ring", "text"),
    ("causal", "data=2,seq=4", "ulysses", "zigzag"),
    ("sinks", "data=2,seq=4", "ulysses", "text"),
    ("per_head", "data=2,seq=2,tensor=2", "ulysses", "text"),
    ("causal", "seq=8", "all_gather_kv", "balanced"),
    ("window", "data=2,seq=4", "all_gather_kv", "zigzag"),
    ("per_kv_head", "data=2,seq=2,tensor=2", "all_gather_kv", "text"),
    ("per_kv_head", "fsdp=2,tensor=4", "ring", "text"),
]


def tokens_of(mask, axes, scheme, kind):
    ranks = mesh.sizes(axes, num_devices=8)["seq"]
    if not isinstance(mask, block_mask.BlockMask):
        mask = lower.lower(mask, q_len=T, block_q=8, block_kv=8)
    return attention.Tokens(scheme, balance.order(kind, [mask], ranks=ranks))


@pytest.mark.slow
@pytest.mark.parametrize(("mask", "axes", "scheme", "order"), CASES)
def test_attention_equals_one_device(mask, axes, scheme, order):
    check(mask, axes, scheme, order)


@pytest.mark.slow
def test_ring_without_documents_and_with_the_reference():
    check("window", "data=2,seq=4", "ring", "text", ids=None, impl="reference")


@pytest.mark.slow
def test_a_nan_key_spoils_those_who_see_it_and_nobody_else():
    k = KEYS.at[:, 12].set(jnp.nan)  # Seen by queries 12 .. 21, on two ranks of 16 tokens.
    with jax.set_mesh(mesh.make("seq=4")):
        out = jax.jit(lambda k: attention.attend(Q, k, V, mask=WINDOW))(k)
    seen = np.arange(12, 22)
    assert np.isnan(out[:, seen]).all()
    expected = attend_lib.attend(Q, KEYS, V, mask=WINDOW)
    others = np.delete(np.arange(T), seen)
    np.testing.assert_allclose(out[:, others], expected[:, others], atol=1e-5)


@pytest.mark.slow
def test_run_time_masks_are_split_over_rows_and_heads():
    states = jnp.asarray(np.random.default_rng(1).integers(0, 3, (B, K, 4, 4)), jnp.int32)

    def run(attend):
        def out(states, q, k, v):
            mask = block_mask.from_block_states(
                states, rule=causal.Causal(), q_len=T, kv_len=T, block_q=16, block_kv=16
            )
            return (attend(q, k, v, mask=mask) * DOUT).sum()

        return jax.jit(jax.grad(out, argnums=(1, 2, 3)))(states, Q, KEYS, V)

    expected = run(attend_lib.attend)
    with jax.set_mesh(mesh.make("data=2,tensor=4")):
        assert_same(run(attention.attend), expected)
    with (
        jax.set_mesh(mesh.make("seq=2")),
        pytest.raises(NotImplementedError, match="known at run time only"),
    ):
        run(attention.attend)


def permuted_pairs(mask, *, gradients):
    """Every (source, destination) of every collective-permute in the lowered program."""

    def value(q, k, v):
        return attention.attend(q, k, v, mask=mask).sum()

    with jax.set_mesh(mesh.make("seq=8")):
        function = jax.grad(value, argnums=(0, 1, 2)) if gradients else value
        text = jax.jit(function).lower(Q, KEYS, V).as_text()
    found = re.findall(r"collective_permute.*?source_target_pairs = dense<(.*?)>", text)
    return [tuple(map(int, pair)) for each in found for pair in re.findall(r"(\d+), (\d+)", each)]


@pytest.mark.parametrize("name", ["window", "sinks", "causal", "not_causal"])
def test_ring_sends_only_what_the_mask_needs(name):
    mask = lower.lower(MASKS[name], q_len=T, block_q=8, block_kv=8)
    pairs = split.Split(mask, order=range(8), ranks=8).pairs
    away = int(pairs.sum()) - int(np.diag(pairs).sum())
    expected = {"window": 7 + 6, "sinks": 7 + 6 + 5, "causal": 28, "not_causal": 7 + 7 + 6}[name]
    assert away == expected
    assert len(permuted_pairs(MASKS[name], gradients=False)) == 2 * away  # k and v, once each


@pytest.mark.slow
def test_gradients_of_a_ring_travel_with_the_keys():
    # Window over the next rank: keys (k, v) forward and again backward, gradients home.
    sent = permuted_pairs(local.Local(window=8), gradients=True)
    assert sorted(sent) == sorted(
        [(r, r + 1) for r in range(7)] * 4 + [(r + 1, r) for r in range(7)] * 2
    )


# --- The model and its state ----------------------------------------------------------------------


def model_of(names=("window",), **changes):
    fields = dict(
        vocab_size=64, num_layers=len(names), embed_dim=32, num_heads=N, num_kv_heads=K, mlp_dim=64,
        sink_logits="learned",
        pattern=per_layer.PerLayer(tuple(MASKS[name] for name in names)),
    )  # fmt: skip
    return transformer.Transformer(transformer.TransformerConfig(**(fields | changes)))


def batch():
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 64, (8, T + 1)).astype(np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": draw.integers(0, 2, (8, T)).astype(np.float32),
        "segment_ids": np.tile(IDS, (4, 1)),
        "positions": np.tile(np.arange(T, dtype=np.int32), (8, 1)),
    }


def state_of(model, on=None):
    shardings = None if on is None else lambda tree: mesh.shardings(on, tree)
    optimizer = optim.adamw(1e-3)
    key = jax.random.key(0)
    return state_lib.create(model, optimizer, key=key, length=T, shardings=shardings)


@functools.cache
def one_device(names):
    model = model_of(names)
    params = state_of(model).params
    return params, loss_and_grads(model, params, batch())


_loss_and_grads = jax.jit(state_lib.loss_and_grads, static_argnums=0)


def loss_and_grads(model, params, placed):
    loss, _, grads = _loss_and_grads(model, params, placed)
    return loss, grads


EVERY = ("causal", "window", "sinks", "per_head")
# Every axis alone, with every other and with two others. The time goes into compiling, and a longer
# ring is more program.
MESHES = (
    "data=8", "fsdp=8", "tensor=2", "seq=4",
    "data=2,fsdp=4", "data=4,tensor=2", "data=4,seq=2",
    "fsdp=4,tensor=2", "fsdp=4,seq=2", "seq=2,tensor=2",
    "data=2,fsdp=2,tensor=2", "data=2,fsdp=2,seq=2", "data=2,seq=2,tensor=2",
    "fsdp=2,seq=2,tensor=2",
)  # fmt: skip
SPLITS = (
    ("ring", "text"), ("ring", "zigzag"), ("ulysses", "text"), ("all_gather_kv", "balanced"),
)  # fmt: skip


def model_cases():
    """Every mesh with every mask; the schemes take turns over those with a seq axis.

    One program holds a layer of each mask, in rows of one document, as compiling takes the time;
    the other holds a causal layer in rows of several documents.
    """
    found = []
    for i, axes in enumerate(MESHES):
        for names, documents in ((EVERY, False), (("causal",), True)):
            scheme, kind = SPLITS[(i + documents) % len(SPLITS)] if "seq" in axes else SPLITS[0]
            quick = documents and axes == "data=2,seq=2,tensor=2"
            name = f"{'documents' if documents else 'masks'}-{axes}-{scheme}-{kind}"
            marks = () if quick else pytest.mark.slow
            found.append(pytest.param(names, documents, axes, scheme, kind, id=name, marks=marks))
    return found


def small(names, **changes):
    """Layers of few features: what is tested is where their parts are."""
    return model_of(names, embed_dim=16, mlp_dim=32, sink_logits=None, **changes)


def rows_of(documents):
    found = batch()
    if not documents:
        del found["segment_ids"]
    return found


@functools.cache
def small_on_one_device(names, documents):
    params = state_of(small(names)).params
    return params, loss_and_grads(small(names), params, rows_of(documents))


@pytest.mark.parametrize(("names", "documents", "axes", "scheme", "kind"), model_cases())
def test_model_equals_one_device(names, documents, axes, scheme, kind):
    """Loss and gradients, to 1e-5 of the largest number of each array."""
    on = mesh.make(axes)
    tokens = tokens_of(causal.Causal(), axes, scheme, kind)
    rows = mesh.Batches(on, batch_size=8, length=T, places=tokens.places(T))
    params, expected = small_on_one_device(names, documents)
    params = jax.device_put(params, mesh.shardings(on, params))
    with jax.set_mesh(on):
        placed = rows.place(rows_of(documents))
        result = loss_and_grads(small(names, tokens=tokens), params, placed)
    assert_same(result, expected, floor=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "axes", "scheme", "kind"),
    [
        (("sinks",), "data=2,fsdp=2,tensor=2", "ring", "text"),
        (EVERY, "fsdp=2,seq=2,tensor=2", "ulysses", "zigzag"),
    ],
)
def test_state_and_layers_of_several_masks_equal_one_device(names, axes, scheme, kind):
    """Parameters bit for bit, loss and gradients, with documents; a layer per mask."""
    on = mesh.make(axes)
    tokens = tokens_of(causal.Causal(), axes, scheme, kind)
    model = model_of(names, tokens=tokens)
    rows = mesh.Batches(on, batch_size=8, length=T, places=tokens.places(T))
    with jax.set_mesh(on):
        state = state_of(model, on)
        result = loss_and_grads(model, state.params, rows.place(batch()))
    params, expected = one_device(names)
    assert_same(state.params, params, tolerance=0)
    assert_same(result, expected)
    kernel = state.opt_state[1][0].mu["layers"]["mlp"]["up"]["kernel"]
    parts = on.shape["fsdp"], on.shape["tensor"]
    assert kernel.sharding.shard_shape(kernel.shape)[1:] == (32 // parts[0], 64 // parts[1])


def test_steps_keep_their_sharding_and_learn_the_same():
    model, optimizer = model_of(), optim.adamw(1e-3)
    on = mesh.make("data=2,fsdp=2,tensor=2")
    rows = mesh.Batches(on, batch_size=8, length=T)

    def run(state, place, shardings):
        step = state_lib.make_train_step(model, optimizer, shardings=shardings)
        for _ in range(3):
            state, metrics = step(state, place(batch()))
        return state, metrics["loss"]

    state, loss = run(state_of(model), jax.device_put, None)
    with jax.set_mesh(on):
        sharded = state_of(model, on)
        shardings = jax.tree.map(lambda x: x.sharding, sharded)
        sharded, sharded_loss = run(sharded, rows.place, shardings)
    assert jax.tree.map(lambda x: x.sharding, sharded) == shardings
    assert_same((sharded.params, sharded_loss), (state.params, loss), tolerance=1e-4)


def test_what_does_not_fit_is_named():
    with jax.set_mesh(mesh.make("tensor=8")), pytest.raises(ValueError, match="num_heads=4 must"):
        attention.attend(Q, KEYS, V, mask=WINDOW)
    with jax.set_mesh(mesh.make("seq=8")), pytest.raises(ValueError, match="for ulysses"):
        attention.attend(Q, KEYS, V, mask=WINDOW, tokens=attention.Tokens("ulysses"))
    coarse = lower.lower(WINDOW, q_len=T, block_q=16, block_kv=16)
    with jax.set_mesh(mesh.make("seq=8")), pytest.raises(ValueError, match="block_q=16 must"):
        attention.attend(Q, KEYS, V, mask=coarse)
    with pytest.raises(ValueError, match=r"key/kernel' is \[1, 32, 2, 8\]\. Change mesh.axes"):
        state_of(model_of(), mesh.make("tensor=4"))


def test_a_row_that_the_mesh_does_not_divide_is_computed_whole():
    q, k, v = (x[:1, :57] for x in (Q, KEYS, V))
    expected = attend_lib.attend(q, k, v, mask=WINDOW)
    with jax.set_mesh(mesh.make("data=2,seq=2,tensor=2")):
        out = jax.jit(lambda q, k, v: attention.attend(q, k, v, mask=WINDOW))(q, k, v)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_reordered_attention_splits_over_rows_and_heads():
    near = neighborhood.Neighborhood(shape=(8, 8), kernel_size=3)
    expected = attend_lib.attend(Q, KEYS, V, mask=near)

    def run(q, k, v):
        tiles = reorder.Tiles((8, 8), (4, 4))
        return reordered.attend_reordered(q, k, v, mask=near, order=tiles)

    on = mesh.make("data=2,tensor=2")
    spec = jax.sharding.PartitionSpec("data", None, "tensor")
    by_hand = jax.jit(
        jax.shard_map(run, mesh=on, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    )
    placed = [jax.device_put(x, jax.sharding.NamedSharding(on, spec)) for x in (Q, KEYS, V)]
    for out in (by_hand(*placed), jax.jit(run)(*placed)):
        assert out.sharding.shard_shape(out.shape) == (B // 2, T, N // 2, H)
        np.testing.assert_allclose(out, expected, atol=1e-6)


def test_batches_of_a_mesh_are_the_rows_in_their_order():
    on = mesh.make("data=2,fsdp=2,seq=2")
    tokens = attention.Tokens("ring", balance.order("zigzag", [], ranks=2))
    rows = mesh.Batches(on, batch_size=8, length=T, places=tokens.places(T))
    placed = rows.place(batch() | {"images": np.arange(8 * 6.0).reshape(8, 2, 3)})
    np.testing.assert_array_equal(placed["inputs"], batch()["inputs"][:, tokens.places(T)])
    np.testing.assert_array_equal(placed["images"], np.arange(8 * 6.0).reshape(8, 2, 3))
    assert placed["inputs"].sharding.shard_shape((8, T)) == (2, T // 2)
    with pytest.raises(ValueError, match=r"multiple of data \* fsdp = 4"):
        mesh.Batches(on, batch_size=6, length=T)
    with pytest.raises(ValueError, match="multiple of seq=2"):
        mesh.Batches(on, batch_size=8, length=T + 1)


def test_the_whole_state_survives_a_replaced_field():
    """A model with other tokens has the same parameters: a checkpoint fits any mesh."""
    model = model_of()
    other = dataclasses.replace(model.config, tokens=attention.Tokens("ulysses"))
    shapes = [
        jax.eval_shape(lambda m=m: state_of(m)).params
        for m in (model, transformer.Transformer(other))
    ]
    assert shapes[0] == shapes[1]


def test_rows_are_put_where_their_process_is(monkeypatch):
    batches = mesh.Batches(mesh.make("data=4,seq=2"), batch_size=8, length=4)
    blocks = np.array([0, 1, 4, 5, 6, 7, 2, 3])  # As if the devices of two hosts were mixed.
    monkeypatch.setattr(batches, "_read", blocks)
    x = np.arange(32, dtype=np.int32).reshape(8, 4)
    np.testing.assert_array_equal(batches.place({"inputs": x})["inputs"], x[blocks])
