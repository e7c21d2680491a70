"""What goes in and out over HTTP."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks import TaskState

Priority = Literal["CRITICAL", "HIGH", "NORMAL", "LOW"]
TaskId = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9._:-]+$")]
Seconds = Annotated[float, Field(gt=0, le=86_400 * 365)]

EXAMPLE = {"id": "example", "name": "count_primes", "args": {"start": 0, "stop": 100_000},
           "priority": "HIGH"}  # fmt: skip
BATCH_EXAMPLE = [
    {"ref": "files", "name": "list_files", "args": {"pattern": "*.csv"}},
    {"ref": "sums", "name": "checksum_files", "dependencies": ["files"]},
    {"ref": "all", "name": "merge", "dependencies": ["sums"], "priority": "LOW"},
]


class Strict(BaseModel):
    """Unknown members and numbers in quotes are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Retry(Strict):
    """How often a failing task runs, and how long it waits in between."""

    max_attempts: int = Field(default=1, ge=1, le=100)
    base: float = Field(default=1.0, ge=0, le=86_400, description="Seconds before attempt two.")
    factor: float = Field(default=2.0, ge=1, le=100)
    max_delay: float = Field(default=300.0, ge=0, le=86_400 * 30)
    jitter: Literal["full", "none"] = "full"


class NewTask(Strict):
    """A registered task and its arguments; never code."""

    name: str = Field(min_length=1, max_length=200, description="One of `GET /registry`.")
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="Named arguments. Left out, the results of the dependencies are passed.",
    )
    id: TaskId | None = Field(default=None, description="Chosen by the service when left out.")
    priority: Priority | None = None
    dependencies: list[TaskId] = Field(default_factory=list, max_length=1000)
    timeout: Seconds | None = Field(default=None, description="Seconds from the real start.")
    retry: Retry | None = None
    delay: float = Field(default=0, ge=0, le=86_400 * 365, description="Seconds until it may run.")


class BatchTask(NewTask):
    """A task of a batch; the dependencies of others may name it by `ref`."""

    ref: TaskId | None = None


class Accepted(BaseModel):
    """Stored, and to be run at least once."""

    id: str
    state: TaskState


class AcceptedInBatch(Accepted):
    """A task of a batch, in the order of the request."""

    ref: str | None


class ErrorInfo(BaseModel):
    """Why a task did not complete."""

    type: str
    message: str


class TaskItem(BaseModel):
    """A task in a list."""

    id: str
    name: str
    state: TaskState
    priority: Priority
    kind: str
    attempts: int
    crashes: int
    created: str
    started: str | None
    finished: str | None
    run_at: str | None
    duration_seconds: float | None
    error: ErrorInfo | None


class TaskDetail(TaskItem):
    """A task with what belongs to it."""

    dependencies: list[str]
    timeout: float | None
    run: int
    progress: float | None
    progress_text: str | None
    log: list[str]
    links: dict[str, str]


class TaskPage(BaseModel):
    """Tasks, newest first."""

    items: list[TaskItem]
    next: str | None = Field(description="The cursor of the next page; null on the last.")


class ResultAnswer(BaseModel):
    """How a task stands: its output once completed, its error once it ended otherwise."""

    id: str
    state: TaskState
    output: Any = None
    error: ErrorInfo | None = None


class Attempt(BaseModel):
    """One time that a task was handed to a worker."""

    number: int
    worker: int | None = Field(description="The process that ran it.")
    started: str
    finished: str | None
    outcome: str
    reason: str | None


class GraphNode(BaseModel):
    """A task near the one asked for."""

    id: str
    name: str
    state: TaskState


class GraphAnswer(BaseModel):
    """Ancestors and descendants, and who waits for whom."""

    nodes: list[GraphNode]
    edges: list[tuple[str, str]] = Field(description="Pairs of parent and child.")


class Cancelled(BaseModel):
    """What became of a cancellation."""

    id: str
    state: TaskState
    cancelled: bool = Field(description="True exactly when the task ends cancelled.")


class RegistryItem(BaseModel):
    """A task that may be asked for."""

    model_config = ConfigDict(populate_by_name=True)

    name: str
    description: str
    kind: str
    timeout: float | None
    arguments: dict[str, Any] = Field(alias="schema", description="JSON schema of `args`.")


class WorkerCount(Strict):
    """How many processes there are to be."""

    count: int = Field(ge=1, le=64)


class Worker(BaseModel):
    """A process and what it does."""

    worker: int
    kind: str
    pid: int | None
    state: str
    task: str | None
    busy_seconds: float
    finished: int
    cpu_seconds: float | None
    memory_bytes: int | None


class Workers(BaseModel):
    """The processes; while some drain there are more than `count`."""

    count: int
    workers: list[Worker]


class Waits(BaseModel):
    """Seconds from ready to running, of the latest 4,096 tasks; null of none."""

    count: int
    p50: float | None
    p95: float | None
    p99: float | None


class System(BaseModel):
    """The machine and the scheduler's own process, by psutil."""

    cpu_percent: float
    cpu_count: int | None
    memory_available_bytes: int
    scheduler_cpu_seconds: float
    scheduler_memory_bytes: int


class Statistics(BaseModel):
    """Figures of the scheduler; rates are those of the last 60 seconds."""

    states: dict[str, int]
    total: int
    queued_by_priority: dict[str, int]
    throughput_per_second: float
    utilisation: float = Field(description="Busy time / (time x worker processes).")
    queue_wait_seconds: Waits
    worker_deaths: int
    threads_abandoned: int
    workers: list[Worker]
    slots: dict[str, int]
    busy_seconds: dict[str, float]
    commits: int
    system: System


class Deleted(BaseModel):
    """What a cleanup did."""

    deleted: int
