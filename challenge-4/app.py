"""HTTP in, HTTP out: pipelines as JSON over data sets. No user code is ever evaluated.

Every run has a budget of time and happens in a thread, so that the event loop never waits for rows.
Run it with `uvicorn app:app`, or with `python app.py` on PORT.
"""

import asyncio
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any, Literal, TypeVar

import anyio
import structlog
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import BaseModel, Field

import web
from cursors import SignedCursors
from datasets import Budget, Dataset, Datasets, Stopped, UploadRefused
from pipelines import OP_EXAMPLES, OP_MODELS, Pipeline, PipelineError, compile_pipeline
from saved import Full, Saved, cursor_secret
from settings import Settings
from utils import DatabaseError, DatabaseLazyCollection, LazyCollection, LazyError, Page

log = structlog.stdlib.get_logger("lazy")
settings = Settings()

CHUNK_BYTES = 32 * 1024
CHUNK_SECONDS = 0.05  # a slow stream is sent in pieces of this age
PAGE_BYTES = 16 * 1024 * 1024
T = TypeVar("T")


class Service:
    """What the running app holds: data sets, saved pipelines, and the places for runs."""

    def __init__(self) -> None:
        directory = settings.data_dir
        url = settings.database_url.get_secret_value() if settings.database_url else None
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

    @contextmanager
    def run(self) -> Iterator[None]:
        """One of the places for runs, or 429."""
        if self.running >= settings.max_runs:
            raise web.Problem(
                429,
                f"{self.running} pipelines are running, which is the limit. Ask again.",
                headers={"Retry-After": "1"},
            )
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def in_thread(self, function: Callable[[], T], budget: Budget | None = None) -> T:
        """Call it in a thread; when nobody waits any more, its budget ends."""
        try:
            return await anyio.to_thread.run_sync(
                function, limiter=self.threads, abandon_on_cancel=budget is not None
            )
        finally:
            if budget is not None:
                budget.left.set()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Prepare the directory of the data."""
    try:
        app.state.service = Service()
    except OSError as error:
        raise web.StartupRefused(
            f"DATA_DIR {settings.data_dir} cannot be used: {error.strerror}."
        ) from error
    log.info("data", directory=str(settings.data_dir.resolve()))
    yield


def service_of(request: Request) -> Service:
    """The running service."""
    service: Service = request.app.state.service
    return service


def collect() -> Iterable[Metric]:
    """The figures of the runs for Prometheus."""
    service: Service | None = getattr(app.state, "service", None)
    if service is None:
        return
    runs = CounterMetricFamily("lazy_runs", "Pipelines run.", labels=["outcome"])
    for outcome, number in service.runs.items():
        runs.add_metric([outcome], number)
    yield runs
    yield CounterMetricFamily("lazy_rows", "Elements sent.", service.rows)
    yield GaugeMetricFamily("lazy_running", "Pipelines running now.", service.running)


def data_works() -> bool:
    """Whether the directory of the data is there."""
    service: Service = app.state.service
    return service.datasets.directory.is_dir()


app: FastAPI = web.create_app(
    title="Lazy collections",
    description="Pipelines over data sets, described as JSON and compiled to one loop or to SQL. "
    "No user code is evaluated; every run is bounded in size and time.",
    lifespan=lifespan,
    api_key=settings.api_key.get_secret_value() if settings.api_key else None,
    log_level=settings.log_level,
    limits=web.Limits(answer_seconds=max(120.0, 2 * settings.run_seconds)),
    checks={"data": data_works},
    collect=collect,
    streaming=("/datasets",),
    tags=[
        {"name": "pipelines", "description": "Run, stream, explain, save and page through."},
        {"name": "data", "description": "What pipelines run over."},
        {"name": "service", "description": "Health and metrics."},
    ],
)


# --- models -----------------------------------------------------------------------------------


class RunAnswer(BaseModel):
    """One page of elements: rows, values or lists, as the pipeline ends."""

    items: list[Any]
    count: int = Field(description="How many are on this page.")
    has_next: bool = Field(description="Whether there are more; save the pipeline to get them.")


class RowsAnswer(BaseModel):
    """One page of a saved pipeline."""

    items: list[Any]
    count: int
    next: str | None = Field(description="The cursor of the next page; null on the last one.")


class ExplainAnswer(BaseModel):
    """What will run."""

    text: str
    segments: int
    sql: str | None
    pushed: list[str]
    inlined: list[int] = Field(description="Numbers of operations written into the loop.")
    merged: list[str]
    counts: list[int] = Field(description="With analyze: what left each operation; 0: the source.")


class SavedAnswer(BaseModel):
    """Where the pipeline is."""

    id: str
    rows: str = Field(description="The path of its rows.")


class DatasetItem(BaseModel):
    """A data set."""

    name: str
    kind: Literal["airports", "table", "upload"]
    fields: list[str]
    rows: int | None = Field(description="Null where only the database knows.")
    bytes: int | None


class DatasetList(BaseModel):
    """All of them."""

    items: list[DatasetItem]


class UploadAnswer(DatasetItem):
    """The data set as it was kept."""

    skipped_lines: int


class OpItem(BaseModel):
    """An operation of the language."""

    op: str
    description: str
    example: dict[str, Any]
    json_schema: dict[str, Any]


class OpList(BaseModel):
    """The language."""

    items: list[OpItem]


# --- running ----------------------------------------------------------------------------------


def build(service: Service, pipeline: Pipeline, budget: Budget) -> LazyCollection[Any]:
    """The collection of a pipeline; nothing runs yet."""
    dataset = service.datasets.find(pipeline.dataset)
    if dataset is None:
        names = ", ".join(each.name for each in service.datasets.all()[:20])
        raise web.Problem(404, f"There is no such data set; there are: {names}.")
    rows = service.datasets.open(dataset, budget)
    return compile_pipeline(pipeline, rows, dataset.fields)


def problem_of(error: Exception, pipeline: Pipeline) -> web.Problem:
    """What went wrong with a pipeline, for its sender."""
    if isinstance(error, web.Problem):
        return error
    if isinstance(error, PipelineError):
        pointer = f"/ops/{error.number - 1}"
        return web.Problem(422, str(error), errors=[{"pointer": pointer, "message": str(error)}])
    if isinstance(error, Stopped) or "interrupted" in str(error) or "timeout" in str(error):
        first = f"op 1 {pipeline.ops[0].op}" if pipeline.ops else "reading"
        return web.Problem(
            422,
            f"The pipeline took too long, at {first} and what follows. Filter or take earlier, or "
            "stream it.",
        )
    if isinstance(error, DatabaseError | OSError):
        log.warning("source_failed", error=type(error).__name__)
        return web.Problem(
            503, "The data set cannot be read now; ask again.", headers={"Retry-After": "2"}
        )
    log.error("run_failed", error=type(error).__name__, exc_info=error)
    return web.Problem(500, "The pipeline failed; the log of the service names this request.")


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


def json_page(items: list[Any], **members: Any) -> Response:
    """The answer, encoded once; pages of enormous rows are refused."""
    pieces: list[str] = []
    size = 0
    for item in items:
        pieces.append(encode(item))
        size += len(pieces[-1])
        if size > PAGE_BYTES:
            raise web.Problem(
                422, f"The page has more than {PAGE_BYTES:,} bytes. Lower limit, or batch less."
            )
    rest = "".join(f',"{name}":{encode(value)}' for name, value in members.items())
    body = f'{{"items":[{",".join(pieces)}],"count":{len(items)}{rest}}}'
    return Response(body, media_type="application/json")


@asynccontextmanager
async def ending_with_the_client(request: Request, budget: Budget) -> AsyncIterator[None]:
    """End the budget when the client leaves before there is an answer."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        budget.left.set()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


async def run_bounded(
    request: Request, pipeline: Pipeline, work: Callable[[LazyCollection[Any]], T]
) -> T:
    """Build and run a pipeline in a thread, within its time, for as long as somebody waits."""
    service = service_of(request)
    budget = Budget(settings.run_seconds)
    with service.run():
        try:
            async with ending_with_the_client(request, budget):
                result = await service.in_thread(
                    lambda: work(build(service, pipeline, budget)), budget
                )
        except Exception as error:
            # The boundary: a pipeline may fail in any way, and its sender is told in one shape.
            service.runs["failed"] += 1
            raise problem_of(error, pipeline) from error
        service.runs["finished"] += 1
        return result


@app.post(
    "/pipelines/run",
    tags=["pipelines"],
    summary="Run a pipeline: its first page",
    operation_id="run_pipeline",
    response_model=RunAnswer,
    responses=web.problems(400, 404, 413, 415, 422, 429, 503),
)
async def run_pipeline(
    request: Request,
    pipeline: Pipeline,
    limit: Annotated[int, Query(ge=1, le=1000, description="Elements on the page.")] = 100,
) -> Response:
    """Elements in the order of the data set. An error names the operation, counted from 1."""
    service = service_of(request)

    def work(chain: LazyCollection[Any]) -> Response:
        items = chain.take(limit + 1).collect()
        service.rows += min(limit, len(items))
        return json_page(items[:limit], has_next=len(items) > limit)

    return await run_bounded(request, pipeline, work)


@app.post(
    "/pipelines/explain",
    tags=["pipelines"],
    summary="What would run",
    operation_id="explain_pipeline",
    responses=web.problems(400, 404, 413, 415, 422, 429, 503),
)
async def explain_pipeline(
    request: Request,
    pipeline: Pipeline,
    analyze: Annotated[bool, Query(description="Run it, and count.")] = False,
) -> ExplainAnswer:
    """Segments, what is written into the loop, and what the database does, with its SQL."""

    def work(chain: LazyCollection[Any]) -> ExplainAnswer:
        plan = chain.explain(analyze=analyze)
        return ExplainAnswer(
            text=str(plan), segments=plan.segments, sql=plan.sql, pushed=plan.pushed,
            inlined=plan.inlined, merged=plan.merged,
            counts=plan.counts[: len(chain.ops) + 1],
        )  # fmt: skip

    return await run_bounded(request, pipeline, work)


# --- streaming --------------------------------------------------------------------------------


class RowStream:
    """Lines of a running pipeline, made in threads, a piece at a time; the last line is the end.

    Whoever leaves sets the budget's `left`: the piece being made ends soon, and closes the rows.
    """

    def __init__(self, service: Service, pipeline: Pipeline, budget: Budget) -> None:
        self.service, self.pipeline, self.budget = service, pipeline, budget
        self.rows: Iterator[Any] | None = iter(build(service, pipeline, budget))
        self.count = 0
        self._lock = threading.Lock()  # a piece may still be in the making when the client leaves

    def piece(self) -> tuple[str, bool]:
        """The next lines, and whether there are more."""
        with self._lock:
            if self.budget.left.is_set():
                self.close()
                return "", False
            made = self._make()
            if self.budget.left.is_set():
                self.close()
            return made

    def _make(self) -> tuple[str, bool]:
        lines: list[str] = []
        size, started = 0, time.monotonic()
        rows = self.rows or iter(())
        try:
            for row in rows:
                lines.append(encode(row))
                size += len(lines[-1]) + 1
                self.count += 1
                if size >= CHUNK_BYTES or time.monotonic() - started > CHUNK_SECONDS:
                    return "".join(f"{line}\n" for line in lines), True
            lines.append(encode({"end": True, "count": self.count}))
        except Exception as error:  # noqa: BLE001
            # The boundary: the headers are sent, so the error is a line of its own.
            problem = problem_of(error, self.pipeline)
            lines.append(encode({"error": {"status": problem.status_code,
                                           "detail": str(problem.detail)}}))  # fmt: skip
            self.budget.left.set()
        self.close()
        return "".join(f"{line}\n" for line in lines), False

    def close(self) -> None:
        """Close the rows, and with them the cursor of the database."""
        rows, self.rows = self.rows, None
        if rows is not None:
            rows.close()  # type: ignore[attr-defined]

    def leave(self) -> None:
        """Nobody reads any more; if a piece is being made, it closes the rows itself."""
        self.budget.left.set()
        if self._lock.acquire(blocking=False):
            try:
                self.close()
            finally:
                self._lock.release()


@app.post(
    "/pipelines/stream",
    tags=["pipelines"],
    summary="Run a pipeline: all elements, as NDJSON",
    operation_id="stream_pipeline",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": 'One element per line, then `{"end": true, "count": n}`, or an error.',
            "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
        },
        **web.problems(400, 404, 413, 415, 422, 429, 503),
    },
)
async def stream_pipeline(request: Request, pipeline: Pipeline) -> StreamingResponse:
    """Elements are sent as they come. Without the last line the stream was cut."""
    service = service_of(request)
    budget = Budget(settings.stream_seconds)
    place = service.run()
    place.__enter__()
    try:
        stream = await service.in_thread(lambda: RowStream(service, pipeline, budget))
        # What fails at once is answered with its status, before the headers.
        async with ending_with_the_client(request, budget):
            first, more = await _piece(service, stream)
        _raise_first_problem(first, failed=not more and budget.left.is_set())
    except BaseException as error:
        service.runs["failed"] += 1
        budget.left.set()
        place.__exit__(None, None, None)
        if isinstance(error, Exception):
            raise problem_of(error, pipeline) from error
        raise

    async def lines() -> AsyncIterator[str]:
        outcome = "left"
        text, goes_on = first, more
        try:
            yield text
            while goes_on:
                text, goes_on = await _piece(service, stream)
                yield text
            outcome = "failed" if budget.left.is_set() else "finished"
        finally:
            stream.leave()
            service.runs[outcome] += 1
            service.rows += stream.count
            place.__exit__(None, None, None)

    return StreamingResponse(lines(), media_type="application/x-ndjson")


async def _piece(service: Service, stream: RowStream) -> tuple[str, bool]:
    try:
        return await anyio.to_thread.run_sync(
            stream.piece, limiter=service.threads, abandon_on_cancel=True
        )
    except BaseException:
        stream.leave()
        raise


def _raise_first_problem(text: str, *, failed: bool) -> None:
    if failed:
        error = json.loads(text.splitlines()[-1])["error"]
        headers = {"Retry-After": "2"} if error["status"] == 503 else {}
        raise web.Problem(error["status"], error["detail"], headers=headers)


# --- saved pipelines --------------------------------------------------------------------------


@app.post(
    "/pipelines",
    tags=["pipelines"],
    summary="Save a pipeline",
    operation_id="save_pipeline",
    status_code=201,
    responses=web.problems(400, 404, 413, 415, 422, 429, 503),
)
async def save_pipeline(request: Request, response: Response, pipeline: Pipeline) -> SavedAnswer:
    """It is checked and kept on the disk; the same pipeline always gets the same id."""
    service = service_of(request)

    def save() -> str:
        build(service, pipeline, Budget(settings.run_seconds))
        return service.saved.save(
            pipeline.model_dump(mode="json", by_alias=True, exclude_unset=True)
        )

    try:
        name = await service.in_thread(save)
    except Full as error:
        raise web.Problem(429, str(error), headers={"Retry-After": "3600"}) from None
    except (PipelineError, OSError) as error:
        raise problem_of(error, pipeline) from error
    rows = f"/pipelines/{name}/rows"
    response.headers["Location"] = rows
    return SavedAnswer(id=name, rows=rows)


@app.get(
    "/pipelines/{id}/rows",
    tags=["pipelines"],
    summary="Page through a saved pipeline",
    operation_id="pipeline_rows",
    response_model=RowsAnswer,
    responses=web.problems(400, 404, 422, 429, 503),
)
async def pipeline_rows(
    request: Request,
    id: str,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Annotated[
        str | None, Query(description="From `next`, or from the Link header.")
    ] = None,
) -> Response:
    """Follow `Link: <…>; rel="next"` to the end. A cursor belongs to its pipeline alone."""
    service = service_of(request)
    plan = await service.in_thread(lambda: service.saved.find(id))
    if plan is None:
        raise web.Problem(404, "There is no such pipeline; POST /pipelines saves one.")
    state: dict[str, Any] | None = {}
    if cursor is not None and (state := service.cursors.read(id, cursor)) is None:
        raise web.Problem(400, "The cursor was not issued for this pipeline. Start without one.")
    pipeline = Pipeline.model_validate(plan)

    def work(chain: LazyCollection[Any]) -> Response:
        page, following = next_page(chain, state or {}, limit)
        service.rows += len(page)
        token = service.cursors.write(id, following) if following else None
        answer = json_page(page.items, next=token)
        links = [f'<{request.url.path}?limit={limit}>; rel="first"']
        if token:
            links.insert(0, f'<{request.url.path}?limit={limit}&cursor={token}>; rel="next"')
        answer.headers["Link"] = ", ".join(links)
        return answer

    return await run_bounded(request, pipeline, work)


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


# --- data -------------------------------------------------------------------------------------


@app.get(
    "/datasets",
    tags=["data"],
    summary="What pipelines can run over",
    operation_id="list_datasets",
    responses=web.problems(503),
)
async def list_datasets(request: Request) -> DatasetList:
    """Built-in data sets and uploads, by name."""
    service = service_of(request)
    found = await service.in_thread(service.datasets.all)
    return DatasetList(items=[_item(each) for each in found])


def _item(dataset: Dataset) -> DatasetItem:
    return DatasetItem(
        name=dataset.name, kind=dataset.kind, fields=dataset.fields, rows=dataset.rows,
        bytes=dataset.bytes,
    )  # fmt: skip


_NDJSON_EXAMPLE = '{"city":"Bern","people":134000}\n{"city":"Basel","people":178000}\n'
_CSV_EXAMPLE = "city,people\nBern,134000\nBasel,178000\n"
_FORMS = {"application/x-ndjson": "ndjson", "application/jsonl": "ndjson",
          "application/ndjson": "ndjson", "text/plain": "ndjson", "text/csv": "csv"}  # fmt: skip


@app.post(
    "/datasets",
    tags=["data"],
    summary="Upload a data set",
    operation_id="upload_dataset",
    status_code=201,
    responses=web.problems(400, 408, 409, 413, 415, 422, 429, 503, 507),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "text/plain": {"schema": {"type": "string"}, "example": _NDJSON_EXAMPLE},
                "application/x-ndjson": {"schema": {"type": "string"}, "example": _NDJSON_EXAMPLE},
                "text/csv": {"schema": {"type": "string"}, "example": _CSV_EXAMPLE},
            },
        }
    },
)
async def upload_dataset(
    request: Request,
    name: Annotated[
        str,
        Query(pattern=r"^[A-Za-z0-9_-]{1,64}$", examples=["cities"], description="Its name."),
    ],
    bad_lines: Annotated[
        Literal["raise", "skip"], Query(description="What a bad line does: refuse all, or itself.")
    ] = "raise",
) -> UploadAnswer:
    """NDJSON (objects) or CSV with a header, gzip or not, of any size, in constant memory.

    It replaces an upload of the same name once it is whole. In CSV a column whose every value is a
    number holds numbers. Choose `text/plain` for NDJSON in this page.
    """
    service = service_of(request)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    form = _FORMS.get(media_type)
    if form is None:
        raise web.Problem(415, "Send Content-Type: application/x-ndjson or text/csv.")
    if request.headers.get("content-encoding", "identity").lower() not in ("identity", "gzip"):
        raise web.Problem(415, "The only Content-Encoding known here is gzip.")
    try:
        file, path = await service.in_thread(service.datasets.receive)
        try:
            await _receive(request, service, file)
            dataset, skipped = await service.in_thread(
                lambda: service.datasets.keep(path, name, form, bad_lines)
            )
        finally:
            file.close()
            path.unlink(missing_ok=True)
    except UploadRefused as error:
        headers = {"Retry-After": "3600"} if error.status == 429 else {}
        raise web.Problem(error.status, str(error), headers=headers) from None
    except LazyError:
        raise web.Problem(400, "The body is not a whole gzip file.") from None
    except OSError as error:
        full = error.errno in (27, 28, 122)  # EFBIG, ENOSPC, EDQUOT
        raise web.Problem(
            507 if full else 503, "The upload cannot be stored now; nothing of it was kept.",
            headers={"Retry-After": "5"},
        ) from error  # fmt: skip
    return UploadAnswer(**_item(dataset).model_dump(), skipped_lines=skipped)


async def _receive(request: Request, service: Service, file: Any) -> None:
    size = 0
    pieces: list[bytes] = []
    held = 0
    async for piece in request.stream():
        size += len(piece)
        if size > settings.max_upload_bytes:
            raise web.Problem(
                413, f"An upload has at most {settings.max_upload_bytes:,} bytes here."
            )
        pieces.append(piece)
        held += len(piece)
        if held >= 1024 * 1024:
            data, pieces, held = b"".join(pieces), [], 0
            await service.in_thread(lambda data=data: file.write(data))  # type: ignore[misc]
    file.write(b"".join(pieces))
    file.flush()


@app.get("/ops", tags=["data"], summary="The language of pipelines", operation_id="list_ops")
async def list_ops() -> OpList:
    """Every operation with its JSON schema and an example over the airports."""
    return OpList(
        items=[
            OpItem(
                op=name, description=(model.__doc__ or "").strip(), example=OP_EXAMPLES[name],
                json_schema=model.model_json_schema(),
            )
            for name, model in OP_MODELS.items()
        ]
    )  # fmt: skip


if __name__ == "__main__":
    web.serve(app, port=settings.port)
