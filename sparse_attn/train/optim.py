"""The optimizer: AdamW with a warm-up and cosine schedule, decay on matrices only, global clip."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from sparse_attn.train import spikes

# Parameters whose name ends in one of these are not decayed: they set scales, not directions, or
# (the gates of a selector) get no gradient from the loss that would hold them.
NOT_DECAYED = ("scale", "bias", "sink_logits", "gate_query", "gate_key", "_taps")


def warmup_cosine(
    *, peak: float, warmup_steps: int, steps: int, end_fraction: float = 0.1
) -> Callable[[Any], Any]:
    """Learning rate by 0-based step: linear to `peak`, then a cosine to `end_fraction * peak`.

    The warm-up reaches `peak` at step `warmup_steps` and starts above zero, so that no step is
    wasted; `warmup_steps=0` starts at the peak. After `steps` the rate stays at its end.

    Raises:
      ValueError: `warmup_steps` is not in [0, steps), or `peak` is not positive.

    >>> schedule = warmup_cosine(peak=1.0, warmup_steps=2, steps=10, end_fraction=0.0)
    >>> [round(float(schedule(s)), 3) for s in (0, 1, 2, 6, 10)]
    [0.333, 0.667, 1.0, 0.5, 0.0]
    """
    if peak <= 0:
        raise ValueError(f"lr={peak} must be > 0")
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"warmup_steps={warmup_steps} must be in [0, steps={steps})")
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (warmup_steps + 1),
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=steps,
        end_value=peak * end_fraction,
    )


def decay_mask(params: PyTree) -> PyTree:
    """True for the parameters that weight decay applies to, by the last part of their path.

    >>> decay_mask({"norm": {"scale": 0.0}, "out": {"kernel": 0.0, "bias": 0.0}})
    {'norm': {'scale': False}, 'out': {'bias': False, 'kernel': True}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not str(getattr(path[-1], "key", path[-1])).endswith(NOT_DECAYED), params
    )


def adamw(
    schedule: Callable[[Any], Any] | float,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW with decoupled decay [arXiv:1711.05101, alg. 2] after a clip of the global norm.

    `clip_norm=None` does not clip. What is in `NOT_DECAYED` (norm scales, biases, ...) is not
    decayed.

    Raises:
      ValueError: `clip_norm <= 0`, `weight_decay < 0`, or a beta outside [0, 1).

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones(2)}
    >>> optimizer = adamw(0.1, weight_decay=0.0)
    >>> updates, _ = optimizer.update({"kernel": jnp.ones(2)}, optimizer.init(params), params)
    >>> updates["kernel"].round(3).tolist()
    [-0.10000000149011612, -0.10000000149011612]
    """
    for name, beta in (("b1", b1), ("b2", b2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}={beta} must be in [0, 1)")
    if weight_decay < 0:
        raise ValueError(f"weight_decay={weight_decay} must be >= 0")
    if clip_norm is not None and clip_norm <= 0:
        raise ValueError(f"clip_norm={clip_norm} must be > 0, or None for no clipping")
    update = optax.adamw(
        schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask
    )
    if clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(clip_norm), update)


def of(
    settings: Mapping[str, Any], *, steps: int
) -> tuple[optax.GradientTransformation, Callable[[Any], Any]]:
    """The optimizer and the schedule of `config.optim`, for so many steps.

    Raises:
      ValueError: as `warmup_cosine`, `adamw` and `spikes.skip_spikes`.

    >>> settings = dict(lr=1.0, warmup_steps=0, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0,
    ...                 skip_spikes=None)
    >>> float(of(settings, steps=10)[1](0))
    1.0
    """
    schedule = warmup_cosine(
        peak=settings["lr"], warmup_steps=settings["warmup_steps"], steps=steps
    )
    optimizer = adamw(
        schedule,
        b1=settings["b1"],
        b2=settings["b2"],
        weight_decay=settings["weight_decay"],
        clip_norm=settings["clip_norm"],
    )
    if settings["skip_spikes"] is not None:
        optimizer = spikes.skip_spikes(optimizer, sigmas=settings["skip_spikes"])
    return optimizer, schedule
