"""Offline choice of a static pattern per head, from a few samples of queries, keys and values."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparse_attn.masks import stats
from sparse_attn.ops import attend as attend_lib
from sparse_attn.patterns import base, full


def errors(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    candidates: Sequence[base.Pattern | None],
) -> Float[np.ndarray, "C N"]:
    """What each pattern changes in the output of each head, relative to dense attention.

    `mean((out - dense)**2) / mean(dense**2)` over samples and tokens; None is the head left out
    (output 0), so its error is 1.

    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 32, 2, 8))
    >>> errors(q, k, v, [full.Full(), None]).round(3).tolist()
    [[0.0, 0.0], [1.0, 1.0]]
    """
    dense = attend_lib.attend(q, k, v, mask=full.Full()).astype(jnp.float32)
    scale = (dense**2).mean((0, 1, 3))
    rows = []
    for pattern in candidates:
        if pattern is None:
            out = jnp.zeros_like(dense)
        else:
            out = attend_lib.attend(q, k, v, mask=pattern).astype(jnp.float32)
        rows.append(((out - dense) ** 2).mean((0, 1, 3)) / scale)
    return np.stack(rows)


def costs(
    candidates: Sequence[base.Pattern | None],
    *,
    q_len: int,
    kv_len: int | None = None,
    block_q: int = 128,
    block_kv: int = 128,
) -> Float[np.ndarray, "C"]:
    """The share of all blocks that each pattern computes; 0 for None, a head left out.

    >>> from sparse_attn.patterns import causal
    >>> costs([full.Full(), causal.Causal(), None], q_len=4, block_q=2, block_kv=2).tolist()
    [1.0, 0.75, 0.0]
    """
    blocks = {"block_q": block_q, "block_kv": block_kv}

    def cost(pattern):
        if pattern is None:
            return 0.0
        counted = stats.of(pattern, q_len=q_len, kv_len=kv_len, max_pairs=0, **blocks)
        return counted.block_density

    return np.array([cost(pattern) for pattern in candidates])


def cheapest(
    error: Float[np.ndarray, "C N"], cost: Float[np.ndarray, "C"], *, cost_weight: float
) -> np.ndarray:
    """Index of the candidate with the least `error + cost_weight * cost`, int `[N]`, by head.

    Of equal ones the first. The offline search of Sparse-vDiT [arXiv:2506.03065, sec. 3.2], whose
    candidates are the dense, diagonal, multi-diagonal and stripe patterns and None.

    >>> error = np.array([[0.0, 0.0], [0.1, 0.9]])
    >>> cheapest(error, np.array([1.0, 0.2]), cost_weight=0.5).tolist()
    [1, 0]
    """
    return np.argmin(error + cost_weight * cost[:, None], axis=0)


def cheapest_within(
    error: Float[np.ndarray, "C N"], cost: Float[np.ndarray, "C"], *, most_error: float
) -> int:
    """Index of the cheapest candidate that keeps the mean error of a layer's heads small enough.

    The layer-wise search of Efficient-vDiT [arXiv:2502.06155, sec. 3.3]: candidates are the
    numbers of reference frames.

    Raises:
      ValueError: no candidate is within `most_error`.

    >>> cheapest_within(np.array([[0.5], [0.01], [0.0]]), np.array([0.1, 0.4, 1.0]), most_error=0.1)
    1
    """
    inside = error.mean(1) <= most_error
    if not inside.any():
        least = error.mean(1).min()
        raise ValueError(f"most_error={most_error} must be >= {least:.3g}, the least of them")
    return int(np.argmin(np.where(inside, cost, np.inf)))
