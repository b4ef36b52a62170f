"""Blocks by pooled products where blocks are uniform, all blocks where they are not."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_attn.ops import scoring, tiles
from sparse_attn.patterns import full
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparge(base.BlockScores):
    """Pooled scores, trusted only for blocks whose tokens are alike; training-free.

    [arXiv:2502.18137] A block whose tokens have a mean cosine below `similarity`
    has no good mean: such queries keep their whole row of blocks, such keys stay in every row, and
    the budget is for the rest. That is the first stage, and all that `select` does. The second
    one, which leaves out products with values inside the softmax, is `attend_in_two_stages`, in
    plain JAX: it defines the result and counts what a kernel would skip, and saves no time. Images
    and videos: `attend(..., order=)` with a Hilbert-like order of tiles makes tokens of a block
    alike, as in the paper.

    Attributes:
      similarity: mean cosine of all pairs of tokens of a block, in [-1, 1].

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> rule = Sparge(block_q=16, block_kv=16, top_p=0.5, similarity=0.9)
    >>> rule.select(q, k).kv_counts[0, 0].tolist()  # noise is alike nowhere
    [1, 2, 3, 4]
    """

    similarity: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not -1 <= self.similarity <= 1:
            raise ValueError(f"similarity={self.similarity} must be >= -1 and <= 1")
        if self.tables != "query":
            raise ValueError(f"tables={self.tables!r} must be 'query'")

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Bool[Array, "B U nq nk"]:
        group = q.shape[2] // k.shape[2]
        alike_q = mean_cosine(q, self.block_q, blocks.q_real) >= self.similarity
        alike_k = mean_cosine(k, self.block_kv, blocks.kv_real) >= self.similarity
        alike_q = jnp.moveaxis(alike_q, 1, 2)[..., :, None]
        alike_k = jnp.repeat(jnp.moveaxis(alike_k, 1, 2)[..., None, :], group, 1)
        scores = scoring.logits(
            scoring.pool(q, self.block_q, blocks.q_real),
            scoring.pool(k, self.block_kv, blocks.kv_real),
        )
        # Left out of the mass too: their means say nothing.
        inner = blocks._replace(
            candidates=blocks.candidates & alike_k, guard=blocks.guard & alike_k
        )
        return self.choose(scores, inner, k.shape[2]) | ~alike_q | ~alike_k

    @tiles.one_program
    def attend_in_two_stages(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        *,
        skip_below: float | None = -5.0,
        rows_per_group: int | None = None,
        bits: int | None = None,
    ) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N"]]:
        """Attention over the chosen blocks with the online filter.

        Blocks of a row are visited from the first on. Where the largest logits of all queries of
        a group lie more than `-skip_below` under their largest so far, the product of their
        weights with the values is left out; the weights still count in the denominator. So each
        output is off by at most `skipped blocks * block_kv * exp(skip_below) * max |v|`.

        Args:
          skip_below: natural logarithm, < 0; None = nothing is skipped.
          rows_per_group: queries that skip together (a warp's); None = block_q.
          bits: queries and keys rounded per block, 8 as in the paper; None = as they are.

        Returns:
          The output, and the part of the visited products of each head that was skipped.

        Raises:
          ValueError: `skip_below` is not < 0, or `rows_per_group` does not divide block_q.

        >>> import jax
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
        >>> rule = Sparge(block_q=16, block_kv=16, top_p=0.9)
        >>> out, skipped = rule.attend_in_two_stages(q, k, v)
        >>> out.shape, skipped.tolist()  # scores of noise do not differ by that much
        ((1, 64, 2, 8), [[0.0, 0.0]])
        """
        if skip_below is not None and skip_below >= 0:
            raise ValueError(f"skip_below={skip_below} must be < 0 or None")
        group = self.block_q if rows_per_group is None else rows_per_group
        if self.block_q % group:
            raise ValueError(f"rows_per_group={group} must divide block_q={self.block_q}")
        (batch, q_len, heads, _), kv_len = q.shape, k.shape[1]
        fixed = jax.lax.stop_gradient((q, k))
        blocks = self._blocks(self._states(q_len, kv_len), *fixed, None, None)
        kept = (self.keep(*fixed, blocks) | blocks.guard) & blocks.candidates
        k, v = (jnp.repeat(x, heads // x.shape[2], 2) for x in (k, v))
        q, k, v = (
            jnp.moveaxis(scoring.blocked(x.astype(jnp.float32), n), 1, 0)
            for x, n in ((q, self.block_q), (k, self.block_kv), (v, self.block_kv))
        )
        if bits is not None:
            q, k = (rounded_blocks(x, bits) for x in (q, k))
        columns = jnp.arange(k.shape[0])

        def row(at):
            index, q, kept = at
            q_pos = index * self.block_q + jnp.arange(self.block_q, dtype=jnp.int32)[:, None]

            def visit(state, at):
                largest, total, out, skipped = state
                j, k, v, kept = at
                kv_pos = j * self.block_kv + jnp.arange(self.block_kv, dtype=jnp.int32)[None]
                seen = self.pattern.mask_fn(q_pos, kv_pos) & (kv_pos < kv_len)
                seen = seen & kept[:, :, None, None]
                logits = jnp.where(seen, scoring.logits(q, k), -jnp.inf)
                here = logits.max(-1)
                top = jnp.maximum(largest, here)
                safe = jnp.where(top == -jnp.inf, 0, top)
                weights = jnp.exp(logits - safe[..., None])
                decay = jnp.exp(largest - safe)
                below = jnp.where(here == -jnp.inf, -jnp.inf, here - safe)
                below = below.reshape(batch, heads, -1, group).max(-1)
                skip = jnp.zeros_like(below, bool) if skip_below is None else below < skip_below
                skip = jnp.repeat(skip, group, -1)
                added = jnp.einsum("BNTS,BSNH->BNTH", weights, v, precision="highest")
                out = out * decay[..., None] + jnp.where(skip[..., None], 0, added)
                skipped = skipped + (skip & kept[..., None]).sum(-1)
                return (top, total * decay + weights.sum(-1), out, skipped), None

            shape = (batch, heads, self.block_q)
            start = (
                jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, v.shape[-1])),
                jnp.zeros((batch, heads), jnp.int32),
            )  # fmt: skip
            (_, total, out, skipped), _ = jax.lax.scan(
                visit, start, (columns, k, v, jnp.moveaxis(kept, -1, 0))
            )
            return out / jnp.where(total == 0, 1, total)[..., None], skipped

        out, skipped = jax.lax.map(row, (jnp.arange(q.shape[0]), q, jnp.moveaxis(kept, 2, 0)))
        out = jnp.moveaxis(out, (0, 2), (1, 3)).reshape(batch, -1, heads, v.shape[-1])
        visited = kept.sum((-2, -1)) * self.block_q
        return out[:, :q_len], skipped.sum(0) / jnp.maximum(visited, 1)


@tiles.one_program
def rounded_blocks(x: Float[Array, "n B b N H"], bits: int) -> Float[Array, "n B b N H"]:
    """Blocks of each head rounded to `2 ** bits - 1` levels of their largest number.

    >>> rounded_blocks(jnp.array([-127.0, 0.4, 3.6]).reshape(1, 1, 3, 1, 1), 8).ravel().tolist()
    [-127.0, 0.0, 4.0]
    """
    most = 2 ** (bits - 1) - 1
    scale = jnp.maximum(jnp.abs(x).max((2, 4), keepdims=True), 1e-20) / most
    return jnp.round(x / scale) * scale


@tiles.one_program
def mean_cosine(
    x: Float[Array, "B T N H"], block: int, real: Bool[Any, "#B T"]
) -> Float[Array, "B n N"]:
    """Mean cosine of all pairs of real tokens of each block (a token with itself included).

    >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).reshape(1, 4, 1, 2)
    >>> mean_cosine(x, 2, jnp.ones((1, 4), bool)).ravel().tolist()
    [1.0, 0.5]
    """
    x = x.astype(jnp.float32)
    norm = jnp.sqrt((x * x).sum(-1, keepdims=True))
    # The mean over pairs of unit vectors is the square of the length of their mean.
    mean = scoring.pool(x / jnp.maximum(norm, 1e-20), block, real)
    return (mean * mean).sum(-1)


EXAMPLES = (
    Sparge(block_q=16, block_kv=16, top_p=0.5, similarity=0.06),
    Sparge(block_q=8, block_kv=16, top_k=1, similarity=-1.0, pattern=full.Full()),
)
