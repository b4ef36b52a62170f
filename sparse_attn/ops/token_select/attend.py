"""`attend`: attention of every query to its own blocks. Validates, picks a backend, explains."""

import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_attn.masks import block_mask
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import softmax, tiles
from sparse_attn.ops.token_select import inputs as inputs_lib
from sparse_attn.patterns import base, causal

BACKENDS = ("reference", "xla", "by_block", "triton_gpu")
_PREFERENCE = {
    "cpu": ("by_block", "xla"),
    "gpu": ("triton_gpu", "by_block", "xla"),
    "tpu": ("by_block", "xla"),
}
CAUSAL = causal.Causal()
# Places of a list that are compared with each other; sorting few numbers costs GPUs far more.
_COMPARED = 32


@tiles.one_program
def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    selected: Int[Array, "B T U n"],
    block: int,
    pattern: base.Pattern = CAUSAL,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
    kernel: str | None = None,
) -> Any:
    """Softmax attention of each query to the keys of the blocks that it lists.

    The selected branch of native sparse attention [arXiv:2502.11089, sec. 3.3.2] and mixture of
    block attention [arXiv:2502.13189, sec. 2.2], exactly: every query has a list of its own.
    Differentiable in q, k and v, through both outputs. A query that sees nothing gets output 0,
    lse -inf and zero gradients.

    Args:
      q, k, v: as in `ops.attend`; any lengths and group of heads.
      selected: integer blocks of `block` tokens, any order; -1 = none, blocks listed again or past
        the end do not count. U tables: N / U consecutive query heads share one (U = K is one choice
        per KV head, U = N one per query head).
      block: tokens per block of keys.
      pattern: hides keys inside the blocks; by default those after the query.
      segment_ids: packed documents, as in `ops.attend`.
      scale: factor of the logits; default `H ** -0.5`.
      return_lse: also return the logarithm of the softmax denominators, for `merge_lse`.
      impl: "reference", "xla" (gathers keys), "by_block" (gathers queries; a kernel of
        `ops.block_sparse` runs them), "triton_gpu" (its kernels gather queries), or None for the
        best that takes the arguments.
      kernel: the backend of `ops.attend` under "by_block"; None = the best one here.

    Returns:
      `out [B, T, N, Hv]` in q's dtype, or `(out, lse [B, T, N] float32)`.

    Raises:
      ValueError: an argument is malformed; the message names it and what is allowed.
      NotImplementedError: the named backend cannot do this, or none can; with the reasons.

    >>> import jax
    >>> q = jax.random.normal(jax.random.key(0), (1, 40, 4, 8))
    >>> k = v = jax.random.normal(jax.random.key(1), (1, 40, 2, 8))
    >>> own = jnp.arange(40)[None, :, None, None] // 8 + jnp.zeros((1, 1, 2, 1), jnp.int32)
    >>> first = jnp.zeros_like(own)
    >>> attend(q, k, v, selected=jnp.concatenate([first, own], -1), block=8).shape
    (1, 40, 4, 8)
    """
    inputs = validate(q, k, v, selected, block, pattern, segment_ids, scale)
    backend = _choose(inputs, impl, kernel)
    out, lse = _run(backend, _listed_once(backend, inputs), kernel)
    return (out, lse) if return_lse else out


def backend_of(impl: str | None) -> dict[str, str | None]:
    """`impl` and `kernel` here for a layer whose other attention runs on backend `impl`.

    A layer on the kernels of a GPU takes the best there is for lists; elsewhere they refuse.

    >>> backend_of("pallas_gpu"), backend_of("reference")
    ({'impl': 'by_block', 'kernel': 'pallas_gpu'}, {'impl': 'reference', 'kernel': None})
    >>> with tiles.assume(tiles.Target("gpu", "NVIDIA H100", "9.0")):
    ...     backend_of("pallas_gpu")
    {'impl': None, 'kernel': None}
    """
    if impl in (None, "reference"):
        return {"impl": impl, "kernel": None}
    if impl in ("pallas_gpu", "triton_gpu") and tiles.target().platform == "gpu":
        return {"impl": None, "kernel": None}
    return {"impl": "by_block", "kernel": impl}


def validate(q, k, v, selected, block, pattern, segment_ids, scale) -> inputs_lib.Inputs:
    """The arguments of `attend` in the form that backends take, but for blocks listed again.

    Raises:
      ValueError: as in `attend`.
    """
    base.check_int("block", block)
    if not isinstance(pattern, base.Pattern):
        raise ValueError(f"pattern={pattern!r} must be a Pattern")
    # The mask is not used: one block, and everything else is checked as there.
    lengths = {"q_len": q.shape[1], "kv_len": k.shape[1]}
    mask = block_mask.from_block_states(
        np.ones((1, 1), np.int8), rule=pattern, **lengths,
        block_q=q.shape[1], block_kv=k.shape[1],
    )  # fmt: skip
    checked = attend_lib.validate(q, k, v, mask, None, None, None, scale, None, None)
    heads, kv_heads = q.shape[2], k.shape[2]
    if (
        selected.ndim != 4
        or selected.shape[:2] != q.shape[:2]
        or not jnp.issubdtype(selected.dtype, jnp.integer)
        or 0 in selected.shape
        or selected.shape[2] % kv_heads
        or heads % selected.shape[2]
    ):
        raise ValueError(
            f"selected of shape {selected.shape} and dtype {selected.dtype} must be integers "
            f"[{q.shape[0]}, {q.shape[1]}, U, n], where k's {kv_heads} heads divide U and U "
            f"divides q's {heads}"
        )
    q_ids = kv_ids = None
    if segment_ids is not None:
        q_ids, kv_ids = attend_lib._pair(
            "segment_ids", segment_ids, q.shape[0], q.shape[1], k.shape[1], ((q.shape[0],),)
        )
        # Whatever padding holds, 0 * nan is nan.
        q = jnp.where((q_ids != 0)[..., None, None], q, 0)
        k, v = (jnp.where((kv_ids != 0)[..., None, None], x, 0) for x in (k, v))
    return inputs_lib.Inputs(
        q, k, v, selected.astype(jnp.int32), q_ids, kv_ids, pattern, block, checked.scale
    )


def _listed_once(backend, inputs):
    """Inputs whose lists have no repetitions and missing blocks, by the backend's kernel if any."""
    once = getattr(backend, "once", _once)
    if inputs.selected.shape[-1] > _COMPARED:
        once = _once
    blocks = -(-inputs.k.shape[1] // inputs.block)
    return inputs._replace(selected=once(inputs.selected, blocks))


def _once(selected, blocks):
    """Lists without repetitions and missing blocks, -1 instead.

    Of equals the first stays, in its place; lists of more than `_COMPARED` come back descending.
    """
    selected = jnp.where((selected >= 0) & (selected < blocks), selected, -1)
    if selected.shape[-1] > _COMPARED:
        ordered = jnp.sort(selected, axis=-1, descending=True)
        return jnp.where(ordered == _moved(ordered, 1), -1, ordered)
    again = jnp.zeros(selected.shape, bool)
    # Place by place, not all pairs at once: XLA makes one pass of it and no array of pairs.
    for distance in range(1, selected.shape[-1]):
        again = again | (selected == _moved(selected, distance))
    return jnp.where(again, -1, selected)


def _moved(selected, distance):
    """Lists `distance` places later, -1 before."""
    widths = ((0, 0),) * 3 + ((distance, 0),)
    return jnp.pad(selected[..., :-distance], widths, constant_values=-1)


def _choose(inputs, impl, kernel):
    if impl is not None and impl not in BACKENDS:
        raise ValueError(f"impl={impl!r} must be None or one of {', '.join(BACKENDS)}")
    refusals = []
    for name in _PREFERENCE[tiles.target().platform] if impl is None else (impl,):
        try:
            module = importlib.import_module(f"sparse_attn.ops.token_select.{name}")
            module.check(inputs, kernel)
        except (NotImplementedError, ImportError) as error:  # Triton need not be installed.
            refusals.append(f"impl={name!r}: {error}")
            continue
        return module
    raise NotImplementedError("; ".join(refusals))


def _run(backend, inputs, kernel):
    """`backend`'s out and lse with its gradients attached."""
    if not hasattr(backend, "backward"):
        return backend.forward(inputs, kernel)
    static = (inputs.pattern, inputs.block, inputs.scale)

    def rebuild(floats, integers):
        ids, plan = integers
        return inputs_lib.Inputs(*floats, *ids, *static, plan)

    def forward(floats, integers):
        return backend.forward(rebuild(floats, integers), kernel)

    def backward(floats, integers, lse, dout, delta):
        return backend.backward(rebuild(floats, integers), kernel, lse, dout, delta)

    ids = (inputs.selected, inputs.q_segment_ids, inputs.kv_segment_ids)
    plan = backend.plan(inputs, kernel) if hasattr(backend, "plan") else None
    floats = (inputs.q, inputs.k, inputs.v)
    return softmax.with_backward(forward, backward, floats, (ids, plan), may_be_empty=True)
