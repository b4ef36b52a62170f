"""The blocks with most exact mass, from the log-sum-exp of dense attention; budgets per head."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparse_attn.ops import scoring, tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaSpa(base.BlockScores):
    """The oracle of block masks: exact mass per block, at the cost of dense scores.

    [arXiv:2502.21079] In video diffusion a mask is found at a few denoising steps and
    kept for those after: call `select` at these and pass the mask to `attend` at the others.
    `reallocate` gives heads that need more blocks those that others can spare. Scores are made one
    row of blocks at a time.

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> AdaSpa(block_q=16, block_kv=16, top_k=2).select(q, k).kv_counts[0, 0].tolist()
    [2, 2, 2, 2]
    """

    pattern: patterns_base.Pattern = base.EVERYTHING
    always: patterns_base.Pattern | None = None

    @tiles.one_program
    def masses(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        lse: Float[Array, "B T N"] | None = None,
        blocks: base.Blocks | None = None,
    ) -> Float[Array, "B N nq nk"]:
        """Sum of the attention weights of each block, divided by the queries of its row.

        Args:
          lse: log-sum-exp of each query as `attend` returns it, perhaps of an earlier step; None =
            that of these queries and keys.

        >>> x = jnp.zeros((1, 4, 1, 2))
        >>> AdaSpa(block_q=2, block_kv=2, top_k=1).masses(x, x)[0, 0].tolist()
        [[0.5, 0.5], [0.5, 0.5]]
        """
        (batch, q_len, heads, _), kv_len = q.shape, k.shape[1]
        if blocks is None:
            blocks = self._blocks(self._states(q_len, kv_len), q, k, None, None)
        kv_real = jnp.asarray(blocks.kv_real)
        k = jnp.where(kv_real[:, :, None, None], k, 0)
        q = jnp.where(jnp.asarray(blocks.q_real)[:, :, None, None], q, 0)
        real = jnp.broadcast_to(jnp.asarray(blocks.q_real), (batch, q_len))
        ids = jnp.zeros((batch, q_len), jnp.int32)
        ids, kv_ids = (ids, None) if blocks.segment_ids is None else blocks.segment_ids
        known = lse is not None
        lse = jnp.zeros((batch, q_len, heads)) if lse is None else lse
        kv_pos = jnp.arange(kv_len, dtype=jnp.int32)[None]

        def row(at):
            index, q, real, ids, lse = at
            q_pos = index * self.block_q + jnp.arange(self.block_q, dtype=jnp.int32)[:, None]
            seen = self.pattern.mask_fn(q_pos, kv_pos) & real[:, :, None] & kv_real[:, None]
            if kv_ids is not None:
                seen = seen & (ids[:, :, None] == kv_ids[:, None])
            logits = scoring.logits(q, k)
            if known:
                lse = jnp.moveaxis(lse, 1, 2)[..., None]
                weights = jnp.where(seen[:, None], jnp.exp(logits - jnp.maximum(lse, -1e30)), 0)
            else:
                weights = jnp.where(seen[:, None], scoring.mass(logits, seen[:, None]), 0)
            weights = jnp.pad(weights, ((0, 0),) * 3 + ((0, -kv_len % self.block_kv),))
            sums = weights.reshape(*weights.shape[:3], -1, self.block_kv).sum((2, 4))
            return sums / jnp.maximum(real.sum(-1), 1)[:, None, None]

        rows = [jnp.moveaxis(scoring.blocked(x, self.block_q), 1, 0) for x in (q, real, ids, lse)]
        sums = scoring.by_rows(
            row, (jnp.arange(rows[0].shape[0]), *rows),
            elements=batch * heads * self.block_q * kv_len,
        )  # fmt: skip
        return jnp.moveaxis(sums, 0, 2)

    def scores(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Float[Array, "B N nq nk"]:
        return jnp.log(self.masses(q, k, blocks=blocks))


def reallocate(masses: Float[Array, "B N nq nk"], top_k: int, *, step: int = 1) -> tuple[int, ...]:
    """Blocks per row for each head, `top_k` on average: more where the recall is low.

    Heads are ordered by their recall with `top_k` blocks (ties by index); as many of the best ones
    give `step` blocks as of the worst ones take them, wherever the sum of the two recalls grows.
    [arXiv:2502.21079]

    Raises:
      ValueError: `top_k` or `step` is no int >= 1.

    >>> peaked, flat = jnp.array([0.97, 0.01, 0.01, 0.01]), jnp.full(4, 0.25)
    >>> reallocate(jnp.stack([peaked, flat])[None, :, None], 2)
    (1, 3)
    """
    patterns_base.check_int("top_k", top_k)
    patterns_base.check_int("step", step)
    ordered = np.sort(np.asarray(masses, np.float64), -1)[..., ::-1]
    recall = np.cumsum(ordered, -1).mean((0, 2))  # [N, nk], for 1 .. nk blocks
    heads, most = recall.shape
    budgets = np.full(heads, top_k)
    order = np.argsort(-recall[:, min(top_k, most) - 1], kind="stable")
    for rich, poor in zip(order[: heads // 2], order[::-1], strict=False):
        less, more = top_k - step, min(top_k + step, most)
        if less < 1 or more != top_k + step:
            continue
        before = recall[rich, top_k - 1] + recall[poor, top_k - 1]
        if recall[rich, less - 1] + recall[poor, more - 1] > before:
            budgets[rich], budgets[poor] = less, more
    return tuple(int(x) for x in budgets)


EXAMPLES = (AdaSpa(block_q=16, block_kv=16, top_k=2),)
