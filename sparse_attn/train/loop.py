"""The training loop: steps, logs, evaluates, saves; from plain arguments, in a notebook too."""

import contextlib
import dataclasses
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from sparse_attn.train import checkpoint as checkpoint_lib
from sparse_attn.train import flops as flops_lib
from sparse_attn.train import ledger as ledger_lib
from sparse_attn.train import metrics as metrics_lib
from sparse_attn.train import profiling
from sparse_attn.train import state as state_lib


class NonFiniteError(FloatingPointError):
    """The loss, the gradient or a weight became NaN or infinite.

    Attributes:
      report: step, loss, grad_norm, crc32 of the batch, names of the arrays that are not finite.
    """

    def __init__(self, report: dict[str, Any]):
        super().__init__(
            f"step {report['step']}: loss {report['loss']}, gradient norm {report['grad_norm']}"
        )
        self.report = report


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How `fit` ended.

    Attributes:
      state: after the last step.
      finished: True when all steps are done, False when a stop was requested.
      evaluation: of the last evaluated step, None when there was none.
      tokens_per_s: of training alone, None when this process made too few steps to tell.
    """

    state: state_lib.TrainState
    finished: bool
    evaluation: dict[str, float] | None
    tokens_per_s: float | None


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A dispatched step whose numbers are still on the device."""

    step: int
    metrics: Mapping[str, jax.Array]
    crc32: int


def fit(
    state: state_lib.TrainState,
    train_step: Callable[[state_lib.TrainState, Any], tuple[state_lib.TrainState, dict]],
    batches: Iterator[state_lib.Batch],
    *,
    steps: int,
    log_every: int = 10,
    write: Callable[[int, dict[str, float]], None] | None = None,
    progress: metrics_lib.Progress | None = None,
    evaluate: Callable[[PyTree], dict[str, float]] | None = None,
    eval_every: int | None = None,
    checkpoints: checkpoint_lib.Checkpoints | None = None,
    checkpoint_every: int | None = None,
    ledger: ledger_lib.Ledger | None = None,
    utilization: flops_lib.Utilization | None = None,
    profiler: profiling.Profiler | None = None,
    beat: Callable[[str], None] = lambda doing: None,
    num_tokens: Callable[[state_lib.Batch], int] = state_lib.num_tokens,
    place: Callable[[state_lib.Batch], state_lib.Batch] = jax.device_put,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Trains from `state.step` to `steps` updates.

    The numbers of a step are fetched after the next one is dispatched, so the device does not
    wait for the host; each is checked, and nothing is saved after a step that was not finite.
    Lines for `write` have `train/loss` (nats per token), `train/grad_norm`, `train/lr`,
    `data/crc32` (of the step's inputs, for checking the order of data), `perf/tokens_per_s` and,
    given `utilization`, `perf/mfu_useful` and `perf/mfu_executed`; evaluated steps have `eval/` and
    the names that `evaluate` gave. Speeds are of whole windows, between lines, with the device
    idle at both ends.

    Args:
      state: where to start; its memory is reused.
      train_step: from `make_train_step`; compiled at the first step, off the clock.
      batches: dicts of NumPy arrays, right after the batch of `state.step`; with `get_state()` if
        there are checkpoints.
      steps: updates in all, earlier starts included.
      log_every: steps between lines.
      write: takes (step, values).
      progress: told at every line.
      evaluate: takes parameters, gives numbers; `bits_per_byte` among them rates a checkpoint, or
        else `loss`.
      eval_every: steps between evaluations; None = only after the last step.
      checkpoints: where to save, after the last step and when stopped too; None = never.
      checkpoint_every: steps between checkpoints.
      ledger: adds up time and tokens.
      utilization: turns speeds into fractions of the hardware's peak; None = unknown hardware.
      profiler: traces the steps of its window.
      beat: told before everything that takes time, for a watchdog.
      num_tokens: counts those of a batch, for the ledger and the speed.
      place: puts a batch on the devices.
      stop: asked after every step; True = save and return.

    Raises:
      NonFiniteError: loss or gradient of a step is NaN or infinite.
      ValueError: a number of steps is smaller than 1, or the batches end early or are malformed.
    """
    for name, every in (
        ("steps", steps),
        ("log_every", log_every),
        ("eval_every", eval_every),
        ("checkpoint_every", checkpoint_every),
    ):
        if every is not None and every < 1:
            raise ValueError(f"{name}={every} must be >= 1 step")
    ledger = ledger or ledger_lib.Ledger()
    run = _Run(
        state, train_step, batches, ledger, write, progress, log_every, utilization, num_tokens,
        place,
    )  # fmt: skip
    profiler = profiler or profiling.Profiler("", None)
    evaluation, evaluated_at, saved_at = None, None, None

    def due(every: int | None) -> bool:
        return run.step == steps or (every is not None and run.step % every == 0)

    while run.step < steps and not stop():
        beat(f"step {run.step + 1}")
        if profiler.starts_at(run.step + 1):
            with run.aside("profile"):
                profiler.start()
        run.advance()
        if profiler.ends_at(run.step):
            with run.aside("profile"):
                profiler.stop()
        if evaluate is not None and due(eval_every):
            beat(f"the evaluation after step {run.step}")
            with run.aside("eval"):
                evaluation, evaluated_at = evaluate(run.state.params), run.step
            run.write({f"eval/{name}": value for name, value in evaluation.items()})
        if checkpoints is not None and due(checkpoint_every):
            beat(f"the checkpoint of step {run.step}")
            rated = None
            if evaluated_at == run.step:
                rated = evaluation.get("bits_per_byte", evaluation.get("loss"))
            run.save(checkpoints, rated)
            saved_at = run.step
    beat("the last step and checkpoint")
    run.settle()
    if checkpoints is not None:
        if run.step < steps and saved_at != run.step and run.advanced:
            run.save(checkpoints, None)
        with run.ledger.timed("checkpoint"):
            checkpoints.wait()
    return Outcome(run.state, run.step >= steps, evaluation, run.speed.tokens_per_s)


class _Run:
    """The moving parts of `fit`: the state, the step in flight and the clock."""

    def __init__(
        self,
        state,
        train_step,
        batches,
        ledger,
        write,
        progress,
        log_every,
        utilization,
        num_tokens,
        place,
    ):
        self.state, self.ledger = state, ledger
        self.step = ledger.step = int(state.step)
        self.advanced = False
        self.speed = metrics_lib.Throughput()
        self._train_step, self._batches = train_step, batches
        self._write, self._progress, self._log_every = write, progress, log_every
        self._utilization, self._num_tokens, self._place = utilization, num_tokens, place
        self._shape: tuple[int, ...] | None = None
        self._pending: _Pending | None = None

    def advance(self) -> None:
        """Dispatches one step; settles the step before it, and this one when a line is due."""
        with self.ledger.timed("data_wait"):
            batch = next(self._batches, None)
        if batch is None:
            raise ValueError(f"batches ended after step {self.step}; they must go on for ever")
        if self._shape is None:
            state_lib.check_batch(batch)
        elif batch["inputs"].shape != self._shape:
            raise ValueError(
                f"batch of shape {batch['inputs'].shape} must be {self._shape} as the first was: "
                "another shape is another compilation"
            )
        crc32 = zlib.crc32(np.ascontiguousarray(batch["inputs"]))
        tokens = self._num_tokens(batch)
        on_device = self._place(batch)
        begin = time.perf_counter()
        if self._shape is None:
            with self.ledger.timed("compile"):
                self.state, metrics = self._train_step(self.state, on_device)
            self._shape = batch["inputs"].shape
            self.speed.resume()
        else:
            # Everything is on the device by now: a transfer here would be a hidden cost per step.
            with jax.transfer_guard("disallow"):
                self.state, metrics = self._train_step(self.state, on_device)
        self.step += 1
        self.ledger.step = self.step
        self.ledger.tokens += tokens
        before, self._pending = self._pending, _Pending(self.step, metrics, crc32)
        self._finish(before)
        must_lap = self.speed.add(tokens)
        if self.step % self._log_every == 0:
            self.settle()
        elif must_lap:
            jax.block_until_ready(self.state)
            self.speed.lap()
        if self.advanced:
            self.ledger.add("step", time.perf_counter() - begin)
        self.advanced = True

    def settle(self) -> None:
        """Waits for the step in flight and takes its numbers in; then the device is idle."""
        jax.block_until_ready(self.state)
        pending, self._pending = self._pending, None
        self._finish(pending)

    def aside(self, activity: str):
        """For a `with` block of something that is not training, on a finished step."""
        self.settle()
        return self._aside(activity)

    @contextlib.contextmanager
    def _aside(self, activity):
        self.speed.pause()
        with self.ledger.timed(activity):
            yield
        self.speed.resume()

    def save(self, checkpoints: checkpoint_lib.Checkpoints, metric: float | None) -> None:
        """Saves the state after the current step."""
        with self.aside("checkpoint"):
            try:
                checkpoints.save(
                    self.step,
                    self.state,
                    data_state=self._batches.get_state(),
                    metric=metric,
                    extra={"ledger": self.ledger.to_json()},
                )
            except FloatingPointError:
                raise NonFiniteError(self._report(self.step, None, None, None)) from None

    def write(self, values: dict[str, float]) -> None:
        """Hands numbers of the current step to the writer."""
        if self._write is not None:
            self._write(self.step, values)

    def _finish(self, pending: _Pending | None) -> None:
        if pending is None:
            return
        values = {name: float(x) for name, x in jax.device_get(pending.metrics).items()}
        loss, norm = values["loss"], values["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(self._report(pending.step, loss, norm, pending.crc32))
        if pending.step % self._log_every:
            return
        line = {f"train/{name}": value for name, value in values.items() if name != "tokens"}
        line["data/crc32"] = pending.crc32
        # Only `settle` gets here, so the device has finished the step and a window may end.
        window = self.speed.lap()
        if window is not None:
            line["perf/tokens_per_s"] = window.tokens_per_s
            if self._utilization is not None:
                line |= self._utilization.of(window)
        self.write(line)
        if self._progress is not None:
            text = f"loss {loss:.4f}"
            if window is not None:
                text += f", {window.tokens_per_s:,.0f} tokens/s"
            self._progress.update(pending.step, text, self.speed.seconds_per_step)

    def _report(self, step, loss, norm, crc32):
        arrays = jax.tree_util.tree_leaves_with_path(self.state.params)
        return {
            "step": step,
            "loss": None if loss is None else repr(loss),
            "grad_norm": None if norm is None else repr(norm),
            "batch_crc32": crc32,
            "not_finite": [
                jax.tree_util.keystr(path, simple=True, separator="/")
                for path, x in arrays
                if not jnp.isfinite(x).all()
            ],
        }
