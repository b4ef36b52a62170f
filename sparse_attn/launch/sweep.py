"""Combinators for sweeps: a sweep is a list of points, a point maps dotted config keys to values.

A config file offers a sweep as a generator of points called `sweep_<name>()`; these functions build
one without writing the loops:

>>> product(over("optim.lr", [1e-3, 3e-4]), over("seed", range(3)))[1]
{'optim.lr': 0.001, 'seed': 1}
"""

import itertools
from collections.abc import Iterable
from typing import Any

Point = dict[str, Any]


def over(key: str, values: Iterable[Any]) -> list[Point]:
    """One point per value of one key.

    >>> over("seed", range(2))
    [{'seed': 0}, {'seed': 1}]
    """
    return [{key: value} for value in values]


def fixed(key: str, value: Any) -> list[Point]:
    """The single point that sets `key` to `value`; use it inside `product`.

    >>> product(over("seed", [0, 1]), fixed("optim.lr", 1e-3))
    [{'seed': 0, 'optim.lr': 0.001}, {'seed': 1, 'optim.lr': 0.001}]
    """
    return over(key, [value])


def product(*sweeps: Iterable[Point]) -> list[Point]:
    """Every combination of one point from each sweep; the last sweep varies fastest.

    Raises:
      ValueError: two sweeps set the same key.

    >>> len(product(over("optim.lr", [1e-3, 3e-4]), over("seed", range(3))))
    6
    """
    return [_merge(points) for points in itertools.product(*map(list, sweeps))]


def zipit(*sweeps: Iterable[Point]) -> list[Point]:
    """Sweeps side by side: the i-th points of all of them form the i-th point.

    Raises:
      ValueError: the sweeps differ in length, or two set the same key.

    >>> zipit(over("model.num_layers", [2, 4]), over("optim.lr", [1e-3, 5e-4]))[1]
    {'model.num_layers': 4, 'optim.lr': 0.0005}
    """
    lists = [list(sweep) for sweep in sweeps]
    lengths = [len(points) for points in lists]
    if len(set(lengths)) > 1:
        raise ValueError(f"zipit: lengths={lengths} must all be equal")
    return [_merge(points) for points in zip(*lists, strict=True)]


def chain(*sweeps: Iterable[Point]) -> list[Point]:
    """One sweep after the other.

    >>> chain(over("seed", [0]), over("optim.lr", [1e-3, 3e-4]))
    [{'seed': 0}, {'optim.lr': 0.001}, {'optim.lr': 0.0003}]
    """
    return list(itertools.chain.from_iterable(sweeps))


def _merge(points: Iterable[Point]) -> Point:
    merged: Point = {}
    for point in points:
        if twice := sorted(merged.keys() & point.keys()):
            raise ValueError(f"key={twice[0]!r} must be set by one sweep only")
        merged |= point
    return merged
