"""Concatenate and cut: one stream of documents, windows of equal length, no token left out.

A split is the stream `BOS document EOS BOS document EOS ...`. Window `w` covers the inputs
`[w*context, (w+1)*context)`; each target is the token after its input. So every byte and every EOS
is a target exactly once an epoch; the only pair without loss is EOS -> BOS, which crosses from one
document to the next. The last window is filled with PAD.
"""

import numpy as np
from jaxtyping import Float32, Int32, UInt16

from sparse_attn.data import tokenizer

Batch = dict[str, np.ndarray]


def num_windows(num_tokens: int, context: int) -> int:
    """Counts windows of `context` tokens, the last one possibly filled up.

    >>> num_windows(num_tokens=9, context=4), num_windows(num_tokens=10, context=4)
    (2, 3)
    """
    return -(-(num_tokens - 1) // context)


def pack(tokens: UInt16[np.ndarray, "B T1"]) -> Batch:
    """Turns windows of context + 1 tokens into what a training step takes, each array `[B, T]`.

    inputs, targets (int32): tokens and the tokens that follow them. weights (float32): 1 where the
    target is a byte or EOS of the same document, else 0. segment_ids (int32): 1, 2, ... per
    document in the window, 0 for PAD. positions (int32): from 0 at the start of each document, and
    at the start of the window for a document that began before it.

    >>> b, e, p = tokenizer.BOS, tokenizer.EOS, tokenizer.PAD
    >>> batch = pack(np.array([[65, e, b, 66, e, p]], np.uint16))
    >>> batch["weights"].tolist(), batch["segment_ids"].tolist(), batch["positions"].tolist()
    ([[1.0, 0.0, 1.0, 1.0, 0.0]], [[1, 1, 2, 2, 2]], [[0, 1, 0, 1, 2]])
    """
    inputs = tokens[:, :-1].astype(np.int32)
    targets = tokens[:, 1:].astype(np.int32)
    real = inputs != tokenizer.PAD
    starts = inputs == tokenizer.BOS
    starts[:, 0] = True
    index = np.arange(inputs.shape[1], dtype=np.int32)
    start_of = np.maximum.accumulate(np.where(starts, index, 0), axis=1, dtype=np.int32)
    scored: Float32[np.ndarray, "B T"] = (
        (targets != tokenizer.PAD) & (targets != tokenizer.BOS)
    ).astype(np.float32)
    segments: Int32[np.ndarray, "B T"] = np.cumsum(starts, axis=1, dtype=np.int32)
    return {
        "inputs": inputs,
        "targets": targets,
        "weights": scored,
        "segment_ids": np.where(real, segments, 0).astype(np.int32),
        "positions": np.where(real, index - start_of, 0).astype(np.int32),
    }
