"""Blocks of voxels by their coordinates, chosen through compressed ones, and a window in space."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import scoring, tiles
from sparse_attn.ops.token_select import attend as select_lib
from sparse_attn.ops.token_select import lists
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import halo
from sparse_attn.selection import base

BRANCHES = ("compressed", "selected", "window")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spatial(base.OwnAttention):
    """Spatial sparse attention of Direct3D-S2: `nsa` on a sparse set of voxels.

    [arXiv:2505.17412] Tokens are grouped by their place in space, whatever their order in the row,
    into cubes that hold between one voxel and all of theirs. A query attends to the mean key and
    value of every occupied cube; to the voxels of the `top_k` cubes that get most weight so, one
    choice for the query heads of a KV head; and to the voxels near it. Not causal; trained. The
    caller's gates weigh the three. Means stand for the paper's learned compression.

    Cubes are padded to their volume, so keys and values are copied to `max_blocks * edge ** 3`
    places.

    Attributes:
      resolution: voxels along each axis of the space.
      edge: voxels along each axis of a cube.
      top_k: cubes of a query.
      window: largest distance along any axis of the voxels that a query sees around itself.
      max_blocks: occupied cubes at most; with more, the output of the row is nan. None = as many as
        there are tokens, which is always enough.
      branches: those that run, of "compressed", "selected" and "window".

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 60, 2, 8))
    >>> coords = jax.random.permutation(jax.random.key(1), 512)[:60]
    >>> coords = jnp.stack(jnp.unravel_index(coords, (8, 8, 8)), -1)[None]
    >>> rule = Spatial(resolution=8, edge=2, top_k=4, window=1)
    >>> jax.eval_shape(lambda *x: rule.attend(*x, coords=coords), q, k, v).shape
    (1, 60, 2, 8)
    """

    block_q: int = 1
    block_kv: int = 1
    pattern: patterns_base.Pattern = base.EVERYTHING
    always: patterns_base.Pattern | None = None
    resolution: int = 64
    edge: int = 8
    top_k: int = 16
    window: int = 4
    max_blocks: int | None = None
    branches: tuple[str, ...] = BRANCHES

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "branches", tuple(self.branches))
        for name in ("resolution", "edge", "top_k"):
            patterns_base.check_int(name, getattr(self, name))
        patterns_base.check_int("window", self.window, least=0)
        if self.max_blocks is not None:
            patterns_base.check_int("max_blocks", self.max_blocks)
        if not self.branches or not set(self.branches) <= set(BRANCHES):
            raise ValueError(f"branches={self.branches} must be one or more of {BRANCHES}")
        if (self._cubes * self.edge) ** 3 >= np.iinfo(np.int32).max:
            raise ValueError(f"resolution={self.resolution} must be less than 1290, in whole cubes")
        self._check_fixed(block_q=1, block_kv=1, pattern=base.EVERYTHING, always=None)

    @property
    def _cubes(self):
        return -(-self.resolution // self.edge)

    @tiles.one_program
    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K Hv"],
        *,
        coords: Int[Array, "B T 3"],
        gates: Float[Array, "B T N 3"] | None = None,
        impl: str | None = None,
    ) -> Float[Array, "B T N Hv"]:
        """The weighted sum of the branches; differentiable in q, k, v and gates.

        Args:
          coords: the voxel of each token, each at most once; negative = padding, whose output is 0.
          gates: weights of the compressed, selected and window branch; None = 1 each.
          impl: backend of `ops.attend` for the first and the last; the second one follows it.
        """
        lay = _Layout.of(self, coords)
        q, k, v = (_take(x, lay.order) for x in (q, k, v))
        outs = self.by_branch(q, k, v, lay, impl)
        if gates is not None:
            gates = _take(gates, lay.order)
            outs = {
                name: gates[..., BRANCHES.index(name), None].astype(x.dtype) * x
                for name, x in outs.items()
            }
        out = sum(outs[name] for name in self.branches)
        return _take(jnp.where(lay.fits[:, None, None, None], out, jnp.nan), lay.back)

    def by_branch(self, q, k, v, lay: "_Layout", impl: str | None = None) -> dict[str, Array]:
        """Outputs by branch, of tokens in the order of the layout."""
        outs = {}
        near = halo.Halo(shape=(self.resolution,) * 3, block=1, halo=self.window)
        if {"compressed", "selected"} & set(self.branches):
            means = [lay.means(x) for x in (k, v)]
            ids = (lay.real, (lay.sizes > 0).astype(jnp.int32))
            outs["compressed"], lse = attend_lib.attend(
                q, *means, mask=base.EVERYTHING, segment_ids=ids, return_lse=True, impl=impl
            )
        if "selected" in self.branches:
            volume = self.edge**3
            keys, values = (lay.padded(x, volume) for x in (k, v))
            ids = (lay.real, lay.padded(lay.real, volume))
            outs["selected"] = select_lib.attend(
                q, keys, values, selected=self.choose(q, means[0], lse, lay), block=volume,
                pattern=base.EVERYTHING, segment_ids=ids,
                impl="reference" if impl == "reference" else "xla",
            )  # fmt: skip
        if "window" in self.branches:
            outs["window"] = attend_lib.attend(
                q, k, v, mask=near, positions=lay.place, segment_ids=lay.real, impl=impl
            )
        return outs

    def choose(self, q, means, lse, lay: "_Layout") -> Int[Array, "B T K m"]:
        """The cubes of each query: those with most weight, summed over the heads of a KV head."""
        q, means, lse = jax.lax.stop_gradient((q, means, lse))
        batch, _, heads, _ = q.shape
        occupied = (lay.sizes > 0)[:, None, None]

        def some(_, xs):
            q, lse = xs
            weights = jnp.exp(scoring.logits(q, means) - jnp.moveaxis(lse, 2, 1)[..., None])
            weights = weights.reshape(batch, means.shape[2], -1, *weights.shape[2:]).sum(2)
            weights = jnp.moveaxis(weights, 1, 2)
            return lists.best(weights, self.top_k, occupied, np.zeros(1, bool))

        return lists.by_queries(some, (q, lse), elements=batch * heads * means.shape[1])


class _Layout(NamedTuple):
    """Tokens sorted by cube and by place inside it; arrays `[B, T]`, those of cubes `[B, M]`.

    Attributes:
      order, back: the token at each place, and the place of each token.
      real: 1, or 0 for padding, which comes last.
      place: row-major in the space.
      cube: the occupied cube of each token, by number; M for padding.
      inside: row-major in the cube.
      sizes: tokens of each cube.
      fits: whether there are M cubes or fewer, `[B]`.
    """

    order: Any
    back: Any
    real: Any
    place: Any
    cube: Any
    inside: Any
    sizes: Any
    fits: Any

    @classmethod
    def of(cls, rule: Spatial, coords) -> "_Layout":
        length = coords.shape[1]
        blocks = min(length, rule.max_blocks or length, rule._cubes**3)
        real = (coords >= 0).all(-1)
        cube, inside = coords // rule.edge, coords % rule.edge
        cube, inside, place = (
            (x[..., 0] * side + x[..., 1]) * side + x[..., 2]
            for x, side in ((cube, rule._cubes), (inside, rule.edge), (coords, rule.resolution))
        )
        last = jnp.iinfo(jnp.int32).max
        order = jnp.argsort(jnp.where(real, cube * rule.edge**3 + inside, last), axis=-1)
        cube, inside, place, real = (_take(x, order) for x in (cube, inside, place, real))
        fresh = real & (jnp.arange(length) == 0) | (real & (cube != jnp.roll(cube, 1, axis=1)))
        number = jnp.cumsum(fresh, 1, dtype=jnp.int32) - 1
        fits = number.max(-1) < blocks
        number = jnp.where(real & (number < blocks), number, blocks)
        sizes = jax.vmap(lambda x: jnp.zeros(blocks, jnp.int32).at[x].add(1, mode="drop"))(number)
        place, inside = (jnp.where(real, x, 0) for x in (place, inside))
        return cls(
            order, jnp.argsort(order, axis=-1), real.astype(jnp.int32), place.astype(jnp.int32),
            number, inside, sizes, fits,
        )  # fmt: skip

    def means(self, x: Float[Array, "B T K H"]) -> Float[Array, "B M K H"]:
        """The mean of each occupied cube, in x's dtype."""
        sums = self._scattered(x.astype(jnp.float32), self.cube, self.sizes.shape[1])
        return (sums / jnp.maximum(self.sizes, 1)[..., None, None]).astype(x.dtype)

    def padded(self, x: Array, volume: int) -> Array:
        """`[B, M * volume, ..]`, every voxel at its place in its cube; 0 elsewhere."""
        return self._scattered(x, self.cube * volume + self.inside, self.sizes.shape[1] * volume)

    def _scattered(self, x, at, size):
        def one(x, at):
            return jnp.zeros((size, *x.shape[1:]), x.dtype).at[at].add(x, mode="drop")

        return jax.vmap(one)(x, at)


def _take(x, order):
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), 1)


EXAMPLES = (Spatial(resolution=12, edge=4, top_k=2, window=2),)
