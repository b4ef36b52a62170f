"""AdamW by the formula, clipping, decay on matrices only, the schedule's corners."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_attn.train import optim


def test_two_steps_are_adamw_by_the_formula():
    lr, b1, b2, eps, decay = 0.1, 0.8, 0.9, 1e-8, 0.3
    optimizer = optim.adamw(lr, b1=b1, b2=b2, eps=eps, weight_decay=decay, clip_norm=None)
    params = {"out": {"kernel": jnp.array([1.0, -2.0])}, "norm": {"scale": jnp.array([3.0])}}
    opt_state = optimizer.init(params)
    expected = {"kernel": np.array([1.0, -2.0]), "scale": np.array([3.0])}
    moments = {name: (np.zeros_like(x), np.zeros_like(x)) for name, x in expected.items()}
    for t, (kernel_grad, scale_grad) in enumerate((([0.5, 1.0], [2.0]), ([-1.0, 0.2], [0.1])), 1):
        grads = {
            "out": {"kernel": jnp.array(kernel_grad)},
            "norm": {"scale": jnp.array(scale_grad)},
        }
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        for name, grad in (("kernel", np.array(kernel_grad)), ("scale", np.array(scale_grad))):
            m, v = moments[name]
            m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
            moments[name] = m, v
            step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
            step = step + (decay * expected[name] if name == "kernel" else 0)
            expected[name] = expected[name] - lr * step
    np.testing.assert_allclose(params["out"]["kernel"], expected["kernel"], rtol=1e-6)
    np.testing.assert_allclose(params["norm"]["scale"], expected["scale"], rtol=1e-6)


def test_clip_is_by_the_global_norm():
    # Clipping is the only difference to a gradient that was scaled by hand.
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    by_hand = {name: g / 5 for name, g in grads.items()}
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    clipped, plain = optim.adamw(0.1, clip_norm=1.0), optim.adamw(0.1, clip_norm=None)
    moments = {}
    for name, optimizer, g in (("clipped", clipped, grads), ("plain", plain, by_hand)):
        _, opt_state = optimizer.update(g, optimizer.init(params), params)
        moments[name] = optax.tree.get(opt_state, "mu")
    np.testing.assert_allclose(moments["clipped"]["a"], moments["plain"]["a"], rtol=1e-6)
    np.testing.assert_allclose(moments["clipped"]["b"], moments["plain"]["b"], rtol=1e-6)


def test_schedule_rises_to_the_peak_and_falls_to_its_end():
    schedule = optim.warmup_cosine(peak=2.0, warmup_steps=4, steps=24, end_fraction=0.1)
    rates = np.array([float(schedule(s)) for s in range(30)])
    np.testing.assert_allclose(rates[:5], 2.0 * np.array([0.2, 0.4, 0.6, 0.8, 1.0]), rtol=1e-6)
    assert rates.argmax() == 4
    assert (np.diff(rates[4:24]) < 0).all()
    np.testing.assert_allclose(rates[14], (2.0 + 0.2) / 2, rtol=1e-6)  # Half of the cosine.
    np.testing.assert_allclose(rates[24:], 0.2, rtol=1e-6)


def test_schedule_without_warmup_starts_at_the_peak():
    assert float(optim.warmup_cosine(peak=1.0, warmup_steps=0, steps=5)(0)) == 1.0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: optim.warmup_cosine(peak=0.0, warmup_steps=0, steps=5), "lr=0.0 must be > 0"),
        (
            lambda: optim.warmup_cosine(peak=1.0, warmup_steps=5, steps=5),
            r"warmup_steps=5 must be in \[0, steps=5\)",
        ),
        (lambda: optim.adamw(1.0, b1=1.0), r"b1=1.0 must be in \[0, 1\)"),
        (lambda: optim.adamw(1.0, weight_decay=-0.1), "weight_decay=-0.1 must be >= 0"),
        (lambda: optim.adamw(1.0, clip_norm=0.0), "clip_norm=0.0 must be > 0"),
    ],
)
def test_wrong_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
