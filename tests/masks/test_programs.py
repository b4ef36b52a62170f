"""`one_program`: when a call is one program, and when it is a plain call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.masks import programs
from sparse_attn.ops import tiles


def traced(key=lambda: None):
    """A function and whether each of its runs was traced."""
    runs = []

    @programs.one_program(key)
    def function(x, *others, factor=1):
        runs.append(isinstance(jax.tree.leaves(x)[0], jax.core.Tracer))
        if factor == 0:
            raise ValueError("factor=0 must be another number")
        return jax.tree.map(lambda x: x * factor, x)

    return function, runs


def test_shapes_and_what_is_no_array_make_a_program():
    function, runs = traced()
    x = jnp.arange(3.0)
    assert function(x, factor=2).tolist() == [0, 2, 4]
    assert function(x + 1, factor=2).tolist() == [2, 4, 6]
    assert runs == [True]
    function(x, factor=3)
    function(x, None, factor=3)
    function(x[:2], factor=3)
    assert runs == [True] * 4
    function(x, factor=3.0)  # Equal, and another program: numbers of Python have types too.
    assert runs == [True] * 5
    # Arrays inside of arguments are arrays too.
    assert function({"a": x, "b": np.float32([5])}, factor=2)["b"].tolist() == [10]
    assert function({"a": x, "b": np.float32([6])}, factor=2)["b"].tolist() == [12]
    assert runs == [True] * 6


def test_the_key_makes_a_program():
    function, runs = traced(tiles.target)
    x = jnp.ones(2)
    function(x)
    with tiles.assume(tiles.Target("gpu", "a GPU")):
        function(x)
        function(x)
    function(x)
    assert len(runs) == 2


def test_under_a_transformation_it_is_the_function():
    function, runs = traced()
    x = jnp.arange(3.0)
    assert jax.grad(lambda x: function(x, factor=2).sum())(x).tolist() == [2, 2, 2]
    assert jax.vmap(function)(x).tolist() == x.tolist()
    jaxpr = jax.make_jaxpr(lambda x: function(x, factor=2))(x)
    assert [equation.primitive.name for equation in jaxpr.eqns] == ["mul"]
    assert len(runs) == 3


def test_what_a_program_cannot_take_is_called_as_it_is():
    function, runs = traced()
    wide = np.arange(3)  # int64, which a program would narrow.
    assert function(wide).dtype == np.int64
    function(jnp.ones(2), [{1}])
    function(jnp.ones(2), {"unhashable": set()})
    function(jnp.ones(2), np.array(["a name"]))
    assert runs == [False] * 4
    assert function((2, 3), factor=2) == (4, 6)  # No array at all.


def test_errors_are_those_of_the_function():
    function, _ = traced()
    for _ in range(2):
        with pytest.raises(ValueError, match="factor=0") as caught:
            function(jnp.ones(2), factor=0)
        assert str(caught.value) == "factor=0 must be another number"
