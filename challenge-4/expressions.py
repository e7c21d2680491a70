"""Expressions: one small tree that is Python code, SQL, JSON and text.

`col("amount") > 50` builds a tree and computes nothing. The executor writes it into the loop it
generates, a SQL source writes it into its WHERE; both give the same answer, or SQL does not get it.
The one rule that differs from plain Python makes that possible: comparing with None or with an
unlike type is false, and arithmetic with None is None.
"""

import decimal
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# In a template these two stand for the element and for the next constant.
VALUE, CONSTANT = "\0", "\1"
MAX_INLINE_DEPTH = 40  # the parser of Python gives up at 100 nested brackets
MAX_DEPTH = 300  # evaluating recurses
# What a template may raise where the rules above know an answer: `evaluate` then gives it.
GUARD = (TypeError, AttributeError, decimal.InvalidOperation)


class Face(NamedTuple):
    """How one element's computation is written into generated code."""

    template: str
    constants: tuple[Any, ...]
    guarded: bool  # it may raise one of GUARD where `evaluate` has an answer


_ARITHMETIC: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "add": ("+", operator.add),
    "sub": ("-", operator.sub),
    "mul": ("*", operator.mul),
    "div": ("/", operator.truediv),
    "floordiv": ("//", operator.floordiv),
    "mod": ("%", operator.mod),
}
_ORDER: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "lt": ("<", operator.lt),
    "le": ("<=", operator.le),
    "gt": (">", operator.gt),
    "ge": (">=", operator.ge),
}
COMPARISONS = {"eq": "==", "ne": "!=", **{name: sign for name, (sign, _) in _ORDER.items()}}
_BOOLEAN = {*COMPARISONS, "and", "or", "not", "is_null", "is_in", "contains", "startswith",
            "endswith"}  # fmt: skip
# Others raise in code where they are None by rule, or never are.
_MAYBE_NONE = {"col", "get", "it", "item", "alias", "apply", "record"}
_TEXT = {"contains", "startswith", "endswith"}
_ABSENT: Any = object()


class Expr:
    """A computation on one element, not yet made; combine with `+ - * / // %`, `== <`, `& | ~`."""

    __slots__ = ("_face", "args", "depth", "op")
    op: str
    args: tuple[Any, ...]
    depth: int
    _face: Face | None

    def __init__(self, op: str, *args: Any) -> None:
        depth = 1 + max((arg.depth for arg in args if isinstance(arg, Expr)), default=0)
        if depth > MAX_DEPTH:
            raise ValueError(f"An expression nests at most {MAX_DEPTH} levels deep.")
        put = object.__setattr__
        put(self, "op", op)
        put(self, "args", args)
        put(self, "depth", depth)
        put(self, "_face", None)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("An expression cannot be changed; combine it into a new one.")

    def __reduce__(self) -> tuple[Any, ...]:
        return Expr, (self.op, *self.args)

    # --- operators ---

    def __add__(self, other: Any) -> "Expr":
        return Expr("add", self, _operand(other))

    def __radd__(self, other: Any) -> "Expr":
        return Expr("add", _operand(other), self)

    def __sub__(self, other: Any) -> "Expr":
        return Expr("sub", self, _operand(other))

    def __rsub__(self, other: Any) -> "Expr":
        return Expr("sub", _operand(other), self)

    def __mul__(self, other: Any) -> "Expr":
        return Expr("mul", self, _operand(other))

    def __rmul__(self, other: Any) -> "Expr":
        return Expr("mul", _operand(other), self)

    def __truediv__(self, other: Any) -> "Expr":
        return Expr("div", self, _operand(other))

    def __rtruediv__(self, other: Any) -> "Expr":
        return Expr("div", _operand(other), self)

    def __floordiv__(self, other: Any) -> "Expr":
        return Expr("floordiv", self, _operand(other))

    def __rfloordiv__(self, other: Any) -> "Expr":
        return Expr("floordiv", _operand(other), self)

    def __mod__(self, other: Any) -> "Expr":
        return Expr("mod", self, _operand(other))

    def __rmod__(self, other: Any) -> "Expr":
        return Expr("mod", _operand(other), self)

    def __neg__(self) -> "Expr":
        return Expr("sub", lit(0), self)

    def __eq__(self, other: object) -> "Expr":  # type: ignore[override]
        return Expr("eq", self, _operand(other))

    def __ne__(self, other: object) -> "Expr":  # type: ignore[override]
        return Expr("ne", self, _operand(other))

    def __lt__(self, other: Any) -> "Expr":
        return Expr("lt", self, _operand(other))

    def __le__(self, other: Any) -> "Expr":
        return Expr("le", self, _operand(other))

    def __gt__(self, other: Any) -> "Expr":
        return Expr("gt", self, _operand(other))

    def __ge__(self, other: Any) -> "Expr":
        return Expr("ge", self, _operand(other))

    def __and__(self, other: Any) -> "Expr":
        return Expr("and", self, _operand(other))

    def __rand__(self, other: Any) -> "Expr":
        return Expr("and", _operand(other), self)

    def __or__(self, other: Any) -> "Expr":
        return Expr("or", self, _operand(other))

    def __ror__(self, other: Any) -> "Expr":
        return Expr("or", _operand(other), self)

    def __invert__(self) -> "Expr":
        return Expr("not", self)

    def __getitem__(self, key: str | int) -> "Expr":
        return Expr("item", self, lit(key))

    __hash__ = object.__hash__
    __iter__ = None  # otherwise __getitem__ would make it look like an endless sequence

    def __bool__(self) -> bool:
        raise TypeError(
            f"{self} has no truth value before it meets an element. Use & | ~ instead of "
            "and, or, not, and brackets around comparisons."
        )

    # --- named operations ---

    def is_null(self) -> "Expr":
        """Whether it is None."""
        return Expr("is_null", self)

    def is_in(self, values: Any) -> "Expr":
        """Whether it equals one of the values; None never does."""
        if isinstance(values, str | bytes | Expr):
            raise TypeError("is_in() takes a collection of values, such as a list.")
        return Expr("is_in", self, lit(tuple(values)))

    def contains(self, part: str) -> "Expr":
        """Whether the text has this part, taken literally."""
        return Expr("contains", self, lit(_text("contains", part)))

    def startswith(self, part: str) -> "Expr":
        """Whether the text begins with this part, taken literally."""
        return Expr("startswith", self, lit(_text("startswith", part)))

    def endswith(self, part: str) -> "Expr":
        """Whether the text ends with this part, taken literally."""
        return Expr("endswith", self, lit(_text("endswith", part)))

    def lower(self) -> "Expr":
        """The text in lower case; None for what is no text."""
        return Expr("lower", self)

    def alias(self, name: str) -> "Expr":
        """The same under another name, for `select`."""
        return Expr("alias", self, name)

    # --- what it is for ---

    @property
    def face(self) -> Face | None:
        """The code of it, or None when it nests too deep to be written into a loop."""
        if self.depth > MAX_INLINE_DEPTH:
            return None
        if self._face is None:
            constants: list[Any] = []
            template, guarded = _write(self, constants)
            object.__setattr__(self, "_face", Face(template, tuple(constants), guarded))
        return self._face

    def evaluate(self, element: Any) -> Any:
        """What it is for this element: the definition that code and SQL have to agree with."""
        return _EVALUATE[self.op](self, element)

    __call__ = evaluate

    def __repr__(self) -> str:
        return describe(self)

    def columns(self) -> set[str] | None:
        """The columns it reads, or None when it reads the element as a whole."""
        if self.op in ("col", "get"):
            return {self.args[0]}
        if self.op == "it":
            return None
        found: set[str] = set()
        parts = self.args[0].values() if self.op == "record" else self.args
        for part in parts:
            if isinstance(part, Expr):
                if (columns := part.columns()) is None:
                    return None
                found |= columns
        return found


def col(name: str, default: Any = _ABSENT) -> Expr:
    """The field of this name; a record without it is an error, unless a default is given."""
    if not isinstance(name, str):
        raise TypeError(f"col() takes the name of a field, not {type(name).__name__}.")
    return Expr("col", name) if default is _ABSENT else Expr("get", name, default)


def lit(value: Any) -> Expr:
    """A constant as an expression."""
    return Expr("lit", value)


it = Expr("it")


def record(fields: Mapping[str, Expr]) -> Expr:
    """A dict of expressions."""
    return Expr("record", dict(fields))


def guarded(function: Callable[[Any], Any], value: Expr) -> Expr:
    """The value after a function of ours, such as one that lets only numbers through."""
    return Expr("apply", function, value)


def _operand(value: Any) -> Expr:
    return value if isinstance(value, Expr) else Expr("lit", value)


def _text(name: str, part: Any) -> str:
    if not isinstance(part, str):
        raise TypeError(f"{name}() takes a text, not {type(part).__name__}.")
    return part


# --- evaluation: the definition ---------------------------------------------------------------


def _equal(expr: Expr, element: Any) -> bool:
    left, right = expr.args
    if _is_none(left) or _is_none(right):
        return False
    value = left.evaluate(element)
    other = right.evaluate(element)
    if value is None or other is None:
        return False
    return bool(value == other)


def _unequal(expr: Expr, element: Any) -> bool:
    left, right = expr.args
    if _is_none(left) or _is_none(right):
        return False
    value = left.evaluate(element)
    if value is None:
        return False
    other = right.evaluate(element)
    return other is not None and bool(value != other)


def _ordered(expr: Expr, element: Any) -> bool:
    left, right = expr.args
    if _is_none(left) or _is_none(right):
        return False
    value = left.evaluate(element)
    other = right.evaluate(element)
    if value is None or other is None:
        return False
    try:
        return bool(_ORDER[expr.op][1](value, other))
    except (TypeError, decimal.InvalidOperation):  # the latter from a decimal that is no number
        return False


def _arithmetic(expr: Expr, element: Any) -> Any:
    value = expr.args[0].evaluate(element)
    other = expr.args[1].evaluate(element)
    try:
        return _ARITHMETIC[expr.op][1](value, other)
    except TypeError:
        if value is None or other is None:
            return None
        raise


def _member(expr: Expr, element: Any) -> bool:
    value = expr.args[0].evaluate(element)
    return value is not None and any(value == one for one in candidates(expr.args[1].args[0]))


def _holds_text(expr: Expr, element: Any) -> bool:
    value = expr.args[0].evaluate(element)
    part = expr.args[1].args[0]
    try:
        return bool(part in value if expr.op == "contains" else getattr(value, expr.op)(part))
    except GUARD:
        return False


def _lower(expr: Expr, element: Any) -> Any:
    value = expr.args[0].evaluate(element)
    return value.lower() if hasattr(value, "lower") else None


def _item(expr: Expr, element: Any) -> Any:
    value = expr.args[0].evaluate(element)
    return None if value is None else value[expr.args[1].args[0]]


def candidates(values: tuple[Any, ...]) -> list[Any]:
    """What `is_in` compares with: None and NaN equal nothing."""
    return [value for value in values if value is not None and not _is_nan(value)]


def _is_nan(value: Any) -> bool:
    if isinstance(value, decimal.Decimal):
        return value.is_nan()  # even comparing it with itself can be an error
    return isinstance(value, float) and value != value


def _is_none(expr: Expr) -> bool:
    return expr.op == "lit" and expr.args[0] is None


_EVALUATE: dict[str, Callable[[Expr, Any], Any]] = {
    "col": lambda e, v: v[e.args[0]],
    "get": lambda e, v: v.get(e.args[0], e.args[1]),
    "it": lambda _e, v: v,
    "lit": lambda e, _v: e.args[0],
    "eq": _equal,
    "ne": _unequal,
    **dict.fromkeys(_ORDER, _ordered),
    **dict.fromkeys(_ARITHMETIC, _arithmetic),
    "and": lambda e, v: bool(e.args[0].evaluate(v) and e.args[1].evaluate(v)),
    "or": lambda e, v: bool(e.args[0].evaluate(v) or e.args[1].evaluate(v)),
    "not": lambda e, v: not e.args[0].evaluate(v),
    "is_null": lambda e, v: e.args[0].evaluate(v) is None,
    "is_in": _member,
    **dict.fromkeys(_TEXT, _holds_text),
    "lower": _lower,
    "item": _item,
    "alias": lambda e, v: e.args[0].evaluate(v),
    "record": lambda e, v: {name: part.evaluate(v) for name, part in e.args[0].items()},
    "apply": lambda e, v: e.args[0](e.args[1].evaluate(v)),
}


# --- as code ----------------------------------------------------------------------------------


def _write(expr: Expr, constants: list[Any]) -> tuple[str, bool]:
    """The template of an expression, and whether it needs the guard. Constants in text order."""
    op, args = expr.op, expr.args
    guard = False

    def constant(value: Any) -> str:
        constants.append(value)
        return CONSTANT

    def part(number: int) -> str:
        nonlocal guard
        text, needs = _write(args[number], constants)
        guard = guard or needs
        return text

    if op == "col":
        return f"{VALUE}[{constant(args[0])}]", False
    if op == "get":
        return f"{VALUE}.get({constant(args[0])}, {constant(args[1])})", True
    if op == "it":
        return VALUE, False
    if op == "lit":
        return constant(args[0]), False
    if op in COMPARISONS and (_is_none(args[0]) or _is_none(args[1])):
        return "False", False
    if op == "eq":
        # A chain of comparisons evaluates each operand once: two equal columns must not be None.
        both = args[0].op in _MAYBE_NONE and args[1].op in _MAYBE_NONE
        text = f"({part(0)} == {part(1)}{' is not None' if both else ''})"
    elif op == "ne":
        left = "None is not " if args[0].op in _MAYBE_NONE else ""
        right = " is not None" if args[1].op in _MAYBE_NONE else ""
        text = f"({left}{part(0)} != {part(1)}{right})"
    elif op in _ORDER:
        text, guard = f"({part(0)} {COMPARISONS[op]} {part(1)})", True
    elif op in _ARITHMETIC:
        text, guard = f"({part(0)} {_ARITHMETIC[op][0]} {part(1)})", True
    elif op in ("and", "or"):
        text = f"({_truth(args[0], part(0))} {op} {_truth(args[1], part(1))})"
    elif op == "not":
        text = f"(not {part(0)})"
    elif op == "is_null":
        text, guard = f"({part(0)} is None)", True
    elif op == "is_in":
        values: Any = candidates(expr.args[1].args[0])
        try:
            values = frozenset(values)
        except TypeError:
            values = tuple(values)
        text, guard = f"({part(0)} in {constant(values)})", True
    elif op == "contains":
        # The constant comes first in the text, so it has to be put down first.
        text, guard = f"({constant(args[1].args[0])} in {part(0)})", True
    elif op in _TEXT:
        text, guard = f"{part(0)}.{op}({constant(args[1].args[0])})", True
    elif op == "lower":
        text, guard = f"{part(0)}.lower()", True
    elif op == "item":
        text, guard = f"{part(0)}[{constant(args[1].args[0])}]", True
    elif op == "apply":
        text, guard = f"{constant(args[0])}({part(1)})", True
    elif op == "record":
        fields = []
        for name, field in args[0].items():
            key = constant(name)
            value, needs = _write(field, constants)
            guard = guard or needs
            fields.append(f"{key}: {value}")
        text = "{" + ", ".join(fields) + "}"
    else:  # alias
        text = part(0)
    return text, guard


def _truth(expr: Expr, text: str) -> str:
    return text if expr.op in _BOOLEAN else f"(not not {text})"


# --- as text ----------------------------------------------------------------------------------


def describe(expr: Expr) -> str:
    """The expression as one would write it."""
    op, args = expr.op, expr.args
    if op == "col":
        return f"col({args[0]!r})"
    if op == "get":
        return f"col({args[0]!r}, default={args[1]!r})"
    if op == "it":
        return "it"
    if op == "lit":
        text = repr(args[0])
        return text if len(text) <= 40 else f"{text[:37]}..."
    if op == "record":
        return "{" + ", ".join(f"{name!r}: {describe(e)}" for name, e in args[0].items()) + "}"
    if op == "apply":
        return f"{args[0].__name__}({describe(args[1])})"
    if op == "alias":
        return f"{describe(args[0])}.alias({args[1]!r})"
    if op == "not":
        return f"~{describe(args[0])}"
    if op == "item":
        return f"{describe(args[0])}[{describe(args[1])}]"
    signs = {**COMPARISONS, **{name: sign for name, (sign, _) in _ARITHMETIC.items()},
             "and": "&", "or": "|"}  # fmt: skip
    if op in signs:
        return f"({describe(args[0])} {signs[op]} {describe(args[1])})"
    return f"{describe(args[0])}.{op}({', '.join(describe(arg) for arg in args[1:])})"


def conjuncts(expr: Expr) -> list[Expr]:
    """The parts that all have to hold, from left to right."""
    if expr.op != "and":
        return [expr]
    return [*conjuncts(expr.args[0]), *conjuncts(expr.args[1])]


def total_order(value: Any) -> tuple[Any, ...]:
    """A sort key for anything an expression gives: None, numbers (NaN last), text, the rest."""
    if value is None:
        return (0,)
    if isinstance(value, int | float | decimal.Decimal):
        return (1, 1, 0) if _is_nan(value) else (1, 0, value)
    if isinstance(value, str):
        return (2, value)
    return (3, type(value).__name__, value)
