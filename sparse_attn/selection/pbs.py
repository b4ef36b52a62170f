"""Blocks of keys that are sorted inside segments, so that heavy keys share a block."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import chunked
from sparse_attn.selection import base, pooled, vertical_slash


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reordered(base.OwnAttention):
    """A rule that moves tokens by their content; it looks ahead and runs on one document."""

    looks_ahead: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pbs(Reordered):
    """Keys sorted inside segments by the attention of the last queries, then pooled blocks.

    Permuted block-sparse attention [arXiv:2510.21270], training-free, for causal prefill.
    Every query head sorts the keys of each segment by their weight for the last block of queries,
    heaviest first; blocks of sorted keys of earlier segments are chosen by pooled scores for each
    block of queries. A query's own segment is attended to in its original order, all of it, so
    causality needs no positions of moved keys; both parts merge exactly. Blocks are counted beside
    the own segment.

    Attributes:
      segment: keys that are sorted together; block_q divides it, and so does block_kv.
      top_k, top_p: budget in blocks of earlier segments, as in `pooled`; exactly one of them.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
    >>> rule = Pbs(block_q=8, block_kv=8, segment=16, top_k=2)
    >>> jax.eval_shape(rule.attend, q, k, v).shape
    (1, 64, 2, 8)
    """

    always: patterns_base.Pattern | None = None
    segment: int = 256
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        super().__post_init__()
        patterns_base.check_int("segment", self.segment)
        for name in ("block_q", "block_kv"):
            if self.segment % getattr(self, name):
                raise ValueError(
                    f"segment={self.segment} must be a multiple of {name}={getattr(self, name)}"
                )
        if self.pattern != base.CAUSAL or self.always is not None:
            raise ValueError(
                f"pattern={self.pattern.expression()} must be causal(), and always None"
            )
        _ = self.blocks_rule

    @property
    def blocks_rule(self) -> pooled.Pooled:
        """The choice among blocks of sorted keys."""
        earlier = self.pattern & ~chunked.Chunked(size=self.segment)
        return pooled.Pooled(
            block_q=self.block_q, block_kv=self.block_kv, pattern=earlier, always=None,
            top_k=self.top_k, top_p=self.top_p,
        )  # fmt: skip

    @tiles.one_program
    def key_order(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]
    ) -> Int[Array, "B N S"]:
        """The key at each place: a permutation inside every segment; ties keep their order."""
        shares = vertical_slash.probe(self, q, k, self.block_q).sum(2)
        segment = np.arange(k.shape[1]) // self.segment
        return jnp.lexsort((-shares, jnp.broadcast_to(segment, shares.shape)))

    @tiles.one_program
    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        *,
        key_order: Int[Array, "B N S"] | None = None,
        return_lse: bool = False,
        impl: str | None = None,
    ) -> Any:
        """Sorts, selects and attends; the output is in the order of q.

        Args:
          key_order: another permutation of the keys inside segments; None = `key_order`.
        """
        if key_order is None:
            key_order = self.key_order(*jax.lax.stop_gradient((q, k)))
        own = chunked.Chunked(size=self.segment)
        near = attend_lib.attend(q, k, v, mask=own, return_lse=True, impl=impl)
        folded = fold(q), *(moved(x, key_order, q.shape[2]) for x in (k, v))
        mask = self.blocks_rule.select(*folded[:2])
        far = attend_lib.attend(*folded, mask=mask, return_lse=True, impl=impl)
        far = tuple(unfold(x, q.shape[0]) for x in far)
        out, lse = attend_lib.merge_lse([near, far])
        return (out, lse) if return_lse else out


def fold(x: Array) -> Array:
    """`[B, T, N, ...]` as `[B * N, T, 1, ...]`: heads that have orders of their own.

    >>> fold(jnp.zeros((2, 5, 3, 4))).shape
    (6, 5, 1, 4)
    """
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(-1, x.shape[2], 1, *x.shape[3:])


def unfold(x: Array, batch: int) -> Array:
    """The inverse of `fold`.

    >>> unfold(jnp.zeros((6, 5, 1, 4)), 2).shape
    (2, 5, 3, 4)
    """
    return jnp.moveaxis(x.reshape(batch, -1, x.shape[1], *x.shape[3:]), 1, 2)


@tiles.one_program
def moved(x: Array, order: Int[Array, "B N S"], heads: int) -> Array:
    """`fold(x)` for `heads` query heads, with the token `order[..., i]` at place i.

    >>> x = jnp.arange(3.0).reshape(1, 3, 1, 1)
    >>> moved(x, jnp.array([[[2, 0, 1]]]), 1).ravel().tolist()
    [2.0, 0.0, 1.0]
    """
    x = fold(jnp.repeat(x, heads // x.shape[2], 2))
    return jnp.take_along_axis(x, order.reshape(-1, order.shape[-1])[..., None, None], 1)


EXAMPLES = (Pbs(block_q=8, block_kv=8, segment=16, top_k=2),)
