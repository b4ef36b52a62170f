"""Bits per byte of text by place in the document, and of what repeats apart from what is new."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, PyTree

from sparse_attn.data import tokenizer
from sparse_attn.train import state as state_lib


def repeated(
    inputs: Int[np.ndarray, "B T"],
    targets: Int[np.ndarray, "B T"],
    segment_ids: Int[np.ndarray, "B T"],
    *,
    n: int,
) -> Bool[np.ndarray, "B T"]:
    """True where the target ends a run of `n` tokens that occurred before in its document and row.

    A model can recall these from what it has read: the associative-recall hits of
    [arXiv:2312.04927, sec. 3.1] for runs of n tokens.

    Raises:
      ValueError: `n < 2`: a run has something that it is recalled by.

    >>> row = np.array([[1, 2, 3, 1, 2, 1]])
    >>> ones = np.ones((1, 5), int)
    >>> repeated(row[:, :-1], row[:, 1:], ones, n=2).tolist()  # the second 1 2
    [[False, False, False, True, False]]
    """
    if n < 2:
        raise ValueError(f"n={n} must be at least 2 tokens")
    found = np.zeros(inputs.shape, bool)
    for row in range(len(inputs)):
        seen: set[tuple[int, ...]] = set()
        for t in range(n - 2, inputs.shape[1]):
            first = t - n + 2
            if segment_ids[row, first] != segment_ids[row, t]:
                continue  # The run would begin in another document.
            document = int(segment_ids[row, t])
            run = (document, *inputs[row, first : t + 1].tolist(), int(targets[row, t]))
            found[row, t] = run in seen
            seen.add(run)
    return found


def breakdown(
    model: Any,
    params: PyTree,
    batches: Iterable[state_lib.Batch],
    *,
    edges: Sequence[int] = (0, 64, 256, 1024),
    n: int = 4,
) -> dict[str, dict[str, float]]:
    """Bits per byte, and bytes, of parts of the targets; every byte is in one part of each kind.

    The parts: `position <a>-<b>`, by the number of tokens of the document that came before in the
    row, one part per edge and the last one open; `repeated <n>-grams` (see `repeated`) and `new`;
    and `all`, which is what `evaluate` gives. Parts without a byte are left out. The end of a
    document costs bits and is no byte.

    Raises:
      ValueError: edges do not start at 0 or do not ascend.

    >>> from sparse_attn import models
    >>> config = models.TransformerConfig(vocab_size=384, num_layers=1, embed_dim=16, num_heads=2)
    >>> model, tokens = models.Transformer(config), jnp.full((1, 8), 65, jnp.int32)
    >>> batch = dict(inputs=tokens, targets=tokens, segment_ids=tokens, weights=np.ones((1, 8)),
    ...              positions=np.arange(8, dtype=np.int32)[None])
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    >>> parts = breakdown(model, params, [batch], edges=(0, 2), n=4)
    >>> {name: part["bytes"] for name, part in parts.items()}
    {'all': 8.0, 'position 0-1': 2.0, 'position 2-': 6.0, 'repeated 4-grams': 5.0, 'new': 3.0}
    """
    if edges[0] != 0 or list(edges) != sorted(set(edges)):
        raise ValueError(f"edges={tuple(edges)} must ascend from 0")
    losses = jax.jit(lambda params, batch: _losses(model, params, batch))
    ends = [f"{b - 1}" for b in edges[1:]] + [""]
    names = [f"position {a}-{b}" for a, b in zip(edges, ends, strict=True)]
    names = ["all", *names, f"repeated {n}-grams", "new"]
    sums = {name: np.zeros(2) for name in names}  # nats, bytes
    for batch in batches:
        batch = {name: np.asarray(x) for name, x in batch.items()}
        nats = np.asarray(losses(params, batch), np.float64) * batch["weights"]
        size = batch["weights"] * (batch["targets"] < tokenizer.BYTES)
        again = repeated(batch["inputs"], batch["targets"], batch["segment_ids"], n=n)
        place = np.searchsorted(edges, batch["positions"], side="right") - 1
        parts = [np.ones_like(again), *(place == i for i in range(len(edges))), again, ~again]
        for name, part in zip(names, parts, strict=True):
            sums[name] += (nats[part].sum(), size[part].sum())
    return {
        name: {"bits_per_byte": float(nats / math.log(2) / size), "bytes": float(size)}
        for name, (nats, size) in sums.items()
        if size
    }


def _losses(model, params, batch):
    packing = {name: batch[name] for name in state_lib.PACKING if name in batch}
    logits = model.apply({"params": params}, jnp.asarray(batch["inputs"]), **packing)
    return state_lib.token_losses(logits, batch["targets"])
