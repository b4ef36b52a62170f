"""`attend` on a mesh: rows and heads split over its axes by `jax.shard_map`, tokens by a scheme."""

import dataclasses
import functools
import importlib
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from sparse_attn.masks import block_mask, lower
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from sparse_attn.parallel import local, split
from sparse_attn.parallel import mesh as mesh_lib
from sparse_attn.patterns import per_head


@dataclasses.dataclass(frozen=True)
class Tokens:
    """How the tokens of a row are split over the `seq` axis, and how attention deals with it.

    Attributes:
      scheme: "ring" (keys travel as far as the mask needs them), "ulysses" (tokens become heads
        and back; the axis must divide the heads) or "all_gather_kv". No effect without the axis.
      order: the chunk of the row that stands at each place, where the caller has put the tokens
        into another order (`balance.py`); None = the order of the text. The number of chunks is a
        multiple of the axis. Masks speak of the order of the text always.

    Raises:
      ValueError: there is no such scheme, or `order` is not a permutation.
    """

    scheme: str = "ring"
    order: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.scheme not in schemes():
            raise ValueError(f"scheme={self.scheme!r} must be one of {', '.join(schemes())}")
        if self.order is not None and sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"order={self.order} must hold each of 0 .. n-1 once")

    def places(self, length: int) -> Int[np.ndarray, "T"]:
        """The token that stands at each place of a row.

        >>> Tokens(order=(1, 0)).places(4).tolist()
        [2, 3, 0, 1]
        """
        return split.places((0,) if self.order is None else self.order, length)


@functools.cache
def schemes() -> tuple[str, ...]:
    """Names of the files of this folder that hold a `Plan`.

    >>> schemes()
    ('all_gather_kv', 'ring', 'ulysses')
    """
    files = pathlib.Path(__file__).parent.glob("*.py")
    return tuple(sorted(f.stem for f in files if "\nclass Plan" in f.read_text()))


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    mask: attend_lib.Mask,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    key_bias: Float[Array, "B S"] | Float[Array, "B N S"] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[Array, "N"] | None = None,
    return_lse: bool = False,
    impl: str | None = None,
    tokens: Tokens = Tokens(),
) -> Any:
    """`ops.attend` with the work split over the mesh of `jax.set_mesh`; without one, `ops.attend`.

    Rows go over `data` and `fsdp`, heads over `tensor` (KV heads are repeated where the axis has
    more), tokens over `seq` by `tokens.scheme`. Every device runs any backend on its own cut of
    the mask: different heads may have different masks, and only static masks are cut along tokens.

    Raises:
      ValueError: as `ops.attend`; or an axis does not divide the heads or the tokens.
      NotImplementedError: as `ops.attend`; or a run-time mask with one table per head or a `seq`
        axis.

    >>> from sparse_attn.patterns import local as window
    >>> q = k = v = jax.ShapeDtypeStruct((1, 32, 2, 8), jnp.float32)
    >>> with jax.set_mesh(mesh_lib.make("data=1")):
    ...     masked = functools.partial(attend, mask=window.Local(window=8))
    ...     jax.eval_shape(masked, q, k, v).shape
    (1, 32, 2, 8)
    """
    mesh = mesh_lib.current()
    ranks = 1 if mesh is None else mesh.shape["seq"]
    if ranks == 1 and tokens.order is not None:
        raise ValueError("tokens.order must be None where no seq axis splits the row")
    if mesh is None:
        return attend_lib.attend(
            q, k, v, mask=mask, segment_ids=segment_ids, key_bias=key_bias, scale=scale,
            logits_soft_cap=logits_soft_cap, sink_logits=sink_logits, return_lse=return_lse,
            impl=impl,
        )  # fmt: skip
    split_tokens = ranks > 1 and _divides(ranks, q, k, tokens)
    mask = _block_mask(mask, q, k, tokens, ranks if split_tokens else 1)
    inputs = attend_lib.validate(
        q, k, v, mask, segment_ids, None, key_bias, scale, logits_soft_cap, sink_logits
    )
    out, lse = _sharded(mesh, inputs, mask, impl, tokens if split_tokens else None)
    if inputs.sink_logits is not None:
        out, lse = local.add_sinks(out, lse, inputs.sink_logits)
    return (out, lse) if return_lse else out


def _divides(ranks, q, k, tokens) -> bool:
    chunks = ranks if tokens.order is None else len(tokens.order)
    if q.shape[1] == k.shape[1] and chunks % ranks == 0 and q.shape[1] % chunks == 0:
        return True
    if tokens.order is not None or q.shape[1] != k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} queries and {k.shape[1]} keys must be one row, of a multiple of "
            f"{chunks} chunks, which is a multiple of seq={ranks}"
        )
    return False  # A row to sample from, say: every rank computes it whole.


def _block_mask(mask, q, k, tokens, ranks) -> block_mask.BlockMask:
    if isinstance(mask, block_mask.BlockMask):
        return mask
    if isinstance(mask, per_head.PerHead):
        mask = mask.for_heads(q.shape[2])
    lengths = {"q_len": q.shape[1], "kv_len": k.shape[1]}
    if ranks > 1:
        chunks = ranks if tokens.order is None else len(tokens.order)
        block_q = block_kv = split.block_of(q.shape[1], chunks=chunks)
    else:
        block_q, block_kv = map(tiles.mask_block, lengths.values())
    return lower.lower(mask, **lengths, block_q=block_q, block_kv=block_kv)


def _sharded(mesh, inputs, mask, impl, tokens):
    """`out` and `lse` without sinks; `tokens=None` where no rank has a part of the row only."""
    num_heads, num_kv_heads = inputs.q.shape[2], inputs.k.shape[2]
    tensor = mesh.shape["tensor"]
    ranks = mesh.shape["seq"] if tokens is not None else 1
    by_rank = tokens is not None and tokens.scheme == "ulysses"
    groups = tensor * ranks if by_rank else tensor
    if num_heads % groups:
        raise ValueError(
            f"num_heads={num_heads} must be a multiple of tensor={tensor}"
            + (f" times seq={ranks}, for ulysses" if by_rank else "")
        )

    def group():
        index = jax.lax.axis_index("tensor")
        return index * ranks + jax.lax.axis_index("seq") if by_rank else index

    batch = mesh_lib.axes_of(mesh, "batch", inputs.q.shape[0])
    seq = "seq" if tokens is not None else None
    if mask.is_static:
        masks, which = split.of_heads(mask, num_heads=num_heads, parts=groups)
        lists, list_specs = {}, {}
    else:
        mask, lists, list_specs = _run_time(mask, tokens, tensor, batch)
        masks, which = (mask,), (0,) * groups
    options = local.Options(inputs.scale, inputs.logits_soft_cap, impl, which, group)
    plan = None
    if tokens is not None:
        scheme = importlib.import_module(f"sparse_attn.parallel.{tokens.scheme}")
        order = range(ranks) if tokens.order is None else tokens.order
        plan = scheme.Plan(masks, order=order, ranks=ranks)

    q, k, v = inputs.q, inputs.k, inputs.v
    if inputs.q_segment_ids is not None:  # Whatever padding holds, 0 * nan is nan.
        q = jnp.where((inputs.q_segment_ids != 0)[..., None, None], q, 0)
        k, v = (jnp.where((inputs.kv_segment_ids != 0)[..., None, None], x, 0) for x in (k, v))
    repeats = math.lcm(num_kv_heads, groups) // num_kv_heads
    if repeats > 1:
        k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    along = P(batch, seq, "tensor")
    bias_heads = None if inputs.key_bias is None or inputs.key_bias.shape[1] == 1 else "tensor"
    ids = P(batch, seq)

    @functools.partial(
        jax.shard_map,
        in_specs=(
            local.Queries(along, ids),
            local.Keys(along, along, P(batch, bias_heads, seq), ids),
            list_specs,
            P("seq"),
        ),
        out_specs=(along, along),
        check_vma=False,
    )
    def run(queries, keys, lists, arrays):
        if plan is not None:
            return plan.run(options, queries, keys, arrays)
        cut = [dataclasses.replace(m, **lists) for m in masks]
        return local.attend(cut, options, queries, keys)

    return run(
        local.Queries(q, inputs.q_segment_ids),
        local.Keys(k, v, inputs.key_bias, inputs.kv_segment_ids),
        lists,
        () if plan is None else plan.arrays,
    )


def _run_time(mask, tokens, tensor, batch):
    """A run-time mask for one device, its lists and how they are split."""
    if tokens is not None or mask.head_tables is not None or len(mask.rules) > 1:
        raise NotImplementedError(
            f"mask={mask!r} is known at run time only: it can be split over batch and heads where "
            "consecutive heads share its tables, and not over tokens"
        )
    lists = local.arrays_of(mask)
    tables = None
    if mask.num_tables > 1:
        repeats = math.lcm(mask.num_tables, tensor) // mask.num_tables
        lists = {name: jnp.repeat(x, repeats, axis=1) for name, x in lists.items()}
        tables = "tensor"
    rows = batch if mask.batch > 1 else None
    return (
        dataclasses.replace(mask, **dict.fromkeys(lists)),
        lists,
        {name: P(rows, tables) for name in lists},
    )
