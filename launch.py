"""Starts one run, or a sweep of runs, and tells where they stand.

    python launch.py --config=configs/quickstart.py:local --config.optim.lr=3e-4 --workdir=runs/a
    python launch.py --config=configs/quickstart.py --sweep=patterns --workdir=runs/b
    python launch.py --config=configs/quickstart.py --sweep=patterns --workdir=runs/b --engine=ray
    python launch.py --config=configs/quickstart.py --sweep=patterns --workdir=runs/b --status

Each run has its own folder `<workdir>/<id>`. Finished runs are skipped, unfinished ones resume.
Exit codes: 0 all finished, 1 a run failed, 2 wrong command line, 75 interrupted (start it again).
"""

import functools
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from ml_collections import config_flags

from sparse_attn.launch import engine, ray_engine, skypilot, units
from sparse_attn.train import config_check, exits, profiling

config_flags.DEFINE_config_file(
    "config", None, "Config file, FILE.py[:VARIANT]; --config.<name>=<value> overrides a field."
)
_SWEEP = flags.DEFINE_string("sweep", None, "Runs sweep_<name>() of the config file.")
_ENGINE = flags.DEFINE_enum(
    "engine", "local", ["local", "print", "ray", "skypilot"],
    "Run the commands one by one, print them, run them on a Ray cluster, or write SkyPilot tasks.",
)  # fmt: skip
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run folders.", required=True)
_STATUS = flags.DEFINE_bool("status", False, "Print where every run stands and start nothing.")
_PROFILE = flags.DEFINE_string("profile", None, "START:STOP, steps to trace into RUN/profile.")
_DUMP_HLO = flags.DEFINE_bool("dump-hlo", False, "Write the compiled step of each run to RUN/hlo.")
_ADDRESS = flags.DEFINE_string("ray-address", None, "Of a Ray cluster; without it, a local one.")
_RESOURCES = flags.DEFINE_list("ray-resources", ["CPU=1"], "Of one run, such as CPU=4,GPU=1.")
_TPU = flags.DEFINE_string("ray-tpu", None, "TPU slice of one run, such as v6e:4x4.")
_RETRIES = flags.DEFINE_integer("retries", 3, "Failures in a row, of a run on Ray.", lower_bound=0)
_ACCELERATORS = flags.DEFINE_string("accelerators", None, "For SkyPilot, such as tpu-v6e-16.")


def main(argv: list[str]) -> int:
    """Expands the command line to work units and hands them to an engine."""
    try:
        if argv[1:]:
            raise ValueError(f"argument {argv[1]!r} must be a flag such as --sweep=NAME")
        spec = config_flags.get_config_filename(flags.FLAGS["config"])
        work = units.expand(
            config_check.load(spec),
            units.points_of(spec.partition(":")[0], _SWEEP.value),
            config_spec=spec,
            workdir=_WORKDIR.value,
            given=config_flags.get_override_values(flags.FLAGS["config"]),
            flags=_more_flags(),
        )
        start = _start_of(_ENGINE.value)
    except ValueError as error:
        return _fail(error)
    if _STATUS.value:
        print(engine.status(work))
        return 0
    try:
        return start(work, _WORKDIR.value)
    except ImportError as error:  # Ray is an option.
        return _fail(error)


def _start_of(name: str) -> Callable[[Sequence[units.WorkUnit], str], int]:
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


def _more_flags() -> list[str]:
    more = ["--dump-hlo"] if _DUMP_HLO.value else []
    if _PROFILE.value is not None:
        profiling.ProfileWindow.parse(_PROFILE.value)  # A mistake shows before anything starts.
        more.append(f"--profile={_PROFILE.value}")
    return more


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return int(exits.ExitCode.USAGE)


if __name__ == "__main__":
    app.run(main, flags_parser=config_check.parse_flags)
