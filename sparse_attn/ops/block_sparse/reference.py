"""The definition of the op: dense float32 attention under the materialised mask."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.masks import block_mask
from sparse_attn.ops import softmax
from sparse_attn.ops.block_sparse import inputs as inputs_lib

# Gradients are JAX's own, through this file: independent of the hand-written ones in vjp.py.


def check(inputs: inputs_lib.Inputs) -> None:
    """Takes everything; needs O(B * N * T * S) memory."""


def visible(inputs: inputs_lib.Inputs) -> jax.Array:
    """The element mask, bool `[M, N, T, S]` with M in (1, B).

    Only blocks that the mask lists can be visible; in FULL ones everything is.
    """
    mask = inputs.mask
    block_q, block_kv, nq, nk = mask.block_q, mask.block_kv, mask.num_rows, mask.num_cols
    tables = mask.tables_of_heads(inputs.q.shape[2])
    states, bits = _dense_tables(mask)  # [M, U, nq, nk], [M, U, nq, nk, block_q, block_kv]
    q_pos, kv_pos = inputs.q_positions, inputs.kv_positions
    q_pos = jnp.arange(mask.q_len, dtype=jnp.int32)[None] if q_pos is None else q_pos
    kv_pos = jnp.arange(mask.kv_len, dtype=jnp.int32)[None] if kv_pos is None else kv_pos
    per_table = []
    for u in range(mask.num_tables):
        state = jnp.repeat(jnp.repeat(states[:, u], block_q, 1), block_kv, 2)
        if mask.rule(u) is None:
            element = bits[:, u].swapaxes(2, 3).reshape(-1, nq * block_q, nk * block_kv) != 0
        else:
            element = mask.rule(u).mask_fn(q_pos[:, :, None], kv_pos[:, None, :])
            shape = (element.shape[0], mask.q_len, mask.kv_len)
            element = jnp.broadcast_to(element, shape)
        state, element = (x[:, : mask.q_len, : mask.kv_len] for x in (state, element))
        if inputs.q_segment_ids is not None:
            q_ids, kv_ids = inputs.q_segment_ids[:, :, None], inputs.kv_segment_ids[:, None, :]
            element = element & (q_ids == kv_ids) & (q_ids != 0)
        per_table.append((state == 2) | ((state == 1) & element))
    stacked = jnp.stack(jnp.broadcast_arrays(*per_table), 1)
    return stacked[:, tables]


def _dense_tables(mask):
    """States `[M, U, nq, nk]` and bits by block, scattered from the row lists."""
    if mask.is_static:
        return _static_tables(mask)
    nq, nk = mask.num_rows, mask.num_cols

    def one(starts, counts, partial_counts, indices, slots, bits):
        entry = jnp.arange(indices.shape[0])
        row = jnp.searchsorted(starts, entry, side="right") - 1
        offset = entry - starts[row]
        listed = offset < counts[row]
        state = jnp.where(offset < partial_counts[row], 1, 2)
        at = (jnp.where(listed, row, nq), jnp.where(listed, indices, 0))
        states = jnp.zeros((nq + 1, nk), jnp.int32).at[at].set(jnp.where(listed, state, 0))
        if bits is None:
            return states[:nq], None
        by_slot = jnp.full((nq + 1, nk), -1).at[at].set(jnp.where(listed, slots, -1))[:nq]
        return states[:nq], jnp.where(by_slot[..., None, None] >= 0, bits[by_slot], 0)

    arrays = [
        None if x is None else jnp.asarray(x)
        for x in (
            mask.kv_starts, mask.kv_counts, mask.kv_partial_counts, mask.kv_indices,
            mask.kv_bits, mask.bits,
        )
    ]  # fmt: skip
    return jax.vmap(jax.vmap(one))(*arrays)


def _static_tables(mask):
    """The same in NumPy: constants take XLA a fraction of the time to compile."""
    shape = (mask.batch, mask.num_tables, mask.num_rows, mask.num_cols)
    states, bits = np.zeros(shape, np.int8), None
    if mask.bits is not None:
        bits = np.zeros((*shape, mask.block_q, mask.block_kv), mask.bits.dtype)
    for b, u in np.ndindex(shape[:2]):
        states[b, u] = block_mask.block_states(mask, batch=b, table=u)
        if bits is not None:  # Only PARTIAL blocks have some.
            partial = block_mask.entries(mask, block_mask.BlockState.PARTIAL, batch=b, table=u)
            for rows, cols, places in partial:
                bits[b, u, rows, cols] = mask.bits[b, u, mask.kv_bits[b, u, places]]
    return jnp.asarray(states), None if bits is None else jnp.asarray(bits)


def forward(inputs: inputs_lib.Inputs) -> tuple[jax.Array, jax.Array]:
    """`out [B, T, N, Hv]` in q's dtype and `lse [B, T, N]` float32; differentiable by JAX."""
    q, k, v = (x.astype(jnp.float32) for x in inputs[:3])
    batch, q_len, num_heads, _ = q.shape
    group = inputs_lib.group_size(inputs)
    mask = jnp.broadcast_to(visible(inputs), (batch, num_heads, q_len, k.shape[1]))
    # Non-finite keys and values are cut out before any product, since 0 * nan is nan, and put
    # back as a nan logit: a query that sees one is nan, and no other query or gradient is.
    bad = ~(jnp.isfinite(k).all(-1) & jnp.isfinite(v).all(-1))
    k, v = (jnp.where(bad[..., None], 0, x) for x in (k, v))
    some = mask.any(-1)
    q = jnp.where(some.swapaxes(1, 2)[..., None], q, 0)
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    bad = jnp.repeat(bad, group, axis=2).swapaxes(1, 2)[:, :, None, :]
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k, precision="highest") * inputs.scale
    if inputs.logits_soft_cap is not None:
        logits = inputs.logits_soft_cap * jnp.tanh(logits / inputs.logits_soft_cap)
    if inputs.key_bias is not None:
        bias = inputs.key_bias[:, :, None, :]
        mask = mask & (bias != -jnp.inf)
        logits = logits + jnp.where(bias == -jnp.inf, 0, bias)
    logits = jnp.where(mask & bad, jnp.nan, logits)
    sinks = None if inputs.sink_logits is None else inputs.sink_logits[None, :, None]
    weights, lse = softmax.masked(logits, mask, sinks)
    out = jnp.einsum("BNTS,BSNH->BTNH", weights, v, precision="highest")
    return out.astype(inputs.q.dtype), lse.swapaxes(1, 2)
