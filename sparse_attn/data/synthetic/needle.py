"""Needles in a haystack, at the level of tokens: one fact at a chosen depth of a chosen length."""

import dataclasses

import numpy as np

from sparse_attn.data.synthetic import base


@dataclasses.dataclass(frozen=True)
class Needle(base.Task):
    """A key and its value at `depth` of a noise haystack; the key returns as the last token.

    The retrieval task of RULER [arXiv:2404.06654, sec. 3] with tokens for words. `distractors`
    other pairs stand elsewhere (the multi-key task): then the answer is not just the only value.
    Tokens: keys, values and noise each have a third of the vocabulary.

    Attributes:
      depth: place of the needle, 0 = first token, 1 = right before the question; None = random.

    Raises:
      ValueError: a depth outside 0..1, or more pairs than fit into the haystack.

    >>> task = Needle(vocab_size=30, length=8, depth=0.0)
    >>> x = task.example(np.random.default_rng(0))
    >>> x["inputs"].tolist(), x["targets"].tolist()
    ([2, 15, 25, 22, 23, 20, 20, 2], [0, 0, 0, 0, 0, 0, 0, 15])
    """

    vocab_size: int = 192
    length: int = 256
    depth: float | None = None
    distractors: int = 0

    def __post_init__(self):
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth} must be in 0..1, or None for a random place")
        base.check_at_least(
            distractors=(self.distractors, 0),
            vocab_size=(self.vocab_size, 3 * (self.distractors + 2)),
            length=(self.length, 2 * self.distractors + 3),
        )

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size // 3)

    def needle_place(self, rng: np.random.Generator | None = None) -> int:
        """The position of the needle's key, out of the even ones that leave room for its value."""
        slots = (self.length - 1) // 2
        if self.depth is None:
            return 2 * int(rng.integers(slots))
        return 2 * round(self.depth * (slots - 1))

    def example(self, rng, *, split="train"):
        third, pairs = self.vocab_size // 3, self.distractors + 1
        inputs = rng.integers(2 * third, self.vocab_size, size=self.length)
        place = self.needle_place(rng)
        others = np.setdiff1d(2 * np.arange((self.length - 1) // 2), place)
        places = np.append(place, rng.permutation(others)[: pairs - 1])
        inputs[places] = rng.permutation(third)[:pairs]
        inputs[places + 1] = third + rng.permutation(third)[:pairs]
        inputs[-1] = inputs[place]
        answers = np.full(self.length, -1)
        answers[-1] = inputs[place + 1]
        return base.example_of(inputs, answers)
