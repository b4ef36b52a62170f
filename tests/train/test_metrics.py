"""Lines survive a crash, throughput leaves out what is not training, progress is readable."""

import io
import sys

import pytest

from sparse_attn.train import metrics


def test_a_cut_line_and_later_steps_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a": 3.0}\n{"st')
    assert [line["step"] for line in metrics.read_json_lines(path)] == [1, 2, 3]
    with metrics.JsonLines(path, keep_until=2) as lines:
        lines.write(3, {"a": 4.0})
    assert path.read_text() == (
        '{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a": 4.0}\n'
    )
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_lines_are_on_disk_when_write_returns(tmp_path):
    lines = metrics.JsonLines(tmp_path / "m.jsonl")
    lines.write(1, {"a": 1.0})
    assert metrics.read_json_lines(tmp_path / "m.jsonl") == [{"step": 1, "a": 1.0}]
    lines.close()


def test_throughput_leaves_out_first_steps_and_pauses():
    now = 0.0
    speed = metrics.Throughput(skip=2, clock=lambda: now)
    speed.resume()
    for seconds, last_skipped in ((50.0, False), (10.0, True)):
        now += seconds
        assert speed.add(100) is last_skipped
    assert speed.lap() is None
    assert speed.tokens_per_s is None
    for _ in range(4):
        now += 2.0
        speed.add(100)
    assert speed.lap() == metrics.Window(400, 4, 8.0)
    speed.pause()
    now += 1000.0
    speed.resume()
    now += 1.0
    speed.add(100)
    assert speed.lap().tokens_per_s == 100.0
    assert speed.tokens_per_s == pytest.approx(500 / 9)
    assert speed.seconds_per_step == pytest.approx(9 / 5)


def test_plain_lines_without_a_terminal():
    stream = io.StringIO()
    progress = metrics.Progress(100, name="local", stream=stream)
    progress.update(10, "loss 5.0", None)
    progress.update(60, "loss 2.0", 2.0)
    progress.close()
    assert stream.getvalue().splitlines() == [
        "local: step 10/100, loss 5.0, ETA ?",
        "local: step 60/100, loss 2.0, ETA 1:20",
    ]


def test_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = metrics.Progress(100, name="local", stream=stream)
    progress.update(60, "loss 2.0", 2.0)
    progress.close()
    last = stream.getvalue().split("\r")[-1]
    assert "local  60%|" in last
    assert "60/100 , loss 2.0, ETA 1:20" in last or "60/100 loss 2.0, ETA 1:20" in last


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    board = metrics.TensorBoard(tmp_path)
    board.write(1, {"a": 1.0})
    board.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_value(tmp_path, monkeypatch):
    points = []

    class Writer:
        def __init__(self, folder):
            points.append(folder)

        def add_scalar(self, *point):
            points.append(point)

        def close(self):
            points.append("closed")

    module = type(sys)("tensorboardX")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    board = metrics.TensorBoard(tmp_path)
    board.write(3, {"a": 1.0, "b": 2.0})
    board.close()
    assert points == [str(tmp_path), ("a", 1.0, 3), ("b", 2.0, 3), "closed"]
