"""What the tests of rules share: inputs, the choice as an array, and rules that keep all."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from sparse_attn.masks import block_mask, lower
from sparse_attn.ops import attend as attend_lib
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base

PACKAGE = "sparse_attn.selection"
NAMES = patterns_base.discover(PACKAGE)
BY_NAME = {n: importlib.import_module(f"{PACKAGE}.{n}").EXAMPLES for n in NAMES}
MASKS = {n: x for n, x in BY_NAME.items() if not isinstance(x[0], base.OwnAttention)}
EXAMPLES = [e for examples in MASKS.values() for e in examples]
# Rules that have no mask; each is held against its own definition in tests of its own.
OWN = [e for n, x in BY_NAME.items() if n not in MASKS for e in x]
# Each program runs once: compiling it costs more than running it.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}

# Fields that set a budget, and the value that lets all through.
EVERYTHING = {
    "top_k": 10_000, "top_p": 1.0, "columns": 10_000, "diagonals": 10_000, "gamma": 1.0,
    "theta": 1e9, "counts": (10_000,), "threshold": 0.0, "density": 1.0,
}  # fmt: skip

# Whole blocks of queries and of keys, and a part of one more; see `ragged`. The first draw is the
# first of the list, which is to say something too.
RAGGED = st.tuples(*2 * (st.tuples(st.sampled_from([2, 4, 3, 1, 0]), st.floats(0, 1)),))


def ragged(rule, lengths):
    """Tokens of queries and of keys that are multiples of no block of more than one."""
    blocks = rule.block_q, rule.block_kv
    return tuple(
        whole * block + 1 + round(part * max(block - 2, 0))
        for block, (whole, part) in zip(blocks, lengths, strict=True)
    )


def inputs(seed=0, *, batch=2, length=50, kv_len=None, heads=4, kv_heads=2, dim=8):
    """q, k, v; logits are large enough for budgets to matter."""
    rng = np.random.default_rng(seed)
    kv_len = length if kv_len is None else kv_len
    shapes = (length, heads), (kv_len, kv_heads), (kv_len, kv_heads)
    return tuple(
        jnp.asarray(rng.standard_normal((batch, *s, dim)) * 2, jnp.float32) for s in shapes
    )


def params(rule, q, k):
    return rule.params_like(q.shape[2], k.shape[2], q.shape[3])


@functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILER_OPTIONS)
def _select(rule, q, k, segment_ids, gate):
    return rule.select(q, k, segment_ids=segment_ids, params=gate)


def select(rule, q, k, segment_ids=None, gate=None):
    gate = params(rule, q, k) if gate is None else gate
    return _select(rule, q, k, segment_ids, gate)


@functools.partial(jax.jit, static_argnames=("rule", "order"), compiler_options=COMPILER_OPTIONS)
def attend(rule, q, k, v, order=None):
    return rule.attend(q, k, v, order=order, impl="reference")


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def attend_masked(q, k, v, mask, segment_ids=None):
    """Output and lse of the dense reference."""
    return attend_lib.attend(
        q, k, v, mask=mask, segment_ids=segment_ids, return_lse=True, impl="reference"
    )


def dense(q, k, v, *, causal=True):
    """Attention to all keys, or all up to the query, in NumPy float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    if causal:
        logits = np.where(np.tri(*logits.shape[2:], dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def states(mask):
    """States of all blocks, int8 `[M, U, nq, nk]`."""
    return np.stack(
        [
            [block_mask.block_states(mask, batch=b, table=u) for u in range(mask.num_tables)]
            for b in range(mask.batch)
        ]
    )


def chosen(rule, q, k, segment_ids=None, gate=None):
    """The states of the blocks that the rule keeps."""
    return states(select(rule, q, k, segment_ids, gate))


def lowered(rule, pattern, q_len, kv_len):
    mask = lower.lower(
        pattern, q_len=q_len, kv_len=kv_len, block_q=rule.block_q, block_kv=rule.block_kv
    )
    return block_mask.block_states(mask)


def visible(rule, kept, q_len, kv_len):
    """Element mask `[M, U, T, S]` of states of blocks, from the pattern itself."""
    q_pos, kv_pos = np.arange(q_len, dtype=np.int32), np.arange(kv_len, dtype=np.int32)
    blocks = (kept > 0)[..., q_pos // rule.block_q, :][..., kv_pos // rule.block_kv]
    return blocks & rule.pattern.mask_fn(q_pos[:, None], kv_pos[None])


def keep_all(rule):
    """The rule with a budget for everything."""
    if not isinstance(rule, base.Selector):
        return patterns_base.parse("full()")
    names = {field.name for field in dataclasses.fields(rule)}
    if isinstance(rule, base.BlockScores):
        given = "top_k" if rule.top_k is not None else "top_p"
        changes = {"top_k": None, "top_p": None, "threshold": None, "min_blocks": None}
        changes[given] = 10_000 if given == "top_k" else 1.0
    else:
        changes = {name: value for name, value in EVERYTHING.items() if name in names}
    if "heads" in names:
        changes = {"heads": tuple(map(keep_all, rule.heads))}
    return dataclasses.replace(rule, **changes)


def planted(
    length=512, *, block=32, pairs=(), gain=6.0, dim=32, heads=1, seed=0
) -> tuple[jax.Array, jax.Array]:
    """q and k whose blocks `(row, column)` of `pairs` attend to each other, over noise."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 1, length, heads, dim)) * 0.3
    for row, column in pairs:
        direction = rng.standard_normal((heads, dim))
        direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
        size = np.sqrt(gain * np.sqrt(dim))
        q[:, row * block : (row + 1) * block] += size * direction
        k[:, column * block : (column + 1) * block] += size * direction
    return jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32)
