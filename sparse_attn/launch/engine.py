"""Engines start work units: `print` writes their commands, `local` runs them one after another.

`start` is what every engine runs a unit with; `ray_engine.py` and `skypilot.py` are more engines.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import pty
import select
import shlex
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Sequence
from typing import Any

from sparse_attn.launch import units as units_lib
from sparse_attn.train import exits
from sparse_attn.viz import tables

ROOT = str(pathlib.Path(__file__).resolve().parents[2])
LOG = "launch.log"  # everything the run printed
RECORD = "launch.json"  # how often it was started, and how the last start ended
INTERRUPTED = {exits.ExitCode.PREEMPTED, 128 + signal.SIGTERM, -signal.SIGTERM}


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
    with Stopper() as stopper:
        for i, unit in enumerate(units):
            title = f"[{i + 1}/{len(units)}] {unit.name} ({unit.id})"
            if is_finished(unit.folder):
                print(f"{title}: finished before, skipped", flush=True)
            elif not stopper.stopping:
                print(f"{title}: {unit.folder}", flush=True)
                codes[unit.id] = start(unit.command(sys.executable), unit.folder, stopper)
    return conclude(units, workdir, codes)


def conclude(units: Sequence[units_lib.WorkUnit], workdir: str, codes: dict[str, int]) -> int:
    """Prints the table of results, writes the report and names what failed or is left.

    Args:
      units: of the sweep.
      workdir: of the report.
      codes: exit codes by id of the units that were started.

    Returns:
      what `run_local` returns.
    """
    finished = [unit for unit in units if is_finished(unit.folder)]
    if finished:
        from sparse_attn.viz import report  # Printing commands does not need matplotlib.

        rows = [tables.result_row(unit.name, unit.folder) for unit in finished]
        print("\n" + tables.text(tables.RESULT_COLUMNS, rows))
        named = [(unit.name, unit.folder) for unit in finished]
        print(f"report: {report.write(workdir, named)}")
    return _tell(units, codes)


def status(units: Sequence[units_lib.WorkUnit]) -> str:
    """A table of where every unit stands, read from the run folders only."""
    columns = ("unit", "name", "state", "step", "checkpoint", "restarts", "validation", "tokens/s")
    rows = []
    for unit in units:
        progress = tables.progress(unit.folder)
        starts = tables.read_json(unit.folder, RECORD).get("starts", 0)
        cells = (progress.step, progress.checkpoint, max(0, starts - 1))
        cells += (progress.val_bpb, progress.tokens_per_s)
        rows.append((unit.id, unit.name, state_of(unit), *cells))
    return tables.text(columns, rows)


def is_finished(folder: str) -> bool:
    """True when the run of this folder wrote its summary with `"finished": true`."""
    return bool(tables.read_json(folder, "summary.json").get("finished"))


def state_of(unit: units_lib.WorkUnit) -> str:
    """`finished`, `running`, `preempted`, `failed (exit n)`, `stopped` or `not started`."""
    if is_finished(unit.folder):
        return "finished"
    if not os.path.isdir(unit.folder):
        return "not started"
    if is_running(unit.folder):
        return "running"
    code = tables.read_json(unit.folder, RECORD).get("exit_code")
    if code is None:
        return "stopped"  # Started by other means, or killed together with its launcher.
    return "preempted" if code in INTERRUPTED else f"failed (exit {code})"


class Stopper:
    """While active, SIGTERM and Ctrl-C go to the running unit instead of ending this process.

    Args:
      grace: seconds after which a unit that goes on is ended at once; None = it may take its time.
    """

    def __init__(self, *, grace: float | None = None):
        self.stopping, self._grace = False, grace
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
        if self._grace is not None:
            timer = threading.Timer(self._grace, self.terminate)  # The second signal is an order.
            timer.daemon = True
            timer.start()
        self.terminate()

    def terminate(self) -> None:
        """Sends SIGTERM to the unit, if there is one."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()


def start(
    command: Sequence[str], folder: str, stopper: Stopper, *, log: str = LOG, echo: bool = True
) -> int:
    """Runs the command of a unit to its end; the exit code.

    A unit that is finished is not run; one that another process runs gives
    `exits.ExitCode.PREEMPTED`: nothing failed, it is just not ours to finish.

    Args:
      command: of the unit, which writes to `folder`.
      folder: of the run; also of `launch.log` and of `launch.json`.
      stopper: active; ends the command when this process is to end.
      log: file that the output is appended to, locked while the command runs.
      echo: False = the output is in the log only.
    """
    os.makedirs(folder, exist_ok=True)
    record = pathlib.Path(folder, RECORD)
    with open(os.path.join(folder, log), "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            name = os.path.basename(folder)
            print(f"error: {name} is being run by another process", file=sys.stderr)
            return int(exits.ExitCode.PREEMPTED)
        if is_finished(folder):  # By whoever had the lock until now.
            return int(exits.ExitCode.FINISHED)
        begun = {"starts": tables.read_json(folder, RECORD).get("starts", 0) + 1}
        if log == LOG:  # The first of several hosts keeps the record.
            record.write_text(json.dumps(begun) + "\n")
        reader, writer = _terminal() if echo and sys.stdout.isatty() else os.pipe()
        path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
        # A session of its own: Ctrl-C reaches the unit only through the stopper, as SIGTERM. It
        # inherits the locked log, so the folder counts as running even if this process is killed.
        stopper.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            pass_fds=(file.fileno(),),
        )
        os.close(writer)
        if stopper.stopping:  # The signal came while the process was being made.
            stopper.terminate()
        while chunk := _read(reader):
            file.write(chunk)
            file.flush()
            if echo:
                sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
        os.close(reader)
        code = stopper.process.wait()
        stopper.process = None
        if log == LOG:
            record.write_text(json.dumps(begun | {"exit_code": code}) + "\n")
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
        # Python looks for interrupts between calls; one by Ray does not end a call, as signals do.
        while not select.select([reader], [], [], 0.5)[0]:
            pass
        return os.read(reader, 1 << 16)
    except OSError:  # A pseudo-terminal ends with EIO where a pipe ends with b"".
        return b""


def is_running(folder: str, log: str = LOG) -> bool:
    """True while a process runs the unit of this folder."""
    try:
        with open(os.path.join(folder, log), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _tell(units: Sequence[units_lib.WorkUnit], codes: dict[str, int]) -> int:
    failed = False
    left: list[Any] = []
    for unit in units:
        if is_finished(unit.folder):
            continue
        code = codes.get(unit.id)
        if code is None or code in INTERRUPTED:
            left.append(unit)
            continue
        failed = True
        log = os.path.join(unit.folder, LOG)
        print(f"failed: {unit.id} ({unit.name}): {explain(code)}, log: {log}", file=sys.stderr)
    if left:
        names = ", ".join(f"{unit.id} ({unit.name})" for unit in left)
        print(f"not finished: {names}; start the same command again", file=sys.stderr)
    if failed:
        return 1
    return int(exits.ExitCode.PREEMPTED if left else exits.ExitCode.FINISHED)


def explain(code: int) -> str:
    """What an exit code of a unit means.

    >>> explain(70), explain(-9)
    ('exit code 70 (NON_FINITE)', 'killed by SIGKILL')
    """
    if code == exits.ExitCode.FINISHED:
        return "exit code 0, but no finished summary.json"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code in set(exits.ExitCode):
        return f"exit code {code} ({exits.ExitCode(code).name})"
    return f"exit code {code}"
