"""The mask build study covers the patterns and counts what splash counts."""

import pytest

from experiments.mask_build import study

SEQUENCE_PATTERNS = (
    "full", "causal", "local", "dilated", "strided", "fixed", "chunked", "sinks", "global_tokens",
    "random_blocks", "prefix", "per_head",
)  # fmt: skip


def test_every_pattern_of_sequences_is_measured_at_every_length():
    jobs = study.jobs(quick=False)
    for name in SEQUENCE_PATTERNS:
        lengths = {tokens for _, case, tokens in jobs if f"{name}(" in case}
        assert lengths == set(study.LENGTHS), name


@pytest.mark.parametrize("case", study.CASES)
def test_every_case_can_be_built(case):
    assert study.build(case, 1000) > 0


@pytest.mark.parametrize("case", study.SPLASH)
def test_splash_lists_the_same_number_of_blocks(case):
    assert study.build(case, 1024) == study.build_splash(case, 1024)


def test_a_case_is_measured_in_its_own_process():
    row = study.measure("sparse_attn", study.ACCEPTANCE, 1 << 20)
    assert row["active_blocks"] == 277967
    assert row["peak_mb"] < study.MAX_MB
    assert study.tables([row]).count("\n") == 2
