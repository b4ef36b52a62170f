"""All-gather attention: every rank collects all keys and values and attends with its queries.

The simplest scheme, and the one without a condition on heads or mask [arXiv:2407.21783, sec.
3.3.2]: right for short rows and few KV heads. Nothing that was collected is kept for the backward
pass: it is collected again, and gradients of keys and values are summed where they belong.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparse_attn.masks import block_mask
from sparse_attn.ops import softmax
from sparse_attn.parallel import local, split


class Plan:
    """All-gather attention under static masks; see `attention.attend`."""

    def __init__(self, masks: Sequence[block_mask.BlockMask], *, order: Sequence[int], ranks: int):
        self._stacked = [split.Split(mask, order=order, ranks=ranks).of_rows() for mask in masks]
        places = split.places(order, masks[0].q_len)
        self._kv_positions = places[None]
        self.arrays = {
            "positions": places.reshape(ranks, 1, -1),
            "lists": [x.lists for x in self._stacked],
        }

    def run(
        self, options: local.Options, queries: local.Queries, keys: local.Keys, arrays: Any
    ) -> tuple[Array, Array]:
        """`out` and `lse` of this rank's queries over the keys of all ranks."""
        arrays = jax.tree.map(lambda x: x[0], arrays)

        def unpacked(floats, others):
            q, k, v, bias = floats
            q_ids, kv_ids, arrays = others
            masks = [s.mask(x) for s, x in zip(self._stacked, arrays["lists"])]
            queries = local.Queries(q, q_ids, arrays["positions"], jnp.asarray(self._kv_positions))
            return masks, options, queries, _gathered(local.Keys(k, v, bias, kv_ids))

        def forward(floats, others):
            return local.forward(*unpacked(floats, others))

        def backward(floats, others, lse, dout, delta):
            grads = local.backward(*unpacked(floats, others), lse, dout, delta)

            def home(g, x, axis=1):
                total = jax.lax.psum_scatter(
                    g.astype(jnp.float32), "seq", scatter_dimension=axis, tiled=True
                )
                return total.astype(x.dtype)

            _, k, v, bias = floats
            dbias = None if bias is None else home(grads.dkey_bias, bias, axis=2)
            return grads.dq, home(grads.dk, k), home(grads.dv, v), dbias

        floats = (queries.q, keys.k, keys.v, keys.bias)
        others = (queries.ids, keys.ids, arrays)
        # Only arguments, out and lse are kept: what was received is received again.
        return softmax.with_backward(forward, backward, floats, others, may_be_empty=True)


def _gathered(keys: local.Keys) -> local.Keys:
    def gather(x, axis=1):
        return None if x is None else jax.lax.all_gather(x, "seq", axis=axis, tiled=True)

    return local.Keys(gather(keys.k), gather(keys.v), gather(keys.bias, 2), gather(keys.ids))
