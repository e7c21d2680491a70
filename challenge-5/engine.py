"""The engine: one thread that alone decides. Messages in, legal transitions, one transaction, out.

    inbox, workers' records, timers ──► transitions in memory ──► dispatch: more transitions
       ──► ONE commit of tasks, states, results and events
       ──► frames to workers, handles resolved, replies given

Nothing leaves a turn before its commit, so what anybody has seen is stored. Groups form by
themselves: whatever arrives during one commit shares the next. (With durability "off" the commit
follows behind, at most 20 ms later.) `_turn` is the whole of it; what a turn decides stands in
`admission.py`, `lifecycle.py` and `dispatch.py`.
"""

import random
import selectors
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from math import inf
from typing import Any, TypeVar

import structlog

from admission import Admission, Room
from backends import ExecutorBackend
from dispatch import dispatch
from errors import SchedulerClosed, SchedulerError, StoreUnavailable, UnknownTask
from handles import Outcome, TaskHandle
from inbox import Inbox, Reply
from lifecycle import Lifecycle
from measures import Figures, Meter
from records import Batch, Job
from recovery import recover
from store import Store
from tasks import PENDING, QUEUED, RETRYING, RUNNING, TaskPriority, TaskState

log = structlog.stdlib.get_logger("scheduler")

BEHIND_SECONDS = 0.02  # durability "off": the commit comes at most so much later
BEHIND_EVENTS = 4_000
COMMIT_RETRY_SECONDS = 0.5  # while the database refuses
GIVE_UP_SECONDS = 10.0  # of refusals, before a shutdown waits no longer for tasks to finish
TURN_MESSAGES = 5_000  # so that what runs out of time is looked at also under a flood of submits
TIDY_SECONDS = 60.0  # between looks for results that have expired
CLOCK_SECONDS = 1.0  # between looks at the wall clock, which may jump, while tasks wait for it
CLEANED_TOGETHER = 2_000

T = TypeVar("T")


class Engine:
    """Owns every task that is not at rest in the store."""

    def _turn(self, patience: float | None) -> None:
        """Sleep until something comes, decide, commit, and let the world see it."""
        inbox, lifecycle = self._inbox, self.lifecycle
        inbox.asleep = True
        ready = self._selector.select(0 if inbox.messages else patience)
        inbox.asleep = False
        lifecycle.now = self.clock()
        for key, mask in ready:
            key.data(mask)
        self._read_inbox()
        lifecycle.fire_timers()
        now = time.monotonic()
        for backend in self.backends.values():
            if backend.next_check() <= now:
                backend.check(now)
        if now >= self._tidy_at:
            self._tidy()
        if self.dispatching and self._refused is None and not self._stopping:
            dispatch(lifecycle)
        self._conclude()
        if self._drained:
            self._check_drained()

    def _conclude(self) -> None:
        now = time.monotonic()
        may_try = self._refused is None or now >= self._commit_at
        if self.lifecycle.batch and may_try and not self._may_follow(now):
            self._commit()
        if self._refused is not None:
            return
        for backend in self.backends.values():
            backend.flush()
        self._resolve()
        if not self.lifecycle.batch:
            self._published = dict(self.lifecycle.counts)
        if self._inbox.replies:
            self._inbox.give_replies()

    def __init__(
        self,
        store: Store,
        backends: dict[str, ExecutorBackend],
        *,
        max_tasks: int,
        max_crashes: int,
        result_ttl: float | None,
        clock: Callable[[], float] = time.time,
        chance: random.Random | None = None,
    ) -> None:
        self.store = store
        self.backends = backends
        self.clock = clock
        self._inbox = Inbox()
        self.lifecycle = Lifecycle(
            store,
            backends,
            self._inbox.post,
            max_crashes=max_crashes,
            result_ttl=result_ttl,
            chance=chance or random.Random(),  # noqa: S311  (jitter)
        )
        self.room = Room(max_tasks)
        self._admission = Admission(self.lifecycle, self.room, self._handle_of)
        self.dispatching = False
        self.commits = 0
        self.listeners: list[Callable[[], None]] = []  # called after a commit with transitions

        self._published = dict(self.lifecycle.counts)
        self._refused: str | None = None  # why the store cannot be written now
        self._refused_since = 0.0
        self._commit_at: float = 0.0
        self._tidy_at = 0.0 if result_ttl is not None else inf
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        self._drained: list[Reply[bool]] = []  # who waits for everything to have ended

    def start(self) -> None:
        """Take the store, recover what is in it, and begin to serve; nothing is dispatched yet."""
        recovered = self.store.open()
        try:
            self.lifecycle.now = self.clock()
            recover(self.lifecycle, recovered)
            self.room.taken = len(recovered.live)
            if self.lifecycle.batch:
                self.store.commit(self.lifecycle.batch)
                self._committed()
            self._published = dict(self.lifecycle.counts)
            self._inbox.register(self._selector)
            for backend in self.backends.values():
                backend.start(self.lifecycle, self._selector)
        except BaseException:
            self._release()
            raise
        self._inbox.thread = threading.Thread(
            target=self._serve, name="scheduler-engine", daemon=True
        )
        self._inbox.thread.start()

    def begin(self) -> None:
        """Dispatch from now on."""
        self.dispatching = True

    def _serve(self) -> None:
        try:
            while not self._stopping:
                self._turn(self._patience())
        except BaseException:
            log.exception("engine_failed")
            raise
        finally:
            self._release()

    def _patience(self) -> float | None:
        """Seconds until something has to be done without being asked."""
        now = time.monotonic()
        until = min(backend.next_check() for backend in self.backends.values()) - now
        if self.lifecycle.batch or self._refused is not None:
            until = min(until, self._commit_at - now)
        if self.lifecycle.timers:
            until = min(until, self.lifecycle.timers[0][0] - self.clock(), CLOCK_SECONDS)
        until = min(until, self._tidy_at - now)
        return None if until == inf else max(until, 0.0)

    def _read_inbox(self) -> None:
        messages, admission = self._inbox.messages, self._admission
        for _ in range(min(len(messages), TURN_MESSAGES)):
            message = messages.popleft()
            if type(message) is Job:
                admission.enter(message, {})
            else:
                message()  # type: ignore[operator]

    def _tidy(self) -> None:
        self._tidy_at = time.monotonic() + TIDY_SECONDS
        with suppress(sqlite3.Error, StoreUnavailable):  # the next look may do
            self.store.expire(self.lifecycle.now)

    # --- the commit ---

    def _may_follow(self, now: float) -> bool:
        """With durability "off", and nobody waiting for it, the commit may follow behind."""
        if self.store.durability != "off" or self._inbox.replies or self._refused is not None:
            return False
        if not self._commit_at:
            self._commit_at = now + BEHIND_SECONDS
        return now < self._commit_at and len(self.lifecycle.batch.events) < BEHIND_EVENTS

    def _commit(self) -> None:
        try:
            self.store.commit(self.lifecycle.batch)
        except (sqlite3.Error, StoreUnavailable, OSError) as error:
            self._refuse(str(error))
            return
        if self._refused is not None:
            log.info("store_works_again")
            self._refused = self.room.refusal = None
        self._committed()
        for listener in self.listeners:
            listener()

    def _refuse(self, why: str) -> None:
        """Take nothing new until the store takes what is waiting."""
        now = time.monotonic()
        if self._refused is None:
            log.warning("store_refused", error=why)
            self._refused_since = now
        self._refused = self.room.refusal = why
        self._commit_at = now + COMMIT_RETRY_SECONDS
        self._inbox.fail_replies(StoreUnavailable(
            f"The database refuses writes ({why}); whether this took effect shows when it works "
            "again."
        ))  # fmt: skip

    def _committed(self) -> None:
        """What was decided is stored: go on with the next batch."""
        lifecycle, batch = self.lifecycle, self.lifecycle.batch
        self.commits += 1
        self._commit_at = 0.0
        for job in batch.tasks:
            job.stored = job.state
        for job in batch.changed.values():
            job.stored = job.state
        lifecycle.batch = Batch()
        self._admission.keys.clear()
        if lifecycle.over:
            over, lifecycle.over = lifecycle.over, []
            lifecycle.residents.remove(over)
            self.room.release(len(over))
            self.meter.count(len(over))
            self.meter.sample(self.backends["cpu"].busy_seconds)
        lifecycle.residents.cool(batch.tasks, lifecycle.forgotten)

    def _resolve(self) -> None:
        if self.lifecycle.resolved:
            resolved, self.lifecycle.resolved = self.lifecycle.resolved, []
            for handle, outcome in resolved:
                handle.resolve(outcome)

    # --- for any thread: submit and change ---

    def reserve(self, number: int, *, block: bool = False, timeout: float | None = None) -> None:
        """Make sure there is room for so many more tasks, or raise SchedulerFull."""
        self.room.reserve(number, may_wait=self.check_may_wait if block else None, timeout=timeout)

    def post(self, message: Job | Callable[[], None]) -> None:
        """Hand a new job that has room, or something to do, to the engine."""
        self._inbox.post(message)

    def wake(self) -> None:
        """Have a turn now."""
        self._inbox.wake()

    def ask(self, question: Callable[[], T], *, at_once: bool = False) -> T:
        """Call it in the engine's thread; return once what it did is committed (or at once)."""
        return self._inbox.ask(question, at_once=at_once)

    def asking(self, question: Callable[[], T], *, callback: Callable[[], None]) -> Reply[T]:
        """Like `ask`, without waiting; the callback is called when the answer is there."""
        return self._inbox.asking(question, callback=callback)

    def accept(self, jobs: Sequence[Job]) -> list[TaskHandle]:
        """To be asked: take tasks that have room, all or none; what is refused has none."""
        return self._admission.accept(jobs)

    def retry(self, task_id: str) -> TaskHandle:
        """To be asked: run a task that has ended again, if there is room reserved for it."""
        return self._admission.retry(task_id)

    def scale(self, kind: str, number: int) -> None:
        """To be asked: have so many workers."""
        self.backends[kind].scale(number)

    def cleanup(self, before: float, states: Sequence[str]) -> int:
        """To be asked: delete tasks that ended before a moment, some at a time, until it is 0."""
        if self.lifecycle.batch:
            self._commit()
        deleted = self.store.cleanup(before, states, CLEANED_TOGETHER)
        for state, number in deleted.items():
            self.lifecycle.counts[state] -= number
        self._published = dict(self.lifecycle.counts)
        return sum(deleted.values())

    def cancel(self, task_id: str) -> bool:
        """Cancel it, from any thread; true exactly when it ends cancelled."""
        return self.ask(lambda: self.lifecycle.cancel(self.lifecycle.residents.named(task_id)))

    def cancel_waiting(self, ids: Iterable[str]) -> None:
        """Cancel those of these that have not begun, from any thread, in one commit."""

        def cancel() -> None:
            for task_id in ids:
                with suppress(UnknownTask):
                    job = self.lifecycle.residents.named(task_id)
                    if job.state in (PENDING, QUEUED, RETRYING):
                        self.lifecycle.cancel(job)

        self.ask(cancel)

    def _handle_of(self, task_id: str, existed: bool) -> TaskHandle:
        return TaskHandle(self, task_id, cold=existed, existed=existed)

    # --- for any thread: look ---

    @property
    def meter(self) -> Meter:
        """Throughput and waits."""
        return self.lifecycle.meter

    @property
    def closed(self) -> bool:
        """Does it take no more tasks?"""
        return self.room.closed

    def state_of(self, task_id: str) -> TaskState:
        """The committed state."""
        return TaskState(self.row(task_id)["state"])

    def row(self, task_id: str) -> dict[str, Any]:
        """The committed row of a task; one that is on its way in is waited for."""
        self.see_all()
        row = self.store.find(task_id)
        if row is None and not self.closed:
            self.ask(lambda: None)
            row = self.store.find(task_id)
        if row is None:
            raise UnknownTask(f"There is no task {task_id!r}.")
        return row

    def see_all(self) -> None:
        """With commits that follow behind: catch up, so that a reader sees what was visible."""
        if self.store.durability == "off" and self.lifecycle.batch and not self._stopping:
            self.ask(lambda: None)

    def counts(self) -> dict[str, int]:
        """How many stored tasks are in each state."""
        self.see_all()
        return self._published

    def works(self) -> bool:
        """Does the thread run, and the store take writes?"""
        thread = self._inbox.thread
        return thread is not None and thread.is_alive() and self._refused is None

    def figures(self) -> Figures:
        """A look at everything, in the engine's thread."""
        self.see_all()
        return self.ask(self._figures, at_once=True)

    def _figures(self) -> Figures:
        busy = {kind: backend.busy_seconds() for kind, backend in self.backends.items()}
        levels = [queue.by_level() for queue in self.lifecycle.ready.values()]
        return Figures(
            counts=dict(self._published),
            queued_by_priority={
                level.name: sum(each[level] for each in levels) for level in TaskPriority
            },
            places=[place for backend in self.backends.values() for place in backend.places()],
            slots={kind: backend.slots() for kind, backend in self.backends.items()},
            busy_seconds=busy,
            utilisation=self.meter.utilisation(busy["cpu"], self.backends["cpu"].slots()),
            per_second=self.meter.per_second(),
            ended=self.meter.total,
            waits=list(self.meter.waits),
            worker_deaths=getattr(self.backends["cpu"], "deaths", 0),
            threads_abandoned=getattr(self.backends["io"], "abandoned_count", 0),
            commits=self.commits,
            store_works=self._refused is None,
        )

    def watch(self, handle: TaskHandle) -> None:
        """Resolve this handle, too, when its task ends."""

        def watch() -> None:
            try:
                if self._inbox.ended:
                    raise SchedulerClosed("The scheduler was shut down.")
                self.lifecycle.watch(handle)
            except (SchedulerError, sqlite3.Error) as error:
                gone = Outcome("", None, None, 0, 0.0, error)
                self.lifecycle.resolved.append((handle, gone))
                if self._inbox.ended:  # no turn will come
                    self._resolve()

        self.post(watch)
        self._inbox.refuse_if_unread()

    def unwatch(self, handle: TaskHandle) -> None:
        """Nobody waits at this handle any more."""
        self.post(lambda: self.lifecycle.unwatch(handle))

    def check_may_wait(self) -> None:
        """Raise if the calling thread is the engine's: it would wait for itself."""
        if threading.current_thread() is self._inbox.thread:
            raise RuntimeError("A callback of the scheduler cannot wait for the scheduler.")

    def call_back(self, callback: Callable[[TaskHandle], None], handle: TaskHandle) -> None:
        """Call what somebody has attached; its failure is logged, and is its own."""
        try:
            callback(handle)
        except BaseException:
            log.exception("callback_failed", task=handle.id)

    # --- the end ---

    def shutdown(self, *, wait: bool, cancel_pending: bool, timeout: float | None) -> None:
        """Stop taking tasks; wait for those that would be lost, or leave all to the store."""
        self.room.close()
        thread = self._inbox.thread
        if thread is None or not thread.is_alive():
            return
        if thread is threading.current_thread():
            self._stopping = True
            return
        if cancel_pending:
            with suppress(SchedulerError):
                ids = self.ask(lambda: {*self.store.unfinished(), *self.lifecycle.residents.by_id})
                self.cancel_waiting(ids)
        if wait and self.dispatching:
            drained: Reply[bool] = Reply()
            self.post(lambda: self._drain(drained))
            if thread.is_alive():
                drained.wait(timeout)
        self.post(self._stop)
        self.wake()
        thread.join()
        self._inbox.refuse_if_unread()
        self._resolve()

    def _drain(self, reply: Reply[bool]) -> None:
        if self._stopping:
            reply.give(False)
        else:
            self._drained.append(reply)

    def _check_drained(self) -> None:
        counts = self.lifecycle.counts
        left = counts[QUEUED] + counts[RUNNING]
        if not self.store.lasting:  # else what waits for its time is there for the next one
            left += counts[PENDING] + counts[RETRYING]
        stuck = (
            self._refused is not None and time.monotonic() - self._refused_since > GIVE_UP_SECONDS
        )
        if left == 0 or stuck:
            self._tell_drained()

    def _tell_drained(self) -> None:
        while self._drained:
            self._drained.pop().give(True)

    def _stop(self) -> None:
        """Put what runs back into the queue: a store that lasts has it for the next scheduler."""
        for job in list(self.lifecycle.residents.by_seq.values()):
            self.lifecycle.stop(job)
        self._stopping = self._inbox.ended = True
        if self.lifecycle.batch:
            self._commit()

    def _release(self) -> None:
        for backend in self.backends.values():
            try:
                backend.close()
            except Exception:
                log.exception("backend_not_closed")  # whoever waits is told all the same
        self._inbox.close()
        self._selector.close()
        if self._refused is None:
            self._resolve()
        gone = SchedulerClosed("The scheduler was shut down before the task ended.")
        for handle in self.lifecycle.waiting_handles():
            handle.resolve(Outcome("", None, None, 0, 0.0, gone))
        self.lifecycle.resolved.clear()
        self._inbox.give_replies()
        self.room.close()
        self._stopping = self._inbox.ended = True
        self._tell_drained()
        self.store.close()
        self._inbox.refuse_if_unread()
