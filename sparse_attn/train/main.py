r"""Trains one model from a config, into a run folder; started again, goes on where it stopped.

    python -m sparse_attn.train.main --config=configs/quickstart.py:local \
        --config.optim.lr=3e-4 --workdir=runs/local

Exit codes: 0 finished; 2 command line, config or data wrong; 65 the folder's checkpoints cannot be
restored; 70 the loss became NaN or infinite; 71 the device's memory is too small; 75 stopped by
SIGTERM after saving, start again; 143 stopped at once by a second SIGTERM. They are named in
`sparse_attn.train.exits`.

Prepared text and, on accelerators, compiled programs are shared by all runs, in
`$SPARSE_ATTN_CACHE` or `~/.cache/sparse_attn`.
"""

import contextlib
import functools
import glob
import logging
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from sparse_attn.parallel import hosts
from sparse_attn.parallel import mesh as mesh_lib
from sparse_attn.train import checkpoint as checkpoint_lib
from sparse_attn.train import (
    config_check,
    exits,
    out_of_memory,
    profiling,
    run_folder,
    signals,
    tasks,
    watchdog,
)
from sparse_attn.train import flops as flops_lib
from sparse_attn.train import ledger as ledger_lib
from sparse_attn.train import loop as loop_lib
from sparse_attn.train import metrics as metrics_lib
from sparse_attn.train import optim as optim_lib
from sparse_attn.train import state as state_lib


class UsageError(Exception):
    """Config or data cannot be used as they are; the message says what to change."""


def train(
    config: Any,
    workdir: str | os.PathLike[str],
    *,
    profile: profiling.ProfileWindow | None = None,
) -> exits.ExitCode:
    """Runs a config (a `ConfigDict` or nested dicts) to its end, or until SIGTERM.

    Args:
      config: the run.
      workdir: its folder.
      profile: steps to trace, into the folder `profile`.

    Raises:
      UsageError: the config or the data is wrong; nothing was written.
      CheckpointError: the folder has checkpoints and none can be restored.
      OutOfMemoryError: the device's memory is too small; the message says what to change.
    """
    with signals.StopRequest() as stop, _mesh(config) as mesh:
        try:
            run = prepare_run(config, workdir, mesh)
            return exits.ExitCode.FINISHED if run is None else run.to_end(stop, profile)
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
            text = out_of_memory.explain(error, _plain(config), num_devices=jax.device_count())
            raise out_of_memory.OutOfMemoryError(text) from error


@contextlib.contextmanager
def _mesh(config: Any) -> Iterator[jax.sharding.Mesh | None]:
    """The mesh of the config, set; None for one device."""
    try:
        hosts.start()
        mesh = mesh_lib.make(config["mesh"]["axes"])
    except ValueError as error:
        raise UsageError(str(error)) from error
    if mesh.size == 1:
        yield None
    else:
        with jax.set_mesh(mesh):
            yield mesh


def prepare_run(
    config: Any, workdir: str | os.PathLike[str], mesh: jax.sharding.Mesh | None = None
) -> "Run | None":
    """Builds everything a run needs, None when the folder's run is finished already.

    Raises:
      UsageError: the config or the data is wrong; nothing was written.
    """
    config, folder = _plain(config), pathlib.Path(workdir)
    try:
        if run_folder.is_finished(folder, config["train"]["steps"]):
            print(f"{folder}: already finished ({config['train']['steps']} steps)")
            return None
        return Run(config, folder, mesh)
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        raise UsageError(str(error)) from error


class Run:
    """One start of a run: built from the config, restored from the folder, trained, summed up."""

    def __init__(
        self,
        config: dict[str, Any],
        folder: pathlib.Path,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.config, self.folder, self.ledger = config, folder, ledger_lib.Ledger()
        # The processes of a run share its checkpoints; each has a folder for all else.
        self.checkpoints_folder = folder / run_folder.CHECKPOINTS
        if index := jax.process_index():
            self.folder = folder / run_folder.PROCESSES / str(index)
        # Everything that can be wrong is found before anything is written.
        self.task = tasks.of(config, mesh)
        self.model = self.task.model
        self.optimizer, self.schedule = optim_lib.of(
            config["optim"], steps=config["train"]["steps"]
        )
        self.watchdog = watchdog.Watchdog(self.folder, seconds=config["train"]["hang_seconds"])
        profiling.cache_compilations(run_folder.cache() / "compiled")
        shardings = None
        if mesh is not None:
            rules = config["mesh"]["rules"] or mesh_lib.RULES
            shardings = functools.partial(mesh_lib.shardings, mesh, rules=rules)
        with self.ledger.timed("init"):
            self.state = state_lib.create(
                self.model,
                self.optimizer,
                key=jax.random.key(config["seed"]),
                inputs=self.task.inputs,
                shardings=shardings,
            )
        self.shardings = None if mesh is None else jax.tree.map(lambda x: x.sharding, self.state)
        with self.ledger.timed("prepare_data"):
            self.task.open_data()
        self._write_identity()

    def _write_identity(self) -> None:
        data = self.task.data
        known = run_folder.read_json(self.folder, run_folder.CORPUS)
        if known is not None and known["sha256"] != data.sha256:
            raise ValueError(
                f"data changed: {self.folder} was trained on {known['name']} (sha256 "
                f"{known['sha256']}) and the data is now {data.name} (sha256 "
                f"{data.sha256}); start in another workdir"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        before = run_folder.read_json(self.folder, run_folder.CONFIG)
        changed = run_folder.changed_names(before, self.config) if before is not None else []
        if changed:
            print(f"config changed since the last start: {', '.join(changed)}", flush=True)
        run_folder.write_json(self.folder, run_folder.CONFIG, self.config)
        run_folder.write_json(self.folder, run_folder.ENV, run_folder.environment())
        run_folder.write_json(self.folder, run_folder.CORPUS, data.to_json())

    def to_end(
        self, stop: signals.StopRequest, profile: profiling.ProfileWindow | None = None
    ) -> exits.ExitCode:
        """Trains until the last step, a stop or a number that is not finite."""
        config = self.config
        checkpoints = checkpoint_lib.Checkpoints(
            self.checkpoints_folder, keep=config["train"]["keep"]
        )
        with checkpoints:
            state = self._restore(checkpoints)
            step = int(state.step)
            board = metrics_lib.TensorBoard(self.folder / "tensorboard")
            lines = metrics_lib.JsonLines(self.folder / run_folder.METRICS, keep_until=step)
            progress = metrics_lib.Progress(config["train"]["steps"], name=config["name"])

            def write(step: int, values: dict[str, float]) -> None:
                lines.write(step, values)
                board.write(step, values)
                self._write_ledger()

            profiler = profiling.Profiler(self.folder / "profile", profile)
            try:
                with self.watchdog, profiler:
                    outcome = self._fit(state, checkpoints, write, progress, profiler, stop)
            except loop_lib.NonFiniteError as error:
                run_folder.write_json(self.folder, run_folder.NON_FINITE, error.report)
                print(
                    f"error: {error}; see {self.folder / run_folder.NON_FINITE}; checkpoints kept: "
                    f"steps {checkpoints.steps()}",
                    file=sys.stderr,
                )
                return exits.ExitCode.NON_FINITE
            finally:
                progress.close()
                lines.close()
                board.close()
                self._write_ledger()
        if not outcome.finished:
            print(f"stopped by SIGTERM after step {int(outcome.state.step)}; start again to go on")
            return exits.ExitCode.PREEMPTED
        self._sum_up(outcome)
        return exits.ExitCode.FINISHED

    def _restore(self, checkpoints) -> state_lib.TrainState:
        with self.ledger.timed("restore"):
            restored = checkpoints.restore(self.state)
        last = run_folder.read_json(self.folder, run_folder.LEDGER)
        self.ledger.resume(last, restored and restored.extra["ledger"])
        self._write_ledger()
        if restored is None:
            return self.state
        try:
            self.task.train_batches.set_state(restored.data_state)
        except ValueError as error:
            raise checkpoint_lib.CheckpointError(
                f"{self.folder} cannot go on from step {restored.step}: {error}"
            ) from error
        print(f"resumed from step {restored.step}", flush=True)
        return restored.state

    def _write_ledger(self) -> None:
        run_folder.write_json(self.folder, run_folder.LEDGER, self.ledger.to_json())

    def _fit(self, state, checkpoints, write, progress, profiler, stop) -> loop_lib.Outcome:
        settings = self.config["train"]
        return loop_lib.fit(
            state,
            state_lib.make_train_step(
                self.model,
                self.optimizer,
                grad_accum=self.config["optim"]["grad_accum"],
                schedule=self.schedule,
                shardings=self.shardings,
            ),
            self.task.train_batches,
            num_tokens=self.task.num_tokens,
            place=self.task.place,
            steps=settings["steps"],
            log_every=settings["log_every"],
            write=write,
            progress=progress,
            evaluate=self.task.evaluator(),
            eval_every=settings["eval_every"],
            checkpoints=checkpoints,
            checkpoint_every=settings["checkpoint_every"],
            ledger=self.ledger,
            utilization=flops_lib.utilization(
                self.model.config,
                state.params,
                context=self.task.row_tokens,
                batch_size=self.config["data"]["batch_size"],
                device_kind=jax.devices()[0].device_kind,
                num_devices=len(state.step.devices()),
            ),
            profiler=profiler,
            beat=self.watchdog.beat,
            stop=hosts.agreed(lambda: stop.requested, step=int(state.step)),
        )

    def _sum_up(self, outcome: loop_lib.Outcome) -> None:
        with self.ledger.timed("sample"):
            sample = self.task.sample(outcome.state)
        if sample is not None:
            metrics_lib.replace_file(self.folder / run_folder.SAMPLE, sample)
        history = metrics_lib.read_json_lines(self.folder / run_folder.METRICS)
        results = self.task.results(lambda name: _last(history, f"eval/{name}"))
        self._write_ledger()
        spent = self.ledger.to_json()
        summary = {
            "finished": True,
            "name": self.config["name"],
            "pattern": self.model.config.pattern.expression(),
            "params": state_lib.num_params(outcome.state.params),
            "steps": int(outcome.state.step),
            "tokens": self.ledger.tokens,
            "row_tokens": self.task.row_tokens,
            **results,
            "train_loss": _last(history, "train/loss"),
            "tokens_per_s": outcome.tokens_per_s or _last(history, "perf/tokens_per_s"),
            "mfu_useful": _last(history, "perf/mfu_useful"),
            "mfu_executed": _last(history, "perf/mfu_executed"),
            **flops_lib.attention_cost(
                self.model.config,
                context=self.task.row_tokens,
                batch_size=self.config["data"]["batch_size"],
            ),
            "corpus": self.task.data.name,
            "corpus_sha256": self.task.data.sha256,
            "wall_seconds": sum(spent["seconds"].values()),
            **{name: spent[name] for name in ("seconds", "starts", "lost_steps")},
        }
        run_folder.write_json(self.folder, run_folder.SUMMARY, summary)
        told = ", ".join(f"{name} {value:.4f}" for name, value in results.items())
        print(f"{self.config['name']}: finished, {told}", flush=True)


def _last(history: list[dict[str, Any]], name: str) -> float | None:
    return next((line[name] for line in reversed(history) if name in line), None)


def _plain(config: Any) -> dict[str, Any]:
    """Nested dicts of JSON values, whatever kind of config it was."""
    plain = {}
    for key, value in config.items():
        if hasattr(value, "items"):
            plain[key] = _plain(value)
        else:
            plain[key] = list(value) if isinstance(value, tuple) else value
    return plain


_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE.py[:ARGUMENT]")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.", required=True)
_PROFILE = flags.DEFINE_string("profile", None, "START:STOP, steps to trace into WORKDIR/profile.")
_DUMP_HLO = flags.DEFINE_bool("dump-hlo", False, "Write the compiled step to WORKDIR/hlo.")


def main(argv: list[str]) -> int:
    """Runs the command line."""
    _quiet_without_tpu()
    # Orbax and TFDS report every file they touch; ours is one line per choice.
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("sparse_attn").setLevel(logging.INFO)
    try:
        if argv[1:]:
            raise UsageError(f"argument {argv[1]!r} must be a flag such as --workdir=DIR")
        profile = None
        if _PROFILE.value is not None:
            try:
                profile = profiling.ProfileWindow.parse(_PROFILE.value)
            except ValueError as error:
                raise UsageError(str(error)) from None
        if _DUMP_HLO.value:
            profiling.dump_hlo(pathlib.Path(_WORKDIR.value, "hlo"))
        return int(train(_CONFIG.value, _WORKDIR.value, profile=profile))
    except UsageError as error:
        return _fail(error, exits.ExitCode.USAGE)
    except checkpoint_lib.CheckpointError as error:
        return _fail(error, exits.ExitCode.CHECKPOINTS)
    except out_of_memory.OutOfMemoryError as error:
        return _fail(error, exits.ExitCode.OUT_OF_MEMORY)


def _quiet_without_tpu() -> None:
    """libtpu comes with the test requirements, and warns at length where there is no TPU."""
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-1")


def _fail(error: Exception, code: exits.ExitCode) -> int:
    print(f"error: {error}", file=sys.stderr)
    return int(code)


if __name__ == "__main__":
    app.run(main, flags_parser=config_check.parse_flags)
