"""Trees: a token sees its ancestors. Draft trees, shared prefixes, packed documents."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

from sparse_attn.masks import layout
from sparse_attn.patterns import base

_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Ancestors(base.Pattern):
    """A tree of runs of tokens: a token sees the path from the root to itself.

    One token per node is the tree of drafts that speculative decoding verifies in one step: with
    the lse of the tokens before it, `merge_lse` completes it  [arXiv:2502.17421]. Long
    nodes are prefixes that sequences share, at any number of levels [arXiv:2402.05099, sec. 3]; see
    `shared_prefix` and `shared_anchor`.

    Where every node is followed by its subtree, a key is visible from its own position to the end
    of the subtree: blocks are exact, and a kernel compares once for each change of that end. Other
    orders are for small trees: elements decide about blocks, and a kernel compares with each node.
    Lengths may be known at run time only: then nodes are slots, and `positions` fills them.

    Attributes:
      parents: of each node, the number of an earlier one, or -1 for a root.
      tokens: of each node, or of all. The last node has no end, for tokens generated later.

    Raises:
      ValueError: a parent is not an earlier node, or `tokens` are not ints >= 1, one per node.

    >>> tree = Ancestors(parents=(-1, 0, 0, 1))
    >>> tree.mask_fn(np.arange(4)[:, None], np.arange(4)).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 0, 1, 0],
           [1, 1, 0, 1]])
    """

    parents: tuple[int, ...]
    tokens: int | tuple[int, ...] = 1

    def __post_init__(self):
        object.__setattr__(self, "parents", tuple(self.parents))
        if not self.parents:
            raise ValueError("parents=() must have one node or more")
        for node, parent in enumerate(self.parents):
            if type(parent) is not int or not -1 <= parent < node:
                raise ValueError(f"parents[{node}]={parent!r} must be -1 or an int < {node}")
        tokens = self.tokens
        if type(tokens) is not int:
            tokens = tuple(tokens)
            if len(tokens) != len(self.parents):
                raise ValueError(
                    f"tokens of {len(tokens)} nodes must be for the {len(self.parents)} parents"
                )
            tokens = tokens[0] if len(set(tokens)) == 1 else tokens
            object.__setattr__(self, "tokens", tokens)
        for value in {tokens} if type(tokens) is int else set(tokens):
            base.check_int("each of tokens", value)
        total = tokens * len(self.parents) if type(tokens) is int else sum(tokens)
        base.check_int("tokens of all nodes", total)

    @property
    def block_state_exact(self) -> bool:
        return _tables(self).in_order

    def mask_fn(self, q_pos, kv_pos):
        tables = _tables(self)
        q, kv = tables.rank(q_pos), tables.rank(kv_pos)
        return (kv <= q) & (q < tables.stop(kv_pos))

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        tables = _tables(self)
        q_first, q_last = tables.ranks(q_lo, q_hi)
        kv_first, kv_last = tables.ranks(kv_lo, kv_hi)
        nodes = tables.node(kv_lo), tables.node(kv_hi - 1) + 1
        least_stop, greatest_stop = tables.stops.least(*nodes), tables.stops.greatest(*nodes)
        # Ancestors stand first, in any order of the nodes.
        return base.state_of(
            empty=(kv_lo >= q_hi) | (kv_first > q_last) | (greatest_stop <= q_first),
            full=(kv_last <= q_first) & (q_last < least_stop),
        )

    def depth(self, position: Int[Array, "*T"] | np.ndarray) -> Int[Array, "*T"] | np.ndarray:
        """How many tokens a token sees before itself: its position in its own sequence.

        The positions for rotary embeddings when one pass stands for a sequence per leaf.

        >>> shared_prefix(2, [3, 2]).depth(np.arange(7)).tolist()
        [0, 1, 2, 3, 4, 2, 3]
        """
        return position + _tables(self).shift(position)

    def positions(
        self, lengths: Int[Array, "*B S"] | np.ndarray, *, length: int
    ) -> Int[Array, "*B T"]:
        """Positions of T = `length` tokens of ragged runs, one in each of the S nodes here.

        For `attend(..., positions=...)` and `depth`; see `masks.layout.pack`.

        >>> slots = shared_prefix(4, [4, 4])
        >>> slots.positions(np.array([3, 1, 2]), length=6).tolist()
        [0, 1, 2, 4, 8, 9]
        """
        return layout.pack(_tables(self).starts, lengths, length=length)

    @property
    def causal(self) -> bool:
        return True


class _Tables:
    """Preorder: every node's subtree is one interval `[rank, stop)` of ranks of tokens."""

    def __init__(self, pattern: Ancestors):
        parents = np.asarray(pattern.parents)
        number = len(parents)
        tokens = np.broadcast_to(np.asarray(pattern.tokens, np.int64), number)
        starts = np.cumsum(tokens) - tokens
        below, depths = tokens.copy(), np.zeros(number, np.int64)
        for node in range(number - 1, -1, -1):
            if parents[node] >= 0:
                below[parents[node]] += below[node]
        open_ended = np.zeros(number, bool)  # The last node and its ancestors.
        node = number - 1
        while node >= 0:
            open_ended[node] = True
            node = parents[node]
        # The branch without an end comes last among its siblings, the others as they stand.
        ranks = np.zeros(number, np.int64)
        inside = np.append(tokens, 0)  # Tokens placed so far in each node's interval; -1: roots.
        for last in (False, True):
            for node in range(number):
                parent = parents[node]
                if open_ended[node] == last:
                    ranks[node] = inside[parent]
                    inside[parent] += below[node]
        for node in range(number):
            if parents[node] >= 0:
                ranks[node] += ranks[parents[node]]
                depths[node] = depths[parents[node]] + tokens[parents[node]]
        stops = np.where(open_ended, _INT32_MAX, ranks + below)
        self.starts = starts.astype(np.int32)
        self.in_order = bool((ranks == starts).all())
        self.rank_minus_start = (ranks - starts).astype(np.int32)
        self.rank_shift = layout.Steps(starts, ranks - starts)
        self.stop = layout.Steps(starts, stops)
        self.shift = layout.Steps(starts, depths - starts)
        self.stops = layout.RangeExtremes(stops)
        self.firsts = layout.RangeExtremes(ranks)
        self.lasts = layout.RangeExtremes(ranks + tokens - 1)

    def rank(self, position):
        return position if self.in_order else position + self.rank_shift(position)

    def node(self, position):
        return layout.search(self.starts, position) - 1

    def ranks(self, lo, hi):
        """Least and greatest rank of the tokens `[lo, hi)`."""
        if self.in_order:
            return lo, hi - 1
        node, last = self.node(lo), self.node(hi - 1)
        low, high = (
            x + layout.take(self.rank_minus_start, n) for x, n in ((lo, node), (hi - 1, last))
        )
        # The other nodes: they begin, or end, inside the range.
        alone = node == last
        begin = self.firsts.least(base.least(node + 1, last), last + 1)
        end = self.lasts.greatest(node, base.greatest(last, node + 1))
        begin, end = begin + (low - begin) * alone, end + (high - end) * alone
        return base.least(low, begin), base.greatest(high, end)


@functools.lru_cache(maxsize=256)
def _tables(pattern: Ancestors) -> _Tables:
    return _Tables(pattern)


def shared_prefix(prefix: int, branches: Sequence[int]) -> Ancestors:
    """One prefix, seen by all branches; branches do not see one another.

    Prompt and responses of group training [arXiv:2506.05433], with outputs and gradients
    of the repeated prompt; prompts that read one caption [arXiv:2411.11927]. `depth` are
    the positions.

    Args:
      prefix, branches: tokens (of each branch).

    >>> shared_prefix(5, [2, 3])
    Ancestors(parents=(-1, 0, 0), tokens=(5, 2, 3))
    """
    return Ancestors((-1, *(0 for _ in branches)), (prefix, *branches))


def shared_anchor(documents: Sequence[int]) -> Ancestors:
    """Packed documents that all see the first token of the sequence.  [arXiv:2411.13476]

    Causal inside each document. Positions run on from one document to the next: the anchor keeps
    position 0, and `depth` is not used.

    Args:
      documents: tokens of each; the anchor is the first token of the first one.

    >>> shared_anchor([3, 2, 2]).tokens
    (1, 2, 2, 2)
    """
    first, *others = documents
    rest = (first - 1, *others) if first > 1 else others
    return shared_prefix(1, rest)


EXAMPLES = (
    Ancestors(parents=(-1, 0, 0, 0, 1, 1, 2, 4, 4, 7)),
    Ancestors(parents=(-1, 0, 1, 1, 0, 4, -1, 6, 6), tokens=(9, 4, 7, 1, 8, 16, 3, 3, 20)),
    shared_anchor([20, *[11] * 9, 5]),
)
