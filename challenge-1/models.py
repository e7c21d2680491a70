"""The shapes of the answers, and the examples shown in the documentation."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from records import ProcessedRecord as ProcessedRecord
from records import Product as Product


class RecordError(BaseModel):
    """Why one record was refused; `line` counts from 1 (NDJSON), `index` from 0 (arrays)."""

    line: int | None = Field(default=None, examples=[2])
    index: int | None = None
    offset: int = Field(description="Byte offset of the record in the decoded body.")
    code: Literal["malformed", "encoding", "depth", "shape", "too_large"]
    message: str


class Accepted(BaseModel):
    """The body is durable; `position` is where the log ends after it."""

    accepted: int
    rejected: int
    duplicates: int
    errors: list[RecordError] = Field(description="The first 20.")
    position: int


class AggregateItem(BaseModel):
    """One window of one group."""

    pipeline: str
    window_start: str
    window_end: str
    group: dict[str, str]
    values: dict[str, float | int]
    revision: int = Field(description="1, and one more for every late correction.")
    final: bool = Field(description="The watermark has passed the window's end.")


class AggregatePage(BaseModel):
    """A page of aggregates; `next` is the cursor of the following one."""

    items: list[AggregateItem]
    next: str | None


class DeadLetterItem(BaseModel):
    """A rejected record: its bytes as text, or as base64 where they are no UTF-8."""

    id: int
    pipeline: str
    received_at: str
    position: int
    line: int | None
    index: int | None
    offset: int
    code: str
    message: str
    text: str | None = None
    base64: str | None = None


class DeadLetterPage(BaseModel):
    """A page of rejected records; `next` is the cursor of the following one."""

    items: list[DeadLetterItem]
    next: str | None


class Counts(BaseModel):
    """received = accepted + rejected + duplicates, always."""

    received: int
    accepted: int
    rejected: int
    duplicates: int
    late: int


class PipelineCounts(Counts):
    """The counts of a pipeline, and those of its sources where events name one."""

    sources: dict[str, Counts]


class LatencyFigures(BaseModel):
    """Of acknowledgements in the last 30 to 60 s, in milliseconds; null where there were none."""

    count: int
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None


class LatestWindow(BaseModel):
    """The latest window of one source and event type."""

    source: str
    event_type: str
    window_start: str
    window_end: str
    values: dict[str, float | int]
    final: bool


class StatsAnswer(Counts):
    """The state of the service now."""

    applied: int = Field(description="Events that can be seen in the aggregates.")
    backlog_events: int = Field(description="0 when everything acknowledged is applied.")
    backlog_bytes: int
    events_per_second: float = Field(description="Mean of the last ten whole seconds.")
    latency: LatencyFigures
    pipelines: dict[str, PipelineCounts]
    aggregations: list[LatestWindow]
    queue: dict[str, Any]
    resources: dict[str, Any]


WEBHOOK_EVENT = {
    "data": {"category": "books", "value": 12.5, "quantity": 2, "ts": "2026-01-15T10:00:03Z"}
}
SOURCE_EVENT = {
    "event_id": "evt-0001",
    "source": "shop",
    "event_type": "order",
    "data": {"amount": 49.9, "items": 3},
    "timestamp": "2026-01-15T10:00:04Z",
}
SOURCE_EVENTS = [
    {**SOURCE_EVENT, "event_id": "evt-0002"},
    {**SOURCE_EVENT, "event_id": "evt-0003", "event_type": "refund", "data": {"amount": -9.5}},
]
