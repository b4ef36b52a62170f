"""Multi-query associative recall."""

import dataclasses

import numpy as np

from sparse_attn.data.synthetic import base

FILLERS = ("random", "zero")


@dataclasses.dataclass(frozen=True)
class Mqar(base.Task):
    """Key-value pairs, then each key once more: its value is the answer.

    Zoology's task [arXiv:2312.04927, sec. 4, app. E].

    `num_pairs` keys (drawn without replacement from `1 .. V/2 - 1`) and values (from `V/2 .. V-1`)
    stand first. Each key then returns once at an even distance `2 g` behind the pairs, where gap g
    has weight `(g + 1) ** (power_a - 1)`, without replacement: most keys return soon. Places that
    hold no query are random tokens, or token 0.

    Raises:
      ValueError: odd length, `4 num_pairs > length`, `vocab_size <= length`, unknown filler.

    >>> task = Mqar(vocab_size=32, length=16, num_pairs=2, filler="zero")
    >>> x = task.example(np.random.default_rng(0))
    >>> x["inputs"].tolist()
    [3, 18, 12, 27, 3, 0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0]
    >>> x["targets"].tolist()
    [0, 0, 0, 0, 18, 0, 0, 0, 27, 0, 0, 0, 0, 0, 0, 0]
    """

    vocab_size: int = 8192
    length: int = 64
    num_pairs: int = 4
    power_a: float = 0.01
    filler: str = "random"

    def __post_init__(self):
        base.check_at_least(num_pairs=(self.num_pairs, 1), length=(self.length, 4))
        if self.length % 2 or 4 * self.num_pairs > self.length:
            raise ValueError(f"length={self.length} must be even and >= 4 num_pairs")
        if self.vocab_size <= self.length:
            raise ValueError(f"vocab_size={self.vocab_size} must be above length={self.length}")
        if self.filler not in FILLERS:
            raise ValueError(f"filler={self.filler!r} must be one of {FILLERS}")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def gap_weights(self) -> np.ndarray:
        """Probability of each gap for the first key that is placed."""
        gaps = np.arange(1, (self.length - 2 * self.num_pairs) // 2 + 1)
        weights = gaps ** (self.power_a - 1.0)
        return weights / weights.sum()

    def example(self, rng, *, split="train"):
        half, pairs = self.vocab_size // 2, self.num_pairs
        keys = 1 + rng.permutation(half - 1)[:pairs]
        values = half + rng.permutation(self.vocab_size - half)[:pairs]
        inputs = np.zeros(self.length, np.int32)
        inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2] = keys, values
        # The largest of log-weights with Gumbel noise are draws without replacement, in order.
        noisy = np.log(self.gap_weights())
        noisy += rng.gumbel(size=len(noisy))
        places = 2 * pairs + 2 * np.argsort(-noisy)[:pairs]
        inputs[places] = keys
        answers = np.full(self.length, -1)
        answers[places] = values
        if self.filler == "random":
            free = inputs == 0
            inputs[free] = rng.integers(self.vocab_size, size=free.sum())
        return base.example_of(inputs, answers)

    def batch(self, rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
        """`count` examples at once, many times faster: `inputs [count, T]` and what counts of them.

        `places` and `answers` `[count, num_pairs]` say where the queries stand, and their values.
        The same distribution as `example`, from other random numbers.

        >>> x = Mqar(vocab_size=32, length=16, num_pairs=2).batch(np.random.default_rng(0), 5)
        >>> {name: value.shape for name, value in x.items()}
        {'inputs': (5, 16), 'places': (5, 2), 'answers': (5, 2)}
        """
        half, pairs = self.vocab_size // 2, self.num_pairs
        rows = np.arange(count)[:, None]
        keys = 1 + _distinct(rng, half - 1, (count, pairs))
        values = half + _distinct(rng, self.vocab_size - half, (count, pairs))
        weights = np.log(self.gap_weights())
        noisy = weights + rng.gumbel(size=(count, len(weights)))
        places = 2 * pairs + 2 * np.argsort(-noisy, axis=1)[:, :pairs]
        inputs = np.zeros((count, self.length), np.int32)
        inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
        inputs[rows, places] = keys
        if self.filler == "random":
            noise = rng.integers(self.vocab_size, size=inputs.shape, dtype=np.int32)
            inputs = np.where(inputs == 0, noise, inputs)
        return {
            "inputs": inputs,
            "places": places.astype(np.int32),
            "answers": values.astype(np.int32),
        }


def _distinct(rng, choices, shape):
    """Rows of distinct numbers below `choices`, all such rows equally likely."""
    if choices < shape[1] ** 2:  # Drawing again would take too long.
        return np.argsort(rng.random((shape[0], choices)), axis=1)[:, : shape[1]]
    drawn = rng.integers(choices, size=shape)
    while (again := (np.diff(np.sort(drawn, axis=1), axis=1) == 0).any(1)).any():
        drawn[again] = rng.integers(choices, size=(again.sum(), shape[1]))
    return drawn
