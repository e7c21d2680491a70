"""Threads for plain plugin methods: a slow one blocks neither the event loop nor the end.

They are daemons, since a plugin that never returns cannot be ended and must not keep the process.
A call that is given up keeps its thread; the pool grows by as many as are given up.
"""

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any

IDLE_SECONDS = 30.0
MOST_WAITING = 1000


class CallTimeout(Exception):
    """The call took longer than it may; it may still be running."""


class Overloaded(Exception):
    """Too many calls wait for a thread."""


class _Job:
    __slots__ = ("abandoned", "arguments", "began", "context", "function", "future", "late", "loop")

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], late: Any) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.context = contextvars.copy_context()
        self.function = function
        self.arguments = arguments
        self.late = late
        self.abandoned = False
        self.began = False


class Workers:
    """A pool of daemon threads, made when they are needed."""

    def __init__(self, most: int = 40) -> None:
        self._most = most
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = self._idle = self._given_up = self._waiting = 0

    async def run(
        self,
        timeout: float,
        function: Callable[..., Any],
        *arguments: Any,
        late: Callable[[bool], None] = lambda _: None,
    ) -> tuple[BaseException | None, Any]:
        """What the function raised, or else returned; CallTimeout when it takes too long.

        `late(True)` is called when a running call is given up, `late(False)` when that one ends.
        """
        job = _Job(function, arguments, late)
        with self._lock:
            if self._waiting >= MOST_WAITING:
                raise Overloaded
            self._waiting += 1
            if self._idle < self._waiting and self._threads - self._given_up < self._most:
                self._threads += 1
                threading.Thread(target=self._work, daemon=True, name="plugin").start()
        self._jobs.put(job)
        try:
            done, _ = await asyncio.wait({job.future}, timeout=timeout)
        except asyncio.CancelledError:
            self._abandon(job)
            raise
        if not done:
            self._abandon(job)
            raise CallTimeout
        outcome: tuple[BaseException | None, Any] = job.future.result()
        return outcome

    def _abandon(self, job: _Job) -> None:
        with self._lock:
            if job.future.done() or job.abandoned:
                return
            job.abandoned = True
            if job.began:
                self._given_up += 1
                job.late(True)

    def _work(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            try:
                job = self._jobs.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    self._idle -= 1
                    self._threads -= 1
                return
            with self._lock:
                self._idle -= 1
                self._waiting -= 1
                job.began = True
                if job.abandoned:
                    continue
            self._run(job)
            del job  # keep nothing of a plugin while waiting

    def _run(self, job: _Job) -> None:
        outcome: tuple[BaseException | None, Any]
        try:
            outcome = None, job.context.run(job.function, *job.arguments)
        except BaseException as error:  # noqa: BLE001  (SystemExit of a plugin ends nothing)
            outcome = error, None
        with self._lock:
            if job.abandoned:
                self._given_up -= 1
                job.late(False)
                return
        try:
            job.loop.call_soon_threadsafe(_finish, job.future, outcome)
        except RuntimeError:  # the loop was closed meanwhile: nobody waits any more
            return


def _finish(future: "asyncio.Future[Any]", outcome: Any) -> None:
    if not future.done():
        future.set_result(outcome)
