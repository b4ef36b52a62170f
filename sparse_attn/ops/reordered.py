"""Attention on reordered tokens: permute, run, unpermute, in one wrapper."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_attn.masks import curves, lower, reorder, tables
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from sparse_attn.patterns import base, joint, per_head, permuted


@tiles.one_program
def attend_reordered(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    mask: base.Pattern | per_head.PerHead | Sequence[base.Pattern],
    order: reorder.Reordering | Sequence[reorder.Reordering],
    segment_ids: Int[Array, "B T"] | None = None,
    key_bias: Float[Array, "B T"] | Float[Array, "B N T"] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[Array, "N"] | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Any:
    """`attend` on tokens of a grid, run in an order in which their blocks are compact.

    Takes and returns row-major tokens; equals `attend` with the same arguments, at fewer active
    blocks. `mask` speaks of row-major positions. Differentiable, and nothing but static indices
    is added to the program, so it runs under `jit` and inside `shard_map` (each device permutes
    the grids that it holds).

    Args:
      mask: a pattern on the grid, a `PerHead` or one pattern per query head; with tokens in front
        of the grids, which stay where they are, a `joint` pattern.
      order: of the grid's tokens; or one per query head, where heads have orders of their own
        [arXiv:2506.16054, sec. 4.1].
      segment_ids, key_bias, scale, logits_soft_cap, sink_logits, return_lse, impl: as in `attend`.

    Raises:
      ValueError: the tokens after the prefix are not whole grids of the order, or an argument is
        malformed.

    >>> import jax
    >>> from sparse_attn.patterns import neighborhood
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 256, 2, 8))
    >>> near = neighborhood.Neighborhood(shape=(16, 16), kernel_size=5)
    >>> out = attend_reordered(q, k, v, mask=near, order=reorder.Tiles((16, 16), (4, 4)))
    >>> bool(jnp.allclose(out, attend_lib.attend(q, k, v, mask=near), atol=1e-5))
    True
    """
    length, num_heads, num_kv_heads = q.shape[1], q.shape[2], k.shape[2]
    if k.shape[1] != length:
        raise ValueError(f"k.shape={k.shape} must have the length of q.shape={q.shape}")
    masks = _per_head("mask", mask, base.Pattern, num_heads)
    orders = _per_head("order", order, reorder.Reordering, num_heads)
    prefixes = {p.tokens if isinstance(p, joint.Joint) else 0 for p in masks}
    if len(prefixes) > 1:
        raise ValueError(f"mask={mask!r} must have one prefix, not {sorted(prefixes)} tokens")
    (prefix,) = prefixes
    for each in set(orders):
        if length <= prefix or (length - prefix) % each.size:
            raise ValueError(
                f"order={each.spec} must divide the {length} tokens less the prefix of {prefix}"
            )
    outs, lses, heads_done = [], [], []
    for each, heads in _groups(orders, masks):
        kv_heads = _kv_heads(heads, num_heads // num_kv_heads)

        def move(x, at, each=each):
            x = x if len(at) == x.shape[2] else jnp.take(x, at, axis=2)
            return permute(x, each, prefix=prefix)

        bias = key_bias
        if bias is not None:
            bias = bias if bias.ndim == 2 else bias[:, heads]
            bias = jnp.take(bias, places(each, length, prefix), axis=-1)
        ids = None if segment_ids is None else permute(segment_ids, each, prefix=prefix)
        out, lse = attend_lib.attend(
            move(q, heads),
            move(k, kv_heads),
            move(v, kv_heads),
            mask=_mask([masks[h] for h in heads], each, length, prefix),
            segment_ids=ids,
            key_bias=bias,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            sink_logits=None if sink_logits is None else sink_logits[heads],
            return_lse=True,
            impl=impl,
        )
        outs.append(unpermute(out, each, prefix=prefix))
        lses.append(unpermute(lse, each, prefix=prefix))
        heads_done += heads.tolist()
    if len(outs) == 1:
        out, lse = outs[0], lses[0]
    else:
        back = np.argsort(heads_done)
        out, lse = (jnp.take(jnp.concatenate(x, 2), back, axis=2) for x in (outs, lses))
    return (out, lse) if return_lse else out


def permute(x: Array, order: reorder.Reordering, *, prefix: int = 0) -> Array:
    """`x [B, T, ...]` with the grid's tokens in `order`; a transpose where tiles divide the grid.

    >>> x = jnp.arange(16)[None]
    >>> permute(x, reorder.Tiles((4, 4), (2, 2)))[0, :8].tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    return _move(x, order, prefix, forward=True)


def unpermute(x: Array, order: reorder.Reordering, *, prefix: int = 0) -> Array:
    """The inverse of `permute`.

    >>> order, x = curves.Gilbert((3, 5)), jnp.arange(15)[None]
    >>> bool((unpermute(permute(x, order), order) == x).all())
    True
    """
    return _move(x, order, prefix, forward=False)


@tiles.one_program
def _move(x, order, prefix, forward):
    digits = _digits(order)
    if digits is None:
        return jnp.take(x, places(order, x.shape[1], prefix, forward=forward), axis=1)
    sizes, axes = digits
    batch, rest = x.shape[0], x.shape[2:]
    grid = x[:, prefix:]
    images = grid.shape[1] // order.size
    if not forward:
        sizes, axes = [sizes[a] for a in axes], np.argsort(axes).tolist()
    grid = grid.reshape(batch, images, *sizes, *rest)
    last = range(2 + len(axes), grid.ndim)
    grid = grid.transpose(0, 1, *(2 + a for a in axes), *last)
    grid = grid.reshape(batch, images * order.size, *rest)
    return jnp.concatenate([x[:, :prefix], grid], 1) if prefix else grid


def _digits(order) -> tuple[list[int], list[int]] | None:
    """Sizes of the digits of row-major coordinates, and their order; None where tiles are ragged.

    A coordinate is (tile, offset in the tile, remainder modulo the dilation).
    """
    if not isinstance(order, reorder.Tiles):
        return None
    ndim = len(order.shape)
    dilation = order.dilation or (1,) * ndim
    if any(n % d for n, d in zip(order.shape, dilation, strict=True)):
        return None
    inner = [n // d for n, d in zip(order.shape, dilation, strict=True)]
    tile = inner if order.tile is None else order.tile
    if any(n % t for n, t in zip(inner, tile, strict=True)):
        return None
    sizes = []
    for n, t, d in zip(inner, tile, dilation, strict=True):
        sizes += [n // t, t, d]
    axes = range(ndim) if order.axes is None else order.axes
    return sizes, [3 * a + digit for digit in (2, 0, 1) for a in axes]


@functools.lru_cache(maxsize=64)
def places(
    order: reorder.Reordering, length: int, prefix: int = 0, *, forward: bool = True
) -> np.ndarray:
    """Index of the token that moves to each place, int32 `[length]`, for a prefix and whole grids.

    >>> places(reorder.Tiles((2, 2), axes=(1, 0)), 9, prefix=1)
    array([0, 1, 3, 2, 4, 5, 7, 6, 8], dtype=int32)
    """
    table = order.forward if forward else order.inverse
    starts = np.arange(prefix, length, order.size, dtype=np.int32)
    index = np.concatenate([np.arange(prefix, dtype=np.int32), (starts[:, None] + table).ravel()])
    index.flags.writeable = False
    return index


def best_order(
    pattern: base.Pattern | per_head.PerHead,
    orders: Sequence[reorder.Reordering],
    *,
    block_q: int = 128,
    block_kv: int = 128,
) -> reorder.Reordering:
    """The order of one grid's tokens with the fewest active blocks; the first one of equals.

    >>> from sparse_attn.patterns import axial
    >>> columns = axial.Axial(shape=(32, 32), axes=(0,))
    >>> best_order(columns, axis_orders((32, 32)), block_q=32, block_kv=32).axes
    (1, 0)
    """

    def active(order):
        mask = _mask(
            [pattern] if isinstance(pattern, base.Pattern) else list(pattern.patterns),
            order, order.size, 0, {"block_q": block_q, "block_kv": block_kv},
        )  # fmt: skip
        if not isinstance(mask, base.Pattern | tuple):
            return int(mask.kv_counts.sum())
        lowered = lower.lower(mask, q_len=order.size, block_q=block_q, block_kv=block_kv)
        return int(lowered.kv_counts.sum())

    return min(orders, key=active)


def axis_orders(shape: tuple[int, ...]) -> tuple[reorder.Tiles, ...]:
    """All orders of the axes of a grid, row-major first: six for a video.

    >>> len(axis_orders((2, 3, 4)))
    6
    """
    return tuple(
        reorder.Tiles(shape, axes=axes) for axes in itertools.permutations(range(len(shape)))
    )


def _per_head(name, value, kind, num_heads):
    if isinstance(value, kind):
        return (value,) * num_heads
    values = value.for_heads(num_heads) if isinstance(value, per_head.PerHead) else tuple(value)
    if len(values) != num_heads or not all(isinstance(x, kind) for x in values):
        raise ValueError(f"{name}={value!r} must be a {kind.__name__}, or one per head of q")
    return values


def _groups(orders, masks):
    """Heads that run in one call: one order, and where it is a table also one pattern."""
    groups = {}
    for head, (order, mask) in enumerate(zip(orders, masks, strict=True)):
        key = (order, mask if isinstance(order, curves.Gilbert) else None)
        groups.setdefault(key, []).append(head)
    return [(order, np.asarray(heads, np.int32)) for (order, _), heads in groups.items()]


def _kv_heads(heads, group):
    """KV heads of some query heads: each once where whole groups are asked for, else repeated."""
    kv = heads // group
    whole = np.unique(kv)
    return whole if len(whole) * group == len(heads) else kv


def _mask(masks, order, length, prefix, blocks=None):
    """What `attend` takes for these heads when their tokens stand in `order`."""
    if isinstance(order, curves.Gilbert):
        if prefix or length != order.size:
            raise NotImplementedError(
                f"order={order.spec} has no closed form: one grid without a prefix, not {length} "
                f"tokens with a prefix of {prefix}"
            )
        side = tiles.mask_block(length)
        blocks = {"block_q": side, "block_kv": side} if blocks is None else blocks
        return tables.lower(masks[0], order, **blocks)
    moved = tuple(permuted.permute(m, order) for m in masks)
    return moved[0] if len(set(masks)) == 1 else moved
