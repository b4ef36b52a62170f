"""Checkpoints: everything a run needs to go on, saved as one atomic step and verified on restore.

All Orbax calls of the package are in this file. A step holds the state's arrays and one JSON
document: the data iterator's state, whatever the caller adds, and per array its shape, dtype,
digest and whether it is finite. Orbax renames a step into place only when it is complete; the
digests find what happens to its files later, which Orbax does not (a flipped bit restores as
another number).
"""

import contextlib
import dataclasses
import json
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from sparse_attn.train import digests

_LOG = logging.getLogger(__name__)
_FORMAT = 2
_REJECTED = "rejected"  # Folder that rejected steps are moved to once an older one is restored.


class CheckpointError(RuntimeError):
    """There are checkpoints and none of them can be restored; the message says why for each."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified step.

    Attributes:
      step: number of updates made.
      state: as the template given, or a nested dict of arrays from `load`.
      data_state: of the data iterator, right after the batch of this step.
      extra: what the caller of `save` added.
    """

    step: int
    state: Any
    data_state: Any
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: the latest `keep` steps and the best one by metric.

    Opening removes what an interrupted save left behind. Use as a context manager, or `close`.

    Args:
      directory: made if it does not exist.
      keep: number of latest steps to keep; the best step is kept besides.

    Raises:
      ValueError: `keep < 1`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
    ...     checkpoints.save(7, {"w": jnp.arange(3)}, data_state={"next": 8})
    ...     restored = checkpoints.restore({"w": jnp.zeros(3, jnp.int32)})
    >>> restored.step, restored.state["w"].tolist(), restored.data_state
    (7, [0, 1, 2], {'next': 8})
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep={keep} must be >= 1 checkpoint")
        self._directory = _absolute(directory)
        self._policy = _LatestAndBest(keep)
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy, cleanup_tmp_directories=True
            ),
            item_names=("state", "meta"),
        )
        for step in self.steps():
            with contextlib.suppress(Exception):  # A damaged step has no rating.
                self._policy.rate(step, _read_meta(self._manager, step)["metric"])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps on disk, ascending; complete, not yet verified."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        data_state: Any,
        metric: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves a step; returns when the arrays may be changed, files are written behind.

        Args:
          step: number of updates made.
          state: pytree of arrays; typed PRNG keys are allowed.
          data_state: JSON value, what the data iterator's `get_state` gave.
          metric: smaller is better; decides which step is kept as the best. None = not rated.
          extra: a JSON object to keep beside.

        Raises:
          FloatingPointError: an array holds NaN or infinity; nothing is saved.
          ValueError: `data_state` or `extra` is not JSON.
        """
        arrays = digests.named(state)
        checks = digests.of(arrays)
        bad = [name for name, check in checks.items() if not check["finite"]]
        if bad:
            raise FloatingPointError(f"step {step} is not saved: not finite: {', '.join(bad)}")
        meta = {
            "format": _FORMAT,
            "step": step,
            "metric": metric,
            "arrays": {
                name: {"shape": list(x.shape), "dtype": str(x.dtype), **checks[name]}
                for name, x in arrays.items()
            },
            "data_state": data_state,
            "extra": dict(extra or {}),
        }
        try:
            meta["digest"] = _json_digest(meta)
        except TypeError as error:
            raise ValueError(f"data_state and extra must be JSON values: {error}") from None
        self._policy.rate(step, metric)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_nest(arrays)), meta=ocp.args.JsonSave(meta)
            ),
        )

    def restore(self, template: PyTree) -> Restored | None:
        """The newest step that is whole and fits `template`, or None when there is no step.

        Steps are tried from the newest to the oldest, with one log line for each rejected one.
        When one is taken, newer rejected steps are moved to the folder `rejected`, out of the way
        of the steps that will be saved again.

        Args:
          template: state of the same structure, shapes, dtypes and sharding.

        Raises:
          CheckpointError: there are steps and none can be restored.
        """
        self.wait()
        rejected: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = _restore_step(self._manager, step, template)
            except Exception as error:  # Damage shows in as many ways as there are file formats.
                rejected[step] = _first_line(error)
                _LOG.warning("checkpoint step %d rejected: %s", step, rejected[step])
                continue
            self._set_aside(rejected)
            return restored
        if rejected:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in rejected.items())
            raise CheckpointError(
                f"no checkpoint in {self._directory} can be restored: {reasons}. Undo the change "
                "of the config, or start in another workdir"
            )
        return None

    def wait(self) -> None:
        """Waits for saves in progress; raises what went wrong in them."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves in progress and gives up the folder."""
        self._manager.close()

    def _set_aside(self, rejected: Mapping[int, str]) -> None:
        if not rejected:
            return
        if jax.process_index() == 0:
            for step in rejected:
                target = self._directory / _REJECTED / str(step)
                if target.exists():
                    target.rmtree()
                target.parent.mkdir(parents=True, exist_ok=True)
                (self._directory / str(step)).rename(target)
        self._manager.reload()


class _LatestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the latest steps and the one with the smallest metric."""

    def __init__(self, keep: int):
        self._keep = keep
        self._metrics: dict[int, float] = {}

    def rate(self, step: int, metric: float | None) -> None:
        """Notes the metric of a step; None = not rated."""
        if metric is not None:
            self._metrics[step] = metric

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which of these checkpoints stay."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(sorted(steps)[-self._keep :])
        rated = [step for step in steps if step in self._metrics]
        kept.update(sorted(rated, key=self._metrics.__getitem__)[:1])
        return [step in kept for step in steps]


def load(directory: str | os.PathLike[str], *, step: int | None = None) -> Restored:
    """A verified step as nested dicts of arrays on one local device, for inspection.

    Needs no model, and no device of the kind or number the checkpoint was saved on. Parameters are
    in `state["params"]`.

    Args:
      directory: the `checkpoints` folder of a run.
      step: None = the newest.

    Raises:
      CheckpointError: there is no such step, or it is damaged.
    """
    path = _absolute(directory)
    options = ocp.CheckpointManagerOptions(create=False)
    if not path.exists():
        raise CheckpointError(f"there is no folder {path}")
    with ocp.CheckpointManager(path, options=options, item_names=("state", "meta")) as manager:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            raise CheckpointError(f"{path} has no step {step or ''}; steps there: {steps}")
        step = steps[-1] if step is None else step
        try:
            return _restore_step(manager, step, None)
        except Exception as error:
            raise CheckpointError(f"{path} step {step}: {_first_line(error)}") from error


def _absolute(directory: str | os.PathLike[str]) -> epath.Path:
    text = os.fspath(directory)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def _restore_step(manager: ocp.CheckpointManager, step: int, template: PyTree | None) -> Restored:
    """Restores and verifies one step; any exception means that it is not to be used."""
    meta = _read_meta(manager, step)
    saved = meta["arrays"]
    if template is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
            name: jax.ShapeDtypeStruct(x["shape"], jnp.dtype(x["dtype"]), sharding=device)
            for name, x in saved.items()
        }
    else:
        wanted = {name: _abstract(x) for name, x in digests.named(template).items()}
        _check_fit(saved, wanted)
    nested = manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_nest(wanted)))
    )["state"]
    arrays = digests.named(nested)
    for name, check in digests.of(arrays).items():
        if check["digest"] != saved[name]["digest"]:
            raise ValueError(f"content of {name} differs from its digest")
        if not (check["finite"] and saved[name]["finite"]):
            raise ValueError(f"{name} is not finite")
    state = nested if template is None else _like(template, arrays)
    return Restored(step, state, meta["data_state"], meta["extra"])


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise ValueError(f"its JSON is not of format {_FORMAT}")
    digest = meta.pop("digest", None)
    if digest != _json_digest(meta) or meta["step"] != step:
        raise ValueError("its JSON does not match its digest")
    return meta


def _check_fit(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    problems = [f"{name} is not in the checkpoint" for name in wanted if name not in saved]
    problems += [f"{name} is not in the model" for name in saved if name not in wanted]
    for name, array in wanted.items():
        if name in saved:
            has = saved[name]["dtype"] + str(saved[name]["shape"])
            needs = str(array.dtype) + str(list(array.shape))
            if has != needs:
                problems.append(f"{name} is {has} in the checkpoint and {needs} in the model")
    if problems:
        raise ValueError("; ".join(problems))


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _like(template: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    """The arrays in the structure of `template`."""
    leaves = [
        jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
        if digests.is_key(leaf)
        else array
        for leaf, array in zip(
            jax.tree.leaves(template),
            (arrays[name] for name in digests.named(template)),
            strict=True,
        )
    ]
    return jax.tree.structure(template).unflatten(leaves)


def _nest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, x in arrays.items():
        *parents, last = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = x
    return nested


def _json_digest(meta: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(meta, sort_keys=True).encode()):08x}"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
