"""How much of dense attention a block mask keeps: mass per query, density, agreement of heads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparse_attn.masks import block_mask, lower
from sparse_attn.ops import scoring, tiles
from sparse_attn.patterns import base


@functools.partial(jax.jit, static_argnames=("dense", "num_queries"))
def kept_mass(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    mask: block_mask.BlockMask,
    *,
    dense: base.Pattern,
    num_queries: int = 64,
) -> Float[Array, "B n N"]:
    """Part of the dense attention of sampled queries on the keys that `mask` shows them.

    `exp(lse(mask) - lse(dense))`, in [0, 1]; computed for `num_queries` queries, evenly spaced and
    the last one among them, against all keys: `B * N * num_queries * S` numbers. A query that sees
    nothing densely keeps all of it, 1.

    Args:
      mask: run-time or static, from rules (not from an array); documents are not looked at.
      dense: what is visible where nothing is left out.

    >>> from sparse_attn.patterns import causal, local
    >>> x = jnp.zeros((1, 8, 1, 4))
    >>> window = lower.lower(local.Local(window=2), q_len=8, block_q=2, block_kv=2)
    >>> kept_mass(x, x, window, dense=causal.Causal(), num_queries=2).ravel().tolist()
    [0.5, 0.25]
    """
    q_len, kv_len, heads = q.shape[1], k.shape[1], q.shape[2]
    at = np.unique(np.arange(1, num_queries + 1) * q_len // num_queries - 1)
    at = at[at >= 0]
    q_pos, kv_pos = at.astype(np.int32)[:, None], np.arange(kv_len, dtype=np.int32)[None]
    visible = np.broadcast_to(dense.mask_fn(q_pos, kv_pos), (len(at), kv_len))
    shares = scoring.mass(scoring.logits(q[:, at], k), visible[None, None])
    shown = []
    for table in range(mask.num_tables):
        listed = _listed(mask, table, at // mask.block_q)[:, :, kv_pos[0] // mask.block_kv]
        shown.append(listed & mask.rule(table).mask_fn(q_pos, kv_pos))
    shown = jnp.stack(shown, 1)[:, mask.tables_of_heads(heads)]
    kept = jnp.where(shown, shares, 0).sum(-1)
    return jnp.moveaxis(jnp.where(visible.any(1), kept, 1), 1, 2)


@tiles.one_program
def density(mask: block_mask.BlockMask, dense: base.Pattern) -> Float[Array, "M U"]:
    """Active blocks of each table / active blocks of the dense pattern.

    >>> from sparse_attn.patterns import causal, local
    >>> window = lower.lower(local.Local(window=1), q_len=8, block_q=2, block_kv=2)
    >>> density(window, causal.Causal()).tolist()  # 4 of 10
    [[0.4...]]
    """
    whole = lower.lower(
        dense, q_len=mask.q_len, kv_len=mask.kv_len, block_q=mask.block_q, block_kv=mask.block_kv
    )
    return jnp.asarray(mask.kv_counts).sum(-1) / int(whole.kv_counts.sum())


@tiles.one_program
def overlap(
    mask: block_mask.BlockMask, other: block_mask.BlockMask | None = None
) -> Float[Array, "M U V"]:
    """Blocks that two tables both list / blocks that either lists (1 where both list none).

    Args:
      other: of another layer, say, on the same blocks and batch; None = the tables of `mask` among
        each other.

    Raises:
      ValueError: the two have other blocks or batches.

    >>> from sparse_attn.patterns import causal, local
    >>> masks = (causal.Causal(), local.Local(window=1))
    >>> both = lower.lower(masks, q_len=6, block_q=2, block_kv=2)
    >>> overlap(both)[0].tolist()  # 3 of 6 blocks
    [[1.0, 0.5], [0.5, 1.0]]
    >>> overlap(both, lower.lower(masks[1], q_len=6, block_q=2, block_kv=2))[0].tolist()
    [[0.5], [1.0]]
    """
    other = mask if other is None else other
    shapes = [(m.batch, m.num_rows, m.num_cols) for m in (mask, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"other has (batch, rows, columns)={shapes[1]}, must have {shapes[0]}")
    one, two = (_flat(m) for m in (mask, other))
    both = jnp.einsum("mux,mvx->muv", one, two, precision="highest")
    either = one.sum(-1)[:, :, None] + two.sum(-1)[:, None] - both
    return jnp.where(either > 0, both / jnp.maximum(either, 1), 1)


def _flat(mask: block_mask.BlockMask) -> Float[Array, "M U x"]:
    """1 for each block that a table lists, all rows behind each other."""
    rows = np.arange(mask.num_rows)
    listed = jnp.stack([_listed(mask, u, rows) for u in range(mask.num_tables)], 1)
    return listed.reshape(*listed.shape[:2], -1).astype(jnp.float32)


def _listed(mask: block_mask.BlockMask, table: int, rows: Any) -> Bool[Array, "M n nk"]:
    """Whether each block of some rows of blocks is in their lists."""

    def one(starts, counts, indices):
        place = jnp.arange(max(mask.max_kv, 1))
        at = jnp.minimum(starts[rows][:, None] + place, indices.shape[0] - 1)
        listed = jnp.where(place < counts[rows][:, None], indices[at], mask.num_cols)
        grid = jnp.zeros((len(rows), mask.num_cols + 1), bool)
        return grid.at[jnp.arange(len(rows))[:, None], listed].set(True)[:, :-1]

    arrays = (mask.kv_starts, mask.kv_counts, mask.kv_indices)
    return jax.vmap(one)(*(jnp.asarray(x[:, table]) for x in arrays))
