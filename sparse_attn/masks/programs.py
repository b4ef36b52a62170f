"""Calls outside of `jax.jit`: one program each, instead of one for every operation in them."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

_ARRAY = object()  # Stands for an array among what a program is made for.


def one_program(key: Callable[[], Hashable] = lambda: None) -> Callable[[Callable], Callable]:
    """Decorates a function so that a call outside of `jax.jit` compiles and runs one program.

    A program is made for the shapes of the arrays among the arguments and for all other arguments,
    which must be hashable. Where something is traced, and where an argument is none of these, the
    function is called as it is.

    Args:
      key: what a program depends on beside the arguments.

    >>> traces = []
    >>> @one_program()
    ... def scaled(x, *, factor):
    ...     traces.append(factor)
    ...     return x * factor
    >>> [float(scaled(np.float32([x]), factor=3)[0]) for x in (1, 2)], traces
    ([3.0, 6.0], [3])
    """

    def decorate(function):
        def program(others, tree, key, arrays):
            del key
            arrays = iter(arrays)
            leaves = [next(arrays) if x is _ARRAY else x for _, x in others]
            args, kwargs = jax.tree.unflatten(tree, leaves)
            return function(*args, **kwargs)

        program.__name__ = function.__name__  # What profiles and compilers call it.
        program = jax.jit(program, static_argnums=(0, 1, 2))

        @functools.wraps(function)
        def call(*args, **kwargs):
            leaves, tree = jax.tree.flatten((args, kwargs))
            arrays = [x for x in leaves if isinstance(x, (jax.Array, np.ndarray))]
            others = [_ARRAY if isinstance(x, (jax.Array, np.ndarray)) else x for x in leaves]
            others = tuple((type(x), x) for x in others)  # For 1 == 1.0 == True.
            if not arrays or not all(map(_fits, arrays)) or not _hashable(others):
                return function(*args, **kwargs)
            return program(others, tree, key(), arrays)

        return call

    return decorate


def _fits(x: jax.Array | np.ndarray) -> bool:
    """Whether an array enters a program as it is: concrete, and of a dtype that JAX has."""
    if isinstance(x, jax.Array):
        return not isinstance(x, jax.core.Tracer)
    numbers = jax.dtypes.issubdtype(x.dtype, np.number) or x.dtype == bool
    return numbers and jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype


def _hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True
