"""The attention workloads that the Hopper kernels are measured on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from sparse_attn.masks import block_mask, lower
from sparse_attn.patterns import base, causal, full, local, sinks

BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Workload:
    """Shapes and the mask of one row of the table.

    Attributes:
      mask: makes what our kernels get: a pattern or a `BlockMask`.
      flex: the same rule for FlexAttention, `f(torch, device) -> mask_mod(b, h, q, kv)`.
      cudnn: arguments of `jax.nn.dot_product_attention`, or None where it has no such mask.
      documents: lengths of packed documents, or None.
    """

    name: str
    mask: Callable[[], Any]
    flex: Callable
    cudnn: dict | None = None
    q_len: int = 16384
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    documents: tuple[int, ...] | None = None

    def lowered(self) -> block_mask.BlockMask:
        """Our mask, without the documents (they are run-time ids)."""
        mask = self.mask()
        if isinstance(mask, base.Pattern):
            mask = lower.lower(mask, q_len=self.q_len)
        return mask

    def segment_ids(self) -> np.ndarray | None:
        """int32 `[1, T]`, documents numbered from 1."""
        if self.documents is None:
            return None
        return np.repeat(np.arange(1, len(self.documents) + 1), self.documents)[None].astype(
            np.int32
        )

    def pairs(self, mask: block_mask.BlockMask) -> tuple[float, float]:
        """Visible query-key pairs, and pairs of active blocks, summed over heads."""
        if self.documents is not None:
            visible = sum(n * (n + 1) // 2 for n in self.documents) * self.heads
            ids = self.segment_ids()[0].reshape(-1, BLOCK)
            first, last = ids[:, 0], ids[:, -1]
            rows, cols = np.tril_indices(len(first))
            active = (first[rows] <= last[cols]).sum() * BLOCK**2 * self.heads
            return float(visible), float(active)
        tables = np.bincount(mask.tables_of_heads(self.heads), minlength=mask.num_tables)
        area = mask.block_q * mask.block_kv
        visible = active = 0
        for u, heads in enumerate(tables):
            counts, partial, starts = (
                np.asarray(x[0, u], np.int64)
                for x in (mask.kv_counts, mask.kv_partial_counts, mask.kv_starts)
            )
            active += int(counts.sum()) * area * heads
            visible += int((counts - partial).sum()) * area * heads
            rule, indices = mask.rule(u), np.asarray(mask.kv_indices[0, u])
            for row in np.nonzero(partial)[0]:
                cols = indices[starts[row] : starts[row] + partial[row]]
                q_pos = (row * mask.block_q + np.arange(mask.block_q, dtype=np.int32))[:, None]
                kv_pos = (cols[:, None] * mask.block_kv + np.arange(mask.block_kv)).reshape(1, -1)
                visible += int(rule.mask_fn(q_pos, kv_pos.astype(np.int32)).sum()) * heads
        return float(visible), float(active)


@dataclasses.dataclass(frozen=True)
class TiledNeighbourhood(base.Pattern):
    """Keys within `reach` rows and columns on a grid whose tokens are ordered by 8 x 8 tiles.

    A block is two tiles side by side. Keys lie one tile further than queries, the last of a row of
    tiles first: then the four columns of tiles that two tiles of queries see are two whole blocks.
    """

    side: int = 128
    reach: int = 6

    def _row_col(self, pos, shift):
        # Sizes are powers of two: shifts cost the kernels far less than divisions.
        per_row = self.side // 8
        row = (pos >> (6 + per_row.bit_length() - 1) << 3) + (pos >> 3 & 7)
        return row, (((pos >> 6) - shift & (per_row - 1)) << 3) + (pos & 7)

    def mask_fn(self, q_pos, kv_pos):
        (q_row, q_col), (row, col) = self._row_col(q_pos, 0), self._row_col(kv_pos, 1)
        return (abs(row - q_row) <= self.reach) & (abs(col - q_col) <= self.reach)

    def lowered(self) -> block_mask.BlockMask:
        """Blocks of two tiles by blocks of two tiles that have a pair of tiles within reach."""
        length, per_row = self.side**2, self.side // 8
        tile = np.arange(length // 64)
        row, col, kv_col = tile // per_row, tile % per_row, (tile - 1) % per_row
        near = -(-self.reach // 8)  # Tiles within reach of a tile.
        pairs = (np.abs(row[:, None] - row) <= near) & (np.abs(col[:, None] - kv_col) <= near)
        states = pairs.reshape(len(tile) // 2, 2, -1, 2).any((1, 3)).astype(np.int8)
        return block_mask.from_block_states(
            states, rule=self, q_len=length, kv_len=length, block_q=BLOCK, block_kv=BLOCK
        )


def _random_states(density: float, heads: int, length: int) -> np.ndarray:
    """bool `[heads, n, n]`: random 128-blocks below the diagonal, and the diagonal."""
    n = length // BLOCK
    drawn = np.random.default_rng(0).random((heads, n, n)) < density
    return np.tril(drawn, -1) | np.eye(n, dtype=bool)


def _random(density: float) -> Workload:
    heads, length = 16, 16384

    def mask():
        chosen = _random_states(density, heads, length)
        states = np.where(chosen, 2, 0) - np.eye(length // BLOCK, dtype=int)
        return block_mask.from_block_states(
            states.astype(np.int8), rule=causal.Causal(), q_len=length, kv_len=length,
            block_q=BLOCK, block_kv=BLOCK,
        )  # fmt: skip

    def flex(torch, device):
        chosen = torch.as_tensor(_random_states(density, heads, length), device=device)
        return lambda b, h, q, kv: chosen[h, q // BLOCK, kv // BLOCK] & (q >= kv)

    return Workload(f"random {density:.0%} blocks per head", mask, flex)


def _documents() -> tuple[int, ...]:
    """Lengths with a mean of 2048 that fill 16384 tokens, more than once for a fair spread."""
    lengths, left, rng = [], 16384, np.random.default_rng(0)
    while left:
        lengths.append(int(min(left, max(64, rng.exponential(2048)))))
        left -= lengths[-1]
    return tuple(lengths)


def _document_ids(torch, device):
    ids = np.repeat(np.arange(len(_documents())), _documents())
    ids = torch.as_tensor(ids, device=device)
    return lambda b, h, q, kv: (ids[q] == ids[kv]) & (q >= kv)


def _neighbourhood(torch, device):
    def rule(b, h, q, kv):
        row, col = (q // 128 - kv // 128).abs(), (q % 128 - kv % 128).abs()
        return (row <= 6) & (col <= 6)

    return rule


def _all() -> tuple[Workload, ...]:
    window = local.Local(window=1024)

    def causal_flex(torch, device):
        return lambda b, h, q, kv: q >= kv

    def window_flex(torch, device):
        return lambda b, h, q, kv: (q >= kv) & (q - kv < 1024)

    def with_global(torch, device):
        return lambda b, h, q, kv: ((q - kv).abs() <= 512) | (kv < 64) | (q < 64)

    def with_sinks(torch, device):
        return lambda b, h, q, kv: (q >= kv) & ((q - kv < 1024) | (kv < 64))

    @dataclasses.dataclass(frozen=True)
    class Global(base.Pattern):
        """The first `tokens` see all and are seen by all."""

        tokens: int = 64

        def mask_fn(self, q_pos, kv_pos):
            return (q_pos < self.tokens) | (kv_pos < self.tokens)

        def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
            full_ = (q_hi <= self.tokens) | (kv_hi <= self.tokens)
            return base.state_of((q_lo >= self.tokens) & (kv_lo >= self.tokens), full_)

    is_causal, left_window = (
        {"is_causal": True},
        {"is_causal": True, "local_window_size": (1023, 0)},
    )
    both_sides = local.Local(reach=(512, 512)) | Global()
    return (
        Workload("full", full.Full, lambda torch, device: None, {}),
        Workload("causal", causal.Causal, causal_flex, is_causal),
        Workload("window 1024", lambda: window, window_flex, left_window),
        Workload("window 512 both sides + 64 global", lambda: both_sides, with_global),
        Workload("window 1024 + 64 sinks", lambda: window | sinks.Sinks(tokens=64), with_sinks),
        Workload("documents, mean 2048", causal.Causal, _document_ids, documents=_documents()),
        _random(0.1),
        _random(0.3),
        _random(0.6),
        Workload(
            "2-D neighbourhood 13x13", lambda: TiledNeighbourhood().lowered(), _neighbourhood
        ),
        Workload("window 1024, T 65536", lambda: window, window_flex, left_window,
                 q_len=65536, heads=8, kv_heads=8),
        Workload("causal, 32/8 heads", causal.Causal, causal_flex, is_causal,
                 heads=32, kv_heads=8),
        Workload("causal, 64/4 heads, T 8192", causal.Causal, causal_flex, is_causal,
                 q_len=8192, heads=64, kv_heads=4),
        Workload("causal, D 64", causal.Causal, causal_flex, is_causal, head_dim=64),
        Workload("window 1024, D 64", lambda: window, window_flex, left_window, head_dim=64),
    )  # fmt: skip


WORKLOADS = _all()
