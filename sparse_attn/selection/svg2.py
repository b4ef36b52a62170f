"""Clusters of queries and of keys by content, and the pairs of them with most mass."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparse_attn.masks import block_mask
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import scoring, tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base, pbs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Svg2(pbs.Reordered):
    """Sparse VideoGen2: tokens sorted by k-means cluster, pairs of clusters down to a mass.

    [arXiv:2505.18875] Per head, queries and keys are clustered each for themselves, and
    sorted so that clusters are contiguous. A pair of clusters has the estimated mass
    `size(keys) * exp(centroid . centroid / sqrt(H))`; each cluster of queries keeps the smallest
    set with the part `top_p`. Blocks of fixed size stand for the paper's variable ones: a block
    that a kept pair touches is kept whole, so that more is seen, never less. Training-free, not
    causal. Pass `starts` of one denoising step to the next as the paper does.

    Attributes:
      q_clusters, kv_clusters: clusters per head.
      top_p: part of the estimated mass that each cluster of queries keeps; 1 = all.
      iterations: of Lloyd's algorithm, from evenly spaced tokens.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
    >>> rule = Svg2(block_q=8, block_kv=8, q_clusters=4, kv_clusters=4, top_p=0.5)
    >>> jax.eval_shape(rule.attend, q, k, v).shape
    (1, 64, 2, 8)
    """

    pattern: patterns_base.Pattern = base.EVERYTHING
    always: patterns_base.Pattern | None = None
    q_clusters: int = 100
    kv_clusters: int = 500
    top_p: float = 0.9
    iterations: int = 5

    def __post_init__(self):
        super().__post_init__()
        for name in ("q_clusters", "kv_clusters", "iterations"):
            patterns_base.check_int(name, getattr(self, name))
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be > 0 and <= 1")
        if self.pattern != base.EVERYTHING or self.always is not None:
            raise ValueError(f"pattern={self.pattern.expression()} must be full(), and always None")

    @tiles.one_program
    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        starts: tuple[Array, Array] | None = None,
    ) -> tuple[Int[Array, "B N T"], Int[Array, "B N S"], block_mask.BlockMask, tuple[Array, Array]]:
        """The query and the key at each place, the mask of blocks of places, and the centroids."""
        heads = q.shape[2]
        q, k = pbs.fold(q), pbs.fold(jnp.repeat(k, heads // k.shape[2], 2))
        tokens = [x[:, :, 0].astype(jnp.float32) for x in (q, k)]
        counts = (self.q_clusters, self.kv_clusters)
        starts = (None, None) if starts is None else starts
        (q_ids, q_means), (kv_ids, kv_means) = (
            k_means(x, min(n, x.shape[1]), self.iterations, start)
            for x, n, start in zip(tokens, counts, starts, strict=True)
        )
        q_sizes, kv_sizes = (
            jax.nn.one_hot(ids, means.shape[1]).sum(1)
            for ids, means in ((q_ids, q_means), (kv_ids, kv_means))
        )
        logits = jnp.einsum("bch,bdh->bcd", q_means, kv_means) * q.shape[-1] ** -0.5
        logits = logits + jnp.log(jnp.maximum(kv_sizes, 1e-30))[:, None]
        kept = scoring.top_p(logits, self.top_p, (kv_sizes > 0)[:, None])
        kept = kept & (q_sizes > 0)[..., None]
        q_order, kv_order = (jnp.argsort(x, axis=-1, stable=True) for x in (q_ids, kv_ids))
        grid = _touched(
            kept,
            _ranges(jnp.take_along_axis(q_ids, q_order, 1), self.block_q),
            _ranges(jnp.take_along_axis(kv_ids, kv_order, 1), self.block_kv),
        )
        mask = block_mask.from_block_states(
            jnp.where(grid, patterns_base.FULL, patterns_base.EMPTY)[:, None],
            rule=self.pattern, q_len=q.shape[1], kv_len=k.shape[1],
            block_q=self.block_q, block_kv=self.block_kv,
        )  # fmt: skip
        q_order, kv_order = (x.reshape(-1, heads, x.shape[-1]) for x in (q_order, kv_order))
        return q_order, kv_order, mask, (q_means, kv_means)

    @tiles.one_program
    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        *,
        starts: tuple[Array, Array] | None = None,
        return_lse: bool = False,
        impl: str | None = None,
    ) -> Any:
        """Clusters, sorts, selects and attends; the output is in the order of q."""
        q_order, kv_order, mask, _ = self.plan(*jax.lax.stop_gradient((q, k)), starts)
        heads = q.shape[2]
        out, lse = attend_lib.attend(
            pbs.moved(q, q_order, heads),
            *(pbs.moved(x, kv_order, heads) for x in (k, v)),
            mask=mask, return_lse=True, impl=impl,
        )  # fmt: skip
        out, lse = (back(x, q_order) for x in (out, lse))
        return (out, lse) if return_lse else out


@tiles.one_program
def back(x: Array, order: Int[Array, "B N T"]) -> Array:
    """Undoes `pbs.moved`: `[B * N, T, 1, ...]` in sorted places as `[B, T, N, ...]` in order.

    >>> back(jnp.array([2.0, 0.0, 1.0]).reshape(1, 3, 1), jnp.array([[[2, 0, 1]]])).ravel().tolist()
    [0.0, 1.0, 2.0]
    """
    inverse = jnp.argsort(order.reshape(-1, order.shape[-1]), axis=-1)
    x = jnp.take_along_axis(x, inverse.reshape(*inverse.shape, *(1,) * (x.ndim - 2)), 1)
    return pbs.unfold(x, order.shape[0])


@tiles.one_program
def k_means(
    x: Float[Array, "M T H"], clusters: int, iterations: int, start: Array | None = None
) -> tuple[Int[Array, "M T"], Float[Array, "M C H"]]:
    """The cluster of each token and the centroids; empty clusters keep their centroid.

    >>> x = jnp.array([0.0, 10.0, 1.0, 11.0]).reshape(1, 4, 1)
    >>> ids, means = k_means(x, 2, 3)
    >>> ids.tolist(), means.ravel().tolist()
    ([[0, 1, 0, 1]], [0.5, 10.5])
    """
    if start is None:
        start = x[:, np.arange(clusters) * x.shape[1] // clusters]

    def nearest(means):
        products = jnp.einsum("mth,mch->mtc", x, means, precision="highest")
        return jnp.argmax(products - (means**2).sum(-1)[:, None] / 2, -1)

    def step(means, _):
        member = jax.nn.one_hot(nearest(means), clusters)
        sizes = member.sum(1)[..., None]
        sums = jnp.einsum("mtc,mth->mch", member, x, precision="highest")
        return jnp.where(sizes > 0, sums / jnp.maximum(sizes, 1), means), None

    means, _ = jax.lax.scan(step, start, length=iterations)
    return nearest(means), means


def _ranges(ids, block):
    """First and last cluster of each block of sorted tokens, `[M, n]` each."""
    extra = -ids.shape[1] % block
    ids = jnp.pad(ids, ((0, 0), (0, extra)), mode="edge").reshape(ids.shape[0], -1, block)
    return ids[..., 0], ids[..., -1]


def _touched(
    kept: Bool[Array, "M C D"], rows: tuple[Array, Array], cols: tuple[Array, Array]
) -> Bool[Array, "M nq nk"]:
    """Whether the clusters of two blocks have a kept pair, by sums over rectangles."""
    sums = jnp.cumsum(jnp.cumsum(kept, 1, dtype=jnp.int32), 2)
    sums = jnp.pad(sums, ((0, 0), (1, 0), (1, 0)))

    def at(i, j):
        return jax.vmap(lambda s, i, j: s[i[:, None], j[None]])(sums, i, j)

    (q_lo, q_hi), (kv_lo, kv_hi) = rows, cols
    inside = at(q_hi + 1, kv_hi + 1) - at(q_lo, kv_hi + 1) - at(q_hi + 1, kv_lo)
    return inside + at(q_lo, kv_lo) > 0


EXAMPLES = (Svg2(block_q=8, block_kv=8, q_clusters=4, kv_clusters=4, top_p=0.5),)
