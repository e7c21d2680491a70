"""HTTP in, HTTP out: the routes of the scheduler. Tasks come by registered name, never as code.

A 202 is sent after the commit. Run it with `uvicorn app:app`, or with `python app.py` on PORT.
"""

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import structlog
from fastapi import Body, Depends, FastAPI, Header, Path, Query, Request, Response
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import ValidationError
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool

import catalogue
import web
from models import (
    BATCH_EXAMPLE,
    EXAMPLE,
    Accepted,
    AcceptedInBatch,
    Attempt,
    BatchTask,
    Cancelled,
    Deleted,
    ErrorInfo,
    GraphAnswer,
    GraphNode,
    NewTask,
    Priority,
    RegistryItem,
    ResultAnswer,
    Statistics,
    TaskDetail,
    TaskItem,
    TaskPage,
    WorkerCount,
    Workers,
)
from settings import Settings
from tasks import TERMINAL
from utils import (
    CyclicDependency,
    DuplicateTask,
    Filter,
    IdempotencyConflict,
    IllegalTransition,
    NotRegistered,
    RetryPolicy,
    SchedulerClosed,
    SchedulerError,
    SchedulerFull,
    StoreUnavailable,
    Task,
    TaskHandle,
    TaskPriority,
    TaskScheduler,
    TaskState,
    UnknownDependency,
    UnknownTask,
    registry,
)
from views import attempts_of, duration_of, shown, utc

__all__ = ["app", "catalogue"]

log = structlog.stdlib.get_logger("scheduler")
settings = web.read_settings(Settings)

STOP_SECONDS = 1.0  # for running tasks to finish when the server is told to stop
LONGEST_POLL = 60.0
BATCH_TASKS = 1_000
GRAPH_TASKS = 1_000
EVENTS_TOGETHER = 500
RETRY_AFTER_SECONDS = 1


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the database, start the workers, and leave unfinished work to the next start."""
    scheduler = TaskScheduler(
        settings.scheduler_workers,
        settings.scheduler_threads,
        settings.scheduler_db_path,
        settings.scheduler_durability,
        settings.scheduler_max_tasks,
        settings.scheduler_task_timeout,
    )
    try:
        await asyncio.to_thread(scheduler.run)
    except SchedulerError as error:
        raise web.StartupRefused(str(error)) from error
    except OSError as error:
        raise web.StartupRefused(
            f"The database cannot be opened: {error.strerror} ({error.filename}). Set "
            "SCHEDULER_DB_PATH to a place where this user may write."
        ) from error
    news = News()
    news.listen(scheduler)
    app.state.scheduler, app.state.news = scheduler, news
    log.info("data", database=str(settings.scheduler_db_path.resolve()),
             recovered=scheduler.engine.counts())  # fmt: skip
    try:
        yield
    finally:
        await asyncio.to_thread(scheduler.shutdown, timeout=STOP_SECONDS)


class News:
    """Tells every open event stream that the store has new transitions."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._told = False

    def listen(self, scheduler: TaskScheduler) -> None:
        """Be told after every commit, in the engine's thread."""
        scheduler.engine.listeners.append(self._from_engine)

    def _from_engine(self) -> None:
        if not self._told:  # once per turn of the loop is enough
            self._told = True
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._told = False
        self._changed.set()
        self._changed = asyncio.Event()

    def next(self) -> asyncio.Event:
        """An event that is set by the next transition."""
        return self._changed


def scheduler_of(request: Request) -> TaskScheduler:
    """The running scheduler."""
    scheduler: TaskScheduler = request.app.state.scheduler
    return scheduler


Running = Annotated[TaskScheduler, Depends(scheduler_of)]
Id = Annotated[str, Path(max_length=200, examples=["example"])]
Key = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="The same key and request again: the same tasks, 200.",
    ),
]


def collect() -> Iterable[Metric]:
    """The figures of the scheduler for Prometheus."""
    scheduler: TaskScheduler | None = getattr(app.state, "scheduler", None)
    if scheduler is None:
        return
    engine = scheduler.engine
    counts = engine.counts()
    tasks = GaugeMetricFamily("scheduler_tasks", "Stored tasks.", labels=["state"])
    for state in TaskState:
        tasks.add_metric([state.value], counts.get(state.value, 0))
    yield tasks
    yield CounterMetricFamily("scheduler_ended_tasks", "Ended here.", engine.meter.total)
    yield CounterMetricFamily("scheduler_commits", "Transactions.", engine.commits)
    busy = CounterMetricFamily("scheduler_busy_seconds", "Time in tasks.", labels=["kind"])
    slots = GaugeMetricFamily("scheduler_slots", "Tasks that fit at a time.", labels=["kind"])
    for kind, backend in engine.backends.items():
        busy.add_metric([kind], backend.busy_seconds())
        slots.add_metric([kind], backend.slots())
    yield busy
    yield slots


app: FastAPI = web.create_app(
    title="Task scheduler",
    description="Tasks by priority and dependency, on processes that can be killed, threads and "
    "coroutines. A task that was answered with 202 is stored, and runs at least once.",
    lifespan=lifespan,
    api_key=settings.api_key.get_secret_value() if settings.api_key else None,
    log_level=settings.log_level,
    checks={"scheduler": lambda: app.state.scheduler.engine.works()},
    collect=collect,
    tags=[
        {"name": "tasks", "description": "Submit, follow, cancel, run again."},
        {"name": "scheduler", "description": "What can be run, by how many, and how it goes."},
        {"name": "service", "description": "Health and metrics."},
    ],
)


@app.exception_handler(SchedulerError)
async def refused(request: Request, error: Exception) -> Response:
    """What the scheduler refuses has a status, and a sentence that says what to do."""
    return web.problem_response(request.scope, problem_of(error))


def problem_of(error: Exception) -> web.Problem:
    """The answer that a refusal becomes."""
    text = str(error)
    if isinstance(error, SchedulerFull):
        return web.Problem(
            429,
            f"As many tasks wait as are accepted ({error.max_tasks:,}); send it again later.",
            headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
        )
    if isinstance(error, UnknownTask):
        return web.Problem(404, "There is no task with this id; GET /tasks lists them.")
    if isinstance(error, NotRegistered):
        return web.Problem(404, "There is no task of this name; GET /registry lists them.")
    if isinstance(error, IdempotencyConflict):
        return web.Problem(422, "The Idempotency-Key was used for another request.")
    if isinstance(error, UnknownDependency):
        return _at("/body/dependencies", "A dependency does not exist, here or in the batch.")
    if isinstance(error, CyclicDependency):
        return _at("/body/dependencies", "Tasks would wait for each other for ever.")
    if isinstance(error, DuplicateTask):
        return web.Problem(409, "There is a task with this id already, and it is another one.")
    if isinstance(error, IllegalTransition):
        return web.Problem(409, text)
    if isinstance(error, (StoreUnavailable, SchedulerClosed)):
        log.warning("store_unavailable", error=text)
        return web.Problem(
            503, "The tasks cannot be stored or read now; ask again.", headers={"Retry-After": "2"}
        )
    raise error


def _at(pointer: str, message: str) -> web.Problem:
    return web.Problem(
        422, "The request does not fit.", errors=[{"pointer": pointer, "message": message}]
    )


# --- submitting -------------------------------------------------------------------------------


@app.post(
    "/tasks",
    status_code=202,
    tags=["tasks"],
    summary="Submit a task",
    operation_id="submit_task",
    responses={
        200: {
            "model": Accepted,
            "description": "It was submitted before, with the same key or id.",
        },
        **web.problems(400, 403, 404, 409, 413, 415, 422, 429, 503),
    },
)
async def submit_task(
    scheduler: Running,
    response: Response,
    new: Annotated[NewTask, Body(examples=[EXAMPLE])],
    idempotency_key: Key = None,
) -> Accepted:
    """Stored when this returns. Without `args` the results of the dependencies are passed."""
    task = _task_of(new, "/body", {})
    task.idempotency_key = idempotency_key
    (handle,) = await scheduler.asubmit_many([task], request=_request_bytes([new]))
    response.headers["Location"] = f"/tasks/{handle.id}"
    if handle.existed:
        response.status_code = 200
    return Accepted(id=handle.id, state=await run_in_threadpool(handle.status))


@app.post(
    "/tasks/batch",
    status_code=202,
    tags=["tasks"],
    summary="Submit a graph of tasks, all or none",
    operation_id="submit_batch",
    responses={
        200: {"model": list[AcceptedInBatch], "description": "The same key and batch as before."},
        **web.problems(400, 403, 404, 409, 413, 415, 422, 429, 503),
    },
)
async def submit_batch(
    scheduler: Running,
    response: Response,
    batch: Annotated[
        list[BatchTask],
        Body(min_length=1, max_length=BATCH_TASKS, examples=[BATCH_EXAMPLE]),
    ],
    idempotency_key: Key = None,
) -> list[AcceptedInBatch]:
    """Dependencies name tasks by `ref` in any order, or older tasks by id."""
    refs = _refs_of(batch)
    tasks = [_task_of(new, f"/body/{n}", refs) for n, new in enumerate(batch)]
    for n, (new, task) in enumerate(zip(batch, tasks, strict=True)):
        task.id = refs[new.ref] if new.ref else new.id
        if idempotency_key is not None:
            task.idempotency_key = f"{idempotency_key}\n{n}"  # no header has a line break
    handles = await scheduler.asubmit_many(tasks, request=_request_bytes(batch))
    if all(handle.existed for handle in handles):
        response.status_code = 200
    states = await run_in_threadpool(lambda: [handle.status() for handle in handles])
    return [
        AcceptedInBatch(id=handle.id, state=state, ref=new.ref)
        for new, handle, state in zip(batch, handles, states, strict=True)
    ]


def _refs_of(batch: list[BatchTask]) -> dict[str, str]:
    from tasks import new_id

    refs: dict[str, str] = {}
    for n, new in enumerate(batch):
        if new.ref is not None:
            if new.ref in refs:
                raise _at(f"/body/{n}/ref", "This ref stands twice in the batch.")
            refs[new.ref] = new.id or new_id()
    return refs


def _task_of(new: NewTask, place: str, refs: dict[str, str]) -> Task:
    """The task that is asked for, its arguments checked by the schema of its name."""
    registered = registry.get(new.name)
    args = new.args
    if args or not new.dependencies:
        try:
            args = registered.check(args)
        except ValidationError as error:
            raise web.Problem(
                422,
                f"The arguments do not fit the schema of {new.name}.",
                errors=[
                    {
                        "pointer": f"{place}/args/" + "/".join(str(p)[:64] for p in each["loc"]),
                        "message": each["msg"][:300],
                    }
                    for each in error.errors(include_input=False, include_url=False)
                ],
            ) from None
    return Task(
        id=new.id,
        func=new.name,
        kwargs=args,
        priority=TaskPriority[new.priority] if new.priority else registered.priority,
        dependencies=[refs.get(parent, parent) for parent in new.dependencies],
        timeout=new.timeout,
        retry=RetryPolicy(**new.retry.model_dump()) if new.retry else None,
        delay=new.delay,
    )


def _request_bytes(request: list[Any]) -> bytes:
    return json.dumps([each.model_dump() for each in request], sort_keys=True).encode()


# --- following --------------------------------------------------------------------------------


@app.get(
    "/tasks",
    tags=["tasks"],
    summary="List tasks",
    operation_id="list_tasks",
    responses=web.problems(403, 422, 503),
)
async def list_tasks(
    request: Request,
    response: Response,
    scheduler: Running,
    state: Annotated[list[TaskState] | None, Query(description="Any of these.")] = None,
    name: Annotated[str | None, Query(max_length=200)] = None,
    priority: Annotated[Priority | None, Query()] = None,
    q: Annotated[
        str | None, Query(max_length=200, description="Text in the id, name, key or error.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> TaskPage:
    """Newest first; pages stay right while tasks come in."""
    wanted = Filter(
        states=[each.value for each in state or ()],
        name=name,
        priority=None if priority is None else TaskPriority[priority].value,
        text=q,
        before=None if cursor is None else _read_cursor(cursor),
        limit=limit + 1,
    )

    def page() -> list[dict[str, Any]]:
        scheduler.engine.see_all()
        return scheduler.store.page(wanted)

    rows = await run_in_threadpool(page)
    following = None
    if len(rows) > limit:
        rows.pop()
        following = _write_cursor(rows[-1]["seq"])
        url = request.url.include_query_params(cursor=following)
        response.headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'
    return TaskPage(items=[TaskItem(**_item(row)) for row in rows], next=following)


@app.delete(
    "/tasks/cleanup",
    tags=["tasks"],
    summary="Delete old tasks that have ended",
    operation_id="cleanup",
    responses=web.problems(403, 422, 503),
)
async def cleanup(
    scheduler: Running,
    days_old: Annotated[
        float, Query(ge=0, le=36_500, examples=[30], description="Since they ended.")
    ] = 30,
) -> Deleted:
    """With their results and events; parents of unfinished tasks stay."""
    deleted = await run_in_threadpool(scheduler.cleanup, days_old * 86_400)
    log.info("cleanup", days_old=days_old, deleted=deleted)
    return Deleted(deleted=deleted)


@app.get(
    "/tasks/{id}",
    tags=["tasks"],
    summary="One task",
    operation_id="get_task",
    responses={304: {"description": "As If-None-Match says."}, **web.problems(403, 404, 422, 503)},
)
async def get_task(
    request: Request,
    response: Response,
    scheduler: Running,
    id: Id,
    wait: Annotated[
        float, Query(ge=0, le=LONGEST_POLL, description="Seconds to wait for its end.")
    ] = 0,
    if_none_match: Annotated[str | None, Header(max_length=500)] = None,
) -> TaskDetail:
    """With `wait` the answer comes as soon as the task has ended, or when the time is over."""
    if wait:
        handle = await run_in_threadpool(scheduler.handle, id)
        await _ended(request, handle, wait)

    def detail() -> TaskDetail:
        row = scheduler.engine.row(id)
        progress = json.loads(row["progress"]) if row["progress"] else [None, None]
        return TaskDetail(
            **_item(row),
            dependencies=row["dependencies"],
            timeout=row["timeout"],
            run=row["run"] + 1,
            progress=progress[0],
            progress_text=progress[1],
            log=[note["line"] for note in scheduler.store.notes(row["seq"])],
            links={
                name: f"/tasks/{id}/{name}"
                for name in ("result", "attempts", "graph", "cancel", "retry")
            },
        )

    found = await run_in_threadpool(detail)
    tag = f'"{binascii.crc32(found.model_dump_json().encode()):08x}"'
    if if_none_match is not None and tag in if_none_match:
        return Response(status_code=304, headers={"ETag": tag})  # type: ignore[return-value]
    response.headers["ETag"] = tag
    return found


async def _ended(request: Request, handle: TaskHandle, seconds: float) -> None:
    """Until the task has ended, the time is over, or the server is told to stop."""
    ending = asyncio.ensure_future(handle.wait())
    stopping = asyncio.ensure_future(request.app.state.stopping.wait())
    try:
        await asyncio.wait((ending, stopping), timeout=seconds, return_when="FIRST_COMPLETED")
    finally:
        stopping.cancel()
        if ending.done() and not ending.cancelled():
            ending.exception()  # it is shown below, as what it is
        ending.cancel()


@app.get(
    "/tasks/{id}/result",
    tags=["tasks"],
    summary="What a task returned",
    operation_id="get_result",
    responses={
        202: {"model": ResultAnswer, "description": "It has not ended."},
        **web.problems(403, 404, 410, 422, 503),
    },
)
async def get_result(
    request: Request,
    response: Response,
    scheduler: Running,
    id: Id,
    wait: Annotated[float, Query(ge=0, le=LONGEST_POLL)] = 0,
) -> ResultAnswer:
    """A failed task is a 200 with its error: the request succeeded, the task did not."""
    if wait:
        handle = await run_in_threadpool(scheduler.handle, id)
        await _ended(request, handle, wait)

    def answer() -> ResultAnswer:
        row = scheduler.engine.row(id)
        found = ResultAnswer(id=id, state=row["state"], error=_error(row))
        if row["state"] not in TERMINAL:
            response.status_code = 202
        elif row["state"] == TaskState.COMPLETED:
            data = scheduler.store.result(row["seq"])
            if data is None:
                raise web.Problem(
                    410, "The result is not kept any more; POST …/retry runs it again."
                )
            found.output = shown(data)
        return found

    return await run_in_threadpool(answer)


@app.get(
    "/tasks/{id}/attempts",
    tags=["tasks"],
    summary="Every time it was handed to a worker",
    operation_id="get_attempts",
    responses=web.problems(403, 404, 422, 503),
)
async def get_attempts(scheduler: Running, id: Id) -> list[Attempt]:
    """Also those that were taken back before they began, and those that a crash ended."""

    def attempts() -> list[dict[str, Any]]:
        return attempts_of(scheduler.store.history(scheduler.engine.row(id)["seq"]))

    return [
        Attempt(**{**each, "started": utc(each["started"]), "finished": utc(each["finished"])})
        for each in await run_in_threadpool(attempts)
    ]


@app.get(
    "/tasks/{id}/graph",
    tags=["tasks"],
    summary="Ancestors and descendants",
    operation_id="get_graph",
    responses=web.problems(403, 404, 422, 503),
)
async def get_graph(scheduler: Running, id: Id) -> GraphAnswer:
    """At most 1,000 tasks around it."""

    def graph() -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
        return scheduler.store.graph(scheduler.engine.row(id)["seq"], GRAPH_TASKS)

    nodes, edges = await run_in_threadpool(graph)
    return GraphAnswer(nodes=[GraphNode(**node) for node in nodes], edges=edges)


# --- changing ---------------------------------------------------------------------------------


@app.post(
    "/tasks/{id}/cancel",
    tags=["tasks"],
    summary="End a task",
    operation_id="cancel_task",
    responses=web.problems(403, 404, 422, 503),
)
async def cancel_task(scheduler: Running, id: Id) -> Cancelled:
    """Also one that runs: its process is killed. What has ended stays as it is."""
    cancelled = await run_in_threadpool(scheduler.cancel_task, id)
    row = await run_in_threadpool(scheduler.engine.row, id)
    return Cancelled(id=id, state=row["state"], cancelled=cancelled)


@app.post(
    "/tasks/{id}/retry",
    status_code=202,
    tags=["tasks"],
    summary="Run a task that has ended again",
    operation_id="retry_task",
    responses=web.problems(403, 404, 409, 422, 429, 503),
)
async def retry_task(scheduler: Running, id: Id) -> Accepted:
    """As a new run, with a fresh budget of attempts."""
    handle = await run_in_threadpool(scheduler.retry_task, id)
    return Accepted(id=id, state=await run_in_threadpool(handle.status))


# --- the scheduler ----------------------------------------------------------------------------


@app.get(
    "/registry",
    tags=["scheduler"],
    summary="What can be asked for",
    operation_id="get_registry",
    responses=web.problems(403),
)
async def get_registry() -> list[RegistryItem]:
    """Names, with the JSON schema of their arguments."""
    return [
        RegistryItem(
            name=each.name,
            description=each.description,
            kind=each.kind,
            timeout=each.timeout,
            schema=each.schema(),
        )
        for each in registry
    ]


@app.get(
    "/workers",
    tags=["scheduler"],
    summary="The worker processes",
    operation_id="get_workers",
    responses=web.problems(403, 503),
)
async def get_workers(scheduler: Running) -> Workers:
    """What each does, with its CPU time and memory."""
    return await run_in_threadpool(_workers, scheduler)


@app.put(
    "/workers",
    tags=["scheduler"],
    summary="Have more or fewer",
    operation_id="scale_workers",
    responses=web.problems(400, 403, 415, 422, 503),
)
async def scale_workers(
    scheduler: Running, wanted: Annotated[WorkerCount, Body(examples=[{"count": 4}])]
) -> Workers:
    """More at once; fewer as they finish what they run."""
    await run_in_threadpool(scheduler.scale_workers, wanted.count)
    log.info("workers_scaled", count=wanted.count)
    return await run_in_threadpool(_workers, scheduler)


def _workers(scheduler: TaskScheduler) -> Workers:
    figures = scheduler.get_statistics()
    return Workers(count=figures["slots"]["cpu"], workers=figures["workers"])


@app.get(
    "/statistics",
    tags=["scheduler"],
    summary="Counts, throughput, utilisation, waits",
    operation_id="get_statistics",
    responses=web.problems(403, 503),
)
async def get_statistics(scheduler: Running) -> Statistics:
    """The counts are those of the stored tasks, as in `/metrics`."""
    return Statistics(**await run_in_threadpool(scheduler.get_statistics))


@app.get(
    "/events",
    tags=["scheduler"],
    summary="Every transition, as it is committed",
    operation_id="events",
    response_class=EventSourceResponse,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        **web.problems(403, 422),
    },
)
async def events(
    request: Request,
    scheduler: Running,
    last_event_id: Annotated[
        int | None, Header(ge=0, le=2**62, description="Go on after this one.")
    ] = None,
    after: Annotated[
        int | None, Query(ge=0, le=2**62, description="The same, for who cannot set headers.")
    ] = None,
    follow: Annotated[
        bool, Query(examples=[False], description="False: end with what there is.")
    ] = True,
) -> EventSourceResponse:
    """Server-sent events; without a position from now on (`follow=false`: from the first)."""
    position = last_event_id if last_event_id is not None else after
    if position is None:
        position = await run_in_threadpool(scheduler.store.last_event) if follow else 0
    return EventSourceResponse(_stream(request, scheduler, position, follow=follow))


async def _stream(
    request: Request, scheduler: TaskScheduler, position: int, *, follow: bool
) -> AsyncIterator[dict[str, Any]]:
    news: News = request.app.state.news
    stopping: asyncio.Event = request.app.state.stopping
    while not stopping.is_set():
        changed = news.next()
        try:
            found = await run_in_threadpool(scheduler.store.events, position, EVENTS_TOGETHER)
        except StoreUnavailable as error:  # the client comes back, with its Last-Event-ID
            log.warning("events_unavailable", error=str(error))
            return
        for event in found:
            position = event["eid"]
            data = {
                "id": event["id"], "name": event["name"], "from": event["from_state"],
                "to": event["to_state"], "at": utc(event["ts"]), "reason": event["reason"],
            }  # fmt: skip
            yield {"id": str(position), "event": event["to_state"], "data": json.dumps(data)}
        if found:
            continue
        if not follow:
            return
        waiting = [asyncio.ensure_future(each.wait()) for each in (changed, stopping)]
        try:
            await asyncio.wait(waiting, return_when="FIRST_COMPLETED")
        finally:
            for each in waiting:
                each.cancel()


# --- shapes -----------------------------------------------------------------------------------


def _item(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "name": row["name"],
        "state": row["state"],
        "priority": TaskPriority(row["priority"]).name,
        "kind": row["kind"],
        "attempts": row["attempts"],
        "crashes": row["crashes"],
        "created": utc(row["created"]),
        "started": utc(row["started"]),
        "finished": utc(row["finished"]),
        "run_at": utc(row["run_at"]),
        "duration_seconds": duration_of(row),
        "error": _error(row),
    }


def _error(row: dict[str, Any]) -> ErrorInfo | None:
    if not row["error"]:
        return None
    found = json.loads(row["error"])
    return ErrorInfo(type=found["type"], message=found["message"])


def _write_cursor(seq: int) -> str:
    return base64.urlsafe_b64encode(str(seq).encode()).decode().rstrip("=")


def _read_cursor(text: str) -> int:
    try:
        seq = int(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, binascii.Error):
        seq = -1
    if not 0 <= seq < 2**62:
        raise web.Problem(
            422, "The cursor was not issued here; take it from `next` of the page before."
        )
    return seq


if __name__ == "__main__":
    web.serve(app, port=settings.port)
