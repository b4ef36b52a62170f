"""The `Selector` contract: a rule that chooses blocks from q and k at run time.

A rule is one file in this folder: a frozen dataclass named after its module (`pooled.py` holds
`Pooled`) and `EXAMPLES` for the contract tests. Most rules extend `BlockScores` and define one
function, `scores`. `patterns.parse("pooled(top_k=8)")` finds them, so a config can name one where
it names a pattern.

The pipeline is: score -> guard -> choose -> `BlockMask`. Scores of pairs of blocks are the largest
array, `[B, N, T / block_q, S / block_kv]`; no rule makes one that grows as T x S. No gradient goes
through a choice.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparse_attn.masks import block_mask, lower, reorder, segments
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import reordered, scoring, tiles
from sparse_attn.patterns import base, causal, full, local, permuted

TABLES = ("query", "kv")
CAUSAL, DIAGONAL, EVERYTHING = causal.Causal(), local.Local(window=1), full.Full()


class Blocks(NamedTuple):
    """What a rule knows beside q and k; arrays of blocks are `[1 or B, 1, nq, nk]`.

    Attributes:
      candidates: blocks with a pair that the pattern allows and, where documents are packed, with
        tokens of one document on both sides. Only these may be kept.
      guard: candidates that are kept whatever their score.
      q_real, kv_real: bool `[1 or B, length]`, False for padding (segment id 0).
      segment_ids: int32 `([B, T], [B, S])`, or None.
      params: the rule's trained arrays, or None.
    """

    candidates: Any
    guard: Any
    q_real: Any
    kv_real: Any
    segment_ids: Any = None
    params: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selector(base.Expression):
    """A rule `select(q, k) -> BlockMask`; frozen and hashable, so static under `jax.jit`.

    The choice for a block of queries may depend on all queries of that block, and so, for a query,
    on tokens up to the end of its own block; later blocks do not matter to it (`looks_ahead` is
    False). Keys themselves stay hidden as the pattern says, token by token.

    Attributes:
      block_q, block_kv: tokens per block; with a causal pattern block_kv divides block_q, so that
        no block of keys that a row may see ends after it.
      pattern: what may be seen at all; what is not stays hidden, whatever the choice.
      always: its blocks are kept whatever their score and are not counted in a budget; None =
        no such blocks. The default keeps the blocks on the diagonal.

    Raises:
      ValueError: a field is out of its range.
    """

    block_q: int = 128
    block_kv: int = 128
    pattern: base.Pattern = CAUSAL
    always: base.Pattern | None = DIAGONAL

    # True for rules that decide about a row from later rows too: for prefill, not for training.
    looks_ahead: ClassVar[bool] = False

    def __post_init__(self):
        for name in ("block_q", "block_kv"):
            base.check_int(name, getattr(self, name))
        if not isinstance(self.pattern, base.Pattern):
            raise ValueError(f"pattern={self.pattern!r} must be a Pattern")
        if not (self.always is None or isinstance(self.always, base.Pattern)):
            raise ValueError(f"always={self.always!r} must be a Pattern or None")
        self._check_blocks()

    def _check_fixed(self, **fields: Any):
        """Fields that a rule has as a selector, and that have one value."""
        for name, value in fields.items():
            given, wanted = (base._text(x) for x in (getattr(self, name), value))
            if given != wanted:
                raise ValueError(f"{name}={given} must be {wanted}")

    def _check_blocks(self):
        if self.pattern.causal and self.block_q % self.block_kv:
            raise ValueError(
                f"block_kv={self.block_kv} must divide block_q={self.block_q} where the pattern "
                "is causal"
            )

    def __str__(self) -> str:
        return self.expression()

    def _repr_html_(self) -> None:
        return None  # There is no picture of what depends on q and k.

    @property
    def causal(self) -> bool:
        """True when neither the pattern nor the choice looks at later blocks."""
        return self.pattern.causal and not self.looks_ahead

    def params_like(
        self, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> dict[str, np.ndarray]:
        """The start values of the arrays that the rule trains, by name; none for most rules."""
        del num_heads, num_kv_heads, head_dim
        return {}

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: Blocks
    ) -> Bool[Array, "B U nq nk"]:
        """Which blocks each table keeps; those that are no candidates are dropped afterwards."""
        raise NotImplementedError(f"{type(self).__name__} must define keep(q, k, blocks)")

    @tiles.one_program
    def select(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        *,
        segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
        params: dict[str, Any] | None = None,
    ) -> block_mask.BlockMask:
        """The run-time mask of these queries and keys, one table per batch entry and head.

        Pass the same `segment_ids` to `attend`: here they keep padding out of means and blocks of
        other documents out of the budget; hiding their tokens is attention's work.

        Raises:
          ValueError: `segment_ids` with a rule that looks ahead, whose probe knows one document;
            or `params` are missing or not wanted.

        >>> from sparse_attn.selection import pooled
        >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
        >>> rule = pooled.Pooled(block_q=16, block_kv=16, top_k=1)
        >>> rule.select(q, k).kv_counts[0, 0].tolist()  # the diagonal, and one more where there is
        [1, 2, 2, 2]
        """
        q, k = jax.lax.stop_gradient((q, k))
        if isinstance(segment_ids, tuple):
            ids = segment_ids
        else:
            ids = None if segment_ids is None else (segment_ids, segment_ids)
        if ids is not None and self.looks_ahead:
            raise ValueError(f"segment_ids must be None: {self.expression()} looks at one document")
        wanted = set(self.params_like(q.shape[2], k.shape[2], q.shape[3]))
        if wanted != set(params or {}):
            raise ValueError(f"params={sorted(params or {})} must be {sorted(wanted)}")
        states = self._states(q.shape[1], k.shape[1])
        blocks = self._blocks(states, q, k, ids, jax.lax.stop_gradient(params))
        kept = (self.keep(q, k, blocks) | blocks.guard) & blocks.candidates
        return block_mask.from_block_states(
            jnp.where(kept, states, base.EMPTY),
            rule=self.pattern, q_len=q.shape[1], kv_len=k.shape[1],
            block_q=self.block_q, block_kv=self.block_kv,
        )  # fmt: skip

    @tiles.one_program
    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        *,
        segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
        params: dict[str, Any] | None = None,
        order: reorder.Reordering | None = None,
        **options: Any,
    ) -> Any:
        """Selects, then attends; `options` are those of `ops.attend`.

        Args:
          order: of the tokens of a grid, with a closed form (`Tiles`, `Hilbert`), in which blocks
            hold tokens that are alike; `pattern` and `always` speak of row-major positions all the
            same, and the output is row-major too.

        >>> from sparse_attn.selection import pooled
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 100, 2, 8))
        >>> out = pooled.Pooled(block_q=16, block_kv=16, top_p=0.5).attend(q, k, v)
        >>> out.shape
        (1, 100, 2, 8)
        """
        rule = self
        if order is not None:
            always = None if self.always is None else permuted.permute(self.always, order)
            moved = {"pattern": permuted.permute(self.pattern, order), "always": always}
            rule = dataclasses.replace(self, **moved)
            q, k, v = (reordered.permute(x, order) for x in (q, k, v))
            if segment_ids is not None:
                segment_ids = reordered.permute(segment_ids, order)
        mask = rule.select(q, k, segment_ids=segment_ids, params=params)
        out = attend_lib.attend(q, k, v, mask=mask, segment_ids=segment_ids, **options)
        if order is None:
            return out
        return jax.tree.map(lambda x: reordered.unpermute(x, order), out)

    def at_most(self, q_len: int, kv_len: int | None = None) -> block_mask.BlockMask:
        """A static mask with at least as many blocks in each row as the rule can keep there.

        Exact for a `top_k`; all that the pattern allows where the input decides how many.
        """
        return lower.lower(
            self.pattern, q_len=q_len, kv_len=kv_len, block_q=self.block_q, block_kv=self.block_kv
        )

    def _states(self, q_len, kv_len, pattern=None):
        pattern = self.pattern if pattern is None else pattern
        return block_mask.block_states(
            lower.lower(
                pattern, q_len=q_len, kv_len=kv_len, block_q=self.block_q, block_kv=self.block_kv
            )
        )

    def _guard(self, q_len, kv_len):
        if self.always is None:
            return np.zeros((-(-q_len // self.block_q), -(-kv_len // self.block_kv)), bool)
        return self._states(q_len, kv_len, self.always) != base.EMPTY

    def _blocks(self, states, q, k, ids, params):
        candidates = (states != base.EMPTY)[None, None]
        guard = self._guard(q.shape[1], k.shape[1])[None, None] & candidates
        real = [np.ones((1, x.shape[1]), bool) for x in (q, k)]
        if ids is not None:
            rows, cols = states.shape
            shared = scoring.share_document(
                segments.block_ranges(ids[0], self.block_q, rows),
                segments.block_ranges(ids[1], self.block_kv, cols),
            )[:, None]
            candidates, guard = candidates & shared, guard & shared
            real = [x != 0 for x in ids]
        return Blocks(jnp.asarray(candidates), jnp.asarray(guard), *real, ids, params)


def window_of(keys: int, q_len: int, kv_len: int | None = None) -> block_mask.BlockMask:
    """A window of as many keys as a query reads at most: stands for a rule in counts of the cost.

    >>> window_of(20, 64).q_len
    64
    """
    return lower.lower(local.Local(window=min(keys, q_len)), q_len=q_len, kv_len=kv_len)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnAttention(Selector):
    """A rule that has `attend` and no mask of blocks in place: it chooses tokens, or moves them."""

    def select(self, q, k, *, segment_ids=None, params=None):
        """Raises NotImplementedError: no `BlockMask` says what the rule keeps.

        Raises:
          NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{self.expression()} moves tokens or keeps single ones: call attend, not select"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockScores(Selector):
    """A rule that scores pairs of blocks and keeps the best; a subclass defines `scores`.

    Give exactly one of `top_k`, `top_p` and `threshold`, for all heads or as a tuple with one
    value per table. Ties go to the block with the lower index.

    Attributes:
      top_k: blocks kept in each row of blocks, beside those of `always`.
      top_p: the smallest set of blocks, those of `always` included, that has this part of the
        row's estimated mass (the softmax of its scores); 1 = all.
      threshold: blocks with at least this part of the row's estimated mass.
      min_blocks: with `top_p` or `threshold`, at least so many of the best blocks; None = off.
      tables: "query" chooses for each query head; "kv" chooses once for the query heads of a KV
        head, by their mean estimated mass.

    Raises:
      ValueError: none or several of the three given, or a value out of its range.
    """

    top_k: int | tuple[int, ...] | None = None
    top_p: float | tuple[float, ...] | None = None
    threshold: float | tuple[float, ...] | None = None
    min_blocks: int | None = None
    tables: str = "query"

    def __post_init__(self):
        super().__post_init__()
        names = ("top_k", "top_p", "threshold")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            values = ", ".join(f"{name}={getattr(self, name)}" for name in names)
            raise ValueError(f"{values}: give exactly one of them")
        value = getattr(self, given[0])
        for each in value if isinstance(value, tuple) else (value,):
            if given[0] == "top_k":
                base.check_int("top_k", each, least=0)
            elif not 0 < each <= 1:
                raise ValueError(f"{given[0]}={each} must be > 0 and <= 1")
        if self.min_blocks is not None:
            base.check_int("min_blocks", self.min_blocks)
            if self.top_k is not None:
                raise ValueError(f"min_blocks={self.min_blocks} must be None: top_k is exact")
        base.check_choice("tables", self.tables, TABLES)

    def scores(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: Blocks
    ) -> Float[Array, "B N nq nk"]:
        """Logarithms of the attention mass of each block, up to a constant per row; float32."""
        raise NotImplementedError(f"{type(self).__name__} must define scores(q, k, blocks)")

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: Blocks
    ) -> Bool[Array, "B U nq nk"]:
        return self.choose(self.scores(q, k, blocks), blocks, k.shape[2])

    def choose(
        self, scores: Float[Array, "B N nq nk"], blocks: Blocks, num_kv_heads: int
    ) -> Bool[Array, "B U nq nk"]:
        """The blocks to keep by their scores, `always` included."""
        candidates, guard = blocks.candidates, blocks.guard
        if self.tables == "kv":
            share = scoring.mass(scores, candidates)
            batch, heads, *grid = share.shape
            share = share.reshape(batch, num_kv_heads, heads // num_kv_heads, *grid)
            scores = jnp.log(share.mean(2))
        size = scores.shape[1]
        if self.top_k is not None:
            free = candidates & ~guard
            return guard | scoring.top_k(scores, _per_table("top_k", self.top_k, size), free)
        if self.top_p is not None:
            kept = scoring.top_p(scores, _per_table("top_p", self.top_p, size), candidates, guard)
        else:
            least = _per_table("threshold", self.threshold, size)
            kept = guard | (candidates & (scoring.mass(scores, candidates) >= least))
        return kept if self.min_blocks is None else kept | scoring.top_k(
            scores, self.min_blocks, candidates
        )  # fmt: skip

    def at_most(self, q_len: int, kv_len: int | None = None) -> block_mask.BlockMask:
        if self.top_k is None:
            return super().at_most(q_len, kv_len)
        kv_len = q_len if kv_len is None else kv_len
        states, guard = self._states(q_len, kv_len), self._guard(q_len, kv_len)
        free = (states != base.EMPTY) & ~guard
        k = max(self.top_k) if isinstance(self.top_k, tuple) else self.top_k
        kept = guard | (np.cumsum(free, axis=1) <= k)  # Which ones they are does not matter here.
        return block_mask.from_block_states(
            np.where(kept, states, base.EMPTY),
            rule=self.pattern, q_len=q_len, kv_len=kv_len,
            block_q=self.block_q, block_kv=self.block_kv,
        )  # fmt: skip


def _per_table(name, value, tables):
    if not isinstance(value, tuple):
        return value
    if len(value) != tables:
        raise ValueError(f"{name}={value} must have one value for each of {tables} tables")
    return np.asarray(value)[:, None, None]
