"""What the layers of a model can see together: how far, from which layer on everything."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sparse_attn.masks import lower
from sparse_attn.patterns import base, per_head, per_layer
from sparse_attn.viz import tables

_ALL_QUERIES = 2048  # Tokens up to which every query is followed: T x T booleans of 4 MB.
_FEW = 8  # Queries that are followed one by one, however short the sequence.
_BLOCK = 128
_ROWS = 128  # Rows of blocks listed at a time.
_CHUNK = 1 << 20  # Elements of mask_fn evaluated at a time.


@dataclasses.dataclass(frozen=True)
class LayerReach:
    """What the output of one layer depends on, over the queries that were followed.

    Attributes:
      layer: counted from 1: the output of so many layers.
      back, ahead: tokens to the furthest one reached, before and after the query, of any query.
      coverage: tokens reached / tokens wanted, all queries together.
      complete: queries that reach every token they should.
    """

    layer: int
    back: int
    ahead: int
    coverage: float
    complete: int


@dataclasses.dataclass(frozen=True, eq=False)
class ReceptiveField:
    """What `receptive_field` found; all numbers are exact, token by token.

    Attributes:
      length: tokens.
      queries: int `[Q]`, positions of the queries that were followed.
      causal: True when tokens should reach the ones before them, False when all tokens.
      layers: one entry per layer.
      reached: bool `[Q, length]`, what the last layer depends on.
    """

    length: int
    queries: Int[np.ndarray, "Q"]
    causal: bool
    layers: tuple[LayerReach, ...]
    reached: Bool[np.ndarray, "Q T"]

    @property
    def first_full_layer(self) -> int | None:
        """The first layer, from 1, where every query reaches all it should; None = no layer."""
        complete = (layer.layer for layer in self.layers if layer.complete == len(self.queries))
        return next(complete, None)

    def unreachable(self, query: int) -> Int[np.ndarray, "N"]:
        """Positions that `query` should reach and does not, after the last layer.

        Raises:
          ValueError: this query was not followed.
        """
        (row,) = np.nonzero(self.queries == query)
        if not len(row):
            raise ValueError(f"query={query} must be one that was followed: {self.queries}")
        wanted = _wanted(self.queries[row], self.length, self.causal)
        return np.nonzero((wanted & ~self.reached[row])[0])[0]

    def __str__(self) -> str:
        """The layers as a table, then what the last query misses."""
        followed = "all" if len(self.queries) == self.length else str(len(self.queries))
        goal = "the tokens before it" if self.causal else "every token"
        last = int(self.queries[-1])
        missing = self.unreachable(last)
        head = tables.text(
            ("layer", "back", "ahead", "reached", "complete queries"),
            [(x.layer, x.back, x.ahead, f"{x.coverage:.4f}", x.complete) for x in self.layers],
        )
        full = self.first_full_layer
        return (
            f"{self.length} tokens, {followed} queries followed; each should reach {goal}\n{head}\n"
            f"first layer with full coverage: {'none' if full is None else full}\n"
            f"query {last} does not reach {len(missing)} tokens"
            + (f": {ranges(missing)}" if len(missing) else "")
        )


def receptive_field(
    schedule: Any,
    length: int,
    *,
    num_layers: int | None = None,
    queries: Sequence[int] | None = None,
) -> ReceptiveField:
    """What each token of a model depends on after each layer, through attention and residuals.

    After layer l a token depends on what it depended on before, and on all that the tokens which
    it sees in layer l depended on: a product of boolean matrices. Exact for any pattern. Up to
    2,048 tokens every query is followed, as a T x T matrix. Beyond, some queries are followed
    down the layers as sets of tokens, block by block, in O(queries x tokens) memory and the time
    of counting the blocks that the sets touch.

    Args:
      schedule: a `PerLayer`, a sequence of patterns or `PerHead`s, one per layer, or one for all.
        Heads see what any of them sees.
      length: tokens.
      num_layers: default: the entries of the schedule, and 8 for one pattern.
      queries: positions to follow; default all, or the last one of long sequences.

    Raises:
      ValueError: no layer, one that chooses its keys at run time, or a query outside the sequence.

    >>> from sparse_attn.patterns import local
    >>> field = receptive_field(local.Local(window=5), 16, num_layers=4)
    >>> [layer.back for layer in field.layers], field.first_full_layer
    ([4, 8, 12, 15], 4)
    """
    layers = _layers(schedule, num_layers)
    base.check_int("length", length)
    causal = all(all(p.causal for p in layer) for layer in layers)
    if queries is None:
        queries = range(length) if length <= _ALL_QUERIES else (length - 1,)
    at = np.array(sorted(set(queries)), np.int64)
    if not len(at) or at[0] < 0 or at[-1] >= length:
        raise ValueError(f"queries={queries!r} must be one or more positions below {length}")
    follow = _up if length <= _ALL_QUERIES and len(at) > _FEW else _down
    wanted = _wanted(at, length, causal)
    found, reached = [], np.empty(0)
    for layer, reached in enumerate(follow(layers, length, at), start=1):
        first, last = reached.argmax(1), length - 1 - reached[:, ::-1].argmax(1)
        found.append(
            LayerReach(
                layer=layer,
                back=int((at - first).max()),
                ahead=int((last - at).max()),
                coverage=int((reached & wanted).sum()) / int(wanted.sum()),
                complete=int((reached | ~wanted).all(1).sum()),
            )
        )
    return ReceptiveField(length, at, causal, tuple(found), reached)


def ranges(positions: Int[np.ndarray, "N"], most: int = 6) -> str:
    """Sorted positions as text, runs joined, at most so many runs.

    >>> ranges(np.array([0, 1, 2, 7, 9, 10]), most=2)
    '0-2, 7 and 1 more'
    """
    if not len(positions):
        return ""
    runs = np.split(positions, np.nonzero(np.diff(positions) > 1)[0] + 1)
    texts = [f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs[:most]]
    return ", ".join(texts) + (f" and {len(runs) - most} more" if len(runs) > most else "")


def _layers(schedule, num_layers) -> list[tuple[base.Pattern, ...]]:
    """The distinct patterns of the heads of every layer."""
    if isinstance(schedule, per_layer.PerLayer):
        entries = schedule.patterns
    elif isinstance(schedule, (base.Pattern, per_head.PerHead)):
        entries = (schedule,)
        num_layers = 8 if num_layers is None else num_layers
    else:
        entries = tuple(schedule)
    num_layers = len(entries) if num_layers is None else num_layers
    if not entries or num_layers < 1:
        raise ValueError(f"num_layers={num_layers} of schedule={schedule!r} must be >= 1")
    for entry in entries:
        if not isinstance(entry, (base.Pattern, per_head.PerHead)):
            raise ValueError(f"schedule has {entry!r}; every layer must be a Pattern or a PerHead")
    layers = [entries[i % len(entries)] for i in range(num_layers)]
    return [
        tuple(dict.fromkeys(e.patterns)) if isinstance(e, per_head.PerHead) else (e,)
        for e in layers
    ]


def _wanted(queries, length, causal):
    at = np.arange(length)
    return at <= queries[:, None] if causal else np.ones((len(queries), length), bool)


def _up(layers, length, queries):
    """Yields what `queries` reach after each layer, from the matrix of all queries."""
    at = np.arange(length, dtype=np.int32)
    seen = {}
    for layer in layers:
        if layer not in seen:
            masks = [np.broadcast_to(p.mask_fn(at[:, None], at), (length,) * 2) for p in layer]
            seen[layer] = np.any(masks, axis=0).astype(np.float32)
    reached = np.eye(length, dtype=bool)
    for layer in layers:
        reached = reached | (seen[layer] @ reached.astype(np.float32) > 0)
        yield reached[queries]


def _down(layers, length, queries):
    """Yields the same from sets that grow from the queries of a layer down to its input.

    The set of a query after layer l grows through layers l, l - 1, ... 1. Layers whose numbers
    differ by a whole period of the schedule begin alike, so one descent per phase serves them all.
    """
    period = next(n for n in range(1, len(layers) + 1) if layers[n:] == layers[: len(layers) - n])
    masks = {
        layer: lower.lower(layer, q_len=length, block_q=_BLOCK, block_kv=_BLOCK)
        for layer in set(layers)
    }
    descents = []
    for phase in range(min(period, len(layers))):
        top = max(n for n in range(len(layers)) if n % period == phase)
        descents.append(_descent([masks[layer] for layer in layers[top::-1]], length, queries))
    for layer in range(len(layers)):
        # Other phases have not been here: go on until `layer + 1` layers are crossed.
        for crossed, reached in descents[layer % period]:
            if crossed == layer + 1:
                yield reached
                break


def _descent(masks, length, queries):
    reached = np.zeros((len(queries), length), bool)
    reached[np.arange(len(queries)), queries] = True
    before: dict[int, np.ndarray] = {}
    for crossed, mask in enumerate(masks, start=1):
        # Tokens that a mask was asked about in a layer above need not be asked about again.
        new = reached & ~before.get(id(mask), np.zeros_like(reached))
        before[id(mask)] = reached
        reached = reached | _seen(mask, new, reached)
        yield crossed, reached


def _seen(mask, sets, known):
    """The keys that the tokens of each set see, without blocks that all know: bool `[Q, length]`.

    Time follows the tokens in the sets times the blocks that they see.
    """
    queries = _blocks(sets, mask.block_q)
    unknown = ~_blocks(known, mask.block_kv, fill=True).all((0, 2))
    found = np.zeros((len(sets), mask.num_cols, mask.block_kv), bool)
    touched = queries.any(-1)
    (all_rows,) = np.nonzero(touched.any(0) & unknown.any())
    for table in range(mask.num_tables):
        starts, counts, partial = (
            x[0, table] for x in (mask.kv_starts, mask.kv_counts, mask.kv_partial_counts)
        )
        for i in range(0, len(all_rows), _ROWS):
            some = all_rows[i : i + _ROWS]
            for first, count in ((starts, partial), (starts + partial, counts - partial)):
                rows = np.repeat(some, count[some])
                ends = np.cumsum(count[some])
                places = first[rows] + np.arange(len(rows)) - np.repeat(ends, count[some])
                cols = mask.kv_indices[0, table, places + count[rows]]
                rows, cols = rows[unknown[cols]], cols[unknown[cols]]
                if first is starts:
                    _add_partial(mask, table, queries, found, rows, cols)
                    continue
                for one, blocks in zip(found, touched, strict=True):
                    one[cols[blocks[rows]]] = True
    return found.reshape(len(sets), -1)[:, : sets.shape[1]]


def _add_partial(mask, table, queries, found, rows, cols):
    entry, offset = np.nonzero(queries.any(0)[rows])
    step = max(1, _CHUNK // mask.block_kv)
    for i in range(0, len(entry), step):
        row, col, at = rows[entry[i : i + step]], cols[entry[i : i + step]], offset[i : i + step]
        q_pos = (row * mask.block_q + at).astype(np.int32)[:, None]
        kv_pos = (col[:, None] * mask.block_kv + np.arange(mask.block_kv)).astype(np.int32)
        visible = np.broadcast_to(mask.rule(table).mask_fn(q_pos, kv_pos), kv_pos.shape)
        for one, tokens in zip(found, queries, strict=True):
            mine = np.nonzero(tokens[row, at])[0]
            mine = mine[np.argsort(col[mine], kind="stable")]
            if len(mine):
                blocks, starts = np.unique(col[mine], return_index=True)
                one[blocks] |= np.logical_or.reduceat(visible[mine], starts)


def _blocks(tokens, block, *, fill=False):
    """bool `[Q, length]` as `[Q, blocks, block]`, padded with `fill`."""
    padding = -tokens.shape[1] % block
    padded = np.pad(tokens, ((0, 0), (0, padding)), constant_values=fill)
    return padded.reshape(len(tokens), -1, block)
