"""Synthetic tasks by name, as configs and command lines write them, and endless batches of one."""

import ast
import dataclasses
import difflib
import functools
import hashlib
import importlib
import pkgutil
import re
from typing import Any

import numpy as np

from sparse_attn.data import counted, synthetic
from sparse_attn.data.synthetic import base

ORDER = 2  # Raised when the same seed would give another order of examples.

Batch = dict[str, np.ndarray]


@functools.cache
def tasks() -> dict[str, type[base.Task]]:
    """All tasks of this folder by the name of their class in snake case.

    >>> tasks()["mqar"].__name__, "variable_tracking" in tasks()
    ('Mqar', True)
    """
    found = {}
    for module in pkgutil.iter_modules(synthetic.__path__):
        name = f"{synthetic.__name__}.{module.name}"
        for cls in vars(importlib.import_module(name)).values():
            if isinstance(cls, type) and issubclass(cls, base.Task) and cls.__module__ == name:
                found[re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()] = cls
    del found["task"]
    return dict(sorted(found.items()))


def parse(text: str) -> base.Task:
    """The task of an expression such as `"mqar(length=64, num_pairs=4)"`; nothing is evaluated.

    A name alone is the task with its defaults.

    Raises:
      ValueError: no such task or field, or values that the task refuses.

    >>> parse("induction(vocab_size=8)"), parse("mqar").length
    (Induction(vocab_size=8, length=256), 64)
    >>> parse("mqra")
    Traceback (most recent call last):
    ValueError: data.task='mqra': 'mqra' is unknown; did you mean 'mqar'? known: ...
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        name = call.func.id
        fields = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        if call.args or None in fields:
            raise ValueError("only fields by name")
    except (SyntaxError, AttributeError, ValueError):
        raise ValueError(
            f"data.task={text!r} must be a name with fields, such as 'mqar(length=64)'"
        ) from None
    if name not in tasks():
        near = difflib.get_close_matches(name, tasks(), n=1, cutoff=0.0)[0]
        raise ValueError(
            f"data.task={text!r}: {name!r} is unknown; did you mean {near!r}? "
            f"known: {', '.join(tasks())}"
        )
    known = [f.name for f in dataclasses.fields(tasks()[name])]
    if wrong := [field for field in fields if field not in known]:
        raise ValueError(f"data.task={text!r}: {name}() has the fields {', '.join(known)}, {wrong}")
    return tasks()[name](**fields)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A task as the data of a run: what it is called, and the digest that tells it from others.

    >>> Drawn(parse("induction")).describe()
    'data: Induction(vocab_size=16, length=256), drawn as needed, a guess is right at 0.0667'
    """

    task: base.Task

    @property
    def name(self) -> str:
        return repr(self.task)

    @property
    def sha256(self) -> str:
        """Of the task's fields and its first example: of the recipe, not only of its name."""
        first = base.Source(self.task, split="train", seed=0, size=1)[0]
        return hashlib.sha256(repr(self.task).encode() + first["inputs"].tobytes()).hexdigest()

    def describe(self) -> str:
        """Gives the line to print before training."""
        return f"data: {self.name}, drawn as needed, a guess is right at {self.task.chance:.4f}"

    def to_json(self) -> dict[str, Any]:
        """Gives what a run folder stores."""
        return {"name": self.name, "sha256": self.sha256, "chance": self.task.chance}


class Batches(counted.Batches):
    """Endless batches of new examples; `get_state` is small and JSON, `set_state` goes on exactly.

    Batch i holds examples `i * batch_size ...` of the split and seed. It has `inputs`, `targets`
    (int32 `[B, T]`), `weights` (float32), and `segment_ids` and `positions` of one document a row.

    Raises:
      ValueError: an argument is out of range; from `set_state`, the state belongs to another task
        or other settings.

    >>> next(Batches(parse("mqar"), split="train", seed=0, batch_size=2))["targets"].shape
    (2, 64)
    """

    def __init__(self, task: base.Task, *, split: str, seed: int, batch_size: int):
        base.check_at_least(batch_size=(batch_size, 1))
        self._source = base.Source(task, split=split, seed=seed, size=1)
        self._batch_size = batch_size
        super().__init__(
            {
                "task": repr(task), "split": split, "seed": seed, "batch_size": batch_size,
                "order": ORDER,
            }
        )  # fmt: skip

    def __next__(self) -> Batch:
        first = self._step * self._batch_size
        self._step += 1
        drawn = [self._source[first + i] for i in range(self._batch_size)]
        batch = {name: np.stack([x[name] for x in drawn]) for name in drawn[0]}
        rows = batch["targets"].shape
        batch["segment_ids"] = np.ones(rows, np.int32)
        batch["positions"] = np.broadcast_to(np.arange(rows[1], dtype=np.int32), rows).copy()
        return batch
