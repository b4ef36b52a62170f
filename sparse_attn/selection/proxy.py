"""Blocks by the exact scores of a few averaged heads, as many as each head needs."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_attn.ops import scoring, tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base, vertical_slash


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proxy(base.Selector):
    """One ranking of blocks per group of heads, and a budget of its own for each head.

    ProxyAttn [arXiv:2509.24745]: queries and keys are averaged over groups of heads, not
    along the sequence; the score of a block is the largest logit of its visible pairs of tokens.
    The budget of a head is the part of the blocks that it needs for `gamma` of its exact mass in
    the last block of queries, in the order of the shared ranking; the other rows of blocks take
    the same part of theirs. Training-free, for prefill: the budgets look ahead. The paper's
    sampling of queries inside blocks is left out: all of them count.

    Attributes:
      group: consecutive query heads per proxy; it divides their number.
      gamma: part of the exact mass of the last block that sets the budget; 1 = all blocks.

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 4, 8))
    >>> jax.eval_shape(Proxy(block_q=16, block_kv=16, group=2, gamma=0.7).select, q, k).num_tables
    4
    """

    group: int = 4
    gamma: float = 0.95

    looks_ahead = True

    def __post_init__(self):
        super().__post_init__()
        patterns_base.check_int("group", self.group)
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma} must be > 0 and <= 1")

    @tiles.one_program
    def proxies(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]
    ) -> tuple[Float[Array, "B T P H"], Float[Array, "B S P H"]]:
        """Queries and keys averaged over each group of heads.

        Raises:
          ValueError: `group` does not divide the number of query heads.
        """
        heads = q.shape[2]
        if heads % self.group:
            raise ValueError(f"group={self.group} must divide the {heads} query heads")
        k = jnp.repeat(k, heads // k.shape[2], 2)
        return tuple(
            x.reshape(*x.shape[:2], -1, self.group, x.shape[3]).astype(jnp.float32).mean(3)
            for x in (q, k)
        )

    @tiles.one_program
    def block_maxima(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]
    ) -> Float[Array, "B P nq nk"]:
        """The largest scaled logit of the visible pairs of each block; -inf where there is none."""
        proxy_q, proxy_k = self.proxies(q, k)
        kv_pos = jnp.arange(k.shape[1], dtype=jnp.int32)[None]

        def row(at):
            index, q_row = at
            q_pos = index * self.block_q + jnp.arange(self.block_q, dtype=jnp.int32)[:, None]
            seen = self.pattern.mask_fn(q_pos, kv_pos) & (q_pos < q.shape[1])
            logits = jnp.where(seen, scoring.logits(q_row, proxy_k), -jnp.inf)
            extra = ((0, 0),) * 3 + ((0, -k.shape[1] % self.block_kv),)
            logits = jnp.pad(logits, extra, constant_values=-jnp.inf)
            return logits.reshape(*logits.shape[:3], -1, self.block_kv).max((2, 4))

        by_row = jnp.moveaxis(scoring.blocked(proxy_q, self.block_q), 1, 0)
        elements = q.shape[0] * proxy_q.shape[2] * self.block_q * k.shape[1]
        rows = scoring.by_rows(row, (jnp.arange(by_row.shape[0]), by_row), elements=elements)
        return jnp.moveaxis(rows, 0, 2)

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Bool[Array, "B U nq nk"]:
        scores = jnp.repeat(self.block_maxima(q, k), self.group, 1)
        last = q.shape[1] - (q.shape[1] - 1) // self.block_q * self.block_q
        share = vertical_slash.probe(self, q, k, last).mean(2)
        share = jnp.pad(share, ((0, 0), (0, 0), (0, -k.shape[1] % self.block_kv)))
        share = share.reshape(*share.shape[:2], -1, self.block_kv).sum(-1)
        candidates = blocks.candidates[..., -1, :]
        key = jnp.where(candidates, jnp.maximum(scores[..., -1, :], -1e30), -jnp.inf)
        ordered = jnp.take_along_axis(share, jnp.argsort(-key, axis=-1, stable=True), -1)
        needed = 1 + (jnp.cumsum(ordered, -1) < self.gamma).sum(-1)
        part = jnp.minimum(needed / jnp.maximum(candidates.sum(-1), 1), 1.0)
        part = jnp.where(self.gamma == 1, 1.0, part)
        budget = jnp.ceil(part[..., None] * blocks.candidates.sum(-1) - 1e-4)
        return scoring.top_k(scores, budget[..., None], blocks.candidates)


EXAMPLES = (Proxy(block_q=16, block_kv=8, group=2, gamma=0.6),)
