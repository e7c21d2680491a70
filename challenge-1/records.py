"""What is pulled (`Product`) and what is delivered (`ProcessedRecord`)."""

import json
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    field_validator,
    model_validator,
)

LONGEST_PROCESSING_MS = 3_600_000.0


def _is_seen(text: str) -> bool:
    return any(each.isprintable() and not each.isspace() for each in text)


def _seen(text: str) -> str:
    if not _is_seen(text):  # such as a space of no width
        raise ValueError("must not be blank")
    return text


Text = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=1000),
    AfterValidator(_seen),
]
Price = Annotated[
    Decimal,
    Field(ge=0, le=1_000_000_000_000, allow_inf_nan=False),
    PlainSerializer(float, return_type=float, when_used="json"),
]


class Product(BaseModel):
    """One product, whatever its source called its parts; None is what the source did not say."""

    model_config = ConfigDict(frozen=True)

    source: Text
    id: Text
    name: Text
    price: Price | None = None
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")] | None = None
    category: Text | None = None
    stock: Annotated[int, Field(ge=0, le=2**53)] | None = None
    fetched_at: AwareDatetime


def product_event(product: Product, run_id: str) -> dict[str, Any]:
    """A product as an event: the built-in pipelines and those that select paths can read it."""
    data = json.loads(product.model_dump_json(exclude={"source", "fetched_at"}))
    stamp = product.fetched_at.isoformat().replace("+00:00", "Z")
    data |= {
        "category": product.category or "none",
        "value": None if product.price is None else float(product.price),
        "quantity": 1,
        "ts": stamp,
    }
    return {
        "event_id": f"{run_id}:{product.source}:{product.id}",
        "source": product.source,
        "event_type": "product",
        "timestamp": stamp,
        "data": data,
    }


class ProcessedRecord(BaseModel):
    """A record that may be delivered; `record_id` is what it is accepted once by downstream."""

    model_config = ConfigDict(frozen=True)

    record_id: Text
    source: Text
    timestamp: AwareDatetime
    processed_at: AwareDatetime
    priority: Annotated[int, Field(strict=True, ge=1, le=4)]
    processing_time_ms: Annotated[
        float, Field(strict=True, ge=0, le=LONGEST_PROCESSING_MS, allow_inf_nan=False)
    ]
    transformed_data: dict[str, Any]

    @field_validator("transformed_data")
    @classmethod
    def _says_something(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
            is_blank = _is_blank(value)
        except (TypeError, ValueError, RecursionError):
            raise ValueError("transformed data must be JSON with finite numbers") from None
        if is_blank:
            raise ValueError("transformed data must not be empty or blank")
        return value

    @model_validator(mode="after")
    def _ends_after_it_began(self) -> Self:
        if self.processed_at < self.timestamp:
            raise ValueError(
                f"processed_at ({_text(self.processed_at)}) lies before timestamp "
                f"({_text(self.timestamp)})"
            )
        return self


def _is_blank(value: object) -> bool:
    """Nothing in it can be seen, however deep it is nested."""
    if isinstance(value, dict):
        return all(_is_blank(key) or _is_blank(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_blank, value))
    return value is None or (isinstance(value, str) and not _is_seen(value))


def _text(moment: datetime) -> str:
    return moment.isoformat()
