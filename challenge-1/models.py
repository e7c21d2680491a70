"""The shapes of the answers, and the examples shown in the documentation."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from records import ProcessedRecord as ProcessedRecord
from records import Product as Product


class RecordError(BaseModel):
    """Why one record was refused; `line` counts from 1 (NDJSON), `index` from 0 (arrays)."""

    line: int | None = Field(default=None, examples=[2])
    index: int | None = None
    offset: int | None = Field(
        description="Byte offset of the record in the decoded body; null with `records`."
    )
    code: Literal["malformed", "encoding", "depth", "shape", "too_large", "future"]
    message: str


class Accepted(BaseModel):
    """The body is durable; `position` is where the log ends after it."""

    accepted: int
    rejected: int
    duplicates: int
    filtered: int = Field(description="Outside of what `where` asks for; not received.")
    errors: list[RecordError] = Field(description="The first 20.")
    position: int


class AggregateItem(BaseModel):
    """One window of one group."""

    pipeline: str
    window_start: str | None = Field(description="Null where the pipeline has no windows.")
    window_end: str | None
    group: dict[str, str | int | float | None]
    values: dict[str, float | int | None]
    revision: int = Field(description="1, and one more for every late correction.")
    final: bool = Field(
        description="The watermark has passed the window's end plus the allowed lateness."
    )


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
    offset: int | None
    code: str
    message: str
    whole: bool = Field(description="These are all its bytes, so it can be replayed.")
    text: str | None = None
    base64: str | None = None


class DeadLetterPage(BaseModel):
    """A page of rejected records; `next` is the cursor of the following one."""

    items: list[DeadLetterItem]
    next: str | None


class Counts(BaseModel):
    """received = accepted + rejected + duplicates = aggregated + late + rejected + duplicates."""

    received: int
    accepted: int
    aggregated: int = Field(description="Accepted, and not late; counted, or about to be.")
    rejected: int
    duplicates: int
    late: int = Field(description="After the allowed lateness; kept in the dead letters.")
    revised: int = Field(description="Corrections of closed windows.")
    filtered: int = Field(description="Outside of what `where` asks for; not received.")


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
    window_start: str | None
    window_end: str | None
    values: dict[str, float | int | None]
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


class RebuildState(BaseModel):
    """How far a rebuild has come; reads see the old aggregates until it is done."""

    pipeline: str
    state: Literal["none", "running", "done"]
    origin: int | None = Field(default=None, description="The position it began from.")
    position: int | None = Field(default=None, description="Up to where the log has been read.")
    end: int = Field(description="Where the log ends now.")
    events: int = Field(default=0, description="Events in the new aggregates so far.")
    misfits: int = Field(default=0, description="Old records that do not fit the spec of today.")


class PipelineAnswer(BaseModel):
    """A pipeline as it is at work."""

    name: str
    built_in: bool
    position: int = Field(description="The log has it from here on.")
    spec: dict[str, Any] | None = Field(description="Null where a spec cannot say it all.")
    events_path: str
    rebuild: RebuildState | None = None


class PipelineList(BaseModel):
    """The pipelines, built-in ones first."""

    items: list[PipelineAnswer]


class ConsumerState(BaseModel):
    """Where a consumer stands."""

    consumer: str
    offset: int
    behind: int


class TopicAnswer(BaseModel):
    """What a topic holds; offsets of `ingest` are positions of the log, of the others numbers."""

    topic: str
    first: int
    next: int
    bytes: int
    consumers: list[ConsumerState]


class QueueAnswer(BaseModel):
    """The topics of the message queue."""

    topics: list[TopicAnswer]


class QueueItem(BaseModel):
    """One message."""

    offset: int
    value: Any


class QueuePage(BaseModel):
    """Messages, and the offset to commit once they are dealt with."""

    items: list[QueueItem]
    next: int


class Offset(BaseModel):
    """Where a consumer is to stand: `next` of the page it has dealt with."""

    offset: int = Field(ge=0, le=2**62, strict=True, examples=[0])


class Committed(BaseModel):
    """Where the consumer stands now."""

    topic: str
    consumer: str
    offset: int


class ReplayAnswer(BaseModel):
    """What became of the dead letters."""

    replayed: int = Field(description="Came to life, and are no dead letters any more.")
    duplicates: int = Field(description="Turned out to be known already; letters no more.")
    failed: int = Field(description="Were refused again, and are kept.")
    skipped: int = Field(description="Kept: not whole, or their pipeline is gone.")


class CleanupAnswer(BaseModel):
    """What was deleted, or would be."""

    deleted: dict[str, int]
    dry_run: bool


class PreviewItem(BaseModel):
    """One group of a previewed body."""

    group: str | int | float | None
    count: int | None = None
    sum: float | int | None = None


class PreviewAnswer(BaseModel):
    """What a body would come to; nothing of it is kept."""

    items: list[PreviewItem]
    events: int
    rejected: int
    errors: list[RecordError]


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
