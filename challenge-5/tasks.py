"""What a task is: its states and the legal ways between them, its priority, retries and result.

pending ──► queued ──► running ──► completed | failed | timed_out
   │           ▲  ▲        │ │
   │           │  └────────┘ └──► retrying ──► queued          (given back, or its worker died)
   └─► failed  └── retry_task(), from any end      anything unfinished ──► cancelled
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from itertools import count
from math import inf
from random import Random
from typing import Any, Literal

from errors import IllegalTransition

LONGEST_SECONDS = 10 * 365 * 86_400.0  # of a timeout or a delay
Kind = Literal["auto", "cpu", "io", "async"]


class TaskPriority(IntEnum):
    """Strict: no task starts while one of a more urgent level is ready."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3


NORMAL_PRIORITY = 2


class TaskState(StrEnum):
    """Where a task stands."""

    PENDING = "pending"  # waits for parents or for its time
    QUEUED = "queued"  # ready, waits for a worker
    RUNNING = "running"  # handed to a worker
    RETRYING = "retrying"  # failed, waits for the next attempt
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"


# The engine works with plain strings: SQLite binds them faster than members of an enum.
PENDING, QUEUED, RUNNING, RETRYING = "pending", "queued", "running", "retrying"
COMPLETED, FAILED, CANCELLED, TIMED_OUT = "completed", "failed", "cancelled", "timed_out"
TERMINAL = frozenset({COMPLETED, FAILED, CANCELLED, TIMED_OUT})
LIVE = frozenset({PENDING, QUEUED, RUNNING, RETRYING})
LEGAL: dict[str | None, frozenset[str]] = {
    None: frozenset({PENDING, QUEUED}),
    PENDING: frozenset({QUEUED, CANCELLED, FAILED}),
    QUEUED: frozenset({RUNNING, CANCELLED}),
    RUNNING: frozenset({COMPLETED, FAILED, CANCELLED, TIMED_OUT, RETRYING, QUEUED}),
    RETRYING: frozenset({QUEUED, CANCELLED}),
    COMPLETED: frozenset({QUEUED}),  # from an end only by retry_task
    FAILED: frozenset({QUEUED}),
    CANCELLED: frozenset({QUEUED}),
    TIMED_OUT: frozenset({QUEUED}),
}


def check_transition(task_id: str, before: str | None, after: str) -> None:
    """Raise IllegalTransition unless a task may go from one state to the other."""
    if after not in LEGAL[before]:
        raise IllegalTransition(
            f"Task {task_id!r} is {before or 'new'} and cannot become {after}; from there it can "
            f"become {', '.join(sorted(LEGAL[before]))}."
        )


@dataclass(frozen=True)
class RetryPolicy:
    """How often a failing task runs, and how long it waits in between, in seconds.

    Before attempt n + 1 it waits `base * factor ** (n - 1)`, at most `max_delay`; with full jitter
    a random part of that. Timeouts and crashes of a worker are not retried by this budget.
    """

    max_attempts: int = 1
    base: float = 1.0
    factor: float = 2.0
    max_delay: float = 300.0
    jitter: Literal["full", "none"] = "full"

    def __post_init__(self) -> None:
        if not isinstance(self.max_attempts, int) or self.max_attempts < 1:
            raise ValueError(f"{self} makes no sense: max_attempts is a whole number from 1.")
        if not 0 <= self.base < inf or not 1 <= self.factor < inf:
            raise ValueError(f"{self} makes no sense: base is at least 0, factor at least 1.")
        if not 0 <= self.max_delay <= LONGEST_SECONDS:
            raise ValueError(
                f"{self} makes no sense: max_delay is from 0 to {LONGEST_SECONDS:,.0f} seconds."
            )
        if self.jitter not in ("full", "none"):
            raise ValueError(f"jitter is 'full' or 'none', not {self.jitter!r}.")

    def delay(self, attempts: int, random: Random) -> float:
        """Seconds to wait after that many attempts."""
        try:
            longest = min(self.base * self.factor ** (attempts - 1), self.max_delay)
        except OverflowError:
            longest = self.max_delay
        return random.uniform(0, longest) if self.jitter == "full" else longest


@dataclass(frozen=True)
class Result:
    """Stands in args or kwargs for the result of a parent; it makes that task a parent."""

    parent_id: str


_PREFIX = os.urandom(5).hex()
_NUMBERS = count(1)


def new_id() -> str:
    """An id of this process: ids that ascend are cheap to index."""
    return f"{_PREFIX}-{next(_NUMBERS):08x}"


def _forked() -> None:
    global _PREFIX
    _PREFIX = os.urandom(5).hex()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@dataclass
class Task:
    """What to run, and under which conditions.

    `dependencies` are ids of tasks (or handles) that have to complete first. Without args and
    kwargs their results are passed positionally in that order, if the function takes any;
    otherwise only `Result(id)` is replaced. `timeout` counts from the real start; None means the
    scheduler's default. `delay` (seconds from now) or `run_at` (epoch seconds) put the start off.
    """

    id: str | None = None
    func: Callable[..., Any] | str | None = None
    args: tuple[Any, ...] | list[Any] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    priority: TaskPriority | str | int = TaskPriority.NORMAL
    dependencies: Iterable[Any] = ()
    timeout: float | None = None
    retry: RetryPolicy | None = None
    kind: Kind = "auto"
    idempotency_key: str | None = None
    delay: float = 0
    run_at: float | None = None
    name: str | None = None


@dataclass(frozen=True)
class TaskResult:
    """How a task ended: `output` of a completed one, `error` (an exception) of any other."""

    id: str
    status: TaskState
    output: Any
    error: BaseException | None
    attempts: int
    duration: float


def priority_of(value: TaskPriority | str | int) -> TaskPriority:
    """`HIGH`, "HIGH", "high" or 1."""
    try:
        return TaskPriority[value.upper()] if isinstance(value, str) else TaskPriority(value)
    except (KeyError, ValueError):
        names = ", ".join(TaskPriority.__members__)
        raise ValueError(f"A priority is one of {names}, not {value!r}.") from None
