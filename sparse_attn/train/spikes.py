"""Leaves out updates whose loss or gradient stands far above those of the last steps.

The idea (compare with the last steps, change nothing when far above) is that of OLMo's
SkipStepOptimizer, levanter's skip-step option and MaxText's `skip_step_on_spikes`, which take mean
and standard deviation. Here they are the median and the median deviation, which a spike in the
window does not move.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

_TO_SIGMA = 1.4826  # Standard deviation over median deviation of a normal distribution.
_LEAST_SIGMA = 0.01  # Of the median: a loss that hardly moves does not make everything a spike.


class SkipSpikesState(NamedTuple):
    """State of `skip_spikes`.

    Attributes:
      losses, norms: of the last steps, in a ring; steps that were left out included, so that a
        lasting change of level is accepted after half a window.
      count: int32, steps seen.
      skipped: int32, steps left out.
      inner: state of the optimizer.
    """

    losses: Float[Array, "window"]
    norms: Float[Array, "window"]
    count: Int[Array, ""]
    skipped: Int[Array, ""]
    inner: optax.OptState


def skip_spikes(
    optimizer: optax.GradientTransformation, *, sigmas: float, window: int = 128
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that leaves everything as it is on a spike: weights, moments and its schedule.

    A step is a spike when its loss or its gradient's norm is more than `sigmas` standard deviations
    above the median of the last `window` steps; the first half window is never left out. NaN and
    infinity are no spikes: the loop stops at them.

    Args:
      optimizer: the one to guard, with its clipping, so that the norm is that before.
      sigmas: 6 leaves out only what is plainly wrong.
      window: steps.

    Raises:
      ValueError: `sigmas <= 0` or `window < 2`.

    >>> optimizer = skip_spikes(optax.sgd(1.0), sigmas=6.0, window=4)
    >>> state = optimizer.init(jnp.zeros(1))
    >>> for loss in (2.0, 2.1, 1.9, 50.0):
    ...     update, state = optimizer.update(jnp.ones(1), state, value=jnp.float32(loss))
    >>> update.tolist(), int(state.skipped)
    ([0.0], 1)
    """
    if sigmas <= 0:
        raise ValueError(f"skip_spikes={sigmas} must be > 0 standard deviations, or None for off")
    if window < 2:
        raise ValueError(f"window={window} must be >= 2 steps")
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params):
        zeros, zero = jnp.zeros(window, jnp.float32), jnp.zeros((), jnp.int32)
        return SkipSpikesState(zeros, zeros, zero, zero, optimizer.init(params))

    def update(grads, state, params=None, *, value, **extra):
        norm = optax.tree.norm(grads)
        spike = _above(value, state.losses, state.count, sigmas) | _above(
            norm, state.norms, state.count, sigmas
        )
        updates, inner = optimizer.update(grads, state.inner, params, value=value, **extra)
        updates = jax.tree.map(lambda u: jnp.where(spike, jnp.zeros_like(u), u), updates)
        inner = jax.tree.map(lambda old, new: jnp.where(spike, old, new), state.inner, inner)
        place = state.count % window
        return updates, SkipSpikesState(
            state.losses.at[place].set(value.astype(jnp.float32)),
            state.norms.at[place].set(norm.astype(jnp.float32)),
            state.count + 1,
            state.skipped + spike,
            inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def num_skipped(opt_state: optax.OptState) -> Int[Array, ""] | int:
    """Steps left out so far; 0 when the optimizer leaves none out.

    >>> num_skipped(optax.sgd(0.1).init(jnp.zeros(1)))
    0
    """
    return opt_state.skipped if isinstance(opt_state, SkipSpikesState) else 0


def _above(value, history, count, sigmas) -> Bool[Array, ""]:
    window = history.shape[0]
    known = jnp.where(jnp.arange(window) < count, history, jnp.nan)
    median = jnp.nanmedian(known)
    deviation = _TO_SIGMA * jnp.nanmedian(jnp.abs(known - median))
    deviation = jnp.maximum(deviation, _LEAST_SIGMA * jnp.abs(median))
    return (count >= window // 2) & jnp.isfinite(value) & (value > median + sigmas * deviation)
