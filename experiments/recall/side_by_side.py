"""Small models of one shape, trained side by side in one program: seeds of a task, or tasks."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from sparse_attn.data.synthetic import catalog
from sparse_attn.models import transformer
from sparse_attn.train import state

SHORT_CONV = 3  # tokens


def batches(each: Sequence[catalog.Batches]) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches `[models, rows, T]`, those of a model from its own source.

    >>> task = catalog.parse("mqar")
    >>> each = [catalog.Batches(task, split="train", seed=s, batch_size=2) for s in range(3)]
    >>> next(batches(each))["inputs"].shape
    (3, 2, 64)
    """
    for drawn in zip(*each):
        yield {n: np.stack([x[n] for x in drawn]) for n in ("inputs", "targets", "weights")}


def one_layer(vocab_size: int, pattern: Any) -> transformer.Transformer:
    """A layer of attention, 32 wide, behind a convolution of SHORT_CONV tokens; no positions.

    >>> from sparse_attn.patterns import causal
    >>> one_layer(96, causal.Causal()).config.short_conv
    3
    """
    return transformer.Transformer(
        transformer.TransformerConfig(
            vocab_size=vocab_size, num_layers=1, embed_dim=32, num_heads=1, mlp_dim=64,
            pattern=pattern, block=4, impl="reference", rope_base=None, short_conv=SHORT_CONV,
        )
    )  # fmt: skip


def of_seeds(task: Any, seeds: int, *, split: str, rows: int) -> Iterator[dict[str, np.ndarray]]:
    """`batches` of one task, those of each seed its own.

    >>> next(of_seeds(catalog.parse("mqar"), 3, split="train", rows=2))["inputs"].shape
    (3, 2, 64)
    """
    return batches(
        [catalog.Batches(task, split=split, seed=s, batch_size=rows) for s in range(seeds)]
    )


def train(
    model: transformer.Transformer,
    keys: jax.Array,
    data: Iterable[dict[str, np.ndarray]],
    *,
    length: int,
    steps: int,
    rate: float,
) -> PyTree:
    """Parameters `[models, ...]` after `steps` of Adam, one model for each key.

    Args:
      data: as of `batches`.
      length: tokens of a row.
      rate: the highest; a warm-up of a fifteenth of the steps, then a cosine.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 15 + 1, steps + 1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.95))
    example = jnp.zeros((1, length), jnp.int32)
    params = jax.jit(jax.vmap(lambda key: model.init(key, example)["params"]))(keys)
    moments = jax.vmap(optimizer.init)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @jax.vmap
    def step(params, moments, batch):
        _, _, grads = state.loss_and_grads(model, params, batch)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    for _, batch in zip(range(steps), data):
        params, moments = step(params, moments, batch)
    return params


def accuracy(logits: jax.Array, batch: dict[str, Any]) -> jax.Array:
    """The share of right answers, of logits `[rows, T, V]`."""
    right = (logits.argmax(-1) == batch["targets"]) * batch["weights"]
    return right.sum() / batch["weights"].sum()
