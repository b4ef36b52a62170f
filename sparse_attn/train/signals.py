"""SIGTERM, the notice that a machine is about to be taken away."""

import os
import signal
import threading


class StopRequest:
    """While active: the first SIGTERM sets `requested`, a second one ends the process at once.

    >>> with StopRequest() as stop:
    ...     before = stop.requested
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     before, stop.requested
    (False, True)
    """

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "StopRequest":
        # Python delivers signals to the main thread only; elsewhere there is nothing to install.
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *exc_info) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number, frame) -> None:
        if self.requested:
            # No clean-up: whoever sends it twice wants the process gone, and saves are atomic.
            os._exit(128 + number)
        self.requested = True
