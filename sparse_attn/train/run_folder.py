"""The files of a run folder, besides metrics and checkpoints: what ran, on what, with what result.

config.json   the resolved config          corpus.json  the text: name, bytes, sha256
env.json      git commit, versions, devices  sample.txt   a generated continuation
ledger.json   where the time went       stacks.txt   of hangs, profile/ and hlo/ if asked for
summary.json  the result; `"finished": true` marks a run that needs no further start
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax

from sparse_attn.train import config_check, metrics

CONFIG, ENV, CORPUS = "config.json", "env.json", "corpus.json"
SAMPLE, SUMMARY, LEDGER = "sample.txt", "summary.json", "ledger.json"
METRICS, CHECKPOINTS, NON_FINITE = "metrics.jsonl", "checkpoints", "non_finite.json"
PROCESSES = "processes"  # folders of the processes after the first, where there are several
PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets",
    "array-record", "ml_collections", "numpy", "libtpu", "jax-triton", "triton",
)  # fmt: skip


def cache() -> pathlib.Path:
    """The folder of what all runs share: prepared text and compiled programs."""
    return pathlib.Path(
        os.environ.get("SPARSE_ATTN_CACHE") or pathlib.Path.home() / ".cache/sparse_attn"
    )


def write_json(folder: pathlib.Path, name: str, content: Mapping[str, Any]) -> None:
    """Writes a JSON file of the folder, whole or not at all."""
    metrics.replace_file(folder / name, json.dumps(content, indent=2) + "\n")


def read_json(folder: pathlib.Path, name: str) -> dict[str, Any] | None:
    """A JSON file of the folder, None when it is missing or damaged."""
    try:
        content = json.loads((folder / name).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def is_finished(folder: pathlib.Path, steps: int) -> bool:
    """True when a run of at least `steps` steps has written its summary."""
    summary = read_json(folder, SUMMARY) or {}
    return bool(summary.get("finished")) and summary.get("steps", 0) >= steps


def environment() -> dict[str, Any]:
    """What a result may depend on besides config and data."""
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": (_git("status", "--porcelain", "-uno") or "").splitlines(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "backend": jax.default_backend(),
        "devices": [d.device_kind for d in jax.devices()],
        "processes": jax.process_count(),
        "cpu_count": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }


def changed_names(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted names whose values differ between two configs.

    >>> changed_names({"seed": 0, "optim": {"lr": 1.0}}, {"seed": 0, "optim": {"lr": 2.0}})
    ['optim.lr']
    """
    names = dict.fromkeys([*config_check.dotted_names(old), *config_check.dotted_names(new)])
    return [name for name in names if _value(old, name) != _value(new, name)]


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
