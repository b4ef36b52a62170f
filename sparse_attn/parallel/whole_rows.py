"""Attention that needs whole rows, as a choice of blocks does, split over rows and heads alone."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from sparse_attn.parallel import mesh as mesh_lib


def fits(*num_heads: int) -> bool:
    """Whether `run` can split these heads over the current mesh, and no row is in parts.

    >>> fits(3)  # No mesh.
    True
    """
    mesh = mesh_lib.current()
    if mesh is None:
        return True
    return mesh.shape["seq"] == 1 and not any(n % mesh.shape["tensor"] for n in num_heads)


def run(
    f: Callable[[PyTree, Any], PyTree],
    arrays: PyTree,
    segment_ids: Int[Array, "B T"] | None = None,
) -> PyTree:
    """`f(arrays, segment_ids)`, on each device of the current mesh for its own rows and heads.

    Rows go over `data` and `fsdp`, heads over `tensor`. What `f` does is local to a row, and to the
    query heads of a KV head; it may call kernels, which XLA cannot split.

    Args:
      f: gives arrays `[B, T, heads, ..]`.
      arrays: `[B, T, heads, ..]` each, of any numbers of tokens and heads.

    Raises:
      NotImplementedError: the mesh splits the tokens of a row.
      ValueError: `tensor` does not divide the heads of an array.

    >>> import jax.numpy as jnp
    >>> with jax.set_mesh(mesh_lib.make("data=1")):
    ...     run(lambda xs, ids: xs["q"] * 2, {"q": jnp.ones((2, 3, 4, 5))}).shape
    (2, 3, 4, 5)
    """
    mesh = mesh_lib.current()
    if mesh is None:
        return f(arrays, segment_ids)
    if mesh.shape["seq"] > 1:
        raise NotImplementedError(
            f"mesh axis seq={mesh.shape['seq']} must be 1: a choice needs whole rows"
        )
    shapes = [x.shape for x in jax.tree.leaves(arrays)]
    for shape in shapes:
        if shape[2] % mesh.shape["tensor"]:
            raise ValueError(
                f"mesh axis tensor={mesh.shape['tensor']} must divide the {shape[2]} (KV) heads"
            )
    batch = mesh_lib.axes_of(mesh, "batch", shapes[0][0])
    heads = P(batch, None, "tensor")
    return jax.shard_map(f, in_specs=(heads, P(batch)), out_specs=heads, check_vma=False)(
        arrays, segment_ids
    )
