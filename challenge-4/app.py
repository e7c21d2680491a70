"""HTTP in, HTTP out: pipelines as JSON over data sets. No user code is ever evaluated.

Every run has a budget of time and happens in a thread, so that the event loop never waits for rows.
Run it with `uvicorn app:app`, or with `python app.py` on PORT.
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, closing
from itertools import islice
from typing import Annotated, Any, Literal

import structlog
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import BaseModel, Field

import web
from budgets import Budget, Stopped
from databases import DatabaseError
from datasets import Dataset
from language import OP_EXAMPLES, OP_MODELS, Pipeline
from pipelines import PipelineError
from runs import (
    Service,
    encode_page,
    next_page,
    page_response,
    problem_of,
    run_bounded,
    watched,
)
from saved import Full
from settings import Settings
from streaming import RowsResponse, RowStream, next_piece
from uploads import UploadRefused
from utils import LazyCollection, LazyError

log = structlog.stdlib.get_logger("lazy")
settings = web.read_settings(Settings)

CHECK_SECONDS = 100  # for the lines of an upload, once they are here


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Prepare the directory of the data."""
    try:
        app.state.service = Service(settings, app.state.stopping)
    except OSError as error:
        raise web.StartupRefused(
            f"DATA_DIR {settings.data_dir} cannot be used: {error.strerror}."
        ) from error
    except DatabaseError as error:
        raise web.StartupRefused(str(error)) from error
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
    counts: list[int | None] = Field(
        description="With analyze: what left the source, then each operation; null: the source or "
        "a neighbour has taken it over."
    )


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


# --- pipelines --------------------------------------------------------------------------------


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
        with closing(iter(chain.take(limit + 1))) as rows:  # type: ignore[type-var]
            items = encode_page(islice(rows, limit))
            service.rows += len(items)
            return page_response(items, has_next=any(True for _ in rows))

    return await run_bounded(service, request, pipeline, work)


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
            counts=plan.counts,
        )  # fmt: skip

    return await run_bounded(service_of(request), request, pipeline, work)


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
async def stream_pipeline(request: Request, pipeline: Pipeline) -> RowsResponse:
    """Elements are sent as they come. Without the last line the stream was cut."""
    service = service_of(request)
    budget = Budget(settings.stream_seconds)
    service.take_place()
    try:
        # What fails at once is answered with its status, before the headers.
        async with watched(service, budget, request):
            stream = await service.in_thread(lambda: RowStream(service, pipeline, budget))
            first, more = await next_piece(stream)
    except BaseException as error:
        budget.left.set()
        service.give_back("failed")
        if isinstance(error, Exception):
            raise problem_of(error, pipeline, budget) from error
        raise
    if stream.failure is not None:
        service.give_back("failed")
        raise stream.failure
    return RowsResponse(stream, first, more=more)


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
    budget = Budget(settings.run_seconds)

    def save() -> str:
        service.build(pipeline, budget)
        return service.saved.save(
            pipeline.model_dump(mode="json", by_alias=True, exclude_unset=True)
        )

    try:
        name = await service.in_thread(save)
    except Full as error:
        raise web.Problem(429, str(error), headers={"Retry-After": "3600"}) from None
    except (PipelineError, OSError) as error:
        raise problem_of(error, pipeline, budget) from error
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
        answer = page_response(encode_page(page.items), next=token)
        links = [f'<{request.url.path}?limit={limit}>; rel="first"']
        if token:
            links.insert(0, f'<{request.url.path}?limit={limit}&cursor={token}>; rel="next"')
        answer.headers["Link"] = ", ".join(links)
        return answer

    return await run_bounded(service_of(request), request, pipeline, work)


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
            budget = Budget(CHECK_SECONDS)
            async with watched(service, budget, request):
                dataset, skipped = await service.in_thread(
                    lambda: service.datasets.keep(path, name, form, bad_lines, budget)
                )
        finally:
            file.close()
            path.unlink(missing_ok=True)
    except UploadRefused as error:
        headers = {"Retry-After": "3600"} if error.status == 429 else {}
        raise web.Problem(error.status, str(error), headers=headers) from None
    except Stopped:
        if service.stopping.is_set():
            raise web.Problem(503, "The service is stopping; nothing of it was kept.") from None
        raise web.Problem(
            413, f"Checking its lines took more than {CHECK_SECONDS} s; upload it in parts."
        ) from None
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
