"""Single columns of keys, by their distance from the largest score of sinks and window."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparse_attn.ops import scoring, tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import local, sinks
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorRegion(base.Selector):
    """A rule that compares scores with those of the first keys and the last ones.

    Attributes:
      sink_tokens: first keys of the region; kept for every query.
      window: last keys of the region, the query's own included; kept likewise.
    """

    sink_tokens: int = 128
    window: int = 128

    def __post_init__(self):
        super().__post_init__()
        patterns_base.check_int("sink_tokens", self.sink_tokens, least=0)
        patterns_base.check_int("window", self.window)

    @property
    def region(self) -> patterns_base.Pattern:
        """The keys that the scores are compared with."""
        near = local.Local(window=self.window)
        return near | sinks.Sinks(tokens=self.sink_tokens) if self.sink_tokens else near

    def region_blocks(self, q_len: int, kv_len: int) -> Bool[np.ndarray, "nq nk"]:
        """Blocks with a pair of the region."""
        return self._states(q_len, kv_len, self.region) != patterns_base.EMPTY

    @tiles.one_program
    def region_logits(
        self,
        q: Float[Array, "B t N H"],
        k: Float[Array, "B S K H"],
        first: Array,
        blocks: base.Blocks,
    ) -> Float[Array, "B N t R"]:
        """Scaled logits of `t` queries from place `first` on, with the keys of the region alone.

        -inf for keys of the region that a query does not see. `R = sink_tokens + t + window - 1`.
        """
        length, kv_len = q.shape[1], k.shape[1]
        near = first - self.window + 1 + jnp.arange(length + self.window - 1)
        at = jnp.concatenate([jnp.arange(min(self.sink_tokens, kv_len)), near]).astype(jnp.int32)
        inside = (at >= 0) & (at < kv_len)
        # A sink that the window reaches is counted once, as a sink.
        inside &= (jnp.arange(len(at)) < self.sink_tokens) | (at >= self.sink_tokens)
        place = jnp.clip(at, 0, kv_len - 1)
        q_pos = (first + jnp.arange(length, dtype=jnp.int32))[:, None]
        allowed = (self.pattern & self.region).mask_fn(q_pos, place[None]) & inside
        real = jnp.broadcast_to(jnp.asarray(blocks.kv_real), (q.shape[0], kv_len))[:, place]
        seen = allowed & real[:, None]
        if blocks.segment_ids is not None:
            q_ids, kv_ids = blocks.segment_ids
            own = jnp.take(q_ids, jnp.clip(q_pos[:, 0], 0, q_ids.shape[1] - 1), axis=1)
            seen = seen & (own[:, :, None] == kv_ids[:, place][:, None])
        return jnp.where(seen[:, None], scoring.logits(q, k[:, place]), -jnp.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anchor(AnchorRegion):
    """Stripes: keys whose pooled score is at most `theta` below the anchor; training-free.

    [arXiv:2505.23520] The anchor of a query is its largest exact score in the region of
    the first keys and its window. Queries and anchors are averaged over each block of queries; a
    key is kept for the block where the mean anchor less the score of the mean query is at most
    `theta`, so `theta` and not a count decides how much is seen. Blocks of keys are single keys
    (block_kv = 1), at most T * S / block_q entries in the lists of a head; with larger ones, a
    block is kept for its best key.

    Attributes:
      theta: largest distance below the anchor, in logits (scaled by `H ** -0.5`).

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> rule = Anchor(block_q=16, theta=-9.0, sink_tokens=2, window=1)  # the region alone
    >>> rule.select(q, k).kv_counts[0, 0].tolist()
    [16, 18, 18, 18]
    """

    block_kv: int = 1
    theta: float = 12.0

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Bool[Array, "B U nq nk"]:
        real = jnp.broadcast_to(jnp.asarray(blocks.q_real), q.shape[:2])
        rows = -(-q.shape[1] // self.block_q)
        k = jnp.where(jnp.asarray(blocks.kv_real)[:, :, None, None], k, 0)

        def anchor(at):
            index, q, real = at
            largest = self.region_logits(q, k, index * self.block_q, blocks).max(-1)
            there = real[:, None] & (largest > -jnp.inf)
            sums = jnp.where(there, largest, 0).sum(-1)
            return sums / jnp.maximum(there.sum(-1), 1)

        by_row = (
            jnp.arange(rows),
            jnp.moveaxis(scoring.blocked(q, self.block_q), 1, 0),
            jnp.moveaxis(scoring.blocked(real, self.block_q), 1, 0),
        )
        width = self.sink_tokens + self.block_q + self.window
        anchors = scoring.by_rows(
            anchor, by_row, elements=q.shape[0] * q.shape[2] * self.block_q * width
        )
        score = scoring.logits(scoring.pool(q, self.block_q, blocks.q_real), k)
        close = jnp.moveaxis(anchors, 0, 2)[..., None] - score <= self.theta
        extra = -close.shape[-1] % self.block_kv
        close = jnp.pad(close, ((0, 0),) * 3 + ((0, extra),))
        close = close.reshape(*close.shape[:3], -1, self.block_kv).any(-1)
        return close | self.region_blocks(q.shape[1], k.shape[1])


EXAMPLES = (Anchor(block_q=16, theta=2.0, sink_tokens=2, window=4),)
