"""Segments of several kinds, such as instruction, document, query, image: who sees whom."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

from sparse_attn.masks import layout
from sparse_attn.patterns import base, causal, full, halo, local

ITSELF = local.Local(window=1)

_ANY = "any"
_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Segmented(base.Pattern):
    """A sequence of segments; the kind of a segment says which other segments its tokens see.

    Factories below make the layouts of papers: `block_rank`, `block_attention`, `many_shot`,
    `arrow`, `multimodal`, `near_visual`. Where segments only share prefixes, see `Ancestors`.

    Lengths may be known at run time only: then the segments here are slots, as long as the longest
    content, and `positions` places the tokens in them. Under a trace, segments of equal length
    cost the same whatever their number, n unequal ones O(n) per element of a PARTIAL block; more
    than some tens of unequal ones are better packed in equal slots.

    Attributes:
      segments: `(kind, tokens)`, or `(kind, tokens, count)` for `count` segments in a row; a kind
        is any name. The last segment has no end, for tokens that are generated later.
      sees: `(kind, seen kind)`: all earlier segments of that kind; `(kind, seen kind, n)`: the
        latest n earlier ones; `(kind, seen kind, "any")`: later ones as well.
      inside: `(kind, pattern)`: what tokens see of their own segment, by a pattern on positions
        inside the segment; None: nothing. Kinds that are not listed are causal.

    Raises:
      ValueError: a field has another form, or names a kind that no segment has.

    >>> pattern = Segmented(segments=(("doc", 2, 2), ("query", 2)), sees=(("query", "doc"),))
    >>> pattern.mask_fn(np.arange(6)[:, None], np.arange(6)).astype(int)
    array([[1, 0, 0, 0, 0, 0],
           [1, 1, 0, 0, 0, 0],
           [0, 0, 1, 0, 0, 0],
           [0, 0, 1, 1, 0, 0],
           [1, 1, 1, 1, 1, 0],
           [1, 1, 1, 1, 1, 1]])
    """

    segments: tuple[tuple, ...]
    sees: tuple[tuple, ...] = ()
    inside: tuple[tuple, ...] = ()

    def __post_init__(self):
        runs = []
        for name in ("segments", "sees", "inside"):
            object.__setattr__(self, name, tuple(tuple(x) for x in getattr(self, name)))
        for segment in self.segments:
            if len(segment) not in (2, 3) or not isinstance(segment[0], str):
                raise ValueError(f"segments={segment!r} must be (kind, tokens) or (..., count)")
            for value in segment[1:]:
                base.check_int(f"each number of segments={segment!r}", value)
            kind, tokens, count = (*segment, 1)[:3]
            if runs and runs[-1][:2] == (kind, tokens):
                count += runs.pop()[2]
            runs.append((kind, tokens, count))
        if not runs:
            raise ValueError("segments=() must have one segment or more")
        base.check_int("tokens of all segments", sum(n * count for _, n, count in runs))
        object.__setattr__(self, "segments", tuple(r if r[2] > 1 else r[:2] for r in runs))
        kinds = {kind for kind, *_ in runs}
        for entry in self.sees:
            if len(entry) not in (2, 3) or not set(entry[:2]) <= kinds:
                raise ValueError(f"sees={entry!r} must be two kinds of {sorted(kinds)}")
            if entry[2:] and entry[2] != _ANY:
                base.check_int(f"the number in sees={entry!r}", entry[2])
        for name, keys in (
            ("sees", [e[:2] for e in self.sees]),
            ("inside", [e[:1] for e in self.inside]),
        ):
            if len(set(keys)) < len(keys):
                raise ValueError(f"{name}={getattr(self, name)!r} must say one thing only once")
        for entry in self.inside:
            allowed = len(entry) == 2 and entry[0] in kinds
            if not allowed or not (entry[1] is None or isinstance(entry[1], base.Pattern)):
                raise ValueError(
                    f"inside={entry!r} must be (kind of {sorted(kinds)}, pattern or None)"
                )

    @property
    def block_state_exact(self) -> bool:
        return all(p is None or p.block_state_exact for p in _tables(self).inside)

    def mask_fn(self, q_pos, kv_pos):
        tables = _tables(self)
        q_start, q_kind, kv_kind = tables.start(q_pos), tables.kind(q_pos), tables.kind(kv_pos)
        earlier, later = kv_pos < q_start, q_pos < tables.start(kv_pos)
        own = ~(earlier | later)
        q, kv = q_pos - q_start, base.greatest(kv_pos - q_start, 0)
        visible = own & ~own
        for rule in dict.fromkeys(tables.inside):
            if rule is not None:
                kinds = [a for a, other in enumerate(tables.inside) if other == rule]
                seen = own & rule.mask_fn(q, kv)
                if len(kinds) < len(tables.inside):
                    seen = seen & functools.reduce(lambda x, y: x | y, [q_kind == a for a in kinds])
                visible = visible | seen
        for a, b, reach in tables.sees:
            seen = earlier | later if reach == _ANY else earlier
            if type(reach) is int:
                seen = seen & (tables.before[b](q_pos) - tables.before[b](kv_pos) <= reach)
            visible = visible | (seen & (q_kind == a) & (kv_kind == b))
        return visible

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        """From the segments that the ranges touch: their kinds, and how many of each come first."""
        tables = _tables(self)
        q, kv = ((tables.segment(lo), tables.segment(hi - 1) + 1)
                 for lo, hi in ((q_lo, q_hi), (kv_lo, kv_hi)))  # fmt: skip
        some, every = _own(tables, q, kv, (q_lo, q_hi, kv_lo, kv_hi))
        reaches = {(a, b): reach for a, b, reach in tables.sees}
        q_ranks, kv_ranks = ([[layout.take(n, x) for x in r] for n in tables.counts]
                             for r in (q, kv))  # fmt: skip
        for a, (x, y) in enumerate(q_ranks):
            for b, (u, w) in enumerate(kv_ranks):
                # Pairs of different segments of kinds a and b: is there one, is one / all visible?
                pairs = (x < y) & (u < w)
                if a == b:
                    pairs = pairs & ~((y - x == 1) & (w - u == 1) & (x == u))
                if (a, b) not in reaches:
                    every = every & ~pairs
                    continue
                reach = reaches[a, b]
                if reach == _ANY:
                    some = some | pairs
                    continue
                # Segment i of kind a has b_before[i] segments of kind b before it, and sees the
                # last `reach` of them: rank < b_before[i] <= rank + reach.
                b_before = tables.counts[b][tables.members[a]]
                reach = _INT32_MAX // 2 if reach is None else reach
                nearest = base.greatest(layout.search(b_before, u), x)
                nearest_before = layout.take(b_before, base.least(nearest, len(b_before) - 1))
                some = some | (pairs & (nearest < y) & (nearest_before <= w - 1 + reach))
                lowest = layout.take(b_before, base.least(x, len(b_before) - 1))
                highest = layout.take(b_before, base.greatest(y - 1, 0))
                all_seen = (lowest >= w - 1 * (a == b)) & (highest <= u + reach)
                every = every & (~pairs | all_seen)
        return base.state_of(empty=~some, full=every)

    def positions(
        self, lengths: Int[Array, "*B S"] | np.ndarray, *, length: int
    ) -> Int[Array, "*B T"]:
        """Positions of T = `length` tokens of ragged segments, one in each of the S segments here.

        For `attend(..., positions=...)`; see `masks.layout.pack`.

        >>> slots = block_rank(4, [8, 8], 4)
        >>> slots.positions(np.array([2, 1, 3, 2]), length=8).tolist()
        [0, 1, 4, 12, 13, 14, 20, 21]
        """
        return layout.pack(_tables(self).starts, lengths, length=length)

    @property
    def causal(self) -> bool:
        tables = _tables(self)
        ahead = any(
            reach == _ANY and tables.members[a][0] < tables.members[b][-1]
            for a, b, reach in tables.sees
        )
        return not ahead and all(p is None or p.causal for p in tables.inside)

    @property
    def may_be_empty(self) -> bool:
        return any(p is None or p.may_be_empty for p in _tables(self).inside)


class _Tables:
    """What the fields say, segment by segment; kinds are numbers in order of appearance."""

    def __init__(self, pattern: Segmented):
        runs = [(*run, 1)[:3] for run in pattern.segments]
        names = list(dict.fromkeys(kind for kind, *_ in runs))
        counts = [count for *_, count in runs]
        kinds = np.repeat([names.index(kind) for kind, *_ in runs], counts)
        tokens = np.repeat([tokens for _, tokens, _ in runs], counts)
        self.starts = (np.cumsum(tokens) - tokens).astype(np.int32)
        self.ends = np.append(self.starts[1:], _INT32_MAX).astype(np.int32)
        self.kinds = kinds
        self.members = [np.flatnonzero(kinds == a) for a in range(len(names))]
        # Segments of each kind before each segment, and before the end.
        self.counts = [
            np.append(0, np.cumsum(kinds == a)).astype(np.int32) for a in range(len(names))
        ]
        inside = dict(pattern.inside)
        self.inside = [inside.get(name, causal.Causal()) for name in names]
        self.sees = [
            (names.index(a), names.index(b), *(reach or (None,))) for a, b, *reach in pattern.sees
        ]
        self.start = layout.Steps(self.starts, self.starts)
        self.kind = layout.Steps(self.starts, kinds)
        self.before = [layout.Steps(self.starts, n[:-1]) for n in self.counts]
        # Of every segment with itself; the counts of those before it serve for ranges.
        own = np.empty(len(kinds), np.int8)
        sizes = self.ends - self.starts
        for a, rule in enumerate(self.inside):
            at = self.members[a]
            zero = np.zeros(len(at), np.int32)
            own[at] = 0 if rule is None else rule.block_state(zero, sizes[at], zero, sizes[at])
        self.some = np.append(0, np.cumsum(own != base.EMPTY)).astype(np.int32)
        self.every = np.append(0, np.cumsum(own == base.FULL)).astype(np.int32)

    def segment(self, position):
        return layout.search(self.starts, position) - 1


@functools.lru_cache(maxsize=256)
def _tables(pattern: Segmented) -> _Tables:
    return _Tables(pattern)


def _own(tables, q, kv, ranges):
    """(some key is visible, all are) of the pairs of tokens in the same segment."""
    first, end = base.greatest(q[0], kv[0]), base.least(q[1], kv[1])
    overlap = first < end
    # The first and the last common segment may be cut, those between them are whole.
    inner, inner_end = first + 1, base.greatest(end - 1, first + 1)
    some, every = (
        layout.take(n, base.least(inner_end, len(tables.starts)))
        - layout.take(n, base.least(inner, len(tables.starts)))
        for n in (tables.some, tables.every)
    )
    some, every = some > 0, every == inner_end - inner
    for segment in (first, base.greatest(end - 1, 0)):
        state = _state_in(tables, segment, ranges)
        some, every = some | (state != base.EMPTY), every & (state == base.FULL)
    return overlap & some, ~overlap | every


def _state_in(tables, segment, ranges):
    """State of what ranges of queries and keys have in one segment."""
    start, end, kind = (layout.take(x, segment) for x in (tables.starts, tables.ends, tables.kinds))
    cut = []
    for lo, hi in (ranges[:2], ranges[2:]):
        low = base.greatest(lo, start)
        # Ranges without a token in the segment are not asked for, but must not be empty.
        cut += [low - start, base.greatest(base.least(hi, end), low + 1) - start]
    state = 0 * kind
    for a, rule in enumerate(tables.inside):
        if rule is not None:
            state = state + (kind == a) * rule.block_state(*cut)
    return state


def block_rank(instruction: int, documents: Sequence[int], query: int) -> Segmented:
    """Documents see the instruction and themselves, the query sees all.  [arXiv:2510.05396, fig. 2]

    The cost is linear in the number of documents. The attention mass of query tokens on each
    document, which ranks them, is `attend` with one-hot values.

    Args:
      instruction, documents, query: tokens (of each document).

    >>> block_rank(16, [64] * 100, 32).segments
    (('instruction', 16), ('document', 64, 100), ('query', 32))
    """
    return Segmented(
        (("instruction", instruction), *(("document", n) for n in documents), ("query", query)),
        (("document", "instruction"), ("query", "instruction"), ("query", "document")),
    )


def block_attention(passages: Sequence[int], question: int) -> Segmented:
    """Passages see only themselves, the last block sees all.  [arXiv:2409.15355]

    Keys of a passage then do not depend on the prompt around it, but for the rotation by its
    position: a cache of them serves every prompt.

    >>> block_attention([3, 4], 2).segments
    (('passage', 3), ('passage', 4), ('question', 2))
    """
    segments = (*(("passage", n) for n in passages), ("question", question))
    return Segmented(segments, (("question", "passage"),))


def many_shot(sink: int, groups: Sequence[int], query: int, *, look_back: int) -> Segmented:
    """Groups of examples see the first one and `look_back` before them.  [arXiv:2503.08640]

    Args:
      sink, groups, query: tokens of the first group, of each other one, and of query and answer,
        which see all. For one request, list only the groups that were retrieved.
      look_back: groups before its own that a group sees, besides the first one.

    >>> many_shot(4, [4] * 3, 2, look_back=1).sees[:2]
    (('group', 'sink'), ('group', 'group', 1))
    """
    return Segmented(
        (("sink", sink), *(("group", n) for n in groups), ("query", query)),
        (
            ("group", "sink"), ("group", "group", look_back),
            ("query", "sink"), ("query", "group"),
        ),
    )  # fmt: skip


def arrow(context: int, candidates: Sequence[int]) -> Segmented:
    """Candidates and context see each other, not other candidates.  [arXiv:2106.01263, fig. 2]

    Two-sided. Give all candidates the same position ids.

    >>> arrow(8, [3, 4]).causal
    False
    """
    return Segmented(
        (("context", context), *(("candidate", n) for n in candidates)),
        (("context", "candidate", _ANY), ("candidate", "context", _ANY)),
        (("context", full.Full()), ("candidate", full.Full())),
    )


def multimodal(
    *segments: tuple,
    visual: base.Pattern | None = ITSELF,
    visual_sees: tuple[str, ...] = (),
) -> Segmented:
    """Text is causal over text and images; what visual tokens see is chosen.

    No attention among visual tokens: they see only themselves [arXiv:2502.02458], or, with
    `visual=None`, nothing at all [arXiv:2408.11795].

    Args:
      segments: `("text", tokens)` and `("visual", tokens)` in order; see `Segmented`.
      visual: what visual tokens see of their own image.
      visual_sees: kinds of earlier segments that visual tokens see.

    Raises:
      ValueError: a segment is of another kind.

    >>> multimodal(("text", 2), ("visual", 4), ("text", 3), visual=None).may_be_empty
    True
    """
    sees = [("text", "text"), ("text", "visual"), *(("visual", kind) for kind in visual_sees)]
    if not {kind for kind, *_ in segments} <= {"text", "visual"}:
        raise ValueError(f"segments={segments!r} must be of kinds 'text' and 'visual'")
    kinds = {kind for kind, *_ in segments}
    return Segmented(
        segments,
        tuple(entry for entry in sees if set(entry) <= kinds),
        (("visual", visual),) if "visual" in kinds else (),
    )


def near_visual(*segments: tuple, shape: tuple[int, int], radius: int) -> base.Pattern:
    """Visual tokens see earlier text and earlier patches near them.  [arXiv:2410.06169]

    Args:
      segments: as for `multimodal`; visual ones hold the patches row by row.
      shape: rows and columns of patches; a token that ends each row is one more column.
      radius: patches on each side along both axes; as much as the grid makes it causal attention
        to the own image.

    >>> pattern = near_visual(("text", 2), ("visual", 9), shape=(3, 3), radius=1)
    >>> pattern.mask_fn(np.int32(10), np.arange(11)).astype(int)  # the last patch
    array([1, 1, 0, 0, 0, 0, 1, 1, 0, 1, 1])
    """
    window = halo.Halo(shape=shape, block=1, halo=radius)
    near = Segmented(segments, (), (("text", None), ("visual", window)))
    # Apart from the rest, so that few blocks depend on both the window and the diagonal.
    rest = multimodal(*segments, visual=None, visual_sees=("text",))
    return rest | (near & causal.Causal())


EXAMPLES = (
    block_rank(3, [9, 20, 9, 1, 14], 6),
    many_shot(5, [7] * 12, 8, look_back=2),
    arrow(13, [6, 11, 6]),
    Segmented(
        segments=(("text", 4), ("visual", 12), ("text", 9), ("visual", 12), ("text", 1)) * 2,
        sees=(("text", "text"), ("text", "visual", 1), ("visual", "text", 2)),
        inside=(("visual", local.Local(window=1)), ("text", local.Local(window=5))),
    ),
)
