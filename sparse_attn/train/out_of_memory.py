"""Errors of a device that is full, and the fields of the config that need less memory."""

from collections.abc import Mapping
from typing import Any


class OutOfMemoryError(RuntimeError):
    """The device's memory does not hold a step; the message says what to change."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for XLA's errors of allocation, while compiling or running.

    >>> is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"))
    True
    """
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def explain(error: BaseException, config: Mapping[str, Any], *, num_devices: int = 1) -> str:
    """One message: what XLA said, in a line, and the flags that need less memory.

    >>> config = {"data": {"batch_size": 8, "context": 64}, "optim": {"grad_accum": 1},
    ...           "model": {"remat": "none", "dtype": "float32"}}
    >>> print(explain(RuntimeError("RESOURCE_EXHAUSTED: no 8.00G"), config))
    out of memory: RESOURCE_EXHAUSTED: no 8.00G. To need less, in this order: \
--config.optim.grad_accum=2 --config.model.remat=block --config.model.dtype=bfloat16 \
--config.data.batch_size=4 --config.data.context=32
    """
    said = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())[:300]
    return (
        f"out of memory: {said.rstrip('.')}. To need less, in this order: "
        f"{' '.join(remedies(config, num_devices=num_devices))}"
    )


def remedies(config: Mapping[str, Any], *, num_devices: int = 1) -> list[str]:
    """Flags that need less memory, those that leave the results as they are first."""
    data, optim, model = (config.get(name, {}) for name in ("data", "optim", "model"))
    flags = []
    if num_devices > 1 and "fsdp" not in config.get("mesh", {}).get("axes", ""):
        flags.append("--config.mesh.axes=fsdp=-1")
    rows, pieces = data.get("batch_size", 1), optim.get("grad_accum", 1)
    if rows % (2 * pieces) == 0:
        flags.append(f"--config.optim.grad_accum={2 * pieces}")
    if model.get("remat") != "block":
        flags.append("--config.model.remat=block")
    if model.get("dtype") == "float32":
        flags.append("--config.model.dtype=bfloat16")
    if rows > 1:
        flags.append(f"--config.data.batch_size={rows // 2}")
    if data.get("context", 1) > 1:
        flags.append(f"--config.data.context={data['context'] // 2}")
    return flags
