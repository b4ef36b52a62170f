"""Every backend in this checkout against the contract."""

import dataclasses

import pytest

from sparse_attn.ops import attend as attend_lib
from sparse_attn.patterns import per_head
from tests.ops import contract

# Of a backend whose interpreter takes about ten seconds a case: what runs in the fast lane. The two
# have all the features between them: heads that differ, documents, lists that are arrays, the rest.
# `everything` has one row there, as the other case has two, and that one no more than three blocks.
_FAST = {"pallas_gpu": ("run_time_per_head", "everything")}
# What interpreters leave to devices, and the fast lane to the slow one: each feature is in other
# cases too, named here.
_ON_DEVICE = (
    "causal",  # scale, run_time_documents
    "two_sided",  # full_cross_mqa, bits_all_true
    "stream_batch",  # everything
    "documents_window",  # documents, everything
    "run_time",  # run_time_documents, run_time_per_head
    "key_bias",  # everything, key_bias_hides_all
    "soft_cap",  # soft_cap_large, everything
    "sink_logits",  # sink_logits_empty_rows, everything
)
# And what Hopper's, the slowest, and the fast lane leave to them besides: two features at once that
# meet other ones elsewhere.
_ON_HOPPER = (
    "window_gqa",  # full_cross_mqa, everything
    "per_head",  # run_time_per_head, per_head_empty
    "bits_per_head",  # bits, per_head_empty
    "positions_permuted",  # positions_batch
    "positions_pair",  # positions_batch
    "run_time_bits",  # bits, run_time_documents
    "key_bias_hides_rows",  # key_bias_hides_all
    "empty_everywhere",  # empty_rows, empty_query_blocks
    "bits_all_true",  # bits
    "static_states",  # block_multiple
)
# Core cases of which the fast lane has the features on interpreters too.
_IN_OTHERS = {
    "pallas_tpu": (
        "window_gqa",  # everything
        "key_bias_per_head",  # test_pallas_tpu: large groups go head by head
        "uneven_blocks",  # test_pallas_tpu: any tile runs any block
    ),
    "triton_gpu": ("window_gqa",),  # everything
}
_NAMED = (*_ON_DEVICE, *_ON_HOPPER)
assert all(name in contract.BY_NAME for name in _NAMED)


def _is_fast(backend, case, env):
    if backend == "reference":  # One computation of all pairs, whatever the mask is made of.
        return case.core or case.dtype is not None
    if not env.interpreted:
        return case.name not in _NAMED
    if backend in _FAST:
        return case.name in _FAST[backend]
    return case.core and case.name not in _IN_OTHERS[backend]


def _cells():
    for backend in attend_lib.backends():
        env = contract.environment(backend)
        for case in contract.CASES:
            if env.interpreted and case.name in _ON_DEVICE:
                continue
            if env.interpreted and backend in _FAST:
                if case.name in _ON_HOPPER:
                    continue
                if case.dtype is not None and case.dtype == env.dtype:
                    continue  # The dtype of all other cases.
                # Each head takes seconds: where two are alike, one tells as much. Groups and heads
                # that differ are in the cases of more heads.
                alike = not isinstance(case.mask, per_head.PerHead)
                if case.heads == case.kv_heads == 2 and alike:
                    case = dataclasses.replace(case, heads=1, kv_heads=1)
                if case.name == "everything":
                    case = dataclasses.replace(case, batch=1)
                if case.name == "run_time_per_head":
                    case = dataclasses.replace(case, q_len=150)
            marks = [] if _is_fast(backend, case, env) else [pytest.mark.slow]
            if env.reason is not None:
                marks.append(pytest.mark.skip(reason=f"{backend}: {env.reason}"))
            yield pytest.param(backend, case, id=f"{backend}-{case.name}", marks=marks)


@pytest.mark.parametrize("backend, case", list(_cells()))
def test_backend_meets_contract(backend, case):
    contract.check(case, backend)
