"""Numbers on their way out: JSON lines, TensorBoard if installed, progress, throughput."""

import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


class JsonLines:
    """One JSON object per line in a file, with `step` first; whole after a crash at any moment.

    Args:
      path: file to append to.
      keep_until: the last step whose lines stay, when a run goes on from a checkpoint: later
        lines, and a line that was cut off, are dropped. None = keep all whole lines.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
    >>> with JsonLines(path) as lines:
    ...     lines.write(1, {"train/loss": 5.5})
    ...     lines.write(2, {"train/loss": 5.0})
    >>> with JsonLines(path, keep_until=1) as lines:
    ...     lines.write(2, {"train/loss": 4.0})
    >>> [(line["step"], line["train/loss"]) for line in read_json_lines(path)]
    [(1, 5.5), (2, 4.0)]
    """

    def __init__(self, path: str | os.PathLike[str], *, keep_until: int | None = None):
        path = pathlib.Path(path)
        if path.exists():
            kept = read_json_lines(path)
            if keep_until is not None:
                kept = [line for line in kept if line["step"] <= keep_until]
            replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")  # Open until `close`.

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; it is in the file when this returns."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; one that was cut off by a crash is left out."""
    lines = []
    for line in pathlib.Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict) and "step" in value:
            lines.append(value)
    return lines


def replace_file(path: pathlib.Path, text: str) -> None:
    """Writes a file so that it is the old one or the new one, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class TensorBoard:
    """The same numbers for TensorBoard, when `tensorboardX` is installed; else nothing.

    Never the reason for a run to fail.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        try:
            import tensorboardX
        except ImportError:
            self._writer = None
        else:
            self._writer = tensorboardX.SummaryWriter(os.fspath(directory))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point per value."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes."""
        if self._writer is not None:
            self._writer.close()


@dataclasses.dataclass(frozen=True)
class Window:
    """Steps between two moments at which the device was idle.

    Attributes:
      tokens: that are not padding.
      steps: whole ones.
      seconds: of nothing but training.
    """

    tokens: int
    steps: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens that are not padding, per second."""
        return self.tokens / self.seconds


class Throughput:
    """Tokens per second of training alone: without compilation, evaluation and saving.

    The first two steps after a start are left out (allocation, caches), and time counts between
    moments at which the device is known to have finished, which is for the caller to ensure.

    >>> clock = iter([0.0, 4.0, 6.0, 10.0, 11.0]).__next__
    >>> speed = Throughput(skip=2, clock=clock)
    >>> speed.resume()
    >>> speed.add(100), speed.add(100)
    (False, True)
    >>> speed.lap()  # the skipped steps
    >>> speed.add(100)
    False
    >>> speed.lap(), speed.tokens_per_s, speed.seconds_per_step
    (Window(tokens=100, steps=1, seconds=2.0), 50.0, 2.0)
    """

    def __init__(self, *, skip: int = 2, clock: Callable[[], float] = time.perf_counter):
        self._skip, self._clock = skip, clock
        self._since: float | None = None
        self._window_tokens = self._window_steps = 0
        self._tokens = self._steps = 0
        self._seconds = 0.0

    def add(self, tokens: int) -> bool:
        """Counts a step; True when it was the last skipped one, so that `lap` must follow."""
        if self._skip > 0:
            self._skip -= 1
            return self._skip == 0
        self._window_tokens += tokens
        self._window_steps += 1
        return False

    def lap(self) -> Window | None:
        """Ends a window, with the device idle, and gives it; None when it is empty."""
        now = self._clock()
        elapsed = now - (now if self._since is None else self._since)
        tokens, steps = self._window_tokens, self._window_steps
        self._since, self._window_tokens, self._window_steps = now, 0, 0
        if not steps or elapsed <= 0:
            return None
        self._tokens, self._steps = self._tokens + tokens, self._steps + steps
        self._seconds += elapsed
        return Window(tokens, steps, elapsed)

    def pause(self) -> None:
        """Ends a window; time does not count until `resume`."""
        self.lap()
        self._since = None

    def resume(self) -> None:
        """Starts a window."""
        self._since = self._clock()

    @property
    def tokens_per_s(self) -> float | None:
        """Over all windows so far."""
        return self._tokens / self._seconds if self._seconds else None

    @property
    def seconds_per_step(self) -> float | None:
        """Over all windows so far."""
        return self._seconds / self._steps if self._steps else None


class Progress:
    """How far a run is: a bar on a terminal, plain lines elsewhere. The ETA excludes compilation.

    Args:
      total: steps of the whole run.
      name: shown in front.
      stream: text stream, None = standard output; a bar if it is a terminal.
    """

    def __init__(self, total: int, *, name: str = "train", stream: Any = None):
        self._total, self._name = total, name
        self._stream = sys.stdout if stream is None else stream
        self._bar = None

    def update(self, step: int, text: str, seconds_per_step: float | None) -> None:
        """Shows `step` of the total, the text, and the time left at this speed."""
        left = "?" if seconds_per_step is None else (self._total - step) * seconds_per_step
        eta = f"ETA {format_seconds(left)}" if left != "?" else "ETA ?"
        if not self._stream.isatty():
            print(f"{self._name}: step {step}/{self._total}, {text}, {eta}", file=self._stream)
            self._stream.flush()
            return
        if self._bar is None:
            import tqdm

            # tqdm's own estimate would count evaluations and the first, slow steps.
            self._bar = tqdm.tqdm(
                total=self._total,
                desc=self._name,
                file=self._stream,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}",
            )
        self._bar.n = step
        self._bar.set_postfix_str(f"{text}, {eta}")

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()


def format_seconds(seconds: float | int) -> str:
    """Hours, minutes and seconds.

    >>> format_seconds(75.2), format_seconds(3700)
    ('1:15', '1:01:40')
    """
    minutes, rest = divmod(math.ceil(seconds - 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
