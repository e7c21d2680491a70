"""What goes in and out over HTTP."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from drills import Fault

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Milliseconds = Annotated[float, Field(ge=0, le=2000, allow_inf_nan=False, strict=True)]
QueueName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")]
PARTS_MAX = 50


class Strict(BaseModel):
    """A request body in which unknown members are errors."""

    model_config = ConfigDict(extra="forbid")


# --- in ---------------------------------------------------------------------------------------


class DrillPart(Strict):
    """A synthetic resource: what it needs, how long it takes, and how it fails."""

    name: Name
    needs: list[Name] = Field(default_factory=list, max_length=PARTS_MAX)
    acquire_ms: Milliseconds = 0.0
    release_ms: Milliseconds = 0.0
    fault: Fault = "none"


class DrillRequest(Strict):
    """A graph of synthetic resources, and what happens to the body that uses them."""

    resources: list[DrillPart] = Field(max_length=PARTS_MAX)
    cancel_after_ms: Annotated[
        float | None, Field(ge=0, le=10_000, allow_inf_nan=False, strict=True)
    ] = None
    body_error: bool = False


class Step(Strict):
    """One use of one resource. Which members count depends on `op`."""

    resource: Literal["database", "cache", "queue", "api"]
    op: Literal["fetch", "get", "set", "delete", "publish", "consume"]
    sql: str | None = Field(default=None, max_length=10_000)
    key: str | None = Field(default=None, min_length=1, max_length=200)
    value: Any = None
    queue: QueueName | None = None
    body: str | None = Field(default=None, max_length=65_536)
    path: str | None = Field(default=None, max_length=512, pattern=r"^/[^\s\\]*$")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        needed = {
            ("database", "fetch"): ("sql",),
            ("cache", "get"): ("key",),
            ("cache", "set"): ("key",),
            ("cache", "delete"): ("key",),
            ("queue", "publish"): ("queue", "body"),
            ("queue", "consume"): ("queue",),
            ("api", "get"): ("path",),
        }.get((self.resource, self.op))
        if needed is None:
            raise ValueError("This resource does not know this operation.")
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(f"This operation needs {' and '.join(missing)}.")
        if self.path is not None and (self.path.startswith("//") or "://" in self.path):
            raise ValueError("A path is one of the configured API.")
        return self


class RunRequest(Strict):
    """Steps over resources that are acquired for this run, all under one manager."""

    resources: list[Literal["database", "cache", "queue", "api"]] = Field(
        min_length=1, max_length=4
    )
    steps: list[Step] = Field(default_factory=list, max_length=20)

    @model_validator(mode="after")
    def _chosen(self) -> Self:
        if len(set(self.resources)) != len(self.resources):
            raise ValueError("Each resource is chosen once.")
        if any(step.resource not in self.resources for step in self.steps):
            raise ValueError("A step uses a resource that was not chosen.")
        return self


class QueryRequest(Strict):
    """One reading statement."""

    sql: str = Field(min_length=1, max_length=10_000)


# --- out --------------------------------------------------------------------------------------


class ResourceItem(BaseModel):
    """A resource of this service."""

    name: str
    kind: str
    state: str
    address: str | None = Field(description="Without secrets.")
    needs: list[str]
    degraded: bool = Field(description="An embedded stand-in serves instead of the configured one.")
    acquire_s: float | None
    hold_s: float | None
    attempts: int
    error: str | None
    pool: dict[str, float]


class ResourceList(BaseModel):
    """All resources, and the worst of their states."""

    run_id: str
    items: list[ResourceItem]


class ProbeAnswer(BaseModel):
    """What a resource answered just now."""

    name: str
    status: Literal["healthy", "degraded", "down"]
    seconds: float
    error: str | None


class LogRecord(BaseModel):
    """One event in the life of a resource."""

    seq: int
    ts: str
    run_id: str
    resource: str
    event: str
    duration_s: float | None
    error: str | None


class LogPage(BaseModel):
    """Records in the order in which they happened; `next` is the `after` of the next page."""

    items: list[LogRecord]
    next: int | None


class Percentiles(BaseModel):
    """Seconds; null where there is nothing yet."""

    count: int
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None


class ErrorCount(BaseModel):
    """An error, how often it is in the log, and when last."""

    error: str
    count: int
    last: str


class SummaryAnswer(BaseModel):
    """Over all runs and records that are kept."""

    runs: int
    events: dict[str, int]
    acquire: Percentiles
    hold: Percentiles
    release: Percentiles
    top_errors: list[ErrorCount]
    start_saved_s: float = Field(description="What starting in parallel saved, all runs together.")


class BarItem(BaseModel):
    """When a resource changed, in seconds after the start of its run."""

    resource: str
    kind: str
    state: str
    acquiring_s: float | None
    ready_s: float | None
    releasing_s: float | None
    released_s: float | None
    error: str | None


class TimelineAnswer(BaseModel):
    """One run: its bars, its critical path, and what it took against one after the other."""

    run_id: str
    manager: str
    began: str
    wall_s: float
    sum_s: float
    saved_s: float
    critical_path: list[str]
    bars: list[BarItem]


class SlowItem(BaseModel):
    """A time that stands out."""

    resource: str
    kind: str
    seconds: float
    run_id: str
    manager: str


class SlowestAnswer(BaseModel):
    """The longest times of one phase."""

    phase: str
    items: list[SlowItem]


class QueryAnswer(BaseModel):
    """Rows of a query; `truncated` says that there were more."""

    columns: list[str]
    rows: list[list[Any]]
    truncated: bool
    seconds: float


class Surfaced(BaseModel):
    """An exception as data: its notes, its cause, and its parts if it is a group."""

    type: str
    message: str
    notes: list[str]
    cause: str | None
    exceptions: list[Surfaced]


class TimingItem(BaseModel):
    """The seconds of one resource."""

    state: str
    kind: str
    needs: list[str]
    started_at_s: float | None
    wait_s: float
    acquire_s: float | None
    hold_s: float | None
    release_s: float | None
    attempts: int
    error: str | None
    abandoned: bool
    degraded: bool


class ReportItem(BaseModel):
    """A whole run: wall time against the sum, and what the start waited for."""

    run_id: str
    name: str
    resources: dict[str, TimingItem]
    wall_s: float
    sum_s: float
    saved_s: float
    start_s: float
    stop_s: float
    critical_path: list[str]
    abandoned: int
    lost: int
    suppressed: int
    degraded: list[str]
    children: list[ReportItem]


class DrillEvent(BaseModel):
    """What happened to which resource, in seconds after the start."""

    event: str
    resource: str
    at_s: float


class DrillAnswer(BaseModel):
    """What came of a drill. `leaked` counts what was not released exactly once."""

    run_id: str
    surfaced: Surfaced | None
    events: list[DrillEvent]
    report: ReportItem
    leaked: int


class CatalogItem(BaseModel):
    """A drill that can be posted as it is."""

    name: str
    description: str
    body: DrillRequest


class StepResult(BaseModel):
    """What a step gave."""

    resource: str
    op: str
    result: Any
    seconds: float


class RunAnswer(BaseModel):
    """What came of a run: the results up to the first failure, what surfaced, the report."""

    run_id: str
    results: list[StepResult]
    surfaced: Surfaced | None
    report: ReportItem
