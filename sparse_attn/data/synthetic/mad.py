"""The six tasks of Mechanistic Architecture Design (MAD).  [arXiv:2403.17844, sec. 3, app. B]

Trained on all next tokens and tested on the answers only, where the original does so.
"""

import dataclasses

import numpy as np

from sparse_attn.data.synthetic import base


def _next_tokens(tokens: list[int], answers: list[int], split: str) -> base.Example:
    """Shifts by one: every next token counts in training, only answers in a test."""
    scored = tokens if split == "train" else answers
    return base.example_of(tokens[:-1], scored[1:])


@dataclasses.dataclass(frozen=True)
class InContextRecall(base.Task):
    """Pairs of key and value, with repeats: a key that was seen before is a question.

    Keys are the lower half of the vocabulary, values the upper half. The last pair is always a
    repeat. `noise` is the share of pairs replaced by two tokens of a vocabulary of their own, the
    `noise_vocab` highest tokens.

    Attributes:
      length: tokens of an example, one less than the even number that the original states.

    Raises:
      ValueError: an even length, too few keys, or noise without a vocabulary for it.

    >>> x = InContextRecall(vocab_size=4, length=7).example(np.random.default_rng(0), split="test")
    >>> x["inputs"].tolist(), x["targets"].tolist(), x["weights"].astype(int).tolist()
    ([0, 3, 0, 3, 0, 3, 0], [0, 0, 3, 0, 3, 0, 3], [0, 0, 1, 0, 1, 0, 1])
    """

    vocab_size: int = 16
    length: int = 127
    noise_vocab: int = 0
    noise: float = 0.0

    def __post_init__(self):
        if self.length % 2 == 0 or self.length < 3:
            raise ValueError(f"length={self.length} must be odd and at least 3")
        base.check_at_least(noise_vocab=(self.noise_vocab, 0))
        base.check_at_least(vocab_size=(self.vocab_size, self.noise_vocab + 2))
        if not 0 <= self.noise < 1 or (self.noise and not self.noise_vocab):
            raise ValueError(f"noise={self.noise} must be in [0, 1), and needs noise_vocab > 0")

    @property
    def chance(self) -> float:
        plain = self.vocab_size - self.noise_vocab
        return 1 / (plain - plain // 2)

    def example(self, rng, *, split="train"):
        plain = self.vocab_size - self.noise_vocab
        value_of = rng.integers(plain // 2, plain, size=plain // 2)
        seen: dict[int, None] = {}
        tokens, answers = [], []
        pairs = (self.length + 1) // 2
        certain = rng.integers(pairs - 1)  # One pair at least is no noise.
        for i in range(pairs):
            last = i == pairs - 1
            if not last and i != certain and self.noise and rng.random() < self.noise:
                tokens += rng.integers(plain, self.vocab_size, size=2).tolist()
                answers += [-1, -1]
                continue
            key = int(rng.choice(list(seen)) if last else rng.integers(plain // 2))
            tokens += [key, int(value_of[key])]
            answers += [-1, int(value_of[key]) if key in seen else -1]
            seen[key] = None
        return _next_tokens(tokens, answers, split)


@dataclasses.dataclass(frozen=True)
class NoisyInContextRecall(InContextRecall):
    """In-context recall among noise: a fifth of the pairs are tokens that mean nothing.

    >>> task = NoisyInContextRecall(length=9)
    >>> task.example(np.random.default_rng(9))["inputs"].tolist()  # noise is 16 and above
    [5, 12, 5, 12, 7, 14, 28, 22, 7]
    """

    vocab_size: int = 32
    noise_vocab: int = 16
    noise: float = 0.2


@dataclasses.dataclass(frozen=True)
class FuzzyRecall(base.Task):
    """In-context recall whose keys and values are motifs of one to `motif` different tokens.

    One pair, the probe, stands somewhere in the example and again at its end; others may repeat by
    chance. A test asks for the longest keys only. Padding (the highest token) stands in front.

    The original draws the place behind which the probe comes from a range up to `4 motif` tokens
    longer: where the other pairs end before it, in 3% of its examples of 128 tokens, the probe is
    missing and its answer unknown. Here it is always there.

    >>> x = FuzzyRecall(vocab_size=9, length=16, motif=2).example(np.random.default_rng(0))
    >>> x["inputs"].shape, bool(x["weights"].all())
    ((16,), True)
    """

    vocab_size: int = 16
    length: int = 128
    motif: int = 3

    def __post_init__(self):
        base.check_at_least(
            motif=(self.motif, 1),
            vocab_size=(self.vocab_size, 2 * self.motif + 1),
            length=(self.length, 6 * self.motif),
        )

    @property
    def chance(self) -> float:
        plain = self.vocab_size - 1
        return 1 / (plain - plain // 2)

    def example(self, rng, *, split="train"):
        plain = self.vocab_size - 1
        keys, values = np.arange(plain // 2), np.arange(plain // 2, plain)

        def motif(tokens, *, longest):
            size = self.motif if longest else rng.integers(1, self.motif + 1)
            return tuple(rng.permutation(tokens)[:size].tolist())

        longest = split == "test"
        probe, answer = motif(keys, longest=longest), motif(values, longest=False)
        known = {probe: answer}
        body = self.length - len(probe) - len(answer) - 2 * self.motif
        place = rng.integers(body - 2 * self.motif + 1)  # No pair from before it ends the body.
        tokens, answers, seen = [], [], set()
        while len(tokens) < body:
            key = motif(keys, longest=longest)
            if len(tokens) >= place and probe not in seen:
                key = probe
            value = known.setdefault(key, motif(values, longest=False))
            tokens += [*key, *value]
            answers += [-1] * len(key) + (list(value) if key in seen else [-1] * len(value))
            seen.add(key)
        tokens += [*probe, *answer]
        answers += [-1] * len(probe) + list(answer)
        padding = self.length + 1 - len(tokens)
        return _next_tokens([plain] * padding + tokens, [-1] * padding + answers, split)


@dataclasses.dataclass(frozen=True)
class Memorization(base.Task):
    """A fixed dictionary to learn by heart: `key, blank`, answered by the key's value.

    The dictionary is a function of `dictionary_seed`, the same in every example. Nothing in the
    context tells the answer: the task is for the layers that store facts.

    >>> x = Memorization(vocab_size=9, length=4).example(np.random.default_rng(0))
    >>> x["inputs"].tolist()[1::2], x["weights"].astype(int).tolist()
    ([8, 8], [0, 1, 0, 1])
    """

    vocab_size: int = 256
    length: int = 32
    dictionary_seed: int = 12345

    def __post_init__(self):
        base.check_at_least(vocab_size=(self.vocab_size, 3), length=(self.length, 2))
        if self.length % 2:
            raise ValueError(f"length={self.length} must be even")

    @property
    def chance(self) -> float:
        plain = self.vocab_size - 1
        return 1 / (plain - plain // 2)

    def dictionary(self) -> np.ndarray:
        """The value of each key `0 .. n - 1`."""
        plain = self.vocab_size - 1
        order = np.random.default_rng(self.dictionary_seed).permutation(plain - plain // 2)
        return plain // 2 + order[: plain // 2]

    def example(self, rng, *, split="train"):
        value_of = self.dictionary()
        keys = rng.integers(len(value_of), size=self.length // 2)
        inputs = np.full(self.length, self.vocab_size - 1)
        answers = np.full(self.length, -1)
        inputs[::2], answers[1::2] = keys, value_of[keys]
        return base.example_of(inputs, answers)


@dataclasses.dataclass(frozen=True)
class Compression(base.Task):
    """Random tokens and a mark at the end, from whose state alone all of them are to be read.

    The targets are the inputs themselves, for an auto-encoder, which this library does not have:
    the original adds the state of the last position to sines of each place, and two dense layers
    make a token of each sum. To a causal decoder each place would show its own answer, so the
    trainer refuses the task (`not_for_decoder`).

    >>> x = Compression(vocab_size=4, length=5).example(np.random.default_rng(0))
    >>> x["inputs"].tolist(), bool((x["targets"] == x["inputs"]).all())
    ([2, 1, 1, 0, 3], True)
    """

    vocab_size: int = 16
    length: int = 32

    def __post_init__(self):
        base.check_at_least(vocab_size=(self.vocab_size, 3), length=(self.length, 2))

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    @property
    def not_for_decoder(self) -> str:
        return (
            "each place would only copy the token it sees; an auto-encoder that reads all of them "
            "from the last place's state would do, or selective_copy for a decoder"
        )

    def example(self, rng, *, split="train"):
        tokens = rng.integers(self.vocab_size - 1, size=self.length)
        tokens[-1] = self.vocab_size - 1
        return base.example_of(tokens, tokens)


@dataclasses.dataclass(frozen=True)
class SelectiveCopy(base.Task):
    """Tokens scattered among blanks, to be repeated in order behind a mark.

    `num_tokens` tokens, each with a random number of blanks in front of it (`length - 2 num_tokens
    - 1` in all, each put before a token drawn uniformly), the mark (the highest token), then
    `num_tokens` blanks (the next lower token) in place of the answers.

    >>> task = SelectiveCopy(vocab_size=8, length=10, num_tokens=3)
    >>> x = task.example(np.random.default_rng(0))
    >>> x["inputs"].tolist(), x["targets"][-3:].tolist()
    ([1, 6, 6, 1, 6, 0, 7, 6, 6, 6], [1, 1, 0])
    """

    vocab_size: int = 16
    length: int = 256
    num_tokens: int = 16

    def __post_init__(self):
        base.check_at_least(
            num_tokens=(self.num_tokens, 1),
            vocab_size=(self.vocab_size, 4),
            length=(self.length, 2 * self.num_tokens + 1),
        )

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def example(self, rng, *, split="train"):
        blank, mark, count = self.vocab_size - 2, self.vocab_size - 1, self.num_tokens
        inputs = np.full(self.length, blank)
        inputs[-count - 1] = mark
        blanks = rng.integers(count, size=self.length - 2 * count - 1)
        places = np.cumsum(1 + np.bincount(blanks, minlength=count)) - 1
        inputs[places] = rng.integers(self.vocab_size - 2, size=count)
        answers = np.full(self.length, -1)
        answers[-count:] = inputs[places]
        return base.example_of(inputs, answers)
