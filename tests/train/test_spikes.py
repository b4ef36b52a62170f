"""A spike changes nothing but the history; what is no spike is the plain optimizer, bit for bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_attn.train import optim, spikes, state
from tests.train import tiny


@functools.cache
def guarded_sgd(sigmas, window):
    optimizer = spikes.skip_spikes(optax.sgd(1.0), sigmas=sigmas, window=window)
    return optimizer, jax.jit(optimizer.update)


def run(losses, *, norms=None, sigmas=6.0, window=8):
    """Which of the steps were left out."""
    optimizer, update = guarded_sgd(sigmas, window)
    opt_state, skipped = optimizer.init(jnp.zeros(1)), []
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        before = int(opt_state.skipped)
        change, opt_state = update(jnp.full(1, norm), opt_state, value=jnp.float32(loss))
        skipped.append(int(opt_state.skipped) > before)
        assert (change == 0).all() == skipped[-1]
    return skipped


def noisy(level, n, seed=0):
    return (level + 0.05 * np.random.default_rng(seed).standard_normal(n)).tolist()


def test_a_spike_of_loss_or_gradient_is_left_out_and_the_rest_is_not():
    steady = noisy(3.0, 20)
    assert not any(run(steady))
    with_spike = [*steady[:12], 9.0, *steady[12:]]
    assert run(with_spike) == [i == 12 for i in range(21)]
    assert run([3.0] * 21, norms=[1.0] * 12 + [30.0] + [1.0] * 8) == [i == 12 for i in range(21)]


def test_a_second_spike_is_seen_though_the_first_is_in_the_window():
    losses = [*noisy(3.0, 10), 9.0, *noisy(3.0, 2), 8.0, *noisy(3.0, 3)]
    assert [i for i, left_out in enumerate(run(losses)) if left_out] == [10, 13]


def test_the_first_half_window_and_falls_are_never_left_out():
    assert not any(run([3.0, 9.0, 30.0, 90.0]))
    assert not any(run([*noisy(3.0, 10), 1.0, 0.5]))


def test_a_lasting_change_of_level_is_accepted():
    skipped = run([*noisy(3.0, 10), *noisy(6.0, 20)])
    assert skipped[10]
    assert not any(skipped[16:])


def test_nan_is_no_spike():
    assert not any(run([*noisy(3.0, 10), float("nan"), float("inf")]))


def test_weights_moments_and_schedule_stand_still_on_a_spike():
    plain = optim.adamw(optim.warmup_cosine(peak=1e-2, warmup_steps=2, steps=20))
    optimizer = spikes.skip_spikes(plain, sigmas=6.0, window=4)
    params = {"kernel": jnp.arange(6.0).reshape(2, 3)}
    grads = {"kernel": jnp.ones((2, 3))}
    guarded, free = optimizer.init(params), plain.init(params)
    for loss in noisy(3.0, 4):
        update, guarded = optimizer.update(grads, guarded, params, value=jnp.float32(loss))
        expected, free = plain.update(grads, free, params)
        jax.tree.map(np.testing.assert_array_equal, update, expected)
    update, after = optimizer.update(grads, guarded, params, value=jnp.float32(99.0))
    jax.tree.map(np.testing.assert_array_equal, after.inner, guarded.inner)
    assert (update["kernel"] == 0).all()


class Bigram:
    """A model that compiles in no time: the logits after a token are a row of a table."""

    def apply(self, variables, tokens, *, segment_ids, positions):
        return variables["params"]["kernel"][tokens]


def test_in_a_training_step_it_is_counted_and_lr_follows_the_schedule():
    schedule = optim.warmup_cosine(peak=1e-2, warmup_steps=2, steps=20)
    optimizer = spikes.skip_spikes(optim.adamw(schedule), sigmas=6.0, window=4)
    step = state.make_train_step(Bigram(), optimizer, schedule=schedule)
    params = {"kernel": jnp.zeros((tiny.VOCAB, tiny.VOCAB))}
    seen = optimizer.init(params)._replace(  # As after long training.
        losses=jnp.full(4, 0.5), norms=jnp.full(4, 1e-3), count=jnp.int32(4)
    )
    train_state = state.TrainState(jnp.int32(4), params, seen, jax.random.key(0))
    train_state, metrics = step(train_state, next(tiny.Batches()))
    assert float(metrics["skipped"]) == 1
    assert not train_state.params["kernel"].any()
    usual = train_state.opt_state._replace(losses=jnp.full(4, 9.0), norms=jnp.full(4, 9.0))
    train_state = dataclasses.replace(train_state, opt_state=usual)
    train_state, metrics = step(train_state, next(tiny.Batches()))
    assert float(metrics["skipped"]) == 1  # So far.
    assert train_state.params["kernel"].any()
    assert float(metrics["lr"]) == pytest.approx(float(schedule(4)))  # Not 5: one was left out.


@pytest.mark.parametrize("arguments", [dict(sigmas=0.0), dict(sigmas=3.0, window=1)])
def test_wrong_arguments_are_named(arguments):
    with pytest.raises(ValueError, match="must be"):
        spikes.skip_spikes(optax.sgd(1.0), **arguments)
