"""Work units: one resolved run each, with a stable id, a folder and the command that starts it."""

import dataclasses
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from sparse_attn.launch import sweep as sweep_lib
from sparse_attn.train import config_check

MODULE = "sparse_attn.train.main"


@dataclasses.dataclass(frozen=True)
class WorkUnit:
    """One run of a sweep.

    `id` is `<index>-<digest of the resolved config>`: the same run has the same id in every
    process, and a run whose config differs in anything never shares its folder.
    """

    id: str
    name: str
    config_spec: str  # what follows --config=
    overrides: tuple[tuple[str, Any], ...]
    folder: str  # the run folder, <workdir>/<id>
    flags: tuple[str, ...] = ()  # more flags, which change nothing about the result

    def command(self, python: str = "python") -> list[str]:
        """The argument list that starts this run.

        >>> unit = WorkUnit("000-ab", "a", "configs/quickstart.py", (("seed", 1),), "runs/x/000-ab")
        >>> unit.command()[3:]
        ['--config=configs/quickstart.py', '--config.seed=1', '--workdir=runs/x/000-ab']
        """
        return [
            *(python, "-m", MODULE, f"--config={self.config_spec}"),
            *(f"--config.{key}={_flag_text(value)}" for key, value in self.overrides),
            f"--workdir={self.folder}",
            *self.flags,
        ]


def expand(
    config: ml_collections.ConfigDict,
    points: Iterable[sweep_lib.Point],
    *,
    config_spec: str,
    workdir: str,
    given: Mapping[str, Any] | None = None,
    flags: Iterable[str] = (),
) -> tuple[WorkUnit, ...]:
    """Turns the points of a sweep into work units; the same input gives the same units.

    Args:
      config: what `get_config` returns, without the overrides in `given`.
      points: overrides of each run; `[{}]` is a single run.
      config_spec: the config file, with its variant, as given to `--config`.
      workdir: folder that holds one run folder per unit.
      given: overrides from the command line, applied to every unit.
      flags: more flags of every unit's command, such as `--profile=10:12`.

    Raises:
      ValueError: an override names no field or has a wrong type, a point sets what the command
        line sets too, two units are the same run, or there is no unit.
    """
    given = dict(given or {})
    units: list[WorkUnit] = []
    seen: dict[str, int] = {}
    for i, point in enumerate(points):
        if twice := sorted(given.keys() & point.keys()):
            raise ValueError(f"--config.{twice[0]} is set by the sweep itself; leave it out")
        resolved = config.copy_and_resolve_references()
        overrides = apply(resolved, given | dict(point))
        digest = digest_of(resolved)
        if digest in seen:
            raise ValueError(f"units {seen[digest]} and {i} of the sweep are the same run")
        seen[digest] = i
        name = str(point.get("name") or ", ".join(f"{k}={v}" for k, v in point.items()))
        units.append(
            WorkUnit(
                id=f"{i:03d}-{digest}",
                name=name or str(resolved.get("name") or "run"),
                config_spec=config_spec,
                overrides=tuple(overrides.items()),
                folder=os.path.join(workdir, f"{i:03d}-{digest}"),
                flags=tuple(flags),
            )
        )
    if not units:
        raise ValueError("the sweep is empty: it must yield at least one point")
    return tuple(units)


def apply(config: ml_collections.ConfigDict, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Sets dotted keys of `config` in place; returns what the command line must repeat.

    Raises:
      ValueError: no such field (the message names the nearest one), a wrong type, or `None` for a
        field that the command line cannot unset.

    >>> config = ml_collections.ConfigDict({"optim": {"lr": 1e-3}})
    >>> apply(config, {"optim.lr": 3e-4}), config.optim.lr
    ({'optim.lr': 0.0003}, 0.0003)
    """
    config_check.check_names(config.to_dict(), overrides)
    kept = {}
    for key, value in overrides.items():
        *sections, field = key.split(".")
        node = config
        for section in sections:
            node = node[section]
        if value is None and node[field] is not None:
            raise ValueError(f"config.{key}=None must be its default to be used in a sweep")
        try:
            node[field] = value
        except TypeError:
            kind = node.get_type(field).__name__
            raise ValueError(f"config.{key}={value!r} must be of type {kind}") from None
        if value is not None:
            kept[key] = node[field]
    return kept


def digest_of(config: ml_collections.ConfigDict) -> str:
    """Eight hexadecimal digits that identify a resolved config."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def points_of(config_path: str, name: str | None) -> list[sweep_lib.Point]:
    """The points of `sweep_<name>()` in a config file; one empty point when `name` is None.

    Raises:
      ValueError: the config file has no such sweep.
    """
    if name is None:
        return [{}]
    spec = importlib.util.spec_from_file_location("_sweep_config", config_path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sweeps = sorted(n.removeprefix("sweep_") for n in vars(module) if n.startswith("sweep_"))
    if name not in sweeps:
        raise ValueError(f"--sweep={name} must be one of: {', '.join(sweeps) or '(none defined)'}")
    return list(getattr(module, f"sweep_{name}")())


def _flag_text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)
