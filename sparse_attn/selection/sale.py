"""Blocks with a pair of tokens that matters, by products of 4-bit queries and keys."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_attn.ops import scoring, tiles
from sparse_attn.selection import anchor, base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sale(anchor.AnchorRegion):
    """A block is kept if one pair reaches `threshold` of the weight of sinks and window.

    [arXiv:2505.24179] Queries and keys are rounded to 4 bits per token, and all logits are
    estimated from them at full resolution. A pair counts by its relative score, the exponential
    of its logit less the log-sum-exp of the query's logits in the region that is always kept.
    Training-free. Estimates are made one row of blocks at a time; the products here are those of
    rounded numbers in float32, as exact as an int4 unit's, without its speed.

    Attributes:
      threshold: relative score of a pair that keeps its block; 0 keeps all.
      bits: of each rounded number.

    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> rule = Sale(block_q=16, block_kv=16, sink_tokens=4, window=8, threshold=0.0)
    >>> rule.select(q, k).kv_counts[0, 0].tolist()
    [1, 2, 3, 4]
    """

    threshold: float = 0.004
    bits: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.threshold < 0:
            raise ValueError(f"threshold={self.threshold} must be >= 0")
        if self.bits not in range(2, 9):
            raise ValueError(f"bits={self.bits} must be between 2 and 8")

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Bool[Array, "B U nq nk"]:
        kv_len = k.shape[1]
        q, k = (
            rounded(jnp.where(jnp.asarray(real)[:, :, None, None], x, 0), self.bits)
            for x, real in ((q, blocks.q_real), (k, blocks.kv_real))
        )
        real = jnp.broadcast_to(jnp.asarray(blocks.q_real), q.shape[:2])
        kv_pos = jnp.arange(kv_len, dtype=jnp.int32)[None]
        ids = jnp.zeros(q.shape[:2], jnp.int32)
        ids, kv_ids = (ids, None) if blocks.segment_ids is None else blocks.segment_ids

        def row(at):
            index, q, real, ids = at
            first = index * self.block_q
            q_pos = first + jnp.arange(self.block_q, dtype=jnp.int32)[:, None]
            seen = self.pattern.mask_fn(q_pos, kv_pos) & real[:, :, None]
            seen = seen & jnp.asarray(blocks.kv_real)[:, None]
            if kv_ids is not None:
                seen = seen & (ids[:, :, None] == kv_ids[:, None])
            near = self.region_logits(q, k, first, blocks)
            reference = jax.nn.logsumexp(near, -1, keepdims=True)
            relative = jnp.exp(scoring.logits(q, k) - jnp.maximum(reference, -1e30))
            passes = (relative >= self.threshold) & seen[:, None]
            passes = jnp.pad(passes, ((0, 0),) * 3 + ((0, -kv_len % self.block_kv),))
            return passes.reshape(*passes.shape[:3], -1, self.block_kv).any((2, 4))

        rows = [jnp.moveaxis(scoring.blocked(x, self.block_q), 1, 0) for x in (q, real, ids)]
        kept = scoring.by_rows(
            row, (jnp.arange(rows[0].shape[0]), *rows),
            elements=q.shape[0] * q.shape[2] * self.block_q * kv_len,
        )  # fmt: skip
        return jnp.moveaxis(kept, 0, 2) | self.region_blocks(q.shape[1], kv_len)


@tiles.one_program
def rounded(x: Float[Array, "B T N H"], bits: int) -> Float[Array, "B T N H"]:
    """Each token's numbers rounded to `2 ** bits - 1` levels around 0, float32.

    >>> rounded(jnp.array([[[[-7.0, 0.4, 3.6]]]]), 4).ravel().tolist()
    [-7.0, 0.0, 4.0]
    """
    x = x.astype(jnp.float32)
    most = 2 ** (bits - 1) - 1
    scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-20) / most
    return jnp.round(x / scale) * scale


EXAMPLES = (Sale(block_q=16, block_kv=16, threshold=1.0, sink_tokens=2, window=4),)
