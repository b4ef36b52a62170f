"""Writes docs/papers.md, which paper is implemented where, from docs/papers.json.

    python -m experiments.papers

A row of the JSON file has `title`, `family`, `tier` (1 = to be a part of the library, 2 = a small
module or preset, 3 = an idea that another row carries), and where known `arxiv`, `files` and
`tests` (paths from the root of the repository, a test as `path::name`), and a `note`: what is left
out, or, without files, why it is no static pattern. A row with neither is "not yet".
"""

import collections
import json
import pathlib
import urllib.parse
from collections.abc import Sequence
from typing import Any

from sparse_attn.viz import tables

ROOT = pathlib.Path(__file__).parents[1]
DATA = ROOT / "docs" / "papers.json"
PAGE = ROOT / "docs" / "papers.md"

TIERS = (1, 2, 3)
STATES = ("implemented", "no static pattern", "not yet")

INTRODUCTION = """\
# The papers of the field, and what implements them here

{papers} papers: those whose method the library should hold (tier 1), hold as a small module or
preset (tier 2), or whose idea another one carries (tier 3). "Not yet" is what remains to be built;
a note says what of a method is left out, or why it is no static pattern. Titles link to arXiv, or
to a search for the title there.

This page is made by `python -m experiments.papers` from [papers.json](papers.json).
"""


def load() -> list[dict[str, Any]]:
    """The rows of docs/papers.json."""
    return json.loads(DATA.read_text())


def url(row: dict[str, Any]) -> str:
    """The abstract on arXiv, or a search for the title.

    >>> url({"title": "Axial Attention", "arxiv": "1912.12180"})
    'https://arxiv.org/abs/1912.12180'
    >>> url({"title": "Axial Attention"})
    'https://arxiv.org/search/?query=%22Axial+Attention%22&searchtype=title'
    """
    if "arxiv" in row:
        return f"https://arxiv.org/abs/{row['arxiv']}"
    query = urllib.parse.urlencode({"query": f'"{row["title"]}"', "searchtype": "title"})
    return f"https://arxiv.org/search/?{query}"


def state(row: dict[str, Any]) -> str:
    """One of `STATES`."""
    return STATES[0 if "files" in row else 1 if "note" in row else 2]


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The whole page as Markdown: counts, then one table per family in the order of the rows."""
    families = list(dict.fromkeys(row["family"] for row in rows))
    parts = [INTRODUCTION.format(papers=len(rows)), _counts(rows, families)]
    for family in families:
        cells = [
            (
                f"[{row['title']}]({url(row)})",
                row["tier"],
                _implemented_by(row),
                ", ".join(map(_test_link, row.get("tests", ()))),
            )
            for row in rows
            if row["family"] == family
        ]
        table = tables.markdown(("paper", "tier", "implemented by", "shown by"), cells)
        parts.append(f"## {family[0].upper()}{family[1:]}\n\n{table}\n")
    return "\n".join(parts)


def _counts(rows, families):
    count = collections.Counter((row["family"], state(row)) for row in rows)
    cells = [(family, *(count[family, s] for s in STATES)) for family in families]
    totals = [sum(numbers) for numbers in zip(*(c[1:] for c in cells), strict=True)]
    return tables.markdown(("family", *STATES), [*cells, ("all", *totals)]) + "\n"


def _implemented_by(row):
    files = ", ".join(
        _link(path.removeprefix("sparse_attn/"), path) for path in row.get("files", ())
    )
    return "; ".join(filter(None, (files, row.get("note")))) or "not yet"


def _test_link(test):
    path, _, name = test.partition("::")
    return _link(name, path)


def _link(text, path):
    return f"[`{text}`](../{path})"


if __name__ == "__main__":
    PAGE.write_text(render(load()))
    print(f"written to {PAGE.relative_to(ROOT)}")
