"""Portable: some queries at a time gather their blocks of keys and attend to them.

The largest arrays hold the gathered keys of one step, `[B, C, U, n * block, H]`; C is chosen so
that they stay small. Work is T * n * block whatever the number of keys. Any choice is a gather of
its own, so nothing is shared between neighbours that choose alike; `by_block` does that.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_attn.ops import softmax, tiles
from sparse_attn.ops.token_select import inputs as inputs_lib

# Numbers in the gathered keys of a step: what fits the caches of a CPU, or keeps an accelerator
# busy.
_AT_ONCE = {"cpu": 1 << 20, "gpu": 1 << 26, "tpu": 1 << 24}


def check(inputs: inputs_lib.Inputs, kernel: str | None) -> None:
    """Takes everything."""
    if kernel is not None:
        raise NotImplementedError(f"kernel={kernel!r} must be None: it uses no kernel")


class _Keys(NamedTuple):
    """Keys and values by block, `[B, K, blocks, block, ..]`, zero where not finite or missing."""

    k: Any
    v: Any
    bad: Any
    ids: Any  # [B, blocks, block], or None


def _blocked(x, block):
    """`[B, S, ..]` as `[B, blocks, block, ..]`."""
    widths = ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, widths).reshape(x.shape[0], -1, block, *x.shape[2:])


def _keys(inputs, dtype):
    k, v, bad = inputs_lib.finite(inputs)
    arrays = (_blocked(x, inputs.block) for x in (k.astype(dtype), v.astype(dtype), bad))
    k, v, bad = (jnp.moveaxis(x, 3, 1) for x in arrays)
    ids = inputs.kv_segment_ids
    return _Keys(k, v, bad, None if ids is None else _blocked(ids, inputs.block))


def _chunks(inputs, *others):
    """Queries, their lists, documents and `others`, all `[B, T, ..]`, as `[steps, B, C, ..]`."""
    batch, length, _, head_dim = inputs.q.shape
    tables, _, _ = inputs.sizes
    width = max(head_dim, inputs.v.shape[-1]) * inputs.block * inputs.selected.shape[3]
    size = max(1, min(length, _AT_ONCE[tiles.target().platform] // (batch * tables * width)))
    selected, ids = inputs.selected, inputs.q_segment_ids
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    ids = positions if ids is None else ids
    arrays = (positions, ids, jnp.where(selected < 0, -1, selected), inputs.q, *others)

    def cut(x):
        return jnp.moveaxis(_blocked(x, size), 1, 0)

    # Queries past the end choose block 0: their results are cut off, their cotangents are zero.
    return tuple(map(cut, arrays))


def _gather(inputs, keys, chunk):
    """The chunk's keys `[B, C, U, z, ..]`, what it sees of them, their places and logits."""
    positions, ids, selected, q = chunk
    tables, group, shared = inputs.sizes
    batch, size = positions.shape
    at = jnp.maximum(selected, 0)
    where = (
        jnp.arange(batch)[:, None, None, None],
        jnp.arange(tables)[None, None, :, None] // shared,
        at,
    )
    k, v, bad = (
        x[where].reshape(batch, size, tables, -1, *x.shape[4:]) for x in (keys.k, keys.v, keys.bad)
    )
    token = at[..., None] * inputs.block + jnp.arange(inputs.block, dtype=jnp.int32)
    token_z = token.reshape(batch, size, tables, -1)
    listed = jnp.broadcast_to((selected >= 0)[..., None], token.shape).reshape(token_z.shape)
    seen = inputs.pattern.mask_fn(positions[:, :, None, None], token_z)
    seen = seen & listed & (token_z < inputs.k.shape[1])
    if keys.ids is not None:
        mine = ids[:, :, None, None]
        seen = seen & (keys.ids[where[0], at].reshape(token_z.shape) == mine) & (mine != 0)
    q = q.reshape(batch, size, tables, group, -1)
    z = softmax.dot("bcugh,bcuzh->bcugz", q, k, k.dtype) * inputs.scale
    z = jnp.where((bad & seen)[..., None, :], jnp.nan, z)
    return q, k, v, jnp.where(seen[..., None, :], z, -jnp.inf), where


def _whole(x, inputs):
    """`[steps, B, C, U, G, ..]` as `[B, T, N, ..]`."""
    x = jnp.moveaxis(x, 0, 1)
    x = x.reshape(x.shape[0], -1, inputs.q.shape[2], *x.shape[5:])
    return x[:, : inputs.q.shape[1]]


def forward(inputs: inputs_lib.Inputs, kernel: str | None = None) -> tuple[jax.Array, jax.Array]:
    """`out [B, T, N, Hv]` in q's dtype and `lse [B, T, N]` float32."""
    del kernel
    dtype = softmax.operand_dtype(inputs.q.dtype)
    keys = _keys(inputs, dtype)

    def step(_, chunk):
        _, _, v, z, _ = _gather(inputs, keys, chunk)
        top = z.max(-1, keepdims=True)
        p = jnp.exp(z - jnp.where(top == -jnp.inf, 0, top))
        total = p.sum(-1, keepdims=True)
        empty = total == 0
        safe = jnp.where(empty, 1, total)
        out = softmax.dot("bcugz,bcuzh->bcugh", p, v, dtype) / safe
        lse = jnp.where(empty, -jnp.inf, top + jnp.log(safe))[..., 0]
        return None, (out.astype(inputs.q.dtype), lse)

    _, (out, lse) = jax.lax.scan(step, None, _chunks(inputs))
    return _whole(out, inputs), _whole(lse, inputs)


def backward(
    inputs: inputs_lib.Inputs, kernel: str | None, lse: jax.Array, dout: jax.Array, delta: jax.Array
) -> inputs_lib.Grads:
    """Gradients in one pass over the queries; dk and dv are added where the keys came from."""
    del kernel
    dtype = softmax.operand_dtype(inputs.q.dtype)
    keys = _keys(inputs, dtype)
    tables, group, _ = inputs.sizes

    def step(sums, chunk):
        *chunk, lse, dout, delta = chunk
        q, k, v, z, where = _gather(inputs, keys, tuple(chunk))
        batch, size = lse.shape[:2]
        lse, delta = (x.reshape(batch, size, tables, group, 1) for x in (lse, delta))
        dout = dout.reshape(batch, size, tables, group, -1)
        hidden = z == -jnp.inf
        p = jnp.where(hidden, 0, jnp.exp(z - jnp.where(hidden, 0, lse)))
        dz = jnp.where(hidden, 0, p * (softmax.dot("bcugh,bcuzh->bcugz", dout, v, dtype) - delta))
        dq = softmax.dot("bcugz,bcuzh->bcugh", dz, k, dtype)
        # A row that a nan spoiled sees its keys through a nan, and no other key at all.
        q, dout = (jnp.where(jnp.isfinite(x), x, 0) for x in (q, dout))
        added = []
        for total, a, b in ((sums[0], dz, q), (sums[1], p, dout)):
            grad = softmax.dot("bcugz,bcugh->bcuzh", a, b, dtype)
            grad = grad.reshape(*grad.shape[:3], -1, inputs.block, grad.shape[-1])
            added.append(total.at[where].add(grad))
        return tuple(added), dq

    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys.k, keys.v))
    (dk, dv), dq = jax.lax.scan(step, sums, _chunks(inputs, lse, dout, delta))

    def back(x, like):
        x = jnp.moveaxis(x, 1, 3)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : like.shape[1]].astype(like.dtype)

    return inputs_lib.Grads(
        (_whole(dq, inputs) * inputs.scale).astype(inputs.q.dtype),
        back(dk * inputs.scale, inputs.k),
        back(dv, inputs.v),
    )
