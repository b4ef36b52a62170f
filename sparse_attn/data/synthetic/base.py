"""What every synthetic task shares: the example it draws, and the Grain dataset made of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import grain

SPLITS = ("train", "test")

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task:
    """A rule that draws examples; a subclass is one task with its parameters as fields.

    An example is `inputs i32[T]`, `targets i32[T]` and `weights f32[T]`: the answer to `inputs[:t]`
    is `targets[t]` where `weights[t]` is 1; elsewhere the target is 0 and does not count. `T` is
    `length`, tokens are in `0 .. vocab_size - 1`.
    """

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the tokens that can be answers, knowing nothing."""
        raise NotImplementedError(f"{type(self).__name__} must define chance")

    @property
    def not_for_decoder(self) -> str | None:
        """Why a causal decoder of tokens learns nothing by it, and what would; None = it learns."""
        return None

    def example(self, rng: np.random.Generator, *, split: str = "train") -> Example:
        """Draws one example; few tasks score `split="test"` in another way than "train"."""
        raise NotImplementedError(f"{type(self).__name__} must define example(rng, split=...)")


class Source:
    """Examples `0 .. size - 1` of a task, each drawn when it is asked for (a Grain data source)."""

    def __init__(self, task: Task, *, split: str, seed: int, size: int) -> None:
        """Says which examples these are.

        Raises:
          ValueError: an unknown split, a negative seed, no examples.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of {SPLITS}")
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        if size < 1:
            raise ValueError(f"size={size} must be at least 1")
        self._task, self._split, self._size = task, split, size
        self._seed = (seed, SPLITS.index(split))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng((*self._seed, int(index)))
        return self._task.example(rng, split=self._split)

    def __repr__(self) -> str:
        return f"Source({self._task!r}, split={self._split!r}, seed={self._seed[0]})"


def dataset(task: Task, *, split: str, seed: int, size: int) -> grain.MapDataset:
    """The examples of a task as a Grain dataset: random access, to shuffle, repeat and batch.

    Example i is a function of (task, seed, split, i), in every process and on every machine.

    >>> from sparse_attn.data.synthetic import mqar
    >>> examples = dataset(mqar.Mqar(vocab_size=128), split="train", seed=0, size=100)
    >>> {name: x.shape for name, x in next(iter(examples.batch(4))).items()}
    {'inputs': (4, 64), 'targets': (4, 64), 'weights': (4, 64)}
    """
    import grain  # Drawing examples needs NumPy only: studies on bare machines draw without Grain.

    return grain.MapDataset.source(Source(task, split=split, seed=seed, size=size))


def example_of(inputs: Any, answers: Any) -> Example:
    """The example of `inputs [T]` and `answers [T]`, where an answer of -1 does not count."""
    answers = np.asarray(answers)
    scored = answers >= 0
    return {
        "inputs": np.asarray(inputs, np.int32),
        "targets": np.where(scored, answers, 0).astype(np.int32),
        "weights": scored.astype(np.float32),
    }


def check_at_least(**bounds: tuple[int, int]) -> None:
    """Raises a ValueError for the first `name=(value, least)` whose value is below its least."""
    for name, (value, least) in bounds.items():
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
