"""HTTP in, HTTP out: the routes of the streaming pipeline.

The three ingest routes are answered ahead of the router (`web.create_app(fast=…)`), because there
every microsecond counts; they are documented by routes of the same path. Run it with
`uvicorn app:app`, or with `python app.py` on PORT.
"""

import asyncio
import base64
import binascii
import datetime as dt
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import msgspec
import structlog
from fastapi import Depends, FastAPI, Header, Query, Request, Response
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

import fetch_routes
import web
from aggregation import Moment, micros
from models import (
    SOURCE_EVENT,
    SOURCE_EVENTS,
    WEBHOOK_EVENT,
    Accepted,
    AggregateItem,
    AggregatePage,
    Counts,
    DeadLetterItem,
    DeadLetterPage,
    LatencyFigures,
    LatestWindow,
    PipelineCounts,
    StatsAnswer,
)
from parsing import decoder_of, form_of
from settings import Settings
from storage import Aggregate, AggregateQuery, DeadLetter
from utils import (
    EVENTS,
    PIPELINES,
    WEBHOOK,
    BodyError,
    Busy,
    Held,
    Intake,
    KeyReused,
    Pipeline,
    QueueError,
    QueueRefused,
    Receipt,
    Spec,
    StoreError,
    StoreRefused,
    Totals,
)

log = structlog.stdlib.get_logger("pipeline")
settings = Settings()

STOP_SECONDS = 1.0  # to apply what is accepted when the server is told to stop
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
JSON_HEADERS = [(b"content-type", b"application/json")]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the data, run the applier, and hand everything over cleanly at the end."""
    pipeline = Pipeline(
        settings.queue_maxsize,
        settings.window_secs,
        settings.db_path,
        log,
        settings.queue_dir,
        max_event_bytes=settings.max_event_bytes,
        backlog_max_bytes=settings.backlog_max_bytes,
        dedupe_keys=settings.dedupe_keys,
        parser=settings.parser,
    )
    try:
        pipeline.__enter__()
    except (Held, StoreError, QueueError, OSError) as error:
        raise web.StartupRefused(str(error)) from error
    try:
        log.info("data", database=str(settings.db_path.resolve()),
                 message_queue=str(settings.queue_dir.resolve()),
                 backlog_bytes=pipeline.backlog_bytes)  # fmt: skip
        await pipeline.start_workers()
        app.state.pipeline = pipeline
        yield
        await pipeline.stop_workers(STOP_SECONDS)
    finally:
        pipeline.close()


def pipeline_of(request: Request) -> Pipeline:
    """The running pipeline."""
    pipeline: Pipeline = request.app.state.pipeline
    return pipeline


Running = Annotated[Pipeline, Depends(pipeline_of)]


# --- ingest -----------------------------------------------------------------------------------


def ingest(spec: Spec) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The ASGI application that takes bodies for one pipeline."""

    async def take(scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        pipeline: Pipeline = scope["app"].state.pipeline
        try:
            receipt, repeated = await _take(pipeline, spec, scope, receive)
        except BodyError as error:
            raise web.Problem(error.status, str(error)) from None
        except Busy as busy:
            raise web.Problem(
                429, str(busy), headers={"Retry-After": str(busy.retry_after)}
            ) from None
        except KeyReused as error:
            raise web.Problem(422, str(error)) from None
        except StoreRefused as error:
            raise web.Problem(503, str(error), headers={"Retry-After": "2"}) from error
        except QueueRefused as error:
            raise web.Problem(
                507 if error.full else 503, str(error), headers={"Retry-After": "5"}
            ) from error
        if receipt.status != 202:
            raise web.Problem(
                receipt.status,
                _refusal_sentence(receipt),
                errors=receipt.errors,
                accepted=0,
                rejected=receipt.rejected,
                duplicates=0,
            )
        if b"wait=applied" in scope["query_string"].split(b"&"):
            await _until_applied(scope["app"], pipeline, receipt.position)
        now = time.monotonic()
        pipeline.latencies.add(now - started, now)
        body = b'{"accepted":%d,"rejected":%d,"duplicates":%d,"errors":%s,"position":%d}' % (
            receipt.accepted, receipt.rejected, receipt.duplicates,
            msgspec.json.encode(receipt.errors) if receipt.errors else b"[]", receipt.position,
        )  # fmt: skip
        headers = [*JSON_HEADERS, (b"content-length", b"%d" % len(body))]
        if repeated:
            headers.append((b"idempotent-replayed", b"true"))
        await send({"type": "http.response.start", "status": 202, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return take


async def _until_applied(app: FastAPI, pipeline: Pipeline, position: int) -> None:
    """Wait for the aggregates, or until the server is told to stop: the events are durable."""
    waits = {
        asyncio.ensure_future(pipeline.applied(position)),
        asyncio.ensure_future(app.state.stopping.wait()),
    }
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def _take(
    pipeline: Pipeline, spec: Spec, scope: Scope, receive: Receive
) -> tuple[Receipt, bool]:
    """Read, parse and commit one body; the flag says that an earlier answer is repeated."""
    content_type = encoding = key_text = ""
    for name, value in scope["headers"]:
        if name == b"content-type":
            content_type = value.decode("latin-1")
        elif name == b"content-encoding":
            encoding = value.decode("latin-1")
        elif name == b"idempotency-key":
            key_text = value.decode("latin-1")
    form, inflate = form_of(content_type), decoder_of(encoding)
    if len(key_text) > 255:
        raise BodyError(422, "An Idempotency-Key has at most 255 characters.")
    pipeline.admit()
    message = await receive()
    if not (inflate or key_text or message.get("more_body", True)):
        block = pipeline.read_whole(spec, form, message["body"])
        if block is not None:
            pipeline.waiting += 1
            try:
                return await pipeline.accept(spec, [block]), False
            finally:
                pipeline.waiting -= 1
    reader = pipeline.reader(spec, form)
    inflater = inflate() if inflate else None
    digest = hashlib.blake2b(digest_size=16) if key_text else None
    intake = pipeline.intake(spec)
    pipeline.waiting += 1
    try:
        while True:
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            data = message.get("body", b"")
            for piece in inflater.feed(data) if inflater else (data,):
                await _feed(reader.feed(piece), intake, digest, piece)
            if not message.get("more_body", False):
                break
            message = await receive()
        if inflater is not None:
            for piece in inflater.finish():
                await _feed(reader.feed(piece), intake, digest, piece)
        await _feed(reader.finish(), intake, None, b"")
        key = None
        if digest is not None:
            key = (pipeline.digest(f"{spec.name} {key_text}"), digest.digest())
        receipt = await intake.commit(_status(intake, single=reader.is_single), key)
        return receipt, intake.repeated
    finally:
        pipeline.waiting -= 1
        intake.abort()


async def _feed(blocks: Iterable[Any], intake: Intake, digest: Any, piece: bytes) -> None:
    if digest is not None:
        digest.update(piece)
    for block in blocks:
        await intake.add(block)


def _status(intake: Intake, *, single: bool) -> int:
    if intake.accepted:
        return 202
    if intake.codes == {"too_large"}:
        return 413
    if single and intake.codes & {"malformed", "encoding", "depth"}:
        return 400
    return 422


def _refusal_sentence(receipt: Receipt) -> str:
    if receipt.rejected == 1:
        return f"The event was refused. {receipt.errors[0]['message']}"
    if receipt.rejected:
        return f"None of the {receipt.rejected:,} records could be accepted; see errors."
    return "The body holds no events."


def collect() -> Iterable[Metric]:
    """The figures of the pipeline for Prometheus."""
    pipeline: Pipeline | None = getattr(app.state, "pipeline", None)
    if pipeline is None:
        return
    events = CounterMetricFamily(
        "pipeline_events", "Events answered for.", labels=["pipeline", "outcome"]
    )
    for name, totals in pipeline.totals.items():
        for outcome in ("accepted", "rejected", "duplicates"):
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
    fast={
        "/webhook": ingest(WEBHOOK),
        "/webhook/ingest": ingest(EVENTS),
        "/webhook/batch": ingest(EVENTS),
    },
    streaming=("/webhook", "/webhook/ingest", "/webhook/batch"),
    tags=[
        {"name": "ingest", "description": "Events in: durable before they are acknowledged."},
        fetch_routes.TAG,
        {"name": "results", "description": "Aggregates, figures and what was refused."},
        {"name": "service", "description": "Health and metrics."},
    ],
)


app.include_router(fetch_routes.router)


@app.exception_handler(StoreRefused)
async def store_refused(request: Request, error: Exception) -> Response:
    """A database that cannot answer now is no fault of the question."""
    log.warning("store_refused", error=str(error))
    problem = web.Problem(
        503, "The aggregates cannot be read now; ask again.", headers={"Retry-After": "2"}
    )
    return web.problem_response(request.scope, problem)


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
        idempotency_key: Annotated[
            str | None,
            Header(max_length=255, description="The same key gets the first answer again."),
        ] = None,
    ) -> Response:
        del wait, idempotency_key  # read by the application that answers
        raise web.Problem(500, "This path is answered ahead of the router.")

    documented.__doc__ = description
    app.add_api_route(
        path,
        documented,
        methods=["POST"],
        status_code=202,
        tags=["ingest"],
        summary=summary,
        operation_id=path.strip("/").replace("/", "_"),
        response_model=None,
        responses={
            202: {"model": Accepted, "description": "Durable, and counted exactly once."},
            **web.problems(400, 403, 408, 413, 415, 422, 429, 501, 503, 507),
        },
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )


_BODIES = (
    "The body is one JSON object, a JSON array, or NDJSON (one document per line; also as "
    "`text/plain`, which is what to choose in this page), gzip or not, of any size. A bad record "
    "costs its neighbours nothing: it is listed under `errors` and kept in `/dead-letters`."
)
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
    "finite numeric member of `data`. A repeated `event_id` is a duplicate, whatever it holds. "
    f"{_BODIES}",
    SOURCE_EVENT,
)
_document(
    "/webhook/batch",
    "Take a batch of events",
    f"Like `/webhook/ingest`, with an array or NDJSON in mind. {_BODIES}",
    SOURCE_EVENTS,
)


# --- results ----------------------------------------------------------------------------------


@app.get(
    "/aggregates",
    tags=["results"],
    summary="Windows and their values",
    operation_id="aggregates",
    responses=web.problems(403, 422),
)
async def aggregates(
    request: Request,
    response: Response,
    pipeline: Running,
    name: Annotated[
        str | None, Query(alias="pipeline", description="`webhook` or `events`.")
    ] = None,
    group: Annotated[
        list[str] | None,
        Query(description="`<alias>:<value>`, such as `category:books`; all given ones hold."),
    ] = None,
    start: Annotated[
        str | None,
        Query(alias="from", description="Windows that start then or later (RFC 3339 or epoch)."),
    ] = None,
    end: Annotated[
        str | None, Query(alias="to", description="Windows that start before (RFC 3339 or epoch).")
    ] = None,
    final: Annotated[bool | None, Query(description="Only closed, or only open windows.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Annotated[str | None, Query(max_length=2048)] = None,
) -> AggregatePage:
    """Ordered by window, pipeline and group. Open windows are shown with `final` false."""
    if name is not None and name not in PIPELINES:
        raise web.Problem(422, "There is no such pipeline; there are: " + ", ".join(PIPELINES))
    query = AggregateQuery(
        pipeline=name,
        group=tuple(_group_alternatives(each, name) for each in group or ()),
        start=_moment(start, "from"),
        end=_moment(end, "to"),
        final=final,
        after=_read_cursor(cursor, (int, str, str, int)) if cursor else None,
        limit=limit,
    )
    rows = await run_in_threadpool(pipeline.store.aggregates, query)
    following = _write_cursor(rows[-1].cursor) if len(rows) == limit else None
    _link_next(request, response, following)
    return AggregatePage(items=[_aggregate_item(row) for row in rows], next=following)


def _group_alternatives(text: str, name: str | None) -> tuple[tuple[str, int, str], ...]:
    alias, colon, value = text.partition(":")
    specs = PIPELINES.values() if name is None else (PIPELINES[name],)
    found = tuple(
        (spec.name, spec.aliases.index(alias), value) for spec in specs if alias in spec.aliases
    )
    if not colon or not found:
        known = sorted({alias for spec in specs for alias in spec.aliases})
        raise web.Problem(
            422, f"A group is asked for as <alias>:<value>; the aliases are {', '.join(known)}."
        )
    return found


def _moment(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    try:
        value: Any = float(text)
    except ValueError:
        value = text
    try:
        return micros(msgspec.convert(value, Moment))
    except (msgspec.ValidationError, ValueError):
        raise web.Problem(
            422,
            f"`{name}` is no time: give RFC 3339 with an offset, such as 2026-01-15T10:00:00Z, or "
            "epoch seconds.",
        ) from None


def _aggregate_item(row: Aggregate) -> AggregateItem:
    spec = PIPELINES[row.pipeline]
    return AggregateItem(
        pipeline=row.pipeline,
        window_start=_text_of(row.window_start),
        window_end=_text_of(row.window_end),
        group=dict(zip(spec.aliases, row.group, strict=True)),
        values=spec.values(row.count, row.measures),
        revision=row.revision,
        final=row.final,
    )


def _text_of(moment: int) -> str:
    text = (EPOCH + dt.timedelta(microseconds=moment)).isoformat()
    return text.removesuffix("+00:00") + "Z"


def _write_cursor(values: list[Any]) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(values)).decode().rstrip("=")


def _read_cursor(text: str, types: tuple[type, ...]) -> list[Any]:
    try:
        values = msgspec.json.decode(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, binascii.Error, msgspec.DecodeError):
        values = None
    if (
        not isinstance(values, list)
        or tuple(map(type, values)) != types
        or any(isinstance(value, int) and abs(value) >= 2**63 for value in values)
    ):
        raise web.Problem(
            422, "The cursor was not issued here; take it from `next` of the page before."
        )
    return values


def _link_next(request: Request, response: Response, following: str | None) -> None:
    if following is not None:
        url = request.url.include_query_params(cursor=following)
        response.headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'


@app.get(
    "/stats",
    tags=["results"],
    summary="Counts, backlog and latencies",
    operation_id="stats",
    responses=web.problems(403),
)
async def stats(pipeline: Running) -> StatsAnswer:
    """Received is accepted + rejected + duplicates, always, also after a crash."""
    by_source = await run_in_threadpool(pipeline.store.totals)
    latest = await run_in_threadpool(pipeline.store.latest, EVENTS.name)
    every = Totals()
    pipelines = {}
    for name, totals in pipeline.totals.items():
        late = by_source.get((name, ""), Totals()).late
        shown = Totals(totals.accepted, totals.rejected, totals.duplicates, late)
        every.add(shown)
        sources = {
            source: Counts(**_counts(each))
            for (owner, source), each in by_source.items()
            if owner == name and source
        }
        pipelines[name] = PipelineCounts(**_counts(shown), sources=sources)
    figures = pipeline.latencies.percentiles()
    queue = pipeline.queue.statistics()
    return StatsAnswer(
        **_counts(every),
        applied=pipeline.applied_events,
        backlog_events=pipeline.backlog_events,
        backlog_bytes=pipeline.backlog_bytes,
        events_per_second=pipeline.rate.per_second(),
        latency=LatencyFigures(
            count=figures.count, p50_ms=figures.p50, p95_ms=figures.p95, p99_ms=figures.p99
        ),
        pipelines=pipelines,
        aggregations=[_latest_window(row) for row in latest],
        queue=vars(queue),
        resources=pipeline.get_resource_metrics(),
    )


def _counts(totals: Totals) -> dict[str, int]:
    return {
        "received": totals.received,
        "accepted": totals.accepted,
        "rejected": totals.rejected,
        "duplicates": totals.duplicates,
        "late": totals.late,
    }


def _latest_window(row: Aggregate) -> LatestWindow:
    return LatestWindow(
        source=row.group[0],
        event_type=row.group[1],
        window_start=_text_of(row.window_start),
        window_end=_text_of(row.window_end),
        values=EVENTS.values(row.count, row.measures),
        final=row.final,
    )


@app.get(
    "/dead-letters",
    tags=["results"],
    summary="Records that were refused",
    operation_id="dead_letters",
    responses=web.problems(403, 422),
)
async def dead_letters(
    request: Request,
    response: Response,
    pipeline: Running,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Annotated[str | None, Query(max_length=2048)] = None,
) -> DeadLetterPage:
    """Where each stood, why, and the first 2,048 of its bytes; the last 10,000 are kept."""
    after = _read_cursor(cursor, (int,))[0] if cursor else 0
    rows = await run_in_threadpool(pipeline.store.dead_letters, after, limit)
    following = _write_cursor([rows[-1].id]) if len(rows) == limit else None
    _link_next(request, response, following)
    return DeadLetterPage(items=[_dead_letter_item(row) for row in rows], next=following)


def _dead_letter_item(letter: DeadLetter) -> DeadLetterItem:
    record = letter.record
    item = DeadLetterItem(
        id=letter.id,
        pipeline=letter.pipeline,
        received_at=_text_of(letter.received),
        position=letter.position,
        line=record.line,
        index=record.index,
        offset=record.offset,
        code=record.code,
        message=record.message,
    )
    try:
        item.text = record.raw.decode()
    except UnicodeDecodeError:
        item.base64 = base64.b64encode(record.raw).decode()
    return item


if __name__ == "__main__":
    web.serve(app, port=settings.port)
