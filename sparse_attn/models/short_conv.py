"""A short causal convolution over tokens, for queries, keys and values before attention."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int


def short_conv(
    x_BTNH: Float[jax.Array, "B T N H"],
    taps_WNH: Float[Any, "W N H"],
    segment_ids: Int[jax.Array, "B T"] | None = None,
) -> Float[jax.Array, "B T N H"]:
    """`sum_i taps[i] * x[t - i]`, for every head and dimension; documents do not mix.

    With keys that hold the token before, one layer of attention finds what followed a token
    earlier, which takes two layers without [arXiv:2212.14052, sec. 3.2; arXiv:2312.04927, app. E].

    >>> x = jnp.arange(1.0, 5).reshape(1, 4, 1, 1)
    >>> taps = jnp.array([1.0, 10.0]).reshape(2, 1, 1)
    >>> short_conv(x, taps, jnp.array([[1, 1, 2, 2]])).ravel().tolist()
    [1.0, 12.0, 3.0, 34.0]
    """
    length, total = x_BTNH.shape[1], 0.0
    for back in range(taps_WNH.shape[0]):
        moved = jnp.pad(x_BTNH, ((0, 0), (back, 0), (0, 0), (0, 0)))[:, :length]
        if segment_ids is not None and back:
            before = jnp.pad(segment_ids, ((0, 0), (back, 0)))[:, :length]
            moved = jnp.where((before == segment_ids)[:, :, None, None], moved, 0)
        total = total + moved.astype(jnp.float32) * taps_WNH[back]
    return total.astype(x_BTNH.dtype)


def convolved(
    module: nn.Module,
    x_BTNH: Float[jax.Array, "B T N H"],
    name: str,
    segment_ids: Int[jax.Array, "B T"] | None = None,
) -> Float[jax.Array, "B T N H"]:
    """`short_conv` with the module's parameter `<name>_taps`, as wide as its `short_conv`; or `x`.

    >>> class Layer(nn.Module):
    ...     short_conv: int | None = 3
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return convolved(self, x, "key")
    >>> variables = Layer().init(jax.random.key(0), jnp.ones((1, 5, 2, 4)))
    >>> variables["params"]["key_taps"].shape
    (3, 2, 4)
    """
    if module.short_conv is None:
        return x_BTNH
    taps_WNH = module.param(f"{name}_taps", init, (module.short_conv, *x_BTNH.shape[2:]))
    return short_conv(x_BTNH, taps_WNH, segment_ids)


def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Taps `[W, N, H]` at the start: the token itself, and a little of all, unlike per dimension.

    >>> init(jax.random.key(0), (3, 1, 4)).shape
    (3, 1, 4)
    """
    return 0.5 * jax.random.normal(key, shape, dtype) + jnp.zeros(shape, dtype).at[0].set(1)
