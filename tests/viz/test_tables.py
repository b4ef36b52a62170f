import json

from sparse_attn.viz import tables


def test_text_aligns_numbers_right_and_words_left():
    drawn = tables.text(("name", "state", "n"), [("a", "-", "1,000"), ("long name", "x", "-")])
    assert drawn.splitlines() == [
        "name       state      n",
        "---------  -----  -----",
        "a          -      1,000",
        "long name  x          -",
    ]


def test_text_without_rows():
    assert tables.text(("a", "bc"), []).splitlines()[0] == "a  bc"


def test_progress_reads_what_there_is(tmp_path):
    assert tables.progress(tmp_path / "none") == tables.Progress("-", "-", "-", "-")
    lines = [
        {"step": 1, "train/loss": 5.0, "perf/tokens_per_s": 10.0},
        {"step": 2, "eval/bits_per_byte": 4.0},
        {"step": 3, "perf/tokens_per_s": 2500.4},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 4, "tr'  # Cut off by a kill.
    (tmp_path / "metrics.jsonl").write_text(text)
    for name in ("2", "10", "12.orbax-checkpoint-tmp", "rejected"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert tables.progress(tmp_path) == tables.Progress("3", "10", "4.0000", "2,500")


def test_result_row_has_a_cell_per_column(tmp_path):
    assert tables.result_row("a", tmp_path) == ("a", *["-"] * (len(tables.RESULT_COLUMNS) - 1))


def test_series_leaves_out_other_metrics_and_nulls():
    lines = [{"step": 1, "a": None}, {"step": 2, "a": 1}, {"step": 3, "b": 1.0}]
    assert tables.series(lines, "a") == ([2], [1.0])
