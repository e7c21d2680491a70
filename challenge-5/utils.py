"""The front door: `TaskScheduler` and `DistributedScheduler`, two faces of one engine.

    with TaskScheduler(store="tasks.db") as scheduler:
        parent = scheduler.submit(load, "input.csv")
        child = scheduler.submit(Task(func=summarise, dependencies=[parent]))
        print(child.result())

A submit checks and pickles in the caller's thread and hands over; `engine.py` decides, `journal.py`
stores, `processes.py` feeds the workers.
"""

import asyncio
import inspect
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, Literal, Self, cast

from backends import ExecutorBackend, LoopBackend, ThreadBackend
from context import TaskContext, current_task
from engine import Engine
from errors import (
    CyclicDependency,
    DependencyFailed,
    DuplicateTask,
    IdempotencyConflict,
    IllegalTransition,
    NotRegistered,
    NotSerializable,
    RemoteError,
    ResultExpired,
    ResultNotSerializable,
    ResultTooLarge,
    SchedulerClosed,
    SchedulerError,
    SchedulerFull,
    StoreLocked,
    StoreUnavailable,
    TaskCancelled,
    TaskNotEnded,
    TaskTimedOut,
    UnknownDependency,
    UnknownTask,
    WorkerCrashed,
)
from executor import SchedulerExecutor
from handles import TaskHandle
from journal import SQLiteStore
from measures import Figures, percentile
from payloads import (
    NO_ARGUMENTS,
    digest,
    dump_arguments,
    dump_function,
    name_of,
    placeholders,
    printable,
    takes_positionals,
)
from processes import ProcessBackend
from records import LOOP, PROCESS, THREAD, Job
from registry import Registry, registry, task
from store import Durability, Filter, Store
from tasks import (
    LONGEST_SECONDS,
    TERMINAL,
    Kind,
    Result,
    RetryPolicy,
    Task,
    TaskPriority,
    TaskResult,
    TaskState,
    new_id,
    priority_of,
)
from views import statistics_of, status_of

LOOP_TASKS = 1_000  # coroutines at a time
MOST_WORKERS = 512
RESULT_BYTES = 16 * 1024 * 1024
RESULT_SECONDS = 7 * 86_400.0
LATEST_MOMENT = 250_000_000_000.0  # the year 9892: later ones have no date
ID_CHARACTERS = 200
NAME_CHARACTERS = 200
KEY_CHARACTERS = 500


class TaskScheduler:
    """Runs functions in processes, threads and an event loop; durable, strict, and recoverable.

    `store` is None (private, gone at close), the path of an SQLite file, or a `Store`.
    `num_workers` processes (default: the number of CPUs), `thread_workers` threads. At most
    `max_tasks` may be unfinished. A task runs at most `default_timeout` seconds unless it says
    otherwise, and at most `max_crashes` times if its worker dies under it. Results larger than
    `result_limit` bytes fail the task; they are kept for `result_ttl` seconds (None: for ever).

    Use it with `with` or `async with`, or call `shutdown`. The first submit starts it.
    """

    _starts_at_once = True

    def __init__(
        self,
        num_workers: int | None = None,
        thread_workers: int = 8,
        store: str | Path | Store | None = None,
        durability: Durability = "full",
        max_tasks: int = 1000,
        default_timeout: float | None = 300,
        *,
        default_kind: Literal["cpu", "io"] = "cpu",
        max_crashes: int = 3,
        result_limit: int = RESULT_BYTES,
        result_ttl: float | None = RESULT_SECONDS,
        start_method: Literal["auto", "zygote", "spawn"] = "auto",
        backend: ExecutorBackend | None = None,
        registry: Registry = registry,
        clock: Callable[[], float] = time.time,
        random: Random | None = None,
    ) -> None:
        workers = os.cpu_count() or 1
        if num_workers is not None:
            workers = _count("num_workers", num_workers)
        _count("thread_workers", thread_workers)
        _count("max_crashes", max_crashes)
        if max_tasks < 1:
            raise ValueError(f"max_tasks is at least 1, not {max_tasks}.")
        if durability not in ("full", "normal", "off"):
            raise ValueError(f"durability is 'full', 'normal' or 'off', not {durability!r}.")
        if default_kind not in ("cpu", "io"):
            raise ValueError(f"default_kind is 'cpu' or 'io', not {default_kind!r}.")
        self._default_timeout = _seconds("default_timeout", default_timeout)
        self._default_kind = default_kind
        self._registry = registry
        self._clock = clock
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._engine = Engine(
            self._store_of(store, durability),
            {
                PROCESS: backend or ProcessBackend(workers, result_limit, start_method),
                THREAD: ThreadBackend(thread_workers, result_limit),
                LOOP: LoopBackend(LOOP_TASKS, result_limit),
            },
            max_tasks=max_tasks,
            max_crashes=max_crashes,
            result_ttl=result_ttl,
            clock=clock,
            chance=random,
        )
        self._started = False
        self._starting = threading.Lock()
        # Without shutdown, at the end of the program or of this object: nothing is left running.
        self._finalizer = weakref.finalize(self, _end, self._engine, self._scratch)

    def _store_of(self, store: str | Path | Store | None, durability: Durability) -> Store:
        if store is None:
            self._scratch = tempfile.TemporaryDirectory(
                prefix="scheduler-", ignore_cleanup_errors=True
            )
            path = Path(self._scratch.name) / "tasks.db"
            return SQLiteStore(path, durability, private=True)
        if isinstance(store, (str, Path)):
            return SQLiteStore(store, durability)
        return store

    # --- life ---

    def initialize(self) -> Self:
        """Open the store, recover it, start the workers; tasks stay queued until `run`."""
        with self._starting:
            if not self._started:
                self._engine.start()
                self._started = True
        return self

    def run(self) -> Self:
        """Begin to run tasks (again: no effect); returns at once."""
        self.initialize()
        if not self._engine.dispatching:
            self._engine.ask(self._engine.begin)
        return self

    def shutdown(
        self, wait: bool = True, cancel_pending: bool = False, timeout: float | None = None
    ) -> None:
        """End the scheduler; harmless when repeated.

        With `wait`, tasks finish first (in a store that lasts, delayed and retrying ones stay there
        for the next scheduler). What still runs after `timeout` seconds, or at once without `wait`,
        is killed, and is queued again in the store. `cancel_pending` cancels what has not begun.
        """
        self._engine.shutdown(wait=wait, cancel_pending=cancel_pending, timeout=timeout)
        self._finalizer()

    def __enter__(self) -> Self:
        return self.run()

    def __exit__(self, kind: Any, *details: object) -> None:
        self.shutdown(wait=kind is None or not issubclass(kind, KeyboardInterrupt))

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.run)
        return self

    async def __aexit__(self, kind: Any, *details: object) -> None:
        wait = kind is None or not issubclass(kind, (KeyboardInterrupt, asyncio.CancelledError))
        await asyncio.to_thread(self.shutdown, wait)

    # --- submitting ---

    def submit(
        self, task: Task | Callable[..., Any] | str, /, *args: Any, **kwargs: Any
    ) -> TaskHandle:
        """Submit a `Task`, or a function (or a registered name) with its arguments.

        Returns at once. Only a task that gives an id, a key or parents waits for the verdict on
        them. Raises SchedulerFull, DuplicateTask, UnknownDependency, CyclicDependency or
        NotSerializable; nothing is stored then.
        """
        if isinstance(task, Task):
            if args or kwargs:
                raise TypeError("A Task carries its own args and kwargs.")
            return self._enter(self._job_of(task))
        return self._enter(self._job_of_call(task, args, kwargs))

    def submit_call(
        self,
        func: Callable[..., Any] | str,
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        block: bool = False,
        timeout_to_enter: float | None = None,
        **options: Any,
    ) -> TaskHandle:
        """Submit a function, its arguments apart; with `block`, wait while the queue is full."""
        task = Task(func=func, args=tuple(args), kwargs=kwargs or {}, **options)
        return self._enter(self._job_of(task), block, timeout_to_enter)

    def submit_many(self, tasks: Iterable[Task]) -> list[TaskHandle]:
        """Submit all or none, parents in any order; returns when they are committed."""
        self._ensure_started()
        jobs = [self._job_of(each) for each in tasks]
        if not jobs:
            return []
        self._engine.reserve(len(jobs))
        return self._engine.ask(lambda: self._engine.accept(jobs))

    async def asubmit(
        self, task: Task | Callable[..., Any] | str, /, *args: Any, **kwargs: Any
    ) -> TaskHandle:
        """Like `submit`; returns when the task is committed. A full queue raises SchedulerFull."""
        if not isinstance(task, Task):
            task = Task(func=task, args=args, kwargs=kwargs)
        elif args or kwargs:
            raise TypeError("A Task carries its own args and kwargs.")
        (handle,) = await self.asubmit_many([task])
        return handle

    async def asubmit_many(
        self, tasks: Iterable[Task], *, request: bytes | None = None
    ) -> list[TaskHandle]:
        """Like `submit_many`, without blocking the event loop.

        `request`: what was asked for, when that is not to be told by the calls themselves.
        """
        if not self._started or not self._engine.dispatching:
            await asyncio.to_thread(self._ensure_started)
        jobs = [self._job_of(each) for each in tasks]
        if not jobs:
            return []
        if request is not None:
            for number, job in enumerate(jobs):
                job.digest = digest(request, number)
        self._engine.reserve(len(jobs))
        return cast("list[TaskHandle]", await self.ask(lambda: self._engine.accept(jobs)))

    async def ask(self, question: Callable[[], Any]) -> Any:
        """Await what the engine's thread answers, after its commit."""
        loop = asyncio.get_running_loop()
        answered = loop.create_future()

        def wake() -> None:
            if not answered.done():
                answered.set_result(None)

        def callback() -> None:
            with suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(wake)

        reply = self._engine.asking(question, callback=callback)
        await answered
        return reply.taken()

    async def schedule_task(self, task: Task) -> TaskResult:
        """Submit and await how it ended; a failure is in the result, not raised.

        A known id with the same request gives the result of that task.
        """
        handle = await self.asubmit(task)
        return await handle.wait()

    def submit_task(
        self,
        func: Callable[..., Any] | str,
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        name: str | None = None,
        priority: TaskPriority | str | int = TaskPriority.NORMAL,
        timeout: float | None = None,
        dependencies: Iterable[Any] | None = None,
        **options: Any,
    ) -> str:
        """Submit a function; returns the id of its task once that is committed."""
        task = Task(
            func=func, args=tuple(args), kwargs=dict(kwargs or {}), name=name, priority=priority,
            timeout=timeout, dependencies=() if dependencies is None else dependencies, **options,
        )  # fmt: skip
        (handle,) = self.submit_many([task])
        return handle.id

    def as_executor(self, **options: Any) -> SchedulerExecutor:
        """A `concurrent.futures.Executor`; options are those of a Task, such as priority."""
        return SchedulerExecutor(self, options)

    # --- asking and changing ---

    def handle(self, task_id: str) -> TaskHandle:
        """A handle of any task in the store, also of an earlier scheduler."""
        self._ensure_started()
        self._engine.row(task_id)
        return TaskHandle(self._engine, task_id, cold=True)

    def get_task_status(self, task_id: str) -> dict[str, Any]:
        """What is known of a task; `result` is what it returned, `error` a sentence or None."""
        self._ensure_started()
        row = self._engine.row(task_id)
        return status_of(self.store, row)

    def get_statistics(self) -> dict[str, Any]:
        """Counts by state, throughput, utilisation, waits, and each worker."""
        self._ensure_started()
        return statistics_of(self._engine.figures())

    def cancel_task(self, task_id: str) -> bool:
        """End a task; true exactly when it ends cancelled. KeyError for an unknown id."""
        self._ensure_started()
        return self._engine.cancel(task_id)

    def retry_task(self, task_id: str) -> TaskHandle:
        """Run a task that has ended once more; TaskNotEnded if it has not."""
        self._ensure_started()
        self._engine.reserve(1)
        return self._engine.ask(lambda: self._engine.retry(task_id))

    def scale_workers(self, number: int) -> None:
        """Have so many processes: more at once, fewer as they finish what they run."""
        _count("The number of workers", number)
        self._ensure_started()
        self._engine.ask(lambda: self._engine.scale(PROCESS, number))

    def cleanup(self, older_than: float, states: Iterable[str] = tuple(TERMINAL)) -> int:
        """Delete tasks that ended more than so many seconds ago; how many that were.

        Parents of unfinished tasks stay.
        """
        self._ensure_started()
        if not older_than >= 0:
            raise ValueError(f"older_than is a number of seconds from 0, not {older_than!r}.")
        chosen = [str(TaskState(state)) for state in states]
        if not set(chosen) <= TERMINAL:
            raise ValueError(f"Only tasks that have ended can be deleted: {sorted(TERMINAL)}.")
        before = self._clock() - older_than
        total = 0
        while deleted := self._engine.ask(lambda: self._engine.cleanup(before, chosen)):
            total += deleted
        return total

    @property
    def store(self) -> Store:
        """The store, for reading."""
        return self._engine.store

    @property
    def engine(self) -> Engine:
        """The engine behind this scheduler."""
        return self._engine

    # --- from tasks to jobs ---

    def _ensure_started(self) -> None:
        if self._started and (self._engine.dispatching or not self._starts_at_once):
            return
        if self._engine.closed:
            raise SchedulerClosed("The scheduler was shut down; it takes no more tasks.")
        if self._starts_at_once:
            self.run()
        else:
            self.initialize()

    def _enter(self, job: Job, block: bool = False, timeout: float | None = None) -> TaskHandle:
        """Hand it over; what may be refused there is waited for."""
        self._ensure_started()
        engine = self._engine
        engine.reserve(1, block=block, timeout=timeout)
        if job.digest is None and not job.parents:
            engine.post(job)
            return cast("TaskHandle", job.handle)
        (handle,) = engine.ask(lambda: engine.accept([job]), at_once=True)
        return handle

    def _job_of_call(
        self, func: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Job:
        """The short way for a plain function, which most calls are."""
        if isinstance(func, str) or ((args or kwargs) and placeholders((args, kwargs))):
            return self._job_of(Task(func=func, args=args, kwargs=kwargs))
        registered = self._registry.of(func)
        if registered is not None:
            return self._job_of(Task(func=func, args=args, kwargs=kwargs))
        job = self._pack(func, self._place_of(func, "auto"), args, kwargs, new_id(), name_of(func))
        job.timeout = self._default_timeout
        return job

    def _job_of(self, task: Task) -> Job:
        func = task.func
        if func is None:
            raise TypeError("A Task needs func: a function, or the name of a registered one.")
        registered = self._registry.get(func) if isinstance(func, str) else self._registry.of(func)
        retry, timeout, kind = task.retry, task.timeout, task.kind
        priority = priority_of(task.priority)
        if registered is not None:
            func = registered.func
            retry = retry or registered.retry
            timeout = registered.timeout if timeout is None else timeout
            kind = registered.kind if kind == "auto" else kind
            if priority is TaskPriority.NORMAL:
                priority = registered.priority
        if not callable(func):
            raise TypeError(f"func is a function or a registered name, not {type(func).__name__}.")
        args, kwargs = tuple(task.args), dict(task.kwargs)
        named = [*placeholders(args), *placeholders(kwargs)]
        positionally = not args and not kwargs and takes_positionals(func)
        parents = _parents(task.dependencies, named, positionally)
        name = _text("name", task.name, NAME_CHARACTERS) or (
            registered.name if registered else name_of(func)
        )
        job = self._pack(
            func,
            self._place_of(func, kind),
            args,
            kwargs,
            _text("id", task.id, ID_CHARACTERS) or new_id(),
            name,
        )
        job.priority = int(priority)
        job.parents = parents
        job.positionally = bool(positionally and parents)
        job.timeout = self._default_timeout if timeout is None else _seconds("timeout", timeout)
        if not isinstance(retry, RetryPolicy | None):
            raise TypeError(f"retry is a RetryPolicy, not {type(retry).__name__}.")
        job.retry = retry
        job.idem_key = _text("idempotency_key", task.idempotency_key, KEY_CHARACTERS)
        job.run_at = _moment(task.run_at)
        if task.delay:
            job.run_at = self._clock() + (_seconds("delay", task.delay, least=0) or 0)
        if task.id is not None or task.idempotency_key is not None:
            job.digest = digest(
                job.fn, job.args, job.name, job.kind, job.priority, job.parents, job.timeout,
                job.retry, task.delay, task.run_at,
            )  # fmt: skip
        return job

    def _pack(
        self, func: Callable[..., Any], kind: str, args: tuple[Any, ...], kwargs: dict[str, Any],
        task_id: str, name: str,
    ) -> Job:  # fmt: skip
        live = None
        if kind == PROCESS:
            fn, arguments = dump_function(func), dump_arguments(args, kwargs)
        else:
            live = (func, args, kwargs)
            try:
                fn, arguments = dump_function(func), dump_arguments(args, kwargs)
            except NotSerializable:
                if self._engine.store.lasting:  # it could not be run again after a restart
                    raise
                fn, arguments = b"", NO_ARGUMENTS
        job = Job(task_id, name, kind, fn, arguments)
        job.live = live
        job.handle = TaskHandle(self._engine, task_id)
        return job

    def _place_of(self, func: Callable[..., Any], kind: Kind) -> str:
        """Processes, threads or the loop: what is not declared can be killed."""
        if kind not in ("auto", "cpu", "io", "async"):
            raise ValueError(f"kind is 'auto', 'cpu', 'io' or 'async', not {kind!r}.")
        if kind == "cpu":
            return PROCESS
        inner = getattr(func, "func", func)
        if inspect.iscoroutinefunction(inner) or kind == "async":
            return LOOP
        if kind == "io" or self._default_kind == "io":
            return THREAD
        return PROCESS


class DistributedScheduler(TaskScheduler):
    """The same engine with four workers, where tasks wait between `initialize` and `run`."""

    _starts_at_once = False

    def __init__(self, num_workers: int | None = 4, *args: Any, **options: Any) -> None:
        super().__init__(num_workers, *args, **options)


def _end(engine: Engine, scratch: "tempfile.TemporaryDirectory[str] | None") -> None:
    engine.shutdown(wait=False, cancel_pending=False, timeout=None)
    if scratch is not None:
        scratch.cleanup()


def _count(name: str, value: int) -> int:
    if type(value) is not int or not 1 <= value <= MOST_WORKERS:
        raise ValueError(f"{name} is from 1 to {MOST_WORKERS}, not {value!r}.")
    return value


def _seconds(name: str, value: float | None, least: float = 1e-9) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a number of seconds, not {type(value).__name__}.")
    if not least <= value <= LONGEST_SECONDS:
        raise ValueError(
            f"{name} is a positive number of seconds up to {LONGEST_SECONDS:,.0f}, not {value!r}."
        )
    return float(value)


def _moment(value: float | None) -> float | None:
    """A time of the wall clock; what is past may run at once."""
    if value is None:
        return None
    if not isinstance(value, (int, float)):
        raise TypeError(f"run_at is a number of seconds since 1970, not {type(value).__name__}.")
    if not 0 <= value <= LATEST_MOMENT:
        raise ValueError(f"run_at is a number of seconds since 1970, not {value!r}.")
    return float(value)


def _text(name: str, value: str | None, most: int) -> str | None:
    """What is stored as text has a length and is text: a lone surrogate could not be written."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"{name} is a text, not {type(value).__name__}.")
    if not 0 < len(value) <= most or printable(value) != value:
        raise ValueError(f"{name} is a text of 1 to {most} characters that UTF-8 can write.")
    return value


def _parents(dependencies: Any, named: list[str], positionally: bool) -> tuple[str, ...]:
    """Ids of the parents, each once, in order."""
    if isinstance(dependencies, (str, TaskHandle)):
        dependencies = [dependencies]
    if positionally and isinstance(dependencies, (set, frozenset)) and len(dependencies) > 1:
        raise ValueError(
            "A set of several dependencies has no order in which their results could be passed: "
            "give a list."
        )
    ids = [each.id if isinstance(each, TaskHandle) else each for each in dependencies]
    for each in [*ids, *named]:
        if not isinstance(each, str):
            raise TypeError(f"A dependency is an id or a handle, not {type(each).__name__}.")
    return tuple(dict.fromkeys([*ids, *named]))


__all__ = [
    "CyclicDependency", "DependencyFailed", "DistributedScheduler", "DuplicateTask",
    "ExecutorBackend", "Figures", "Filter", "IdempotencyConflict", "IllegalTransition",
    "NotRegistered", "NotSerializable", "Registry", "RemoteError", "Result", "ResultExpired",
    "ResultNotSerializable", "ResultTooLarge", "RetryPolicy", "SQLiteStore", "SchedulerClosed",
    "SchedulerError", "SchedulerFull", "Store", "StoreLocked", "StoreUnavailable", "Task",
    "TaskCancelled", "TaskContext", "TaskHandle", "TaskNotEnded", "TaskPriority", "TaskResult",
    "TaskScheduler", "TaskState", "TaskTimedOut", "UnknownDependency", "UnknownTask",
    "WorkerCrashed", "current_task", "percentile", "registry", "task",
]  # fmt: skip
