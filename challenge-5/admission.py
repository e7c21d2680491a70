"""Who is let in: room for so many tasks, one task per id and key, and graphs without loose ends."""

import threading
from collections.abc import Callable, Sequence
from heapq import heappush

from errors import (
    DuplicateTask,
    IdempotencyConflict,
    IllegalTransition,
    SchedulerClosed,
    SchedulerFull,
    StoreUnavailable,
    TaskNotEnded,
    UnknownDependency,
)
from graph import check_acyclic
from handles import TaskHandle
from lifecycle import Lifecycle
from records import Job
from tasks import CANCELLED, COMPLETED, FAILED, PENDING, QUEUED, TERMINAL, TIMED_OUT

HandleOf = Callable[[str, bool], TaskHandle]  # id, was it there before?


class Room:
    """How many tasks may be unfinished at a time; callers wait here, in their own threads."""

    def __init__(self, max_tasks: int) -> None:
        self.max_tasks = max_tasks
        self.taken = 0
        self.closed = False
        self.refusal: str | None = None  # why the store takes nothing now
        self._changed = threading.Condition(threading.Lock())

    def reserve(
        self, number: int, *, may_wait: Callable[[], None] | None, timeout: float | None
    ) -> None:
        """Take room for so many more, or raise SchedulerFull; wait for it if that is allowed."""
        with self._changed:
            self._check_open()
            if self.taken + number > self.max_tasks:
                if may_wait is None or number > self.max_tasks:
                    raise SchedulerFull(self.max_tasks, number)
                may_wait()
                if not self._changed.wait_for(
                    lambda: self.closed or self.taken + number <= self.max_tasks, timeout
                ):
                    raise SchedulerFull(self.max_tasks, number)
                self._check_open()
            self.taken += number

    def _check_open(self) -> None:
        if self.closed:
            raise SchedulerClosed("The scheduler was shut down; it takes no more tasks.")
        if self.refusal is not None:
            raise StoreUnavailable(
                f"Nothing new is accepted: the database refuses writes ({self.refusal})."
            )

    def release(self, number: int) -> None:
        """Give back what was reserved, or what ended tasks had."""
        if number:
            with self._changed:
                self.taken -= number
                self._changed.notify_all()

    def close(self) -> None:
        """Nobody comes in any more; whoever waits is told."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()


class Admission:
    """Takes tasks that have room reserved; whatever is refused gives its room back here."""

    def __init__(self, lifecycle: Lifecycle, room: Room, handle_of: HandleOf) -> None:
        self.lifecycle = lifecycle
        self.residents = lifecycle.residents
        self.store = lifecycle.store
        self.room = room
        self.handle_of = handle_of
        self.keys: dict[str, tuple[str, bytes | None]] = {}  # of tasks not committed yet

    def accept(self, jobs: Sequence[Job]) -> list[TaskHandle]:
        """Take tasks, all or none; one that is known already gives the handle of that one."""
        try:
            handles, fresh, parents = self._judge(jobs)
        except BaseException:
            self.room.release(len(jobs))
            raise
        self.residents.by_id.update(fresh)  # so that each finds its parents, in any order
        for job in fresh.values():
            self.enter(job, parents)
        self.room.release(len(jobs) - len(fresh))
        return handles

    def _judge(
        self, jobs: Sequence[Job]
    ) -> tuple[list[TaskHandle], dict[str, Job], dict[str, tuple[int, str]]]:
        """Handles of all, the new ones by id, and their parents outside; changes nothing."""
        known = self.store.known([job.id for job in jobs])
        fresh: dict[str, Job] = {}
        keys: dict[str, Job] = {}
        handles: list[TaskHandle] = []
        for job in jobs:
            existing = self._same_task(job, known, fresh, keys)
            if existing is not None:
                handles.append(self.handle_of(existing, True))
                continue
            fresh[job.id] = job
            if job.idem_key is not None:
                keys[job.idem_key] = job
            assert job.handle is not None
            handles.append(job.handle)
        return handles, fresh, self._find_parents(fresh)

    def _same_task(
        self,
        job: Job,
        known: dict[str, tuple[int, str, bytes | None]],
        fresh: dict[str, Job],
        keys: dict[str, Job],
    ) -> str | None:
        """The id of the task that was asked for before, or None; raises if it was another."""
        if job.idem_key is not None:
            same = keys.get(job.idem_key)
            kept = (
                (same.id, same.digest)
                if same is not None
                else self.keys.get(job.idem_key) or self.store.with_key(job.idem_key)
            )
            if kept is not None:
                if kept[1] != job.digest:
                    raise IdempotencyConflict(
                        f"The idempotency key was used for another request (task {kept[0]!r})."
                    )
                return kept[0]
        present = fresh.get(job.id) or self.residents.by_id.get(job.id)
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
            if (job := self.residents.by_id.get(parent)) is not None:
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
        for job in fresh.values():  # before any enters: a parent may come after its child
            job.seq = self.lifecycle.next_seq
            self.lifecycle.next_seq += 1
        return found

    def enter(self, job: Job, outside: dict[str, tuple[int, str]]) -> None:
        """A new task becomes pending or queued."""
        lifecycle = self.lifecycle
        if job.idem_key is not None:
            self.keys[job.idem_key] = (job.id, job.digest)
        waits = job.run_at is not None and job.run_at > lifecycle.now
        if not job.parents and not waits:
            lifecycle.enter(job, QUEUED)
            return
        lifecycle.enter(job, PENDING)
        unfinished: list[int] = []
        failed: tuple[str, str] | None = None
        for position, parent in enumerate(job.parents):
            if (present := self.residents.by_id.get(parent)) is not None:  # maybe newer
                parent_seq, state = present.seq, present.state or PENDING
            else:
                parent_seq, state = outside[parent]
            lifecycle.batch.edges.append((job.seq, position, parent_seq))
            if state in (FAILED, TIMED_OUT, CANCELLED):
                failed = failed or (parent, state)
            elif state != COMPLETED:
                unfinished.append(parent_seq)
        if waits:
            assert job.run_at is not None
            heappush(lifecycle.timers, (job.run_at, job.seq))
        if failed is not None:  # long ago
            lifecycle.fail_child(job, *failed, self.residents.named(failed[0]).error)
            lifecycle.spread(job)
        elif unfinished or waits:
            lifecycle.graph.wait(job.seq, unfinished, for_time=waits)
        else:
            lifecycle.queue(job, None)

    def retry(self, task_id: str) -> TaskHandle:
        """Run a task that has ended again, as a new run with a fresh budget."""
        try:
            job = self.residents.named(task_id)
            self._check_can_run_again(job)
        except BaseException:
            self.room.release(1)
            raise
        handle = self.handle_of(task_id, False)
        if not self.lifecycle.run_again(job, handle):
            self.room.release(1)
        return handle

    def _check_can_run_again(self, job: Job) -> None:
        if job.state not in TERMINAL:
            raise TaskNotEnded(
                f"Task {job.id!r} is {job.state}; only a task that has ended can be run again."
            )
        if not job.fn:
            raise IllegalTransition(
                f"Task {job.id!r} cannot run again: its function could not be kept, as it cannot "
                "be pickled."
            )
        states = {parent: kept[1] for parent, kept in self.store.known(job.parents).items()}
        for parent in job.parents:
            present = self.residents.by_id.get(parent)
            state = present.state if present is not None else states.get(parent)
            if state != COMPLETED:
                raise IllegalTransition(
                    f"Task {job.id!r} cannot run again: its parent {parent!r} is "
                    f"{state or 'not kept any more'}. Run the parent again first."
                )
