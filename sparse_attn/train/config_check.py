"""Command lines that override configs, checked so that every mistake is one clear line."""

import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from sparse_attn.train import exits

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=\s]+)(?:=.*)?", re.DOTALL)


def dotted_names(config: Any, prefix: str = "") -> list[str]:
    """All leaf names of a nested config, dotted and in order.

    >>> dotted_names({"seed": 0, "optim": {"lr": 1e-3}})
    ['seed', 'optim.lr']
    """
    names = []
    for key, value in config.items():
        if hasattr(value, "items"):
            names += dotted_names(value, f"{prefix}{key}.")
        else:
            names.append(f"{prefix}{key}")
    return names


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known dotted name closest to `name`: as a whole, by its last part, or in its section.

    >>> nearest("optim.leraning_rate", ["optim.learning_rate", "seed"])
    'optim.learning_rate'
    >>> nearest("lr", ["optim.lr", "seed"])
    'optim.lr'
    """
    section, _, last = name.rpartition(".")
    inside = [k for k in known if section and k.startswith(f"{section}.")]
    by_last = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
        return close[0]
    if close := difflib.get_close_matches(last, by_last, n=1, cutoff=0.8):
        return by_last[close[0]]
    return next(iter(difflib.get_close_matches(name, inside or known, n=1, cutoff=0.0)), None)


def check_names(config: Any, names: Iterable[str]) -> None:
    """Checks that every dotted name is a leaf of `config`; for command lines and for sweeps.

    Raises:
      ValueError: a name is unknown or a section; the message gives the nearest valid name.

    >>> check_names({"optim": {"lr": 1e-3}}, ["optim.lr"])
    """
    known = dotted_names(config)
    for name in names:
        if name in known:
            continue
        inside = [k for k in known if k.startswith(f"{name}.")]
        if inside:
            raise ValueError(f"config.{name} is a section; set one of: {', '.join(inside)}")
        raise ValueError(
            f"config.{name} is unknown; the nearest valid name is config.{nearest(name, known)}"
        )


def load(spec: str) -> Any:
    """The config of `path/to/file.py[:argument]`: what its `get_config([argument])` returns.

    Raises:
      ValueError: no such file, no `get_config` in it, or it refuses the argument.
    """
    path, _, argument = spec.partition(":")
    if not os.path.isfile(path):
        raise ValueError(f"config={spec!r}: there is no file {path!r}")
    module_spec = importlib.util.spec_from_file_location("_checked_config", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"config={spec!r}: {path} must define get_config()")
    return module.get_config(*([argument] if argument else []))


def check_command_line(argv: Sequence[str]) -> None:
    """Checks `--config=FILE[:ARG]` and every `--config.name=value` of a command line.

    Raises:
      ValueError: the config cannot be loaded, or an override names nothing in it.
    """
    spec = None
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if argument in ("--config", "-config"):
            spec = following
        elif argument.startswith(("--config=", "-config=")):
            spec = argument.split("=", 1)[1]
    if spec is None:
        raise ValueError(
            "--config=FILE.py[:ARGUMENT] is missing; for example configs/quickstart.py"
        )
    matches = (_OVERRIDE.fullmatch(a) for a in argv)
    check_names(load(spec), [m.group(1) for m in matches if m])


def parse_flags(argv: Sequence[str]) -> list[str]:
    """The `flags_parser` for `absl.app.run`: a mistake is one line on stderr and exit code 2."""
    try:
        if not any(a in ("--help", "--helpshort", "--helpfull", "-h") for a in argv):
            check_command_line(argv)
        return flags.FLAGS(argv)
    except (flags.Error, ValueError, TypeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(int(exits.ExitCode.USAGE))
