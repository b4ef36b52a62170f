"""A hang is told once, with the line that hangs; progress is not disturbed."""

import time

import pytest

from sparse_attn.train import watchdog


def hang_here(path):
    end = time.monotonic() + 20
    while not path.exists() or "hang_here" not in path.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_hang_writes_the_stacks_once(tmp_path, capfd):
    path = tmp_path / "stacks.txt"
    with watchdog.Watchdog(tmp_path, seconds=0.1) as dog:
        dog.beat("step 7")
        hang_here(path)
        time.sleep(0.3)  # Still the same hang.
        first = path.read_text()
        dog.beat("step 8")
        end = time.monotonic() + 20
        while "step 8" not in path.read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
    assert first.count("no progress for 0.1 s in step 7") == 1
    assert "test_watchdog.py" in first
    assert "hang_here" in first
    error = capfd.readouterr().err
    assert "warning: no progress for 0.1 s in step 7" in error
    assert "hang_here" in error


def test_progress_and_a_normal_end_write_nothing(tmp_path):
    with watchdog.Watchdog(tmp_path, seconds=5.0) as dog:
        for step in range(5):
            dog.beat(f"step {step}")
    assert not list(tmp_path.iterdir())
    with watchdog.Watchdog(tmp_path, seconds=None) as dog:
        dog.beat("step 1")


def test_seconds_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match=r"hang_seconds=0\.0 must be > 0, or None"):
        watchdog.Watchdog(tmp_path, seconds=0.0)
