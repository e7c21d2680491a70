"""The scheduler as a `concurrent.futures.Executor`, for code that wants one."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from handles import TaskHandle
from tasks import CANCELLED

if TYPE_CHECKING:
    from utils import TaskScheduler

T = TypeVar("T")


class TaskFuture(Future[T]):
    """A future whose `cancel` also ends a task that runs."""

    def __init__(self) -> None:
        super().__init__()
        self._handle: TaskHandle | None = None

    def cancel(self) -> bool:
        """True when the task ends cancelled, also when it was running in a process."""
        if self.done() or self._handle is None:
            return self.cancelled()
        if not self._handle.cancel():
            return False
        super().cancel()
        self._cancelled_now()
        return True

    def _cancelled_now(self) -> None:
        with suppress(Exception):
            self.set_running_or_notify_cancel()


class SchedulerExecutor(Executor):
    """Submits everything with the same options; a full scheduler makes `submit` wait.

    Shutting it down ends this view. The scheduler goes on, unless the executor `owns` it.
    """

    def __init__(self, scheduler: "TaskScheduler", *, owns: bool, options: dict[str, Any]) -> None:
        self._scheduler = scheduler
        self._owns = owns
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
            for future in left:
                if future._handle is not None and future._handle.pending():
                    future.cancel()
        if wait:
            for future in left:
                with suppress(BaseException):
                    future.exception()
        if self._owns:
            self._scheduler.shutdown(wait=wait)

    def _settle(self, future: "TaskFuture[Any]", handle: TaskHandle) -> None:
        self._forget(future)
        outcome = handle.outcome_now()
        if outcome.state == CANCELLED:
            Future.cancel(future)
            future._cancelled_now()
            return
        error = outcome.exception()
        with suppress(Exception):  # cancelled meanwhile: that one came first
            if future.set_running_or_notify_cancel():
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(handle.result())

    def _forget(self, future: "TaskFuture[Any]") -> None:
        with self._lock:
            self._open.discard(future)
