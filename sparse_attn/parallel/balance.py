"""Which rank holds which chunks of a row: causal masks give late queries more work than early ones.

The cost of a chunk is its number of active blocks. Any order of the chunks is right (masks and
positions follow the tokens); "zigzag" keeps neighbours together, which a ring of keys needs, and
"balanced" is free to put any chunk anywhere, which suits `all_gather_kv`.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from sparse_attn.masks import block_mask

ORDERS = ("text", "zigzag", "balanced")


def order(
    kind: str, masks: Sequence[block_mask.BlockMask], *, ranks: int
) -> tuple[int, ...] | None:
    """The chunk that stands at each place of the row, None for the order of the text.

    "zigzag" gives rank r of R chunks r and 2R-1-r [arXiv:2407.21783, sec. 3.3.2]; "balanced" gives
    each rank as many query blocks of the masks, longest first to the rank with least work so far
    (R. L. Graham, Bounds on multiprocessing timing anomalies, SIAM J. Appl. Math., 1969).

    Args:
      kind: one of `ORDERS`.
      masks: static, those of all layers, of equal lengths and blocks.
      ranks: size of the `seq` axis.

    Raises:
      ValueError: there is no such order, or the chunks cannot be shared out equally.

    >>> order("zigzag", [], ranks=2)
    (0, 3, 1, 2)
    """
    if kind not in ORDERS:
        raise ValueError(f"mesh.order={kind!r} must be one of {', '.join(ORDERS)}")
    if kind == "text" or ranks == 1:
        return None
    if kind == "zigzag":
        return tuple(chunk for r in range(ranks) for chunk in (r, 2 * ranks - 1 - r))
    return tuple(assign(sum(map(costs, masks)), ranks=ranks).ravel().tolist())


def costs(mask: block_mask.BlockMask) -> Float[np.ndarray, "rows"]:
    """Active blocks of every query block, mean over heads: layers have equally many heads.

    >>> from sparse_attn.masks import lower
    >>> from sparse_attn.patterns import causal
    >>> costs(lower.lower(causal.Causal(), q_len=8, block_q=2, block_kv=2)).tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    weights = np.ones(mask.num_tables, np.int64)
    if mask.head_tables is not None:
        weights = np.bincount(mask.head_tables, minlength=mask.num_tables)
    return (weights[:, None] * mask.kv_counts[0]).sum(0) / weights.sum()


def assign(
    work: Int[np.ndarray, "chunks"] | Float[np.ndarray, "chunks"], *, ranks: int
) -> Int[np.ndarray, "ranks each"]:
    """The chunks of each rank, ascending: equally many, and about equal sums of `work`.

    Raises:
      ValueError: the number of chunks is not a multiple of the ranks.

    >>> assign(np.array([1, 2, 3, 4]), ranks=2).tolist()
    [[0, 3], [1, 2]]
    """
    if len(work) % ranks:
        raise ValueError(f"{len(work)} query blocks must be a multiple of the {ranks} ranks")
    each = len(work) // ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    least = [(0, rank) for rank in range(ranks)]
    for chunk in np.argsort(-work, kind="stable").tolist():
        load, rank = heapq.heappop(least)
        held[rank].append(chunk)
        if len(held[rank]) < each:
            heapq.heappush(least, (load + work[chunk], rank))
    return np.sort(np.array(held), axis=1)


def imbalance(masks: Sequence[block_mask.BlockMask], *, kind: str, ranks: int) -> float:
    """Work of the busiest rank over the mean of all: 1.0 is perfect, 2.0 wastes half of the time.

    Args:
      masks: as `order`; the work is their sum.
      kind: one of `ORDERS`.
      ranks: size of the `seq` axis.

    Raises:
      ValueError: as `order`, or the query blocks cannot be shared out in chunks.

    >>> from sparse_attn.masks import lower
    >>> from sparse_attn.patterns import causal
    >>> mask = lower.lower(causal.Causal(), q_len=1024, block_q=64, block_kv=64)
    >>> [round(imbalance([mask], kind=kind, ranks=4), 2) for kind in ORDERS]
    [1.71, 1.0, 1.0]
    """
    places = order(kind, masks, ranks=ranks)
    places = range(ranks) if places is None else places
    work = sum(map(costs, masks))
    if len(work) % len(places):
        raise ValueError(f"{len(work)} query blocks must be a multiple of {len(places)} chunks")
    loads = work.reshape(len(places), -1).sum(1)[list(places)].reshape(ranks, -1).sum(1)
    return float(loads.max() / loads.mean())
