"""What the engine keeps in memory about a task, and what one turn of it writes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tasks import NORMAL_PRIORITY, RetryPolicy

if TYPE_CHECKING:
    from handles import TaskHandle
    from payloads import Parents

PROCESS, THREAD, LOOP = "cpu", "io", "async"  # where a task runs, as it is stored
LiveCall = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Job:
    """A task that is new, running, or among the next; all others are numbers in a queue."""

    __slots__ = (
        "args", "attempts", "crashes", "created", "digest", "error", "expect",
        "finished", "fn", "handle", "id", "idem_key", "index", "kind", "live", "name",
        "parent_data", "parents", "place", "positionally", "priority", "progress", "queued",
        "retry", "run",
        "run_at", "seq", "since", "started", "state", "stored", "timeout",
    )  # fmt: skip

    def __init__(self, task_id: str, name: str, kind: str, fn: bytes, args: bytes) -> None:
        self.seq = 0
        self.id = task_id
        self.name = name
        self.kind = kind
        self.fn: bytes = fn
        self.args: bytes = args
        self.live: LiveCall | None = None  # the objects themselves, for threads and the loop
        self.priority: int = NORMAL_PRIORITY
        self.state: str | None = None
        self.stored: str | None = None  # the state in the store
        self.parents: tuple[str, ...] = ()
        self.positionally = False
        self.parent_data: Parents | None = None
        self.timeout: float | None = None
        self.retry: RetryPolicy | None = None
        self.idem_key: str | None = None
        self.digest: bytes | None = None
        self.run = 0
        self.attempts = 0
        self.crashes = 0
        self.created = 0.0
        self.run_at: float | None = None
        self.since = 0.0  # when it entered its state
        self.started: float | None = None
        self.finished: float | None = None
        self.error: str | None = None
        self.progress: str | None = None
        self.handle: TaskHandle | None = None
        self.place: Any = None  # the worker that has it
        self.index = 0  # its number there
        self.expect = 0.0  # seconds it is thought to take
        self.queued = 0.0  # when it became ready


@dataclass
class Batch:
    """The rows of one transaction: everything a turn of the engine has decided."""

    tasks: list[Job] = field(default_factory=list)  # new
    changed: dict[int, Job] = field(default_factory=dict)
    edges: list[tuple[int, int, int]] = field(default_factory=list)  # child, position, parent
    results: dict[int, tuple[bytes, float | None]] = field(default_factory=dict)
    dropped_results: list[int] = field(default_factory=list)
    # task, time, from, to, reason, worker
    events: list[tuple[int, float, str | None, str, str | None, int | None]] = field(
        default_factory=list
    )
    notes: list[tuple[int, float, str]] = field(default_factory=list)  # task, time, line

    def __bool__(self) -> bool:
        return bool(self.events or self.changed or self.notes or self.tasks)
