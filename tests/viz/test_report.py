import json

import matplotlib.image
import numpy as np
import pytest

from sparse_attn.patterns import axial, local
from sparse_attn.viz import report, show, tables


def make_run(folder, *, pattern, text="once upon a time", sha256="ab"):
    folder.mkdir(parents=True)
    config = {"model": {"pattern": pattern}, "data": {"context": 64}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "corpus.json").write_text(
        json.dumps({"name": "a book", "num_bytes": 12_345, "sha256": sha256})
    )
    (folder / "sample.txt").write_text(text)
    metrics = [{"step": s, "train/loss": 5 / s, "eval/bits_per_byte": 6 / s} for s in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    (folder / "summary.json").write_text(json.dumps({"finished": True, "val_bpb": 2.0}))
    return str(folder)


def test_report_has_every_part(tmp_path):
    runs = [
        ("dense", make_run(tmp_path / "0", pattern="causal()")),
        ("mixed", make_run(tmp_path / "1", pattern="per_layer((causal(), local(window=8)))")),
        ("listed", make_run(tmp_path / "2", pattern=["causal()", "local(window=8)"])),
    ]
    path = report.write(tmp_path, runs)
    text = (tmp_path / "report.md").read_text()
    assert path == str(tmp_path / "report.md")
    assert text.count("a book, 12,345 bytes, sha256 ab") == 1
    for name, _ in runs:
        assert f"| {name} | " in text
        assert f"**{name}**\n\n    once upon a time" in text
    for name in ("loss.png", "patterns.png"):
        assert f"(report/{name})" in text
        pixels = matplotlib.image.imread(tmp_path / "report" / name)
        assert np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0).shape[0] > 5


def test_block_maps_are_those_of_the_config(tmp_path):
    folder = make_run(tmp_path / "0", pattern="per_layer((causal(), local(window=8)))")
    maps = report._block_maps("mixed", folder)
    assert list(maps) == ["mixed, layer 0", "mixed, layer 1"]
    np.testing.assert_array_equal(maps["mixed, layer 1"], show.image(local.Local(window=8), 64, 8))


def test_different_texts_are_told_apart(tmp_path):
    runs = [
        ("a", make_run(tmp_path / "0", pattern="causal()", sha256="ab")),
        ("b", make_run(tmp_path / "1", pattern="causal()", sha256="cd")),
    ]
    report.write(tmp_path, runs)
    text = (tmp_path / "report.md").read_text()
    assert "Data of a: a book" in text
    assert "Data of b: a book" in text


@pytest.mark.parametrize("sample", ["```\n# not a heading\n```", "bell \x07 and escape \x1b[31m"])
def test_samples_cannot_break_out_of_their_block(tmp_path, sample):
    runs = [("a", make_run(tmp_path / "0", pattern="causal()", text=sample))]
    report.write(tmp_path, runs)
    block = (tmp_path / "report.md").read_text().split("**a**\n\n")[1]
    assert all(line.startswith("    ") for line in block.rstrip("\n").split("\n"))
    assert "\x1b" not in block
    assert "\x07" not in block


def test_a_run_without_a_sample_has_none(tmp_path):
    folder = make_run(tmp_path / "0", pattern="causal()")
    (tmp_path / "0" / "sample.txt").unlink()
    report.write(tmp_path, [("a", folder)])
    assert "**a**" not in (tmp_path / "report.md").read_text()


def test_images_are_rated_by_accuracy_and_have_no_sample(tmp_path):
    folder = tmp_path / "0"
    made = make_run(folder, pattern="axial(shape=(4, 4), axes=(1,))")
    (folder / "sample.txt").unlink()
    config = {"model": {"pattern": "axial(shape=(4, 4), axes=(1,))"}, "data": {"name": "digits"}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"step": s, "train/loss": 2 / s, "eval/accuracy": s / 4} for s in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    summary = {"finished": True, "test_accuracy": 0.75, "row_tokens": 16}
    (folder / "summary.json").write_text(json.dumps(summary))
    report.write(tmp_path, [("rows", made)])
    text = (tmp_path / "report.md").read_text()
    assert "| rows | - | - | 75.0% |" in text
    assert "## Samples" not in text
    assert tables.progress(made).val_bpb == "75.0%"
    np.testing.assert_array_equal(
        report._block_maps("rows", made)["rows"],
        show.image(axial.Axial(shape=(4, 4), axes=(1,)), 16, 2),
    )
