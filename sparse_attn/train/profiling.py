"""What to look at when a step is slow: a profiler's window, the compiled program, the cache."""

import contextlib
import dataclasses
import os
import pathlib
import re

import jax


@dataclasses.dataclass(frozen=True)
class ProfileWindow:
    """The steps to profile, `start` to `stop`, both included and counted over all starts.

    >>> ProfileWindow.parse("10:12")
    ProfileWindow(start=10, stop=12)
    """

    start: int
    stop: int

    @classmethod
    def parse(cls, text: str) -> "ProfileWindow":
        """Reads `start:stop`.

        Raises:
          ValueError: it is not two step numbers, the first of them at least 1 and not the larger.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text)
        window = cls(*map(int, match.groups())) if match else None
        if window is None or not 1 <= window.start <= window.stop:
            raise ValueError(f"profile={text!r} must be START:STOP, two steps, 1 <= START <= STOP")
        return window


class Profiler:
    """Writes a trace of the window's steps to a folder, for TensorBoard, xprof or Perfetto.

    A context manager, so that a run that ends inside the window still writes its trace.

    Args:
      folder: to write to.
      window: None = nothing is profiled.
    """

    def __init__(self, folder: str | os.PathLike[str], window: ProfileWindow | None):
        self._folder, self._window, self._active = os.fspath(folder), window, False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc_info) -> None:
        self._stop()

    def starts_at(self, step: int) -> bool:
        """True when a trace starts with this step: the device should be idle by then."""
        return self._window is not None and step == self._window.start

    def ends_at(self, step: int) -> bool:
        """True when this step is the last of the trace: it should be finished by then."""
        return self._active and step == self._window.stop

    def start(self) -> None:
        """Starts the trace."""
        jax.profiler.start_trace(self._folder)
        self._active = True

    def stop(self) -> None:
        """Ends the trace and writes it."""
        self._stop()
        print(f"profile: steps {self._window.start} to {self._window.stop} in {self._folder}")

    def _stop(self) -> None:
        if self._active:
            self._active = False
            jax.profiler.stop_trace()


def dump_hlo(folder: str | os.PathLike[str]) -> None:
    """From now on XLA writes the training step, before and after optimization, as text.

    To be called before JAX uses a device. A program from the cache would not be written, so the
    cache is off.
    """
    options = f"--xla_dump_to={os.fspath(folder)} --xla_dump_hlo_as_text"
    options += " --xla_dump_hlo_module_re=.*train_step.*"
    os.environ["XLA_FLAGS"] = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), options)))
    jax.config.update("jax_enable_compilation_cache", False)


def cache_compilations(folder: str | os.PathLike[str]) -> None:
    """Keeps compiled programs in a folder, so that a restart does not compile again.

    A folder that is set already (`JAX_COMPILATION_CACHE_DIR`) stays. Nothing is set on CPU:
    compilation is short there, and XLA refuses its own programs on some of its hosts
    (github.com/jax-ml/jax/issues/38445).
    """
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
        with contextlib.suppress(OSError):  # A read-only home is no reason not to train.
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
