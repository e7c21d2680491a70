"""Pipelines as JSON: a closed language that is compiled to the same expressions and operations.

No user code, no patterns, no power, no repeated text; depth, size and numbers are bounded. What
does not fit is a `PipelineError` that names the operation.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictInt, model_validator

from expressions import Expr, col, guarded, lit, record
from lazy import LazyCollection

MAX_OPS = 64
MAX_DEPTH = 16
MAX_NODES = 500
MAX_BATCH = 10_000
MAX_COUNT = 10**9  # of take and skip
MAX_VALUES = 1000  # of one `in`
MAX_TEXT = 10_000
MAX_KEYS = 100_000  # of distinct and aggregate: they are held in memory

FieldName = Annotated[str, Field(min_length=1, max_length=200)]
Count = Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)]


class PipelineError(Exception):
    """A pipeline that does not fit; `number` is that of the operation, from 1."""

    def __init__(self, number: int, op: str, reason: str) -> None:
        super().__init__(f"op {number} {op}: {reason}")
        self.number = number


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Condition(_Strict):
    """Either `field`, `cmp` and `value`, or one of `and`, `or`, `not`."""

    field: FieldName | None = Field(default=None, description="A field, or a path like data.amount")
    cmp: (
        Literal["eq", "ne", "lt", "le", "gt", "ge", "in", "contains", "startswith", "endswith",
                "is_null"] | None
    ) = None  # fmt: skip
    value: JsonValue = None
    all_of: "list[Condition] | None" = Field(
        default=None, alias="and", min_length=1, max_length=MAX_NODES
    )
    any_of: "list[Condition] | None" = Field(
        default=None, alias="or", min_length=1, max_length=MAX_NODES
    )
    negated: "Condition | None" = Field(default=None, alias="not")

    @model_validator(mode="after")
    def one_form(self) -> Self:
        """Exactly one way to say it."""
        forms = [self.field is not None or self.cmp is not None, self.all_of is not None,
                 self.any_of is not None, self.negated is not None]  # fmt: skip
        if sum(forms) != 1:
            raise ValueError("give either field, cmp and value, or one of and, or, not")
        if forms[0] and (self.field is None or self.cmp is None):
            raise ValueError("a comparison needs field and cmp")
        if forms[0] and self.cmp != "is_null" and "value" not in self.model_fields_set:
            raise ValueError("a comparison needs a value")
        if not forms[0] and "value" in self.model_fields_set:
            raise ValueError("value belongs to field and cmp")
        return self


class Computed(_Strict):
    """A value: exactly one of a field, a constant, or arithmetic on two values (numbers only)."""

    field: FieldName | None = None
    value: float | int | str | bool | None = None
    add: "Pair | None" = None
    sub: "Pair | None" = None
    mul: "Pair | None" = None
    div: "Pair | None" = None
    floordiv: "Pair | None" = None
    mod: "Pair | None" = None
    lower: "Computed | None" = None

    @model_validator(mode="after")
    def one_form(self) -> Self:
        """Exactly one way to say it."""
        if len(self.model_fields_set) != 1:
            raise ValueError("give exactly one of field, value, add, sub, mul, div, floordiv, mod, "
                             "lower")  # fmt: skip
        if self.value is None and "value" not in self.model_fields_set and all(
            getattr(self, name) is None for name in self.model_fields_set
        ):  # fmt: skip
            raise ValueError("it must not be null")
        return self


Pair = Annotated[list[Computed], Field(min_length=2, max_length=2)]


class FilterOp(Condition):
    """Keep the rows for which the condition holds. Comparing with null or an unlike type: no."""

    op: Literal["filter"]


class MapOp(_Strict):
    """Choose or compute: `select` gives rows of these fields, `expr` gives one value per row."""

    op: Literal["map"]
    select: list[FieldName] | dict[FieldName, FieldName | Computed] | None = Field(
        default=None, min_length=1, max_length=100
    )
    expr: Computed | None = None

    @model_validator(mode="after")
    def one_form(self) -> Self:
        """Exactly one way to say it."""
        if (self.select is None) is (self.expr is None):
            raise ValueError("give either select or expr")
        return self


class SkipOp(_Strict):
    """Leave out the first n."""

    op: Literal["skip"]
    n: Count


class TakeOp(_Strict):
    """Stop after n."""

    op: Literal["take"]
    n: Count


class BatchOp(_Strict):
    """Lists of `size` elements."""

    op: Literal["batch"]
    size: Annotated[StrictInt, Field(ge=1, le=MAX_BATCH)]


class DistinctOp(_Strict):
    """The first row of each kind: by one field, or by all of it."""

    op: Literal["distinct"]
    field: FieldName | None = None


class Figure(_Strict):
    """A figure over the rows of a group; what is no number is passed over, except by count."""

    fn: Literal["count", "sum", "avg", "min", "max"]
    field: FieldName | None = None

    @model_validator(mode="after")
    def needs_a_field(self) -> Self:
        """Only count works without."""
        if self.fn != "count" and self.field is None:
            raise ValueError(f"{self.fn} needs a field")
        return self


class AggregateOp(_Strict):
    """One row per group, or one row in all; groups come in the order of their first row."""

    op: Literal["aggregate"]
    by: list[FieldName] = Field(default=[], max_length=10)
    values: dict[FieldName, Figure] = Field(
        default={"count": Figure(fn="count")}, min_length=1, max_length=20
    )


AnyOp = Annotated[
    FilterOp | MapOp | SkipOp | TakeOp | BatchOp | DistinctOp | AggregateOp,
    Field(discriminator="op"),
]
OP_MODELS: dict[str, type[_Strict]] = {
    "filter": FilterOp, "map": MapOp, "skip": SkipOp, "take": TakeOp, "batch": BatchOp,
    "distinct": DistinctOp, "aggregate": AggregateOp,
}  # fmt: skip
OP_EXAMPLES: dict[str, dict[str, Any]] = {
    "filter": {"op": "filter", "or": [
        {"field": "elevation", "cmp": "gt", "value": 5000},
        {"not": {"field": "country", "cmp": "in", "value": ["US", "CA"]}},
    ]},
    "map": {"op": "map", "select": {
        "name": "name", "metres": {"mul": [{"field": "elevation"}, {"value": 0.3048}]},
    }},
    "skip": {"op": "skip", "n": 5},
    "take": {"op": "take", "n": 10},
    "batch": {"op": "batch", "size": 100},
    "distinct": {"op": "distinct", "field": "country"},
    "aggregate": {"op": "aggregate", "by": ["country"], "values": {
        "airports": {"fn": "count"}, "highest": {"fn": "max", "field": "elevation"},
    }},
}  # fmt: skip
EXAMPLE: dict[str, Any] = {
    "dataset": "airports",
    "ops": [
        {"op": "filter", "field": "elevation", "cmp": "gt", "value": 10000},
        {"op": "map", "select": ["icao", "name", "country", "elevation"]},
        {"op": "take", "n": 10},
    ],
}


class Pipeline(_Strict):
    """Operations on the rows of a data set."""

    model_config = ConfigDict(json_schema_extra={"example": EXAMPLE})

    dataset: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    ops: list[AnyOp] = Field(default=[], max_length=MAX_OPS)


# --- compiling --------------------------------------------------------------------------------


@dataclass
class Shape:
    """What the elements are at a point of the pipeline: rows with these fields, values, lists."""

    fields: frozenset[str] | None  # of rows; None: not known
    rows: bool = True


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
            return chain.batch(op.size), Shape(None, rows=False)
        if isinstance(op, DistinctOp):
            key = self.field(op.field) if op.field is not None else None
            kinds = guarded(fingerprint, key) if key is not None else fingerprint
            limit = _Limit(self.error(f"more than {MAX_KEYS:,} different keys; filter first."))
            return chain.distinct(kinds).tap(limit), self.shape
        return self.aggregate(chain, op)

    def map(self, chain: Any, op: MapOp) -> tuple[Any, Shape]:
        if op.expr is not None:
            return chain.map(self.value(op.expr, 1)), Shape(None, rows=False)
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
        error = self.error(f"more than {MAX_KEYS:,} groups; filter first.")
        fields = frozenset([*op.by, *op.values])
        return LazyCollection(Aggregated(chain, keys, values, error)), Shape(fields)

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
    """Something hashable that is equal for equal values."""
    if isinstance(value, dict):
        return "dict", frozenset((name, fingerprint(part)) for name, part in value.items())
    if isinstance(value, list):
        return "list", tuple(map(fingerprint, value))
    return type(value) is bool, value


class _Path:
    """A way into nested objects; null where it leads nowhere."""

    __name__ = "path"

    def __init__(self, path: list[str]) -> None:
        self.path = path

    def __call__(self, value: Any) -> Any:
        for name in self.path:
            value = value.get(name) if isinstance(value, dict) else None
        return value


class _Limit:
    """Raises when it is called too often."""

    __name__ = "limit"

    def __init__(self, error: PipelineError) -> None:
        self.error, self.calls = error, 0

    def __call__(self, _: Any) -> None:
        self.calls += 1
        if self.calls > MAX_KEYS:
            raise self.error


class Aggregated:
    """The groups of a collection as rows; read anew by each iteration."""

    def __init__(
        self,
        rows: LazyCollection[Any],
        keys: dict[str, Expr],
        values: dict[str, tuple[str, Expr | None]],
        error: PipelineError,
    ) -> None:
        self.rows, self.keys, self.values, self.error = rows, keys, values, error

    def __iter__(self) -> Iterator[dict[str, Any]]:
        groups: dict[Any, tuple[dict[str, Any], list[_Tally]]] = {}
        figures = [(_TALLIES[fn], field) for fn, field in self.values.values()]
        for row in self.rows:
            named = {name: field.evaluate(row) for name, field in self.keys.items()}
            key = fingerprint(named)
            if key not in groups:
                if len(groups) >= MAX_KEYS:
                    raise self.error
                groups[key] = named, [tally() for tally, _ in figures]
            for tally, (_, field) in zip(groups[key][1], figures, strict=True):
                tally.add(None if field is None else field.evaluate(row))
        if not self.keys and not groups:
            groups[()] = {}, [tally() for tally, _ in figures]
        for named, tallies in groups.values():
            results = (tally.result() for tally in tallies)
            yield {**named, **dict(zip(self.values, results, strict=True))}

    def __repr__(self) -> str:
        return "aggregate"


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
