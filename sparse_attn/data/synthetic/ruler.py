"""Tracing and counting, after RULER [arXiv:2404.06654, sec. 3], with tokens for words."""

import dataclasses

import numpy as np

from sparse_attn.data.synthetic import base


@dataclasses.dataclass(frozen=True)
class VariableTracking(base.Task):
    """Chains of assignments `x1 = value, x2 = x1, ...` in noise: what is the last variable's value?

    Each of `chains` chains has `hops` copies behind its first assignment, spread over the example
    in the right order. An assignment is two tokens, the variable and its source. The last token
    names the last variable of one chain; the answer is the value at the start of this chain.

    Tokens: `vocab_size // 4` values, twice as many variables, the rest is noise.

    >>> x = VariableTracking(vocab_size=16, length=9, chains=1, hops=2)
    >>> y = x.example(np.random.default_rng(0))
    >>> y["inputs"].tolist(), int(y["targets"][-1])
    ([11, 2, 14, 6, 11, 12, 7, 6, 7], 2)
    """

    vocab_size: int = 128
    length: int = 256
    chains: int = 1
    hops: int = 4

    def __post_init__(self):
        base.check_at_least(chains=(self.chains, 1), hops=(self.hops, 1))
        base.check_at_least(
            vocab_size=(self.vocab_size, 8 + 2 * self.chains * (self.hops + 1)),
            length=(self.length, 2 * self.chains * (self.hops + 1) + 1),
        )

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size // 4)

    def example(self, rng, *, split="train"):
        quarter, steps = self.vocab_size // 4, self.hops + 1
        inputs = rng.integers(3 * quarter, self.vocab_size, size=self.length)
        names = quarter + rng.permutation(2 * quarter)[: self.chains * steps]
        names = names.reshape(self.chains, steps)
        values = rng.permutation(quarter)[: self.chains]
        # Gaps of noise are drawn freely; which chain goes on next is drawn without regard to order.
        free = self.length - 1 - 2 * names.size
        gaps = np.sort(rng.integers(free + 1, size=names.size))
        places = gaps + 2 * np.arange(names.size)
        turn = rng.permutation(np.repeat(np.arange(self.chains), steps))
        done = [0] * self.chains
        for place, c in zip(places, turn, strict=True):
            inputs[place] = names[c, done[c]]
            inputs[place + 1] = values[c] if done[c] == 0 else names[c, done[c] - 1]
            done[c] += 1
        asked = rng.integers(self.chains)
        inputs[-1] = names[asked, -1]
        answers = np.full(self.length, -1)
        answers[-1] = values[asked]
        return base.example_of(inputs, answers)


@dataclasses.dataclass(frozen=True)
class CommonWords(base.Task):
    """Which words are frequent? `num_common` words occur `often` times, all others `rarely`.

    The list of words is in random order; behind a mark, the common words are asked for in
    ascending order, so that the answer is unique.

    Tokens: words are `0 .. vocab_size - 2`, the mark is the highest token.

    >>> task = CommonWords(vocab_size=10, num_common=2, often=3, rarely=1, num_rare=2)
    >>> x = task.example(np.random.default_rng(0))
    >>> x["inputs"].tolist(), x["targets"][-2:].tolist()
    ([5, 4, 4, 2, 5, 5, 4, 6, 9, 4], [4, 5])
    """

    vocab_size: int = 128
    num_common: int = 10
    often: int = 30
    num_rare: int = 50
    rarely: int = 3

    def __post_init__(self):
        base.check_at_least(
            num_common=(self.num_common, 1),
            num_rare=(self.num_rare, 0),
            rarely=(self.rarely, 1),
            often=(self.often, self.rarely + 1),
            vocab_size=(self.vocab_size, self.num_common + self.num_rare + 1),
        )

    @property
    def length(self) -> int:
        return self.num_common * (self.often + 1) + self.num_rare * self.rarely

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def example(self, rng, *, split="train"):
        words = rng.permutation(self.vocab_size - 1)[: self.num_common + self.num_rare]
        common = np.sort(words[: self.num_common])
        counts = [self.often] * self.num_common + [self.rarely] * self.num_rare
        listed = rng.permutation(np.repeat(words, counts))
        inputs = np.concatenate([listed, [self.vocab_size - 1], common[:-1]])
        answers = np.full(len(inputs), -1)
        answers[-len(common) :] = common
        return base.example_of(inputs, answers)
