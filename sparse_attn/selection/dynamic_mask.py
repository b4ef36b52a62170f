"""The keys with the best learned scores so far, which come from their values."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_attn.masks import block_mask
from sparse_attn.ops import best_keys, tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicMask(base.OwnAttention):
    """Dynamic mask attention: `top_k` keys per query by a score of their own.  [arXiv:2508.02124]

    A key has one score per KV head, `decay * softplus(values @ step)`, from the values of all KV
    heads. Each query takes the `top_k` keys up to itself with the highest scores, which are also
    added to its logits, so that attention trains them. Causal, for layers that are trained with it;
    a layer holds `decay` and `step` among its parameters. With as many keys as tokens and a decay
    of 0 it is dense attention.

    Attributes:
      top_k: keys of a query.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
    >>> rule = DynamicMask(top_k=8)
    >>> jax.eval_shape(rule.attend, q, k, v, params=rule.params_like(2, 2, 8)).shape
    (1, 64, 2, 8)
    """

    block_q: int = 1
    block_kv: int = 1
    always: patterns_base.Pattern | None = None
    top_k: int = 2048

    def __post_init__(self):
        super().__post_init__()
        patterns_base.check_int("top_k", self.top_k)
        self._check_fixed(block_q=1, block_kv=1, always=None, pattern=base.CAUSAL)

    def params_like(
        self, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> dict[str, np.ndarray]:
        # Scores that differ from the start, or all queries would see the first keys.
        step = np.random.default_rng(0).standard_normal((num_kv_heads, head_dim, num_kv_heads))
        step = (step / np.sqrt(num_kv_heads * head_dim)).astype(np.float32)
        return {"decay": np.ones(num_kv_heads, np.float32), "step": step}

    def at_most(self, q_len: int, kv_len: int | None = None) -> block_mask.BlockMask:
        """A window with as many keys as a query keeps, for counting."""
        return base.window_of(self.top_k, q_len, kv_len)

    @tiles.one_program
    def scores(self, v: Float[Array, "B T K Hv"], params: dict[str, Any]) -> Float[Array, "B T K"]:
        """The score of each key, float32."""
        steps = jnp.einsum(
            "BTKH,KHM->BTM", v.astype(jnp.float32), params["step"], precision="highest"
        )
        return params["decay"] * jax.nn.softplus(steps)

    @tiles.one_program
    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K Hv"],
        *,
        params: dict[str, Any],
        segment_ids: Int[Array, "B T"] | None = None,
        block: int = 128,
    ) -> Float[Array, "B T N Hv"]:
        """Scores, chooses and attends; differentiable in all arrays.

        Args:
          params: `decay [K]` and `step [K, Hv, K]`.
          segment_ids: packed documents, runs of equal ids; 0 = padding.
          block: queries at a time; the result does not depend on it.
        """
        return best_keys.attend(
            q, k, v, scores=self.scores(v, params), keep=min(self.top_k, k.shape[1]),
            segment_ids=segment_ids, block=min(block, q.shape[1]),
        )  # fmt: skip


EXAMPLES = (DynamicMask(top_k=8),)
