"""Batches that are a function of their number, so that their place in a run is one number."""

from collections.abc import Iterator
from typing import Any

import numpy as np


class Batches(Iterator[dict[str, np.ndarray]]):
    """Endless batches; a subclass makes batch `_step` in `__next__`, and counts it.

    Attributes:
      _fingerprint: JSON of all that the order depends on; another one refuses a state.
      _step: the number of the next batch.

    Raises:
      ValueError: from `set_state`, the state belongs to other data or other settings.
    """

    def __init__(self, fingerprint: dict[str, Any]):
        self._fingerprint, self._step = fingerprint, 0

    def get_state(self) -> dict[str, Any]:
        """The place in the stream, and what its order depends on."""
        return {"fingerprint": dict(self._fingerprint), "step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on with the batch after the one at which `get_state` was called."""
        saved = state.get("fingerprint")
        if saved != self._fingerprint:
            raise ValueError(
                f"the data order cannot be resumed: it was {saved} and is now {self._fingerprint}"
            )
        self._step = state["step"]
