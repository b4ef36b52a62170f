"""What hand-written attention shares: products, a softmax under a mask, gradients from the lse."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from sparse_attn.ops import tiles


def dot(spec: str, a: Array, b: Array, dtype: Any) -> Array:
    """`einsum` with float32 sums; `dtype` is what goes into it.

    >>> dot("ij,j->i", jnp.ones((2, 3)), jnp.ones(3), jnp.bfloat16)
    Array([3., 3.], dtype=float32)
    """
    precision = "highest" if dtype == jnp.float32 else None
    return jnp.einsum(
        spec, a.astype(dtype), b.astype(dtype), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def operand_dtype(dtype: Any) -> Any:
    """What the operands of products should be converted to, once, for arrays of `dtype`.

    CPUs convert small floats one by one, and cannot take products of all shapes of them.

    >>> with tiles.assume(tiles.Target("gpu", "a GPU")):
    ...     operand_dtype(jnp.bfloat16) == jnp.bfloat16
    True
    """
    return jnp.float32 if tiles.target().platform == "cpu" else dtype


@tiles.one_program
def masked(
    logits: Float[Array, "*B n"],
    seen: Bool[Array, "*#B #n"],
    sinks: Float[Array, "*#B"] | None = None,
) -> tuple[Float[Array, "*B n"], Float[Array, "*B"]]:
    """Softmax over what is seen of the last axis, and its log-sum-exp; differentiable by JAX.

    Where nothing is seen, 0 and -inf. What is hidden may hold anything and gets no gradient.
    `sinks` are one more logit of each row, in the sum alone.

    >>> weights, lse = masked(jnp.zeros((2, 2)), jnp.array([[True, True], [False, False]]))
    >>> weights.tolist(), lse[1].item()
    ([[0.5, 0.5], [0.0, 0.0]], -inf)
    """
    top = jnp.max(logits, -1, where=seen, initial=-jnp.inf, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, sinks[..., None])
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits - top, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks[..., None] - top)
    # A row without any weight has total 0; the inner where keeps its gradient at exactly 0.
    empty = total == 0
    safe = jnp.where(empty, 1, total)
    # Where a visible key spoiled the row, 0 / nan would spoil the gradient of hidden ones.
    weights = jnp.where(seen, weights / safe, 0)
    return weights, jnp.where(empty, -jnp.inf, top + jnp.log(safe))[..., 0]


def with_backward(
    forward: Callable[[PyTree, PyTree], tuple[Array, Array]],
    backward: Callable[[PyTree, PyTree, Array, Array, Array], tuple],
    floats: tuple,
    integers: PyTree,
    *,
    may_be_empty: bool,
) -> tuple[Array, Array]:
    """`forward(floats, integers)`, out and lse, whose gradient is `backward`.

    Args:
      backward: of `(floats, integers, lse, dout, delta)`; gradients of the floats, None for None.
        `delta` is `sum(dout * out) - dlse`; it and `dout` are 0 where lse is -inf.
      may_be_empty: whether some row may see nothing. It gives no gradient, whatever its cotangent
        holds: a backend would compute `exp(logits - lse)` = inf for it.
    """

    @jax.custom_vjp
    def attention(floats, integers):
        return forward(floats, integers)

    def fwd(floats, integers):
        out, lse = attention(floats, integers)
        return (out, lse), (floats, integers, out, lse)

    def bwd(residuals, cotangents):
        floats, integers, out, lse = residuals
        dout, dlse = cotangents
        delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - dlse
        if may_be_empty:
            empty = lse == -jnp.inf
            delta = jnp.where(empty, 0, delta)
            dout = jnp.where(empty[..., None], 0, dout)
        grads = backward(floats, integers, lse, dout.astype(out.dtype), delta)
        none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), integers)
        return tuple(grads), none

    attention.defvjp(fwd, bwd)
    return attention(floats, integers)
