"""Engines start work units: `print` writes their commands, `local` runs them one after another."""

import contextlib
import fcntl
import json
import os
import pathlib
import pty
import shlex
import signal
import subprocess
import sys
import termios
from collections.abc import Sequence
from typing import Any

from sparse_attn.launch import units as units_lib
from sparse_attn.train import exits
from sparse_attn.viz import tables

_ROOT = str(pathlib.Path(__file__).resolve().parents[2])
LOG = "launch.log"  # everything the run printed
RECORD = "launch.json"  # how its last start ended
_INTERRUPTED = {exits.ExitCode.PREEMPTED, 128 + signal.SIGTERM, -signal.SIGTERM}


def run_print(units: Sequence[units_lib.WorkUnit], workdir: str) -> int:
    """Prints one command per unit, quoted for a shell, to be run from the repository root."""
    del workdir  # Every command names its own run folder.
    for unit in units:
        print(shlex.join(unit.command()))
    return int(exits.ExitCode.FINISHED)


def run_local(units: Sequence[units_lib.WorkUnit], workdir: str) -> int:
    """Runs the units one after another on this machine, then prints the table of results.

    A finished unit is skipped, a failed one does not stop the others. SIGTERM or Ctrl-C is passed
    to the running unit, which saves and ends; the rest is left for the next start.

    Returns:
      0 when every unit is finished, 75 (`exits.ExitCode.PREEMPTED`) when starting the same command
      again will continue, 1 when a unit failed.
    """
    codes: dict[str, int] = {}
    with _Stopper() as stopper:
        for i, unit in enumerate(units):
            title = f"[{i + 1}/{len(units)}] {unit.name} ({unit.id})"
            if is_finished(unit):
                print(f"{title}: finished before, skipped", flush=True)
            elif not stopper.stopping:
                print(f"{title}: {unit.folder}", flush=True)
                codes[unit.id] = _run(unit, stopper)
    finished = [unit for unit in units if is_finished(unit)]
    if finished:
        from sparse_attn.viz import report  # Printing commands does not need matplotlib.

        rows = [tables.result_row(unit.name, unit.folder) for unit in finished]
        print("\n" + tables.text(tables.RESULT_COLUMNS, rows))
        named = [(unit.name, unit.folder) for unit in finished]
        print(f"report: {report.write(workdir, named)}")
    return _conclude(units, codes)


ENGINES = {"print": run_print, "local": run_local}


def status(units: Sequence[units_lib.WorkUnit]) -> str:
    """A table of where every unit stands, read from the run folders only."""
    columns = ("unit", "name", "state", "step", "checkpoint", "val bpb", "tokens/s")
    rows = []
    for unit in units:
        progress = tables.progress(unit.folder)
        cells = (progress.step, progress.checkpoint, progress.val_bpb, progress.tokens_per_s)
        rows.append((unit.id, unit.name, state_of(unit), *cells))
    return tables.text(columns, rows)


def is_finished(unit: units_lib.WorkUnit) -> bool:
    """True when the run wrote its summary with `"finished": true`."""
    return bool(tables.read_json(unit.folder, "summary.json").get("finished"))


def state_of(unit: units_lib.WorkUnit) -> str:
    """`finished`, `running`, `preempted`, `failed (exit n)`, `stopped` or `not started`."""
    if is_finished(unit):
        return "finished"
    if not os.path.isdir(unit.folder):
        return "not started"
    if _is_running(unit):
        return "running"
    code = tables.read_json(unit.folder, RECORD).get("exit_code")
    if code is None:
        return "stopped"  # Started by other means, or killed together with its launcher.
    return "preempted" if code in _INTERRUPTED else f"failed (exit {code})"


class _Stopper:
    """While active, SIGTERM and Ctrl-C go to the running unit instead of ending this process."""

    def __init__(self):
        self.stopping = False
        self.process: subprocess.Popen | None = None

    def __enter__(self):
        signals = (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._stop) for number in signals}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, *_):
        self.stopping = True
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()


def _run(unit: units_lib.WorkUnit, stopper: _Stopper) -> int:
    os.makedirs(unit.folder, exist_ok=True)
    record = pathlib.Path(unit.folder, RECORD)
    with open(os.path.join(unit.folder, LOG), "ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"error: {unit.id} is being run by another process", file=sys.stderr)
            return int(exits.ExitCode.PREEMPTED)  # Nothing failed; it is just not ours to finish.
        record.unlink(missing_ok=True)
        reader, writer = _terminal() if sys.stdout.isatty() else os.pipe()
        path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
        # A session of its own: Ctrl-C reaches the unit only through the stopper, as SIGTERM. It
        # inherits the locked log, so the folder counts as running even if this process is killed.
        stopper.process = subprocess.Popen(
            unit.command(sys.executable),
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            pass_fds=(log.fileno(),),
        )
        os.close(writer)
        if stopper.stopping:  # The signal came while the process was being made.
            stopper.process.terminate()
        while chunk := _read(reader):
            log.write(chunk)
            log.flush()
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
        os.close(reader)
        code = stopper.process.wait()
        stopper.process = None
        record.write_text(json.dumps({"exit_code": code}) + "\n")
    return code


def _terminal() -> tuple[int, int]:
    """A pseudo-terminal of the size of this one, so that the run draws its progress bar."""
    reader, writer = pty.openpty()
    with contextlib.suppress(termios.error):
        termios.tcsetwinsize(writer, termios.tcgetwinsize(sys.stdout.fileno()))
    attributes = termios.tcgetattr(writer)
    attributes[1] &= ~termios.OPOST  # Line ends are the outer terminal's to translate.
    termios.tcsetattr(writer, termios.TCSANOW, attributes)
    return reader, writer


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 1 << 16)
    except OSError:  # A pseudo-terminal ends with EIO where a pipe ends with b"".
        return b""


def _is_running(unit: units_lib.WorkUnit) -> bool:
    try:
        with open(os.path.join(unit.folder, LOG), "rb") as log:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _conclude(units: Sequence[units_lib.WorkUnit], codes: dict[str, int]) -> int:
    failed = False
    left: list[Any] = []
    for unit in units:
        if is_finished(unit):
            continue
        code = codes.get(unit.id)
        if code is None or code in _INTERRUPTED:
            left.append(unit)
            continue
        failed = True
        log = os.path.join(unit.folder, LOG)
        print(f"failed: {unit.id} ({unit.name}): {_explain(code)}, log: {log}", file=sys.stderr)
    if left:
        names = ", ".join(f"{unit.id} ({unit.name})" for unit in left)
        print(f"not finished: {names}; start the same command again", file=sys.stderr)
    if failed:
        return 1
    return int(exits.ExitCode.PREEMPTED if left else exits.ExitCode.FINISHED)


def _explain(code: int) -> str:
    if code == exits.ExitCode.FINISHED:
        return "exit code 0, but no finished summary.json"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code in set(exits.ExitCode):
        return f"exit code {code} ({exits.ExitCode(code).name})"
    return f"exit code {code}"
