"""Joint recall: which value a key has depends on the context it is asked in."""

import dataclasses

from sparse_attn.data.synthetic import base

PAD, BOS, SEPARATOR = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class JointRecall(base.Task):
    """Tables of key-value pairs, one per context, then asked for again.  [arXiv:2507.00449, sec. 3]

    BOS; per context, in random order: its id, then `key value` pairs in random order; a separator;
    the contexts and their keys once more in new random orders, each key answered by the value that
    it has in this context. The same keys occur in every context with values of their own, so the
    answer needs the pair (context, key). Numbers of contexts and keys are drawn from ranges;
    what is left of `length` is padding.

    Attributes:
      contexts, keys: `(least, most)` per example.
      num_values: values to choose from.
      vocab_size: at least 3 marks and an id per context, key and value.

    >>> import numpy as np
    >>> task = JointRecall(contexts=(2, 2), keys=(1, 1), num_values=4, vocab_size=12)
    >>> x = task.example(np.random.default_rng(1))
    >>> x["inputs"].tolist()  # contexts 3 and 4, key 5, values 6 ... 9
    [1, 3, 5, 8, 4, 5, 9, 2, 3, 5, 8, 4, 5, 9]
    >>> x["targets"].tolist()
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 9, 0]
    """

    contexts: tuple[int, int] = (5, 16)
    keys: tuple[int, int] = (5, 16)
    num_values: int = 16
    vocab_size: int = 100

    def __post_init__(self):
        for name in ("contexts", "keys"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise ValueError(f"{name}={getattr(self, name)} must be (least, most), least >= 1")
        base.check_at_least(num_values=(self.num_values, 2))
        needed = self._first_value + self.num_values
        if self.vocab_size < needed:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least {needed}")

    @property
    def _first_value(self) -> int:
        return 3 + self.contexts[1] + self.keys[1]

    @property
    def length(self) -> int:
        return 2 + 2 * self.contexts[1] * (1 + 2 * self.keys[1])

    @property
    def chance(self) -> float:
        return 1 / self.num_values

    def example(self, rng, *, split="train"):
        contexts = (
            3 + rng.permutation(self.contexts[1])[: rng.integers(*self.contexts, None, int, True)]
        )
        first_key = 3 + self.contexts[1]
        keys = (
            first_key + rng.permutation(self.keys[1])[: rng.integers(*self.keys, None, int, True)]
        )
        values = self._first_value + rng.integers(self.num_values, size=(len(contexts), len(keys)))
        inputs, answers = [BOS], [-1]
        for part in ("pairs", "questions"):
            if part == "questions":
                inputs, answers = [*inputs, SEPARATOR], [*answers, -1]
            for c in rng.permutation(len(contexts)):
                inputs, answers = [*inputs, contexts[c]], [*answers, -1]
                for k in rng.permutation(len(keys)):
                    inputs += [keys[k], values[c, k]]
                    answers += [values[c, k] if part == "questions" else -1, -1]
        rest = self.length - len(inputs)
        return base.example_of(inputs + [PAD] * rest, answers + [-1] * rest)
