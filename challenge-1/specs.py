"""A pipeline as data: what `PUT /pipelines/{name}` takes, checked as a whole, in sentences."""

import re
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from windows import IDLE_SECONDS, Window

MAX_PIPELINES: Final = 100
MAX_PATH_PARTS: Final = 16

_ALIAS: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_PART: Final = re.compile(r"[^.\x00-\x1f\"\\\u241f]{1,128}")


def _alias(text: str) -> str:
    if not _ALIAS.fullmatch(text):
        raise ValueError(
            "An alias is a name: up to 64 letters, digits, dashes and underscores, the first a "
            "letter or an underscore."
        )
    return text


def _path(text: str) -> str:
    parts = text.split(".")
    if len(parts) > MAX_PATH_PARTS or not all(map(_PART.fullmatch, parts)):
        raise ValueError(
            f"A path is up to {MAX_PATH_PARTS} names with dots between, such as order.amount: "
            "each of 1 to 128 characters, without quotes, backslashes and control characters."
        )
    return text


def _told(pattern: str) -> Any:
    """What the documentation says of it: the refusal is a sentence, and no pattern."""
    return Field(json_schema_extra={"pattern": f"^{pattern}$"})


Alias = Annotated[str, AfterValidator(_alias), _told(_ALIAS.pattern)]
DottedPath = Annotated[
    str, AfterValidator(_path), _told(rf"{_PART.pattern}(\.{_PART.pattern}){{0,15}}")
]
PipelineName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Scalar = str | bool | int | float | None
NUMERIC: Final = frozenset({"sum", "avg", "min", "max", "p50", "p95", "p99"})


SPEC_EXAMPLE: Final[dict[str, Any]] = {
    "select": {"shop": "shop.name", "amount": "order.amount", "state": "order.state"},
    "where": [{"field": "state", "cmp": "in", "value": ["paid", "sent"]}],
    "event_time": "order.at",
    "event_id": "order.id",
    "group_by": ["shop"],
    "aggregates": [
        {"op": "count"},
        {"op": "sum", "field": "amount"},
        {"op": "p95", "field": "amount"},
    ],
    "window": {
        "kind": "tumbling",
        "size_seconds": 60,
        "out_of_order_seconds": 5,
        "allowed_lateness_seconds": 3600,
    },
}


class Condition(BaseModel):
    """One condition on an alias; an event has to fulfil all of them to be counted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    field: Alias
    cmp: Literal["eq", "ne", "lt", "le", "gt", "ge", "in", "exists"]
    value: Scalar | list[Scalar] = None

    @model_validator(mode="after")
    def _fits(self) -> "Condition":
        value = self.value
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= each <= "\udfff" for each in text):
                raise ValueError("A text to compare with holds half of a UTF-16 pair.")
        if self.cmp == "in":
            if not isinstance(value, list) or not 1 <= len(value) <= 1000:
                raise ValueError("`in` needs a list of 1 to 1,000 values.")
        elif isinstance(value, list):
            raise ValueError(f"`{self.cmp}` compares with one value, not with a list.")
        elif self.cmp in ("lt", "le", "gt", "ge"):
            if value is None or isinstance(value, bool):
                raise ValueError(f"`{self.cmp}` compares with a number or a text.")
        elif self.cmp == "exists" and not isinstance(value, bool):
            if value is not None:
                raise ValueError("`exists` takes true or false.")
            self.value = True
        return self


class Aggregation(BaseModel):
    """One value of the result: `count`, `sum_<field>`, …"""

    model_config = ConfigDict(extra="forbid")

    op: Literal["count", "sum", "avg", "min", "max", "p50", "p95", "p99", "distinct"]
    field: Alias | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Aggregation":
        if self.field is None and self.op != "count":
            raise ValueError(f"`{self.op}` needs a field, which is an alias of `select`.")
        return self

    @property
    def label(self) -> str:
        """What the value is called."""
        return self.op if self.field is None else f"{self.op}_{self.field}"


class WindowSpec(BaseModel):
    """How the stream is cut; times are event times where `event_time` is given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    kind: Literal["tumbling", "sliding", "session", "none"]
    size_seconds: float | None = None
    slide_seconds: float | None = None
    gap_seconds: float | None = None
    out_of_order_seconds: float = Field(
        default=0, description="The watermark stays so far behind the greatest event time."
    )
    allowed_lateness_seconds: float = Field(
        default=0, description="For so long a closed window is revised; later events are `late`."
    )
    idle_timeout_seconds: float = Field(
        default=IDLE_SECONDS, description="A source quiet for so long closes its last window."
    )

    @model_validator(mode="after")
    def _fits(self) -> "WindowSpec":
        self.window()
        return self

    def window(self) -> Window:
        """The window as the pipeline works with it."""
        return Window.of(**self.model_dump())


class PipelineSpec(BaseModel):
    """What is read from an event, which events count, and what is added up by which groups."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"example": SPEC_EXAMPLE},
    )

    select: Annotated[dict[Alias, DottedPath], Field(min_length=1, max_length=64)]
    where: Annotated[list[Condition], Field(max_length=32)] = []
    event_time: DottedPath | None = None
    event_id: DottedPath | None = None
    group_by: Annotated[list[Alias], Field(max_length=16)] = []
    aggregates: Annotated[list[Aggregation], Field(min_length=1, max_length=64)]
    window: WindowSpec

    @model_validator(mode="after")
    def _fits(self) -> "PipelineSpec":
        used = [*self.group_by, *(c.field for c in self.where)]
        used += [a.field for a in self.aggregates if a.field is not None]
        if unknown := sorted(set(used) - self.select.keys()):
            raise ValueError(
                f"{', '.join(unknown)}: no alias of `select`. `group_by`, `field` and the fields "
                "of `where` name aliases, not paths."
            )
        if len(set(self.group_by)) < len(self.group_by):
            raise ValueError("`group_by` names an alias twice.")
        labels = [each.label for each in self.aggregates]
        if len(set(labels)) < len(labels):
            raise ValueError("`aggregates` asks for the same value twice.")
        for what in ("event_time", "event_id"):
            path = getattr(self, what)
            for alias in used:  # an alias that nothing uses may name it too: it is one value then
                if path is not None and path == self.select[alias]:
                    raise ValueError(
                        f"`{what}` and the alias `{alias}` read the same value, once as a time or "
                        f"an id and once as data. Leave `{alias}` out of `group_by`, `where` and "
                        "`aggregates`."
                    )
        if self.event_time is not None and self.event_time == self.event_id:
            raise ValueError("`event_time` and `event_id` cannot be the same value.")
        paths = {*self.select.values(), self.event_id, self.event_time} - {None}
        for path in paths:
            for whole in paths:
                if str(path).startswith(f"{whole}."):
                    raise ValueError(
                        f"`{whole}` cannot be a value and hold `{path}` as well: choose one."
                    )
        return self

    def canonical(self) -> str:
        """The same text for specs that mean the same."""
        return self.model_dump_json()

    def public(self) -> dict[str, Any]:
        """As it was put, without what was left out."""
        return self.model_dump(mode="json", exclude_defaults=True) | {
            "group_by": self.group_by,
            "window": self.window.model_dump(mode="json", exclude_none=True),
        }
