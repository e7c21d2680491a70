"""The language of pipelines: which JSON is one, as pydantic models; a closed union of operations.

No user code, no patterns, no power, no repeated text. What has to be counted (depth, parts, the
sizes of values) is checked where a pipeline is compiled, in `pipelines.py`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictInt, model_validator

MAX_OPS = 64
MAX_NODES = 500
MAX_BATCH = 10_000
MAX_COUNT = 10**9  # of take and skip

FieldName = Annotated[str, Field(min_length=1, max_length=200)]
Count = Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


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
