"""HTTP in, HTTP out: the resources of this service, their log and figures, and drills.

The app's own lifespan runs on a `ResourceManager`. Run it with `uvicorn app:app`, or with
`python app.py` on PORT.
"""

import asyncio
import datetime as dt
import decimal
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any, Literal

import structlog
from fastapi import Body, Depends, FastAPI, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

import web
from addresses import chosen
from drills import Drill, Part, Tally, catalogue, described_tree, manager_of, perform, settled
from engine import Observe, Owner, Run
from journal import EventLog, text_of
from measures import MEASURES, families, pool_figures
from models import (
    BarItem,
    CatalogItem,
    DrillAnswer,
    DrillEvent,
    DrillPart,
    DrillRequest,
    LogPage,
    LogRecord,
    ProbeAnswer,
    QueryAnswer,
    QueryRequest,
    ReportItem,
    ResourceItem,
    ResourceList,
    RunAnswer,
    RunRequest,
    SlowestAnswer,
    Step,
    StepResult,
    SummaryAnswer,
    Surfaced,
    TimelineAnswer,
)
from settings import Settings
from utils import (
    AcquireErrorGroup,
    APIConnection,
    AsyncScope,
    CacheConnection,
    ConnectionBroken,
    Database,
    DatabaseConnection,
    DependencyCycle,
    OperationError,
    OperationTimeout,
    QueryTooLong,
    QueueConnection,
    ResourceClosed,
    ResourceError,
    ResourceManager,
    UnknownResource,
)

log = structlog.stdlib.get_logger("resources")
settings = web.read_settings(Settings)

AT_ONCE = {"drills": 4, "runs": 4, "queries": 8}  # under way at the same time
RUN_SECONDS = 10.0
QUERY_SECONDS = 2.0
QUERY_ROWS = 1000
STEP_CHARACTERS = 65_536  # of what a step of a run answers with
KINDS: Mapping[str, Callable[..., Any]] = {
    "database": DatabaseConnection,
    "cache": CacheConnection,
    "queue": QueueConnection,
    "api": APIConnection,
}
NDJSON = "application/x-ndjson"


def connection_of(kind: str) -> Any:
    """A resource as the environment configures it."""
    return KINDS[kind](fallback=settings.resource_fallback)


def secrets_of_all() -> set[str]:
    """What must not get into the log, whatever a driver says."""
    addresses = (chosen(kind, None, None, {}) for kind in KINDS)
    return {secret for address in addresses for secret in address.secrets}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Open the journal, then enter the manager: all resources start in parallel."""
    try:
        settings.embedded_dir.mkdir(parents=True, exist_ok=True)
        path = settings.embedded_dir / "connections.db"
        journal = EventLog(path, rows=settings.journal_rows, secrets=secrets_of_all())
        app.state.busy = dict.fromkeys(AT_ONCE, 0)
        async with journal:
            manager = ResourceManager(name="app", events=journal)
            for kind in KINDS:
                manager.add(connection_of(kind), kind)
            async with manager.lifespan(app) as state:
                app.state.journal, app.state.scope = journal, state["resources"]
                log.info("resources", ready={name: str(app.state.scope[name]) for name in KINDS})
                yield state
    except (ResourceError, AcquireErrorGroup, OSError, ValueError) as error:
        if hasattr(app.state, "scope"):
            raise
        reasons = error.exceptions if isinstance(error, AcquireErrorGroup) else [error]
        sentences = "; ".join(str(reason) for reason in reasons)
        if isinstance(error, OSError) and error.filename:
            sentences = f"EMBEDDED_DIR cannot be used: {error.strerror} ({error.filename})."
        raise web.StartupRefused(f"Not started: {sentences}") from error


def scope_of(request: Request) -> AsyncScope:
    """The resources of this service."""
    scope: AsyncScope = request.app.state.scope
    return scope


def journal_of(request: Request) -> EventLog:
    """The connection log."""
    journal: EventLog = request.app.state.journal
    return journal


Resources = Annotated[AsyncScope, Depends(scope_of)]
Journal = Annotated[EventLog, Depends(journal_of)]


@contextmanager
def seat(request: Request, what: str) -> Iterator[None]:
    """One of the few that may be under way; 429 when all are taken."""
    busy: dict[str, int] = request.app.state.busy
    if busy[what] >= AT_ONCE[what]:
        raise web.Problem(
            429,
            f"{AT_ONCE[what]} {what} are under way already; ask again in a moment.",
            headers={"Retry-After": "2"},
        )
    busy[what] += 1
    try:
        yield
    finally:
        busy[what] -= 1


def check_of(kind: str) -> Callable[[], Any]:
    """What `/readyz` asks about a resource."""

    async def check() -> bool:
        answer = await app.state.scope.manager.probe(kind)
        return bool(answer.status != "down")

    return check


app: FastAPI = web.create_app(
    title="Resource manager",
    description="Databases, caches, brokers and APIs acquired in parallel along their needs, and "
    "released in reverse. No error is hidden, nothing leaks, everything is timed.",
    lifespan=lifespan,
    api_key=settings.api_key.get_secret_value() if settings.api_key else None,
    log_level=settings.log_level,
    checks={kind: check_of(kind) for kind in KINDS},
    collect=lambda: families(MEASURES),
    tags=[
        {"name": "resources", "description": "What this service holds, and whether it works."},
        {"name": "drills", "description": "Faults on purpose, to see what the manager makes of them."},  # noqa: E501
        {"name": "use", "description": "Runs and queries over real resources."},
        {"name": "analytics", "description": "The connection log, and what it says."},
        {"name": "service", "description": "Health and metrics."},
    ],
)  # fmt: skip


# --- resources --------------------------------------------------------------------------------


@app.get(
    "/resources",
    tags=["resources"],
    summary="All resources",
    operation_id="resources",
    responses=web.problems(403),
)
async def resources(scope: Resources) -> ResourceList:
    """What this service acquired when it started, with states, timings and pools."""
    run = scope.manager.running
    owners = run.owners if run is not None else []
    return ResourceList(run_id=scope.run_id, items=[_item(scope, owner) for owner in owners])


ResourceName = Annotated[
    str, Path(max_length=64, openapi_examples={"database": {"value": "database"}})
]


@app.get(
    "/resources/{name}",
    tags=["resources"],
    summary="One resource",
    operation_id="resource",
    responses=web.problems(403, 404, 422),
)
async def resource(scope: Resources, name: ResourceName) -> ResourceItem:
    """Its state, timings and pool."""
    return _item(scope, _owner(scope, name))


@app.post(
    "/resources/{name}/probe",
    tags=["resources"],
    summary="Ask a resource whether it works",
    operation_id="probe",
    responses=web.problems(403, 404, 422),
)
async def probe(scope: Resources, name: ResourceName) -> ProbeAnswer:
    """Ask it now, for at most two seconds; `down` is an answer too."""
    _owner(scope, name)
    health = await scope.manager.probe(name)
    return ProbeAnswer.model_validate({"name": name, **vars(health)})


def _owner(scope: AsyncScope, name: str) -> Owner:
    run = scope.manager.running
    for owner in run.owners if run is not None else ():
        if owner.name == name:
            return owner
    raise web.Problem(404, f"There is no such resource; there are: {', '.join(KINDS)}.")


def _item(scope: AsyncScope, owner: Owner) -> ResourceItem:
    timing = scope.report.resources[owner.name]
    value = owner.value
    return ResourceItem(
        name=owner.name, kind=owner.kind, state=timing.state,
        address=value.address.shown if value is not None else None,
        needs=list(timing.needs), degraded=timing.degraded, acquire_s=timing.acquire_s,
        hold_s=timing.hold_s, attempts=timing.attempts, error=timing.error,
        pool=dict(pool_figures(owner)),
    )  # fmt: skip


# --- drills -----------------------------------------------------------------------------------


class DrillEvents:
    """Hands the events of a drill to the log, and keeps them."""

    def __init__(self, journal: EventLog) -> None:
        self._journal = journal
        self.kept: list[DrillEvent] = []

    def observer(self, run_id: str, manager: str, run: Run) -> Observe:
        """What the run tells its events to."""
        record = self._journal.observer(run_id, manager, run)

        def observe(
            owner: Owner, event: str, seconds: float | None, error: BaseException | None
        ) -> None:
            at = max(0.0, run.clock() - run.began_at)
            self.kept.append(DrillEvent(event=event, resource=owner.name, at_s=at))
            record(owner, event, seconds, error)

        return observe

    def ended(self, run_id: str, manager: str, run: Run) -> None:
        """The run is over."""
        self._journal.ended(run_id, manager, run)


def _body_of(drill: Drill) -> DrillRequest:
    return DrillRequest(
        resources=[
            DrillPart(
                name=part.name, needs=list(part.needs), acquire_ms=part.acquire_ms,
                release_ms=part.release_ms, fault=part.fault,
            )
            for part in drill.parts
        ],
        cancel_after_ms=drill.cancel_after_ms,
        body_error=drill.body_error,
    )  # fmt: skip


CATALOG = [
    CatalogItem(name=name, description=text, body=_body_of(drill))
    for name, text, drill in catalogue()
]
DRILL_EXAMPLES: dict[str, Any] = {
    item.name: {
        "summary": item.name,
        "description": item.description,
        "value": item.body.model_dump(exclude_defaults=True),
    }
    for item in CATALOG
}


@app.post(
    "/drills",
    tags=["drills"],
    summary="Run a drill",
    operation_id="drill",
    responses=web.problems(400, 403, 413, 415, 422, 429),
)
async def drill(
    request: Request,
    journal: Journal,
    body: Annotated[DrillRequest, Body(openapi_examples=DRILL_EXAMPLES)],
) -> DrillAnswer:
    """Enter a graph of synthetic resources under one manager, with faults, and see what happens.

    A fault is one of `acquire_error`, `acquire_hang` (until the deadline), `use_error`, `lost` (it
    dies in use), `release_error`, `release_hang`, and `stubborn` (its release ignores being
    cancelled). A drill ends within 10 s; 4 may be under way.
    """
    parts = tuple(
        Part(part.name, tuple(part.needs), part.acquire_ms, part.release_ms, part.fault)
        for part in body.resources
    )
    asked = Drill(parts, body.cancel_after_ms, body.body_error)
    with seat(request, "drills"):
        tally, events = Tally(), DrillEvents(journal)
        try:
            manager = manager_of(asked, tally, events=events)
        except (DependencyCycle, ValueError) as error:
            raise web.Problem(422, str(error)) from None
        try:
            surfaced = await perform(asked, manager)
        finally:
            await settled(manager)
        if isinstance(surfaced, UnknownResource):
            raise web.Problem(422, str(surfaced))
        return DrillAnswer(
            run_id=manager.run_id,
            surfaced=_surfaced(surfaced),
            events=events.kept,
            report=_report(manager),
            leaked=tally.leaked,
        )


@app.get(
    "/drills/catalog",
    tags=["drills"],
    summary="Twenty drills to begin with",
    operation_id="drill_catalog",
    responses=web.problems(403),
)
async def catalog() -> list[CatalogItem]:
    """Each `body` can be posted to `/drills` as it is; there they are the examples to choose."""
    return CATALOG


def _surfaced(error: BaseException | None) -> Surfaced | None:
    tree = described_tree(error)
    return None if tree is None else Surfaced.model_validate(tree)


def _report(manager: ResourceManager) -> ReportItem:
    return ReportItem.model_validate(manager.report.as_dict())


# --- use --------------------------------------------------------------------------------------

RUN_EXAMPLE = {
    "resources": ["database", "cache", "queue", "api"],
    "steps": [
        {"resource": "database", "op": "fetch", "sql": "SELECT 1 AS answer"},
        {"resource": "cache", "op": "set", "key": "greeting", "value": "hello"},
        {"resource": "cache", "op": "get", "key": "greeting"},
        {"resource": "queue", "op": "publish", "queue": "example", "body": "hello"},
        {"resource": "queue", "op": "consume", "queue": "example"},
        {"resource": "api", "op": "get", "path": "/hello"},
    ],
}


@app.post(
    "/runs",
    tags=["use"],
    summary="Use resources under one manager",
    operation_id="run",
    responses=web.problems(400, 403, 413, 415, 422, 429),
)
async def run_steps(
    request: Request,
    journal: Journal,
    body: Annotated[RunRequest, Body(openapi_examples={"all four": {"value": RUN_EXAMPLE}})],
) -> RunAnswer:
    """Acquire the chosen resources anew, take the steps one after the other, release, report.

    The first failing step ends the run; what it raised is `surfaced`, and everything is released.
    """
    with seat(request, "runs"):
        manager = ResourceManager(name="run", events=journal, acquire_timeout=4, release_timeout=2,
                                  release_grace=0.5)  # fmt: skip
        for kind in body.resources:
            manager.add(connection_of(kind), kind)
        results: list[StepResult] = []
        surfaced: BaseException | None = None
        deadline = time.monotonic() + RUN_SECONDS - 3
        try:
            async with manager as scope:
                for step in body.steps:
                    began = time.perf_counter()
                    result = await _take(scope, step, deadline - time.monotonic())
                    seconds = time.perf_counter() - began
                    results.append(
                        StepResult(
                            resource=step.resource, op=step.op, result=result, seconds=seconds
                        )
                    )
        except (ResourceError, ExceptionGroup, TimeoutError, TypeError, ValueError) as error:
            surfaced = error
        return RunAnswer(
            run_id=manager.run_id,
            results=results,
            surfaced=_surfaced(surfaced),
            report=_report(manager),
        )


async def _take(scope: AsyncScope, step: Step, seconds: float) -> Any:
    """One step, in what is left of the time of its run."""
    async with asyncio.timeout(max(0.0, seconds)):
        if step.resource == "database":
            found = await scope.database.query(
                step.sql, rows=100, seconds=QUERY_SECONDS, size=STEP_CHARACTERS
            )
            return [dict(zip(found.columns, map(_plain, row), strict=True)) for row in found.rows]
        if step.resource == "api":
            answer = await scope.api.get(step.path)
            return {"status": answer.status_code, "body": answer.text[:STEP_CHARACTERS]}
        if step.resource == "queue":
            if step.op == "publish":
                await scope.queue.publish(step.queue, step.body)
                return None
            message = await scope.queue.consume(step.queue, timeout=2.0)
            await message.ack()
            return message.decode("utf-8", "replace")
        if step.op == "set":
            await scope.cache.set(step.key, step.value)
            return None
        return _plain(await getattr(scope.cache, step.op)(step.key))


@app.post(
    "/query",
    tags=["use"],
    summary="One reading SQL statement",
    operation_id="query",
    responses=web.problems(400, 403, 413, 415, 422, 429, 503),
)
async def query(
    request: Request,
    scope: Resources,
    body: Annotated[
        QueryRequest,
        Body(openapi_examples={"one": {"value": {"sql": "SELECT 1 AS answer, 'text' AS word"}}}),
    ],
) -> QueryAnswer:
    """Read from the database of this service: at most 1,000 rows, 4 MiB and two seconds.

    Statements that write, several at once, pragmas and attached files are refused by the database
    itself: it reads on a read-only connection or transaction.
    """
    database: Database = scope.get("database", Database)
    began = time.perf_counter()
    try:
        with seat(request, "queries"):
            found = await database.query(body.sql, rows=QUERY_ROWS, seconds=QUERY_SECONDS)
    except QueryTooLong as error:
        raise web.Problem(422, str(error)) from None
    except (ConnectionBroken, OperationTimeout, ResourceClosed) as error:
        raise web.Problem(503, "The database does not answer.", headers={"Retry-After": "2"}) from error  # noqa: E501  # fmt: skip
    except OperationError as error:
        raise web.Problem(422, _safe(str(error))) from None
    return QueryAnswer(
        columns=found.columns,
        rows=[[_plain(value) for value in row] for row in found.rows],
        truncated=found.more,
        seconds=time.perf_counter() - began,
    )


def _safe(text: str) -> str:
    """A sentence of a database, cut short: it may repeat the statement."""
    return text.encode("utf-8", "replace").decode()[:300]


def _plain(value: Any) -> Any:
    """A value of a driver as one of JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, (bytes, memoryview)):
        return bytes(value).hex()
    if isinstance(value, (dt.datetime, dt.date, dt.time)):
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, uuid.UUID)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value)


# --- analytics --------------------------------------------------------------------------------

Event = Literal[
    "acquiring", "acquired", "acquire_failed", "released", "release_failed", "abandoned", "lost"
]


@app.get(
    "/connections/log",
    tags=["analytics"],
    summary="The connection log",
    operation_id="connection_log",
    response_model=LogPage,
    responses={
        200: {
            "content": {NDJSON: {"schema": {"type": "string"}}},
            "description": "One page, or with `Accept: application/x-ndjson` one record a line.",
        },
        **web.problems(403, 422),
    },
)
async def connection_log(
    request: Request,
    journal: Journal,
    run_id: Annotated[str | None, Query(max_length=64)] = None,
    resource: Annotated[str | None, Query(max_length=128)] = None,
    event: Event | None = None,
    after: Annotated[
        int, Query(ge=0, le=2**62, description="Records with a greater `seq` only.")
    ] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> Any:
    """Records in the order in which they happened; the last ones are kept (`JOURNAL_ROWS`)."""
    records = await journal.records(
        run_id=run_id, resource=resource, event=event, after=after, limit=limit
    )
    if NDJSON in request.headers.get("accept", ""):
        lines = (json.dumps(record) + "\n" for record in records)
        return StreamingResponse(lines, media_type=NDJSON)
    following = records[-1]["seq"] if len(records) == limit else None
    return LogPage(items=[LogRecord(**record) for record in records], next=following)


@app.get(
    "/analytics/summary",
    tags=["analytics"],
    summary="Counts, percentiles, errors, time saved",
    operation_id="summary",
    responses=web.problems(403),
)
async def summary(journal: Journal) -> SummaryAnswer:
    """Over all that the log keeps; percentiles are null where there is nothing."""
    return SummaryAnswer.model_validate(await journal.summary())


@app.get(
    "/analytics/timeline/{run_id}",
    tags=["analytics"],
    summary="One run as bars",
    operation_id="timeline",
    responses=web.problems(403, 404, 422),
)
async def timeline(
    journal: Journal,
    scope: Resources,
    run_id: Annotated[
        str,
        Path(
            max_length=64,
            description="From a drill, a run or the log; `app` is this service itself.",
            openapi_examples={"app": {"value": "app"}},
        ),
    ],
) -> TimelineAnswer:
    """When each resource changed, and which of them the start had to wait for."""
    found = await journal.timeline(scope.run_id if run_id == "app" else run_id)
    if found is None:
        raise web.Problem(404, "There is no such run, or it is too old to be kept.")
    wall = found.start_s + found.stop_s
    return TimelineAnswer(
        run_id=found.run_id, manager=found.manager, began=text_of(found.began), wall_s=wall,
        sum_s=found.sum_s, saved_s=found.sum_s - wall, critical_path=list(found.critical_path),
        bars=[BarItem(**vars(bar)) for bar in found.bars],
    )  # fmt: skip


@app.get(
    "/analytics/slowest",
    tags=["analytics"],
    summary="The longest times",
    operation_id="slowest",
    responses=web.problems(403, 422),
)
async def slowest(
    journal: Journal,
    phase: Annotated[
        Literal["acquire", "hold", "release"], Query(description="Of what.")
    ] = "acquire",
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> SlowestAnswer:
    """Over all runs that the log keeps, the longest first."""
    found = await journal.slowest(phase, limit)
    return SlowestAnswer.model_validate({"phase": phase, "items": found})


@app.exception_handler(ResourceError)
async def resource_failed(request: Request, error: Exception) -> Response:
    """A resource that cannot serve now is no fault of the question."""
    log.warning("resource_failed", error=type(error).__name__)
    problem = web.Problem(
        503, "A resource does not answer now; ask again.", headers={"Retry-After": "2"}
    )
    return web.problem_response(request.scope, problem)


if __name__ == "__main__":
    web.serve(app, port=settings.port)
