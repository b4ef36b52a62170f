"""What one device computes inside `jax.shard_map`: a piece of attention, forward and backward."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_attn.masks import block_mask, segments
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import softmax
from sparse_attn.ops.block_sparse import inputs as inputs_lib


@dataclasses.dataclass(frozen=True)
class Options:
    """The static arguments of a call.

    Attributes:
      scale, logits_soft_cap, impl: as in `attend`.
      which: for each group of heads, the index of its mask among the kinds of masks.
      group: gives the group of heads of this device, inside `jax.shard_map`.
    """

    scale: float
    logits_soft_cap: float | None
    impl: str | None
    which: tuple[int, ...]
    group: Callable[[], Any]


class Keys(NamedTuple):
    """Keys and what travels with them: `k`, `v`, `[B, 1 or N, S]` bias, `[B, S]` segment ids."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K Hv"]
    bias: Any = None
    ids: Any = None


class Queries(NamedTuple):
    """Queries, their `[B, T]` segment ids, and `[1, T]` and `[1, S]` places that rules judge."""

    q: Float[Array, "B T N H"]
    ids: Any = None
    positions: Any = None
    kv_positions: Any = None


def forward(
    masks: Sequence[block_mask.BlockMask], options: Options, queries: Queries, keys: Keys
) -> tuple[Array, Array]:
    """`out` and `lse` of the queries over the keys, under the mask of this device's heads."""

    def of(mask, queries, keys):
        inputs = _inputs(mask, options, queries, keys)
        return attend_lib.choose(inputs, options.impl).forward(inputs)

    return _by_heads(of, masks, options, queries, keys)


def backward(
    masks: Sequence[block_mask.BlockMask],
    options: Options,
    queries: Queries,
    keys: Keys,
    lse: Array,
    dout: Array,
    delta: Array,
) -> inputs_lib.Grads:
    """Gradients of a piece, from the `lse` of all keys; see `inputs.Backend.backward`."""

    def of(mask, queries, keys, lse, dout, delta):
        inputs = _inputs(mask, options, queries, keys)
        backend = attend_lib.choose(inputs, options.impl)
        if hasattr(backend, "backward"):
            return backend.backward(inputs, lse, dout, delta)
        return _differentiated(backend, inputs, lse, dout, delta)

    return _by_heads(of, masks, options, queries, keys, lse, dout, delta)


def _inputs(mask, options, queries, keys):
    if queries.ids is not None:
        mask = segments.restrict(mask, queries.ids, keys.ids)
    return inputs_lib.Inputs(
        queries.q, keys.k, keys.v, mask, queries.ids, keys.ids,
        queries.positions, queries.kv_positions, keys.bias, None,
        options.scale, options.logits_soft_cap,
    )  # fmt: skip


def _by_heads(of, masks, options, *args):
    if len(masks) == 1:
        return of(masks[0], *args)
    branches = [lambda *args, mask=mask: of(mask, *args) for mask in masks]
    return jax.lax.switch(jnp.asarray(options.which)[options.group()], branches, *args)


def _differentiated(backend, inputs, lse, dout, delta):
    """The gradients of a backend that JAX differentiates (the reference).

    The piece enters the whole as `exp(lse_piece - lse) * out_piece`.
    """
    floats = (inputs.q, inputs.k, inputs.v, inputs.key_bias)

    def piece(q, k, v, key_bias):
        return backend.forward(inputs._replace(q=q, k=k, v=v, key_bias=key_bias))

    (out, piece_lse), pull = jax.vjp(piece, *floats)
    weight = jnp.exp(piece_lse - jnp.where(lse == -jnp.inf, 0, lse))
    dout = dout.astype(jnp.float32)
    dlse = weight * ((dout * out.astype(jnp.float32)).sum(-1) - delta)
    return inputs_lib.Grads(*pull(((weight[..., None] * dout).astype(out.dtype), dlse)))


def arrays_of(mask: block_mask.BlockMask) -> dict[str, Array]:
    """The arrays of a run-time mask by field name."""
    arrays = {name: getattr(mask, name) for name in block_mask.ARRAYS}
    return {name: x for name, x in arrays.items() if x is not None}


def attend(
    masks: Sequence[block_mask.BlockMask], options: Options, queries: Queries, keys: Keys
) -> tuple[Array, Array]:
    """`out` and `lse` with gradients, where this device has all keys that its queries need."""

    def unpacked(floats, others):
        q, k, v, bias = floats
        (q_ids, kv_ids), arrays = others
        cut = [dataclasses.replace(m, **x) for m, x in zip(masks, arrays)]
        return cut, options, Queries(q, q_ids), Keys(k, v, bias, kv_ids)

    def forward_(floats, others):
        return forward(*unpacked(floats, others))

    def backward_(floats, others, lse, dout, delta):
        return tuple(backward(*unpacked(floats, others), lse, dout, delta))

    # The lists of run-time masks are arguments like any other array.
    arrays = [{} if mask.is_static else arrays_of(mask) for mask in masks]
    floats = (queries.q, keys.k, keys.v, keys.bias)
    others = ((queries.ids, keys.ids), arrays)
    return softmax.with_backward(forward_, backward_, floats, others, may_be_empty=True)


def add_sinks(
    out: Float[Array, "B T N Hv"], lse: Float[Array, "B T N"], sinks: Float[Array, "N"]
) -> tuple[Array, Array]:
    """One more logit per head in the softmax denominators.

    >>> out, lse = add_sinks(jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1, 1)), jnp.zeros(1))
    >>> out[0, 0, 0].tolist(), lse.shape
    ([0.5, 0.5], (1, 1, 1))
    """
    total = jnp.logaddexp(lse, sinks)
    return (out * jnp.exp(lse - total)[..., None]).astype(out.dtype), total
