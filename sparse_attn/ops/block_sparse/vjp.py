"""The custom VJP that all hand-written backends share."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.masks import block_mask
from sparse_attn.ops import softmax
from sparse_attn.ops.block_sparse import inputs as inputs_lib


def run(backend: types.ModuleType, inputs: inputs_lib.Inputs) -> tuple[jax.Array, jax.Array]:
    """`backend`'s out and lse with its gradients attached; a backend without `backward` (the
    reference) is differentiated by JAX.

    Sinks need no kernel: a sink is one more key whose value is the zero vector, so its gradient
    is `-exp(sink - lse) * delta`, summed over rows.
    """
    if not hasattr(backend, "backward"):
        return backend.forward(inputs)
    static_mask, mask_arrays = _split(inputs.mask)

    def rebuild(floats, integers):
        *ids, arrays = integers
        q, k, v, key_bias, sink_logits = floats
        return inputs_lib.Inputs(
            q, k, v, dataclasses.replace(static_mask, **arrays), *ids,
            key_bias, sink_logits, inputs.scale, inputs.logits_soft_cap,
        )  # fmt: skip

    def forward(floats, integers):
        return backend.forward(rebuild(floats, integers))

    def backward(floats, integers, lse, dout, delta):
        rebuilt = rebuild(floats, integers)
        grads = backend.backward(rebuilt, lse, dout, delta)
        dsinks = None
        if rebuilt.sink_logits is not None:
            # lse >= sink, so this exponential is at most 1.
            dsinks = -(jnp.exp(rebuilt.sink_logits - lse) * delta).sum((0, 1))
        return grads.dq, grads.dk, grads.dv, grads.dkey_bias, dsinks

    q, k, v = _without_padding(inputs)
    floats = (q, k, v, inputs.key_bias, inputs.sink_logits)
    ids = (inputs.q_segment_ids, inputs.kv_segment_ids, inputs.q_positions, inputs.kv_positions)
    return softmax.with_backward(
        forward, backward, floats, (*ids, mask_arrays), may_be_empty=_may_have_empty_rows(inputs)
    )


def _split(mask):
    """A mask whose traced arrays are taken out (they pass through the VJP), and those arrays."""
    arrays = {name: getattr(mask, name) for name in block_mask.ARRAYS}
    traced = {n: x for n, x in arrays.items() if x is not None and not isinstance(x, np.ndarray)}
    return dataclasses.replace(mask, **dict.fromkeys(traced)), traced


def _without_padding(inputs):
    """q, k, v with padding tokens (segment 0) zeroed: whatever they hold, 0 * nan is nan."""
    if inputs.q_segment_ids is None:
        return inputs.q, inputs.k, inputs.v
    q_real = (inputs.q_segment_ids != 0)[..., None, None]
    kv_real = (inputs.kv_segment_ids != 0)[..., None, None]
    return (
        jnp.where(q_real, inputs.q, 0),
        jnp.where(kv_real, inputs.k, 0),
        jnp.where(kv_real, inputs.v, 0),
    )


def _may_have_empty_rows(inputs) -> bool:
    mask = inputs.mask
    return inputs.sink_logits is None and (
        not mask.is_static
        or inputs.q_segment_ids is not None
        or inputs.q_positions is not None
        or inputs.key_bias is not None
        or any(rule is None or rule.may_be_empty for rule in mask.rules)
        # Fewer keys than queries, say: a rule that is never empty on a square can be here.
        or mask.q_len != mask.kv_len
        or bool((mask.kv_counts == 0).any())
    )
