"""How a Hopper kernel walks a `BlockMask`: programs, their tiles, the ring, the warpgroups."""

import dataclasses
import heapq
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_attn.ops import plgpu_compat

ROWS = 64  # Rows of a matrix instruction: what one compute warpgroup holds.
_SHARED_BYTES = 226 * 1024  # Of the 227 KiB a program may have; barriers need some.
SPLIT_BELOW = 2  # Programs per processor below which dk/dv splits groups of heads; 0: never.


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a kernel is cut: none of it changes results beyond rounding.

    Attributes:
      tile: tokens per streamed tile; a mask block that is no multiple of it takes 64.
      stages: streamed tiles in flight.
      buffers: 2 = the next program's stationary rows are loaded while this one's are in use.
    """

    tile: int
    stages: int
    buffers: int = 2


@dataclasses.dataclass(frozen=True)
class Lists:
    """One direction of a mask, cut into tiles: rows for queries (forward, dq), columns for keys.

    Attributes:
      own, other: tokens per mask block along the stationary and the streamed side.
      rows: tokens per program (and per warpgroup, `wg_rows`) along the stationary side.
      num_own: tokens of all mask blocks along the stationary side.
      processors: what runs at a time; each serves several programs in turn.
      warpgroups: compute warpgroups per program.
    """

    own: int
    other: int
    rows: int
    wg_rows: int
    num_own: int
    warpgroups: int
    processors: int
    batched: bool
    rows_per_head: bool
    tables_per_head: int | None  # Heads per table when they share in consecutive groups.

    def table(self, refs, head):
        if self.tables_per_head is None:
            return refs["tables"][head]
        return lax.div(head, jnp.int32(self.tables_per_head))

    def program(self, refs, n, tile):
        """The n-th program of this processor, longest lists first: a `Program`."""
        item = self._first_item(refs) + n
        batch, head, listed, tile_row = (refs["items"][item, column] for column in range(4))
        at = batch if self.batched else 0

        def entries(query_head):
            row = (at, query_head if self.rows_per_head else 0, listed)
            start, count, partial = (refs["rows"][(*row, column)] for column in range(3))
            table = self.table(refs, query_head)
            tiles_per_block = max(1, self.other // tile)

            def entry(i):
                return at, table, start + lax.div(i, jnp.int32(tiles_per_block))

            def first_token(i):
                block = refs["indices"][entry(i)]
                return block * self.other + lax.rem(i, jnp.int32(tiles_per_block)) * tile

            return Walk(
                query_head, table, count * tiles_per_block, partial * tiles_per_block,
                first_token, lambda i: (at, table, refs["bit_slots"][entry(i)]),
            )  # fmt: skip

        # The product proves to the compiler that the address is aligned.
        return Program(batch, head, tile_row * self.rows, entries)

    def _first_item(self, refs):
        me = lax.axis_index("processors")
        return refs["bounds"][me] if "bounds" in refs else me

    def num_items(self, refs):
        """Programs of this processor."""
        me = lax.axis_index("processors")
        return refs["bounds"][me + 1] - refs["bounds"][me] if "bounds" in refs else jnp.int32(1)


class Program(NamedTuple):
    """What one program serves: `first` is its first stationary token."""

    batch: Any
    head: Any
    first: Any
    entries: Any  # f(query head) -> Walk


class Walk(NamedTuple):
    """The tiles that a program streams for a query head: PARTIAL ones, then FULL ones."""

    head: Any
    table: Any
    count: Any
    partial: Any
    first_token: Any  # f(i) -> first token of tile i
    bits_at: Any  # f(i) -> index of the element bits of tile i


def lists_of(inputs, direction, num_heads_served):
    """The `Lists` of a direction ("kv": row lists; "q": column lists) and its arrays."""
    mask, num_heads = inputs.mask, inputs.q.shape[2]
    own, other = mask.block_q, mask.block_kv
    if direction == "q":
        own, other = other, own
    wg_rows, rows = _rows(inputs, own)
    starts, counts, partials, indices = (
        getattr(mask, f"{direction}_{name}")
        for name in ("starts", "counts", "partial_counts", "indices")
    )
    tables = mask.tables_of_heads(num_heads)
    per_head, rest = divmod(num_heads, mask.num_tables)
    regular = not rest and (tables == np.arange(num_heads) // per_head).all()
    xp = np if isinstance(counts, np.ndarray) else jnp
    per_list = [xp.asarray(x) for x in (starts, counts, partials)]
    lengths = counts
    if mask.num_tables > 1:  # By query head, so that a program reads its row in one access.
        per_list = [x[:, tables] for x in per_list]
        # A column's program serves the group of a KV head: its length is the sum.
        lengths = per_list[1].reshape(counts.shape[0], num_heads_served, -1, counts.shape[-1])
        lengths = lengths.sum(2)
    batch_size = inputs.q.shape[0]
    items, costs = _items(lengths, batch_size, num_heads_served, own, rows, xp)
    processors, bounds = len(items), None
    if xp is np:  # Known lengths are shared out; unknown ones are left to the GPU's scheduler.
        processors = min(plgpu_compat.processors(), len(items))
        items, bounds = _share_out(items, costs * other / 128 + 1.0, processors)
    arrays = {
        "items": items, "bounds": bounds, "rows": xp.stack(per_list, -1), "indices": indices,
        "tables": None if regular else tables,
        "bit_slots": getattr(mask, f"{direction}_bits"), "bits": _bits(mask, direction),
    }  # fmt: skip
    geometry = Lists(
        own=own, other=other, rows=rows, wg_rows=wg_rows, warpgroups=rows // wg_rows,
        num_own=counts.shape[-1] * own,
        processors=processors, batched=mask.batch > 1, rows_per_head=mask.num_tables > 1,
        tables_per_head=per_head if regular else None,
    )  # fmt: skip
    return geometry, arrays


def _rows(inputs, own):
    """Stationary tokens per warpgroup and per program, of mask blocks of `own` tokens."""
    wide = own % (2 * ROWS) == 0 and max(inputs.q.shape[-1], inputs.v.shape[-1]) <= 128
    wg_rows = min(own, ROWS)
    return wg_rows, 2 * wg_rows if wide else wg_rows


def group_parts(inputs):
    """Programs among which dk/dv splits a group of heads: several where columns are too few."""
    (batch_size, _, num_kv_heads, _), mask = inputs.k.shape, inputs.mask
    tiles_per_block = mask.block_kv // _rows(inputs, mask.block_kv)[1]
    programs = batch_size * num_kv_heads * mask.num_cols * tiles_per_block
    group = inputs.q.shape[2] // num_kv_heads
    parts = [n for n in range(1, group + 1) if group % n == 0]
    wanted = SPLIT_BELOW * plgpu_compat.processors()
    return next((n for n in parts if n * programs >= wanted), parts[-1])


def grad_type(x, parts, lists):
    """What dk/dv writes as the gradient of x `[B, S, K, H]`; of parts, tiles of float32."""
    if parts == 1:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    batch_size, _, num_kv_heads, dim = x.shape
    # Whole tiles, since stores from registers have no bounds; blocks of fewer rows are cut later.
    shape = (batch_size, num_kv_heads * parts, lists.num_own // lists.wg_rows, ROWS, dim)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def sum_parts(grad, parts, lists, dtype):
    """The gradient `[B, S, K, H]` of what `grad_type` describes, added in a fixed order."""
    if parts == 1:
        return grad
    batch_size, heads, tiles, _, dim = grad.shape
    grad = grad.reshape(batch_size, heads // parts, parts, tiles, ROWS, dim).sum(2)
    grad = grad[..., : lists.wg_rows, :].reshape(batch_size, heads // parts, -1, dim)
    return grad.swapaxes(1, 2).astype(dtype)


def _items(lengths, batch_size, num_heads, own, rows, xp):
    """All programs, longest first: int32 `[n, 4]` (batch, head, mask row, tile row), lengths."""
    masks, lists, num_rows = lengths.shape
    order = xp.argsort(-lengths.reshape(-1), stable=True)
    mask, rest = order // (lists * num_rows), order % (lists * num_rows)
    head, row = rest // num_rows, rest % num_rows
    split = max(1, own // rows)
    # What the lists do not tell apart (heads, batch, tiles of a row) lies next to each other.
    inner = (num_heads // lists, batch_size // masks, split)
    more_head, more_batch, part = (x.reshape(-1) for x in np.indices(inner))
    columns = (
        mask[:, None] + more_batch,
        head[:, None] + more_head,
        row[:, None] + 0 * part,
        row[:, None] * (own // rows) + part,
    )
    items = xp.stack([x.reshape(-1) for x in columns], -1).astype(np.int32)
    return items, xp.repeat(lengths.reshape(-1)[order], len(part))


def _share_out(items, costs, processors):
    """Items of each processor one behind the other, and where each begins `[processors + 1]`.

    Longest first, each to the processor that has the least to do so far.
    """
    heap = [(0.0, p) for p in range(processors)]
    shares = [[] for _ in range(processors)]
    for item, cost in enumerate(costs):
        load, p = heap[0]
        shares[p].append(item)
        heapq.heapreplace(heap, (load + cost, p))
    bounds = np.cumsum([0, *map(len, shares)]).astype(np.int32)
    return items[np.concatenate(shares)], bounds


def _bits(mask, direction):
    """Element bits with the stationary side first, large enough for a tile to be read."""
    if mask.bits is None:
        return None
    bits = jnp.asarray(mask.bits if direction == "kv" else mask.bits.swapaxes(-1, -2))
    return jnp.pad(bits, [(0, 0)] * 3 + [(0, max(0, ROWS - size)) for size in bits.shape[-2:]])


def tile_of(lists, schedule):
    """Tokens per streamed tile: what was asked for where the mask block is a multiple of it."""
    return schedule.tile if lists.other % schedule.tile == 0 else ROWS


def schedule_of(lists, own_width, ring_width, *, tile, stages=4, reserved=0):
    """As many of `stages`, and of 2 buffers, as fit in shared memory.

    Widths are 16-bit numbers per stationary and per streamed token; `reserved` is in bytes.
    """
    if ring_width > 2 * 128 + 4:
        tile = ROWS
    tile = tile if lists.other % tile == 0 else ROWS
    own, ring = 2 * lists.warpgroups * ROWS * own_width, 2 * tile * ring_width
    choices = [(2, n) for n in range(stages, 1, -1)] + [(1, 2)]
    for buffers, stages in choices:
        if buffers * own + stages * ring + reserved <= _SHARED_BYTES:
            break
    return Schedule(tile=tile, stages=stages, buffers=buffers)


def slot_of(i, stages):
    """Place of tile i in a ring."""
    power = stages & (stages - 1) == 0
    return lax.bitwise_and(i, jnp.int32(stages - 1)) if power else lax.rem(i, jnp.int32(stages))


def run_warpgroups(lists, refs, serve, feed, stages, ring_free, buffers, own_free):
    """Compute warpgroups serve this processor's programs; one more warpgroup feeds them."""
    plgpu, pl = plgpu_compat.plgpu, plgpu_compat.pl
    wg, items = lax.axis_index("wg"), lists.num_items(refs)
    many, few = (240, 24) if lists.warpgroups == 2 else (240, 40)

    def drain(count, places, barriers):
        """Awaits the last uses, so that every arrival at a barrier is awaited."""

        def step(i, _):
            for free in barriers:
                plgpu.barrier_wait(free.at[slot_of(i, places)])

        lax.fori_loop(jnp.maximum(count - places, 0), count, step, None)

    @pl.when(wg < lists.warpgroups)
    def _compute():
        plgpu.set_max_registers(many, action="increase")
        lax.fori_loop(0, items, serve, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == lists.warpgroups)
    def _copy():
        plgpu.set_max_registers(few, action="decrease")
        done = lax.fori_loop(0, items, feed, jnp.int32(0))
        drain(done, stages, ring_free)
        drain(items, buffers, (own_free,))


def feed_ring(walk, done, stages, ring, tile):
    """Copies the tiles of a walk into the ring, each as soon as its place is free.

    `ring` lists what is awaited together: copies (source by token, stack in shared memory), the
    barriers that say full and those that say free.
    """
    plgpu, pl = plgpu_compat.plgpu, plgpu_compat.pl

    def step(i, _):
        slot = slot_of(done + i, stages)
        tokens = pl.ds(walk.first_token(i), tile)
        for copies, full, free in ring:
            pl.when(done + i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            for source, smem in copies:
                plgpu.copy_gmem_to_smem(source.at[tokens], smem.at[slot], full.at[slot])

    lax.fori_loop(0, walk.count, step, None)


def call(body, arrays, *, out_type, scratch, lists):
    """Runs a kernel on the arrays that are not None; the body gets its refs by name."""
    plgpu = plgpu_compat.plgpu
    names = [name for name, x in arrays.items() if x is not None]
    outs = list(out_type)

    def entry(*refs):
        ins, rest = refs[: len(names)], refs[len(names) :]
        body({**dict(zip(names, ins)), **dict(zip(outs, rest))}, *rest[len(outs) :])

    results = plgpu.kernel(
        entry,
        out_type=tuple(out_type.values()),
        scratch_types=scratch,
        grid=(lists.processors,),
        grid_names=("processors",),
        num_threads=lists.warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers="dbias" not in outs,
            reduction_scratch_bytes=512,
        ),
    )(*(jnp.asarray(arrays[name]) for name in names))
    return dict(zip(outs, results))


def smem(shape, dtype):
    """A stack of matrices in shared memory, laid out as TMA writes and wgmma reads them."""
    plgpu = plgpu_compat.plgpu
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def zeros(shape, layout):
    """Float32 zeros in registers."""
    return plgpu_compat.plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def rows_to_tile(vector, shape):
    """A value per row, broadcast along the tile."""
    return lax.broadcast_in_dim(vector, shape, [0])
