"""The definition of the op: dense float32 attention under the materialised choice."""

import jax
import jax.numpy as jnp

from sparse_attn.ops import softmax
from sparse_attn.ops.token_select import inputs as inputs_lib

# Gradients are JAX's own, through this file: independent of the hand-written ones.


def check(inputs: inputs_lib.Inputs, kernel: str | None) -> None:
    """Takes everything; needs O(B * N * T * S) memory."""
    if kernel is not None:
        raise NotImplementedError(f"kernel={kernel!r} must be None: it is dense")


def visible(inputs: inputs_lib.Inputs) -> jax.Array:
    """The element mask, bool `[B, U, T, S]`."""
    q_len, kv_len = inputs.q.shape[1], inputs.k.shape[1]
    q_pos, kv_pos = (jnp.arange(n, dtype=jnp.int32) for n in (q_len, kv_len))
    chosen = (inputs.selected[..., None] == kv_pos // inputs.block).any(3)
    seen = chosen.swapaxes(1, 2) & inputs.pattern.mask_fn(q_pos[:, None], kv_pos[None])
    if inputs.q_segment_ids is not None:
        q_ids, kv_ids = inputs.q_segment_ids[:, None, :, None], inputs.kv_segment_ids[:, None, None]
        seen = seen & (q_ids == kv_ids) & (q_ids != 0)
    return seen


def forward(inputs: inputs_lib.Inputs, kernel: str | None = None) -> tuple[jax.Array, jax.Array]:
    """`out [B, T, N, Hv]` in q's dtype and `lse [B, T, N]` float32."""
    del kernel
    _, group, shared = inputs.sizes
    mask = jnp.repeat(visible(inputs), group, axis=1)
    k, v, bad = (jnp.repeat(x, shared * group, axis=2) for x in inputs_lib.finite(inputs))
    q, k, v = (x.astype(jnp.float32) for x in (inputs.q, k, v))
    q = jnp.where(mask.any(-1).swapaxes(1, 2)[..., None], q, 0)
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k, precision="highest") * inputs.scale
    logits = jnp.where(mask & bad.swapaxes(1, 2)[:, :, None], jnp.nan, logits)
    weights, lse = softmax.masked(logits, mask)
    out = jnp.einsum("BNTS,BSNH->BTNH", weights, v, precision="highest")
    return out.astype(inputs.q.dtype), lse.swapaxes(1, 2)
