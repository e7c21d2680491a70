"""The engine: one thread that alone decides. Messages in, legal transitions, one transaction, out.

    inbox, workers' records, timers ──► transitions in memory ──► dispatch: more transitions
       ──► ONE commit of tasks, states, results and events
       ──► frames to workers, handles resolved, replies given

Nothing leaves a turn before its commit, so what anybody has seen is stored. Groups form by
themselves: whatever arrives during one commit shares the next. (With durability "off" the commit
follows behind, at most 20 ms later.)
"""

import json
import pickle
import random
import selectors
import socket
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from typing import Any, Generic, TypeVar

import structlog

from backends import ExecutorBackend, Place
from errors import (
    DuplicateTask,
    IdempotencyConflict,
    IllegalTransition,
    ResultExpired,
    SchedulerClosed,
    SchedulerError,
    SchedulerFull,
    StoreUnavailable,
    TaskNotEnded,
    UnknownDependency,
    UnknownTask,
)
from graph import Graph, check_acyclic
from handles import Outcome, TaskHandle
from journal import Store
from measures import Meter
from ready_queue import ReadyQueue
from records import Batch, Job
from tasks import (
    CANCELLED,
    COMPLETED,
    FAILED,
    LIVE,
    PENDING,
    QUEUED,
    RETRYING,
    RUNNING,
    TERMINAL,
    TIMED_OUT,
    TaskPriority,
    TaskState,
    check_transition,
)

log = structlog.stdlib.get_logger("scheduler")

HOT_TASKS = 20_000  # whole in memory; beyond, and beyond so many bytes, only as numbers
HOT_BYTES = 32 * 1024 * 1024
LOADED_TOGETHER = 64
BEHIND_SECONDS = 0.02  # durability "off": the commit comes at most so much later
BEHIND_EVENTS = 4_000
COMMIT_RETRY_SECONDS = 0.5  # while the database refuses
TIDY_SECONDS = 60.0  # between looks for results that have expired
CLEANED_TOGETHER = 2_000
ANSWER_SECONDS = 60.0  # a caller that has waited so long for the engine is told so
REASON_CHARACTERS = 500

T = TypeVar("T")


class Reply(Generic[T]):
    """The answer to a question put to the engine."""

    def __init__(self, callback: Callable[[], None] | None = None) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._value: T
        self._error: BaseException | None = None
        self._callback = callback

    def give(self, value: T) -> None:
        self._value = value
        self._release()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._release()

    def _release(self) -> None:
        self._lock.release()
        if self._callback is not None:
            self._callback()

    def wait(self, timeout: float | None) -> bool:
        """Is it there in time?"""
        return self._lock.acquire(timeout=-1 if timeout is None else max(timeout, 0))

    def get(self) -> T:
        """Wait for the answer, or raise the refusal."""
        if not self.wait(ANSWER_SECONDS):
            raise StoreUnavailable("The scheduler has not answered for a minute; is the disk slow?")
        return self.taken()

    def taken(self) -> T:
        """The answer, which is there."""
        if self._error is not None:
            raise self._error
        return self._value


@dataclass(frozen=True)
class Figures:
    """A consistent look at the engine; the counts are those of the stored tasks."""

    counts: dict[str, int]
    queued_by_priority: dict[str, int]
    places: list[Place]
    slots: dict[str, int]
    busy_seconds: dict[str, float]
    utilisation: float
    per_second: float
    ended: int
    waits: list[float]
    worker_deaths: int
    threads_abandoned: int
    commits: int
    store_works: bool


class Engine:
    """Owns every task that is not at rest in the store."""

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
        self.max_tasks = max_tasks
        self.max_crashes = max_crashes
        self.result_ttl = result_ttl
        self.clock = clock
        self.chance = chance or random.Random()  # noqa: S311  (jitter)
        self.meter = Meter()
        self.dispatching = False
        self.closed = False
        self.listeners: list[Callable[[], None]] = []  # called after a commit with transitions

        self._jobs: dict[int, Job] = {}
        self._ids: dict[str, Job] = {}
        self._keys: dict[str, tuple[str, bytes | None]] = {}  # of this batch
        self._ready = {kind: ReadyQueue() for kind in backends}
        self._graph = Graph()
        self._timers: list[tuple[float, int]] = []
        self._watchers: dict[int, list[TaskHandle]] = {}
        self._counts: dict[str, int] = {state.value: 0 for state in TaskState}
        self._published = dict(self._counts)
        self._next_seq = 1
        self._hot_bytes = 0

        self._batch = Batch()
        self._batch_since = 0.0
        self._ended: list[Job] = []
        self._resolved: list[tuple[TaskHandle, Outcome]] = []
        self._replies: list[tuple[Reply[Any], Any]] = []
        self.commits = 0
        self._refused: str | None = None  # why the store cannot be written now
        self._commit_at = 0.0
        self._tidy_at = 0.0
        self._now = 0.0

        self._inbox: deque[Job | Callable[[], None]] = deque()
        self._asleep = False
        self._open = 0
        self._room = threading.Condition(threading.Lock())
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._drained: list[Reply[bool]] = []  # who waits for everything to have ended

    # --- for any thread ---

    def start(self) -> None:
        """Take the store, recover what is in it, and begin to serve; nothing is dispatched yet."""
        recovered = self.store.open()
        try:
            self._recover(recovered)
            for end in (self._woken, self._wake):
                end.setblocking(False)
            self._selector.register(self._woken, selectors.EVENT_READ, self._drain_wake)
            for backend in self.backends.values():
                backend.start(self, self._selector)
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._serve, name="scheduler-engine", daemon=True)
        self._thread.start()

    def reserve(self, number: int, *, block: bool = False, timeout: float | None = None) -> None:
        """Make sure there is room for so many more tasks, or raise SchedulerFull."""
        with self._room:
            if self.closed:
                raise SchedulerClosed("The scheduler was shut down; it takes no more tasks.")
            if self._refused is not None:
                raise StoreUnavailable(
                    f"Nothing new is accepted: the database refuses writes ({self._refused})."
                )
            if self._open + number > self.max_tasks:
                if not block or number > self.max_tasks:
                    raise SchedulerFull(self.max_tasks, number)
                self.check_may_wait()
                if not self._room.wait_for(
                    lambda: self.closed or self._open + number <= self.max_tasks, timeout
                ):
                    raise SchedulerFull(self.max_tasks, number)
                if self.closed:
                    raise SchedulerClosed("The scheduler was shut down; it takes no more tasks.")
            self._open += number

    def release(self, number: int) -> None:
        """Give back room that was reserved, or that ended tasks had."""
        if number:
            with self._room:
                self._open -= number
                self._room.notify_all()

    def post(self, message: Job | Callable[[], None]) -> None:
        """Hand a new job, or something to do, to the engine."""
        self._inbox.append(message)
        if self._asleep:
            self.wake()

    def wake(self) -> None:
        """Have a turn now."""
        with suppress(OSError):  # full: it is awake; closed: it is gone
            self._wake.send(b"\0")

    def ask(self, question: Callable[[], T], *, at_once: bool = False) -> T:
        """Call it in the engine's thread; return once what it did is committed (or at once)."""
        if threading.current_thread() is self._thread:
            return question()
        return self.asking(question, at_once=at_once).get()

    def asking(
        self,
        question: Callable[[], T],
        *,
        at_once: bool = False,
        callback: Callable[[], None] | None = None,
    ) -> Reply[T]:
        """Like `ask`, without waiting; the callback is called when the answer is there."""
        reply: Reply[T] = Reply(callback)

        def answer() -> None:
            if self.closed and self._stopping:
                reply.fail(SchedulerClosed("The scheduler was shut down."))
                return
            try:
                value = question()
            except Exception as error:  # noqa: BLE001  (it belongs to the one who asked)
                reply.fail(error)
                return
            if at_once:
                reply.give(value)
            else:
                self._replies.append((reply, value))

        self.post(answer)
        thread = self._thread
        if thread is None or not thread.is_alive():
            self._answer_leftovers()
        return reply

    def check_may_wait(self) -> None:
        """Raise if the calling thread is the engine's: it would wait for itself."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("A callback of the scheduler cannot wait for the scheduler.")

    def call_back(self, callback: Callable[[TaskHandle], None], handle: TaskHandle) -> None:
        """Call what somebody has attached; its failure is logged, and is its own."""
        try:
            callback(handle)
        except Exception:
            log.exception("callback_failed", task=handle.id)

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
        if self.store.durability == "off" and self._batch and not self._stopping:
            self.ask(lambda: None)

    def figures(self) -> Figures:
        """A look at everything."""
        self.see_all()
        return self.ask(self._figures, at_once=True)

    def counts(self) -> dict[str, int]:
        """How many stored tasks are in each state."""
        self.see_all()
        return self._published

    def works(self) -> bool:
        """Does the thread run, and the store take writes?"""
        return self._thread is not None and self._thread.is_alive() and self._refused is None

    # --- what can be asked for (in the engine's thread, through `ask`) ---

    def accept(self, jobs: Sequence[Job], *, shared_ids: bool = True) -> list[TaskHandle]:
        """Take tasks, all or none; one that is known already gives the handle of that one."""
        now = self._now
        known = self.store.known([job.id for job in jobs]) if shared_ids else {}
        fresh: dict[str, Job] = {}
        handles: list[TaskHandle] = []
        for job in jobs:
            existing = self._same_task(job, known, fresh)
            if existing is None:
                fresh[job.id] = job
                assert job.handle is not None
                handles.append(job.handle)
            else:
                handles.append(TaskHandle(self, existing, cold=True, existed=True))
        parents = self._find_parents(fresh)
        self._ids.update(fresh)
        for job in fresh.values():
            self._enter(job, now, parents)
        self.release(len(jobs) - len(fresh))
        return handles

    def _same_task(
        self, job: Job, known: dict[str, tuple[int, str, bytes | None]], fresh: dict[str, Job]
    ) -> str | None:
        """The id of the task that was asked for before, or None; raises if it was another."""
        if job.idem_key is not None:
            kept = self._keys.get(job.idem_key) or self.store.with_key(job.idem_key)
            same = next((j for j in fresh.values() if j.idem_key == job.idem_key), None)
            if same is not None:
                kept = (same.id, same.digest)
            if kept is not None:
                if kept[1] != job.digest:
                    raise IdempotencyConflict(
                        f"The idempotency key was used for another request (task {kept[0]!r})."
                    )
                return kept[0]
        present = fresh.get(job.id) or self._ids.get(job.id)
        if present is None and job.id not in known:
            return None
        digest = present.digest if present is not None else known[job.id][2]
        if digest != job.digest or digest is None:
            raise DuplicateTask(
                f"There is a task {job.id!r} already, and it asked for something else. Give "
                "another id, or none."
            )
        return job.id

    def _find_parents(self, fresh: dict[str, Job]) -> dict[str, tuple[int, str]]:
        """Number and state of the parents outside of the batch."""
        wanted = {parent for job in fresh.values() for parent in job.parents}
        if not wanted:
            return {}
        found: dict[str, tuple[int, str]] = {}
        for parent in wanted - fresh.keys():
            if (job := self._ids.get(parent)) is not None:
                assert job.state is not None
                found[parent] = (job.seq, job.state)
        stored = self.store.known(list(wanted - fresh.keys() - found.keys()))
        found.update({parent: (seq, state) for parent, (seq, state, _) in stored.items()})
        for job in fresh.values():
            for parent in job.parents:
                if parent not in fresh and parent not in found:
                    raise UnknownDependency(
                        f"Task {job.id!r} depends on {parent!r}, which does not exist. Submit the "
                        "parent first, or both in one submit_many. Nothing was submitted."
                    )
        check_acyclic({job.id: job.parents for job in fresh.values()})
        for job in fresh.values():
            job.seq = self._next_seq
            self._next_seq += 1
        return found

    def _enter(self, job: Job, now: float, outside: dict[str, tuple[int, str]]) -> None:
        """A new task becomes pending or queued."""
        if not job.seq:
            job.seq = self._next_seq
            self._next_seq += 1
        seq = job.seq
        job.created = job.since = job.queued = now
        self._jobs[seq] = self._ids[job.id] = job
        self._hot_bytes += len(job.fn) + len(job.args)
        if job.idem_key is not None:
            self._keys[job.idem_key] = (job.id, job.digest)
        batch = self._batch
        batch.tasks.append(job)
        waits = job.run_at is not None and job.run_at > now
        if not job.parents and not waits:
            job.state = QUEUED
            self._counts[QUEUED] += 1
            batch.events.append((seq, now, None, QUEUED, None, None))
            self._ready[job.kind].push(job.priority, seq)
            return
        job.state = PENDING
        self._counts[PENDING] += 1
        batch.events.append((seq, now, None, PENDING, None, None))
        unfinished: list[int] = []
        failed: tuple[str, str] | None = None
        for position, parent in enumerate(job.parents):
            if (present := self._ids.get(parent)) is not None:  # its state may be newer
                parent_seq, state = present.seq, present.state or PENDING
            else:
                parent_seq, state = outside[parent]
            batch.edges.append((seq, position, parent_seq))
            if state in (FAILED, TIMED_OUT, CANCELLED):
                failed = failed or (parent, state)
            elif state != COMPLETED:
                unfinished.append(parent_seq)
        if waits:
            assert job.run_at is not None
            heappush(self._timers, (job.run_at, seq))
        if failed is not None:  # long ago
            self._fail_child(job, *failed, self._job(failed[0]).error)
            self._spread(job)
        elif unfinished or waits:
            self._graph.wait(seq, unfinished, for_time=waits)
        else:
            self._queue(job, None)

    def cancel(self, task_id: str) -> bool:
        """Cancel it, from any thread; true exactly when it ends cancelled."""
        return self.ask(lambda: self._cancel(task_id))

    def _cancel(self, task_id: str) -> bool:
        job = self._job(task_id)
        if job.state == RUNNING:
            self.backends[job.kind].catch_up(job)  # what has ended before is not cancelled
        if job.state == RUNNING:
            self.backends[job.kind].abandon(job)
        elif job.state == QUEUED:
            self._ready[job.kind].remove(job.seq)
        if job.state in LIVE:
            self._graph.drop(job.seq)
            self._end(job, CANCELLED, "cancelled", {"type": "TaskCancelled",
                      "message": f"Task {job.id!r} was cancelled."})  # fmt: skip
        return job.state == CANCELLED

    def retry(self, task_id: str) -> TaskHandle:
        """Run a task that has ended again, as a new run with a fresh budget."""
        job = self._job(task_id)
        if job.state not in TERMINAL:
            raise TaskNotEnded(
                f"Task {task_id!r} is {job.state}; only a task that has ended can be run again."
            )
        if not job.fn:
            raise IllegalTransition(
                f"Task {task_id!r} cannot run again: its function could not be kept, as it cannot "
                "be pickled."
            )
        self._check_parents_completed(job)
        fresh = self._reload(job)
        fresh.handle = TaskHandle(self, task_id)
        fresh.run += 1
        fresh.attempts = fresh.crashes = 0
        fresh.error = fresh.progress = fresh.started = fresh.finished = fresh.run_at = None
        self._batch.dropped_results.append(fresh.seq)
        self._batch.results.pop(fresh.seq, None)
        self._queue(fresh, f"run {fresh.run + 1}")
        return fresh.handle

    def _check_parents_completed(self, job: Job) -> None:
        states = {parent: kept[1] for parent, kept in self.store.known(job.parents).items()}
        for parent in job.parents:
            present = self._ids.get(parent)
            state = present.state if present is not None else states.get(parent)
            if state != COMPLETED:
                raise IllegalTransition(
                    f"Task {job.id!r} cannot run again: its parent {parent!r} is "
                    f"{state or 'not kept any more'}. Run the parent again first."
                )

    def _reload(self, job: Job) -> Job:
        """The job as hot, though it has just ended or lies in the store."""
        if job in self._ended:  # not written yet: it goes on from where it is
            self._ended.remove(job)
            self.meter.count(1)
            self.release(1)
        else:
            self._hot_bytes += len(job.fn) + len(job.args)
        self._jobs[job.seq] = self._ids[job.id] = job
        return job

    def cleanup(self, before: float, states: Sequence[str]) -> int:
        """Delete tasks that ended before a moment, some at a time; call until it returns 0."""
        if self._batch:
            self._commit()
        counts = self.store.cleanup(before, states, CLEANED_TOGETHER)
        for state, number in counts.items():
            self._counts[state] -= number
        self._published = dict(self._counts)
        return sum(counts.values())

    def watch(self, handle: TaskHandle) -> None:
        """From any thread: resolve this handle, too, when its task ends."""
        self.post(lambda: self._watch(handle))
        if self._thread is None or not self._thread.is_alive():
            self._answer_leftovers()

    def _watch(self, handle: TaskHandle) -> None:
        try:
            job = self._ids.get(handle.id)
            if job is None:
                known = self.store.known([handle.id]).get(handle.id)
                if known is None:
                    raise UnknownTask(f"There is no task {handle.id!r}.")
                if known[1] in LIVE:
                    self._watchers.setdefault(known[0], []).append(handle)
                    return
                job = self._job(handle.id)
            if job.state in LIVE:
                self._watchers.setdefault(job.seq, []).append(handle)
                return
            fresh = self._batch.results.get(job.seq)
            value = fresh[0] if fresh else self.store.results([job.seq]).get(job.seq)
            self._resolved.append((handle, _outcome(job, value)))
        except (SchedulerError, sqlite3.Error) as error:
            self._resolved.append((handle, Outcome("", None, None, 0, 0.0, error)))

    def scale(self, kind: str, number: int) -> None:
        """Have so many workers."""
        self.backends[kind].scale(number)

    def begin(self) -> None:
        """Dispatch from now on."""
        self.dispatching = True

    def _figures(self) -> Figures:
        busy = {kind: backend.busy_seconds() for kind, backend in self.backends.items()}
        levels = [queue.by_level() for queue in self._ready.values()]
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

    # --- transitions ---

    def _move(self, job: Job, state: str, reason: str | None, worker: int | None = None) -> None:
        """The only way into another state: checked, counted, and a row in the event table."""
        before = job.state
        check_transition(job.id, before, state)
        assert before is not None
        self._counts[before] -= 1
        self._counts[state] += 1
        job.state = state
        job.since = self._now
        self._batch.events.append((job.seq, self._now, before, state, reason, worker))
        if job.stored is not None:
            self._batch.changed[job.seq] = job

    def _queue(self, job: Job, reason: str | None) -> None:
        self._move(job, QUEUED, reason)
        job.queued = self._now
        job.place = job.parent_data = None
        self._ready[job.kind].push(job.priority, job.seq)

    def _end(
        self,
        job: Job,
        state: str,
        reason: str | None,
        error: dict[str, Any] | None,
        finished: float | None = None,
    ) -> None:
        """A task ends; so do its children unless it completed."""
        job.finished = self._now if finished is None else finished
        job.error = None if error is None else json.dumps(error)
        self._move(job, state, reason)
        self._leave(job)
        if self._graph.has_children(job.seq):
            self._spread(job)

    def _spread(self, job: Job) -> None:
        """Children of a task that has ended become ready, or end with it, and theirs too."""
        ended = [job]
        while ended:
            parent = ended.pop()
            for seq in self._graph.leave(parent.seq):
                if parent.state == COMPLETED:
                    if self._graph.met(seq):
                        self._queue(self._by_number(seq), None)
                    continue
                child = self._by_number(seq)
                self._graph.drop(seq)
                self._fail_child(child, parent.id, str(parent.state), parent.error)
                ended.append(child)

    def _fail_child(self, child: Job, parent: str, state: str, error: str | None) -> None:
        description: dict[str, Any]
        if state == CANCELLED:
            end, reason = CANCELLED, f"parent {parent} was cancelled"
            description = {"type": "TaskCancelled", "message": f"Parent {parent!r} was cancelled."}
        else:
            end = FAILED
            found = json.loads(error) if error else {"type": state, "message": ""}
            cause = found.get("cause") or f"{found['type']}: {found['message']}"
            reason = f"parent {parent} {state}"
            description = {
                "type": "DependencyFailed", "parent": parent, "cause": cause,
                "message": f"The task depends on {parent!r}, which did not succeed: {cause}",
            }  # fmt: skip
        child.finished = self._now
        child.error = json.dumps(description)
        self._move(child, end, reason)
        self._leave(child)

    def _leave(self, job: Job) -> None:
        """It has ended: whoever waits is told after the commit."""
        job.place = job.parent_data = job.live = None
        self._ended.append(job)
        watchers = self._watchers.pop(job.seq, None) if self._watchers else None
        if job.handle is None and watchers is None:
            return
        fresh = self._batch.results.get(job.seq)
        outcome = _outcome(job, fresh[0] if fresh else None)
        if job.handle is not None:
            self._resolved.append((job.handle, outcome))
        if watchers is not None:
            self._resolved += [(handle, outcome) for handle in watchers]

    # --- what backends report: see `Reports` ---

    def ended(self, job: Job, ok: bool, started: float, elapsed: float, payload: bytes) -> None:
        """A run of a task is over."""
        job.attempts += 1
        job.started = self._now - (time.monotonic() - started)
        self.meter.waits.append(max(0.0, job.started - job.queued))
        if ok:
            expires = None if self.result_ttl is None else self._now + self.result_ttl
            self._batch.results[job.seq] = (payload, expires)
            self._end(job, COMPLETED, None, None, job.started + elapsed)
            return
        type_name, message, text, travelled = pickle.loads(payload)
        error = {"type": type_name, "message": message, "traceback": text}
        reason = f"{type_name}: {message}"[:REASON_CHARACTERS]
        if job.retry is not None and job.attempts < job.retry.max_attempts:
            delay = job.retry.delay(job.attempts, self.chance)
            job.run_at = self._now + delay
            job.error = json.dumps(error)
            job.place = None
            self._move(job, RETRYING, reason)
            heappush(self._timers, (job.run_at, job.seq))
            return
        if travelled is not None:
            expires = None if self.result_ttl is None else self._now + self.result_ttl
            self._batch.results[job.seq] = (travelled, expires)
        self._end(job, FAILED, reason, error, job.started + elapsed)

    def given_back(self, job: Job, reason: str) -> None:
        """It was handed out and has not begun."""
        self._queue(job, reason)

    def crashed(self, job: Job, detail: str) -> None:
        """Its worker died while it ran there."""
        job.crashes += 1
        if job.crashes < self.max_crashes:
            self._queue(job, f"its worker died ({detail})")
            return
        message = (
            f"The worker of task {job.id!r} died under it {job.crashes} times, the last time by "
            f"{detail}; it is not run again."
        )
        self._end(job, FAILED, f"its worker died ({detail})",
                  {"type": "WorkerCrashed", "message": message})  # fmt: skip

    def timed_out(self, job: Job) -> None:
        """It has run longer than it may."""
        job.attempts += 1
        self.backends[job.kind].abandon(job)
        message = f"Task {job.id!r} ran longer than its timeout of {job.timeout:g} s."
        self._end(job, TIMED_OUT, "timeout", {"type": "TaskTimedOut", "message": message})

    def note(self, job: Job, what: str, value: Any) -> None:
        """A running task says something."""
        if what == "progress":
            job.progress = json.dumps(value)
            self._batch.changed[job.seq] = job
        else:
            self._batch.notes.append((job.seq, self._now, value))

    # --- the turn ---

    def _serve(self) -> None:
        try:
            while not self._stopping:
                self._turn(self._patience())
        except BaseException:
            log.exception("engine_failed")
            raise
        finally:
            self._release()

    def _turn(self, patience: float | None) -> None:
        self._asleep = True
        if self._inbox:
            patience = 0
        ready = self._selector.select(patience)
        self._asleep = False
        self._now = self.clock()
        for key, mask in ready:
            key.data(mask)
        self._read_inbox()
        self._fire_timers()
        now = time.monotonic()
        for backend in self.backends.values():
            if backend.next_check() <= now:
                backend.check(now)
        if self.dispatching and self._refused is None and not self._stopping:
            self._dispatch()
        self._conclude()
        if self._drained:
            self._check_drained()

    def _patience(self) -> float | None:
        """Seconds until something has to be done without being asked."""
        now = time.monotonic()
        until = min(backend.next_check() for backend in self.backends.values()) - now
        if self._batch or self._refused is not None:
            until = min(until, self._commit_at - now)
        if self._timers:
            until = min(until, self._timers[0][0] - self.clock())
        if self.result_ttl is not None:
            until = min(until, max(self._tidy_at - now, 0.0))
        return None if until == inf else max(until, 0.0)

    def _drain_wake(self, mask: int) -> None:
        del mask
        with suppress(BlockingIOError):
            self._woken.recv(4096)

    def _read_inbox(self) -> None:
        inbox = self._inbox
        for _ in range(len(inbox)):
            message = inbox.popleft()
            if type(message) is Job:
                self._enter(message, self._now, {})
            else:
                message()  # type: ignore[operator]

    def _fire_timers(self) -> None:
        timers = self._timers
        while timers and timers[0][0] <= self._now:
            _, seq = heappop(timers)
            if self._graph.met(seq):
                job = self._by_number(seq)
                if job.state == PENDING:
                    self._queue(job, None)
            elif (
                (waiting := self._jobs.get(seq)) is not None
                and waiting.state == RETRYING
                and (waiting.run_at or 0.0) <= self._now
            ):
                self._queue(waiting, None)
        if self.result_ttl is not None and time.monotonic() >= self._tidy_at:
            self._tidy_at = time.monotonic() + TIDY_SECONDS
            with suppress(sqlite3.Error, StoreUnavailable):  # the next look may do
                self.store.expire(self._now)

    def _dispatch(self) -> None:
        """Hand ready tasks to backends, most urgent first, as long as there is room."""
        jobs, events, now = self._jobs, self._batch.events, self._now
        changed = self._batch.changed
        for kind, backend in self.backends.items():
            queue = self._ready[kind]
            if not len(queue):
                continue
            backend.expects(len(queue))
            dispatched = 0
            while (seq := queue.peek()) is not None:
                job = jobs.get(seq) or self._load_next(queue, seq)
                if job.parents and job.parent_data is None and not self._gather(job):
                    queue.pop()
                    continue
                if not backend.place(job):
                    break
                queue.pop()
                dispatched += 1
                job.state = RUNNING  # queued, so this is legal: the hot path of `_move`
                job.since = now
                events.append((seq, now, QUEUED, RUNNING, None, job.place.pid))
                if job.stored is not None:
                    changed[seq] = job
            self._counts[QUEUED] -= dispatched
            self._counts[RUNNING] += dispatched

    def _gather(self, job: Job) -> bool:
        """Put the results of the parents beside the call; False when that failed the task."""
        kept: dict[str, tuple[int, str, bytes | None]] | None = None
        numbers: dict[str, int] = {}
        for parent in job.parents:
            present = self._ids.get(parent)
            if present is None:
                kept = kept if kept is not None else self.store.known(job.parents)
                numbers[parent] = kept[parent][0]
            else:
                numbers[parent] = present.seq
        fresh = self._batch.results
        stored = self.store.results([s for s in numbers.values() if s not in fresh])
        data: list[tuple[str, bytes]] = []
        for parent, seq in numbers.items():
            value = fresh[seq][0] if seq in fresh else stored.get(seq)
            if value is None:
                error = ResultExpired(f"The result of the parent {parent!r} is not kept any more.")
                self._move(job, RUNNING, None)
                self._end(job, FAILED, str(error),
                          {"type": "ResultExpired", "message": str(error)})  # fmt: skip
                return False
            data.append((parent, value))
        job.parent_data = (job.positionally, data)
        return True

    def _conclude(self) -> None:
        """Commit, then let the world see it."""
        now = time.monotonic()
        may_try = self._refused is None or now >= self._commit_at
        if self._batch and may_try and not self._may_follow(now):
            self._commit()
        if self._refused is not None:
            return
        for backend in self.backends.values():
            backend.flush()
        if self._resolved:
            resolved, self._resolved = self._resolved, []
            for handle, outcome in resolved:
                handle.resolve(outcome)
        if not self._batch:
            self._published = dict(self._counts)
        if self._replies:
            replies, self._replies = self._replies, []
            for reply, value in replies:
                reply.give(value)

    def _may_follow(self, now: float) -> bool:
        """With durability "off", and nobody waiting for it, the commit may follow behind."""
        if self.store.durability != "off" or self._replies or self._refused is not None:
            return False
        if not self._commit_at:
            self._commit_at = now + BEHIND_SECONDS
        return now < self._commit_at and len(self._batch.events) < BEHIND_EVENTS

    def _commit(self) -> None:
        batch = self._batch
        try:
            self.store.commit(batch)
        except (sqlite3.Error, StoreUnavailable, OSError) as error:
            if self._refused is None:
                log.warning("store_refused", error=str(error))
            self._refused = str(error)
            self._commit_at = time.monotonic() + COMMIT_RETRY_SECONDS
            replies, self._replies = self._replies, []
            for reply, _ in replies:
                reply.fail(StoreUnavailable(
                    f"The database refuses writes ({error}); whether this took effect shows when "
                    "it works again."
                ))  # fmt: skip
            return
        if self._refused is not None:
            log.info("store_works_again")
            self._refused = None
        self.commits += 1
        self._commit_at = 0.0
        for job in batch.tasks:
            job.stored = job.state
        for job in batch.changed.values():
            job.stored = job.state
        self._batch = Batch()
        if self._keys:
            self._keys.clear()
        self._forget_ended()
        if len(self._jobs) > HOT_TASKS or self._hot_bytes > HOT_BYTES:
            self._cool(batch.tasks)
        if batch.events:
            for listener in self.listeners:
                listener()

    def _forget_ended(self) -> None:
        if not self._ended:
            return
        jobs, ids = self._jobs, self._ids
        for job in self._ended:
            if jobs.pop(job.seq, None) is not None:
                self._hot_bytes -= len(job.fn) + len(job.args)
            ids.pop(job.id, None)
        self.meter.count(len(self._ended))
        self.release(len(self._ended))
        self._ended.clear()
        self.meter.sample(self.backends["cpu"].busy_seconds)

    def _cool(self, jobs: Iterable[Job]) -> None:
        """Keep of new tasks that have to wait only their numbers."""
        for job in jobs:
            if job.state in (QUEUED, PENDING) and job.live is None and job.seq in self._jobs:
                del self._jobs[job.seq], self._ids[job.id]
                self._hot_bytes -= len(job.fn) + len(job.args)
                if job.handle is not None and job.handle.forget():
                    self._watchers.setdefault(job.seq, []).append(job.handle)

    # --- from the store into memory ---

    def _job(self, task_id: str) -> Job:
        return self._ids.get(task_id) or self._load_one(task_id)

    def _load_one(self, task_id: str) -> Job:
        known = self.store.known([task_id]).get(task_id)
        if known is None:
            raise UnknownTask(f"There is no task {task_id!r}.")
        return self._by_number(known[0])

    def _by_number(self, seq: int) -> Job:
        job = self._jobs.get(seq)
        if job is None:
            (job,) = self.store.load([seq])
            self._adopt(job)
        return job

    def _adopt(self, job: Job) -> None:
        """A job from the store is hot while it is unfinished."""
        if job.state in LIVE:
            job.queued = job.since
            self._jobs[job.seq] = self._ids[job.id] = job
            self._hot_bytes += len(job.fn) + len(job.args)

    def _load_next(self, queue: ReadyQueue, seq: int) -> Job:
        wanted = [each for each in queue.upcoming(LOADED_TOGETHER) if each not in self._jobs]
        for job in self.store.load(wanted if seq in wanted else [*wanted, seq]):
            self._adopt(job)
        return self._jobs[seq]

    def _recover(self, recovered: Any) -> None:
        """Take over what an earlier scheduler has left: nothing accepted is forgotten."""
        self._now = self.clock()
        self._next_seq = recovered.next_seq
        for state, number in recovered.counts.items():
            self._counts[state] = number
        self._open = len(recovered.live)
        by_queue: dict[tuple[str, int], list[int]] = {}
        running: list[int] = []
        edges: dict[int, list[tuple[int, str]]] = {}
        for child, parent, state in recovered.edges:
            edges.setdefault(child, []).append((parent, state))
        for seq, kind, priority, state, run_at in recovered.live:
            if state == QUEUED:
                by_queue.setdefault((kind, priority), []).append(seq)
            elif state == RUNNING:
                running.append(seq)
            elif state == RETRYING:
                self._by_number(seq)
                heappush(self._timers, (run_at or 0.0, seq))
            else:
                self._graph.wait(
                    seq,
                    [parent for parent, state in edges.get(seq, ()) if state in LIVE],
                    for_time=True,  # also without one: whatever was met meanwhile fires at once
                )
                heappush(self._timers, (run_at or 0.0, seq))
        for (kind, priority), seqs in by_queue.items():
            self._ready[kind].extend(priority, seqs)
        for start in range(0, len(running), LOADED_TOGETHER):
            for job in self.store.load(running[start : start + LOADED_TOGETHER]):
                self._adopt(job)
                self._queue(job, "the scheduler was killed")
        self._published = dict(self._counts)
        if self._batch:
            self.store.commit(self._batch)
            for job in self._batch.changed.values():
                job.stored = job.state
            self._batch = Batch()
            self._published = dict(self._counts)

    # --- the end ---

    def shutdown(self, *, wait: bool, cancel_pending: bool, timeout: float | None) -> None:
        """Stop taking tasks; wait for those that would be lost, or leave all to the store."""
        with self._room:
            self.closed = True
            self._room.notify_all()
        thread = self._thread
        if thread is None or not thread.is_alive():
            return
        if thread is threading.current_thread():
            self._stopping = True
            return
        if cancel_pending:
            with suppress(SchedulerError):
                self.ask(self._cancel_all)
        if wait and self.dispatching:
            drained: Reply[bool] = Reply()
            self.post(lambda: self._drain(drained))
            if thread.is_alive():
                drained.wait(timeout)
        self.post(self._stop)
        self.wake()
        thread.join()
        self._answer_leftovers()

    def _cancel_all(self) -> None:
        """Cancel what has not begun."""
        for task_id in {*self.store.unfinished(), *self._ids}:
            if self._job(task_id).state in (PENDING, QUEUED, RETRYING):
                self._cancel(task_id)

    def _drain(self, reply: Reply[bool]) -> None:
        if self._stopping:
            reply.give(False)
        else:
            self._drained.append(reply)

    def _check_drained(self) -> None:
        left = self._counts[QUEUED] + self._counts[RUNNING]
        if not self.store.lasting:  # else what waits for its time is there for the next one
            left += self._counts[PENDING] + self._counts[RETRYING]
        if left == 0:
            self._tell_drained()

    def _tell_drained(self) -> None:
        while self._drained:
            self._drained.pop().give(True)

    def _stop(self) -> None:
        """Put what runs back into the queue: a store that lasts has it for the next scheduler."""
        for job in list(self._jobs.values()):
            if job.state == RUNNING:
                self.backends[job.kind].catch_up(job)
            if job.state == RUNNING:
                self.backends[job.kind].abandon(job)
                self._queue(job, "the scheduler was shut down")
        self._stopping = True
        if self._batch:
            self._commit()

    def _release(self) -> None:
        for backend in self.backends.values():
            backend.close()
        for end in (self._woken, self._wake):
            end.close()
        self._selector.close()
        gone = SchedulerClosed("The scheduler was shut down before the task ended.")
        outcome = Outcome("", None, None, 0, 0.0, gone)
        if self._refused is None:
            for handle, found in self._resolved:
                handle.resolve(found)
        self._resolved.clear()
        for job in self._jobs.values():
            if job.handle is not None:
                job.handle.resolve(outcome)
        for handles in self._watchers.values():
            for handle in handles:
                handle.resolve(outcome)
        for reply, value in self._replies:
            reply.give(value)
        self._replies.clear()
        with self._room:
            self.closed = True
            self._room.notify_all()
        self._stopping = True
        self._tell_drained()
        self.store.close()
        self._answer_leftovers()

    def _answer_leftovers(self) -> None:
        """Whoever asked while the engine ended is told."""
        while self._inbox:
            with suppress(IndexError):
                message = self._inbox.popleft()
                if type(message) is Job:
                    if message.handle is not None:
                        gone = SchedulerClosed("The scheduler was shut down; nothing was kept.")
                        message.handle.resolve(Outcome("", None, None, 0, 0.0, gone))
                else:
                    message()  # type: ignore[operator]
        while self._resolved:
            with suppress(IndexError):
                handle, outcome = self._resolved.pop()
                handle.resolve(outcome)


def _outcome(job: Job, value: bytes | None) -> Outcome:
    duration = 0.0
    if job.finished is not None and job.started is not None:
        duration = max(0.0, job.finished - job.started)
    assert job.state is not None
    return Outcome(job.state, value, job.error, job.attempts, duration)
