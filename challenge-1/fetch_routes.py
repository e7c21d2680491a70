"""Fetching over HTTP: `POST /fetch/runs` begins a run, `GET /fetch/runs/{id}` tells how far it is.

One run at a time: the sources are asked at one rate, and there is one out/summary.json. What is
fetched from where is configuration (config.yaml, PIPELINE_*), never part of a request. What fetches
is imported by the first run: a service that only takes webhooks does without its 7 MB.
"""

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, Annotated, Any, Final

import structlog
from fastapi import APIRouter, Body, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

import web
from holder import Held, Holder
from journal import NothingToResume

if TYPE_CHECKING:
    from fetch_settings import FetchSettings
    from fetching import FetchRun
    from limiter import RateLimiter

log = structlog.stdlib.get_logger("fetch")
router = APIRouter(prefix="/fetch", tags=["fetch"])

KEPT_RUNS: Final = 20
TAG: Final = {"name": "fetch", "description": "Products in, from APIs that fail and limit."}


class RunRequest(BaseModel):
    """What to fetch; everything has a default."""

    model_config = ConfigDict(extra="forbid")

    sources: list[str] | None = Field(
        default=None, min_length=1, max_length=100, description="Names out of the configuration."
    )
    pipeline: str | None = Field(
        default=None, max_length=64, description="Also send the products into this pipeline."
    )
    timeout: Annotated[float, Field(strict=True, gt=0, le=3600, allow_inf_nan=False)] | None = (
        Field(default=None, description="Seconds for the whole run.")
    )
    resume: bool = Field(default=False, strict=True, description="Go on with a run that was cut.")


class SourceProgress(BaseModel):
    """How far one source is."""

    source: str
    items: int = Field(description="Products.")
    requests_done: int
    requests_expected: int | None = Field(description="Null while it is not known.")
    failed: int
    errors: dict[str, int] = Field(description="Failed attempts and unusable records, by kind.")
    retries: int
    paused: int = Field(description="How often it answered 429.")
    breaker: str
    breaker_openings: int
    rate: float | None = Field(description="Requests per second.")
    finished: bool


class RunAnswer(BaseModel):
    """A run: `running` until it ended; the products are in out/summary.json."""

    id: str
    status: str = Field(examples=["running"], description="Or `finished`, `timeout`, `stopped`.")
    partial: bool | None = Field(description="Whether something is missing; null while it runs.")
    total: int = Field(description="Products so far.")
    seconds: float
    sources: list[SourceProgress]
    summary: dict[str, Any] | None = Field(description="Of the summary, once it is written.")


class Runs:
    """The runs of this process, the limiters they share, and the one that goes on.

    Of a run that ended its figures are kept, not its products.
    """

    def __init__(self) -> None:
        self.limiters: dict[str, RateLimiter] = {}
        self.active: FetchRun | None = None
        self._ended: OrderedDict[str, RunAnswer] = OrderedDict()
        self._task: asyncio.Task[None] | None = None

    def find(self, run_id: str) -> RunAnswer | None:
        """How far a run is, by its id; `latest` is one, too."""
        if self.active is not None and run_id in ("latest", self.active.id):
            return _answer(self.active)
        if run_id == "latest":
            return next(reversed(self._ended.values()), None)
        return self._ended.get(run_id)

    def refuse_a_second(self) -> None:
        """Raise a Problem while a run goes on."""
        if self.active is not None:
            raise web.Problem(
                409,
                f"Run {self.active.id} goes on; ask for it at /fetch/runs/{self.active.id}.",
                run_id=self.active.id,
            )

    def start(self, run: "FetchRun", lock: Holder, stopping: asyncio.Event) -> None:
        """Begin it; raise NothingToResume. It ends by itself, or with the server."""
        try:
            run.prepare()
        except BaseException:
            lock.release()
            raise
        self.active = run
        self._ended.pop(run.id, None)  # resumed
        self._task = asyncio.create_task(self._run(run, lock, stopping))

    async def _run(self, run: "FetchRun", lock: Holder, stopping: asyncio.Event) -> None:
        stop = asyncio.create_task(_cut_when(stopping, run))
        try:
            await run.run()
        except Exception as error:
            # The boundary of a task nobody waits for: it is told here, or nowhere.
            log.exception("run_failed", run_id=run.id, error=type(error).__name__)
        finally:
            stop.cancel()
            lock.release()
            self.active = None
            self._ended[run.id] = _answer(run)
            while len(self._ended) > KEPT_RUNS:
                self._ended.popitem(last=False)


async def _cut_when(stopping: asyncio.Event, run: "FetchRun") -> None:
    await stopping.wait()
    run.cut("stopped")


def runs_of(request: Request) -> Runs:
    """The runs of this app."""
    state = request.app.state
    if not hasattr(state, "fetch_runs"):
        state.fetch_runs = Runs()
    runs: Runs = state.fetch_runs
    return runs


@router.post(
    "/runs",
    status_code=202,
    summary="Begin to fetch",
    operation_id="fetch_runs_start",
    responses=web.problems(403, 404, 409, 413, 415, 422, 503),
    openapi_extra={"requestBody": {"content": {"application/json": {"example": {"timeout": 30}}}}},
)
async def start(
    request: Request,
    response: Response,
    wanted: Annotated[RunRequest, Body(default_factory=RunRequest)],
) -> RunAnswer:
    """Fetch from the configured sources in the background; 409 while another run goes on."""
    runs = runs_of(request)
    runs.refuse_a_second()
    settings = await run_in_threadpool(_settings, wanted)
    runs.refuse_a_second()  # one may have begun meanwhile
    from doors import PipelineDoor
    from fetching import FetchRun

    try:
        door = None
        if settings.pipeline is not None:
            door = PipelineDoor(request.app.state.pipeline, settings.pipeline)
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        lock = Holder(settings.output_dir / "fetch.lock")
        run = FetchRun(settings, resume=wanted.resume, door=door, limiters=runs.limiters)
        runs.start(run, lock, request.app.state.stopping)
    except NothingToResume:
        raise web.Problem(
            409, "There is no cut run over these sources; begin one without `resume`."
        ) from None
    except Held:
        raise web.Problem(409, "Another process is fetching here; wait for it.") from None
    except OSError as error:
        raise web.Problem(
            503, "The directory of the summary cannot be written.", headers={"Retry-After": "5"}
        ) from error
    response.headers["Location"] = f"/fetch/runs/{run.id}"
    return _answer(run)


@router.get(
    "/runs/{run_id}",
    summary="How far a run is",
    operation_id="fetch_runs_get",
    responses=web.problems(403, 404, 422),
)
async def progress(
    request: Request,
    run_id: Annotated[
        str,
        Path(
            max_length=64, description="Of a run of this process, or `latest`.", examples=["latest"]
        ),
    ],
) -> RunAnswer:
    """Live figures per source; after the end also those of the summary, without its products."""
    answer = runs_of(request).find(run_id)
    if answer is None:
        raise web.Problem(404, "There is no such run here; the last 20 since the start are kept.")
    return answer


def _settings(wanted: RunRequest) -> "FetchSettings":
    import fetching  # noqa: F401  (takes its time here, in a thread; then `start` has it)
    from fetch_settings import ConfigurationError, load

    try:
        settings = load().settings
    except ConfigurationError as error:
        log.warning("configuration", faults=str(error).splitlines())
        raise web.Problem(
            503,
            "The configuration of the sources cannot be used; `python fetch.py --print-config` "
            "says why.",
        ) from None
    changes: dict[str, Any] = {}
    if wanted.sources is not None:
        known = {source.name: source for source in settings.sources}
        if unknown := [name for name in wanted.sources if name not in known]:
            raise web.Problem(
                422,
                f"{len(unknown)} of these sources are not configured; there are: "
                f"{', '.join(known)}.",
            )
        changes["sources"] = [known[name] for name in dict.fromkeys(wanted.sources)]
    elif not settings.sources:
        raise web.Problem(503, "No sources are configured; name them in config.yaml.")
    if wanted.timeout is not None:
        changes["timeout"] = wanted.timeout
    if wanted.pipeline is not None:
        changes["pipeline"] = wanted.pipeline
    return settings.model_copy(update=changes)


def _answer(run: "FetchRun") -> RunAnswer:
    summary = run.summary
    shown = None
    if summary is not None:
        shown = {key: value for key, value in summary.items() if key != "products"}
        shown["errors"] = summary["errors"][:20]
    return RunAnswer(
        id=run.id,
        status=run.ended or "running",
        partial=None if summary is None else summary["partial"],
        total=sum(len(state.products) for state in run.states.values()),
        seconds=round(run.seconds, 3),
        sources=[SourceProgress(**each) for each in run.progress()],
        summary=shown,
    )
