"""Sampling text from a model, by temperature and top-k."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from sparse_attn.parallel import mesh

_ROUND = 128  # Buffers are multiples of this, so that lengths close to each other share a compile.


def sample_token(
    logits_BV: Float[Array, "B V"], key: Array, *, temperature: float, top_k: int | None
) -> Int[Array, "B"]:
    """One token per row: the most likely one at temperature 0, else a draw among the `top_k`.

    >>> sample_token(jnp.array([[0.0, 2.0, 1.0]]), jax.random.key(0), temperature=0.0, top_k=None)
    Array([1], dtype=int32)
    """
    if temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    if top_k is not None:
        least_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return jax.random.categorical(key, logits_BV / temperature, axis=-1).astype(jnp.int32)


def generate(
    model: Any,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    key: Array,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> list[Int[np.ndarray, "T"]]:
    """Continues each prompt by `length` tokens; gives prompt and continuation.

    Right under every pattern, positional ones (sinks, strides, chunks) included: the row is never
    shifted, and tokens that do not exist yet are padding that nothing sees. The cost is one full
    forward pass per token, over a buffer of prompt plus `length`, as there is no KV cache.

    Args:
      model: a Linen module called as `model(tokens_BT, segment_ids=)`.
      params: its parameters.
      prompts: token ids, one or more each; lengths may differ.
      length: tokens to add.
      key: typed PRNG key; equal keys give equal samples.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: draw among the k most likely tokens; None = among all.

    Raises:
      ValueError: no prompt, an empty prompt, `length < 0`, `temperature < 0` or `top_k < 1`.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("prompts must be one or more sequences of at least one token each")
    if length < 0:
        raise ValueError(f"length={length} must be >= 0 tokens")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be >= 0; 0 = the most likely token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be >= 1, or None for all tokens")
    lengths_B = np.array([len(p) for p in prompts], np.int32)
    buffer = -(-(int(lengths_B.max()) + length) // _ROUND) * _ROUND
    tokens_BT = np.zeros((len(prompts), buffer), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    tokens_BT = _continue(
        model, params, tokens_BT, lengths_B, length, key, temperature=temperature, top_k=top_k
    )
    return [
        row[: n + length] for row, n in zip(np.asarray(tokens_BT), lengths_B.tolist(), strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("model", "temperature", "top_k"))
def _continue(model, params, tokens_BT, lengths_B, length, key, *, temperature, top_k):
    rows_B = jnp.arange(tokens_BT.shape[0])

    def add_token(i, tokens_BT):
        ends_B = lengths_B + i
        exists_BT = jnp.arange(tokens_BT.shape[1]) < ends_B[:, None]
        logits_BTV = model.apply(
            {"params": params}, tokens_BT, segment_ids=exists_BT.astype(jnp.int32)
        )
        logits_BV = logits_BTV[rows_B, ends_B - 1]
        token_B = sample_token(
            logits_BV, jax.random.fold_in(key, i), temperature=temperature, top_k=top_k
        )
        return tokens_BT.at[rows_B, ends_B].set(token_B)

    return mesh.shard(jax.lax.fori_loop(0, length, add_token, tokens_BT), None, None)
