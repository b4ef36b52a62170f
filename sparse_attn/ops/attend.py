"""`attend`: the one entry to softmax attention. Validates, lowers, picks a backend, explains."""

import functools
import importlib.util
import logging
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_attn.masks import block_mask, lower, segments
from sparse_attn.ops import tiles
from sparse_attn.ops.block_sparse import inputs as inputs_lib
from sparse_attn.ops.block_sparse import vjp
from sparse_attn.patterns import base, per_head

_LOG = logging.getLogger(__name__)
_FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)

# Order of preference by platform. "reference" is never chosen by itself: it is the dense oracle.
_PREFERENCE = {
    "cpu": ("xla",),
    "gpu": ("pallas_gpu", "triton_gpu", "xla"),
    "tpu": ("pallas_tpu", "xla"),
}
_BACKENDS = ("reference", "xla", "pallas_tpu", "pallas_gpu", "triton_gpu")

Mask = base.Pattern | per_head.PerHead | block_mask.BlockMask | Sequence[base.Pattern]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    mask: Mask,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    positions: Any = None,
    key_bias: Float[Array, "B S"] | Float[Array, "B N S"] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[Array, "N"] | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Any:
    """Softmax attention over what `mask` allows, at the cost of its active blocks.

    `softmax(soft_cap(q @ k.T * scale) + key_bias) @ v` over the visible keys
    [arXiv:1706.03762, eq. 1], with online softmax over blocks [arXiv:2205.14135, alg. 1].
    Differentiable in q, k, v, key_bias and sink_logits, through both outputs. A query that sees
    nothing gets output 0, lse -inf and zero gradients.

    Args:
      q, k, v: bfloat16, float16 or float32 of one dtype; any lengths. Query heads
        `gG .. gG+G-1` share KV head g, with G = N // K.
      mask: a `Pattern`, a `BlockMask`, or a `PerHead` / tuple with one pattern per query head.
      segment_ids: packed documents, int32: tokens see only their own id, and id 0 is padding
        that sees nothing and is seen by nothing. One array when T == S, or (q ids, kv ids).
      positions: absolute positions that the pattern judges, int32 `[T]` or `[B, T]`; one array
        when T == S, or (q positions, kv positions). Default: 0 .. T-1 and 0 .. S-1. Takes a
        `Pattern`, not a `BlockMask`.
      key_bias: added to every logit of a key, `[B, S]` or `[B, N, S]`; -inf hides the key.
      scale: factor of the logits; default `H ** -0.5`.
      logits_soft_cap: `cap * tanh(logits / cap)` on scaled logits, before the bias
        [arXiv:2408.00118, sec. 2].
      sink_logits: one learned logit per head in the softmax denominator
        [arXiv:2508.10925, sec. 2.2]. Then lse includes it, and is the sink of an empty row.
      return_lse: also return the natural logarithm of the softmax denominators, for `merge_lse`.
      impl: a backend name, or None for the first that takes the arguments on this device.

    Returns:
      `out [B, T, N, Hv]` in q's dtype, or `(out, lse [B, T, N] float32)`.

    Raises:
      ValueError: an argument is malformed; the message names it and what is allowed.
      NotImplementedError: the named backend cannot do this, or none can; with the reasons.

    >>> from sparse_attn.patterns import local
    >>> q = jax.random.normal(jax.random.key(0), (1, 300, 4, 16))
    >>> k = v = jax.random.normal(jax.random.key(1), (1, 300, 2, 16))  # two KV heads
    >>> attend(q, k, v, mask=local.Local(window=32)).shape
    (1, 300, 4, 16)
    """
    static = isinstance(mask, block_mask.BlockMask) and mask.is_static
    out, lse = (_attend if static else _one_program)(
        q, k, v, segment_ids, positions, key_bias, sink_logits, mask=mask,
        scale=None if scale is None else float(scale),
        soft_cap=None if logits_soft_cap is None else float(logits_soft_cap), impl=impl,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _attend(q, k, v, segment_ids, positions, key_bias, sink_logits, *, mask, scale, soft_cap, impl):
    inputs = validate(q, k, v, mask, segment_ids, positions, key_bias, scale, soft_cap, sink_logits)
    return vjp.run(choose(inputs, impl), inputs)


_one_program = tiles.one_program(_attend)  # Not for lists that are constants: they are no key.


@tiles.one_program
def merge_lse(
    pieces: Sequence[tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]],
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Merges attention over disjoint sets of keys into attention over their union, exactly.

    `out = sum_i exp(lse_i - lse) out_i` with `lse = log sum_i exp(lse_i)`
    [arXiv:2501.01005, sec. 2.2]. Pieces are `attend(..., return_lse=True)` results for the same
    queries; only one of them may carry sink logits. Rows empty in every piece stay 0, -inf.

    Raises:
      ValueError: no piece, or shapes differ.

    >>> from sparse_attn.patterns import causal, local
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 32, 2, 8))
    >>> near, far = local.Local(window=8), causal.Causal() & ~local.Local(window=8)
    >>> parts = [attend(q, k, v, mask=m, return_lse=True) for m in (near, far)]
    >>> whole = attend(q, k, v, mask=causal.Causal())
    >>> bool(jnp.allclose(merge_lse(parts)[0], whole, atol=1e-6))
    True
    """
    shapes = {(out.shape, lse.shape) for out, lse in pieces}
    if len(shapes) != 1:
        raise ValueError(f"pieces must be one or more of equal shapes, got {sorted(shapes)}")
    lses = jnp.stack([lse for _, lse in pieces])
    top = jax.lax.stop_gradient(lses.max(0))
    top = jnp.where(top == -jnp.inf, 0, top)
    # exp(-inf) = 0 with gradient 0 as long as the argument itself is never nan.
    weights = jnp.exp(lses - top)
    total = weights.sum(0)
    empty = total == 0
    safe = jnp.where(empty, 1, total)
    outs = jnp.stack([out.astype(jnp.float32) for out, _ in pieces])
    out = ((weights / safe)[..., None] * outs).sum(0)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(safe))
    return out.astype(pieces[0][0].dtype), lse


def backends() -> tuple[str, ...]:
    """Names of the backends in this checkout, the reference first.

    >>> backends()[:2]
    ('reference', 'xla')
    """
    return tuple(name for name in _BACKENDS if _spec(name) is not None)


def _spec(name: str):
    return importlib.util.find_spec(f"sparse_attn.ops.block_sparse.{name}")


def _module(name: str) -> types.ModuleType:
    if name not in backends():
        raise ValueError(f"impl={name!r} must be None or one of {', '.join(backends())}")
    try:
        return importlib.import_module(f"sparse_attn.ops.block_sparse.{name}")
    except ImportError as error:  # An optional dependency of this backend is not installed.
        raise NotImplementedError(f"impl={name!r} cannot be imported: {error}") from error


def choose(inputs: inputs_lib.Inputs, impl: str | None) -> types.ModuleType:
    """The backend that `attend` runs: the named one, or the first that takes the inputs.

    Raises:
      ValueError: there is no backend of that name.
      NotImplementedError: as in `attend`.
    """
    if impl is not None:
        module = _module(impl)
        try:
            module.check(inputs)
        except NotImplementedError as error:
            raise NotImplementedError(f"impl={impl!r}: {error}") from None
        return module
    refusals = []
    for name in _PREFERENCE[tiles.target().platform]:
        if name not in backends():
            continue
        try:
            module = _module(name)
            module.check(inputs)
        except NotImplementedError as error:
            refusals.append(f"{name}: {error}")
            continue
        _log_choice(name, tuple(refusals))
        return module
    raise NotImplementedError("no backend takes these arguments: " + "; ".join(refusals))


@functools.cache  # Once per choice and set of reasons, not once per traced layer.
def _log_choice(name: str, refusals: tuple[str, ...]) -> None:
    reasons = f" (not {'; not '.join(refusals)})" if refusals else ""
    _LOG.info("attend uses backend %s%s", name, reasons)


def validate(
    q, k, v, mask, segment_ids, positions, key_bias, scale, soft_cap, sink_logits
) -> inputs_lib.Inputs:
    """The arguments of `attend` in the form that backends take.

    Raises:
      ValueError: as in `attend`.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name}.shape={x.shape} must be [batch, length, heads, head_dim]")
        if x.dtype not in _FLOATS or x.dtype != q.dtype:
            raise ValueError(
                f"{name}.dtype={x.dtype} must be q's ({q.dtype}), one of bfloat16, float16, float32"
            )
    (batch, q_len, num_heads, head_dim), (_, kv_len, num_kv_heads, _) = q.shape, k.shape
    if k.shape != (batch, kv_len, num_kv_heads, head_dim):
        raise ValueError(f"k.shape={k.shape} must be [{batch}, S, K, {head_dim}] as q is {q.shape}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v.shape={v.shape} must begin as k.shape={k.shape}")
    if num_heads % num_kv_heads:
        raise ValueError(f"k has {num_kv_heads} heads, which must divide q's {num_heads}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"logits_soft_cap={soft_cap} must be > 0, or None for none")
    if sink_logits is not None and sink_logits.shape != (num_heads,):
        raise ValueError(f"sink_logits.shape={sink_logits.shape} must be ({num_heads},)")
    key_bias = _key_bias(key_bias, batch, num_heads, kv_len)
    q_ids, kv_ids = _pair("segment_ids", segment_ids, batch, q_len, kv_len, ((batch,),))
    q_pos, kv_pos = _pair("positions", positions, batch, q_len, kv_len, ((), (1,), (batch,)))
    block_mask_ = _block_mask(mask, num_heads, q_len, kv_len, q_pos, kv_pos)
    block_mask_.tables_of_heads(num_heads)
    if block_mask_.batch not in (1, batch):
        raise ValueError(f"mask is for a batch of {block_mask_.batch}, q has {batch}")
    if q_ids is not None:
        block_mask_ = segments.restrict(block_mask_, q_ids, kv_ids)
    return inputs_lib.Inputs(
        q, k, v, block_mask_, q_ids, kv_ids, q_pos, kv_pos, key_bias,
        None if sink_logits is None else jnp.asarray(sink_logits, jnp.float32),
        head_dim**-0.5 if scale is None else float(scale),
        None if soft_cap is None else float(soft_cap),
    )  # fmt: skip


def _key_bias(key_bias, batch, num_heads, kv_len):
    if key_bias is None:
        return None
    if key_bias.shape not in ((batch, kv_len), (batch, num_heads, kv_len)):
        raise ValueError(
            f"key_bias.shape={key_bias.shape} must be ({batch}, {kv_len}) or "
            f"({batch}, {num_heads}, {kv_len})"
        )
    key_bias = jnp.asarray(key_bias, jnp.float32)
    return key_bias[:, None] if key_bias.ndim == 2 else key_bias


def _pair(name, value, batch, q_len, kv_len, leading):
    """(for queries, for keys) as int32 `[M, length]`, from one array or a pair."""
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)):
        if q_len != kv_len:
            raise ValueError(
                f"{name} must be a pair (for queries, for keys) as q has {q_len} tokens and k "
                f"has {kv_len}"
            )
        value = (value, value)
    arrays = []
    for x, length in zip(value, (q_len, kv_len), strict=True):
        allowed = [(*lead, length) for lead in leading]
        if x.shape not in allowed or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"{name} of shape {x.shape} and dtype {x.dtype} must be integers of shape "
                f"{' or '.join(map(str, allowed))}"
            )
        x = jnp.asarray(x, jnp.int32)
        arrays.append(x if x.ndim == 2 else x[None])
    return tuple(arrays)


def _block_mask(mask, num_heads, q_len, kv_len, q_pos, kv_pos):
    if isinstance(mask, block_mask.BlockMask):
        if (mask.q_len, mask.kv_len) != (q_len, kv_len):
            raise ValueError(
                f"mask is for {mask.q_len} queries and {mask.kv_len} keys; q has {q_len}, "
                f"k has {kv_len}"
            )
        if q_pos is not None:
            raise ValueError(
                "positions needs mask to be a Pattern: a BlockMask has fixed positions"
            )
        return mask
    blocks = {"block_q": tiles.mask_block(q_len), "block_kv": tiles.mask_block(kv_len)}
    if isinstance(mask, per_head.PerHead):
        mask = mask.for_heads(num_heads)
    elif not isinstance(mask, base.Pattern):
        mask = tuple(mask)
        if not all(isinstance(pattern, base.Pattern) for pattern in mask):
            raise ValueError("mask must be a Pattern, a PerHead, a BlockMask or one Pattern a head")
        if len(mask) != num_heads:
            raise ValueError(f"mask has {len(mask)} patterns, q has {num_heads} heads")
    if q_pos is None:
        return lower.lower(mask, q_len=q_len, kv_len=kv_len, **blocks)
    if not isinstance(mask, base.Pattern):
        raise ValueError("positions needs mask to be one Pattern for all heads")
    return segments.lower_at(mask, q_pos, kv_pos, **blocks)
