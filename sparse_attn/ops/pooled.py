"""Attention whose keys are averages over the cells of a coarser grid, per head."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparse_attn.masks import grids, lower
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from sparse_attn.patterns import base, per_head


def key_grid(pattern: base.Pattern) -> tuple[int, ...] | None:
    """The grid of the keys where it is coarser than that of the queries, else None.

    >>> from sparse_attn.patterns import cross_grid, swin
    >>> key_grid(cross_grid.CrossGrid(shape=(8, 8), key_shape=(2, 2), reach=None))
    (2, 2)
    >>> key_grid(swin.Swin(shape=(8, 8), window_size=2))
    """
    on_grid = isinstance(pattern, grids.GridPattern)
    return pattern.kv_shape if on_grid and pattern.kv_shape != pattern.shape else None


def is_pooled(pattern: Any) -> bool:
    """Whether some head has keys on a coarser grid, so that `attend_pooled` has to run it."""
    heads = pattern.patterns if isinstance(pattern, per_head.PerHead) else (pattern,)
    return any(isinstance(p, base.Pattern) and key_grid(p) is not None for p in heads)


@tiles.one_program
def attend_pooled(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    mask: base.Pattern | per_head.PerHead,
    block: int | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[Array, "N"] | None = None,
    impl: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """`attend` on one grid of tokens; heads whose pattern has a coarser key grid see cell averages.

    Averages of projected keys are projections of averages, so with `cross_grid` this is the global
    sub-sampled attention of Twins [arXiv:2104.13840, sec. 3.2] (with average pooling), and next to
    heads with windows the Lo-Fi heads of HiLo [arXiv:2205.13213, sec. 3.2].

    Args:
      mask: a pattern, or one per head; tokens are one grid in row-major order.
      block: tokens per block of the masks; None = `attend` chooses.
      logits_soft_cap, sink_logits, impl: as in `attend`.

    Raises:
      ValueError: the tokens are not the grid of a pattern, or as `attend`.

    >>> from sparse_attn.patterns import cross_grid
    >>> x = jnp.arange(16.0).reshape(1, 16, 1, 1)
    >>> coarse = cross_grid.CrossGrid(shape=(4, 4), key_shape=(2, 2))  # the own cell alone
    >>> attend_pooled(x, x, x, mask=coarse)[0, :4, 0, 0].tolist()
    [2.5, 2.5, 4.5, 4.5]
    """
    num_heads, group = q.shape[2], q.shape[2] // k.shape[2]
    per_heads = mask.for_heads(num_heads) if isinstance(mask, per_head.PerHead) else (mask,)
    per_heads = per_heads * (num_heads // len(per_heads))
    by_grid: dict[tuple[int, ...] | None, list[int]] = {}
    for head, pattern in enumerate(per_heads):
        by_grid.setdefault(key_grid(pattern), []).append(head)
    outs, done = [], []
    for key_shape, heads in by_grid.items():
        at = np.array(heads)
        keys, values = (jnp.take(x, at // group, axis=2) for x in (k, v))
        if key_shape is not None:
            shape = per_heads[heads[0]].shape
            keys, values = (average(x, shape, key_shape) for x in (keys, values))
        masks = tuple(per_heads[h] for h in heads)
        if block is not None:
            masks = lower.lower(
                masks, q_len=q.shape[1], kv_len=keys.shape[1], block_q=block, block_kv=block
            )
        out = attend_lib.attend(
            jnp.take(q, at, axis=2),
            keys,
            values,
            mask=masks,
            logits_soft_cap=logits_soft_cap,
            sink_logits=None if sink_logits is None else sink_logits[at],
            impl=impl,
        )
        outs.append(out)
        done += heads
    return jnp.take(jnp.concatenate(outs, 2), np.argsort(done), axis=2)


@tiles.one_program
def average(
    x: Float[Array, "B T K H"], shape: Sequence[int], key_shape: Sequence[int]
) -> Float[Array, "B S K H"]:
    """Means over the cells of a coarser grid; token i of an axis is in cell `i * keys // length`.

    Raises:
      ValueError: the tokens are not one grid of `shape`, or a cell would be empty.

    >>> average(jnp.arange(6.0).reshape(1, 6, 1, 1), (2, 3), (1, 2)).ravel().tolist()
    [2.0, 3.5]
    """
    if x.shape[1] != np.prod(shape) or any(m > n for n, m in zip(shape, key_shape, strict=True)):
        raise ValueError(
            f"{x.shape[1]} tokens must be a grid {shape} that {key_shape} is coarser than"
        )
    out = x.reshape(x.shape[0], *shape, *x.shape[2:]).astype(jnp.float32)
    for axis, (length, cells) in enumerate(zip(shape, key_shape, strict=True)):
        if length != cells:
            mean = _mean(length, cells)
            out = jnp.moveaxis(jnp.tensordot(mean, out, (1, axis + 1)), 0, axis + 1)
    return out.reshape(x.shape[0], -1, *x.shape[2:]).astype(x.dtype)


@functools.lru_cache(maxsize=64)
def _mean(length: int, cells: int) -> np.ndarray:
    """The matrix `[cells, length]` of averages."""
    member = np.arange(length) * cells // length == np.arange(cells)[:, None]
    return (member / member.sum(1, keepdims=True)).astype(np.float32)
