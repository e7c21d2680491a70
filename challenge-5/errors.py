"""Everything that can be refused or go wrong, as sentences.

SchedulerError
├── SchedulerFull, SchedulerClosed, StoreLocked, StoreUnavailable     the scheduler cannot now
├── DuplicateTask (IdempotencyConflict), UnknownDependency,
│   CyclicDependency, NotSerializable, UnknownTask, NotRegistered     a submit is refused
├── IllegalTransition (TaskNotEnded)                                  not from this state
└── TaskCancelled, TaskTimedOut, DependencyFailed, WorkerCrashed,
    ResultNotSerializable, ResultTooLarge, ResultExpired, RemoteError how a task ended
"""

from concurrent.futures import CancelledError
from typing import Any


class SchedulerError(Exception):
    """The base of all errors of this folder."""


class SchedulerFull(SchedulerError):
    """As many tasks wait as `max_tasks` allows; the same submit succeeds once some have ended."""

    def __init__(self, max_tasks: int, wanted: int = 1) -> None:
        super().__init__(
            f"{wanted} more would be beyond the {max_tasks:,} tasks that may be unfinished at a "
            "time (max_tasks). Wait for some to end, or submit with block=True."
        )
        self.max_tasks = max_tasks
        self.wanted = wanted


class SchedulerClosed(SchedulerError, RuntimeError):
    """The scheduler was shut down."""


class StoreLocked(SchedulerError):
    """Another scheduler works on this database file."""


class StoreUnavailable(SchedulerError):
    """The database refuses writes (disk full, removed, damaged); nothing new is accepted."""


class DuplicateTask(SchedulerError):
    """The id is in use by a task that asked for something else."""


class IdempotencyConflict(DuplicateTask):
    """The idempotency key was used for another request."""


class UnknownDependency(SchedulerError):
    """A parent is not in the store and not in the same batch."""


class CyclicDependency(SchedulerError):
    """Tasks would wait for each other for ever."""


class NotSerializable(SchedulerError, TypeError):
    """A function or an argument cannot be sent to another process or kept on disk."""


class NotRegistered(SchedulerError, KeyError):
    """No task of this name was declared with `@task`."""

    __str__ = Exception.__str__


class UnknownTask(SchedulerError, KeyError):
    """No task has this id."""

    __str__ = Exception.__str__


class IllegalTransition(SchedulerError):
    """A task cannot go from its state to the one asked for."""


class TaskNotEnded(IllegalTransition):
    """Only a task that has ended can be run again."""


class TaskCancelled(SchedulerError, CancelledError):
    """The task was cancelled, or one of its parents was."""


class TaskTimedOut(SchedulerError, TimeoutError):
    """The task ran longer than its timeout, and was ended."""


class DependencyFailed(SchedulerError):
    """A parent failed or timed out, so the task never ran; `cause` tells how it all began."""

    def __init__(self, parent: str, cause: str) -> None:
        super().__init__(f"The task depends on {parent!r}, which did not succeed: {cause}")
        self.parent = parent
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.parent, self.cause)


class WorkerCrashed(SchedulerError):
    """The task's worker process died under it `crashes` times."""


class ResultNotSerializable(SchedulerError):
    """The task returned what cannot be sent between processes."""


class ResultTooLarge(SchedulerError):
    """The task returned more bytes than a result may have."""


class ResultExpired(SchedulerError):
    """The task completed; its result was kept for `result_ttl` seconds and is gone."""


class RemoteError(SchedulerError):
    """An exception that could not travel: its type, message and traceback as text."""

    def __init__(self, type_name: str, message: str, traceback: str = "") -> None:
        super().__init__(f"{type_name}: {message}")
        self.type_name = type_name
        self.message = message
        self.traceback = traceback

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.type_name, self.message, self.traceback)


class RemoteTraceback(Exception):
    """The traceback of the other process, shown as the cause of an error."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'
