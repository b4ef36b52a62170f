"""The option --matrix-part: parts of the slow tests with parameters."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

TESTS = """
import pytest

@pytest.mark.slow
@pytest.mark.parametrize("cell", range(20))
def test_cell(cell): pass

@pytest.mark.slow
def test_scenario(): pass

@pytest.mark.parametrize("case", range(3))
def test_fast(case): pass
"""


@pytest.fixture
def collect(tmp_path):
    shutil.copy(pathlib.Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_some.py").write_text(TESTS)

    def run(*options):
        return subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", *options],
            cwd=tmp_path,
            env=os.environ | {"PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
        )

    return run


def test_parts_are_disjoint_and_together_all(collect):
    def names(*options):
        result = collect("-o", "markers=slow", *options)
        assert result.returncode == 0, result.stdout
        return [line for line in result.stdout.splitlines() if "::" in line]

    everything = names()
    assert len(everything) == 24
    cells = {name for name in everything if "test_cell" in name}
    parts = [names(f"--matrix-part={k}/3") for k in range(3)]
    assert all(set(part) - cells == set(everything) - cells for part in parts)
    assert sorted(name for part in parts for name in part if name in cells) == sorted(cells)
    assert all(0 < len(cells.intersection(part)) < len(cells) for part in parts)


@pytest.mark.parametrize("value", ["4/4", "1", "a/b"])
def test_a_malformed_part_is_one_clear_error(collect, value):
    result = collect(f"--matrix-part={value}")
    assert result.returncode == 4
    assert f"--matrix-part: '{value}' is not K/N with 0 <= K < N" in result.stderr
