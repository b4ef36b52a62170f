"""How many tiles of keys the windows of a grid make a kernel visit, before there is a kernel."""

import dataclasses
import math

import numpy as np

from sparse_attn.masks import grids
from sparse_attn.patterns import base

KV_TILINGS = ("static", "dynamic")


@dataclasses.dataclass(frozen=True)
class Simulation:
    """What `simulate_tiles` counts, of one head; tiles are boxes of the grid.

    Attributes:
      q_tile, kv_tile: tokens along each axis.
      kv_tiling: see `simulate_tiles`.
      q_tiles: tiles of queries.
      visited: pairs of tiles that are computed.
      visited_max: tiles of keys that the busiest tile of queries visits.
      dense_visits: pairs of tiles of dense attention.
      pairs: visible (query, key) pairs.
      dense_pairs: all pairs.
    """

    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    kv_tiling: str
    q_tiles: int
    visited: int
    visited_max: int
    dense_visits: int
    pairs: int
    dense_pairs: int

    @property
    def flop_bound(self) -> float:
        """Speed-up over dense attention if only visible pairs cost something."""
        return self.dense_pairs / self.pairs

    @property
    def bound(self) -> float:
        """Speed-up if every tile of queries takes as long as the busiest: the paper's bound."""
        return self.dense_visits / (self.q_tiles * self.visited_max)

    @property
    def mean_bound(self) -> float:
        """Speed-up if tiles of queries are spread evenly over the device."""
        return self.dense_visits / self.visited

    @property
    def executed_over_useful(self) -> float:
        """Pairs computed over pairs visible; 1 = no masked work, "perfectly block-sparse"."""
        tile = math.prod(self.q_tile) * math.prod(self.kv_tile)
        return self.visited * tile / self.pairs

    def __str__(self) -> str:
        """Three lines for a terminal."""
        q, kv = ("x".join(map(str, tile)) for tile in (self.q_tile, self.kv_tile))
        return (
            f"query tiles {q}, key tiles {kv} ({self.kv_tiling}): at most {self.visited_max} and "
            f"on average {self.visited / self.q_tiles:.1f} key tiles per query tile\n"
            f"bound of the speed-up over dense: {self.bound:.2f} by the busiest query tile, "
            f"{self.mean_bound:.2f} by all, {self.flop_bound:.2f} by FLOPs\n"
            f"executed over useful pairs: {self.executed_over_useful:.2f}"
        )


def simulate_tiles(
    pattern: base.Pattern,
    q_tile: int | tuple[int, ...],
    kv_tile: int | tuple[int, ...],
    *,
    kv_tiling: str = "static",
) -> Simulation:
    """Counts the key tiles that each query tile visits.  [arXiv:2504.16922, sec. 3.2, app. B.1]

    For `neighborhood` patterns with any kernel, stride, dilation and causality, and for all other
    patterns that see a box of keys. Exact: a box meets a tile exactly when it does so along every
    axis, so the axes are counted one by one and multiplied, in O(tokens along the axes). Tokens
    of one residue class of a dilated axis are tiled together, as `reorder.Tiles` orders them.

    Args:
      q_tile, kv_tile: tokens along each axis, an int for all of them. The kernel's tile of queries
        or keys has their product.
      kv_tiling: "static" visits or skips the tiles of a fixed tiling of the keys, as kernels with
        lists of blocks do; "dynamic" begins tiling where the keys of the query tile begin.

    Raises:
      ValueError: a pattern of another kind, or an argument is not in its range.

    >>> from sparse_attn.patterns import neighborhood
    >>> video = neighborhood.Neighborhood((30, 48, 80), kernel_size=(18, 24, 24))
    >>> sliding = simulate_tiles(video, (4, 8, 8), (2, 8, 8))
    >>> round(sliding.bound, 1), round(sliding.flop_bound, 1)  # fig. 3 of the paper
    (3.3, 11.1)
    """
    if not isinstance(pattern, grids.WindowPattern):
        raise ValueError(f"pattern={pattern!r} must be a grids.WindowPattern, as neighborhood is")
    base.check_choice("kv_tiling", kv_tiling, KV_TILINGS)
    q_tile = _per_axis("q_tile", q_tile, pattern.shape)
    kv_tile = _per_axis("kv_tile", kv_tile, pattern.shape)
    axes = []
    for axis in range(len(pattern.shape)):
        visits, pairs = [], 0
        for first, end in _windows(pattern, axis):
            starts = np.arange(0, len(first), q_tile[axis])
            # Bounds never decrease, and windows of neighbours touch: a tile sees one interval.
            low, high = first[starts], np.maximum.reduceat(end, starts)
            if kv_tiling == "static":
                visits.append((high - 1) // kv_tile[axis] - low // kv_tile[axis] + 1)
            else:
                visits.append(-(-(high - low) // kv_tile[axis]))
            pairs += int((end - first).sum())
        axes.append((np.concatenate(visits), pairs))
    shapes = list(zip(pattern.shape, pattern.kv_shape, q_tile, kv_tile, strict=True))
    return Simulation(
        q_tile=q_tile,
        kv_tile=kv_tile,
        kv_tiling=kv_tiling,
        q_tiles=math.prod(len(visits) for visits, _ in axes),
        visited=math.prod(int(visits.sum()) for visits, _ in axes),
        visited_max=math.prod(int(visits.max()) for visits, _ in axes),
        dense_visits=math.prod(-(-n // t) * -(-m // u) for n, m, t, u in shapes),
        pairs=math.prod(pairs for _, pairs in axes),
        dense_pairs=math.prod(n * m for n, m, _, _ in shapes),
    )


def interior_visits(
    kernel_size: int, stride: int, q_tile: int, kv_tile: int, *, kv_tiling: str = "static"
) -> int:
    """Most key tiles along one axis that a query tile visits away from the borders: closed form.

    The window moves by `span = stride * ceil((q_tile - gcd(q_tile, stride)) / stride)` inside a
    query tile, so the tile sees `kernel_size + span` keys. Dynamic tiling visits that many over
    `kv_tile`, rounded up. Static tiling has to begin earlier, by the largest offset that a window
    has in a key tile. At a border the count can be larger by one where the axis is no multiple of
    the tile: `simulate_tiles` counts that too.

    Raises:
      ValueError: static tiling where neither of `stride` and `q_tile` divides the other (offsets
        then have no closed form), or a number is not an int >= 1.

    >>> interior_visits(24, 1, 8, 8), interior_visits(24, 8, 8, 8)  # windows that are tiles: 3
    (5, 3)
    >>> interior_visits(24, 3, 8, 8, kv_tiling="dynamic")
    5
    """
    base.check_choice("kv_tiling", kv_tiling, KV_TILINGS)
    sizes = {"kernel_size": kernel_size, "stride": stride, "q_tile": q_tile, "kv_tile": kv_tile}
    for name, size in sizes.items():
        base.check_int(name, size)
    span = stride * -(-(q_tile - math.gcd(q_tile, stride)) // stride)
    keys = kernel_size + span
    if kv_tiling == "dynamic":
        return -(-keys // kv_tile)
    if stride % q_tile and q_tile % stride:
        raise ValueError(f"stride={stride} must divide or be a multiple of q_tile={q_tile}")
    # Windows begin at multiples of the larger of the two, shifted by what the leader looks back.
    step = math.gcd(max(stride, q_tile), kv_tile)
    offset = kv_tile - step + (stride // 2 - kernel_size // 2) % step
    return (offset + keys - 1) // kv_tile + 1


def _windows(pattern, axis):
    """First and end of the keys of every query along an axis, for each residue class."""
    period, length, kv_length = pattern.period(axis), pattern.shape[axis], pattern.kv_shape[axis]
    for residue in range(min(period, length)):
        queries, keys = (-(-(n - residue) // period) for n in (length, kv_length))
        at = np.arange(queries, dtype=np.int64)
        if pattern.whole(axis):
            yield 0 * at, 0 * at + keys
        else:
            first, end = pattern.window(axis, at, keys)
            yield np.clip(first, 0, keys) + 0 * at, np.clip(end, 0, keys) + 0 * at


def _per_axis(name, value, shape):
    sizes = (value,) * len(shape) if type(value) is int else tuple(value)
    if len(sizes) != len(shape):
        raise ValueError(f"{name}={value!r} must have one entry per axis of shape={shape}")
    for size in sizes:
        base.check_int(name, size)
    return sizes
