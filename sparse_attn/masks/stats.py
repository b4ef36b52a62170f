"""Counts of a mask: densities, keys per query, FLOPs and bytes, all exact."""

import dataclasses
from typing import Any

import numpy as np

from sparse_attn.masks import block_mask, lower

_CHUNK = 1 << 20  # Elements evaluated at a time: the temporaries stay in the cache.
_MATMULS_BACKWARD = (3, 2)  # q k^T, dq, dk over the head dim; dout v^T, dv over the value dim.


@dataclasses.dataclass(frozen=True)
class MaskStats:
    """What `of` counts. Heads (and batch entries) with tables of their own are averaged.

    Attributes:
      q_len, kv_len: tokens.
      block_q, block_kv: tokens per block.
      token_density: visible (query, key) pairs / (q_len * kv_len).
      block_density: active blocks / all blocks.
      partial_blocks, full_blocks: active blocks by state, per head.
      keys_per_row_min, keys_per_row_mean, keys_per_row_max: keys that one query sees.
      empty_rows: queries that see no key, per head.
      imbalance: most active blocks in a row of blocks / mean; 1 = all rows cost the same.

    The token fields (token_density, keys_per_row_*, empty_rows) are None when they were not
    counted: see `max_pairs` of `of`.

    FLOPs count a multiply-add as 2 and leave out the softmax: with head dim H, one (query, key)
    pair costs 2H + 2H forward (two products) and 2.5 times that backward (five), as in
    [arXiv:2307.08691, sec. 4.1].
    """

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    token_density: float | None
    block_density: float
    partial_blocks: float
    full_blocks: float
    keys_per_row_min: int | None
    keys_per_row_mean: float | None
    keys_per_row_max: int | None
    empty_rows: float | None
    imbalance: float

    @property
    def active_blocks(self) -> float:
        """Blocks that are computed, per head."""
        return self.partial_blocks + self.full_blocks

    def useful_flops(
        self,
        head_dim: int,
        num_heads: int,
        v_head_dim: int | None = None,
        backward: bool = False,
    ) -> float:
        """FLOPs of the visible pairs of one sequence: the forward pass, or the backward one alone.

        Raises:
          ValueError: the visible pairs were not counted.

        >>> from sparse_attn.patterns import causal
        >>> of(causal.Causal(), q_len=4).useful_flops(head_dim=8, num_heads=2)  # 10 pairs
        640.0
        """
        if self.token_density is None:
            raise ValueError("useful_flops needs token_density, which max_pairs left uncounted")
        pairs = self.token_density * self.q_len * self.kv_len
        return pairs * num_heads * _flops_per_pair(head_dim, v_head_dim, backward)

    def executed_flops(
        self,
        head_dim: int,
        num_heads: int,
        v_head_dim: int | None = None,
        backward: bool = False,
    ) -> float:
        """FLOPs of the active blocks of one sequence, hidden pairs included; else as useful_flops.

        >>> from sparse_attn.patterns import causal
        >>> of(causal.Causal(), q_len=4, block_q=2, block_kv=2).executed_flops(8, 2)  # 12 pairs
        768.0
        """
        pairs = self.active_blocks * self.block_q * self.block_kv
        return pairs * num_heads * _flops_per_pair(head_dim, v_head_dim, backward)

    def kv_bytes(
        self, head_dim: int, num_heads: int, v_head_dim: int | None = None, itemsize: int = 2
    ) -> float:
        """Bytes of K and V that the forward pass of one sequence reads, block by block.

        Args:
          num_heads: heads that read for themselves: the query heads, or the KV heads in a kernel
            that serves all query heads of a KV head at once.
          itemsize: bytes per number (2 = bfloat16).

        >>> from sparse_attn.patterns import causal
        >>> of(causal.Causal(), q_len=4, block_q=2, block_kv=2).kv_bytes(8, 1)  # 3 blocks
        192.0
        """
        width = head_dim + (head_dim if v_head_dim is None else v_head_dim)
        return self.active_blocks * self.block_kv * num_heads * width * itemsize


def of(
    mask: Any,
    *,
    q_len: int | None = None,
    kv_len: int | None = None,
    block_q: int = 128,
    block_kv: int = 128,
    max_pairs: int | None = None,
) -> MaskStats:
    """Counts a `BlockMask`, or a pattern (a `Pattern`, a `PerHead`, or one per head).

    FULL blocks are counted by area, PARTIAL ones by evaluating their elements in small pieces:
    1 to 2 s per 10**9 pairs in PARTIAL blocks and O(q_len) memory, however large T x S is.

    Args:
      q_len, kv_len, block_q, block_kv: for a pattern, as in `lower`; a `BlockMask` has its own.
      max_pairs: leave the token fields None if PARTIAL blocks hold more pairs than this.

    Raises:
      ValueError: a pattern without `q_len`, a `BlockMask` with one, or a run-time mask (its
        segments are not in its tables).

    >>> from sparse_attn.patterns import local
    >>> stats = of(local.Local(window=4096), q_len=1 << 17)
    >>> stats.keys_per_row_max, round(stats.token_density, 4), round(stats.block_density, 4)
    (4096, 0.0308, 0.0317)
    """
    if not isinstance(mask, block_mask.BlockMask):
        if q_len is None:
            raise ValueError("q_len=None must be a number of tokens when a pattern is counted")
        mask = lower.lower(mask, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv)
    elif q_len is not None or kv_len is not None:
        raise ValueError(f"q_len={q_len}, kv_len={kv_len} must be None: a BlockMask has lengths")
    if not mask.is_static:
        raise ValueError("mask must be static (NumPy tables), not a run-time BlockMask")
    heads = heads_of_tables(mask)
    masks = mask.batch * sum(heads)
    partial, active = (
        int(counts.sum((0, 2), dtype=np.int64) @ heads) / masks
        for counts in (mask.kv_partial_counts, mask.kv_counts)
    )
    in_partial = int(mask.kv_partial_counts.sum(dtype=np.int64)) * mask.block_q * mask.block_kv
    tokens = dict.fromkeys(_TOKEN_FIELDS)
    if max_pairs is None or in_partial <= max_pairs:
        tokens = _count_tokens(mask, heads)
    return MaskStats(
        q_len=mask.q_len,
        kv_len=mask.kv_len,
        block_q=mask.block_q,
        block_kv=mask.block_kv,
        block_density=active / (mask.num_rows * mask.num_cols),
        partial_blocks=partial,
        full_blocks=active - partial,
        imbalance=int(mask.kv_counts.max()) * mask.num_rows / active if active else 1.0,
        **tokens,
    )


_TOKEN_FIELDS = (
    "token_density", "keys_per_row_min", "keys_per_row_mean", "keys_per_row_max", "empty_rows",
)  # fmt: skip


def heads_of_tables(mask: block_mask.BlockMask) -> list[int]:
    """How many heads use each table (1 each when the mask does not say)."""
    if mask.head_tables is None:
        return [1] * mask.num_tables
    return np.bincount(mask.head_tables, minlength=mask.num_tables).tolist()


def _count_tokens(mask, heads):
    total, empty, low, high = 0, 0, mask.kv_len, 0
    for batch in range(mask.batch):
        for table, weight in enumerate(heads):
            keys = keys_per_row(mask, batch=batch, table=table)
            total += weight * int(keys.sum())
            empty += weight * int((keys == 0).sum())
            low, high = min(low, int(keys.min())), max(high, int(keys.max()))
    rows = mask.batch * sum(heads) * mask.q_len
    return {
        "token_density": total / (rows * mask.kv_len),
        "keys_per_row_min": low,
        "keys_per_row_mean": total / rows,
        "keys_per_row_max": high,
        "empty_rows": empty / (mask.batch * sum(heads)),
    }


def keys_per_row(mask: block_mask.BlockMask, *, batch: int = 0, table: int = 0) -> np.ndarray:
    """How many keys each query sees, int64 `[q_len]`, of one table of a static mask.

    >>> from sparse_attn.patterns import causal
    >>> keys_per_row(lower.lower(causal.Causal(), q_len=5, block_q=2, block_kv=2))
    array([1, 2, 3, 4, 5])
    """
    full = mask.kv_counts[batch, table] - mask.kv_partial_counts[batch, table]
    keys = np.repeat(full.astype(np.int64)[:, None] * mask.block_kv, mask.block_q, 1)
    piece = max(1, _CHUNK // (mask.block_q * mask.block_kv))
    for rows, cols, places in block_mask.entries(
        mask, block_mask.BlockState.PARTIAL, batch=batch, table=table, piece=piece
    ):
        if mask.rule(table) is None:
            visible = mask.bits[batch, table, mask.kv_bits[batch, table, places]]
        else:
            visible = _evaluate(mask, mask.rule(table), rows, cols)
        # Eight elements to a byte, then a population count: several times faster than a sum.
        seen = np.bitwise_count(np.packbits(visible, axis=-1)).sum(-1, dtype=np.int64)
        np.add.at(keys, rows, seen)
    return keys.reshape(-1)[: mask.q_len]


def _evaluate(mask, rule, rows, cols):
    q_pos = (rows[:, None] * mask.block_q + np.arange(mask.block_q)).astype(np.int32)[:, :, None]
    kv_pos = (cols[:, None] * mask.block_kv + np.arange(mask.block_kv)).astype(np.int32)
    visible = rule.mask_fn(q_pos, kv_pos[:, None, :])
    if mask.kv_len % mask.block_kv:
        visible = visible & (kv_pos < mask.kv_len)[:, None, :]
    return np.broadcast_to(visible, (len(rows), mask.block_q, mask.block_kv))


def _flops_per_pair(head_dim, v_head_dim, backward):
    over_qk, over_v = _MATMULS_BACKWARD if backward else (1, 1)
    return 2 * (over_qk * head_dim + over_v * (head_dim if v_head_dim is None else v_head_dim))
