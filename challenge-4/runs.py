"""Running pipelines for clients: places, time, and what a failure is for whoever sent it.

A run happens in a thread, within a budget of time, for as long as somebody waits; the event loop
only waits and now and then looks at what the run is doing.
"""

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import structlog
from fastapi import Request, Response

import web
from budgets import SAMPLES, Budget, Stopped
from compiler import TooManyKeysError
from cursors import CursorError, SignedCursors
from databases import DatabaseError, is_driver_error
from datasets import Datasets
from language import Pipeline
from lazy import LazyCollection
from pages import Page
from pipelines import PipelineError, compile_pipeline
from saved import Saved, cursor_secret
from settings import Settings
from tables import DatabaseLazyCollection, UnorderedRowsError

log = structlog.stdlib.get_logger("lazy")

PAGE_BYTES = 16 * 1024 * 1024
T = TypeVar("T")


class Service:
    """What the running app holds: data sets, saved pipelines, and the places for runs."""

    def __init__(self, settings: Settings, stopping: asyncio.Event) -> None:
        directory = settings.data_dir
        url = settings.database_url.get_secret_value() if settings.database_url else None
        self.settings = settings
        self.stopping = stopping
        self.datasets = Datasets(directory / "datasets", url, settings.max_upload_bytes)
        self.saved = Saved(directory / "pipelines")
        self.datasets.prepare()
        self.saved.prepare()
        secret = settings.cursor_secret.get_secret_value() if settings.cursor_secret else None
        self.cursors = SignedCursors(cursor_secret(directory, secret))
        # Twice as many threads as runs: a run that was given up still ends in its own.
        self.threads = anyio.CapacityLimiter(2 * settings.max_runs + 2)
        self.running = 0
        self.runs = {"finished": 0, "failed": 0, "left": 0}
        self.rows = 0

    def take_place(self) -> None:
        """One of the places for runs, or 429."""
        if self.running >= self.settings.max_runs:
            raise web.Problem(
                429,
                f"{self.running} pipelines are running, which is the limit. Ask again.",
                headers={"Retry-After": "1"},
            )
        self.running += 1

    def give_back(self, outcome: str) -> None:
        """The place is free again."""
        self.running -= 1
        self.runs[outcome] += 1

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Call it in a thread, to its end."""
        return await anyio.to_thread.run_sync(function, limiter=self.threads)

    async def in_budget(self, function: Callable[[], T], budget: Budget) -> T:
        """Call it in a thread as what the budget is for; given up when nobody waits any more."""

        def bounded() -> T:
            with budget:
                return function()

        return await anyio.to_thread.run_sync(bounded, limiter=self.threads, abandon_on_cancel=True)

    def build(self, pipeline: Pipeline, budget: Budget) -> LazyCollection[Any]:
        """The collection of a pipeline; nothing runs yet."""
        dataset = self.datasets.find(pipeline.dataset)
        if dataset is None:
            names = ", ".join(each.name for each in self.datasets.all()[:20])
            raise web.Problem(404, f"There is no such data set; there are: {names}.")
        rows = self.datasets.open(dataset, budget)
        return compile_pipeline(pipeline, rows, dataset.fields)


async def run_bounded(
    service: Service,
    request: Request,
    pipeline: Pipeline,
    work: Callable[[LazyCollection[Any]], T],
) -> T:
    """Build and run a pipeline in a thread, within its time, for as long as somebody waits."""
    budget = Budget(service.settings.run_seconds)
    service.take_place()
    outcome = "failed"
    try:
        async with watched(service, budget, request):
            result = await service.in_budget(lambda: work(service.build(pipeline, budget)), budget)
    except Exception as error:
        # The boundary: a pipeline may fail in any way, and its sender is told in one shape.
        raise problem_of(error, pipeline, budget) from error
    else:
        outcome = "finished"
        return result
    finally:
        budget.left.set()
        service.give_back(outcome)


@asynccontextmanager
async def watched(
    service: Service, budget: Budget, request: Request | None = None
) -> AsyncIterator[None]:
    """Look at what the run is doing; end it when the service stops or its client has left."""

    async def sample() -> None:
        while True:
            await asyncio.sleep(budget.seconds / SAMPLES)
            budget.sample()

    async def until_stopped() -> None:
        await service.stopping.wait()
        budget.stopping.set()

    async def until_left(request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        budget.left.set()

    watchers = [asyncio.create_task(sample()), asyncio.create_task(until_stopped())]
    if request is not None:
        watchers.append(asyncio.create_task(until_left(request)))
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.cancel()


# --- failures ---------------------------------------------------------------------------------


def problem_of(error: Exception, pipeline: Pipeline, budget: Budget) -> web.Problem:
    """What went wrong with a pipeline, for its sender."""
    if isinstance(error, web.Problem):
        return error
    if isinstance(error, PipelineError):
        return _naming(error.number, str(error))
    if isinstance(error, TooManyKeysError):
        number = _number_in(error)
        return _naming(
            number, f"{_label(pipeline, number)}: too many different keys; filter first."
        )
    if isinstance(error, CursorError):
        return web.Problem(400, "The cursor was not issued for this pipeline. Start without one.")
    if isinstance(error, UnorderedRowsError):
        return web.Problem(
            422, "The rows cannot be paged through: their table has no primary key. Stream them."
        )
    # A database that is interrupted says so in its own words.
    if isinstance(error, Stopped) or (is_driver_error(error) and budget.over()):
        return _stopped(pipeline, budget)
    if isinstance(error, DatabaseError | OSError) or is_driver_error(error):
        log.warning("source_failed", error=type(error).__name__)
        return web.Problem(
            503, "The data set cannot be read now; ask again.", headers={"Retry-After": "2"}
        )
    log.error("run_failed", error=type(error).__name__, exc_info=error)
    return web.Problem(500, "The pipeline failed; the log of the service names this request.")


def _stopped(pipeline: Pipeline, budget: Budget) -> web.Problem:
    if budget.stopping.is_set():
        return web.Problem(
            503, "The service is stopping; run it again.", headers={"Retry-After": "2"}
        )
    number = budget.busiest()
    if 1 <= number <= len(pipeline.ops):
        doing = f"in {_label(pipeline, number)}"
    elif pipeline.ops:
        doing, number = f"reading rows for {_label(pipeline, 1)}", 1
    else:
        doing = "reading rows"
    detail = (
        f"The pipeline took too long: over {budget.seconds:g} s, most of it {doing}. Filter or "
        "take earlier."
    )
    return _naming(number, detail) if number else web.Problem(422, detail)


def _naming(number: int, detail: str) -> web.Problem:
    return web.Problem(422, detail, errors=[{"pointer": f"/ops/{number - 1}", "message": detail}])


def _label(pipeline: Pipeline, number: int) -> str:
    return f"op {number} {pipeline.ops[number - 1].op}"


def _number_in(error: Exception) -> int:
    """The number of the operation that the note of an error names."""
    found = (re.match(r"in op (\d+) ", note) for note in error.__notes__)
    return next((int(match[1]) for match in found if match), 1)


# --- answers ----------------------------------------------------------------------------------


def encode(value: Any) -> str:
    """JSON in one line; what JSON cannot say as a number is null."""
    try:
        return _encode(value)
    except ValueError:
        return _encode(_finite(value))


_encode = json.JSONEncoder(
    ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=str
).encode


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def encode_page(items: Iterable[Any]) -> list[str]:
    """The elements as JSON; a page of enormous rows is refused before all of it is read."""
    pieces: list[str] = []
    size = 0
    for item in items:
        pieces.append(encode(item))
        size += len(pieces[-1])
        if size > PAGE_BYTES:
            raise web.Problem(
                422, f"The page has more than {PAGE_BYTES:,} bytes. Lower limit, or batch less."
            )
    return pieces


def page_response(pieces: list[str], **members: Any) -> Response:
    """The answer with these elements."""
    rest = "".join(f',"{name}":{encode(value)}' for name, value in members.items())
    body = f'{{"items":[{",".join(pieces)}],"count":{len(pieces)}{rest}}}'
    return Response(body, media_type="application/json")


def next_page(
    chain: LazyCollection[Any], state: dict[str, Any], limit: int
) -> tuple[Page[Any], dict[str, Any] | None]:
    """A page, and where the one after it begins: by key where the source can, else by number."""
    if isinstance(chain, DatabaseLazyCollection):
        chain = chain.after(state["key"]) if "key" in state else chain
    offset = state.get("offset", 0)
    page = chain.skip(offset).page(1, limit)
    if not page.has_next:
        return page, None
    if page.cursor is not None and not offset:
        return page, {"key": page.cursor}
    return page, {**state, "offset": offset + limit}
