"""Measuring and recording, shared by the kernel experiments: timing, environment, JSON, tables."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

_RESULT = "RESULT "
_PACKAGES = ("jax", "jaxlib", "numpy", "orbax-checkpoint", "libtpu", "triton", "jax-triton")


class Timing(NamedTuple):
    """Wall times of one function, in milliseconds; `spread` is the interquartile range."""

    ms: tuple[float, ...]
    median: float
    spread: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ± {self.spread / 2:.2f}"


def timing(ms: Sequence[float]) -> Timing:
    """The summary of a list of measured times.

    >>> str(timing([3.0, 1.0, 2.0, 100.0, 2.0]))
    '2.00 ± 0.50'
    """
    ms = tuple(ms)
    low, _, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else 3 * ms
    return Timing(ms, statistics.median(ms), high - low)


def time_calls(fn: Callable, *args: Any, calls: int = 10, warmup: int = 2) -> Timing:
    """Times `fn(*args)` to the end of its device work, compilation and `warmup` calls apart."""
    return time_side_by_side({"": (fn, *args)}, calls=calls, warmup=warmup)[""]


def time_side_by_side(
    candidates: Mapping[str, Sequence[Any]], *, calls: int = 10, warmup: int = 2
) -> dict[str, Timing]:
    """Times several `name: (fn, *args)` in turns, so that what disturbs one disturbs all."""
    for fn, *args in candidates.values():
        for _ in range(warmup):
            jax.block_until_ready(fn(*args))
    ms: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(calls):
        for name, (fn, *args) in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(*args))
            ms[name].append((time.perf_counter() - start) * 1e3)
    return {name: timing(times) for name, times in ms.items()}


def environment() -> dict[str, Any]:
    """What the numbers depend on: device, versions, commit (None outside git), date, load.

    On a copy of the files without their history, SPARSE_ATTN_COMMIT names the commit they are of.
    """
    device = jax.devices()[0]
    given = os.environ.get("SPARSE_ATTN_COMMIT")
    return {
        "device": device.device_kind if device.platform != "cpu" else _cpu_name(),
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "packages": {name: v for name in _PACKAGES if (v := _version(name)) is not None},
        "commit": given or _git("rev-parse", "HEAD"),
        "changed_files": None if given else len((_git("status", "--porcelain") or "").splitlines()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def file_stem(device_kind: str) -> str:
    """A device in the name of a results file.

    >>> file_stem("NVIDIA H100 80GB HBM3")
    'nvidia_h100_80gb_hbm3'
    """
    return re.sub(r"\W+", "_", device_kind.lower())


def write(results: Any, path: str | os.PathLike) -> pathlib.Path:
    """Writes `{"environment": ..., "results": results}` as JSON and returns the path."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "results": results}
    path.write_text(json.dumps(content, indent=1, default=_plain) + "\n")
    return path


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as an aligned text table (also valid Markdown); floats with three digits.

    >>> print(table([{"case": "causal", "ms": 1.5}, {"case": "full", "ms": 12.25}]))
    | case   | ms   |
    |--------|------|
    | causal | 1.5  |
    | full   | 12.2 |
    """
    header = list(rows[0])
    cells = [[_cell(row.get(name, "")) for name in header] for row in rows]
    widths = [max(len(x) for x in column) for column in zip(header, *cells, strict=True)]

    def line(values):
        return "| " + " | ".join(v.ljust(w) for v, w in zip(values, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(header), rule, *map(line, cells)])


def in_shards(module: str, shards: int) -> Iterator[dict[str, Any]]:
    """Results of the processes `python -m module --shards N --shard i`, as they come.

    The processes start together. Each prints its results by `shard_result`; lines of other kinds
    are left out. One that ends with another exit code than 0 is named on stderr. Whoever takes no
    more results ends the processes: none is left on the device.
    """
    command = [sys.executable, "-m", module, f"--shards={shards}"]
    lines: queue.SimpleQueue[tuple[int, str | None]] = queue.SimpleQueue()
    processes: list[subprocess.Popen] = []

    def read(shard, pipe):
        for line in pipe:
            lines.put((shard, line))
        lines.put((shard, None))

    try:
        for i in range(shards):
            process = subprocess.Popen(
                [*command, f"--shard={i}"], stdout=subprocess.PIPE, text=True
            )
            processes.append(process)
            threading.Thread(target=read, args=(i, process.stdout), daemon=True).start()
        left = shards
        while left:
            shard, line = lines.get()
            if line is None:
                left -= 1
                if code := processes[shard].wait():
                    print(f"{module}: shard {shard} ended with {code}", file=sys.stderr, flush=True)
            elif line.startswith(_RESULT):
                yield json.loads(line[len(_RESULT) :])
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for process in processes:
            process.wait()


def shard_result(result: Mapping[str, Any]) -> None:
    """Prints a result for `in_shards`.

    >>> shard_result({"ok": True})
    RESULT {"ok": true}
    """
    print(_RESULT + json.dumps(result), flush=True)


def _cell(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plain(value):
    """JSON form of NumPy and JAX scalars and arrays."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", *args], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True,
            timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
