"""Runs the units of a sweep on a Ray cluster, each a process of the command that `print` shows.

All nodes need the repository and the sweep's folder at the same paths, as on a shared disk.
"""

import concurrent.futures
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_attn.launch import engine
from sparse_attn.launch import units as units_lib
from sparse_attn.train import exits
from sparse_attn.viz import tables


def run(
    units: Sequence[units_lib.WorkUnit],
    workdir: str,
    *,
    address: str | None = None,
    resources: Mapping[str, float] | None = None,
    tpu: str | None = None,
    retries: int = 3,
) -> int:
    """Runs all units, as many at once as the cluster has room for; returns as `run_local`.

    A unit that fails, is killed or loses its node is started again, `retries` times in a row
    without a new checkpoint, unless the end is one of `exits.FINAL`. Started again, this skips
    finished units and waits for those that still run. SIGTERM and Ctrl-C have all units save and
    end. One unit takes `resources` such as {"CPU": 4, "GPU": 1} (None = one CPU), or a whole slice
    such as `tpu="v6e:4x4"`, whose hosts all run the command. `address=None` = a cluster of its own.

    Raises:
      ImportError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("--engine=ray needs Ray: pip install -r requirements-ray.txt") from error
    where = {"address": address} if address else {"address": "local", "include_dashboard": False}
    ray.init(**where, log_to_driver=False, logging_level="warning")
    sweep = _Sweep(ray, dict(resources or {"CPU": 1}), tpu, retries)
    left = [unit for unit in units if not engine.is_finished(unit.folder)]
    handlers = {n: signal.signal(n, sweep.stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        with concurrent.futures.ThreadPoolExecutor(max(1, len(left))) as threads:
            ends = {unit.id: threads.submit(sweep.to_end, unit) for unit in left}
            while concurrent.futures.wait(ends.values(), timeout=0.5).not_done:
                if sweep.stopping:
                    sweep.cancel()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        ray.shutdown()
    return engine.conclude(units, workdir, {name: end.result() for name, end in ends.items()})


class _Sweep:
    """What the threads share: one thread per unit, which waits for Ray most of its time."""

    def __init__(self, ray: Any, resources: dict[str, float], tpu: str | None, retries: int):
        self._ray, self._resources, self._tpu, self._retries = ray, resources, tpu, retries
        self._task = ray.remote(max_retries=0)(_on_node)
        self._tasks: set[Any] = set()
        self.stopping = False

    def stop(self, *_) -> None:  # In a signal handler: the main loop does the rest.
        self.stopping = True

    def cancel(self) -> None:
        """Interrupts running tasks, which have their units save, and drops waiting ones."""
        while self._tasks:
            self._ray.cancel(self._tasks.pop())

    def to_end(self, unit: units_lib.WorkUnit) -> int:
        """Starts a unit until it is finished, hopeless or out of retries; its last exit code."""
        failures, code = 0, int(exits.ExitCode.PREEMPTED)
        while failures <= self._retries and not self.stopping:
            saved = tables.progress(unit.folder).checkpoint
            code = self._start(unit)
            if engine.is_finished(unit.folder) or code in exits.FINAL:
                break
            print(f"{unit.id} ({unit.name}): {engine.explain(code)}", file=sys.stderr, flush=True)
            failures = failures + 1 if saved == tables.progress(unit.folder).checkpoint else 0
        return code

    def _start(self, unit: units_lib.WorkUnit) -> int:
        codes = []
        with self._hosts() as hosts:
            left = [
                self._task.options(**options).remote(unit.command(), unit.folder, os.getcwd(), rank)
                for rank, options in enumerate(hosts)
            ]
            self._tasks.update(left)
            while left:
                (done,), left = self._ray.wait(left, num_returns=1)
                codes.append(self._code(done))
                for task in left if codes[-1] else ():  # They would wait for this one for ever.
                    self._ray.cancel(task)
        return next(filter(None, codes), 0 if codes else int(exits.ExitCode.PREEMPTED))

    def _code(self, task: Any) -> int:
        try:
            return self._ray.get(task)
        except self._ray.exceptions.TaskCancelledError:
            return int(exits.ExitCode.PREEMPTED)
        except self._ray.exceptions.RayError:  # The worker or its node is gone.
            return -int(signal.SIGKILL)

    @contextlib.contextmanager
    def _hosts(self):
        """Options of the tasks of one unit: one, or one per host of a slice; none when stopped."""
        if self._tpu is None:
            more = dict(self._resources)
            yield [dict(num_cpus=more.pop("CPU", 0), num_gpus=more.pop("GPU", 0), resources=more)]
            return
        from ray.util import scheduling_strategies, tpu

        hosts, (version, _, topology) = (), self._tpu.partition(":")
        with contextlib.ExitStack() as stack:
            while not hosts and not self.stopping:
                with contextlib.suppress(TimeoutError):  # All slices are busy.
                    place = tpu.slice_placement_group(topology, version)
                    stack.callback(place.shutdown)
                    while not place.placement_group.wait(1) and not self.stopping:
                        pass
                    hosts = place.placement_group.bundle_specs
            at = scheduling_strategies.PlacementGroupSchedulingStrategy
            options = dict(num_cpus=0, resources={"TPU": hosts[0]["TPU"]}) if hosts else {}
            yield [
                options | {"scheduling_strategy": at(place.placement_group, rank)}
                for rank in range(len(hosts))
            ]


def _on_node(command: Sequence[str], folder: str, cwd: str, rank: int) -> int:
    """In a worker of the cluster: the command of a unit, on one host."""
    os.chdir(cwd)
    log = engine.LOG if rank == 0 else f"launch.{rank}.log"
    with engine.Stopper(grace=300.0) as stopper:  # Seconds for a step and its checkpoint.
        while engine.is_running(folder, log) and not stopper.stopping:
            time.sleep(0.5)  # A process that outlived the cluster that started it.
        if stopper.stopping:
            return int(exits.ExitCode.PREEMPTED)
        return engine.start([sys.executable, *command[1:]], folder, stopper, log=log, echo=False)
