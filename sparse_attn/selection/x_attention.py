"""Blocks by the sums of the antidiagonals of small tiles of the attention map."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_attn.masks import segments
from sparse_attn.ops import scoring, tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import full, local, sinks
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class XAttention(base.BlockScores):
    """Softmax over mean antidiagonals of `stride x stride` tiles, summed by block.

    [arXiv:2503.16428, sec. 2.1] Every token of a block enters its score, at 1/stride of the cost of
    the full map. All pairs on the antidiagonals of tiles have an odd distance where the stride is
    even: a one-token diagonal at an even distance is invisible, the main diagonal among them. Keep
    `always` on the diagonal, as it is by default. Places past the end count as zeros.

    Attributes:
      stride: tokens along a tile; divides block_q and block_kv.

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> rule = XAttention(block_q=16, block_kv=16, stride=4, top_p=0.3)
    >>> jax.eval_shape(rule.select, q, k).num_tables
    2
    """

    stride: int = 8

    def __post_init__(self):
        super().__post_init__()
        patterns_base.check_int("stride", self.stride)
        if self.block_q % self.stride or self.block_kv % self.stride:
            raise ValueError(
                f"stride={self.stride} must divide block_q={self.block_q} and "
                f"block_kv={self.block_kv}"
            )

    @tiles.one_program
    def antidiagonals(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]
    ) -> Float[Array, "B N t s"]:
        """Mean scaled logits on the antidiagonal of every tile, for few queries at a time.

        >>> x = jnp.ones((1, 8, 1, 4))
        >>> XAttention(stride=4, top_k=1).antidiagonals(x, x).tolist()  # 4 / sqrt(4)
        [[[[2.0, 2.0], [2.0, 2.0]]]]
        """
        # One product of long vectors is the sum over an antidiagonal: queries backwards, keys not.
        q = scoring.blocked(q, self.stride)[:, :, ::-1]
        k = scoring.blocked(k, self.stride)
        scale = q.shape[-1] ** -0.5 / self.stride
        return scoring.logits(*map(_long, (q, k)), scale)

    def scores(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Float[Array, "B N nq nk"]:
        batch, kv_len, heads = q.shape[0], k.shape[1], q.shape[2]
        stride, per_q, per_kv = (
            self.stride,
            self.block_q // self.stride,
            self.block_kv // self.stride,
        )
        q = jnp.where(blocks.q_real[:, :, None, None], q, 0)
        k = jnp.where(blocks.kv_real[:, :, None, None], k, 0)
        k = jnp.pad(k, ((0, 0), (0, -kv_len % self.block_kv), (0, 0), (0, 0)))
        num_kv = k.shape[1] // stride
        kv_lo = jnp.arange(num_kv) * stride
        kv_hi = jnp.minimum(kv_lo + stride, kv_len)
        q_real = scoring.blocked(jnp.asarray(blocks.q_real), self.block_q)
        kv_real = scoring.blocked(jnp.asarray(blocks.kv_real), self.block_kv)
        kv_real = kv_real.reshape(-1, num_kv, stride).any(-1)[:, None, None]
        rows = {
            "index": jnp.arange(q_real.shape[1]),
            "q": jnp.moveaxis(scoring.blocked(q, self.block_q), 1, 0),
            "real": jnp.moveaxis(q_real, 1, 0),
        }
        if blocks.segment_ids is not None:
            q_ids, kv_ids = blocks.segment_ids
            rows["ids"] = jnp.moveaxis(scoring.blocked(q_ids, self.block_q), 1, 0)
            kv_ids = segments.block_ranges(kv_ids, stride, num_kv)

        def row(at):
            q_lo = at["index"] * self.block_q + jnp.arange(per_q) * stride
            state = self.pattern.block_state(
                q_lo[:, None], q_lo[:, None] + stride, kv_lo[None], kv_hi[None]
            )
            seen = (jnp.asarray(state) != patterns_base.EMPTY) & kv_real
            if "ids" in at:
                q_ids = segments.block_ranges(at["ids"], stride, per_q)
                seen = seen & scoring.share_document(q_ids, kv_ids)[:, None]
            share = scoring.mass(self.antidiagonals(at["q"], k), seen)
            share = share * at["real"].reshape(-1, 1, per_q, stride).any(-1)[..., None]
            return share.reshape(batch, heads, per_q, -1, per_kv).sum((2, 4))

        shares = scoring.by_rows(row, rows, elements=batch * heads * per_q * num_kv)
        return jnp.log(jnp.moveaxis(shares, 0, 2))


def _long(tiles):
    """`[B, n, stride, N, H]` as `[B, n, N, stride * H]`."""
    tiles = jnp.moveaxis(tiles, 2, 3)
    return tiles.reshape(*tiles.shape[:3], -1)


EXAMPLES = (
    XAttention(block_q=16, block_kv=16, stride=4, top_p=0.5),
    XAttention(
        block_q=16, block_kv=8, stride=8, top_k=2,
        always=local.Local(window=1) | sinks.Sinks(tokens=2),
    ),
    XAttention(block_q=8, block_kv=16, stride=8, pattern=full.Full(), threshold=0.3),
)  # fmt: skip
