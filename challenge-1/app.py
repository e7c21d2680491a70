"""HTTP in, HTTP out: the routes of the streaming pipeline.

The routes that take events are answered ahead of the router (`routes.py`), and documented here by
routes of the same path. Run it with `uvicorn app:app`, or with `python app.py` on PORT.
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import msgspec
import structlog
from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.concurrency import run_in_threadpool

import fetch_routes
import pipeline_routes
import queue_routes
import web
from growth import Growth
from models import (
    SOURCE_EVENT,
    SOURCE_EVENTS,
    WEBHOOK_EVENT,
    Accepted,
    AggregateItem,
    AggregatePage,
    CleanupAnswer,
    Counts,
    DeadLetterItem,
    DeadLetterPage,
    LatencyFigures,
    LatestWindow,
    PipelineCounts,
    PreviewAnswer,
    ReplayAnswer,
    StatsAnswer,
)
from pages import Question, Reading, as_csv, as_ndjson, link_next, read_cursor, write_cursor
from preview import preview
from results import item_of, letter_fields
from routes import BUILT_IN, IngestRoutes, Running, StreamingPaths, problem_of
from settings import Settings
from signatures import secrets_of
from sketches import SketchesMissing
from topics import TopicError
from utils import (
    Busy,
    Held,
    Pipeline,
    PipelineConflict,
    PipelineUnknown,
    QueueError,
    QueueRefused,
    StoreError,
    StoreRefused,
    Totals,
)

log = structlog.stdlib.get_logger("pipeline")
settings = web.read_settings(Settings)

STOP_SECONDS = 1.0  # to apply what is accepted when the server is told to stop
SIGNING_KEYS = (
    secrets_of(settings.webhook_secret.get_secret_value()) if settings.webhook_secret else []
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the data, run the applier, and hand everything over cleanly at the end."""
    pipeline = Pipeline.configured(settings, log)
    try:
        pipeline.__enter__()
    except (Held, StoreError, QueueError) as error:
        raise web.StartupRefused(str(error)) from error
    except OSError as error:
        raise web.StartupRefused(
            f"The data cannot be opened: {error.strerror} ({error.filename}). Set DB_PATH and "
            "QUEUE_DIR to places where this user may write."
        ) from error
    try:
        log.info("data", database=str(settings.db_path.resolve()),
                 message_queue=str(settings.queue_dir.resolve()),
                 backlog_bytes=pipeline.backlog_bytes)  # fmt: skip
        await pipeline.start_workers()
        app.state.pipeline = pipeline
        app.state.growth = Growth(pipeline)
        yield
        await pipeline.stop_workers(STOP_SECONDS)
    finally:
        pipeline.close()


def collect() -> Iterable[Metric]:
    """The figures of the pipeline for Prometheus."""
    pipeline: Pipeline | None = getattr(app.state, "pipeline", None)
    if pipeline is None:
        return
    events = CounterMetricFamily(
        "pipeline_events", "Events answered for.", labels=["pipeline", "outcome"]
    )
    for name, totals in pipeline.totals.items():
        for outcome in ("accepted", "rejected", "duplicates", "filtered"):
            events.add_metric([name, outcome], getattr(totals, outcome))
    yield events
    yield CounterMetricFamily(
        "pipeline_applied_events", "Events aggregated.", pipeline.applied_events
    )
    yield GaugeMetricFamily(
        "pipeline_backlog_events", "Acknowledged, not yet aggregated.", pipeline.backlog_events
    )
    yield GaugeMetricFamily(
        "pipeline_backlog_bytes", "Acknowledged, not yet aggregated.", pipeline.backlog_bytes
    )


app: FastAPI = web.create_app(
    title="Streaming pipeline",
    description="Webhooks and event files in, exact windowed aggregates out. An event that was "
    "answered with 202 is on the disk, and is counted exactly once.",
    lifespan=lifespan,
    api_key=settings.api_key.get_secret_value() if settings.api_key else None,
    log_level=settings.log_level,
    checks={
        "store": lambda: app.state.pipeline.store_works,
        "message_queue": lambda: app.state.pipeline.probe_queue(),
    },
    collect=collect,
    fast=IngestRoutes(BUILT_IN, SIGNING_KEYS),
    tags=[
        {"name": "ingest", "description": "Events in: durable before they are acknowledged."},
        fetch_routes.TAG,
        pipeline_routes.TAG,
        {"name": "results", "description": "Aggregates, figures and what was refused."},
        queue_routes.TAG,
        {"name": "service", "description": "Health, metrics and housekeeping."},
    ],
)
app.gate.streaming = StreamingPaths((*BUILT_IN, "/preview"))  # type: ignore[attr-defined]


for part in (pipeline_routes, queue_routes, fetch_routes):
    app.include_router(part.router)


async def refused(request: Request, error: Exception) -> Response:
    """What the pipeline refuses is no fault of the program."""
    if isinstance(error, StoreRefused):
        log.warning("store_refused", error=str(error))
        error = StoreRefused("The database cannot answer now; ask again.")
    problem = problem_of(error)
    if isinstance(error, TopicError):
        problem = web.Problem(404 if error.unknown else 422, str(error))
    if problem is None:
        raise error
    return web.problem_response(request.scope, problem)


for kind in (
    Busy,
    PipelineConflict,
    PipelineUnknown,
    QueueRefused,
    SketchesMissing,
    StoreRefused,
    TopicError,
):
    app.add_exception_handler(kind, refused)


# --- ingest -----------------------------------------------------------------------------------

_BODIES = (
    "The body is one JSON document or several one after the other (pretty-printed or not), a JSON "
    "array, or NDJSON (one document per line; also as `text/plain`, which is what to choose in "
    "this page), gzip or not, of any size; a large one becomes visible as a whole. With "
    "`records=features.item` the records are taken from inside a large document. A bad record "
    "costs its neighbours nothing: it is listed under `errors` and kept in `/dead-letters`. With "
    "WEBHOOK_SECRET set, requests must be signed after Standard Webhooks."
)


def _document(path: str, summary: str, description: str, example: Any) -> None:
    lines = example if isinstance(example, list) else [example]
    ndjson = "\n".join(msgspec.json.encode(line).decode() for line in lines) + "\n"
    text = {"schema": {"type": "string"}, "example": ndjson}
    content = {
        "application/json": {"schema": {}, "example": example},
        "text/plain": text,
        "application/x-ndjson": text,
    }

    async def documented(
        wait: Annotated[
            Literal["applied"] | None, Query(description="Answer once it is aggregated.")
        ] = None,
        records: Annotated[
            str | None,
            Query(max_length=512, description="Where the records stand, as `features.item`."),
        ] = None,
        idempotency_key: Annotated[
            str | None,
            Header(max_length=255, description="The same key gets the first answer again."),
        ] = None,
        webhook_id: Annotated[
            str | None, Header(description="Of a signed webhook; an idempotency key as well.")
        ] = None,
        webhook_timestamp: Annotated[str | None, Header()] = None,
        webhook_signature: Annotated[str | None, Header()] = None,
    ) -> Response:
        del wait, records, idempotency_key, webhook_id, webhook_timestamp, webhook_signature
        raise web.Problem(404, "There is no pipeline of this name.")  # the others are answered

    documented.__doc__ = description
    app.add_api_route(
        path,
        documented,
        methods=["POST"],
        status_code=202,
        tags=["ingest"],
        summary=summary,
        operation_id=path.strip("/").replace("/", "_").replace("{name}", "one"),
        response_model=None,
        responses={
            202: {"model": Accepted, "description": "Durable, and counted exactly once."},
            **web.problems(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 501, 503, 507),
        },
        openapi_extra={
            "requestBody": {"required": True, "content": content},
            **({"parameters": [_NAME_EXAMPLE]} if "{name}" in path else {}),
        },
    )


_NAME_EXAMPLE = {
    "name": "name", "in": "path", "required": True, "schema": {"type": "string"},
    "example": "webhook",
}  # fmt: skip

_document(
    "/webhook",
    "Take measurements",
    "Grouped by `category`: count, sum and average of `value`, sum of `quantity`, in tumbling "
    f"windows of event time. {_BODIES}",
    WEBHOOK_EVENT,
)
_document(
    "/webhook/ingest",
    "Take an event",
    "Grouped by `source` and `event_type`: count, and sum, average, least and greatest of every "
    "finite numeric member of `data`, in windows of 60 s that slide by 10 s. A repeated `event_id` "
    f"is a duplicate, whatever it holds. {_BODIES}",
    SOURCE_EVENT,
)
_document(
    "/webhook/batch",
    "Take a batch of events",
    f"Like `/webhook/ingest`, with an array or NDJSON in mind. {_BODIES}",
    SOURCE_EVENTS,
)
_document(
    "/pipelines/{name}/events",
    "Take events for a pipeline",
    f"What is read of an event, and how it counts, is what the pipeline says. {_BODIES}",
    WEBHOOK_EVENT,
)


@app.post(
    "/preview",
    tags=["ingest"],
    summary="Aggregate one body and keep nothing",
    operation_id="preview",
    responses=web.problems(400, 403, 408, 413, 415, 422, 429),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "text/plain": {
                    "schema": {"type": "string"},
                    "example": '{"shop": {"name": "a"}, "amount": 2.5}\n'
                    '{"shop": {"name": "b"}, "amount": 1}\n',
                },
                "application/json": {
                    "schema": {},
                    "example": [{"shop": {"name": "a"}, "amount": 2.5}],
                },
            },
        }
    },
)
async def preview_body(
    request: Request,
    pipeline: Running,
    group_by: Annotated[
        str | None, Query(max_length=512, examples=["shop.name"], description="A dotted path.")
    ] = None,
    sum_: Annotated[
        str | None, Query(alias="sum", max_length=512, description="The path of a number.")
    ] = None,
    count: Annotated[bool, Query(description="Count the events of each group.")] = True,
    records: Annotated[str | None, Query(max_length=512)] = None,
) -> PreviewAnswer:
    """Any body that the other routes take, of any size, in constant memory."""
    pipeline.admit()
    try:
        return await preview(request, group_by, sum_, count=count, records=records or "",
                             max_event_bytes=pipeline.max_event_bytes)  # fmt: skip
    except ValueError as error:
        problem = problem_of(error) or web.Problem(422, str(error))
        raise problem from error


# --- results ----------------------------------------------------------------------------------


@app.get("/aggregates", tags=["results"], summary="Windows and their values",
         operation_id="aggregates", responses=web.problems(403, 422, 503))  # fmt: skip
async def aggregates(
    request: Request,
    response: Response,
    pipeline: Running,
    question: Annotated[Question, Depends()],
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Annotated[str | None, Query(max_length=2048)] = None,
) -> AggregatePage:
    """Ordered by window, pipeline and group. Open windows are shown with `final` false."""
    after = read_cursor(cursor, (int, str, str, int)) if cursor else None
    question.check(after)

    def read() -> tuple[list[dict[str, Any]], list[Any]]:
        return Reading(pipeline.store, pipeline.shown, question).page(after, limit)

    items, end = await run_in_threadpool(read)
    following = write_cursor(end) if end else None
    link_next(request, response, following)
    return AggregatePage(items=[AggregateItem.model_validate(each) for each in items],
                         next=following)  # fmt: skip


@app.get(
    "/aggregates/export",
    tags=["results"],
    summary="Aggregates as NDJSON or CSV",
    operation_id="export_aggregates",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Streamed, a page at a time.",
            "content": {"application/x-ndjson": {"schema": {"type": "string"}},
                        "text/csv": {"schema": {"type": "string"}}},
        },
        **web.problems(403, 422, 503),
    },
)  # fmt: skip
async def export(
    pipeline: Running,
    question: Annotated[Question, Depends()],
    format_: Annotated[Literal["ndjson", "csv"], Query(alias="format")] = "ndjson",
) -> StreamingResponse:
    """All that is asked for, of any length, in constant memory; cut off, so that it cannot be taken
    for whole, when the aggregates are built anew meanwhile.

    As CSV the parts of the group and the values of one pipeline have columns of their own.
    """
    reading = await run_in_threadpool(Reading, pipeline.store, pipeline.shown, question)
    question.query(reading.projections)  # a bad question is told before the answer begins
    is_csv = format_ == "csv"
    return StreamingResponse(
        as_csv(reading, question.pipeline) if is_csv else as_ndjson(reading),
        media_type="text/csv; charset=utf-8" if is_csv else "application/x-ndjson",
        headers={"Content-Disposition": f'attachment; filename="aggregates.{format_}"'},
    )


@app.get("/stats", tags=["results"], summary="Counts, backlog and latencies",
         operation_id="stats", responses=web.problems(403, 503))  # fmt: skip
async def stats(pipeline: Running) -> StatsAnswer:
    """received = aggregated + duplicates + late + rejected, always, also after a crash."""
    by_source = await run_in_threadpool(pipeline.store.totals)
    latest = await run_in_threadpool(pipeline.store.latest, "events")
    every = Totals()
    shown = {}
    for name, totals in pipeline.totals.items():
        stored = by_source.get((name, ""), Totals())
        own = Totals(totals.accepted, totals.rejected, totals.duplicates, stored.late,
                     stored.revised, totals.filtered)  # fmt: skip
        every.add(own)
        sources = {
            source: Counts(**_counts(each))
            for (owner, source), each in by_source.items()
            if owner == name and source
        }
        shown[name] = PipelineCounts(**_counts(own), sources=sources)
    figures = pipeline.latencies.percentiles()
    return StatsAnswer(
        **_counts(every),
        applied=every.accepted - pipeline.backlog_events,
        backlog_events=pipeline.backlog_events,
        backlog_bytes=pipeline.backlog_bytes,
        events_per_second=pipeline.rate.per_second(),
        latency=LatencyFigures(
            count=figures.count, p50_ms=figures.p50, p95_ms=figures.p95, p99_ms=figures.p99
        ),
        pipelines=shown,
        aggregations=[_latest_window(pipeline, row) for row in latest],
        queue=vars(pipeline.queue.statistics()),
        resources=pipeline.get_resource_metrics(),
    )


def _counts(totals: Totals) -> dict[str, int]:
    return {
        "received": totals.received,
        "accepted": totals.accepted,
        "aggregated": totals.accepted - totals.late,
        "rejected": totals.rejected,
        "duplicates": totals.duplicates,
        "late": totals.late,
        "revised": totals.revised,
        "filtered": totals.filtered,
    }


def _latest_window(pipeline: Pipeline, row: Any) -> LatestWindow:
    item = item_of(pipeline.projection("events"), row)
    return LatestWindow(
        source=str(item["group"]["source"]),
        event_type=str(item["group"]["event_type"]),
        window_start=item["window_start"],
        window_end=item["window_end"],
        values=item["values"],
        final=item["final"],
    )


@app.get("/dead-letters", tags=["results"], summary="Records that were refused or too late",
         operation_id="dead_letters", responses=web.problems(403, 422, 503))  # fmt: skip
async def dead_letters(
    request: Request,
    response: Response,
    pipeline: Running,
    name: Annotated[str | None, Query(alias="pipeline", max_length=64)] = None,
    code: Annotated[str | None, Query(max_length=32, description="Such as `late`.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Annotated[str | None, Query(max_length=2048)] = None,
) -> DeadLetterPage:
    """Where each stood, why, and the first 16 KiB of its bytes; the last 10,000 are kept."""
    after = read_cursor(cursor, (int,))[0] if cursor else 0
    rows = await run_in_threadpool(pipeline.store.dead_letters, after, limit, name, code)
    following = write_cursor([rows[-1].id]) if len(rows) == limit else None
    link_next(request, response, following)
    items = [DeadLetterItem.model_validate(letter_fields(row)) for row in rows]
    return DeadLetterPage(items=items, next=following)


@app.post("/dead-letters/replay", tags=["results"], summary="Try dead letters again",
          operation_id="replay_dead_letters",
          responses=web.problems(403, 409, 422, 429, 503, 507))  # fmt: skip
async def replay_dead_letters(
    pipeline: Running,
    name: Annotated[str | None, Query(alias="pipeline", max_length=64)] = None,
    code: Annotated[str | None, Query(max_length=32)] = None,
) -> ReplayAnswer:
    """After a fix: each is sent through its pipeline as that is now, and comes to life once."""
    return ReplayAnswer(**await pipeline.replay_dead_letters(name, code))


# --- housekeeping -----------------------------------------------------------------------------


@app.delete("/data/cleanup", tags=["service"], summary="Delete what is old",
            operation_id="cleanup", responses=web.problems(403, 422, 429, 503))  # fmt: skip
async def cleanup(
    pipeline: Running,
    days_old: Annotated[float, Query(ge=1, le=36_600, allow_inf_nan=False)] = 30,
    dry_run: Annotated[bool, Query(description="Only tell how much it would be.")] = False,
) -> CleanupAnswer:
    """Closed windows that ended, dead letters that came, and applied segments and uploads of the
    log that were written more than `days_old` days ago. Nothing unapplied ever goes.
    """
    deleted = await pipeline.cleanup(days_old, dry_run=dry_run)
    log.info("cleanup", days_old=days_old, dry_run=dry_run, **deleted)
    return CleanupAnswer(deleted=deleted, dry_run=dry_run)


if __name__ == "__main__":
    web.serve(app, port=settings.port)
