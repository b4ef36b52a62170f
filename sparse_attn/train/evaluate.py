"""Evaluation: bits per byte of text, comparable between tokenizers, patterns and sequence lengths;
accuracy of classes."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from sparse_attn.data import tokenizer
from sparse_attn.train import state as state_lib

# Bytes that each token of the byte tokenizer stands for: marks are none.
BYTE_TOKENS = (np.arange(tokenizer.VOCAB_SIZE) < tokenizer.BYTES).astype(np.float32)


def make_eval_step(
    model: Any, *, token_bytes: Float[np.ndarray, "V"] = BYTE_TOKENS
) -> Callable[[PyTree, state_lib.Batch], dict[str, Array]]:
    """A jitted `eval_step(params, batch) -> sums` of `nats`, `tokens` and `bytes`.

    `token_bytes[i]` is the number of bytes that token i stands for, 0 for marks: predicting a mark
    costs nats and yields no byte.
    """
    token_bytes = np.asarray(token_bytes, np.float32)

    @jax.jit
    def eval_step(params: PyTree, batch: state_lib.Batch):
        nats, tokens = state_lib.loss_sum(model, params, batch)
        lengths_BT = jnp.asarray(token_bytes)[batch["targets"]]
        return {"nats": nats, "tokens": tokens, "bytes": (lengths_BT * batch["weights"]).sum()}

    return eval_step


def make_class_step(model: Any) -> Callable[[PyTree, state_lib.Batch], dict[str, Array]]:
    """A jitted `eval_step(params, batch) -> sums` of `nats`, `tokens` (images) and `correct`."""

    @jax.jit
    def eval_step(params: PyTree, batch: state_lib.Batch):
        logits_BC, weights_B = model.apply({"params": params}, batch["inputs"]), batch["weights"]
        losses_B = state_lib.token_losses(logits_BC, batch["targets"])
        correct_B = logits_BC.argmax(-1) == batch["targets"]
        sums = {"nats": losses_B, "tokens": jnp.ones_like(losses_B), "correct": correct_B}
        return {name: (values * weights_B).sum() for name, values in sums.items()}

    return eval_step


def evaluate(
    eval_step: Callable[[PyTree, state_lib.Batch], dict[str, Array]],
    params: PyTree,
    batches: Iterable[state_lib.Batch],
) -> dict[str, float]:
    """`loss` (nats per token) and `tokens` over all batches, summed in float64.

    With the sum of `bytes` also `bits_per_byte`, with that of `correct` also `accuracy`.

    Raises:
      ValueError: the batches hold nothing to predict.

    >>> def eval_step(params, batch):
    ...     return {"nats": batch["n"], "tokens": 2.0, "bytes": 2.0}
    >>> evaluate(eval_step, {}, [{"n": 3.0}, {"n": 5.0}])["loss"]
    2.0
    """
    sums: dict[str, float] = {}
    for batch in batches:
        for name, value in eval_step(params, batch).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    if not sums.get("bytes", sums.get("tokens")):
        raise ValueError("eval batches hold no byte to predict; give more validation data")
    result = {}
    if "bytes" in sums:
        result["bits_per_byte"] = sums["nats"] / math.log(2) / sums["bytes"]
    if "correct" in sums:
        result["accuracy"] = sums["correct"] / sums["tokens"]
    return result | {"loss": sums["nats"] / sums["tokens"], "tokens": sums["tokens"]}
