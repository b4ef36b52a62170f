"""Word problems of groups: state tracking, which no attention of fixed depth does at length."""

import dataclasses
import functools
import itertools

import numpy as np

from sparse_attn.data.synthetic import base

GROUPS = ("Z60", "A4xZ5", "A5", "S3", "S5")


@dataclasses.dataclass(frozen=True)
class GroupWords(base.Task):
    """Random elements of a group; the answer at each place is the product of all up to there.

    A negative control [arXiv:2404.08819, sec. 5]: A5 and S5 are not solvable, so their running
    product is NC1-complete and every attention pattern needs depth that grows with the length; Z60
    and A4xZ5 are the solvable ones of the same size as A5.

    Raises:
      ValueError: an unknown group or no elements.

    >>> x = GroupWords(group="S3", length=5).example(np.random.default_rng(0))
    >>> x["inputs"].tolist(), x["targets"].tolist()
    ([5, 3, 3, 1, 1], [5, 1, 2, 4, 2])
    """

    group: str = "A5"
    length: int = 20

    def __post_init__(self):
        if self.group not in GROUPS:
            raise ValueError(f"group={self.group!r} must be one of {GROUPS}")
        base.check_at_least(length=(self.length, 1))

    @property
    def vocab_size(self) -> int:
        return len(table(self.group))

    @property
    def chance(self) -> float:
        return 1 / self.vocab_size

    def example(self, rng, *, split="train"):
        product = table(self.group)
        inputs = rng.integers(len(product), size=self.length)
        return base.example_of(
            inputs, list(itertools.accumulate(inputs, lambda a, b: product[a, b]))
        )


@functools.lru_cache
def table(group: str) -> np.ndarray:
    """The multiplication table `[n, n]`: entry (a, b) is a then b; element 0 is the identity.

    >>> table("Z60")[59, 2].item(), table("A5").shape
    (1, (60, 60))
    """
    left, _, right = group.partition("x")
    if right:
        a, b = table(left), table(right)
        i, j = np.divmod(np.arange(len(a) * len(b)), len(b))
        return a[i[:, None], i] * len(b) + b[j[:, None], j]
    kind, n = group[0], int(group[1:])
    if kind == "Z":
        return (np.arange(n)[:, None] + np.arange(n)) % n
    elements = np.array(list(itertools.permutations(range(n))))
    if kind == "A":  # Even permutations: an even number of inversions.
        i, j = np.triu_indices(n, 1)
        elements = elements[(elements[:, i] > elements[:, j]).sum(1) % 2 == 0]
    index = {tuple(element): i for i, element in enumerate(elements)}
    # First a, then b: position x goes to b[a[x]].
    return np.array([[index[tuple(b[a])] for b in elements] for a in elements])
