"""Devices that a run is meant for, by name: `v5e:16x16`, `h200:8`, `cpu:8`. None is attached.

TPUs are described by libtpu, whose compiler builds whole programs for them. A program for NVIDIA
GPUs cannot be compiled without one, so these, as `cpu`, are CPU devices that JAX simulates.
"""

import dataclasses
import math
import os
import re

import jax

from sparse_attn.ops import tiles

_GIB = 2**30
# Device kind, and memory in bytes of what JAX counts as one device (v4 and v5p: a chip).
_TPUS = {
    "v4": ("TPU v4", 32 * _GIB),
    "v5e": ("TPU v5 lite", 16 * _GIB),
    "v5p": ("TPU v5", 95 * _GIB),
    "v6e": ("TPU v6 lite", 32 * _GIB),
}
_OTHERS = {
    "a100": ("NVIDIA A100", 80 * 10**9),
    "h100": ("NVIDIA H100", 80 * 10**9),
    "h200": ("NVIDIA H200", 141 * 10**9),
    "b200": ("NVIDIA B200", 180 * 10**9),
    "cpu": ("cpu", None),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many devices of one kind.

    Attributes:
      name: as given, "v5e:16x16".
      kind: of device as JAX names it, "TPU v5 lite".
      platform: "tpu", "gpu" or "cpu".
      count: devices.
      memory: bytes of one device; None where there is no limit to check.
    """

    name: str
    kind: str
    platform: str
    count: int
    memory: int | None

    @property
    def simulated(self) -> bool:
        """True where the compiler that is used is not that of the devices."""
        return self.platform == "gpu"

    def prepare(self) -> None:
        """Sets the environment in which `devices` can work; before JAX looks for devices."""
        jax.config.update("jax_platforms", "cpu")  # The variable counts only before the import.
        if self.platform == "tpu":
            # No TPU is attached: libtpu must not look for one, nor keep others from using it.
            for name, value in (
                ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
                ("TPU_SKIP_MDS_QUERY", "1"),
                ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
                ("TPU_WORKER_HOSTNAMES", "localhost"),
            ):
                os.environ.setdefault(name, value)
        else:
            flags = os.environ.get("XLA_FLAGS", "")
            count = f"--xla_force_host_platform_device_count={self.count}"
            os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()

    def devices(self) -> list[jax.Device]:
        """Devices to compile for; they can hold no array unless they are simulated.

        Raises:
          ValueError: libtpu is missing, or knows no such topology.
        """
        if self.platform != "tpu":
            return list(jax.devices("cpu"))
        from jax.experimental import topologies

        options = {"chip_config_name": "megacore"} if self.kind == "TPU v4" else {}
        try:
            described = topologies.get_topology_desc(
                topology_name=self.name, platform="tpu", **options
            )
        except Exception as error:  # Of libtpu, of many kinds.
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"topology={self.name!r} cannot be had from libtpu: {said}") from error
        return list(described.devices)

    def target(self) -> tiles.Target:
        """What kernels are built for."""
        platform = "tpu" if self.platform == "tpu" else "cpu"
        return tiles.Target(platform, self.kind if platform == "tpu" else "cpu")

    def roomy(self) -> "Topology | None":
        """As many TPUs of the kind with most memory, None where this is that kind or no TPU.

        >>> parse("v5e:16x16").roomy().name
        'v5p:8x8x4'
        """
        if self.platform != "tpu" or self.kind == "TPU v5" or self.count & (self.count - 1):
            return None
        bits = self.count.bit_length() - 1
        sides = sorted((2 ** ((bits + i) // 3) for i in range(3)), reverse=True)
        return parse(f"v5p:{'x'.join(map(str, sides))}")


def parse(name: str | None) -> Topology:
    """The topology of a name: `v5e:16x16` (v4 and v5p: `v5p:4x4x4`), or `h200:8`, `cpu:8`.

    Raises:
      ValueError: the name is not of that form, or such devices are unknown.

    >>> parse("v6e:8x8").count, parse("h200:8").kind
    (64, 'NVIDIA H200')
    """
    generation, _, shape = (name or "").partition(":")
    sides = 3 if generation in ("v4", "v5p") else 2
    if generation in _TPUS and re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{sides - 1}}}", shape):
        kind, memory = _TPUS[generation]
        return Topology(name, kind, "tpu", math.prod(map(int, shape.split("x"))), memory)
    if generation in _OTHERS and re.fullmatch(r"[1-9]\d*", shape):
        kind, memory = _OTHERS[generation]
        return Topology(name, kind, "cpu" if kind == "cpu" else "gpu", int(shape), memory)
    raise ValueError(
        f"topology={name!r} must be GENERATION:SHAPE, such as v5e:16x16, v6e:8x8, v4:4x4x4, "
        f"v5p:4x4x4, or KIND:COUNT with a kind of {', '.join(_OTHERS)}, such as h200:8"
    )
