"""Keys stay, queries come: every block of keys takes the queries that list it, in dense tiles.

Entries (a query and one of its blocks) are put in order of blocks, in whole tiles (`plan.py`).
Tiles of gathered queries then are the rows of a run-time `BlockMask` with one block each, which any
backend of `ops.block_sparse` executes; its columns, the tiles of a block, are what dk and dv sum
over. Partial results meet by their log-sum-exp. Query heads that share a list lie side by side in
the rows, so any group fills the tiles.  [arXiv:2502.13189, alg. 1; arXiv:2508.18224, sec. 3]

A query's own block is cut by causality: it runs as a static pattern of blocks on the diagonal.
All other blocks are seen whole or not at all, and need no rule. Some places of the lists are
processed at a time, so that the copies of queries and outputs stay within `_AT_ONCE` numbers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_attn.masks import block_mask, lower
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from sparse_attn.ops.block_sparse import inputs as blocks_lib
from sparse_attn.ops.token_select import inputs as inputs_lib
from sparse_attn.ops.token_select import plan as plan_lib
from sparse_attn.patterns import causal, chunked, full

# Numbers in the gathered queries of a step: 2 GB in bfloat16 on a GPU.
_AT_ONCE = {"cpu": 1 << 24, "gpu": 1 << 30, "tpu": 1 << 28}
_ROWS = 128  # Of a tile, at least; and a multiple of 64.


def check(inputs: inputs_lib.Inputs, kernel: str | None) -> None:
    """Takes causal() alone, and what the kernel takes."""
    if inputs.pattern != causal.Causal():
        raise NotImplementedError(
            f"takes pattern=causal(), not {inputs.pattern.expression()}: other blocks than the "
            "query's own must be visible whole"
        )
    inputs = _fold(inputs)
    for part in (_diagonal(inputs), _as_blocks(inputs, _Shape.of(inputs), None)):
        jax.eval_shape(lambda part=part: _forward(part, kernel))


class _Shape(NamedTuple):
    """Sizes of a step: places of a list at a time, entries in a tile, tiles."""

    places: int
    steps: int
    tile: int
    tiles: int

    @classmethod
    def of(cls, inputs) -> "_Shape":
        batch, length, heads, width = inputs.q.shape
        _, group, _ = inputs.sizes
        count = inputs.selected.shape[3]
        copy = batch * length * heads * max(width, inputs.v.shape[-1])
        places, steps = plan_lib.split(count, _AT_ONCE[tiles.target().platform] // copy)
        unit = math.lcm(64, group)
        tile = -(-_ROWS // unit) * unit // group
        blocks = -(-inputs.k.shape[1] // inputs.block)
        most = plan_lib.most_tiles(length * places, tile=tile, blocks=blocks)
        return cls(places, steps, tile, most)


# --- The two kinds of parts -----------------------------------------------------------------------


def _inputs(q, inputs, mask, q_ids):
    ids = None if q_ids is None else (q_ids, inputs.kv_segment_ids)
    return attend_lib.validate(
        q, inputs.k, inputs.v, mask, ids, None, None, inputs.scale, None, None
    )


def _diagonal(inputs):
    """Every query and its own block, causally, as inputs of the block op."""
    size = tiles.mask_block(inputs.block)
    mask = lower.lower(
        chunked.Chunked(size=inputs.block), q_len=inputs.q.shape[1], kv_len=inputs.k.shape[1],
        block_q=size, block_kv=size,
    )  # fmt: skip
    return _inputs(inputs.q, inputs, mask, inputs.q_segment_ids)


def _own(inputs):
    """Whether each query lists its own block, bool `[B, T, N]`."""
    _, group, _ = inputs.sizes
    own = jnp.arange(inputs.q.shape[1], dtype=jnp.int32) // inputs.block
    listed = (inputs.selected == own[:, None, None]).any(-1)
    return jnp.repeat(listed, group, axis=2)


def _empty_plan(inputs, shape, blocks):
    lead = (inputs.q.shape[0], inputs.sizes[0])
    sizes = (
        (shape.tiles * shape.tile,), (inputs.q.shape[1], shape.places), (blocks,), (blocks,),
        (shape.tiles,),
    )  # fmt: skip
    return plan_lib.Plan(*(jnp.zeros((*lead, *s), jnp.int32) for s in sizes))


def _as_blocks(inputs, shape, plan):
    """The block op of one step: rows are places times heads of a table, tables are heads."""
    blocks = -(-inputs.k.shape[1] // inputs.block)
    plan = _empty_plan(inputs, shape, blocks) if plan is None else plan
    _, group, _ = inputs.sizes
    listed = plan.block < blocks
    edge = inputs.k.shape[1] % inputs.block != 0
    last = jnp.arange(blocks) == blocks - 1
    ones = listed.astype(jnp.int32)
    rows = jnp.broadcast_to(jnp.arange(shape.tiles, dtype=jnp.int32), plan.block.shape)
    mask = block_mask.BlockMask(
        kv_starts=rows,
        kv_counts=ones,
        # Over the end of the keys, the kernel has to look.
        kv_partial_counts=jnp.where(plan.block == blocks - 1, ones, 0) if edge else ones * 0,
        kv_indices=jnp.where(listed, plan.block, -1),
        q_starts=plan.starts,
        q_counts=plan.counts,
        q_partial_counts=jnp.where(last, plan.counts, 0) if edge else plan.counts * 0,
        q_indices=jnp.where(listed, rows, -1),
        q_len=shape.tiles * shape.tile * group,
        kv_len=inputs.k.shape[1],
        block_q=shape.tile * group,
        block_kv=inputs.block,
        rules=(full.Full(),),
        max_kv=1,
        max_q=shape.tiles,
    )
    ids = inputs.q_segment_ids
    if ids is not None:  # One table, see `_fold`.
        ids = jnp.broadcast_to(ids[..., None], inputs.q.shape[:3])
        ids = _to_entries(ids, plan, inputs)[..., 0]
    return _inputs(_to_entries(inputs.q, plan, inputs), inputs, mask, ids)


def _to_entries(x, plan: plan_lib.Plan, inputs, fill=0):
    """`[B, T, N, ..]` at the places, `[B, places * G, U, ..]`; `fill` where nothing is."""
    tables, group, _ = inputs.sizes
    x = x.reshape(*x.shape[:2], tables, group, *x.shape[3:])

    def take(x, token):
        return x.at[token].get(mode="fill", fill_value=fill)

    token = plan.entry // plan.place.shape[3]  # Padding is past the last token.
    x = jax.vmap(jax.vmap(take, in_axes=(1, 0), out_axes=1))(x, token)
    # [B, places, U, G, ..] to rows of places times heads.
    x = jnp.moveaxis(x, 3, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _from_entries(x, plan: plan_lib.Plan, inputs, fill=0):
    """The inverse: `[B, T, N, places, ..]` from `[B, places * G, U, ..]`."""
    _, group, _ = inputs.sizes
    x = x.reshape(x.shape[0], -1, group, *x.shape[2:])

    def take(x, place):  # [rows, G, ..], [T, places]
        return jnp.moveaxis(x.at[place].get(mode="fill", fill_value=fill), 2, 1)

    x = jax.vmap(jax.vmap(take, in_axes=(2, 0), out_axes=1))(x, plan.place)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _steps(inputs, shape):
    """Blocks before the query's own, in `[steps, B, T, U, places]`."""
    own = jnp.arange(inputs.q.shape[1], dtype=jnp.int32) // inputs.block
    chosen = jnp.where(inputs.selected < own[:, None, None], inputs.selected, -1)
    return plan_lib.in_steps(chosen, shape.places, shape.steps)


# --- Forward and backward -------------------------------------------------------------------------


def _fold(inputs):
    """With documents, tables as batch entries: the entries of each have documents of their own."""
    tables, _, shared = inputs.sizes
    if inputs.q_segment_ids is None or tables == 1:
        return inputs

    def of_keys(x):
        x = jnp.repeat(jnp.moveaxis(x, 2, 1), shared, axis=1)
        return x.reshape(-1, x.shape[2], 1, x.shape[3])

    ids = (jnp.repeat(x, tables, axis=0) for x in (inputs.q_segment_ids, inputs.kv_segment_ids))
    selected = jnp.moveaxis(inputs.selected, 2, 1)
    return inputs_lib.Inputs(
        _to_tables(inputs.q, tables), of_keys(inputs.k), of_keys(inputs.v),
        selected.reshape(-1, *selected.shape[2:])[:, :, None], *ids, *inputs[6:],
    )  # fmt: skip


def _to_tables(x, tables):
    """`[B, T, N, ..]` as `[B * U, T, N / U, ..]`."""
    x = jnp.moveaxis(x.reshape(*x.shape[:2], tables, -1, *x.shape[3:]), 2, 1)
    return x.reshape(-1, *x.shape[2:])


def _from_tables(x, like):
    """The inverse, for the shape of `like` in batch and heads; summed over what shares a head."""
    batch, length, heads = like.shape[:3]
    tables = x.shape[0] // batch
    x = jnp.moveaxis(x.reshape(batch, tables, *x.shape[1:]), 1, 2)
    if tables * x.shape[3] > heads:
        return x.reshape(batch, length, heads, -1, *x.shape[4:]).sum(3)
    return x.reshape(batch, length, heads, *x.shape[4:])


def _forward(part: blocks_lib.Inputs, kernel):
    return attend_lib.choose(part, kernel).forward(part)


def _merge(out, lse, outs, lses):
    """Adds pieces `[B, T, N, places, ..]` to a float32 sum and its log-sum-exp."""
    lses = jnp.concatenate([lse[..., None], lses], -1)
    top = lses.max(-1, keepdims=True)
    weights = jnp.exp(lses - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(-1, keepdims=True)
    empty = total == 0
    safe = jnp.where(empty, 1, total)
    weights = weights / safe
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(safe))[..., 0]
    out = out * weights[..., :1] + jnp.einsum(
        "BTNp,BTNph->BTNh", weights[..., 1:], outs.astype(jnp.float32), precision="highest"
    )
    return out, lse


def plan(inputs: inputs_lib.Inputs, kernel: str | None = None) -> plan_lib.Plan:
    """The plans of all steps, for both passes."""
    del kernel
    inputs = _fold(inputs)
    shape, blocks = _Shape.of(inputs), -(-inputs.k.shape[1] // inputs.block)
    return jax.lax.map(
        lambda selected: plan_lib.plan(selected, tile=shape.tile, blocks=blocks),
        _steps(inputs, shape),
    )


def forward(inputs: inputs_lib.Inputs, kernel: str | None = None) -> tuple[jax.Array, jax.Array]:
    """`out [B, T, N, Hv]` in q's dtype and `lse [B, T, N]` float32."""
    whole, inputs = inputs, _fold(inputs)
    shape = _Shape.of(inputs)
    out, lse = _forward(_diagonal(inputs), kernel)
    own = _own(inputs)
    lse = jnp.where(own, lse, -jnp.inf)
    out = jnp.where(own[..., None], out, 0).astype(jnp.float32)

    def step(carry, plan):
        outs, lses = _forward(_as_blocks(inputs, shape, plan), kernel)
        pieces = _from_entries(outs, plan, inputs), _from_entries(lses, plan, inputs, -jnp.inf)
        return _merge(*carry, *pieces), None

    (out, lse), _ = jax.lax.scan(step, (out, lse), inputs.plan)
    out = out.astype(inputs.q.dtype)
    if whole is inputs:
        return out, lse
    return _from_tables(out, whole.q), _from_tables(lse, whole.q)


def backward(
    inputs: inputs_lib.Inputs, kernel: str | None, lse: jax.Array, dout: jax.Array, delta: jax.Array
) -> inputs_lib.Grads:
    """Gradients of all parts from the whole row's `lse`: no partial output is needed."""
    whole, inputs = inputs, _fold(inputs)
    if whole is not inputs:
        lse, dout, delta = (_to_tables(x, whole.sizes[0]) for x in (lse, dout, delta))
    shape = _Shape.of(inputs)

    def grads(part, *arrays):
        found = attend_lib.choose(part, kernel).backward(part, *arrays)
        return tuple(x.astype(jnp.float32) for x in (found.dq, found.dk, found.dv))

    own = _own(inputs)
    start = grads(
        _diagonal(inputs), jnp.where(own, lse, -jnp.inf), jnp.where(own[..., None], dout, 0),
        jnp.where(own, delta, 0),
    )  # fmt: skip

    def step(sums, plan):
        dq, dk, dv = grads(
            _as_blocks(inputs, shape, plan),
            _to_entries(lse, plan, inputs, -jnp.inf),
            _to_entries(dout, plan, inputs),
            _to_entries(delta, plan, inputs),
        )
        dq = _from_entries(dq, plan, inputs).sum(3)
        return tuple(a + b for a, b in zip(sums, (dq, dk, dv), strict=True)), None

    sums, _ = jax.lax.scan(step, start, inputs.plan)
    likes = (whole.q, whole.k, whole.v)
    if whole is not inputs:
        sums = map(_from_tables, sums, likes)
    return inputs_lib.Grads(*(x.astype(y.dtype) for x, y in zip(sums, likes, strict=True)))
