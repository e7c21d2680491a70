"""The scheduler as a `concurrent.futures.Executor`, for code that wants one."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from errors import SchedulerClosed
from handles import TaskHandle
from tasks import CANCELLED, TaskState

if TYPE_CHECKING:
    from utils import TaskScheduler

T = TypeVar("T")


class TaskFuture(Future[T]):
    """A future whose `cancel` also ends a task that runs."""

    def __init__(self) -> None:
        super().__init__()
        self._handle: TaskHandle | None = None
        self._settling = threading.Lock()  # taken for good by whoever settles it

    def cancel(self) -> bool:
        """True when the task ends cancelled, also when it was running in a process."""
        if self.done() or self._handle is None:
            return self.cancelled()
        if not self._handle.cancel():
            return False
        self.end_cancelled()  # the engine does it, too, but not inside of a callback
        return True

    def running(self) -> bool:
        """Was it handed to a worker, and has not ended?"""
        handle = self._handle
        return not self.done() and handle is not None and handle.status() == TaskState.RUNNING

    def end_cancelled(self) -> None:
        """Tell whoever waits, once."""
        if self._settling.acquire(blocking=False):
            super().cancel()
            self.set_running_or_notify_cancel()

    def settle(self, handle: TaskHandle) -> None:
        """The task has ended: so has this."""
        outcome = handle.outcome_now()
        if outcome.state == CANCELLED:
            self.end_cancelled()
        elif self._settling.acquire(blocking=False):
            self.set_running_or_notify_cancel()
            try:
                value = handle.result()
            except BaseException as error:  # noqa: BLE001  (of the task, or of its unpickling)
                self.set_exception(error)
            else:
                self.set_result(value)


class SchedulerExecutor(Executor):
    """Submits everything with the same options; a full scheduler makes `submit` wait.

    Shutting it down ends this view; the scheduler goes on.
    """

    def __init__(self, scheduler: "TaskScheduler", options: dict[str, Any]) -> None:
        self._scheduler = scheduler
        self._options = options
        self._open: set[TaskFuture[Any]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn(*args, **kwargs)`; whatever the names of its arguments are."""
        future: TaskFuture[T] = TaskFuture()
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._open.add(future)
        try:
            handle = self._scheduler.submit_call(fn, args, kwargs, block=True, **self._options)
        except BaseException:
            self._forget(future)
            raise
        future._handle = handle
        handle.add_done_callback(lambda done: self._settle(future, done))
        return future

    def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None,
        chunksize: int = 1, buffersize: int | None = None,
    ) -> Iterator[T]:  # fmt: skip
        """Like the built-in; several calls travel together anyway, so `chunksize` is not needed."""
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is None:
            return super().map(fn, *iterables, timeout=timeout)
        if buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        return self._buffered(fn, zip(*iterables, strict=False), timeout, buffersize)

    def _buffered(
        self, fn: Callable[..., T], calls: Iterator[Any], timeout: float | None, size: int
    ) -> Iterator[T]:
        waiting = [self.submit(fn, *args) for args in islice(calls, size)]
        while waiting:
            yield waiting.pop(0).result(timeout)
            waiting += [self.submit(fn, *args) for args in islice(calls, 1)]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take nothing more; with `wait`, return when all futures are done."""
        with self._lock:
            self._closed = True
            left = list(self._open)
        if cancel_futures:
            with suppress(SchedulerClosed):  # that has ended them all
                self._scheduler.engine.cancel_waiting(
                    [future._handle.id for future in left if future._handle is not None]
                )
        if wait:
            for future in left:
                with suppress(BaseException):
                    future.exception()

    def _settle(self, future: "TaskFuture[Any]", handle: TaskHandle) -> None:
        self._forget(future)
        future.settle(handle)

    def _forget(self, future: "TaskFuture[Any]") -> None:
        with self._lock:
            self._open.discard(future)
