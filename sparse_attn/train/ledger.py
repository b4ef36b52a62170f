"""Where the time of a run went, over all its starts: `ledger.json` in the run folder."""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

_REPEATED = ("data_wait", "step", "eval")  # What a step costs, and costs again when it is lost.


class Ledger:
    """Seconds by activity and what was done; `resume` carries both over restarts.

    Activities: `init` (parameters), `prepare_data`, `restore`, `compile`, `data_wait`, `step`,
    `eval`, `checkpoint`, `sample`, `lost` (steps that a killed process had made after its last
    durable checkpoint) and `other` (what nothing else names, so that all add up to the wall time).

    Attributes:
      seconds: by activity, without `other`.
      tokens: trained on, lost steps left out.
      step: updates made.
      starts: of a process.
      lost_steps: that had to be made again.

    >>> clock = iter([0.0, 1.0, 4.0, 5.0]).__next__
    >>> ledger = Ledger(clock=clock)
    >>> with ledger.timed("step"):
    ...     pass
    >>> ledger.to_json()["seconds"]
    {'step': 3.0, 'other': 2.0}
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter):
        self.seconds: dict[str, float] = {}
        self.tokens = self.step = self.lost_steps = 0
        self.starts = 1
        self._clock = clock
        self._begin = clock()  # Minus all that earlier processes spent, after `resume`.

    @contextlib.contextmanager
    def timed(self, activity: str):
        """Adds the time of the `with` block to `activity`."""
        begin = self._clock()
        try:
            yield
        finally:
            self.add(activity, self._clock() - begin)

    def add(self, activity: str, seconds: float) -> None:
        """Adds time to `activity`."""
        self.seconds[activity] = self.seconds.get(activity, 0.0) + seconds

    def resume(self, last: Mapping[str, Any] | None, saved: Mapping[str, Any] | None) -> None:
        """Adds what earlier processes did, and counts what was lost between two moments.

        Args:
          last: `to_json()` of the process before as it last wrote it; None = it is missing.
          saved: `to_json()` as of the checkpoint that is gone on from; None = from step 0.
        """
        if saved is not None and (last is None or last["step"] < saved["step"]):
            last = saved  # Killed between a checkpoint and the next line.
        if last is None:
            return
        saved = saved or {"seconds": {}, "tokens": 0, "step": 0}
        before = dict(last["seconds"])
        self._begin -= sum(before.values())
        for activity in _REPEATED:
            if activity in before:
                kept = min(before[activity], saved["seconds"].get(activity, 0.0))
                before["lost"] = before.get("lost", 0.0) + before[activity] - kept
                before[activity] = kept
        before.pop("other", None)  # It is what `_begin` leaves over.
        for activity, spent in before.items():
            self.add(activity, spent)
        self.tokens += saved["tokens"]
        self.step = saved["step"]
        self.starts += last["starts"]
        self.lost_steps = last["lost_steps"] + max(0, last["step"] - saved["step"])

    def to_json(self) -> dict[str, Any]:
        """Everything, with `other`, as JSON values."""
        other = self._clock() - self._begin - sum(self.seconds.values())
        return {
            "seconds": self.seconds | {"other": max(0.0, other)},
            "tokens": self.tokens,
            "step": self.step,
            "starts": self.starts,
            "lost_steps": self.lost_steps,
        }
