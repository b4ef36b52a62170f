"""Dense attention in float64, for what an element mask promises about outputs."""

import numpy as np


def attention(q, k, v, mask):
    """Softmax attention of q [T, N, H] to k, v [S, N, H] under bool [T, S]; empty rows are 0."""
    logits = np.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
    logits = np.where(mask, logits, -np.inf)
    top = logits.max(-1, keepdims=True, initial=-1e30)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("nts,snh->tnh", weights / np.where(total == 0, 1, total), v)


def rope(x, positions, base=10_000.0):
    """Rotary positions of x [T, N, H]."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * base ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    sin, cos = np.sin(angles), np.cos(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def projections(seed, width=16, heads=2):
    """Weights of queries, keys and values, each [D, N, H]."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, width, heads, width // heads)) / np.sqrt(width)


def model(x, positions, mask, layers=2):
    """Residual attention layers over hidden states x [T, D]."""
    for weights in (projections(i, x.shape[1]) for i in range(layers)):
        q, k, v = np.einsum("td,pdnh->ptnh", x, weights)
        out = attention(rope(q, positions), rope(k, positions), v, mask)
        x = x + out.reshape(x.shape)
    return x
