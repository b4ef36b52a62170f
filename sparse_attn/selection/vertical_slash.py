"""Columns and diagonals that the last queries attend to."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparse_attn.ops import scoring, tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import full
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerticalSlash(base.Selector):
    """The columns and diagonals with most exact attention from the last queries, for prefill.

    [arXiv:2407.02490, sec. 3.2, alg. 2] They are kept at the granularity of blocks: every block
    that a kept column or diagonal crosses is kept whole, so that more is seen, never less. Looks
    ahead: all rows follow what the last queries of the one document see.

    Attributes:
      columns: keys that every query sees.
      diagonals: distances `query - key` that every query sees.
      probe: last queries whose attention to all keys is computed.

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> rule = VerticalSlash(block_q=16, block_kv=16, columns=1, diagonals=1, probe=4)
    >>> jax.eval_shape(rule.select, q, k).kv_counts.shape
    (1, 2, 4)
    """

    columns: int = 1000
    diagonals: int = 1000
    probe: int = 64

    looks_ahead = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("columns", "diagonals"):
            patterns_base.check_int(name, getattr(self, name), least=0)
        patterns_base.check_int("probe", self.probe)

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Bool[Array, "B U nq nk"]:
        shares = probe(self, q, k, self.probe)
        every = np.ones(1, bool)  # What the pattern hides is dropped afterwards.
        columns = scoring.top_k(shares.sum(2), self.columns, every)
        diagonals = scoring.top_k(diagonal_sums(shares, q.shape[1]), self.diagonals, every)
        return crossed(self, columns, diagonals, q.shape[1])


@tiles.one_program
def probe(
    rule: base.Selector, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], count: int
) -> Float[Array, "B N P S"]:
    """Attention weights of the last `count` queries, as the rule's pattern allows; float32.

    >>> x = jnp.zeros((1, 4, 1, 2))
    >>> probe(VerticalSlash(), x, x, 1).tolist()
    [[[[0.25, 0.25, 0.25, 0.25]]]]
    """
    seen = seen_by_probe(rule, q.shape[1], k.shape[1], count)
    return scoring.mass(scoring.logits(q[:, -len(seen) :], k), seen[None, None])


def seen_by_probe(
    rule: base.Selector, q_len: int, kv_len: int, count: int
) -> Bool[np.ndarray, "P S"]:
    """Which keys the pattern shows to each of the last `count` queries."""
    q_pos = np.arange(max(0, q_len - count), q_len, dtype=np.int32)[:, None]
    seen = rule.pattern.mask_fn(q_pos, np.arange(kv_len, dtype=np.int32)[None])
    return np.broadcast_to(seen, (len(q_pos), kv_len))


@tiles.one_program
def diagonal_sums(shares: Float[Array, "B N P S"], q_len: int) -> Float[Array, "B N D"]:
    """Sums by distance `query - key`, for the distances `-(S - 1) .. q_len - 1` in this order.

    >>> diagonal_sums(jnp.array([[[[1.0, 2.0], [3.0, 4.0]]]]), 2).tolist()
    [[[2.0, 5.0, 3.0]]]
    """
    rows, kv_len = shares.shape[2:]
    distances = np.arange(1 - kv_len, q_len)
    at = np.arange(q_len - rows, q_len)[:, None] - distances
    inside = (at >= 0) & (at < kv_len)
    moved = jnp.take_along_axis(shares, np.where(inside, at, 0)[None, None], axis=-1)
    return jnp.where(inside, moved, 0).sum(2)


@tiles.one_program
def crossed(
    rule: base.Selector, columns: Bool[Array, "B N S"], diagonals: Bool[Array, "B N D"], q_len: int
) -> Bool[Array, "B N nq nk"]:
    """The blocks that a column or a diagonal crosses; `diagonals` as in `diagonal_sums`."""
    kv_len = columns.shape[-1]
    batch, heads = columns.shape[:2]
    padded = jnp.pad(columns, ((0, 0), (0, 0), (0, -kv_len % rule.block_kv)))
    by_column = padded.reshape(batch, heads, 1, -1, rule.block_kv).any(-1)
    # A block holds a run of distances: one is kept where the count of those kept grows along it.
    counts = jnp.pad(jnp.cumsum(diagonals, -1, dtype=jnp.int32), ((0, 0), (0, 0), (1, 0)))
    q_lo = np.arange(0, q_len, rule.block_q)[:, None]
    kv_lo = np.arange(0, kv_len, rule.block_kv)[None]
    first = q_lo - (np.minimum(kv_lo + rule.block_kv, kv_len) - 1) + kv_len - 1
    last = np.minimum(q_lo + rule.block_q, q_len) - 1 - kv_lo + kv_len - 1
    return by_column | (counts[..., last + 1] > counts[..., first])


EXAMPLES = (
    VerticalSlash(block_q=16, block_kv=16, columns=3, diagonals=2, probe=8),
    VerticalSlash(block_q=8, block_kv=16, columns=2, diagonals=3, pattern=full.Full()),
)
