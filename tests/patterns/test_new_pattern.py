"""A new pattern is one file: the contract suite finds it, and finds out a wrong one."""

import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree

import pytest

from sparse_attn.patterns import base

_ROOT = pathlib.Path(__file__).parents[2]

_GOOD = '''
"""Every third key, causally."""

import dataclasses

from sparse_attn.patterns import base


@dataclasses.dataclass(frozen=True)
class EveryThird(base.Pattern):
    """Keys whose position is `shift` modulo 3, and the query itself."""

    shift: int

    def mask_fn(self, q_pos, kv_pos):
        return (kv_pos == q_pos) | ((kv_pos < q_pos) & (kv_pos % 3 == self.shift))

    @property
    def causal(self):
        return True


EXAMPLES = (EveryThird(shift=0), EveryThird(shift=2))
'''

# The same rule with a block_state that drops what the last query block sees, calls itself exact,
# and a `causal` and a `may_be_empty` that are not true.
_BROKEN = (
    _GOOD.replace("EveryThird", "Broken").replace("(kv_pos == q_pos) |", "(kv_pos == q_pos + 1) |")
    + """
Broken.block_state_exact = True
Broken.block_state = lambda self, q_lo, q_hi, kv_lo, kv_hi: base.state_of(kv_hi >= q_lo, False)
"""
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "some_patterns"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "every_third.py").write_text(_GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [n for n in sys.modules if n.split(".")[0] == folder.name]:
        del sys.modules[name]


def test_a_new_file_is_found_by_its_name(package):
    assert base.discover(package.name) == ("every_third",)
    pattern = base.parse("every_third(shift=1)", package.name)
    assert pattern == base.find("every_third", package.name)(shift=1)
    assert pattern.expression() == "every_third(shift=1)"
    assert "▒▒" in str(pattern)


def test_the_contract_suite_picks_up_a_new_file_and_fails_a_broken_one(package):
    (package / "broken.py").write_text(_BROKEN)
    report = package.parent / "report.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
         _ROOT / "tests" / "patterns" / "test_contract.py"],
        cwd=_ROOT,
        env=os.environ
        | {
            "PATTERN_PACKAGE": package.name,
            "PYTHONPATH": str(package.parent),
            "HYPOTHESIS_PROFILE": "quick",
        },
        capture_output=True,
        check=False,
    )  # fmt: skip
    passed, failed = set(), set()
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        found = case.find("failure") is not None or case.find("error") is not None
        (failed if found else passed).add(case.get("name"))
    broken = {name.split("[")[0] for name in failed}
    assert broken >= {
        "test_lowering_is_brute_force",
        "test_counts_are_brute_force",
        "test_block_state_is_conservative_and_exact_where_it_says",
        "test_block_state_traces",
        "test_causal_says_whether_the_future_is_hidden",
        "test_no_row_is_empty_unless_the_pattern_says_so",
        "test_algebra_is_boolean_algebra",
    }
    assert not any("every_third" in name for name in failed)
    laws = {name.split("[")[0] for name in passed if "every_third(shift=2)" in name}
    assert laws >= broken - {"test_algebra_is_boolean_algebra"}
    assert "test_module_holds_a_class_of_its_name_with_examples[every_third]" in passed
