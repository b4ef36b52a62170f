"""One step: accumulation equals one large batch, weights count, shapes are checked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.train import evaluate, state
from tests.train import tiny


@pytest.fixture(scope="module")
def model_and_state():
    model = tiny.model()
    return model, tiny.new_state(model, tiny.optimizer())


@functools.cache
def compiled(model, grad_accum=1):
    return jax.jit(functools.partial(state.loss_and_grads, model, grad_accum=grad_accum))


def test_accumulation_equals_one_batch_with_unequal_weights(model_and_state):
    model, start = model_and_state
    batch = next(tiny.Batches())
    batch["weights"] = np.random.default_rng(0).random(batch["weights"].shape).astype(np.float32)
    batch["weights"][1] = 0  # A piece with nothing to learn from,
    batch["weights"][2] *= 100  # and one that counts most.
    whole = compiled(model)(start.params, batch)
    pieces = compiled(model, 4)(start.params, batch)  # test_golden.py has two pieces.
    np.testing.assert_allclose(pieces[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(pieces[1], batch["weights"].sum(), rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), pieces[2], whole[2]
    )


def test_weight_zero_is_no_loss(model_and_state):
    model, start = model_and_state
    batch = next(tiny.Batches())
    batch["weights"][:] = 1
    batch["weights"][:, 5:] = 0
    changed = batch | {"targets": batch["targets"].copy()}
    changed["targets"][:, 5:] = 1
    for a, b in zip(
        jax.tree.leaves(compiled(model)(start.params, batch)),
        jax.tree.leaves(compiled(model)(start.params, changed)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_batch_of_padding_is_harmless(model_and_state):
    model, start = model_and_state
    batch = next(tiny.Batches())
    batch["weights"][:] = 0
    batch["segment_ids"][:] = 0
    loss, weight, grads = compiled(model)(start.params, batch)
    assert (float(loss), float(weight)) == (0.0, 0.0)
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


def test_grad_accum_must_divide(model_and_state):
    model, start = model_and_state
    with pytest.raises(ValueError, match="grad_accum=3 must divide the batch of 4 examples"):
        state.loss_and_grads(model, start.params, next(tiny.Batches()), grad_accum=3)


def test_check_batch_names_what_is_wrong():
    batch = next(tiny.Batches())
    state.check_batch(batch)
    with pytest.raises(ValueError, match="batch must have 'weights'"):
        state.check_batch({k: v for k, v in batch.items() if k != "weights"})
    with pytest.raises(ValueError, match=r"batch\['targets'\] of int64\[4, 16\] must be int32"):
        state.check_batch(batch | {"targets": batch["targets"].astype(np.int64)})
    with pytest.raises(ValueError, match=r"batch\['positions'\] of int32\[4, 15\]"):
        state.check_batch(batch | {"positions": batch["positions"][:, 1:]})


def test_seeds_differ_and_repeat(model_and_state):
    model, a = model_and_state  # Of seed 0.
    b, c = (tiny.new_state(model, tiny.optimizer(), seed) for seed in (0, 1))
    assert (a.params["embedding"] == b.params["embedding"]).all()
    assert (a.params["embedding"] != c.params["embedding"]).any()


def test_bits_per_byte_counts_bytes_and_charges_for_marks():
    # A model that is uniform over 384 tokens pays log2(384) bits for each target, marks included.
    class Uniform:
        def apply(self, variables, tokens, segment_ids, positions):
            return jnp.zeros((*tokens.shape, tiny.VOCAB))

    batch = next(tiny.Batches())
    batch["weights"][:] = 1
    batch["targets"][0, :8] = 258  # Marks: 8 of the 64 targets are no bytes.
    result = evaluate.evaluate(evaluate.make_eval_step(Uniform()), {}, [batch, batch])
    np.testing.assert_allclose(result["bits_per_byte"], np.log2(384) * 64 / 56, rtol=1e-6)
    np.testing.assert_allclose(result["loss"], np.log(384), rtol=1e-6)
    assert result["tokens"] == 128


def test_evaluation_needs_bytes():
    def no_bytes(params, batch):
        return {"nats": 0.0, "tokens": 0.0, "bytes": 0.0}

    with pytest.raises(ValueError, match="no byte to predict"):
        evaluate.evaluate(no_bytes, {}, [])
