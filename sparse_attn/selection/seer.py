"""Blocks by a small gate that learns the block-wise maxima of dense attention."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparse_attn.ops import scoring, tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seer(base.BlockScores):
    """Pooled queries and keys through linear maps per head, trained by distillation.

    [arXiv:2410.13276] Queries are averaged over each block; means, maxima and minima of
    keys are concatenated. The gate sees q and k as attention does, rotated where a layer rotates
    them (the paper pools before the rotation and rotates by block). Its maps start as the identity
    on the means, so an untrained gate is `pooled`. Train it with `distillation_loss`: attention
    itself sends no gradient through a choice. A layer holds the gate among its parameters.

    Attributes:
      gate_dim: width of the mapped queries and keys; None = the head dimension.

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> rule = Seer(block_q=16, block_kv=16, top_k=1)
    >>> gate = rule.params_like(num_heads=2, num_kv_heads=2, head_dim=8)
    >>> rule.select(q, k, params=gate).kv_counts[0, 0].tolist()
    [1, 2, 2, 2]
    """

    gate_dim: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.gate_dim is not None:
            patterns_base.check_int("gate_dim", self.gate_dim)

    def params_like(
        self, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> dict[str, np.ndarray]:
        width = head_dim if self.gate_dim is None else self.gate_dim
        # Wider than the heads, the rest starts at 0; narrower, the gate sees the first dimensions.
        identity = np.eye(head_dim, width, dtype=np.float32)
        of_keys = np.concatenate([identity, np.zeros((2 * head_dim, width), np.float32)])
        return {
            "gate_query": np.tile(identity, (num_heads, 1, 1)),
            "gate_key": np.tile(of_keys, (num_kv_heads, 1, 1)),
        }

    def scores(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Float[Array, "B N nq nk"]:
        queries = scoring.pool(q, self.block_q, blocks.q_real)
        keys = _three_pools(k, self.block_kv, blocks.kv_real)
        queries = jnp.einsum("BTNH,NHD->BTND", queries, blocks.params["gate_query"])
        keys = jnp.einsum("BSKH,KHD->BSKD", keys, blocks.params["gate_key"])
        # The scale of the untrained gate is that of attention, whatever the width.
        return scoring.logits(queries, keys, q.shape[-1] ** -0.5)

    @tiles.one_program
    def distillation_loss(
        self,
        params: dict[str, Any],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
    ) -> Float[Array, ""]:
        """Mean KL divergence from the block-wise maxima of attention to the gate.

        Its gradient reaches the gate alone: q and k are constants. Memory as `max_pooled`.

        >>> import jax
        >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
        >>> rule = Seer(block_q=16, block_kv=16, top_k=1)
        >>> gate = rule.params_like(num_heads=2, num_kv_heads=2, head_dim=8)
        >>> bool(rule.distillation_loss(gate, q, k) > 0)
        True
        """
        q, k = jax.lax.stop_gradient((q, k))
        states = self._states(q.shape[1], k.shape[1])
        blocks = self._blocks(states, q, k, None, params)
        target = max_pooled(self, q, k)
        target = target / jnp.maximum(target.sum(-1, keepdims=True), 1e-30)
        scores = jnp.where(blocks.candidates, self.scores(q, k, blocks), -jnp.inf)
        gate = jnp.where(target > 0, jax.nn.log_softmax(scores), 0)
        log_target = jnp.log(jnp.where(target > 0, target, 1))
        return (target * (log_target - gate)).sum(-1).mean()


@tiles.one_program
def max_pooled(
    rule: base.Selector, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]
) -> Float[Array, "B N nq nk"]:
    """The largest dense attention weight of each block, one row of blocks after the other.

    The largest array has `B * N * block_q * S` numbers.

    >>> x = jnp.zeros((1, 4, 1, 2))
    >>> max_pooled(Seer(block_q=4, block_kv=2, top_k=1), x, x)[0, 0].tolist()
    [[1.0, 0.33...]]
    """
    q_len, kv_len, block = q.shape[1], k.shape[1], rule.block_kv
    kv_pos = jnp.arange(kv_len, dtype=jnp.int32)[None]
    q = jnp.moveaxis(scoring.blocked(q, rule.block_q), 1, 0)

    def row(at):
        index, q = at
        q_pos = index * rule.block_q + jnp.arange(rule.block_q, dtype=jnp.int32)[:, None]
        seen = rule.pattern.mask_fn(q_pos, kv_pos) & (q_pos < q_len)
        weights = scoring.mass(scoring.logits(q, k), seen)
        weights = jnp.pad(weights, ((0, 0),) * 3 + ((0, -kv_len % block),))
        return weights.reshape(*weights.shape[:3], -1, block).max((2, 4))

    elements = q.shape[1] * q.shape[3] * rule.block_q * kv_len
    rows = scoring.by_rows(row, (jnp.arange(q.shape[0]), q), elements=elements)
    return jnp.moveaxis(rows, 0, 2)


def _three_pools(k, block, real):
    """Means, maxima and minima over the real tokens of each block, `[B, n, K, 3H]`."""
    there = scoring.blocked(jnp.asarray(real), block)[..., None, None]
    tokens = scoring.blocked(k.astype(jnp.float32), block)
    largest = jnp.max(tokens, axis=2, where=there, initial=-jnp.inf)
    smallest = jnp.min(tokens, axis=2, where=there, initial=jnp.inf)
    some = there.any(2)
    extremes = (jnp.where(some, x, 0) for x in (largest, smallest))
    return jnp.concatenate([scoring.pool(k, block, real), *extremes], -1)


EXAMPLES = (
    Seer(block_q=16, block_kv=16, top_k=2),
    Seer(block_q=16, block_kv=8, threshold=0.2, gate_dim=4),
)
