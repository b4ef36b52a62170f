"""Blocks for every single query and KV head, by overlapping windows of averaged keys."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparse_attn.ops import scoring, tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import local, sinks
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfLlm(base.Selector):
    """InfLLM v2: one choice for the query heads of a KV head, without parameters of its own.

    [arXiv:2506.07900] Keys are averaged over windows of `kernel` tokens, `stride` apart.
    For every query the softmax over the windows that have ended is summed over the query heads of
    a KV head; a block of keys scores as the best window that touches it. The blocks of `always`
    are seen besides. Dense weights need no change; the rule trains like any mask. As in `moba`,
    rows of the mask are single queries.

    Attributes:
      kernel, stride: tokens of a window of keys, and between the starts of two.
      top_k: blocks kept for each query beside those of `always`.

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> rule = InfLlm(block_kv=8, kernel=4, stride=2, top_k=1, always=base.DIAGONAL)
    >>> rule.select(q, k).kv_counts[0, 0, ::16].tolist()
    [1, 2, 2, 2]
    """

    block_q: int = 1
    block_kv: int = 64
    always: patterns_base.Pattern | None = local.Local(window=2048) | sinks.Sinks(tokens=1)
    kernel: int = 32
    stride: int = 16
    top_k: int = 16

    tables: ClassVar[str] = "kv"

    def __post_init__(self):
        super().__post_init__()
        for name in ("kernel", "stride"):
            patterns_base.check_int(name, getattr(self, name))
        patterns_base.check_int("top_k", self.top_k, least=0)

    def _check_blocks(self):
        if self.block_q != 1:
            raise ValueError(f"block_q={self.block_q} must be 1: each query chooses for itself")
        if not self.pattern.causal:
            raise ValueError(f"pattern={self.pattern.expression()} must be causal")

    @tiles.one_program
    def kernel_shares(
        self,
        q: Float[Array, "B T N H"],
        means: Float[Array, "B W K H"],
        seen: Bool[Any, "#B T W"],
    ) -> Float[Array, "B K T W"]:
        """The softmax over the windows that each query sees, summed over the heads of a group."""
        share = scoring.mass(scoring.logits(q, means.astype(q.dtype)), seen[:, None])
        batch, heads, *rest = share.shape
        num_kv_heads = means.shape[2]
        return share.reshape(batch, num_kv_heads, heads // num_kv_heads, *rest).sum(2)

    @tiles.one_program
    def block_scores(
        self,
        q: Float[Array, "B t N H"],
        q_pos: Int[Any, "t"],
        k: Float[Array, "B S K H"],
        blocks: base.Blocks,
        q_ids: Int[Array, "B t"] | None = None,
    ) -> Float[Array, "B K t nk"]:
        """The best share of the windows that touch each block, for queries at `q_pos`."""
        starts = np.arange(0, k.shape[1] - self.kernel + 1, self.stride)
        means, ids = self._windows(k, starts, blocks)
        seen = (starts + self.kernel - 1 <= q_pos[:, None])[None]
        if ids is not None:
            seen = seen & (q_ids[:, :, None] == ids[:, None])
        share = jnp.pad(self.kernel_shares(q, means, seen), ((0, 0),) * 3 + ((0, 1),))
        touches = _windows_of_blocks(starts, self.kernel, self.block_kv, k.shape[1])
        return share[..., touches].max(-1)

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Bool[Array, "B U nq nk"]:
        q_len, kv_len, rows = q.shape[1], k.shape[1], min(q.shape[1], 64)
        if kv_len < self.kernel:  # No window has ended: there is nothing to choose by.
            return jnp.zeros((q.shape[0], k.shape[2], *blocks.candidates.shape[2:]), bool)
        q_ids = jnp.ones(q.shape[:2], jnp.int32)
        q_ids = q_ids if blocks.segment_ids is None else blocks.segment_ids[0]
        parts = [jnp.moveaxis(scoring.blocked(x, rows), 1, 0) for x in (q, q_ids)]
        places = jnp.arange(parts[0].shape[0] * rows).reshape(-1, rows)
        # A block has at most this many windows, counted twice where one touches two blocks.
        width = 2 * kv_len // self.stride + 2 * kv_len // self.block_kv + 2
        scores = scoring.by_rows(
            lambda at: self.block_scores(at[0], at[1], k, blocks, at[2]),
            (parts[0], places, parts[1]),
            elements=q.shape[0] * q.shape[2] * rows * width,
        )
        scores = jnp.moveaxis(scores, 0, 2)
        scores = scores.reshape(*scores.shape[:2], -1, scores.shape[-1])[:, :, :q_len]
        return scoring.top_k(scores, self.top_k, blocks.candidates & ~blocks.guard)

    def _windows(self, k, starts, blocks):
        """Means of the windows of one document, and its id (-1: of several, or padding)."""
        at = starts[:, None] + np.arange(self.kernel)
        means = k.astype(jnp.float32)[:, at].mean(2)
        if blocks.segment_ids is None:
            return means, None
        ids = blocks.segment_ids[1][:, at]
        one = (ids == ids[..., :1]).all(-1) & (ids[..., 0] != 0)
        return jnp.where(one[..., None, None], means, 0), jnp.where(one, ids[..., 0], -1)


def _windows_of_blocks(starts, kernel, block, kv_len):
    """Indices of the windows that touch each block, `[nk, m]`; `len(starts)` for no window."""
    lists = [
        np.flatnonzero((starts < lo + block) & (starts + kernel > lo))
        for lo in range(0, kv_len, block)
    ]
    most = max(map(len, lists))
    return np.stack([np.pad(x, (0, most - len(x)), constant_values=len(starts)) for x in lists])


EXAMPLES = (InfLlm(block_kv=8, kernel=4, stride=2, top_k=2, always=base.DIAGONAL),)
