"""Every backend in this checkout against the contract."""

import pytest

from sparse_attn.ops import attend as attend_lib
from tests.ops import contract

# Of a backend whose interpreter takes about ten seconds a case: what runs in the fast lane. The two
# have all the features between them: heads that differ, documents, lists that are arrays, the rest.
_FAST = {"pallas_gpu": ("run_time_per_head", "everything")}


def _cells():
    for backend in attend_lib.backends():
        env = contract.environment(backend)
        for case in contract.CASES:
            fast = case.name in _FAST[backend] if backend in _FAST else case.core
            marks = [pytest.mark.slow] if env.interpreted and not fast else []
            if env.reason is not None:
                marks.append(pytest.mark.skip(reason=f"{backend}: {env.reason}"))
            yield pytest.param(backend, case, id=f"{backend}-{case.name}", marks=marks)


@pytest.mark.parametrize("backend, case", list(_cells()))
def test_backend_meets_contract(backend, case):
    contract.check(case, backend)
