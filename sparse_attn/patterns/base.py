"""The `Pattern` contract: a static, hashable rule saying which keys a query may attend to.

A pattern is one file in this folder: a frozen dataclass with a `mask_fn`, named after its module
(`local.py` holds `Local`), and a module constant `EXAMPLES` that feeds the contract tests. Nothing
else has to be edited: `find`, `parse` and the tests discover it by its module path.
"""

import ast
import dataclasses
import difflib
import importlib
import pathlib
import pkgutil
from typing import Any, ClassVar

import numpy as np

from sparse_attn.masks import states

EMPTY, PARTIAL, FULL = (int(s) for s in states.BlockState)

_INT32_MAX = 2**31 - 1


class Expression:
    """What patterns, `PerHead` and `PerLayer` share: text that `parse` reads, and pictures."""

    def expression(self) -> str:
        """The expression that `parse` reads back; fields that have their default are left out.

        >>> parse("local(window=4) | sinks(tokens=1)").expression()
        '(local(window=4) | sinks(tokens=1))'
        """
        arguments = ", ".join(
            f"{field.name}={_text(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        )
        return f"{type(self).__module__.rsplit('.', 1)[-1]}({arguments})"

    def __str__(self) -> str:
        """The expression, a block map of 512 tokens and the densities: `print(pattern)`."""
        from sparse_attn.viz import show  # viz is a leaf: nothing imports it at start-up

        return show.text(self)

    def _repr_html_(self) -> str:
        from sparse_attn.viz import show

        return show.html(self)


def _text(value: Any) -> str:
    if isinstance(value, Expression):
        return value.expression()
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' * (len(value) == 1)})"
    return repr(value)


@dataclasses.dataclass(frozen=True)
class Pattern(Expression):
    """A rule `mask_fn(q_pos, kv_pos) -> bool` on absolute positions; True = may attend.

    Subclasses are frozen dataclasses, so equal patterns hash alike and are static under `jax.jit`.
    Compose with `&`, `|` and `~`.

    >>> from sparse_attn import patterns
    >>> pattern = patterns.parse("local(window=2) | sinks(tokens=1)")
    >>> pattern.mask_fn(np.arange(4)[:, None], np.arange(4)[None, :]).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [1, 0, 1, 1]])
    """

    # True when `block_state` never says PARTIAL for a block that is really EMPTY or FULL. Such
    # blocks need no element-wise check when the pattern is lowered.
    block_state_exact: ClassVar[bool] = False

    def mask_fn(self, q_pos, kv_pos):
        """Visibility of keys at `kv_pos` to queries at `q_pos`, elementwise.

        Both are int32 arrays (NumPy, JAX, or traced inside a kernel) that broadcast against each
        other; the result has their broadcast shape. Use only arithmetic, comparisons, `& | ~ ^`
        and shifts, so that the same code runs on the host and in every kernel.
        """
        raise NotImplementedError(f"{type(self).__name__} must define mask_fn(q_pos, kv_pos)")

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        """State of the blocks `[q_lo, q_hi) x [kv_lo, kv_hi)`: 0 EMPTY, 1 PARTIAL, 2 FULL.

        Vectorised over broadcastable integer arrays. Conservative: PARTIAL is always allowed,
        EMPTY and FULL must hold for every element. The default knows nothing.
        """
        shape = np.broadcast_shapes(*(np.shape(x) for x in (q_lo, q_hi, kv_lo, kv_hi)))
        return np.full(shape, PARTIAL, np.int8)

    @property
    def causal(self) -> bool:
        """True when no query may see a key after itself (checked by the contract tests)."""
        return False

    @property
    def may_be_empty(self) -> bool:
        """True when some query may see no key at all (checked by the contract tests)."""
        return False

    def __and__(self, other: "Pattern") -> "Pattern":
        return And(self, _as_pattern(other, "&"))

    def __or__(self, other: "Pattern") -> "Pattern":
        return Or(self, _as_pattern(other, "|"))

    def __invert__(self) -> "Pattern":
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError(
            f"{self!r} has no truth value; compose patterns with '&', '|', '~', "
            "not with 'and', 'or', 'not'"
        )


@dataclasses.dataclass(frozen=True)
class And(Pattern):
    """Visible when both `a` and `b` say so."""

    a: Pattern
    b: Pattern

    def mask_fn(self, q_pos, kv_pos):
        return self.a.mask_fn(q_pos, kv_pos) & self.b.mask_fn(q_pos, kv_pos)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        return least(
            self.a.block_state(q_lo, q_hi, kv_lo, kv_hi),
            self.b.block_state(q_lo, q_hi, kv_lo, kv_hi),
        )

    @property
    def causal(self) -> bool:
        return self.a.causal or self.b.causal

    @property
    def may_be_empty(self) -> bool:
        return True  # Two rules may each leave keys and share none.

    def expression(self) -> str:
        return f"({self.a.expression()} & {self.b.expression()})"


@dataclasses.dataclass(frozen=True)
class Or(Pattern):
    """Visible when `a` or `b` says so."""

    a: Pattern
    b: Pattern

    def mask_fn(self, q_pos, kv_pos):
        return self.a.mask_fn(q_pos, kv_pos) | self.b.mask_fn(q_pos, kv_pos)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        return greatest(
            self.a.block_state(q_lo, q_hi, kv_lo, kv_hi),
            self.b.block_state(q_lo, q_hi, kv_lo, kv_hi),
        )

    @property
    def causal(self) -> bool:
        return self.a.causal and self.b.causal

    @property
    def may_be_empty(self) -> bool:
        return self.a.may_be_empty and self.b.may_be_empty

    def expression(self) -> str:
        return f"({self.a.expression()} | {self.b.expression()})"


@dataclasses.dataclass(frozen=True)
class Not(Pattern):
    """Visible when `a` says it is not."""

    a: Pattern

    def mask_fn(self, q_pos, kv_pos):
        return ~self.a.mask_fn(q_pos, kv_pos)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        return FULL - self.a.block_state(q_lo, q_hi, kv_lo, kv_hi)

    @property
    def may_be_empty(self) -> bool:
        return True

    def expression(self) -> str:
        return f"~{self.a.expression()}"


def least(a, b):
    """The smaller of two integers or arrays (NumPy, JAX, traced), elementwise."""
    if _on_host(a, b):
        return np.minimum(a, b)
    return a * (a <= b) + b * (b < a)


def greatest(a, b):
    """The larger of two integers or arrays (NumPy, JAX, traced), elementwise."""
    if _on_host(a, b):
        return np.maximum(a, b)
    return a * (a >= b) + b * (b > a)


def _on_host(a, b):
    # Several times faster there than arithmetic, which a traced value needs.
    return all(isinstance(x, (int, np.ndarray, np.generic)) for x in (a, b)) and not (
        isinstance(a, int) and isinstance(b, int)
    )


def state_of(empty, full):
    """The `block_state` of a block known to be all-hidden (`empty`) or all-visible (`full`).

    >>> state_of(np.array([True, False, False]), np.array([False, False, True])).tolist()
    [0, 1, 2]
    """
    if _on_host(empty, full):
        return (np.int8(1) + full) * (empty ^ True)  # Bytes: a million blocks at a time.
    return (1 - 1 * empty) * (1 + 1 * full)


def check_int(name: str, value: Any, *, least: int = 1, most: int = _INT32_MAX) -> None:
    """Checks a field that must be an int; positions are int32, so no field may exceed that.

    Raises:
      ValueError: `value` is not an int in `[least, most]`.

    >>> check_int("window", 0)
    Traceback (most recent call last):
    ValueError: window=0 must be an int >= 1
    """
    if type(value) is int and least <= value <= most:
        return
    below = "" if type(value) is not int or value < least else f" and <= {most}"
    raise ValueError(f"{name}={value!r} must be an int >= {least}{below}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Checks a field that names one of several rules.

    Raises:
      ValueError: `value` is none of `choices`.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def _as_pattern(value: Any, operator: str) -> Pattern:
    if not isinstance(value, Pattern):
        raise TypeError(f"'{operator}' combines patterns, got {type(value).__name__}")
    return value


def discover(package: str = "sparse_attn.patterns") -> tuple[str, ...]:
    """Names of all pattern modules of `package`, sorted.

    >>> "local" in discover()
    True
    """
    path = importlib.import_module(package).__path__
    return tuple(sorted(m.name for m in pkgutil.iter_modules(path) if m.name != "base"))


def find(name: str, package: str = "sparse_attn.patterns", *others: str) -> type:
    """The class of module `name` in the first of these packages that has it.

    `find("local")` is `patterns.local.Local`.

    Raises:
      ValueError: no such module; the message lists the names there are, the nearest one first.

    >>> find("local").__name__
    'Local'
    """
    known = {n: p for p in reversed((package, *others)) for n in discover(p)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        names = ", ".join(sorted(known))
        raise ValueError(f"pattern={name!r} is unknown; {hint}known: {names}")
    module = importlib.import_module(f"{known[name]}.{name}")
    class_name = "".join(part.capitalize() for part in name.split("_"))
    if not hasattr(module, class_name):
        raise ValueError(f"pattern={name!r}: module {module.__name__} must define {class_name}")
    return getattr(module, class_name)


def parse(text: str, package: str = "sparse_attn.patterns"):
    """Reads a pattern from an expression of calls, literals and `& | ~`; nothing is evaluated.

    `pattern.expression()` is such an expression. Names are the module names in this folder, so
    that a config or a command line can say `"local(window=64) | sinks(tokens=4)"`; and those in
    `selection/` and `models/mixers/`, which stand alone: `"pooled(top_k=8)"`, `"nsa(top_k=16)"`.

    Raises:
      ValueError: the text is not such an expression, or names an unknown pattern or field.

    >>> parse("local(window=4) & ~sinks(tokens=1)")
    And(a=Local(window=4, reach=None), b=Not(a=Sinks(tokens=1)))
    >>> parse("locale(window=4)")
    Traceback (most recent call last):
    ValueError: pattern='locale' is unknown; did you mean 'local'? known: ...
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"pattern={text!r} is not an expression: {error.msg}") from None
    try:
        pattern = _build(tree, text, package)
    except TypeError as error:  # An operator between things that are no patterns.
        raise ValueError(f"pattern={text!r}: {error}") from None
    if not isinstance(pattern, Expression):
        raise ValueError(f"pattern={text!r} must name a pattern, such as 'causal()'")
    return pattern


def _mixers(name: str) -> tuple[str, ...]:
    """The package of mixers where it has this name: Flax is loaded for those who name one."""
    folder = pathlib.Path(__file__).parents[1] / "models" / "mixers"
    return ("sparse_attn.models.mixers",) if (folder / f"{name}.py").is_file() else ()


def _build(node: ast.AST, text: str, package: str):
    def build(child):
        return _build(child, text, package)

    match node:
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return And(_as_pattern(build(left), "&"), _as_pattern(build(right), "&"))
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Or(_as_pattern(build(left), "|"), _as_pattern(build(right), "|"))
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return Not(_as_pattern(build(operand), "~"))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Constant(value=int() | float() | str() | bool() | None as value):
            return value
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return tuple(build(e) for e in elements)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(
            k.arg for k in keywords
        ):
            cls = find(
                name, package, "sparse_attn.patterns", "sparse_attn.selection", *_mixers(name)
            )
            try:
                return cls(*map(build, args), **{k.arg: build(k.value) for k in keywords})
            except TypeError as error:
                fields = ", ".join(f.name for f in dataclasses.fields(cls))
                raise ValueError(
                    f"pattern={text!r}: {name}() takes the fields ({fields}): {error}"
                ) from None
    raise ValueError(
        f"pattern={text!r}: {ast.unparse(node)!r} is not allowed; "
        "allowed are calls of pattern names, literals, '&', '|' and '~'"
    )
