"""Bytes as tokens: ids 0..255 are the bytes, three more ids are marks, the rest is padding.

No vocabulary file, nothing to train, and a loss in bits per byte comes for free. The vocabulary is
rounded up to a multiple of 128 (the lane width of a TPU, and divisible by every usual number of
shards); the ids from `BYTES + 3` to `VOCAB_SIZE - 1` never occur in data.
"""

import numpy as np
from jaxtyping import Int

BYTES = 256
PAD = 256  # fills a batch; never a target
BOS = 257  # precedes each document; never a target
EOS = 258  # ends each document
VOCAB_SIZE = 384


def encode(text: str | bytes) -> Int[np.ndarray, "T"]:
    """Gives one int32 token per byte, without marks; a `str` is written as UTF-8 first.

    >>> encode("né").tolist()
    [110, 195, 169]
    """
    raw = text.encode("utf-8", errors="surrogateescape") if isinstance(text, str) else text
    return np.frombuffer(raw, np.uint8).astype(np.int32)


def decode(tokens: Int[np.ndarray, "T"]) -> bytes:
    """Gives the bytes back, exactly; marks and unused ids stand for no byte.

    Raises:
      ValueError: an id is outside the vocabulary.

    >>> decode(np.array([BOS, 110, 195, 169, EOS, PAD])).decode()
    'né'
    """
    tokens = np.asarray(tokens)
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < VOCAB_SIZE):
        bad = tokens[(tokens < 0) | (tokens >= VOCAB_SIZE)][0]
        raise ValueError(f"tokens contains {bad}; ids must be in 0..{VOCAB_SIZE - 1}")
    return tokens[tokens < BYTES].astype(np.uint8).tobytes()


def to_text(tokens: Int[np.ndarray, "T"]) -> str:
    """Gives text to look at: bytes that are not UTF-8 become U+FFFD.

    >>> to_text(np.array([104, 105, 255]))
    'hi\\ufffd'
    """
    return decode(tokens).decode("utf-8", errors="replace")
