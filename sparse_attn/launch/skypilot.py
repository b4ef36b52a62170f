"""SkyPilot: one task file per unit, and the command that starts it as a managed job.

The task runs the command that `--engine=print` shows. A preempted machine is replaced by SkyPilot;
a run that stopped by SIGTERM and saved is started again, one whose end would come again is not.
"""

import json
import os
import pathlib
import re
import shlex
from collections.abc import Sequence

from sparse_attn.launch import units as units_lib
from sparse_attn.train import exits

# Of `gcloud compute tpus tpu-vm create`, by the part of the accelerator's name that says which.
_RUNTIMES = {"v4": "tpu-ubuntu2204-base", "v5litepod": "v2-alpha-tpuv5-lite",
             "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}  # fmt: skip


def task(unit: units_lib.WorkUnit, *, accelerators: str) -> str:
    """The SkyPilot task of one unit, as YAML.

    Args:
      unit: of the sweep; its folder must be on storage that outlives the machine, such as a bucket
        mounted with `file_mounts`, for a run to go on from its checkpoint.
      accelerators: as SkyPilot names them, such as "tpu-v6e-16" or "H200:8".

    >>> unit = units_lib.WorkUnit("000-ab", "a", "configs/quickstart.py", (), "/runs/000-ab")
    >>> print(task(unit, accelerators="tpu-v6e-8").splitlines()[0])
    name: "sparse-attn-000-ab"
    """
    generation = re.match(r"tpu-([a-z0-9]+)-", accelerators)
    lines = [
        f"name: {json.dumps(f'sparse-attn-{unit.id}')}",
        "workdir: .",
        "resources:",
        f"  accelerators: {json.dumps(accelerators)}",
    ]
    if generation:
        runtime = _RUNTIMES.get(generation[1], "tpu-ubuntu2204-base")
        lines += ["  accelerator_args:", f"    runtime_version: {json.dumps(runtime)}"]
    lines += [
        "  use_spot: true",
        "  job_recovery:",
        "    max_restarts_on_errors: 3",
        f"    recover_on_exit_codes: [{int(exits.ExitCode.PREEMPTED)}]",
        "setup: |",
        f"  pip install -r requirements-{'tpu' if generation else 'gpu'}.txt",
        "run: |",
        f"  {shlex.join(unit.command())}",
    ]
    return "\n".join(lines) + "\n"


def run(units: Sequence[units_lib.WorkUnit], workdir: str, *, accelerators: str) -> int:
    """Writes `<workdir>/skypilot/<id>.yaml` for every unit and prints what starts them."""
    folder = pathlib.Path(workdir, "skypilot")
    folder.mkdir(parents=True, exist_ok=True)
    for unit in units:
        path = folder / f"{unit.id}.yaml"
        path.write_text(task(unit, accelerators=accelerators))
        print(shlex.join(["sky", "jobs", "launch", "-y", "-d", os.fspath(path)]))
    return int(exits.ExitCode.FINISHED)
