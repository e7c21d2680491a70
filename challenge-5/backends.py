"""Where tasks run: the contract, and the two places inside this process, threads and a loop.

A backend belongs to the engine's thread: all its methods are called there. What its own threads
find out they `post`, and the engine calls them back with it.
"""

import asyncio
import inspect
import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from queue import SimpleQueue
from selectors import BaseSelector
from typing import Any, Protocol

import context
from payloads import dump_error, dump_result, fill_in, load_call
from records import Job
from store import KEPT_LINES

LOOP_SECONDS = 1.0  # in which an event loop obeys, or is given up


class Reports(Protocol):
    """What a backend tells the engine, in the engine's thread (`post`: from any)."""

    def ended(self, job: Job, ok: bool, started: float, elapsed: float, payload: bytes) -> None:
        """A run of the job is over, with its result or its error as bytes."""

    def given_back(self, job: Job, reason: str) -> None:
        """It was placed, and has not begun."""

    def crashed(self, job: Job, detail: str) -> None:
        """Its worker died while it ran there."""

    def timed_out(self, job: Job) -> None:
        """It has run longer than it may; the engine abandons it then."""

    def note(self, job: Job, what: str, value: Any) -> None:
        """It tells of its progress, or a line to keep."""

    def post(self, call: Callable[[], None]) -> None:
        """Have it called in the engine's thread; from any."""


@dataclass
class Place:
    """One worker, for the statistics."""

    worker: int
    kind: str
    pid: int | None
    state: str
    task: str | None
    busy_seconds: float
    finished: int


class ExecutorBackend(Protocol):
    """Runs jobs somewhere; never more than it has slots for, so that priorities stay strict."""

    def start(self, reports: Reports, selector: BaseSelector) -> None:
        """Begin; descriptors registered with the selector carry a callable as their data."""

    def expects(self, waiting: int) -> None:
        """So many jobs are about to be offered: what is one worker's fair share?"""

    def place(self, job: Job) -> bool:
        """Take a job, or say that there is no room for it; nothing is sent before `flush`."""

    def flush(self) -> None:
        """What was placed is committed: let it run."""

    def catch_up(self, job: Job) -> None:
        """Report what is known to have ended already, before this job's fate is decided."""

    def abandon(self, job: Job) -> None:
        """End a job that was cancelled or ran out of time; nothing is reported of it any more."""

    def next_check(self) -> float:
        """When `check` wants to be called, on the monotonic clock."""

    def check(self, now: float) -> None:
        """Look at deadlines and at what has stalled."""

    def scale(self, number: int) -> None:
        """Have so many slots; fewer as they become free."""

    def slots(self) -> int:
        """How many there are."""

    def places(self) -> list[Place]:
        """Each worker."""

    def busy_seconds(self) -> float:
        """Time spent in tasks so far, the running ones included."""

    def close(self) -> None:
        """End everything at once."""


@dataclass(eq=False)
class _Running:
    """A job in a thread or in the loop."""

    job: Job
    started: float = 0.0  # when it was placed, until it has begun
    begun: bool = False
    abandoned: bool = False
    notes: deque[tuple[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    noted: bool = False  # the engine was told that there are some
    task: "asyncio.Task[None] | None" = None
    loop: asyncio.AbstractEventLoop | None = None
    pid: int = field(default_factory=os.getpid)

    def end_if_forked(self) -> None:
        """A child that the task forked must not become a second scheduler."""
        if os.getpid() != self.pid:
            os._exit(0)


@dataclass(eq=False)
class _Local:
    """What both places inside this process have in common."""

    number: int
    result_limit: int
    running: set[_Running] = field(default_factory=set)
    placed: list[_Running] = field(default_factory=list)
    abandoned_count: int = 0
    busy: float = 0.0
    finished: int = 0
    reports: Reports = field(init=False)

    kind = ""

    def start(self, reports: Reports, selector: BaseSelector) -> None:
        del selector
        self.reports = reports

    def expects(self, waiting: int) -> None:
        del waiting

    def place(self, job: Job) -> bool:
        if len(self.running) >= self.number:
            return False
        running = _Running(job, time.monotonic())
        job.place = running
        self.running.add(running)
        self.placed.append(running)
        return True

    def catch_up(self, job: Job) -> None:
        """Nothing is known here that was not posted."""

    def abandon(self, job: Job) -> None:
        running: _Running = job.place
        running.abandoned = True
        self.running.discard(running)
        self.abandoned_count += 1
        self.let_go(running)

    def let_go(self, running: _Running) -> None:
        raise NotImplementedError

    def next_check(self) -> float:
        return min(
            (r.started + r.job.timeout for r in self.running if r.job.timeout is not None),
            default=inf,
        )

    def check(self, now: float) -> None:
        late = [
            r
            for r in self.running
            if r.job.timeout is not None and r.started + r.job.timeout <= now
        ]
        for running in late:
            if running.begun:
                self.reports.timed_out(running.job)
            else:  # its thread or loop is late: its time does not count yet
                running.started = now

    def scale(self, number: int) -> None:
        self.number = number

    def slots(self) -> int:
        return self.number

    def busy_seconds(self) -> float:
        now = time.monotonic()
        return self.busy + sum(now - running.started for running in list(self.running))

    def places(self) -> list[Place]:
        names = ", ".join(sorted(running.job.id for running in self.running)[:20])
        return [
            Place(0, self.kind, None, f"{len(self.running)} of {self.number} busy",
                  names or None, self.busy_seconds(), self.finished)
        ]  # fmt: skip

    def _report(
        self, running: _Running, ok: bool, started: float, elapsed: float, payload: bytes
    ) -> None:
        self.busy += elapsed
        if not running.abandoned:
            self.finished += 1
            self.running.discard(running)
            self.reports.ended(running.job, ok, started, elapsed, payload)

    def _context(self, running: _Running) -> context.TaskContext:
        job = running.job

        def say(what: str, value: Any) -> None:
            running.notes.append((what, value))
            if not running.noted:  # a task that tells faster than is stored fills no memory
                running.noted = True
                self.reports.post(note)

        def note() -> None:
            running.noted = False
            while running.notes:
                what, value = running.notes.popleft()
                if running in self.running:
                    self.reports.note(job, what, value)

        return context.TaskContext(job.id, job.attempts + 1, job.run, say)


def _call_of(job: Job) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    if job.live is not None:
        function, args, kwargs = job.live
        if job.parent_data is not None:
            args, kwargs = fill_in(args, kwargs, job.parent_data)
        return function, args, kwargs
    function = pickle.loads(job.fn)  # noqa: S301  (packed here, kept in our file)
    args, kwargs = load_call(job.args, job.parent_data)
    return function, args, kwargs


class ThreadBackend(_Local):
    """Threads for what waits. None can be killed: it is abandoned, another takes its place."""

    kind = "io"

    def __init__(self, number: int, result_limit: int) -> None:
        super().__init__(number, result_limit)
        self._queue: SimpleQueue[_Running | None] = SimpleQueue()
        self._threads = 0  # that take work

    def flush(self) -> None:
        """Start as many threads as there is work for, up to the number, and feed them."""
        while self._threads < min(self.number, len(self.running)):
            self._threads += 1
            threading.Thread(target=self._work, name="scheduler-io", daemon=True).start()
        for running in self.placed:
            self._queue.put(running)
        self.placed.clear()

    def let_go(self, running: _Running) -> None:
        """Its thread ends when the call does, and takes no more work."""
        if running in self.placed:
            self.placed.remove(running)
        else:
            self._threads -= 1  # its thread ends when the call does

    def close(self) -> None:
        """Let idle threads end; what runs is left to itself."""
        for _ in range(self._threads):
            self._queue.put(None)

    def _work(self) -> None:
        while (running := self._queue.get()) is not None:
            if not running.abandoned:
                self._run(running)
            if running.abandoned:
                return

    def _run(self, running: _Running) -> None:
        started = running.started = time.monotonic()
        running.begun = True
        context.running.set(self._context(running))
        try:
            function, args, kwargs = _call_of(running.job)
            payload = dump_result(function(*args, **kwargs), self.result_limit)
            ok = True
        except BaseException as error:  # noqa: BLE001  (SystemExit of a task is its failure)
            ok, payload = False, dump_error(error, self.result_limit)
        running.end_if_forked()
        elapsed = time.monotonic() - started
        self.reports.post(lambda: self._report(running, ok, started, elapsed, payload))


class LoopBackend(_Local):
    """An event loop in a thread of its own, for coroutine functions.

    One that blocks instead of awaiting holds up all others. When it is to be ended and the loop
    does not answer, the loop is abandoned like a thread: another takes what had not begun.
    """

    kind = "async"

    def __init__(self, number: int, result_limit: int) -> None:
        super().__init__(number, result_limit)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._answer_by = inf  # when the loop has to have obeyed

    def flush(self) -> None:
        """Begin what was placed; the loop is started by the first coroutine."""
        if not self.placed:
            return
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._answer_by = inf
            threading.Thread(
                target=self._serve, args=(self._loop,), name="scheduler-async", daemon=True
            ).start()
        for running in self.placed:
            running.loop = self._loop
        self._loop.call_soon_threadsafe(self._begin, self.placed)
        self.placed = []

    def let_go(self, running: _Running) -> None:
        """Cancel the coroutine; one that swallows that goes on, and nobody hears of it."""
        if running in self.placed:
            self.placed.remove(running)
        elif self._loop is not None and running.loop is self._loop:
            self._loop.call_soon_threadsafe(self._cancel, running)
            self._answer_by = min(self._answer_by, time.monotonic() + LOOP_SECONDS)

    def next_check(self) -> float:
        """The nearest deadline of a task, or of an answer of the loop."""
        return min(super().next_check(), self._answer_by)

    def check(self, now: float) -> None:
        """Time out what is late; abandon a loop that does not answer."""
        super().check(now)
        if now >= self._answer_by and self._loop is not None:
            self._answer_by = inf
            stuck = self._loop
            self._end_loop()
            for running in [r for r in self.running if r.loop is stuck and r.task is None]:
                running.abandoned = True  # it must not begin there any more
                self.running.discard(running)
                self.reports.given_back(running.job, "the event loop was blocked")

    def close(self) -> None:
        """Stop the loop; its thread cancels what runs."""
        if self._loop is not None:
            self._end_loop()

    def _end_loop(self) -> None:
        loop, self._loop = self._loop, None
        assert loop is not None
        with suppress(RuntimeError):  # a task has stopped it meanwhile, and it is closed
            loop.call_soon_threadsafe(loop.stop)

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        while self._loop is loop:  # a task may stop it, too
            loop.run_forever()
        for task in (tasks := asyncio.all_tasks(loop)):
            task.cancel()
        if tasks:  # what swallows the cancellation is left behind with the thread
            loop.run_until_complete(asyncio.wait(tasks, timeout=1))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    def _cancel(self, running: _Running) -> None:
        if running.task is not None:
            running.task.cancel()
        self.reports.post(self._answered)

    def _answered(self) -> None:
        self._answer_by = inf

    def _begin(self, started: list[_Running]) -> None:
        for running in started:
            if not running.abandoned:
                running.task = asyncio.get_running_loop().create_task(self._run(running))

    async def _run(self, running: _Running) -> None:
        started = running.started = time.monotonic()
        running.begun = True
        context.running.set(self._context(running))
        try:
            function, args, kwargs = _call_of(running.job)
            value = function(*args, **kwargs)
            if inspect.isawaitable(value):
                value = await value
            payload = dump_result(value, self.result_limit)
            ok = True
        except BaseException as error:  # noqa: BLE001  (a cancelled or exiting task has failed)
            ok, payload = False, dump_error(error, self.result_limit)
        running.end_if_forked()
        elapsed = time.monotonic() - started
        self.reports.post(lambda: self._report(running, ok, started, elapsed, payload))
