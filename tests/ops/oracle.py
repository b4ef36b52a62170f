"""Attention in NumPy float64, one query at a time: it shares nothing with what it judges."""

from typing import NamedTuple

import numpy as np


class Results(NamedTuple):
    """Outputs and gradients of one call; None where the input is absent."""

    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dkey_bias: np.ndarray | None = None
    dsink_logits: np.ndarray | None = None


def attention(
    q, k, v, visible, dout, dlse, *, key_bias=None, sink_logits=None, scale, soft_cap=None
) -> Results:
    """Forward and backward, from the equations: only visible keys are ever read."""
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlse))
    batch, q_len, heads, _ = q.shape
    group = heads // k.shape[2]
    bias = None if key_bias is None else np.asarray(key_bias, np.float64)
    if bias is not None and bias.ndim == 2:
        bias = bias[:, None]
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -np.inf)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dbias = None if bias is None else np.zeros_like(bias)
    dsinks = None if sink_logits is None else np.zeros(heads)
    for b, n, t in np.ndindex(batch, heads, q_len):
        g = n // group
        seen = visible[b, n, t]
        if bias is not None:
            m = n if bias.shape[1] > 1 else 0
            seen = seen & (bias[b, m] != -np.inf)
        (seen,) = np.nonzero(seen)
        keys, values = k[b, seen, g], v[b, seen, g]
        capped = logits = keys @ q[b, t, n] * scale
        if soft_cap is not None:
            capped = soft_cap * np.tanh(logits / soft_cap)
        z = capped if bias is None else capped + bias[b, m, seen]
        sink = -np.inf if sink_logits is None else float(sink_logits[n])
        if not len(seen) and sink == -np.inf:
            continue
        top = max(z.max(initial=-np.inf), sink)
        total = np.exp(z - top).sum() + np.exp(sink - top)
        p = np.exp(z - top) / total
        out[b, t, n], lse[b, t, n] = p @ values, top + np.log(total)
        delta = dout[b, t, n] @ out[b, t, n] - dlse[b, t, n]
        dz = p * (values @ dout[b, t, n] - delta)
        dlogits = dz if soft_cap is None else dz * (1 - (capped / soft_cap) ** 2)
        dq[b, t, n] = dlogits @ keys * scale
        dk[b, seen, g] += np.outer(dlogits, q[b, t, n]) * scale
        dv[b, seen, g] += np.outer(p, dout[b, t, n])
        if bias is not None:
            dbias[b, m, seen] += dz
        if sink_logits is not None:
            dsinks[n] -= np.exp(sink - top) / total * delta
    if bias is not None:
        dbias = dbias.reshape(np.shape(key_bias))
    return Results(out, lse, dq, dk, dv, dbias, dsinks)
