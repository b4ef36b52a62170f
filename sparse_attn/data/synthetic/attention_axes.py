"""Recall under the four kinds of attention: causal or not, within a row or to a memory."""

import dataclasses

import numpy as np

from sparse_attn.data.synthetic import base
from sparse_attn.patterns import base as patterns_base

BLANK = 0


@dataclasses.dataclass(frozen=True)
class AttentionAxes(base.Task):
    """Pairs of key and value, and questions that return a key; which pairs a question may use
    depends on the kind of attention.

    The axes {causal, noncausal} x {self, cross} of the benchmark CAB [arXiv:2210.07661, sec. 3],
    on one synthetic task with an answer for each. A row is all that attention is computed over:

    - self, causal: every question stands behind its pair.
    - self, noncausal: pairs and questions in one random order; about half of the questions stand
      before their pair, and a causal pattern cannot answer these.
    - cross, noncausal: the first half of the row is the memory with the pairs, the second half
      asks, in random order. Questions see the memory and not each other.
    - cross, causal: place i of the second half sees places 0 .. i of the memory, as where two
      streams arrive together; every question stands where its pair has arrived.

    `pattern` says what may be seen. Tokens: 0 is blank, then keys and values in equal parts.

    Raises:
      ValueError: a row too short for the pairs, or a vocabulary too small for them.

    >>> task = AttentionAxes(vocab_size=13, length=12, num_pairs=2, causal=False, cross=True)
    >>> x = task.example(np.random.default_rng(0))
    >>> x["inputs"].tolist()  # the memory, then the questions 3 and 4
    [4, 11, 0, 0, 3, 12, 0, 0, 3, 4, 0, 0]
    >>> x["targets"].tolist()
    [0, 0, 0, 0, 0, 0, 0, 0, 12, 11, 0, 0]
    """

    vocab_size: int = 65
    length: int = 64
    num_pairs: int = 8
    causal: bool = True
    cross: bool = False

    def __post_init__(self):
        base.check_at_least(num_pairs=(self.num_pairs, 1))
        base.check_at_least(
            length=(self.length, 4 * self.num_pairs + 2),
            vocab_size=(self.vocab_size, 2 * self.num_pairs + 1),
        )
        if self.length % 4:
            raise ValueError(f"length={self.length} must be a multiple of 4")

    @property
    def chance(self) -> float:
        return 1 / self._kinds

    @property
    def _kinds(self) -> int:
        return (self.vocab_size - 1) // 2

    @property
    def pattern(self) -> patterns_base.Pattern:
        """What may be seen in a row; a sparse pattern is `task.pattern & sparse`.

        >>> AttentionAxes(causal=True, cross=True, length=8, num_pairs=1).pattern.expression()
        '(causal() & ~local(window=4))'
        """
        half = self.length // 2
        if not self.cross:
            return patterns_base.parse("causal()" if self.causal else "full()")
        if self.causal:
            return patterns_base.parse(f"causal() & ~local(window={half})")
        # The memory sees itself backwards only, which a convolution needs no attention for.
        return patterns_base.parse(f"sinks(tokens={half})")

    def example(self, rng, *, split="train"):
        half, pairs = self.length // 2, self.num_pairs
        keys = 1 + rng.permutation(self._kinds)[:pairs]
        values = 1 + self._kinds + rng.permutation(self._kinds)[:pairs]
        inputs, answers = np.full(self.length, BLANK), np.full(self.length, -1)
        places, questions = self._places(rng, half, pairs)
        inputs[places], inputs[places + 1] = keys, values
        inputs[questions], answers[questions] = keys, values
        return base.example_of(inputs, answers)

    def _places(self, rng, half, pairs):
        if not self.cross:
            # Slots of two tokens; a question leaves the second one blank.
            slots = 2 * rng.permutation(self.length // 2)[: 2 * pairs].reshape(2, pairs)
            return np.sort(slots, 0) if self.causal else slots
        places = 2 * np.sort(rng.permutation(half // 2)[:pairs])
        if not self.causal:
            return places, half + rng.permutation(half)[:pairs]
        # From the last pair on, each takes a place where its value has arrived and that is free.
        free, questions = np.ones(half, bool), np.zeros(pairs, int)
        for i in range(pairs - 1, -1, -1):
            questions[i] = rng.choice(places[i] + 1 + np.flatnonzero(free[places[i] + 1 :]))
            free[questions[i]] = False
        return places, half + questions
