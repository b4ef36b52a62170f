"""Induction heads: what came after the marker the first time?"""

import dataclasses

import numpy as np

from sparse_attn.data.synthetic import base


@dataclasses.dataclass(frozen=True)
class Induction(base.Task):
    """Random tokens with one marker in them, and the marker again at the end.

    The answer is the token that followed the first marker.  [arXiv:2212.14052, sec. 3.1;
    arXiv:2312.00752, sec. 4.1.2]. Two layers of attention solve it at any length, one layer does
    not. The marker is the highest token.

    >>> x = Induction(vocab_size=4, length=6).example(np.random.default_rng(0))
    >>> x["inputs"].tolist(), int(x["targets"][-1])
    ([3, 1, 1, 0, 0, 3], 1)
    """

    vocab_size: int = 16
    length: int = 256

    def __post_init__(self):
        base.check_at_least(vocab_size=(self.vocab_size, 3), length=(self.length, 3))

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def example(self, rng, *, split="train"):
        inputs = rng.integers(self.vocab_size - 1, size=self.length)
        place = rng.integers(self.length - 2)
        inputs[[place, -1]] = self.vocab_size - 1
        answers = np.full(self.length, -1)
        answers[-1] = inputs[place + 1]
        return base.example_of(inputs, answers)
