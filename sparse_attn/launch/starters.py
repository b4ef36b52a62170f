"""What `launch.py` hands the runs of a sweep to, and the flags that choose it."""

import functools
from collections.abc import Callable, Sequence

from absl import flags

from sparse_attn.launch import dry_run, engine, ray_engine, skypilot, units
from sparse_attn.launch import topology as topology_lib

_ENGINE = flags.DEFINE_enum(
    "engine", "local", ["local", "print", "ray", "skypilot"],
    "Run the commands one by one, print them, run them on a Ray cluster, or write SkyPilot tasks.",
)  # fmt: skip
_ADDRESS = flags.DEFINE_string("ray-address", None, "Of a Ray cluster; without it, a local one.")
_RESOURCES = flags.DEFINE_list("ray-resources", ["CPU=1"], "Of one run, such as CPU=4,GPU=1.")
_TPU = flags.DEFINE_string("ray-tpu", None, "TPU slice of one run, such as v6e:4x4.")
_RETRIES = flags.DEFINE_integer("retries", 3, "Failures in a row, of a run on Ray.", lower_bound=0)
_ACCELERATORS = flags.DEFINE_string("accelerators", None, "For SkyPilot, such as tpu-v6e-16.")
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "Compile each run for --topology; start nothing.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Of a dry run: v5e:16x16, h200:8, cpu:8, ...")
_JSON = flags.DEFINE_bool("json", False, "A dry run prints one line of JSON per run.")


def is_dry_run() -> bool:
    """True where nothing is to be started or written."""
    return _DRY_RUN.value


def chosen() -> Callable[[Sequence[units.WorkUnit], str], int]:
    """What takes the work units and the workdir, and gives the exit code.

    Raises:
      ValueError: a flag that it needs is missing or wrong.
    """
    if _DRY_RUN.value:
        topology = topology_lib.parse(_TOPOLOGY.value)
        return functools.partial(dry_run.run, topology=topology, as_json=_JSON.value)
    for flag in (_TOPOLOGY, _JSON):
        if flag.value:
            raise ValueError(f"--{flag.name}={flag.value} must come with --dry-run")
    name = _ENGINE.value
    if name == "skypilot":
        if not _ACCELERATORS.value:
            raise ValueError("--accelerators=None must be what to rent, such as tpu-v6e-16")
        return functools.partial(skypilot.run, accelerators=_ACCELERATORS.value)
    if name == "ray":
        resources = dict(part.partition("=")[::2] for part in _RESOURCES.value)
        return functools.partial(
            ray_engine.run,
            address=_ADDRESS.value,
            resources={kind: float(amount) for kind, amount in resources.items()},
            tpu=_TPU.value,
            retries=_RETRIES.value,
        )
    return {"print": engine.run_print, "local": engine.run_local}[name]
