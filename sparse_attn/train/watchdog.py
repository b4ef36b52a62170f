"""A step that hangs says where: the stacks of all threads, on stderr and in the run folder."""

import faulthandler
import os
import pathlib
import sys
import threading


class Watchdog:
    """While active: without a `beat` for `seconds`, it writes all stacks, once per hang.

    It ends nothing: a collective may hang because another host does, whose stacks tell more.

    Args:
      folder: of the file `stacks.txt`, to which every hang is appended.
      seconds: without a beat that are a hang; None = never looks.

    Raises:
      ValueError: `seconds <= 0`.

    >>> import tempfile, time
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with Watchdog(folder, seconds=60.0) as watchdog:
    ...     watchdog.beat("step 1")
    >>> (folder / "stacks.txt").exists()
    False
    """

    def __init__(self, folder: str | os.PathLike[str], *, seconds: float | None):
        if seconds is not None and seconds <= 0:
            raise ValueError(f"hang_seconds={seconds} must be > 0, or None for no watchdog")
        self._path, self._seconds = pathlib.Path(folder, "stacks.txt"), seconds
        self._doing = "the start"
        self._beaten, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._closed = True
        self._beaten.set()
        if self._seconds is not None:
            self._thread.join()

    def beat(self, doing: str) -> None:
        """Tells that there is progress, and what comes now."""
        self._doing = doing
        self._beaten.set()

    def _watch(self) -> None:
        while not self._closed:
            if not self._beaten.wait(self._seconds):
                self._dump()
                self._beaten.wait()
            self._beaten.clear()

    def _dump(self) -> None:
        line = f"no progress for {self._seconds:g} s in {self._doing}; stacks of all threads:\n"
        print(f"warning: {line}", end="", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__)
        with self._path.open("a") as file:
            file.write(line)
            file.flush()
            faulthandler.dump_traceback(file)
