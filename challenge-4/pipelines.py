"""Pipelines, compiled to the expressions and operations that everybody else uses too.

Each operation of a pipeline is one operation of the collection, so that explain, errors and limits
count alike. What does not fit is a `PipelineError` that names the operation.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from expressions import Expr, col, guarded, lit, record
from language import (
    MAX_BATCH,
    MAX_NODES,
    AggregateOp,
    BatchOp,
    Computed,
    Condition,
    DistinctOp,
    FilterOp,
    MapOp,
    Pipeline,
    SkipOp,
    TakeOp,
)
from lazy import LazyCollection

MAX_DEPTH = 16
MAX_VALUES = 1000  # of one `in`
MAX_TEXT = 10_000
MAX_KEYS = 100_000  # of distinct and aggregate: they are held in memory
MAX_GROUP_CHARACTERS = 32_000_000  # of what names the groups
LONG_TEXT = 64  # of which a key keeps a digest


class PipelineError(Exception):
    """A pipeline that does not fit; `number` is that of the operation, from 1."""

    def __init__(self, number: int, op: str, reason: str) -> None:
        super().__init__(f"op {number} {op}: {reason}")
        self.number = number


@dataclass
class Shape:
    """What the elements are at a point of the pipeline: rows with these fields, values, lists."""

    fields: frozenset[str] | None  # of rows; None: not known
    rows: bool = True
    size: int = 1  # the most rows in one element


def compile_pipeline(
    pipeline: Pipeline, source: LazyCollection[Any], fields: Iterable[str] | None
) -> LazyCollection[Any]:
    """The lazy collection of a pipeline over the rows of its data set; nothing runs."""
    shape = Shape(None if fields is None else frozenset(fields))
    chain: Any = source
    for number, op in enumerate(pipeline.ops, 1):
        compiler = _Compiler(number, op.op, shape)
        chain, shape = compiler.apply(chain, op)
    return chain  # type: ignore[no-any-return]


class _Compiler:
    """Compiles one operation, and counts what it holds."""

    def __init__(self, number: int, name: str, shape: Shape) -> None:
        self.number, self.name, self.shape = number, name, shape
        self.nodes = 0

    def error(self, reason: str) -> PipelineError:
        return PipelineError(self.number, self.name, reason)

    def apply(self, chain: Any, op: Any) -> tuple[Any, Shape]:
        if isinstance(op, FilterOp):
            return chain.filter(self.condition(op, 1)), self.shape
        if isinstance(op, MapOp):
            return self.map(chain, op)
        if isinstance(op, SkipOp):
            return chain.skip(op.n), self.shape
        if isinstance(op, TakeOp):
            return chain.take(op.n), self.shape
        if isinstance(op, BatchOp):
            size = op.size * self.shape.size
            if size > MAX_BATCH:
                raise self.error(f"batches of batches hold at most {MAX_BATCH:,} rows each.")
            return chain.batch(op.size), Shape(None, rows=False, size=size)
        if isinstance(op, DistinctOp):
            key = self.field(op.field) if op.field is not None else None
            kinds = guarded(fingerprint, key) if key is not None else fingerprint
            return chain.distinct(kinds, max_keys=MAX_KEYS), self.shape
        return self.aggregate(chain, op)

    def map(self, chain: Any, op: MapOp) -> tuple[Any, Shape]:
        if op.expr is not None:
            return chain.map(self.value(op.expr, 1)), Shape(None, False, self.shape.size)
        chosen = op.select or {}
        if isinstance(chosen, list):
            chosen = {name: name for name in chosen}
        fields = {
            name: self.field(what) if isinstance(what, str) else self.value(what, 1)
            for name, what in chosen.items()
        }
        return chain.map(record(fields)), Shape(frozenset(fields))

    def aggregate(self, chain: Any, op: AggregateOp) -> tuple[Any, Shape]:
        if clash := set(op.by) & set(op.values):
            raise self.error(f"{sorted(clash)[0][:64]} is both a group and a value.")
        keys = {name: self.field(name) for name in op.by}
        values: dict[str, tuple[str, Expr | None]] = {
            name: (figure.fn, self.field(figure.field) if figure.field else None)
                  for name, figure in op.values.items()}  # fmt: skip
        error = self.error(f"more than {MAX_KEYS:,} groups, or very long ones; filter first.")
        fields = frozenset([*op.by, *op.values])
        return chain.through(Aggregation(keys, values, error)), Shape(fields)

    # --- expressions ---

    def count(self, depth: int) -> None:
        self.nodes += 1
        if depth > MAX_DEPTH:
            raise self.error(f"the expression is more than {MAX_DEPTH} levels deep.")
        if self.nodes > MAX_NODES:
            raise self.error(f"the expression has more than {MAX_NODES} parts.")

    def field(self, name: str) -> Expr:
        if not self.shape.rows:
            raise self.error("the elements are values or lists here, which have no fields.")
        fields = self.shape.fields
        if fields is None or name in fields:
            return col(name, default=None)
        first, *path = name.split(".")
        if path and first in fields:
            return guarded(_Path(path), col(first, default=None))
        known = ", ".join(sorted(fields)[:20])
        raise self.error(f"there is no such field; there are: {known[:300]}.")

    def condition(self, condition: Condition, depth: int) -> Expr:
        self.count(depth)
        if condition.negated is not None:
            return ~self.condition(condition.negated, depth + 1)
        several = condition.all_of or condition.any_of
        if several is not None:
            return self.balanced(
                "and" if condition.all_of is not None else "or",
                [self.condition(part, depth + 1) for part in several],
            )
        field = self.field(condition.field or "")
        return self.comparison(field, condition.cmp or "", condition.value)

    def balanced(self, op: str, parts: list[Expr]) -> Expr:
        """Many parts as a tree of little depth, in their order."""
        while len(parts) > 1:
            parts = [
                Expr(op, *parts[at : at + 2]) if at + 1 < len(parts) else parts[at]
                for at in range(0, len(parts), 2)
            ]
        return parts[0]

    def comparison(self, field: Expr, cmp: str, value: Any) -> Expr:
        if cmp == "is_null":
            if value not in (None, True, False):
                raise self.error("is_null takes true, false or nothing as its value.")
            return ~field.is_null() if value is False else field.is_null()
        if cmp == "in":
            if not isinstance(value, list) or len(value) > MAX_VALUES:
                raise self.error(f"in takes a list of at most {MAX_VALUES:,} values.")
            return field.is_in([self.scalar(one) for one in value])
        value = self.scalar(value)
        if cmp in ("contains", "startswith", "endswith"):
            if not isinstance(value, str):
                raise self.error(f"{cmp} takes a text.")
            return getattr(field, cmp)(value)  # type: ignore[no-any-return]
        return Expr(cmp, field, lit(value))

    def scalar(self, value: Any) -> Any:
        if isinstance(value, list | dict):
            raise self.error("a comparison takes a text, a number, true, false or null.")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise self.error(f"a text has at most {MAX_TEXT:,} characters.")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error("a number has to be finite.")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise self.error("a whole number has at most 64 bits.")
        return value

    def value(self, computed: Computed, depth: int) -> Expr:
        self.count(depth)
        ((name, inner),) = ((n, getattr(computed, n)) for n in computed.model_fields_set)
        if name == "field":
            return self.field(inner)
        if name == "value":
            return lit(self.scalar(inner))
        if name == "lower":
            return guarded(lowered, self.value(inner, depth + 1))
        left, right = (guarded(number, self.value(part, depth + 1)) for part in inner)
        if name in ("div", "floordiv", "mod"):
            right = guarded(divisor, right)
        return guarded(number, Expr(name, left, right))


# Functions that expressions of this language go through: total, and quick.


def number(value: Any) -> Any:
    """A finite number of at most 64 bits; anything else is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return value if -(2**63) <= value < 2**63 else None
    return None


def divisor(value: Any) -> Any:
    """A number that can be divided by."""
    return value or None


def lowered(value: Any) -> Any:
    """A text in lower case."""
    return value.lower() if isinstance(value, str) else None


def fingerprint(value: Any) -> Any:
    """Something small and hashable that is equal for equal values."""
    if isinstance(value, dict | list):
        return _digest(_canonical(value))
    if isinstance(value, str) and len(value) > LONG_TEXT:
        return _digest(value)
    return type(value) is bool, value


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _canonical(value: Any) -> Any:
    """The same text for equal values: 1.0 is 1."""
    if isinstance(value, dict):
        return {name: _canonical(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_canonical(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class _Path:
    """A way into nested objects; null where it leads nowhere."""

    __name__ = "path"

    def __init__(self, path: list[str]) -> None:
        self.path = path

    def __call__(self, value: Any) -> Any:
        for name in self.path:
            value = value.get(name) if isinstance(value, dict) else None
        return value


class Aggregation:
    """What makes the rows of the groups out of all rows."""

    __name__ = "aggregate"

    def __init__(
        self,
        keys: dict[str, Expr],
        values: dict[str, tuple[str, Expr | None]],
        error: PipelineError,
    ) -> None:
        self.keys, self.values, self.error = keys, values, error

    def __call__(self, rows: Iterator[Any]) -> Iterator[dict[str, Any]]:
        """The groups in the order of their first rows."""
        groups: dict[Any, tuple[dict[str, Any], list[_Tally]]] = {}
        characters = 0
        figures = [(_TALLIES[fn], field) for fn, field in self.values.values()]
        for row in rows:
            named = {name: field.evaluate(row) for name, field in self.keys.items()}
            key = fingerprint(named)
            if key not in groups:
                characters += len(str(named))
                if len(groups) >= MAX_KEYS or characters > MAX_GROUP_CHARACTERS:
                    raise self.error
                groups[key] = named, [tally() for tally, _ in figures]
            for tally, (_, field) in zip(groups[key][1], figures, strict=True):
                tally.add(None if field is None else field.evaluate(row))
        if not self.keys and not groups:
            groups[()] = {}, [tally() for tally, _ in figures]
        for named, tallies in groups.values():
            results = (tally.result() for tally in tallies)
            yield {**named, **dict(zip(self.values, results, strict=True))}


class _Tally:
    """Counts rows; subclasses keep one more figure."""

    def __init__(self) -> None:
        self.count = 0
        self.kept: Any = None

    def add(self, value: Any) -> None:
        del value
        self.count += 1

    def result(self) -> Any:
        return self.count


class _Numbers(_Tally):
    fold: Callable[[Any, Any], Any]

    def add(self, value: Any) -> None:
        if number(value) is not None:
            self.count += 1
            self.kept = value if self.kept is None else type(self).fold(self.kept, value)

    def result(self) -> Any:
        return number(self.kept)


class _Sum(_Numbers):
    fold = staticmethod(lambda a, b: a + b)

    def result(self) -> Any:
        return number(self.kept) if self.count else 0


class _Average(_Sum):
    def result(self) -> Any:
        return number(self.kept / self.count) if self.count else None


class _Least(_Numbers):
    fold = staticmethod(min)


class _Greatest(_Numbers):
    fold = staticmethod(max)


_TALLIES: dict[str, type[_Tally]] = {
    "count": _Tally, "sum": _Sum, "avg": _Average, "min": _Least, "max": _Greatest,
}  # fmt: skip
