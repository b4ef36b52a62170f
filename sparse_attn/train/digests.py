"""Digests of arrays: 64 bits that any change of one element changes, and whether all are finite.

Computed where an array lies, whole or sharded, at the cost of reading it once.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


def is_key(x: Any) -> bool:
    """True for an array of typed PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def named(tree: PyTree) -> dict[str, Any]:
    """Leaves by path; typed keys as the numbers they consist of.

    >>> list(named({"params": {"embedding": jnp.zeros(2)}}))
    ['params/embedding']
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): jax.random.key_data(x)
        if is_key(x)
        else x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def of(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`{"digest": 16 hexadecimal digits, "finite": bool}` of each array.

    >>> of({"x": jnp.array([1.0, jnp.inf])})["x"]["finite"]
    False
    """
    digests, finite = jax.device_get(_device_digests([jnp.asarray(x) for x in arrays.values()]))
    return {
        name: {"digest": f"{a:08x}{b:08x}", "finite": bool(ok)}
        for name, (a, b), ok in zip(arrays, np.asarray(digests), finite, strict=True)
    }


@jax.jit
def _device_digests(arrays):
    """uint32 `[n, 2]` digests and bool `[n]` finite flags.

    Two sums modulo 2**32 of the bits, each element times an odd number that depends on its place.
    Odd numbers are invertible, so one changed element always shows; integer sums do not depend on
    their order, so neither do digests on how an array is sharded.
    """

    def digest(x):
        unsigned = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
        bits = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)
        bits = bits.astype(jnp.uint32)
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(
                jnp.uint32, bits.shape, axis
            )
        mixed = (place ^ (place >> 15)) * np.uint32(0x9E3779B1)
        weights = (2 * place + 1, (mixed ^ (mixed >> 13)) | 1)
        return jnp.stack([(bits * w).sum(dtype=jnp.uint32) for w in weights])

    def finite(x):
        return jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.floating) else jnp.array(True)

    return jnp.stack([digest(x) for x in arrays]), jnp.stack([finite(x) for x in arrays])
