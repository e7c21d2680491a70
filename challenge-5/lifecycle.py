"""The life of a task: the only code that changes a state, and what every change drags along.

`_move` is the one way from state to state: checked against the table, counted, and an event row.
All else here decides which move it is: an end spreads to children, a failure may be retried, a
crash is counted. Nothing is written here: the engine commits `batch`, then the world sees it.
"""

import json
import pickle
import time
from collections.abc import Callable
from heapq import heappop, heappush
from random import Random
from typing import Any

from backends import ExecutorBackend
from errors import SchedulerError
from graph import Graph
from handles import Outcome, TaskHandle
from measures import Meter
from ready_queue import ReadyQueue
from records import Batch, Job
from residents import Residents
from store import Store
from tasks import (
    CANCELLED,
    COMPLETED,
    FAILED,
    LIVE,
    PENDING,
    QUEUED,
    RETRYING,
    RUNNING,
    TIMED_OUT,
    TaskState,
    check_transition,
)

REASON_CHARACTERS = 500


class Lifecycle:
    """The state of every unfinished task; also what backends report to (see `Reports`)."""

    def __init__(
        self,
        store: Store,
        backends: dict[str, ExecutorBackend],
        post: Callable[[Callable[[], None]], None],
        *,
        max_crashes: int,
        result_ttl: float | None,
        chance: Random,
    ) -> None:
        self.store = store
        self.backends = backends
        self.post = post  # from any thread
        self.max_crashes = max_crashes
        self.result_ttl = result_ttl
        self.chance = chance
        self.now = 0.0  # of this turn
        self.next_seq = 1
        self.residents = Residents(store)
        self.ready = {kind: ReadyQueue() for kind in backends}
        self.graph = Graph()
        self.timers: list[tuple[float, int]] = []
        self.counts: dict[str, int] = {state.value: 0 for state in TaskState}
        self.meter = Meter()
        self.batch = Batch()  # what this turn has decided
        self.over: list[Job] = []  # ended in it
        self.resolved: list[tuple[TaskHandle, Outcome]] = []  # to be told after the commit
        self._watchers: dict[str, list[TaskHandle]] = {}  # by id

    # --- transitions ---

    def _move(self, job: Job, state: str, reason: str | None) -> None:
        before = job.state
        check_transition(job.id, before, state)
        assert before is not None
        self.counts[before] -= 1
        self.counts[state] += 1
        job.state = state
        job.since = self.now
        self.batch.events.append((job.seq, self.now, before, state, reason, None))
        if job.stored is not None:
            self.batch.changed[job.seq] = job

    def enter(self, job: Job, state: str) -> None:
        """A new task is there, pending or queued."""
        if not job.seq:
            job.seq = self.next_seq
            self.next_seq += 1
        job.state = state
        job.created = job.since = job.queued = self.now
        self.residents.add(job)
        self.counts[state] += 1
        self.batch.tasks.append(job)
        self.batch.events.append((job.seq, self.now, None, state, None, None))
        if state == QUEUED:
            self.ready[job.kind].push(job.priority, job.seq)

    def queue(self, job: Job, reason: str | None) -> None:
        """It is ready, at its place by priority and age."""
        self._move(job, QUEUED, reason)
        job.queued = self.now
        job.place = job.parent_data = None
        self.ready[job.kind].push(job.priority, job.seq)

    def run(self, job: Job) -> None:
        """A backend has taken it. It is queued, so this is legal; it happens to every task."""
        job.state = RUNNING
        job.since = self.now
        self.batch.events.append((job.seq, self.now, QUEUED, RUNNING, None, job.place.pid))
        if job.stored is not None:
            self.batch.changed[job.seq] = job

    def _end(
        self,
        job: Job,
        state: str,
        reason: str | None,
        error: dict[str, Any] | None,
        finished: float | None = None,
    ) -> None:
        """A task ends; so do its children unless it completed."""
        job.finished = self.now if finished is None else finished
        job.error = None if error is None else json.dumps(error)
        self._move(job, state, reason)
        self._tell(job)
        if self.graph.has_children(job.seq):
            self.spread(job)

    def spread(self, job: Job) -> None:
        """Children of a task that has ended become ready, or end with it, and theirs too."""
        ended = [job]
        while ended:  # no recursion: a chain may have 100,000 links
            parent = ended.pop()
            children = self.graph.leave(parent.seq)
            if parent.state == COMPLETED:
                free = [seq for seq in children if self.graph.met(seq)]
                self.residents.fetch(free)
                for seq in free:
                    self.queue(self.residents.numbered(seq), None)
                continue
            self.residents.fetch(children)
            for seq in children:
                child = self.residents.numbered(seq)
                self.graph.drop(seq)
                self.fail_child(child, parent.id, str(parent.state), parent.error)
                ended.append(child)

    def fail_child(self, child: Job, parent: str, state: str, error: str | None) -> None:
        """A task ends because a parent did not complete; it never ran."""
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
        child.finished = self.now
        child.error = json.dumps(description)
        self._move(child, end, reason)
        self._tell(child)

    def cannot_run(self, job: Job, error: SchedulerError) -> None:
        """Its parents completed, and their results cannot be passed: it fails when it starts."""
        self._move(job, RUNNING, None)
        description = {"type": type(error).__name__, "message": str(error)}
        self._end(job, FAILED, str(error), description)

    def cancel(self, job: Job) -> bool:
        """End it whatever it does; true exactly when it ends cancelled."""
        if job.state == RUNNING:
            self.backends[job.kind].catch_up(job)  # what has ended before is not cancelled
        if job.state == RUNNING:
            self.backends[job.kind].abandon(job)
        elif job.state == QUEUED:
            self.ready[job.kind].remove(job.seq)
        if job.state in LIVE:
            self.graph.drop(job.seq)
            message = f"Task {job.id!r} was cancelled."
            self._end(job, CANCELLED, "cancelled", {"type": "TaskCancelled", "message": message})
        return job.state == CANCELLED

    def run_again(self, job: Job, handle: TaskHandle) -> bool:
        """A task that has ended becomes a new run; False if it still held its room."""
        unwritten = job in self.over
        if unwritten:  # it goes on from where it is
            self.over.remove(job)
            self.meter.count(1)
        else:
            self.residents.add(job)
        job.handle = handle
        job.run += 1
        job.attempts = job.crashes = 0
        job.error = job.progress = job.started = job.finished = job.run_at = None
        self.batch.dropped_results.append(job.seq)
        self.batch.results.pop(job.seq, None)
        self.queue(job, f"run {job.run + 1}")
        return not unwritten

    def stop(self, job: Job) -> None:
        """The scheduler ends: what runs is for the next one, unless it has ended by now."""
        if job.state == RUNNING:
            self.backends[job.kind].catch_up(job)
        if job.state == RUNNING:
            self.backends[job.kind].abandon(job)
            self.queue(job, "the scheduler was shut down")

    def fire_timers(self) -> None:
        """What waited for its time has it."""
        timers = self.timers
        while timers and timers[0][0] <= self.now:
            _, seq = heappop(timers)
            if self.graph.met(seq):
                job = self.residents.numbered(seq)
                if job.state == PENDING:
                    self.queue(job, None)
                continue
            waiting = self.residents.by_seq.get(seq)
            if (
                waiting is not None
                and waiting.state == RETRYING
                and (waiting.run_at or 0.0) <= self.now
            ):
                self.queue(waiting, None)

    # --- what backends report: see `Reports` ---

    def ended(self, job: Job, ok: bool, started: float, elapsed: float, payload: bytes) -> None:
        """A run of a task is over."""
        job.attempts += 1
        job.started = self.now - (time.monotonic() - started)
        self.meter.waits.append(max(0.0, job.started - job.queued))
        if ok:
            self.batch.results[job.seq] = (payload, self._expiry())
            job.error = None
            job.finished = job.started + elapsed
            self._move(job, COMPLETED, None)
            self._tell(job)
            if self.graph.has_children(job.seq):
                self.spread(job)
            return
        type_name, message, text, travelled = pickle.loads(payload)  # noqa: S301  (of our own worker)
        error = {"type": type_name, "message": message, "traceback": text}
        reason = f"{type_name}: {message}"[:REASON_CHARACTERS]
        if job.retry is not None and job.attempts < job.retry.max_attempts:
            job.run_at = self.now + job.retry.delay(job.attempts, self.chance)
            job.error = json.dumps(error)
            job.place = None
            self._move(job, RETRYING, reason)
            heappush(self.timers, (job.run_at, job.seq))
            return
        if travelled is not None:
            self.batch.results[job.seq] = (travelled, self._expiry())
        self._end(job, FAILED, reason, error, job.started + elapsed)

    def _expiry(self) -> float | None:
        return None if self.result_ttl is None else self.now + self.result_ttl

    def given_back(self, job: Job, reason: str) -> None:
        """It was handed out and has not begun."""
        self.queue(job, reason)

    def crashed(self, job: Job, detail: str) -> None:
        """Its worker died while it ran there."""
        job.crashes += 1
        reason = f"its worker died ({detail})"
        if job.crashes < self.max_crashes:
            self.queue(job, reason)
            return
        message = (
            f"The worker of task {job.id!r} died under it {job.crashes} times, the last time by "
            f"{detail}; it is not run again."
        )
        self._end(job, FAILED, reason, {"type": "WorkerCrashed", "message": message})

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
            self.batch.changed[job.seq] = job
        else:
            self.batch.notes.append((job.seq, self.now, value))

    # --- who waits for an end ---

    def watch(self, handle: TaskHandle) -> None:
        """Resolve this handle, too, when its task ends; UnknownTask if there is none."""
        job = self.residents.by_id.get(handle.id)
        if job is None:
            known = self.store.known([handle.id]).get(handle.id)
            if known is not None and known[1] in LIVE:  # it need not be loaded for that
                self._watchers.setdefault(handle.id, []).append(handle)
                return
            job = self.residents.named(handle.id)
        if job.state in LIVE:
            self._watchers.setdefault(handle.id, []).append(handle)
            return
        fresh = self.batch.results.get(job.seq)
        value = fresh[0] if fresh else self.store.results([job.seq]).get(job.seq)
        self.resolved.append((handle, _outcome(job, value)))

    def unwatch(self, handle: TaskHandle) -> None:
        """Forget a handle where nobody waits any more."""
        if handle.awaited():  # somebody does again
            return
        left = [each for each in self._watchers.pop(handle.id, ()) if each is not handle]
        if left:
            self._watchers[handle.id] = left

    def forgotten(self, job: Job) -> None:
        """It leaves memory; whoever waits for it is remembered by its number."""
        if job.handle is not None and job.handle.forget():
            self._watchers.setdefault(job.id, []).append(job.handle)

    def waiting_handles(self) -> list[TaskHandle]:
        """All whose tasks have not ended."""
        handles = [job.handle for job in self.residents.by_seq.values() if job.handle is not None]
        return handles + [handle for each in self._watchers.values() for handle in each]

    def _tell(self, job: Job) -> None:
        """It has ended: whoever waits is told after the commit."""
        job.place = job.parent_data = job.live = None
        self.over.append(job)
        watchers = self._watchers.pop(job.id, None) if self._watchers else None
        if job.handle is None and watchers is None:
            return
        fresh = self.batch.results.get(job.seq)
        outcome = _outcome(job, fresh[0] if fresh else None)
        if job.handle is not None:
            self.resolved.append((job.handle, outcome))
        if watchers is not None:
            self.resolved += [(handle, outcome) for handle in watchers]


def _outcome(job: Job, value: bytes | None) -> Outcome:
    duration = 0.0
    if job.finished is not None and job.started is not None:
        duration = max(0.0, job.finished - job.started)
    assert job.state is not None
    return Outcome(job.state, value, job.error, job.attempts, duration)
