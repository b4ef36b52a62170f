"""Logits and visibility of one tile, as the Hopper kernels compute them in registers."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from sparse_attn.ops import plgpu_compat
from sparse_attn.ops.block_sparse import gpu_walk

LOG2E = math.log2(math.e)


def per_token(inputs):
    """Vectors that the element rule reads, padded so that every tile lies inside them."""

    def padded(x, block, rows, value=0):
        if x is None:
            return None
        length = rows * block + gpu_walk.ROWS
        pads = [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])]
        return jnp.pad(x, pads, constant_values=value)

    mask = inputs.mask
    q, kv = (mask.block_q, mask.num_rows), (mask.block_kv, mask.num_cols)
    bias = None if inputs.key_bias is None else inputs.key_bias * LOG2E
    return {
        "q_ids": padded(inputs.q_segment_ids, *q),
        "kv_ids": padded(inputs.kv_segment_ids, *kv),
        "q_pos": padded(inputs.q_positions, *q),
        "kv_pos": padded(inputs.kv_positions, *kv),
        "bias": padded(bias, *kv),
    }


class Tile(NamedTuple):
    """Where a tile lies, and the vectors per token that its rules read."""

    q_first: Any
    kv_first: Any
    vectors: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logits and visibility of a tile of `shape`, whose axis `q_axis` (0 or 1) is the queries."""

    shape: tuple[int, int]
    q_axis: int
    blocks: tuple[int, int]  # Tokens of a mask block along the axes of the tile.
    rules: tuple[Any, ...]
    kv_len: int | None  # None: no tile reaches over the end.
    streamed: int | None  # Tokens of a streamed tile that belong to its mask block; None: all.
    scale: float
    soft_cap: float | None
    num_bias_heads: int
    pos_batched: bool

    @property
    def _layouts(self):
        plgpu = plgpu_compat.plgpu
        reduced = (plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0))
        return reduced if self.q_axis == 0 else reduced[::-1]

    def read(self, refs, batch, head, q_first, kv_first, masked):
        """What the rules need of a tile, as a `Tile`: ask for it early, memory is far away."""
        where = {}
        if masked and "q_ids" in refs:
            where |= {"q_ids": ((batch,), False), "kv_ids": ((batch,), True)}
        if masked and "q_pos" in refs:
            at = (batch if self.pos_batched else 0,)
            where |= {"q_pos": (at, False), "kv_pos": (at, True)}
        if "bias" in refs:
            where |= {"bias": ((batch, head if self.num_bias_heads > 1 else 0), True)}
        vectors = {}
        for name, (at, kv) in where.items():
            size = self.shape[self.q_axis ^ int(kv)]
            window = plgpu_compat.pl.ds(kv_first if kv else q_first, size)
            vectors[name] = plgpu_compat.plgpu.load(
                refs[name].at[(*at, window)], layout=self._layouts[int(kv)], optimized=False
            )
        return Tile(q_first, kv_first, vectors)

    def _along(self, vector, kv):
        """Values per query or key token, broadcast to the tile."""
        return lax.broadcast_in_dim(vector, self.shape, [self.q_axis ^ int(kv)])

    def _index(self, first, kv):
        axis = self.q_axis ^ int(kv)
        plgpu = plgpu_compat.plgpu
        return (
            plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=plgpu.Layout.WGMMA) + first
        )

    def hide(self, x, value, refs, walk, i, tile, masked):
        """`x` with `value` where nothing is visible; in FULL blocks only beyond the block."""
        if masked:
            x = jnp.where(self._visible(refs, walk, i, tile), x, value)
        if self.streamed is not None:
            x = jnp.where(self._index(0, self.q_axis == 0) < self.streamed, x, value)
        return x

    @property
    def hides_always(self):
        """True when a row of a FULL block may see nothing."""
        return self.num_bias_heads > 0 or self.streamed is not None

    def _visible(self, refs, walk, i, tile):
        """Bool tile: what the element rule, the segments and the length allow."""
        vectors = tile.vectors
        index = positions = (self._index(tile.q_first, False), self._index(tile.kv_first, True))
        if "q_pos" in vectors:
            positions = (self._along(vectors["q_pos"], False), self._along(vectors["kv_pos"], True))
        if self.rules[0] is None:
            mask = self._bits(refs, walk, i, tile)
        elif len(self.rules) == 1:
            mask = plgpu_compat.element_rule(self.rules[0].mask_fn, *positions)
        else:
            branches = [
                lambda rule=rule: plgpu_compat.element_rule(rule.mask_fn, *positions).astype(int)
                for rule in self.rules
            ]
            mask = lax.switch(walk.table, branches) != 0
        if self.kv_len is not None:
            mask = mask & (index[1] < self.kv_len)
        if "q_ids" in vectors:
            q_ids, kv_ids = (
                self._along(vectors["q_ids"], False),
                self._along(vectors["kv_ids"], True),
            )
            mask = mask & (q_ids == kv_ids) & (q_ids != 0)
        return mask

    def _bits(self, refs, walk, i, tile):
        """The element mask that the block of tile i carries."""
        pl, plgpu = plgpu_compat.pl, plgpu_compat.plgpu
        firsts = (tile.q_first, tile.kv_first)[:: 1 if self.q_axis == 0 else -1]
        window = (
            pl.ds(lax.rem(first, jnp.int32(block)), size)
            for first, block, size in zip(firsts, self.blocks, self.shape)
        )
        ref = refs["bits"].at[(*walk.bits_at(i), *window)]
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False) != 0

    def logits(self, raw, tile):
        """(x, c, slope): base-2 logits are x * c; slope is the derivative of the soft cap."""
        c, slope = self.scale * LOG2E, None
        if self.soft_cap is not None:
            # tanh through exp2: the hardware's tanh has only 11 bits.
            squashed = 1.0 - 2.0 / (jnp.exp2(raw * (2 * c / self.soft_cap)) + 1.0)
            raw, c, slope = squashed, self.soft_cap * LOG2E, 1.0 - squashed * squashed
        if "bias" in tile.vectors:
            raw, c = raw * c + self._along(tile.vectors["bias"], True), 1.0
        if c <= 0:
            raw, c = raw * c, 1.0
        return raw, c, slope


def rules_of(inputs, shape, q_axis):
    """The `Rules` of a call, for tiles of `shape`."""
    mask = inputs.mask
    blocks = (mask.block_q, mask.block_kv) if q_axis == 0 else (mask.block_kv, mask.block_q)
    positions = inputs.q_positions
    return Rules(
        shape=shape,
        q_axis=q_axis,
        rules=mask.rules,
        kv_len=mask.kv_len if mask.kv_len % mask.block_kv else None,
        streamed=blocks[1] if blocks[1] < gpu_walk.ROWS else None,
        blocks=blocks,
        scale=inputs.scale,
        soft_cap=inputs.logits_soft_cap,
        num_bias_heads=0 if inputs.key_bias is None else inputs.key_bias.shape[1],
        pos_batched=positions is not None and positions.shape[0] > 1,
    )
