"""Run by test_devices.py in a process of its own: layers that choose blocks, on eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.models import transformer
from sparse_attn.parallel import mesh, whole_rows
from sparse_attn.patterns import base
from sparse_attn.train import state as state_lib

T = 40
CONFIG = transformer.TransformerConfig(
    vocab_size=32, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32,
    block=8, impl="xla", short_conv=3,
)  # fmt: skip
MOBA = "moba(block_kv=8, top_k=2)"
NSA = "nsa(block_kv=8, top_k=3, window=8, compress_block=4, stride=2)"
LATENT = (
    "per_layer((nsa_latent(branches=('window',), window=8), "
    "nsa_latent(block_kv=8, top_k=3, compress_block=4, stride=2)))"
)
VIDEO = NSA.replace("nsa(", "video_nsa(video=((5, 30),), ")


def batch():
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(1, 4, (4, T)), axis=1).astype(np.int32)
    tokens = rng.integers(32, size=(4, T + 1)).astype(np.int32)
    weights = np.ones((4, T), np.float32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (4, T))
    return {
        "inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights,
        "segment_ids": ids, "positions": positions,
    }  # fmt: skip


def loss_and_grads(model, params, rows):
    loss, _, grads = jax.jit(lambda p, b: state_lib.loss_and_grads(model, p, b))(params, rows)
    return loss, grads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "axes"),
    [
        pytest.param(NSA, "data=2,fsdp=2,tensor=2", id="nsa"),
        pytest.param(MOBA, "fsdp=4,tensor=2", id="moba"),
        pytest.param(VIDEO, "data=2,tensor=2", id="video"),
        pytest.param(LATENT, "data=2,tensor=2", id="latent"),
        pytest.param(f"per_layer((local(window=6), {NSA}))", "data=4", id="per_layer"),
    ],
)
def test_model_equals_one_device(pattern, axes):
    config = dataclasses.replace(CONFIG, pattern=base.parse(pattern))
    if pattern == LATENT:
        config = dataclasses.replace(config, short_conv=None)
    model = transformer.Transformer(config)
    rows = batch()
    if "video" in pattern:  # Of which it takes one per row.
        del rows["segment_ids"]
    params = model.init(jax.random.key(0), jnp.asarray(rows["inputs"]))["params"]
    want = loss_and_grads(model, params, rows)
    on = mesh.make(axes)
    with jax.set_mesh(on):
        placed = mesh.Batches(on, batch_size=4, length=T).place(rows)
        got = loss_and_grads(model, jax.device_put(params, mesh.shardings(on, params)), placed)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * max(1.0, np.abs(y).max()))


def test_what_does_not_fit_is_named():
    x = jnp.ones((2, 8, 2, 4))
    with jax.set_mesh(mesh.make("tensor=8")):
        assert not whole_rows.fits(2)
        with pytest.raises(ValueError, match="tensor=8 must divide the 2"):
            whole_rows.run(lambda x, _: x, x)
    with jax.set_mesh(mesh.make("seq=8")):
        assert not whole_rows.fits(8)
        with pytest.raises(NotImplementedError, match="seq=8 must be 1"):
            whole_rows.run(lambda x, _: x, x)
