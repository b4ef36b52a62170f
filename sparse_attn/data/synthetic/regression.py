"""In-context linear regression: the examples in the prompt tell the function."""

import dataclasses

import numpy as np

from sparse_attn.data.synthetic import base


@dataclasses.dataclass(frozen=True)
class LinearRegression(base.Task):
    """Pairs (x, w . x) with a new w in every example; predict each y from what stands before it.

    `x_i, w ~ N(0, I_d)`, points x_1, y_1, x_2, y_2, ... as vectors, y in the first coordinate
    [arXiv:2208.01066, sec. 2 and app. A.1]. Here an example is `inputs f32[2n, d]`,
    `targets f32[2n]` and weights that are 1 at every x. `noise` is the standard deviation of what
    is added to y.

    >>> x = LinearRegression(dim=2, num_points=3).example(np.random.default_rng(0))
    >>> x["inputs"].shape, x["weights"].astype(int).tolist()
    ((6, 2), [1, 0, 1, 0, 1, 0])
    """

    dim: int = 20
    num_points: int = 41
    noise: float = 0.0

    def __post_init__(self):
        base.check_at_least(dim=(self.dim, 1), num_points=(self.num_points, 1))
        if self.noise < 0:
            raise ValueError(f"noise={self.noise} must not be negative")

    @property
    def length(self) -> int:
        return 2 * self.num_points

    @property
    def chance(self) -> float:
        """Mean squared error of the constant guess 0: the yardstick, as there is no accuracy."""
        return self.dim + self.noise**2

    @property
    def not_for_decoder(self) -> str:
        return "it must have tokens as inputs, not vectors: a model that projects these would do"

    def example(self, rng, *, split="train"):
        x = rng.standard_normal((self.num_points, self.dim))
        y = x @ rng.standard_normal(self.dim) + self.noise * rng.standard_normal(self.num_points)
        inputs = np.zeros((self.length, self.dim), np.float32)
        inputs[::2], inputs[1::2, 0] = x, y
        weights = np.zeros(self.length, np.float32)
        weights[::2] = 1
        targets = np.zeros(self.length, np.float32)
        targets[::2] = y
        return {"inputs": inputs, "targets": targets, "weights": weights}


def least_squares_error(example: base.Example) -> np.ndarray:
    """Squared error of ordinary least squares at each point, `[n]`: what a model can reach.

    >>> x = LinearRegression(dim=2, num_points=4).example(np.random.default_rng(0))
    >>> (least_squares_error(x) < 1e-8).tolist()  # two points determine two weights
    [False, False, True, True]
    """
    x, y = example["inputs"][::2].astype(float), example["targets"][::2].astype(float)
    guesses = [
        x[i] @ np.linalg.lstsq(x[:i], y[:i], rcond=None)[0] if i else 0.0 for i in range(len(x))
    ]
    return (np.array(guesses) - y) ** 2
