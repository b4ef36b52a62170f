"""The problems that judge a backend: what a case is, the parts it is made of, and all of them."""

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparse_attn.masks import block_mask, lower
from sparse_attn.patterns import base, causal, full, local, per_head, sinks

CAUSAL, FULL = causal.Causal(), full.Full()


@dataclasses.dataclass(frozen=True)
class Environment:
    """How a backend runs on this machine.

    Attributes:
      enter: makes the context manager that its calls run in (interpret mode, assumed target).
      reason: why it cannot run here, naming what would; None = it can.
      dtype, head_dim, block: of the cases that do not fix them.
      interpreted: only the cases marked `core` run in the fast lane.
    """

    enter: Callable[[], Any] = contextlib.nullcontext
    reason: str | None = None
    dtype: Any = jnp.float32
    head_dim: int = 16
    block: int = 32
    interpreted: bool = False


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of `attend` with its cotangents, and which pairs are visible (bool [B, N, T, S])."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    visible: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray
    mask: Any
    segment_ids: Any = None
    positions: Any = None
    key_bias: Any = None
    sink_logits: Any = None
    scale: float | None = None
    logits_soft_cap: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes, the mask, and how the rest of the problem is made.

    Attributes:
      mask: a pattern (or PerHead, or tuple), or `f(rng, case, env) -> (mask, visible [.., T, S])`.
      dtype: None = the environment's.
      head_dim, v_head_dim: as multiples of the environment's.
      change: `f(rng, problem, case) -> problem`.
      traced: the mask's tables are arguments of the jitted function.
      core: also run where each case is expensive (interpreters).
      logits: their size, where it is extreme. lse rounds to float32, so the weights that a
        backward recomputes from it are only good to `logits * 2**-21`.
    """

    name: str
    mask: Any = CAUSAL
    batch: int = 1
    q_len: int = 150
    kv_len: int | None = None
    heads: int = 2
    kv_heads: int = 2
    dtype: Any = None
    head_dim: float = 1
    v_head_dim: float = 1
    change: Callable | None = None
    traced: bool = False
    core: bool = False
    logits: float = 0.0

    @property
    def keys(self) -> int:
        return self.q_len if self.kv_len is None else self.kv_len


def evaluate(pattern, q_pos, kv_pos) -> np.ndarray:
    """Element mask of a pattern at positions [.., T], [.., S], straight from `mask_fn`."""
    found = pattern.mask_fn(
        np.asarray(q_pos, np.int32)[..., :, None], np.asarray(kv_pos, np.int32)[..., None, :]
    )
    return np.broadcast_to(
        found, (*np.shape(q_pos)[:-1], np.shape(q_pos)[-1], np.shape(kv_pos)[-1])
    )


def same_document(q_ids, kv_ids) -> np.ndarray:
    """Pairs of one document, bool [B, 1, T, S]."""
    q_ids, kv_ids = np.asarray(q_ids)[:, None, :, None], np.asarray(kv_ids)[:, None, None, :]
    return (q_ids == kv_ids) & (q_ids != 0)


@functools.lru_cache(maxsize=256)
def build(case: Case, env: Environment) -> Problem:
    """The problem of a case; the same numbers every time."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    dtype = env.dtype if case.dtype is None else case.dtype
    dim, v_dim = int(env.head_dim * case.head_dim), int(env.head_dim * case.v_head_dim)
    shape = (case.batch, case.q_len, case.heads)

    def normal(*shape, dtype=dtype):
        return rng.standard_normal(shape).astype(np.float32).astype(dtype)

    if callable(case.mask):
        mask, visible = case.mask(rng, case, env)
    else:
        mask, heads = case.mask, case.mask
        if isinstance(heads, per_head.PerHead):
            heads = heads.for_heads(case.heads)
        heads = (heads,) if isinstance(heads, base.Pattern) else heads
        visible = np.stack(
            [evaluate(p, np.arange(case.q_len), np.arange(case.keys)) for p in heads]
        )
    problem = Problem(
        q=normal(*shape, dim),
        k=normal(case.batch, case.keys, case.kv_heads, dim),
        v=normal(case.batch, case.keys, case.kv_heads, v_dim),
        visible=np.broadcast_to(visible, (case.batch, case.heads, case.q_len, case.keys)),
        dout=normal(*shape, v_dim),
        dlse=normal(*shape, dtype=np.float32),
        mask=mask,
    )
    return problem if case.change is None else case.change(rng, problem, case)


# --- The parts that cases are made of -------------------------------------------------------------


def documents(*lengths: tuple[int, ...]):
    """Packed documents by length, per batch entry; what is left over is padding."""

    def change(rng, problem, case):
        ids = np.zeros((case.batch, case.q_len), np.int32)
        for b in range(case.batch):
            numbered = np.repeat(np.arange(1, len(lengths[b]) + 1), lengths[b])
            ids[b, : len(numbered)] = numbered[: case.q_len]
        visible = problem.visible & same_document(ids, ids)
        return dataclasses.replace(problem, segment_ids=ids, visible=visible)

    return change


def scattered_documents(rng, problem, case):
    """Ids in any order, different for queries and keys."""
    ids = tuple(
        rng.integers(0, 4, (case.batch, n)).astype(np.int32) for n in (case.q_len, case.keys)
    )
    visible = problem.visible & same_document(*ids)
    return dataclasses.replace(problem, segment_ids=ids, visible=visible)


def biased(*, per_head: bool = False, hidden: float = 0.0):
    """key_bias [B, S] or [B, N, S], a share of it -inf."""

    def change(rng, problem, case):
        shape = (case.batch, case.heads, case.keys) if per_head else (case.batch, case.keys)
        bias = rng.standard_normal(shape).astype(np.float32)
        bias[rng.random(shape) < hidden] = -np.inf
        return dataclasses.replace(problem, key_bias=bias)

    return change


def with_sinks(rng, problem, case):
    logits = rng.standard_normal(case.heads).astype(np.float32)
    return dataclasses.replace(problem, sink_logits=logits)


def with_cap(cap: float):
    return lambda rng, problem, case: dataclasses.replace(problem, logits_soft_cap=cap)


def scaled(size: float):
    """Logits of about `size`."""

    def change(rng, problem, case):
        factor = np.asarray(np.sqrt(size), problem.q.dtype)
        q, k = problem.q * factor, problem.k * factor
        return dataclasses.replace(problem, q=q, k=k)

    return change


def chain(*changes):
    def change(rng, problem, case):
        for one in changes:
            problem = one(rng, problem, case)
        return problem

    return change


def placed(q_positions, kv_positions=None):
    """Explicit positions ([T] or [B, T]; a pair when keys stand elsewhere)."""

    def change(rng, problem, case):
        both = (q_positions, q_positions if kv_positions is None else kv_positions)
        both = tuple(np.asarray(x, np.int32) for x in both)
        visible = evaluate(problem.mask, *both)
        visible = visible[None, None] if visible.ndim == 2 else visible[:, None]
        visible = np.broadcast_to(visible, problem.visible.shape)
        given = both[0] if kv_positions is None else both
        return dataclasses.replace(problem, positions=given, visible=visible)

    return change


def blocks(pattern, block_q=None, block_kv=None):
    """A pattern lowered at explicit block sizes (the environment's where None)."""

    def make(rng, case, env):
        sizes = {"block_q": block_q or env.block, "block_kv": block_kv or env.block}
        mask = lower.lower(pattern, q_len=case.q_len, kv_len=case.keys, **sizes)
        return mask, evaluate(pattern, np.arange(case.q_len), np.arange(case.keys))

    return make


def drawn(density: float, *, per_head: bool = False, empty_block: bool = False):
    """`from_array` of a random mask; blocks of it are empty, full and mixed."""

    def make(rng, case, env):
        heads = case.heads if per_head else 1
        array = rng.random((heads, case.q_len, case.keys)) < density
        block = env.block
        array[:, : block // 2, : 2 * block] = True
        array[:, block : 2 * block, :block] = True
        if empty_block:
            array[:, 2 * block : 3 * block] = False
            array[:, : block // 4] = False
        mask = block_mask.from_array(array if per_head else array[0], block_q=block, block_kv=block)
        return mask, array

    return make


def states(rule, *, batch: int = 1, tables: int = 1):
    """`from_block_states` of random states, EMPTY rows and columns among them."""

    def make(rng, case, env):
        grid = [-(-n // env.block) for n in (case.q_len, case.keys)]
        by_rule = np.ones([n * env.block for n in grid], bool)
        by_rule[: case.q_len, : case.keys] = evaluate(
            rule, np.arange(case.q_len), np.arange(case.keys)
        )
        whole = by_rule.reshape(grid[0], env.block, grid[1], env.block).all((1, 3))
        shape = (batch, tables, *grid)
        # FULL where the rule allows it, but not always: a loose PARTIAL is legal.
        state = np.where(whole & (rng.random(shape) < 0.7), 2, 1) * (rng.random(shape) < 0.6)
        state[:, 0, -1] = 0
        state[..., 1] = 0
        mask = block_mask.from_block_states(
            state, rule=rule, q_len=case.q_len, kv_len=case.keys,
            block_q=env.block, block_kv=env.block,
        )  # fmt: skip
        active = state.repeat(env.block, -2).repeat(env.block, -1) != 0
        visible = (active & by_rule)[..., : case.q_len, : case.keys]
        return mask, visible[:, np.arange(case.heads) // (case.heads // tables)]

    return make


HOLE = CAUSAL & ~local.Local(window=40)  # The first 40 queries see nothing.
WINDOW = local.Local(window=20)
STREAM = WINDOW | sinks.Sinks(tokens=3)

CASES = (
    Case("causal"),
    Case("window_gqa", WINDOW, q_len=200, heads=4, core=True),
    Case("full_cross_mqa", FULL, q_len=70, kv_len=130, heads=3, kv_heads=1),
    Case("full_more_queries", CAUSAL, q_len=130, kv_len=70),
    Case("stream_batch", STREAM, batch=2, q_len=257),
    Case("two_sided", local.Local(reach=(9, 4)), q_len=129),
    Case("one_token", q_len=1),
    Case("decode", local.Local(reach=(30, 30)), q_len=1, kv_len=100,
         change=placed([77], np.arange(100))),
    Case("block_multiple", q_len=256, heads=1, kv_heads=1),
    Case("per_head", (WINDOW, CAUSAL, FULL, WINDOW), heads=4),
    Case("per_head_empty", per_head.PerHead((CAUSAL, CAUSAL & ~CAUSAL)), core=True),
    Case("small_blocks", blocks(STREAM, 16, 16), q_len=70),
    Case("uneven_blocks", blocks(WINDOW, 128, 64), q_len=200, core=True),
    Case("empty_rows", HOLE),
    Case("empty_query_blocks", blocks(CAUSAL & ~local.Local(window=140)), q_len=300, core=True),
    Case("empty_everywhere", CAUSAL & ~CAUSAL, q_len=40),
    Case("bits", drawn(0.1), q_len=200, heads=4, core=True),
    Case("bits_per_head", drawn(0.3, per_head=True, empty_block=True), q_len=200, heads=4),
    Case("bits_all_true", drawn(1.0), q_len=140, kv_len=100),
    Case("bits_documents", drawn(0.9, empty_block=True), batch=2, q_len=200,
         change=documents((1, 70, 100), (200,))),
    Case("documents", batch=2, change=documents((40, 1, 1, 60), (150,))),
    Case("documents_window", blocks(WINDOW), batch=2, q_len=200, heads=4,
         change=documents((7,) * 26, (1, 66, 64, 69))),
    Case("documents_scattered", FULL, batch=2, q_len=90, kv_len=140, change=scattered_documents),
    Case("documents_padding_only", batch=2, q_len=70, change=documents((), (70,))),
    Case("run_time", states(CAUSAL), q_len=200, traced=True),
    Case("run_time_per_head", states(STREAM, batch=2, tables=2), batch=2, heads=4,
         traced=True, core=True),
    Case("run_time_query_heads", states(FULL, tables=4), heads=4, q_len=140, kv_len=200,
         traced=True),
    Case("run_time_documents", states(CAUSAL, batch=2), batch=2, q_len=140, traced=True,
         change=documents((100, 20), (1, 139))),
    Case("run_time_bits", drawn(0.2), q_len=140, traced=True),
    Case("static_states", states(CAUSAL, tables=2), heads=4, q_len=200),
    Case("positions_permuted", STREAM, change=placed(np.random.default_rng(0).permutation(150)),
         core=True),
    Case("positions_batch", WINDOW, batch=2, q_len=70,
         change=placed(np.stack([np.arange(70) + 5, np.arange(70) * 2]))),
    Case("positions_pair", WINDOW, q_len=40, kv_len=130,
         change=placed(np.arange(90, 130), np.arange(130))),
    Case("key_bias", batch=2, q_len=140, change=biased()),
    Case("key_bias_per_head", WINDOW, batch=2, heads=4, change=biased(per_head=True, hidden=0.3),
         core=True),
    Case("key_bias_hides_all", FULL, batch=2, q_len=70, change=biased(hidden=1.0)),
    Case("key_bias_hides_rows", local.Local(window=3), change=biased(hidden=0.7)),
    Case("soft_cap", change=with_cap(2.0)),
    Case("soft_cap_large", change=chain(scaled(5000.0), with_cap(50.0))),
    Case("sink_logits", WINDOW, heads=4, change=with_sinks),
    Case("sink_logits_empty_rows", HOLE, change=with_sinks),
    Case("value_dim", WINDOW, v_head_dim=2),
    Case("scale", change=lambda rng, problem, case: dataclasses.replace(problem, scale=0.7)),
    Case("extreme_logits", change=scaled(1e4), logits=1e4),
    Case("everything", STREAM, batch=2, heads=4, core=True,
         change=chain(documents((3, 70, 1, 60), (149,)), biased(hidden=0.1), with_sinks,
                      with_cap(5.0))),
    Case("float32", WINDOW, dtype=jnp.float32),
    Case("bfloat16", STREAM, heads=4, dtype=jnp.bfloat16),
    Case("bfloat16_everything", q_len=200, heads=4, batch=2, dtype=jnp.bfloat16,
         change=chain(biased(), with_sinks, with_cap(5.0))),
    Case("float16", WINDOW, q_len=200, heads=4, dtype=jnp.float16),
)  # fmt: skip

BY_NAME = {case.name: case for case in CASES}
