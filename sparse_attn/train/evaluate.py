"""Evaluation: bits per byte, comparable between tokenizers, patterns and sequence lengths."""

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


def evaluate(
    eval_step: Callable[[PyTree, state_lib.Batch], dict[str, Array]],
    params: PyTree,
    batches: Iterable[state_lib.Batch],
) -> dict[str, float]:
    """`bits_per_byte`, `loss` (nats per token) and `tokens` over all batches, summed in float64.

    Raises:
      ValueError: the batches hold no byte to predict.

    >>> def eval_step(params, batch):
    ...     return {"nats": batch["n"], "tokens": 2.0, "bytes": 2.0}
    >>> evaluate(eval_step, {}, [{"n": 3.0}, {"n": 5.0}])["loss"]
    2.0
    """
    sums = {"nats": 0.0, "tokens": 0.0, "bytes": 0.0}
    for batch in batches:
        for name, value in eval_step(params, jax.device_put(batch)).items():
            sums[name] += float(value)
    if not sums["bytes"]:
        raise ValueError("eval batches hold no byte to predict; give more validation data")
    return {
        "bits_per_byte": sums["nats"] / math.log(2) / sums["bytes"],
        "loss": sums["nats"] / sums["tokens"],
        "tokens": sums["tokens"],
    }
