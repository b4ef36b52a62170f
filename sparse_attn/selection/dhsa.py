"""Single keys by the similarity of ragged chunks, which are cut where the keys change."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_attn.masks import block_mask
from sparse_attn.ops import scoring, tiles
from sparse_attn.ops.token_select import attend as select_lib
from sparse_attn.ops.token_select import lists
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dhsa(base.OwnAttention):
    """Dynamic hierarchical sparse attention: chunks of varying length score for their tokens.

    [arXiv:2510.24606] Queries and keys of a chunk are averaged and scaled by the square root of its
    length, so that long chunks of noise score as short ones do. Every query keeps the `top_k` keys
    up to itself whose chunks are most similar to its own; inside a chunk the first ones. No scores
    of pairs of tokens exist: chunks are sorted, and their tokens counted; lists have T * top_k
    numbers per head. For prefill of one document: chunks look ahead. The paper trains a small
    predictor of boundaries; here keys are cut where their means on both sides differ most, and
    `attend` takes other chunks.

    Attributes:
      top_k: keys per query and head.
      length: tokens per chunk, on average and at least.
      window: keys on each side of a boundary that are compared; no two boundaries are nearer than
        half of it.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
    >>> jax.eval_shape(Dhsa(top_k=12, length=8, window=4).attend, q, k, v).shape
    (1, 64, 2, 8)
    """

    looks_ahead = True

    block_q: int = 1
    block_kv: int = 1
    always: patterns_base.Pattern | None = None
    top_k: int = 2048
    length: int = 32
    window: int = 8

    def __post_init__(self):
        super().__post_init__()
        for name in ("top_k", "length", "window"):
            patterns_base.check_int(name, getattr(self, name))
        self._check_fixed(block_q=1, block_kv=1, always=None, pattern=base.CAUSAL)

    def at_most(self, q_len: int, kv_len: int | None = None) -> block_mask.BlockMask:
        """A window with as many keys as a query keeps, for counting."""
        return base.window_of(self.top_k, q_len, kv_len)

    @tiles.one_program
    def chunks(self, k: Float[Array, "B S K H"]) -> Int[Array, "B S"]:
        """The chunk of each key: 0, 1, ..., at most `S / length` of them.

        >>> k = jnp.repeat(jnp.array([1.0, -1.0, 1.0]), jnp.array([5, 2, 5]))[None, :, None, None]
        >>> Dhsa(length=4, window=2).chunks(k)[0].tolist()
        [0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
        """
        batch, count = k.shape[:2]
        x = jax.lax.stop_gradient(k).reshape(batch, count, -1).astype(jnp.float32)
        sums = jnp.pad(jnp.cumsum(x, 1), ((0, 0), (1, 0), (0, 0)))
        at = np.arange(count)
        low, high = np.maximum(at - self.window, 0), np.minimum(at + self.window, count)
        sizes = at - low, high - at
        before, after = (
            (sums[:, b] - sums[:, a]) / np.maximum(n, 1)[:, None]
            for a, b, n in zip((low, at), (at, high), sizes, strict=True)
        )
        # What a cut takes off the sum of squares, which says less near the ends of a row.
        change = ((before - after) ** 2).sum(-1) * (sizes[0] * sizes[1] / (sizes[0] + sizes[1]))
        reach = self.window // 2
        around = jax.lax.reduce_window(
            change, -jnp.inf, jax.lax.max, (1, 2 * reach + 1), (1, 1), ((0, 0), (reach, reach))
        )
        peak = (change == around) & (at > 0)
        cuts = scoring.top_k(change, self._count(count) - 1, peak)
        return jnp.cumsum(cuts, 1, dtype=jnp.int32)

    @tiles.one_program
    def lists(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        chunks: Int[Array, "B T"] | None = None,
    ) -> Int[Array, "B T N m"]:
        """The keys of each query, -1 = none; `chunks` as the method of this name gives them."""
        q, k = jax.lax.stop_gradient((q, k))
        chunks = self.chunks(k) if chunks is None else chunks
        count, heads = self._count(k.shape[1]), q.shape[2]
        scores = scoring.logits(scaled_means(q, chunks, count), scaled_means(k, chunks, count))
        order = jnp.argsort(-scores, axis=-1, stable=True).astype(jnp.int32)
        sizes = jax.nn.one_hot(chunks, count, dtype=jnp.int32).sum(1)
        starts = jnp.cumsum(sizes, 1) - sizes
        wanted = jnp.arange(min(self.top_k, k.shape[1]), dtype=jnp.int32)

        def row(order, start, size, position):
            """The keys of one query: chunks in `order`, each as far as the query sees it."""
            start, seen = start[order], jnp.clip(position + 1 - start, 0, size)[order]
            ends = jnp.cumsum(seen)
            at = jnp.minimum(jnp.searchsorted(ends, wanted, side="right"), count - 1)
            key = start[at] + wanted - (ends - seen)[at]
            return jnp.where(wanted < ends[-1], key, -1)

        def choose(positions, mine):
            by_head = jax.vmap(row, in_axes=(0, None, None, None))  # [N, count]
            by_query = jax.vmap(by_head, in_axes=(1, None, None, 0))
            by_entry = jax.vmap(
                lambda order, start, size, mine: by_query(order[:, mine], start, size, positions)
            )
            return by_entry(order, starts, sizes, mine)

        elements = q.shape[0] * heads * max(count, wanted.size)
        return lists.by_queries(choose, chunks, elements=elements)

    @tiles.one_program
    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K Hv"],
        *,
        chunks: Int[Array, "B T"] | None = None,
        return_lse: bool = False,
        impl: str = "xla",
    ) -> Any:
        """Exact attention to the keys of `lists`, by a backend of `ops.token_select`."""
        return select_lib.attend(
            q, k, v, selected=self.lists(q, k, chunks), block=1, return_lse=return_lse, impl=impl
        )

    def _count(self, length):
        return max(1, length // self.length)


@tiles.one_program
def scaled_means(
    x: Float[Array, "B T N H"], chunks: Int[Array, "B T"], count: int
) -> Float[Array, "B n N H"]:
    """The mean of each chunk times the square root of its length; 0 for chunks without tokens.

    >>> x = jnp.array([1.0, 1, 1, 1, 5]).reshape(1, 5, 1, 1)
    >>> scaled_means(x, jnp.array([[0, 0, 0, 0, 1]]), 2).ravel().tolist()
    [2.0, 5.0]
    """
    member = jax.nn.one_hot(chunks, count)
    sums = jnp.einsum("BTn,BTNH->BnNH", member, x.astype(jnp.float32), precision="highest")
    return sums * jax.lax.rsqrt(jnp.maximum(member.sum(1), 1))[..., None, None]


EXAMPLES = (Dhsa(top_k=12, length=8, window=4),)
