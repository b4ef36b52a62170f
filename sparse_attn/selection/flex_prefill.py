"""Blocks or columns and diagonals, decided per head and input by one probe."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparse_attn.ops import scoring, tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import sinks
from sparse_attn.selection import base, vertical_slash


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexPrefill(base.Selector):
    """Query-aware blocks where pooling estimates a head well, else vertical-slash; for prefill.

    [arXiv:2502.20766] The last block_q queries are the probe: where the root of
    the Jensen-Shannon divergence (natural logarithm) between their pooled and their true
    distribution over blocks is below `tau`, the head keeps the smallest set of blocks of its
    whole pooled map with a part `gamma` of the mass; else the smallest sets of columns and of
    diagonals with that part of the probe's mass, at block granularity. Looks ahead, as
    `vertical_slash` does.

    Attributes:
      gamma: part of the estimated mass to keep; 1 = all.
      tau: largest divergence at which pooling is believed.
      min_blocks: at least so many blocks per row, or their number of tokens in columns and in
        diagonals; None = off.

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> jax.eval_shape(FlexPrefill(block_q=16, block_kv=16, gamma=0.5).select, q, k).num_tables
    2
    """

    gamma: float = 0.95
    tau: float = 0.1
    min_blocks: int | None = None

    looks_ahead = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma} must be > 0 and <= 1")
        if not self.tau >= 0:
            raise ValueError(f"tau={self.tau} must be >= 0")
        if self.min_blocks is not None:
            patterns_base.check_int("min_blocks", self.min_blocks)

    @tiles.one_program
    def divergence(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]
    ) -> Float[Array, "B N"]:
        """Root of the Jensen-Shannon divergence of the probe's pooled and true distribution.

        >>> x = jnp.ones((1, 32, 1, 4))
        >>> rule = FlexPrefill(block_q=8, block_kv=8)
        >>> bool(rule.divergence(x, x)[0, 0] < 0.1)  # all keys are alike
        True
        """
        true = _by_block(vertical_slash.probe(self, q, k, self.block_q).mean(2), self.block_kv)
        seen = vertical_slash.seen_by_probe(self, q.shape[1], k.shape[1], self.block_q).any(0)
        last = q[:, -self.block_q :].astype(jnp.float32).mean(1, keepdims=True)
        real = np.ones((1, k.shape[1]), bool)
        estimate = scoring.logits(last, scoring.pool(k, self.block_kv, real))[:, :, 0]
        return _root_divergence(
            scoring.mass(estimate, _by_block(seen[None, None], self.block_kv) > 0), true
        )

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Bool[Array, "B U nq nk"]:
        pooled = scoring.logits(
            scoring.pool(q, self.block_q, blocks.q_real),
            scoring.pool(k, self.block_kv, blocks.kv_real),
        )
        believed = self.divergence(q, k) < self.tau
        return jnp.where(
            believed[..., None, None], self._blocks_of(pooled, blocks), self._lines_of(q, k)
        )

    def _blocks_of(self, pooled, blocks):
        """The best blocks of the whole map, with at least the minimum in each row."""
        share = scoring.mass(pooled, blocks.candidates)
        flat = (*share.shape[:2], -1)
        candidates, guard = (
            jnp.broadcast_to(x, share.shape).reshape(flat)
            for x in (blocks.candidates, blocks.guard)
        )
        kept = scoring.top_p(jnp.log(share).reshape(flat), self.gamma, candidates, guard)
        kept = kept.reshape(share.shape)
        if self.min_blocks is None:
            return kept
        return kept | scoring.top_k(pooled, self.min_blocks, blocks.candidates)

    def _lines_of(self, q, k):
        shares = vertical_slash.probe(self, q, k, self.block_q)
        columns = shares.sum(2)
        diagonals = vertical_slash.diagonal_sums(shares, q.shape[1])
        lines = []
        for sums in (columns, diagonals):
            every = np.ones(1, bool)  # What the pattern hides is dropped afterwards.
            kept = scoring.top_p(jnp.log(sums), self.gamma, every)
            if self.min_blocks is not None:
                kept = kept | scoring.top_k(sums, self.min_blocks * self.block_kv, every)
            lines.append(kept)
        return vertical_slash.crossed(self, *lines, q.shape[1])


def _by_block(x, block):
    extra = -x.shape[-1] % block
    x = jnp.pad(x, ((0, 0), (0, 0), (0, extra)))
    return x.reshape(*x.shape[:2], -1, block).sum(-1)


def _root_divergence(a, b):
    middle = (a + b) / 2

    def against(x):
        return jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x, 1) / middle), 0).sum(-1)

    return jnp.sqrt(jnp.maximum((against(a) + against(b)) / 2, 0))


EXAMPLES = (
    FlexPrefill(block_q=16, block_kv=16, gamma=0.6, tau=0.3),
    FlexPrefill(block_q=16, block_kv=8, gamma=0.4, tau=0.0, min_blocks=1),
    FlexPrefill(
        block_q=16, block_kv=16, gamma=0.5, tau=1.0, min_blocks=2,
        always=base.DIAGONAL | sinks.Sinks(tokens=1),
    ),
)  # fmt: skip
