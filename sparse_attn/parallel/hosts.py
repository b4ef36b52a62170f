"""Several processes as one run: how they find each other, and how they stop after the same step.

Each process is started with the same command. On Cloud TPU, Slurm and other places that JAX knows,
`SPARSE_ATTN_HOSTS=auto` is enough; elsewhere the environment says who is who:
`JAX_COORDINATOR_ADDRESS=HOST:PORT JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0`.
"""

import itertools
import os
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start() -> None:
    """Joins the other processes if the environment asks for it; before any use of a device.

    Raises:
      ValueError: the environment is incomplete or malformed.

    >>> start()  # No variable is set: one process.
    """
    asked = os.environ.get("SPARSE_ATTN_HOSTS")
    if asked not in (None, "auto"):
        raise ValueError(f"SPARSE_ATTN_HOSTS={asked!r} must be 'auto', or not set")
    given = {name: os.environ[name] for name in _NAMES if name in os.environ}
    if jax.distributed.is_initialized() or not (asked or given):
        return
    if asked:
        jax.distributed.initialize()
        return
    for name in _NAMES[1:]:
        if not given.get(name, "").isdigit():
            raise ValueError(
                f"{name}={given.get(name)!r} must be a number: {', '.join(_NAMES)} are set "
                "together, or SPARSE_ATTN_HOSTS=auto instead"
            )
    if _NAMES[0] not in given:
        raise ValueError(f"{_NAMES[0]} must be HOST:PORT of process 0")
    jax.distributed.initialize(given[_NAMES[0]], int(given[_NAMES[1]]), int(given[_NAMES[2]]))


def agreed(stop: Callable[[], bool], *, step: int = 0) -> Callable[[], bool]:
    """`stop` for a loop that all processes run: all are told to stop after the same step.

    With several processes, JAX's own service takes SIGTERM in place of Python's handler. It goes
    by step numbers, as Orbax does: the loop asks once per step, the first time after `step`.

    >>> agreed(lambda: True)()
    True
    """
    if jax.process_count() == 1:
        return stop
    steps = itertools.count(step)
    return lambda: multihost_utils.reached_preemption_sync_point(next(steps))
