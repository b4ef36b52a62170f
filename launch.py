"""Starts one run, or a sweep of runs, and tells where they stand or what they will need.

    python launch.py --config=configs/quickstart.py:local --config.optim.lr=3e-4 --workdir=runs/a
    python launch.py --config=configs/quickstart.py --sweep=patterns --workdir=runs/b
    python launch.py --config=configs/quickstart.py --sweep=patterns --workdir=runs/b --engine=ray
    python launch.py --config=configs/quickstart.py --sweep=patterns --workdir=runs/b --status
    python launch.py --config=configs/lm.py:125m,window --dry-run --topology=v5e:4x4

Each run has its own folder `<workdir>/<id>`. Finished runs are skipped, unfinished ones resume.
Exit codes: 0 all finished, 1 a run failed, 2 wrong command line, 75 interrupted (start it again);
of a dry run 71, too little memory.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from sparse_attn.launch import engine, starters, units
from sparse_attn.train import config_check, exits, profiling

config_flags.DEFINE_config_file(
    "config", None, "Config file, FILE.py[:VARIANT]; --config.<name>=<value> overrides a field."
)
_SWEEP = flags.DEFINE_string("sweep", None, "Runs sweep_<name>() of the config file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run folders.")
_STATUS = flags.DEFINE_bool("status", False, "Print where every run stands and start nothing.")
_PROFILE = flags.DEFINE_string("profile", None, "START:STOP, steps to trace into RUN/profile.")
_DUMP_HLO = flags.DEFINE_bool("dump-hlo", False, "Write the compiled step of each run to RUN/hlo.")


def main(argv: list[str]) -> int:
    """Expands the command line to work units and hands them to an engine."""
    try:
        if argv[1:]:
            raise ValueError(f"argument {argv[1]!r} must be a flag such as --sweep=NAME")
        if not (_WORKDIR.value or starters.is_dry_run()):
            raise ValueError("--workdir=None must be the folder of the run folders")
        spec = config_flags.get_config_filename(flags.FLAGS["config"])
        work = units.expand(
            config_check.load(spec),
            units.points_of(spec.partition(":")[0], _SWEEP.value),
            config_spec=spec,
            workdir=_WORKDIR.value or "",
            given=config_flags.get_override_values(flags.FLAGS["config"]),
            flags=_more_flags(),
        )
        start = starters.chosen()
    except ValueError as error:
        return _fail(error)
    if _STATUS.value:
        print(engine.status(work))
        return 0
    try:
        return start(work, _WORKDIR.value or "")
    except ImportError as error:  # Ray is an option.
        return _fail(error)


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
