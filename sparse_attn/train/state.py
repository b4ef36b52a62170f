"""What training carries from step to step, and the jitted step that advances it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from sparse_attn.train import spikes

Batch = dict[str, Any]
PACKING = ("segment_ids", "positions")  # what a batch of tokens has besides, and images have not


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "key"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes, and the run's key; a pytree of arrays.

    Attributes:
      step: int32 scalar, number of updates made.
      params: master weights, float32.
      opt_state: of the optimizer.
      key: typed PRNG key of the run; step n uses `jax.random.fold_in(key, n)`.
    """

    step: Any
    params: Any
    opt_state: Any
    key: Any


def create(
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    key: Array,
    length: int | None = None,
    inputs: jax.ShapeDtypeStruct | None = None,
    shardings: Callable[[Any], Any] | None = None,
) -> TrainState:
    """A state before the first step, with parameters drawn from `key`.

    Args:
      model: a Linen module called as `model(inputs)`.
      optimizer: whose state is made for the parameters.
      key: typed PRNG key.
      length: tokens per example; the parameters do not depend on it.
      inputs: what one example is where it is no row of tokens, with a batch axis; or `length`.
      shardings: gives those of a state's shapes, see `parallel.mesh.shardings`; each device then
        draws its own part, of the same numbers.
    """
    if inputs is None:
        inputs = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def init(key):
        init_key, run_key = jax.random.split(key)
        params = model.init(init_key, jnp.zeros(inputs.shape, inputs.dtype))["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), run_key)

    if shardings is None:
        return jax.jit(init)(key)
    return jax.jit(init, out_shardings=shardings(jax.eval_shape(init, key)))(key)


def num_params(params: PyTree) -> int:
    """Number of parameters.

    >>> num_params({"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)})
    10
    """
    return sum(x.size for x in jax.tree.leaves(params))


def token_losses(
    logits_BTV: Float[Array, "*rows V"], targets_BT: Int[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """Negative log-likelihood of each target in nats, float32.

    >>> losses = token_losses(jnp.zeros((1, 2, 4)), jnp.array([[0, 3]]))
    >>> losses.round(4).tolist()
    [[1.386..., 1.386...]]
    """
    return optax.softmax_cross_entropy_with_integer_labels(
        logits_BTV.astype(jnp.float32), targets_BT
    )


def loss_sum(model: Any, params: PyTree, batch: Batch) -> tuple[Array, Array]:
    """Sum of weighted losses of tokens (or images) in nats, and the sum of the weights."""
    packing = {name: batch[name] for name in PACKING if name in batch}
    logits_BTV = model.apply({"params": params}, batch["inputs"], **packing)
    losses_BT = token_losses(logits_BTV, batch["targets"])
    return (losses_BT * batch["weights"]).sum(), batch["weights"].sum()


def loss_and_grads(
    model: Any, params: PyTree, batch: Batch, *, grad_accum: int = 1
) -> tuple[Array, Array, PyTree]:
    """Mean loss per token, number of tokens and gradient of the mean, over `grad_accum` pieces.

    Sums of losses and of gradients are added over the pieces and divided once by the total weight,
    so the result is that of the whole batch, however unequal the pieces' weights.

    Raises:
      ValueError: `grad_accum` does not divide the number of examples.
    """
    examples = batch["inputs"].shape[0]
    if grad_accum < 1 or examples % grad_accum:
        raise ValueError(f"grad_accum={grad_accum} must divide the batch of {examples} examples")
    value_and_grad = jax.value_and_grad(functools.partial(loss_sum, model), has_aux=True)
    if grad_accum == 1:
        (total, weight), grads = value_and_grad(params, batch)
    else:
        pieces = jax.tree.map(lambda x: x.reshape(grad_accum, -1, *x.shape[1:]), batch)

        def add_piece(sums, piece):
            (total, weight), grads = value_and_grad(params, piece)
            return jax.tree.map(jnp.add, sums, (total, weight, grads)), None

        zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (total, weight, grads), _ = jax.lax.scan(add_piece, zeros, pieces)
    # A batch of nothing but padding has loss 0 and changes no moment by nan.
    divisor = jnp.where(weight > 0, weight, 1)
    return total / divisor, weight, jax.tree.map(lambda g: g / divisor, grads)


def make_train_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    grad_accum: int = 1,
    schedule: Callable[[Any], Any] | None = None,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """A jitted `step(state, batch) -> (state, metrics)`; the old state's memory is reused.

    The batch has `inputs`, `targets`, `segment_ids`, `positions` (int32 `[B, T]`) and `weights`
    (float32 `[B, T]`, 0 = no loss). Metrics are float32 scalars: `loss` (nats per token),
    `tokens` (sum of weights), `grad_norm` (before clipping), `lr` given a schedule, and `skipped`
    (steps left out as spikes so far) if the optimizer is one of `spikes.skip_spikes`.

    On a mesh, `shardings` are those of the state, before and after; metrics are on every device.

    >>> from sparse_attn import models
    >>> config = models.TransformerConfig(vocab_size=8, num_layers=1, embed_dim=16, num_heads=2)
    >>> model, optimizer = models.Transformer(config), optax.sgd(0.1)
    >>> key = jax.random.key(0)
    >>> state = jax.eval_shape(lambda: create(model, optimizer, key=key, length=4))
    >>> tokens = jnp.ones((2, 4), jnp.int32)
    >>> batch = dict(inputs=tokens, targets=tokens, segment_ids=tokens, positions=tokens,
    ...              weights=jnp.ones((2, 4)))
    >>> state, metrics = jax.eval_shape(make_train_step(model, optimizer), state, batch)
    >>> sorted(metrics)
    ['grad_norm', 'loss', 'tokens']
    """

    optimizer = optax.with_extra_args_support(optimizer)

    out_shardings = None
    if shardings is not None:
        everywhere = jax.sharding.NamedSharding(shardings.step.mesh, jax.sharding.PartitionSpec())
        out_shardings = (shardings, everywhere)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
    def train_step(state: TrainState, batch: Batch):
        loss, tokens, grads = loss_and_grads(model, state.params, batch, grad_accum=grad_accum)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss)
        metrics = {"loss": loss, "tokens": tokens, "grad_norm": optax.tree.norm(grads)}
        skipped = spikes.num_skipped(state.opt_state)
        if schedule is not None:
            metrics["lr"] = jnp.asarray(schedule(state.step - skipped), jnp.float32)
        if isinstance(opt_state, spikes.SkipSpikesState):
            metrics["skipped"] = opt_state.skipped.astype(jnp.float32)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return train_step


def check_batch(batch: Batch) -> None:
    """Checks the keys, shapes and dtypes of a batch of tokens, or of images (float inputs).

    Raises:
      ValueError: a key is missing, a shape differs, or a dtype is wrong.
    """
    for name in ("inputs", "targets", "weights"):
        _check_key(batch, name)
    inputs = batch["inputs"]
    expected: dict[str, tuple[Any, tuple[int, ...]]] = {}
    if inputs.dtype == np.float32:
        rows, how = inputs.shape[:1], "one per image"
    else:
        rows, how = inputs.shape, "as inputs is shaped"
        expected = dict.fromkeys(("inputs", *PACKING), (np.int32, rows))
    expected |= {"targets": (np.int32, rows), "weights": (np.float32, rows)}
    for name, (dtype, shape) in expected.items():
        _check_key(batch, name)
        if batch[name].dtype != dtype or batch[name].shape != shape:
            raise ValueError(
                f"batch[{name!r}] of {batch[name].dtype}{list(batch[name].shape)} must be "
                f"{np.dtype(dtype)}{list(shape)}, {how}"
            )


def _check_key(batch: Batch, name: str) -> None:
    if name not in batch:
        raise ValueError(f"batch must have {name!r}; it has {', '.join(sorted(batch))}")


def num_tokens(batch: Batch) -> int:
    """Tokens of a batch of text that are not padding.

    >>> num_tokens({"segment_ids": np.array([[1, 1, 0]])})
    2
    """
    return int(np.count_nonzero(batch["segment_ids"]))
