"""docs/papers.md is what docs/papers.json says, and all that it names exists."""

import ast
import functools
import re

import pytest

from experiments import papers

ROWS = papers.load()


def test_the_page_is_not_stale():
    assert papers.PAGE.read_text() == papers.render(ROWS), "run: python -m experiments.papers"


def test_rows_are_complete_and_unique():
    for row in ROWS:
        assert set(row) <= {"title", "family", "tier", "arxiv", "files", "tests", "note"}, row
        assert row["title"]
        assert row["tier"] in papers.TIERS, row
        assert re.fullmatch(r"\d{4}\.\d{4,5}", row.get("arxiv", "0000.00000")), row
        # What is implemented is shown by a test, and nothing else names one.
        assert bool(row.get("files")) == bool(row.get("tests")), row
    for key in ("title", "arxiv"):
        values = [row[key].lower() for row in ROWS if key in row]
        assert len(set(values)) == len(values), key


@functools.cache
def names_in(path):
    """Names of the tests of a file, found without importing it; those of a class as `C::test`."""
    names = set()
    for node in ast.parse((papers.ROOT / path).read_text()).body:
        members = (
            [(f"{node.name}::", x) for x in node.body] if isinstance(node, ast.ClassDef) else []
        )
        for prefix, item in [("", node), *members]:
            if isinstance(item, ast.FunctionDef) and item.name.startswith("test"):
                names.add(prefix + item.name)
    return names


@pytest.mark.parametrize(
    "row", [row for row in ROWS if "files" in row], ids=lambda row: row["title"][:40]
)
def test_files_and_tests_exist(row):
    for path in row["files"]:
        assert (papers.ROOT / path).is_file(), path
    for test in row["tests"]:
        path, _, name = test.partition("::")
        assert path.startswith("tests/"), test
        assert name in names_in(path), test


def test_patterns_that_cite_a_paper_stand_in_its_row():
    rows = {row["arxiv"]: row for row in ROWS if "arxiv" in row}
    package = papers.ROOT / "sparse_attn"
    for path in [*sorted(package.glob("patterns/*.py")), package / "models" / "presets.py"]:
        name = path.relative_to(papers.ROOT).as_posix()
        for number in set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", path.read_text())) & set(rows):
            assert name in rows[number].get("files", ()), f"{name} cites {rows[number]['title']}"
