"""Element rules for Triton: a Python `mask_fn` becomes a `@triton.jit` function.

`mask_fn` is traced on two int32 scalars with `jax.make_jaxpr`, and each primitive becomes one line
of Triton source. So whatever JAX can trace is either translated exactly or refused by name, and
the kernel evaluates the same integer program as every other backend. A table of bits would cost
memory that grows with the PARTIAL blocks, and could not follow run-time positions.
"""

import functools
import hashlib
import linecache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from sparse_attn.patterns import base

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    # Triton's `//` and `%` on integers truncate, as lax.div and lax.rem do.
    "div": "//", "rem": "%", "shift_left": "<<", "shift_right_arithmetic": ">>",
}  # fmt: skip
_CALL = {"min": "tl.minimum", "max": "tl.maximum", "abs": "tl.abs"}
_INLINED = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")
_UNCHANGED = ("broadcast_in_dim", "copy", "copy_p", "reshape", "squeeze", "stop_gradient")
_TYPES = {"bool": "tl.int1", "int32": "tl.int32", "uint32": "tl.uint32"}


def rule_of(rules: tuple) -> Any:
    """`rule(q_pos, kv_pos, table)` for a kernel: the `mask_fn` of `rules[table]`, elementwise.

    `table` is a scalar, so that only one rule is evaluated; it is ignored if there is one rule.

    Raises:
      NotImplementedError: a `mask_fn` does what has no translation; the message names it.
    """
    return _compiled(source_of(rules))


@functools.lru_cache(maxsize=256)
def source_of(rules: tuple) -> str:
    """Triton source of `rule_of(rules)`.

    >>> from sparse_attn.patterns import sinks
    >>> print(source_of((sinks.Sinks(tokens=4),)))
    @triton.jit
    def rule(q_pos, kv_pos, table):
        yes = (q_pos == q_pos) & (kv_pos == kv_pos)
        no = yes ^ yes
        x0 = kv_pos < 4
        x1 = kv_pos <= q_pos
        x2 = x0 & x1
        visible = yes & x2
        return visible
    <BLANKLINE>
    """
    unique = tuple(dict.fromkeys(rules))
    lines = [
        "@triton.jit",
        "def rule(q_pos, kv_pos, table):",
        # A rule may look at one position only, or at none: these give every result one shape.
        "    yes = (q_pos == q_pos) & (kv_pos == kv_pos)",
        "    no = yes ^ yes",
    ]
    if len(unique) == 1:
        lines += _body(unique[0], "x", "    ")
    for number, rule in enumerate(unique) if len(unique) > 1 else ():
        tables = " | ".join(f"(table == {t})" for t, r in enumerate(rules) if r == rule)
        last = number == len(unique) - 1
        lines += ["    else:" if last else f"    {'el' if number else ''}if {tables}:"]
        # Triton merges equal names of two branches, so each branch has its own.
        lines += _body(rule, f"x{number}_", "        ")
    return "\n".join([*lines, "    return visible", ""])


def _body(rule, prefix, indent):
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    closed = jax.make_jaxpr(rule.mask_fn)(scalar, scalar)
    lines: list[str] = []
    try:
        (result,) = _translate(closed.jaxpr, closed.consts, ["q_pos", "kv_pos"], prefix, lines)
    except NotImplementedError as error:
        name = rule.expression() if isinstance(rule, base.Pattern) else repr(rule)
        raise NotImplementedError(f"mask_fn of {name} {error}") from None
    if not isinstance(result, str):
        result = "yes" if result else "no"
    return [indent + line for line in [*lines, f"visible = yes & {result}"]]


def _translate(jaxpr, consts, args, prefix, lines):
    """Appends the program to `lines`; its results, as names or (known values) NumPy scalars."""
    names = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    names |= dict(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return np.asarray(atom.val) if hasattr(atom, "val") else names[atom]

    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        values = [read(atom) for atom in equation.invars]
        if any(v.aval.shape for v in equation.outvars):
            raise NotImplementedError(f"makes an array ({name} of {equation.outvars[0].aval})")
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if (short := _division(inner, values, prefix, lines)) is not None:
            results = [short]
        elif name in _INLINED and inner is not None:
            inner = inner if hasattr(inner, "jaxpr") else jax.extend.core.ClosedJaxpr(inner, ())
            results = _translate(inner.jaxpr, inner.consts, values, prefix, lines)
        elif not any(isinstance(v, str) for v in values):
            results = _fold(equation, values)
        elif name in _UNCHANGED:
            results = values[:1]
        else:
            results = [f"{prefix}{len(lines)}"]
            lines.append(f"{results[0]} = {_expression(equation, values)}")
        names.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _division(inner, values, prefix, lines):
    """`x // n` or `x % n` by a known n > 0 in one to three operations, or None for anything else.

    Grids divide every position; the general form, for n of any sign, takes ten operations.
    """
    if inner is None or len(values) != 2 or not isinstance(values[0], str):
        return None
    n = values[1]
    if isinstance(n, str) or n.shape or n.dtype.kind != "i" or n < 1:
        return None
    x, n, program = values[0], int(n), str(inner)
    is_power = n & (n - 1) == 0
    if program in _programs_of(jnp.floor_divide):
        code = f"{x} >> {n.bit_length() - 1}" if is_power else f"{x} // {n} - ({x} % {n} < 0)"
    elif program in _programs_of(jnp.remainder):
        code = f"{x} & {n - 1}" if is_power else f"{x} % {n} + ({x} % {n} < 0) * {n}"
    else:
        return None
    lines.append(f"{prefix}{len(lines)} = {code.replace(' < 0)', ' < 0).to(tl.int32)')}")
    return f"{prefix}{len(lines) - 1}"


@functools.cache
def _programs_of(operator):
    """How JAX prints the body of `operator` for an int32 scalar and a number of either typing."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    programs = set()
    for n in (7, np.int32(7)):
        jaxpr = jax.make_jaxpr(lambda x, n=n: operator(x, n))(scalar).jaxpr
        programs.update(str(e.params["jaxpr"]) for e in jaxpr.eqns if "jaxpr" in e.params)
    return programs


def _fold(equation, values):
    """Results of an equation whose inputs are all known."""
    with jax.ensure_compile_time_eval():
        found = equation.primitive.bind(*map(jnp.asarray, values), **equation.params)
    found = found if equation.primitive.multiple_results else [found]
    return [np.asarray(x) for x in found]


def _expression(equation, values):
    """The Triton expression of one primitive with at least one operand that is not known."""
    name = equation.primitive.name
    kinds = {str(atom.aval.dtype) for atom in (*equation.invars, *equation.outvars)}
    if not kinds <= _TYPES.keys():
        raise NotImplementedError(f"computes in {', '.join(sorted(kinds - _TYPES.keys()))}")
    a, b, c = ([v if isinstance(v, str) else _literal(v) for v in values] + [None] * 3)[:3]
    match name:
        case _ if name in _INFIX:
            return f"{a} {_INFIX[name]} {b}"
        case _ if name in _CALL:
            return f"{_CALL[name]}({', '.join(x for x in (a, b) if x is not None)})"
        case "not":
            return f"{a} == 0" if kinds == {"bool"} else f"~{a}"
        case "neg":
            return f"-{a}"
        case "sign":
            return f"({a} > 0).to(tl.int32) - ({a} < 0).to(tl.int32)"
        case "square":
            return f"{a} * {a}"
        case "integer_pow" if equation.params["y"] > 0:
            return " * ".join([a] * equation.params["y"])
        case "clamp":  # lower bound, value, upper bound
            return f"tl.minimum(tl.maximum({b}, {a}), {c})"
        case "select_n" if len(values) == 3 and equation.invars[0].aval.dtype == bool:
            return f"tl.where({a}, {c}, {b})"
        case "convert_element_type":
            new = np.dtype(equation.params["new_dtype"]).name
            return f"{a} != 0" if new == "bool" else f"{a}.to({_TYPES[new]})"
        case "shift_right_logical":
            return f"({a}.to(tl.uint32) >> {b}).to(tl.int32)"
    raise NotImplementedError(f"uses {name}, which has no translation to Triton")


def _literal(value):
    if value.shape:
        raise NotImplementedError(f"reads an array of shape {value.shape}")
    # Typed, so that no operand is a bare Python number that Triton would fold in its own way.
    typed = value.dtype.name in _TYPES and (value.dtype == bool or abs(int(value)) >= 2**31)
    if typed:
        return f"tl.full([], {int(value)}, {_TYPES[value.dtype.name]})"
    return f"({value.item()})" if value.item() < 0 else f"{value.item()}"


@functools.lru_cache(maxsize=256)
def _compiled(source):
    # Triton reads a function's source through `inspect`, which asks `linecache` first.
    path = f"<rule {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    scope = {"triton": triton, "tl": tl, "__name__": __name__}
    exec(compile(source, path, "exec"), scope)
    return scope["rule"]
