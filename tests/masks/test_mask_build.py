"""The mask build study covers the patterns and counts what splash counts."""

import pytest

from experiments.mask_build import study
from sparse_attn import patterns
from sparse_attn.masks import grids
from sparse_attn.patterns import base

SEQUENCE_PATTERNS = (
    "full", "causal", "local", "dilated", "strided", "fixed", "chunked", "sinks", "global_tokens",
    "random_blocks", "prefix", "per_head", "block_local", "shifted_groups", "sharded",
    "retrieval_heads",
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


def test_every_pattern_is_built_at_a_million_tokens():
    texts = [case for _, case, tokens in study.jobs(quick=False) if tokens == study.LENGTHS[-1]]
    on_grids = study.grid_jobs()
    texts += [case for _, case, _ in on_grids]
    for name in set(base.discover()) - {"per_layer"}:
        assert any(f"{name}(" in text for text in texts), name
    assert all(tokens >= 128 * 96 * 80 for _, _, tokens in on_grids)


DILATED = [case for case in study.GRID_CASES if "permuted" in case and "dilation" in case]


@pytest.mark.parametrize("case", DILATED)
def test_dilation_groups_are_lowered_without_looking_at_elements(case, monkeypatch):
    pattern = patterns.parse(case)
    assert pattern.block_state_exact
    monkeypatch.delattr(grids.WindowPattern, "visible")  # Now every element would be an error.
    assert study.build(case, study.grid_tokens(case) // 16) > 0


def test_slow_rows_of_a_million_tokens_are_not_accepted():
    row = {"builder": "sparse_attn", "case": "full()", "tokens": 128 * 96 * 80, "cpu_seconds": 1.5}
    assert study.slow([row]) == [row]
    assert not study.slow([row | {"cpu_seconds": 0.9}, row | {"tokens": 131072}])
    assert not study.slow([row | {"builder": "splash"}])
