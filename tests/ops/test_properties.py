"""What must hold between calls of one backend, whatever the numbers: isolation, determinism, and
equal results for equal attention."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.masks import block_mask
from sparse_attn.ops import attend as attend_lib
from sparse_attn.patterns import local
from tests.ops import contract, oracle, problems


def backends(core: bool = False, failing: dict[str, str] | None = None, in_contract: bool = False):
    """Every backend in its environment; outside `core` tests, the fast lane takes `xla` alone.

    `in_contract` tests compare two runs whose masks, documents or positions the contract compares
    with the oracle one by one, at half the error: interpreters, slow as they are, do not repeat it,
    nor does the fast lane.

    `failing` names what a backend gets wrong today (in the slow lane); one that stops failing must
    be taken out.
    """
    cells = []
    for backend in attend_lib.backends():
        env = contract.environment(backend)
        if env.interpreted and in_contract:
            continue
        fast = backend not in (failing or {}) if core else backend == "xla" and not in_contract
        marks = [] if fast else [pytest.mark.slow]
        if env.reason is not None:
            marks.append(pytest.mark.skip(reason=f"{backend}: {env.reason}"))
        elif backend in (failing or {}):
            marks.append(pytest.mark.xfail(strict=True, reason=failing[backend]))
        cells.append(pytest.param(backend, env, id=backend, marks=marks))
    return pytest.mark.parametrize("backend, env", cells)


def assert_same(got: oracle.Results, want: oracle.Results) -> None:
    for name, x, y in zip(want._fields, got, want, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


def assert_close(got: oracle.Results, want: oracle.Results, dtype) -> None:
    """Two runs of one precision: each may be off by the error that the contract allows."""
    forward, backward = contract.FLOORS[np.dtype(dtype).name]
    for name, x, y in zip(want._fields, got, want, strict=True):
        if y is not None:
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            floor = 2 * (forward if name in ("out", "lse") else backward)
            finite = np.isfinite(y)
            np.testing.assert_array_equal(np.isfinite(x), finite, err_msg=name)
            x, y = np.where(finite, x, 0), np.where(finite, y, 0)
            np.testing.assert_allclose(x, y, rtol=0, atol=floor * max(1, np.abs(y).max(initial=0)))


WINDOW = contract.Case("window", problems.STREAM, q_len=150, heads=4)


@backends(
    core=True,
    failing={
        "pallas_gpu": "an inf value spoils rows of its block that do not see it",
    },
)
def test_a_bad_key_spoils_the_queries_that_see_it_and_nothing_else(backend, env):
    problem = contract.build(WINDOW, env)
    k, v = problem.k.copy(), problem.v.copy()
    k[0, 60, 0, 3] = np.nan  # Head pair 0 and 1.
    v[0, 100, 1, 0] = np.inf  # Head pair 2 and 3.
    with env.enter():
        call = contract.runner(problem, backend)
        clean, got = call(problem), call(dataclasses.replace(problem, k=k, v=v))
    spoiled = np.zeros((1, 4, 150), bool)
    spoiled[:, :2] = problem.visible[:, :2, :, 60]
    spoiled[:, 2:] = problem.visible[:, 2:, :, 100]
    assert 0 < spoiled.sum() < spoiled.size
    reached = (problem.visible & spoiled[..., None]).any(2).reshape(1, 2, 2, 150).any(2)
    rows, keys = spoiled.swapaxes(1, 2), reached.swapaxes(1, 2)
    assert not np.isfinite(got.out[rows]).all(-1).any()
    for name in ("out", "lse", "dq"):
        mine, other = getattr(got, name)[~rows], getattr(clean, name)[~rows]
        np.testing.assert_array_equal(mine, other, err_msg=name)
    for name in ("dk", "dv"):
        mine, other = getattr(got, name)[~keys], getattr(clean, name)[~keys]
        np.testing.assert_array_equal(mine, other, err_msg=name)


@backends(core=True)
def test_what_hidden_tokens_hold_has_no_effect(backend, env):
    """nan in padding, and the largest number in values that no query sees."""
    case = contract.Case(
        "hidden", local.Local(window=5), batch=2, q_len=150,
        change=problems.documents((40, 60), (90,)),
    )  # fmt: skip
    problem = contract.build(case, env)
    padding = problem.segment_ids == 0
    q, k, v = (x.copy() for x in (problem.q, problem.k, problem.v))
    for x in (q, k, v):
        x[padding] = np.nan
    # What a product with 0 would not hide, in the other head: one run shows both.
    v[padding, 1] = jnp.finfo(v.dtype).max
    dirty = dataclasses.replace(problem, q=q, k=k, v=v)
    with env.enter():
        call = contract.runner(problem, backend)
        clean = call(problem)
        assert_same(call(dirty), clean)
    for name in ("out", "dq", "dk", "dv"):
        assert (getattr(clean, name)[padding] == 0).all(), name


@backends(
    core=True,
    failing={
        "pallas_gpu": "a hidden nan key spoils dq of its block",
        "triton_gpu": "a hidden nan key spoils dk of its block",
    },
)
def test_what_unseen_keys_hold_has_no_effect(backend, env):
    """As above, for keys that the mask hides: they share a block with keys that are seen."""
    case = problems.Case("unseen", problems.CAUSAL, q_len=100, kv_len=150)
    problem = contract.build(case, env)
    spoiled, huge = problem.k.copy(), problem.v.copy()
    spoiled[:, 100:] = np.nan
    huge[:, 100:] = jnp.finfo(huge.dtype).max
    with env.enter():
        call = contract.runner(problem, backend)
        clean = call(problem)
        assert_same(call(dataclasses.replace(problem, k=spoiled, v=huge)), clean)
    assert (clean.dk[:, 100:] == 0).all()
    assert (clean.dv[:, 100:] == 0).all()


@backends()
def test_repeats_are_bit_equal(backend, env):
    problem = contract.build(contract.BY_NAME["documents"], env)
    with env.enter():
        call = contract.runner(problem, backend)
        assert_same(call(problem), call(problem))


@backends()
def test_a_query_depends_on_nothing_after_it(backend, env):
    problem = contract.build(WINDOW, env)
    at = 77
    changed = {n: getattr(problem, n).copy() for n in ("q", "k", "v")}
    for x in changed.values():
        x[:, at:] *= -2
    with env.enter():
        call = contract.runner(problem, backend)
        before, after = call(problem), call(dataclasses.replace(problem, **changed))
    np.testing.assert_array_equal(before.out[:, :at], after.out[:, :at])
    np.testing.assert_array_equal(before.lse[:, :at], after.lse[:, :at])
    assert (before.out[:, at:] != after.out[:, at:]).any()


@backends(in_contract=True)
def test_block_sizes_do_not_matter(backend, env):
    case = dataclasses.replace(contract.BY_NAME["empty_rows"], q_len=200)
    problem = contract.build(case, env)
    with env.enter():
        want = contract.run(problem, backend)
        for block_q, block_kv in ((64, 128), (128, 64)):
            mask, _ = problems.blocks(problems.HOLE, block_q, block_kv)(None, case, env)
            got = contract.run(dataclasses.replace(problem, mask=mask), backend)
            assert_close(got, want, problem.q.dtype)
            assert (got.out[:, :40] == 0).all()
            assert (got.lse[:, :40] == -np.inf).all()
            assert (got.dq[:, :40] == 0).all()


@backends(in_contract=True)
def test_equal_masks_give_equal_attention(backend, env):
    problem = contract.build(WINDOW, env)
    pairs = [
        (local.Local(window=150), problems.CAUSAL),
        (local.Local(reach=(150, 150)), problems.FULL),
        (problems.CAUSAL | ~problems.CAUSAL, problems.FULL),
    ]
    for mask, same in pairs:
        with env.enter():
            got = contract.run(dataclasses.replace(problem, mask=mask), backend)
            want = contract.run(dataclasses.replace(problem, mask=same), backend)
        assert_close(got, want, problem.q.dtype)


@backends(in_contract=True)
def test_documents_equal_separate_runs(backend, env):
    lengths = (60, 1, 89)
    case = dataclasses.replace(WINDOW, change=problems.documents(lengths))
    problem = contract.build(case, env)
    ends = np.cumsum((0, *lengths))
    with env.enter():
        together = contract.run(problem, backend)
        for lo, hi in itertools.pairwise(ends):
            # A sink of a document is at its start only when it is run alone.
            names = ("q", "k", "v", "dout", "dlse")
            parts = {n: getattr(problem, n)[:, lo:hi] for n in names}
            alone = dataclasses.replace(
                problem, **parts, segment_ids=None, positions=np.arange(lo, hi)
            )
            got = oracle.Results(*(None if x is None else x[:, lo:hi] for x in together))
            assert_close(got, contract.run(alone, backend), problem.q.dtype)


@backends(in_contract=True)
def test_moving_keys_with_their_positions_changes_nothing(backend, env):
    problem = contract.build(dataclasses.replace(WINDOW, q_len=256), env)
    order = np.random.default_rng(0).permutation(4).repeat(64) * 64 + np.tile(np.arange(64), 4)
    at = np.arange(256)
    moved = dataclasses.replace(
        problem, k=problem.k[:, order], v=problem.v[:, order], positions=(at, order)
    )
    shifted = dataclasses.replace(problem, mask=problems.WINDOW, positions=(at + 1000, at + 1000))
    with env.enter():
        want, got = contract.run(problem, backend), contract.run(moved, backend)
        got = got._replace(dk=_unmove(got.dk, order), dv=_unmove(got.dv, order))
        assert_close(got, want, problem.q.dtype)
        window = dataclasses.replace(problem, mask=problems.WINDOW)
        got, want = contract.run(shifted, backend), contract.run(window, backend)
        assert_close(got, want, problem.q.dtype)


def _unmove(x, order):
    back = np.empty_like(x)
    back[:, order] = x
    return back


@backends(in_contract=True)
def test_bits_equal_their_pattern(backend, env):
    problem = contract.build(WINDOW, env)
    mask = block_mask.from_array(
        np.array(problem.visible[0, 0]), block_q=env.block, block_kv=env.block
    )
    with env.enter():
        try:
            got = contract.run(dataclasses.replace(problem, mask=mask), backend)
        except NotImplementedError:
            assert "bits" in contract.REFUSALS[backend]
            return
        assert_close(got, contract.run(problem, backend), problem.q.dtype)
