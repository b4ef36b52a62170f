"""Blocks behind landmark tokens: a softmax of softmaxes, and the best blocks by their landmark."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparse_attn.masks import block_mask
from sparse_attn.ops import scoring, softmax, tiles
from sparse_attn.ops.token_select import lists
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Landmark(base.OwnAttention):
    """Landmark attention: the last token of a block is a gate to the others.  [arXiv:2305.16300]

    A query takes one softmax over the tokens up to itself in its own block together with the
    landmarks of the blocks before, and one inside each of those; a token there has the product of
    its weight and its landmark's [sec. 3.1]. Weights of tokens that are no landmarks sum to 1.
    Causal, so a layer of a model can name it; `with_landmarks` makes its rows. Training computes
    all T * S logits, some queries at a time; a `top_k` reads the blocks that it keeps.

    The paper keeps positions inside the trained range at inference: that is the caller's part.

    Attributes:
      block_kv: tokens per block, the landmark included; at least 2.
      top_k: blocks beside the own one, per query and head, by their landmarks; None = all, as in
        training.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
    >>> jax.eval_shape(Landmark(block_kv=16, top_k=2).attend, q, k, v).shape
    (1, 64, 2, 8)
    """

    block_q: int = 1
    block_kv: int = 51
    always: patterns_base.Pattern | None = None
    top_k: int | None = None

    def _check_blocks(self):
        patterns_base.check_int("block_kv", self.block_kv, least=2)
        if self.top_k is not None:
            patterns_base.check_int("top_k", self.top_k)
        self._check_fixed(block_q=1, always=None, pattern=base.CAUSAL)

    def at_most(self, q_len: int, kv_len: int | None = None) -> block_mask.BlockMask:
        """A window with as many keys as a query reads at most, landmarks included; for counting."""
        if self.top_k is None:
            return super().at_most(q_len, kv_len)
        keys = (self.top_k + 1) * self.block_kv + q_len // self.block_kv
        return base.window_of(keys, q_len, kv_len)

    @tiles.one_program
    def lists(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], *, segment_ids: Any = None
    ) -> Int[Array, "B T N m"]:
        """The blocks that each query reads: its own, then the best before it; -1 = none.

        >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
        >>> Landmark(block_kv=16, top_k=2).lists(q, k)[0, 20, 0].tolist()  # query 20: blocks 1, 0
        [1, 0, -1]
        """
        q, k = jax.lax.stop_gradient((q, k))
        blocks = -(-k.shape[1] // self.block_kv)
        keys = _Keys.of(k, k, segment_ids, self.block_kv)
        count = blocks if self.top_k is None else 1 + min(self.top_k, blocks)

        def choose(end, positions, xs):
            own, past, gates = keys.gates(self.block_kv, end, positions, *xs)
            chosen = lists.best(gates, count, own | past, own)
            return jnp.moveaxis(chosen, 1, 2)

        return lists.by_prefix(
            choose, (q, _ids(q, segment_ids)), count=count,
            elements=lambda end: q.shape[0] * q.shape[2] * -(-end // self.block_kv),
        )  # fmt: skip

    @tiles.one_program
    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T N Hv"]:
        """The grouped softmax over all blocks, or over those of `lists`; differentiable.

        Raises:
          ValueError: q and k differ in length.
        """
        if q.shape[1] != k.shape[1]:
            raise ValueError(f"k.shape={k.shape} must have the length of q.shape={q.shape}")
        batch, _, heads, dim = q.shape
        size = self.block_kv
        keys = _Keys.of(k, v, segment_ids, size)
        chosen = None if self.top_k is None else self.lists(q, k, segment_ids=segment_ids)

        def elements(end):
            logits = end + size
            if chosen is not None:
                logits = chosen.shape[3] * size * max(dim, v.shape[-1])  # Of the gathered keys.
            return batch * heads * logits

        @functools.partial(jax.checkpoint, static_argnums=0)
        def some(end, positions, xs):
            q, ids, chosen = xs
            own, past, gates = keys.gates(size, end, positions, q, ids)
            return keys.weighted(size, end, positions, q, ids, chosen, (own, past, gates))

        arrays = (q, _ids(q, segment_ids), chosen)
        return lists.by_prefix(some, arrays, count=v.shape[-1], elements=elements)


@dataclasses.dataclass(frozen=True)
class _Keys:
    """Keys and values by block `[B, K, n, block, ..]`, and documents `[B, n, block]`."""

    k: Any
    v: Any
    ids: Any

    @classmethod
    def of(cls, k, v, segment_ids, size):
        ids = scoring.blocked(_ids(k, segment_ids), size)
        return cls(*(jnp.moveaxis(scoring.blocked(x, size), 3, 1) for x in (k, v)), ids)

    # What is after a row is in document 0, which nobody is in.

    def gates(self, size, end, positions, q, ids):
        """The own block, whole ones before it, both `[B, 1, C, n]`, and logits of landmarks."""
        blocks = -(-end // size)
        at = jnp.arange(blocks, dtype=jnp.int32)
        own = jnp.broadcast_to(at == (positions // size)[:, None], (*ids.shape, blocks))
        past = at < (positions // size)[:, None]
        past = past & (self.ids[:, None, :blocks, -1] == ids[..., None])
        marks = jnp.moveaxis(self.k[:, :, :blocks, -1], 1, 2)
        return own[:, None], past[:, None], scoring.logits(q, marks)

    def weighted(self, size, end, positions, q, ids, chosen, gates):
        """The output `[B, C, N, Hv]` of some queries."""
        own, past, marks = gates
        batch, count, heads, dim = q.shape
        kv_heads, blocks = self.k.shape[1], marks.shape[-1]
        grouped = q.reshape(batch, count, kv_heads, -1, dim)
        at = jnp.arange(blocks, dtype=jnp.int32)
        if chosen is None:
            k, v, listed, spec = self.k[:, :, :blocks], self.v[:, :, :blocks], True, "bknsh"
            kv_ids = self.ids[:, None, None, :blocks]
        else:
            at = jnp.maximum(jnp.moveaxis(chosen, 2, 1), 0)  # [B, N, C, m]
            own, past = (
                jnp.take_along_axis(jnp.broadcast_to(x, (batch, heads, count, blocks)), at, -1)
                for x in (own, past)
            )
            marks = jnp.take_along_axis(marks, at, -1)
            listed = (jnp.moveaxis(chosen, 2, 1) >= 0)[..., None]
            by_head = at.reshape(batch, kv_heads, -1, *at.shape[2:])
            where = np.arange(batch)[:, None, None, None, None]
            k, v = (x[where, np.arange(kv_heads)[:, None, None, None], by_head]
                    for x in (self.k, self.v))  # fmt: skip
            spec, kv_ids = "bkgcnsh", self.ids[where[..., 0], at]
        dtype = softmax.operand_dtype(q.dtype)
        z = softmax.dot(f"bckgh,{spec}->bkgcns", grouped, k, dtype) * dim**-0.5
        z = z.reshape(batch, heads, *z.shape[3:])
        place = jnp.arange(size, dtype=jnp.int32)
        token = at[..., None] * size + place
        seen = (token <= positions[:, None, None]) & (place < size - 1)
        mine = ids[:, None, :, None, None]
        seen = seen & (kv_ids == mine) & (mine != 0) & listed
        seen = seen & (own | past)[..., None]
        weights = grouped_softmax(z, marks, jnp.broadcast_to(seen, z.shape), own)
        weights = weights.reshape(batch, kv_heads, -1, *weights.shape[2:])
        out = softmax.dot(f"bkgcns,{spec}->bckgh", weights, v, dtype)
        return out.reshape(batch, count, heads, -1).astype(q.dtype)


@tiles.one_program
def grouped_softmax(
    logits: Float[Array, "*B n s"],
    marks: Float[Array, "*B n"],
    seen: Bool[Array, "*B n s"],
    own: Bool[Array, "*#B n"],
) -> Float[Array, "*B n s"]:
    """Weights of tokens in blocks: a softmax in each, and one over the blocks.  [sec. 3.1]

    A block stands in the outer softmax with its landmark's logit `marks`; the own block with the
    sum of its tokens' exponentials. Blocks of which nothing is seen have no weight; a row that sees
    nothing is 0.

    >>> z, marks = jnp.zeros((2, 2)), jnp.zeros(2)
    >>> grouped_softmax(z, marks, jnp.ones((2, 2), bool), jnp.array([False, True])).tolist()
    [[0.1666666716337204, 0.1666666716337204], [0.3333333432674408, 0.3333333432674408]]
    """
    inside, lse = softmax.masked(logits, seen)
    outside, _ = softmax.masked(jnp.where(own, lse, marks), seen.any(-1))
    return inside * outside[..., None]


def with_landmarks(
    tokens: Int[np.ndarray, "*B t"], *, block: int, landmark: int
) -> Int[np.ndarray, "*B T"]:
    """The rows of a model with landmarks: the token `landmark` after each `block - 1` tokens.

    Its predictions, and those of it, are no part of a loss.

    >>> with_landmarks(np.arange(5), block=3, landmark=9).tolist()
    [0, 1, 9, 2, 3, 9, 4]
    """
    places = np.arange(block - 1, tokens.shape[-1] + 1, block - 1)
    return np.insert(tokens, places, landmark, axis=-1)


def _ids(x, segment_ids):
    return jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids


EXAMPLES = (Landmark(block_kv=8), Landmark(block_kv=8, top_k=2))
