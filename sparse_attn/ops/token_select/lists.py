"""Lists of blocks from scores, some queries at a time: the scores of all never exist at once."""

import importlib
import itertools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from sparse_attn.masks import segments
from sparse_attn.ops import scoring, tiles

# Numbers in the largest array of a step.
_AT_ONCE = {"cpu": 1 << 22, "gpu": 1 << 28, "tpu": 1 << 26}
# Queries in a part that sees one prefix of the keys, at least; and how many parts, at most.
_PREFIX, _PARTS = 2048, 8
# As `_PREFIX`, of MoBA's gate on GPUs: a row of its kernel has a power of two numbers, so shorter
# parts save little, and each is a launch of its own.
_GATE_PREFIX = 1 << 14
_LEAST = float(jnp.finfo(jnp.float32).min)


def by_queries(f: Callable[[Any, PyTree], PyTree], arrays: PyTree, *, elements: int) -> PyTree:
    """`f(positions [C], arrays [B, C, ..])` over pieces of the queries, joined to `[B, T, ..]`.

    Args:
      elements: numbers per query in the largest array that `f` makes.

    >>> x = jnp.arange(10.0).reshape(2, 5)
    >>> by_queries(lambda at, x: x + at, x, elements=1 << 21)[1].tolist()
    [5.0, 7.0, 9.0, 11.0, 13.0]
    """
    length = jax.tree.leaves(arrays)[0].shape[1]
    size = max(1, min(length, _AT_ONCE[tiles.target().platform] // max(elements, 1)))
    pieces = jax.tree.map(lambda x: jnp.moveaxis(scoring.blocked(x, size), 1, 0), arrays)
    positions = jnp.arange(-(-length // size) * size, dtype=jnp.int32).reshape(-1, size)
    found = jax.lax.map(lambda xs: f(*xs), (positions, pieces))

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(join, found)


def by_prefix(
    f: Callable[[int, Any, PyTree], Array],
    arrays: PyTree,
    *,
    count: int,
    elements: Callable[[int], int],
    least: int | None = None,
) -> Shaped[Array, "B T U m"]:
    """Lists `f(end, positions, arrays)` of a causal choice, which needs keys before `end` alone.

    As `by_queries`, for a few parts of the row one after the other: half of the scores of a row
    are about later keys, and most of them are not computed.

    Args:
      count: places of a list; `f` may give fewer, the rest is -1.
      elements: numbers per query in the largest array, by `end`.
      least: queries in a part, if the row has as many; default: `_PREFIX`.

    >>> by_prefix(lambda end, at, x: jnp.full((1, at.size, 1, 1), end), jnp.zeros((1, 3)), count=2,
    ...           elements=lambda end: end)[0, 0, 0].tolist()
    [3, -1]
    """
    length = jax.tree.leaves(arrays)[0].shape[1]
    parts = max(1, min(_PARTS, length // (least or _PREFIX)))
    bounds = [length * i // parts for i in range(parts + 1)]
    found = []
    for start, end in itertools.pairwise(bounds):
        part = jax.tree.map(lambda x, a=start, b=end: x[:, a:b], arrays)
        chosen = by_queries(
            lambda at, xs, a=start, b=end: f(b, at + a, xs), part, elements=elements(end)
        )
        widths = ((0, 0),) * 3 + ((0, count - chosen.shape[3]),)
        found.append(jnp.pad(chosen, widths, constant_values=-1))
    return jnp.concatenate(found, 1)


def kernels() -> types.ModuleType | None:
    """The module of GPU kernels for choices, or None where XLA chooses.

    Both choose the same, but for MoBA's gate in half precision: scores that differ in their last
    bits alone count as equal there.

    >>> with tiles.assume(tiles.Target("tpu", "TPU v5 lite")):
    ...     print(kernels())
    None
    """
    if tiles.target().platform != "gpu":
        return None
    # XLA splits its own operations over a mesh; a kernel would get, and repeat, the whole.
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1 and jax.sharding.AxisType.Auto in mesh.axis_types:
        return None
    try:
        importlib.import_module("sparse_attn.ops.block_sparse.triton_gpu").check_device()
        return importlib.import_module("sparse_attn.ops.token_select.triton_choose")
    except (ImportError, NotImplementedError):
        return None


@tiles.one_program
def best(
    scores: Float[Array, "*B n"],
    count: int,
    candidates: Bool[Any, "*#B #n"],
    forced: Bool[Any, "*#B #n"],
) -> Int[Array, "*B m"]:
    """The `count` best candidates, those that are forced first; -1 where there are no more.

    Of equals, those with the lower index. No gradient goes through the choice.

    >>> scores, every = jnp.array([1.0, 5.0, 5.0, 0.0]), jnp.ones(4, bool)
    >>> best(scores, 3, every, jnp.arange(4) == 3).tolist()
    [3, 1, 2]
    """
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
    finite = jnp.clip(jnp.where(jnp.isnan(scores), _LEAST, scores), _LEAST, -_LEAST)
    # `top_k` has -0 after 0.
    finite = jnp.where(finite == 0, 0.0, finite)
    key = jnp.where(candidates, jnp.where(forced, jnp.inf, finite), -jnp.inf)
    count = min(count, key.shape[-1])
    gpu = kernels()
    if gpu is not None and gpu.takes_rows(count, key.shape[-1]):
        return gpu.largest(key, count)
    values, indices = jax.lax.top_k(key, count)
    return jnp.where(values == -jnp.inf, -1, indices)


@tiles.one_program
def by_mean_key(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    block: int,
    top_k: int,
    segment_ids: Any = None,
) -> Int[Array, "B T N m"]:
    """For each query and head its own block and the `top_k` best before it, by `q . mean(k)`.

    The gate of mixture of block attention [arXiv:2502.13189, eq. 5 to 7]; `top_k` does not count
    the own block. No gradient goes through it. With `segment_ids` only blocks that may hold tokens
    of the query's document compete, and padding is in no mean.

    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> by_mean_key(q, k, block=16, top_k=2)[0, 20, 0].tolist()  # query 20: blocks 1 and 0
    [1, 0, -1]
    """
    q, k = jax.lax.stop_gradient((q, k))
    blocks = -(-k.shape[1] // block)
    q_ids, kv_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    real = jnp.ones((1, k.shape[1]), bool) if kv_ids is None else kv_ids != 0
    means = scoring.pool(k, block, real)
    if kv_ids is not None:
        low, high, _ = segments.block_ranges(kv_ids, block, blocks)

    def seen(end):
        return min(blocks, -(-end // block))

    def choose(end, positions, xs):
        q, ids = xs
        at = jnp.arange(seen(end), dtype=jnp.int32)
        own = at == (positions // block)[:, None]
        past = (at + 1) * block <= positions[:, None]
        candidates = (past | own)[None]
        if kv_ids is not None:
            mine = ids[..., None]
            candidates = candidates & (low[:, None, : at.size] <= mine)
            candidates = candidates & (mine <= high[:, None, : at.size])
        scores = scoring.logits(q, means[:, : at.size])
        # Lists are smaller to transpose than scores.
        return jnp.moveaxis(best(scores, top_k + 1, candidates[:, None], own), 1, 2)

    def choose_by_kernel(end, positions, _):
        documents = None if kv_ids is None else (ids, low, high)
        return gpu.gate(
            q, means, positions[:1], positions.size, min(top_k + 1, seen(end)), block=block,
            blocks=seen(end), documents=documents,
        )  # fmt: skip

    ids = jnp.zeros(q.shape[:2], jnp.int32) if q_ids is None else q_ids
    heads, gpu = q.shape[0] * q.shape[2], kernels()
    if gpu is not None and gpu.takes_gate(q, blocks, top_k + 1):
        # Scores stay in registers, and q as it lies: pieces would be copies.
        return by_prefix(
            choose_by_kernel, ids, count=top_k + 1, elements=lambda end: heads, least=_GATE_PREFIX
        )
    return by_prefix(choose, (q, ids), count=top_k + 1, elements=lambda end: heads * seen(end))
