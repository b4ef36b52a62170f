"""Twenty losses of a tiny run, the same for every jax version and backend."""

import jax
import numpy as np
import pytest

from sparse_attn.patterns import local, sinks
from sparse_attn.train import state
from tests.train import tiny

# Differences between jax 0.10.2, 0.11.2 and 0.12.0 and between backends are 1e-6. A change of the
# model, the optimizer, the schedule or the initial values that is meant replaces the numbers.
LOSSES = (
    5.94157, 5.932808, 5.890021, 5.745498, 5.575143, 5.356023, 5.249206, 5.066325, 4.868669,
    4.756678, 4.628877, 4.622929, 4.440574, 4.394515, 4.325994, 4.239759, 4.182422, 4.146063,
    4.174837, 4.180319,
)  # fmt: skip


@pytest.mark.parametrize("impl", [None, pytest.param("reference", marks=pytest.mark.slow)])
def test_loss_curve(impl):
    pattern = local.Local(window=6) | sinks.Sinks(tokens=1)
    model = tiny.model(impl=impl, pattern=pattern, sink_logits="learned")
    optimizer, batches, losses = tiny.optimizer(), tiny.Batches(), []
    train_state = tiny.new_state(model, optimizer)
    step = state.make_train_step(model, optimizer, grad_accum=2)
    for _ in LOSSES:
        train_state, metrics = step(train_state, jax.device_put(next(batches)))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, LOSSES, atol=1e-5)
