"""Starts one run, or a sweep of runs, and tells where they stand.

    python launch.py --config=configs/quickstart.py:local --config.optim.lr=3e-4 --workdir=runs/a
    python launch.py --config=configs/quickstart.py --sweep=patterns --workdir=runs/b
    python launch.py --config=configs/quickstart.py --sweep=patterns --workdir=runs/b --status

Each run has its own folder `<workdir>/<id>`. Finished runs are skipped, unfinished ones resume.
Exit codes: 0 all finished, 1 a run failed, 2 wrong command line, 75 interrupted (start it again).
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from sparse_attn.launch import engine, units
from sparse_attn.train import config_check, exits

config_flags.DEFINE_config_file(
    "config", None, "Config file, FILE.py[:VARIANT]; --config.<name>=<value> overrides a field."
)
_SWEEP = flags.DEFINE_string("sweep", None, "Runs sweep_<name>() of the config file.")
_ENGINE = flags.DEFINE_enum(
    "engine", "local", sorted(engine.ENGINES), "'print' the commands or run them one by one."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run folders.", required=True)
_STATUS = flags.DEFINE_bool("status", False, "Print where every run stands and start nothing.")


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
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(exits.ExitCode.USAGE)
    if _STATUS.value:
        print(engine.status(work))
        return 0
    return engine.ENGINES[_ENGINE.value](work, _WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=config_check.parse_flags)
