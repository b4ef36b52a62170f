"""Counts of packed queries beside keys that stay."""

import json

from experiments.selection import packing


def test_neighbours_that_choose_alike_are_cheap_to_pack(tmp_path):
    assert packing.main(["--out", str(tmp_path), "--tokens", "2048"]) == 0
    rows = json.loads((tmp_path / "packing.json").read_text())["results"]["rows"]
    found = {(r["arrays"], r["queries of a tile"]): r for r in rows}
    for (_, queries), row in found.items():
        assert 1 <= row["packed: products"] <= queries
        assert row["keys stay: products"] >= 1
    assert found["random", 1]["packed: products"] == found["topics", 1]["packed: products"] == 1
    more = {kind: found[kind, 4]["packed: products"] - 1 for kind in ("random", "topics")}
    assert more["topics"] < 0.3 * more["random"]
    assert "keys stay" in (tmp_path / "packing.md").read_text()
