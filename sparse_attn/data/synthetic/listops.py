"""ListOps: nested operations on digits, after the Long Range Arena."""

import dataclasses

import numpy as np

from sparse_attn.data.synthetic import base

OPERATORS = ("MIN", "MAX", "MED", "SM")
# Digits are tokens 0..9, then the operators, the closing bracket, and padding.
CLOSE = 10 + len(OPERATORS)
PAD = CLOSE + 1


@dataclasses.dataclass(frozen=True)
class ListOps(base.Task):
    """An expression such as `[MAX 4 [MIN 2 3] 9]`; the last position answers with its value.

    Trees are drawn as in the Long Range Arena [arXiv:2011.04006, sec. 2.2.1]: below `max_depth` a
    node is an operator with probability 1/4, with 2 .. `max_args` arguments; MED is the median
    rounded down, SM the sum modulo 10. An operator counts 2 tokens (itself and its bracket) and a
    digit 1; trees are drawn until their size is in `(min_size, length)`. Padding stands in front.
    The original drops a tree that it has drawn before; here small trees may come twice, those of
    hundreds of tokens do not.
    Known to be bimodal between seeds: a sanity check, not a ranking.

    >>> task = ListOps(length=12, min_size=4, max_depth=3)
    >>> x = task.example(np.random.default_rng(3))
    >>> text(x["inputs"]), int(x["targets"][-1])
    ('[MED 2 0 9 2 ]', 2)
    """

    length: int = 2000
    min_size: int = 500
    max_depth: int = 10
    max_args: int = 10

    def __post_init__(self):
        base.check_at_least(max_depth=(self.max_depth, 2), max_args=(self.max_args, 2))
        base.check_at_least(min_size=(self.min_size, 3), length=(self.length, self.min_size + 2))

    @property
    def vocab_size(self) -> int:
        return PAD + 1

    @property
    def chance(self) -> float:
        return 1 / 10

    def example(self, rng, *, split="train"):
        tokens: list[int] = []
        while not self.min_size < len(tokens) < self.length:
            tokens = []
            self._draw(rng, 1, tokens)
        padding = [PAD] * (self.length - len(tokens))
        answers = [-1] * (self.length - 1) + [value(tokens)]
        return base.example_of(padding + tokens, answers)

    def _draw(self, rng: np.random.Generator, depth: int, tokens: list[int]) -> None:
        if depth >= self.max_depth or rng.random() > 0.25:
            tokens.append(int(rng.integers(10)))
            return
        count = int(rng.integers(2, self.max_args + 1))
        tokens.append(10 + int(rng.integers(len(OPERATORS))))
        for _ in range(count):
            self._draw(rng, depth + 1, tokens)
            if len(tokens) > self.length:  # Too long already: thrown away whole.
                return
        tokens.append(CLOSE)


def value(tokens: list[int]) -> int:
    """The value of one whole expression.

    >>> value([10 + OPERATORS.index("SM"), 7, 8, CLOSE])
    5
    """
    stack: list[list[int]] = [[]]
    for token in tokens:
        if token < 10:
            stack[-1].append(token)
        elif token < CLOSE:
            stack.append([token])
        else:
            operator, *numbers = stack.pop()
            stack[-1].append(
                int((min, max, np.median, lambda x: sum(x) % 10)[operator - 10](numbers))
            )
    (result,) = stack[0]
    return result


def text(tokens: np.ndarray) -> str:
    """The expression in words, without padding.

    >>> text(np.array([PAD, 10, 1, 2, CLOSE]))
    '[MIN 1 2 ]'
    """
    names = [str(i) for i in range(10)] + [f"[{name}" for name in OPERATORS] + ["]"]
    return " ".join(names[t] for t in tokens if t != PAD)
