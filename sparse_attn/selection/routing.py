"""Clusters of equal size around learned centroids; attention inside a cluster."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import scoring, tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import pbs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing(pbs.Reordered):
    """Routing attention: each centroid takes the `size` queries and the `size` keys nearest to it.

    [arXiv:2003.05997] Queries and keys are normalised to the sphere of radius `sqrt(H)`
    without scale or bias; the pattern is applied inside a cluster at original positions. A token in
    several clusters gets the mean of its outputs there, a token in none gets 0. The centroids
    `[N, C, H]` are no trained parameters: `moved_centroids` moves them after a step, and no
    gradient goes through the assignment. Which tokens a cluster takes depends on all tokens, later
    ones too, as in the paper; what a token sees inside its cluster is as the pattern says. The
    paper's other heads of the layer are local: use a rule for some heads only.

    Attributes:
      size: tokens per cluster, `w`; the paper has as many clusters as fill the sequence.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
    >>> rule = Routing(size=16)
    >>> jax.eval_shape(rule.attend, q, k, v, centroids=jnp.ones((2, 4, 8))).shape
    (1, 64, 2, 8)
    """

    always: patterns_base.Pattern | None = None
    size: int = 256

    def __post_init__(self):
        super().__post_init__()
        patterns_base.check_int("size", self.size)
        if self.always is not None:
            raise ValueError(f"always={self.always.expression()} must be None")

    @tiles.one_program
    def members(
        self, x: Float[Array, "B T N H"], centroids: Float[Array, "N C H"]
    ) -> Int[Array, "B N C w"]:
        """The tokens nearest to each centroid, by position; `w = min(size, T)`."""
        near = jnp.einsum("BTNH,NCH->BNCT", on_sphere(x), centroids, precision="highest")
        taken = scoring.top_k(near, self.size, np.ones(1, bool))
        # False sorts after True, and each in the order of positions.
        order = jnp.argsort(~taken, axis=-1, stable=True)
        return order[..., : min(self.size, x.shape[1])].astype(jnp.int32)

    @tiles.one_program
    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        *,
        centroids: Float[Array, "N C H"],
        impl: str | None = None,
    ) -> Any:
        """Routes, attends inside clusters, and scatters back to the order of q."""
        (batch, q_len, heads, _), clusters = q.shape, centroids.shape[1]
        group = heads // k.shape[2]
        k, v = (jnp.repeat(x, group, 2) for x in (k, v))
        fixed_q, fixed_k, centroids = jax.lax.stop_gradient((q, k, centroids))
        q_at, kv_at = (self.members(x, centroids) for x in (fixed_q, fixed_k))

        def gathered(x, at):
            flat = at.reshape(batch * heads, -1)[..., None, None]
            x = jnp.take_along_axis(pbs.fold(x), flat, 1)
            return x.reshape(-1, at.shape[-1], 1, x.shape[-1])

        out = attend_lib.attend(
            gathered(on_sphere(q), q_at), gathered(on_sphere(k), kv_at), gathered(v, kv_at),
            mask=self.pattern,
            positions=tuple(x.reshape(-1, x.shape[-1]) for x in (q_at, kv_at)), impl=impl,
        )  # fmt: skip
        out = out.reshape(batch * heads, clusters * q_at.shape[-1], -1).astype(jnp.float32)
        flat = q_at.reshape(batch * heads, -1)
        rows = jnp.arange(batch * heads)[:, None]
        sums = jnp.zeros((batch * heads, q_len, out.shape[-1])).at[rows, flat].add(out)
        counts = jnp.zeros((batch * heads, q_len)).at[rows, flat].add(1.0)
        mean = sums / jnp.maximum(counts, 1)[..., None]
        return pbs.unfold(mean[:, :, None], batch).astype(q.dtype)


@tiles.one_program
def on_sphere(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Each token less its mean over H, at length `sqrt(H)`.

    >>> on_sphere(jnp.array([[[[1.0, 3.0]]]])).ravel().round(3).tolist()
    [-1.0, 1.0]
    """
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-12)).astype(x.dtype)


@tiles.one_program
def moved_centroids(
    centroids: Float[Array, "N C H"],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    decay: float = 0.999,
) -> Float[Array, "N C H"]:
    """The centroids after a step of online k-means: an average of the tokens nearest to each.

    `decay * c + (1 - decay) / 2 * (mean of its queries + mean of its keys)`; a centroid that is
    nearest to no token keeps that part of itself.  [arXiv:2003.05997]

    >>> x = jnp.array([1.0, -1.0]).reshape(1, 1, 1, 2)
    >>> moved_centroids(jnp.zeros((1, 1, 2)), x, x, decay=0.5).ravel().round(3).tolist()
    [0.5, -0.5]
    """
    k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
    means = []
    for x in (q, k):
        x = on_sphere(x).astype(jnp.float32)
        near = jnp.einsum("BTNH,NCH->BTNC", x, centroids, precision="highest")
        member = jax.nn.one_hot(jnp.argmax(near, -1), centroids.shape[1])
        counts = member.sum((0, 1))[..., None]
        sums = jnp.einsum("BTNC,BTNH->NCH", member, x, precision="highest")
        means.append(jnp.where(counts > 0, sums / jnp.maximum(counts, 1), centroids))
    return decay * centroids + (1 - decay) / 2 * (means[0] + means[1])


EXAMPLES = (Routing(size=16),)
