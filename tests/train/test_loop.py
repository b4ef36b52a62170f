"""The loop: what is logged and saved when, stops, numbers that are not finite, exact resumes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.train import checkpoint, flops, loop, metrics, profiling, state
from sparse_attn.train import ledger as ledger_lib
from tests.train import tiny

MODEL, OPTIMIZER = tiny.model(), tiny.optimizer()
STEP = state.make_train_step(MODEL, OPTIMIZER)


@functools.cache
def _first_state():
    return tiny.new_state(MODEL, OPTIMIZER)


def start():
    return jax.tree.map(jnp.copy, _first_state())  # A step reuses the memory of its state.


class Recorder:
    def __init__(self):
        self.lines = []

    def __call__(self, step, values):
        self.lines.append((step, values))

    def of(self, name):
        return {step: values[name] for step, values in self.lines if name in values}


def test_lines_evaluations_and_checkpoints_come_when_due(tmp_path):
    write, evaluated = Recorder(), []

    def evaluate(params):
        evaluated.append(1)
        return {"bits_per_byte": [5.0, 3.0, 4.0][len(evaluated) - 1]}

    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        outcome = loop.fit(
            start(), STEP, tiny.Batches(), steps=7, log_every=2, write=write, evaluate=evaluate,
            eval_every=3, checkpoints=checkpoints, checkpoint_every=3,
        )  # fmt: skip
        assert checkpoints.steps() == [6, 7]  # The best and the latest.
    assert outcome.finished
    assert int(outcome.state.step) == 7
    assert outcome.evaluation == {"bits_per_byte": 4.0}
    assert sorted(write.of("train/loss")) == [2, 4, 6]
    assert write.of("eval/bits_per_byte") == {3: 5.0, 6: 3.0, 7: 4.0}
    assert set(write.of("train/grad_norm")) == set(write.of("data/crc32")) == {2, 4, 6}


def test_throughput_counts_tokens_that_are_not_padding():
    write = Recorder()
    outcome = loop.fit(start(), STEP, tiny.Batches(), steps=6, log_every=2, write=write)
    assert 4 not in write.of("eval/bits_per_byte")
    assert set(write.of("perf/tokens_per_s")) == {4, 6}  # The first two steps are left out.
    rates = list(write.of("perf/tokens_per_s").values())
    assert min(rates) * 0.99 <= outcome.tokens_per_s <= max(rates) * 1.01


def run_in_pieces(folder, stops):
    """Trains to each of `stops` in a new loop that knows only what was saved; all lines."""
    write = Recorder()
    for steps in stops:
        with checkpoint.Checkpoints(folder) as checkpoints:
            batches, restored = tiny.Batches(), checkpoints.restore(start())
            if restored is not None:
                batches.set_state(restored.data_state)
            outcome = loop.fit(
                start() if restored is None else restored.state,
                STEP, batches, steps=steps, log_every=1, write=write, checkpoints=checkpoints,
            )  # fmt: skip
    return outcome.state, write


def test_resume_is_bitwise(tmp_path):
    whole_state, whole = run_in_pieces(tmp_path / "a", [8])
    pieces_state, pieces = run_in_pieces(tmp_path / "b", [3, 5, 8])
    for name in ("train/loss", "train/grad_norm", "data/crc32"):
        assert pieces.of(name) == whole.of(name)
    assert len(whole.of("train/loss")) == 8
    raw = [jax.tree.map(np.asarray, (s.params, s.opt_state)) for s in (whole_state, pieces_state)]
    jax.tree.map(np.testing.assert_array_equal, *raw)


def test_a_stop_finishes_the_step_and_saves_it(tmp_path):
    write = Recorder()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        outcome = loop.fit(
            start(), STEP, tiny.Batches(), steps=20, log_every=1, write=write,
            checkpoints=checkpoints, checkpoint_every=2, stop=lambda: len(write.lines) >= 5,
        )  # fmt: skip
        assert not outcome.finished
        assert int(outcome.state.step) == 5
        assert checkpoints.steps()[-1] == 5
        assert checkpoints.restore(start()).data_state == {"next": 5}


def test_a_stop_before_the_first_step_saves_nothing(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        outcome = loop.fit(
            start(), STEP, tiny.Batches(), steps=5, checkpoints=checkpoints, stop=lambda: True
        )
        assert not outcome.finished
        assert checkpoints.steps() == []


@pytest.mark.parametrize("log_every", [1, 10])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, log_every):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(loop.NonFiniteError, match="step 5: loss nan") as error:
            loop.fit(
                start(), STEP, tiny.Batches(bad_at=5), steps=20, log_every=log_every,
                checkpoints=checkpoints, checkpoint_every=4,
            )  # fmt: skip
        assert checkpoints.steps() == [4]
        assert checkpoints.restore(start()).step == 4
    report = error.value.report
    assert report["step"] == 5
    assert "embedding" in report["not_finite"]
    assert report["batch_crc32"] > 0


def test_nan_in_the_step_to_be_saved_is_not_saved(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(loop.NonFiniteError, match="step 4"):
            loop.fit(
                start(), STEP, tiny.Batches(bad_at=4), steps=20, checkpoints=checkpoints,
                checkpoint_every=2,
            )  # fmt: skip
        assert checkpoints.steps() == [2]


def test_progress_is_told(capsys):
    progress = metrics.Progress(4, name="here")
    loop.fit(start(), STEP, tiny.Batches(), steps=4, log_every=2, progress=progress)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("here: step 2/4, loss 5.")
    assert lines[1].endswith("ETA 0:00")


def test_the_ledger_adds_up(tmp_path):
    ledger = ledger_lib.Ledger()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        loop.fit(
            start(), STEP, tiny.Batches(), steps=3, checkpoints=checkpoints, ledger=ledger,
            evaluate=lambda params: {"bits_per_byte": 1.0},
        )  # fmt: skip
        saved = checkpoints.restore(start()).extra["ledger"]
    assert ledger.tokens == saved["tokens"] == 3 * tiny.BATCH * tiny.CONTEXT
    assert set(ledger.seconds) == {"data_wait", "compile", "step", "eval", "checkpoint"}
    assert saved["step"] == 3
    assert saved["seconds"]["step"] > 0


def test_utilization_is_of_the_windows_in_the_lines():
    write = Recorder()
    per_step = 3.0 * tiny.BATCH * tiny.CONTEXT
    loop.fit(
        start(), STEP, tiny.Batches(), steps=6, log_every=2, write=write,
        utilization=flops.Utilization(useful_per_token=2.0, executed_per_step=per_step, peak=1e9),
    )  # fmt: skip
    rates, useful, executed = (
        write.of(f"perf/{name}") for name in ("tokens_per_s", "mfu_useful", "mfu_executed")
    )
    assert set(useful) == set(executed) == {4, 6}
    for step, rate in rates.items():
        assert useful[step] == pytest.approx(2 * rate / 1e9)
        assert executed[step] == pytest.approx(3 * rate / 1e9)


def test_profiled_are_the_steps_of_the_window(monkeypatch):
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))

    def step(*arguments):
        seen.append("step")
        return STEP(*arguments)

    with profiling.Profiler("there", profiling.ProfileWindow(2, 3)) as profiler:
        loop.fit(start(), step, tiny.Batches(), steps=4, profiler=profiler)
    assert seen == ["step", "start", "step", "step", "stop", "step"]


def test_the_watchdog_is_told_before_everything_that_takes_time(tmp_path):
    beats = []
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        loop.fit(
            start(), STEP, tiny.Batches(), steps=2, checkpoints=checkpoints, beat=beats.append,
            evaluate=lambda params: {"bits_per_byte": 1.0},
        )  # fmt: skip
    assert beats == [
        "step 1", "step 2", "the evaluation after step 2", "the checkpoint of step 2",
        "the last step and checkpoint",
    ]  # fmt: skip


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="log_every=0 must be >= 1 step"):
        loop.fit(start(), STEP, tiny.Batches(), steps=1, log_every=0)
    with pytest.raises(ValueError, match="batches ended after step 1"):
        loop.fit(start(), STEP, iter([next(tiny.Batches())]), steps=2)
    short = {name: x[:, :8] for name, x in next(tiny.Batches()).items()}
    with pytest.raises(ValueError, match=r"batch of shape \(4, 8\) must be \(4, 16\)"):
        loop.fit(start(), STEP, iter([next(tiny.Batches()), short]), steps=2)
    with pytest.raises(ValueError, match="batch must have 'targets'"):
        loop.fit(start(), STEP, iter([{"inputs": np.zeros((1, 2), np.int32)}]), steps=1)
