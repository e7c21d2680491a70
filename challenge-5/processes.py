"""Worker processes, fed by expected work instead of by count.

A worker that finishes one task per round trip spends most of its time waiting; one that is given
64 tasks keeps a critical one waiting behind 63 others. So each is handed what it is *expected* to
finish within 5 ms, by the moving mean per task name: hundreds of no-ops, or a single task that
takes 10 ms or is not known yet. When the guess was wrong, what it has not begun is taken back.
"""

import json
import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from math import ceil, inf
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector
from typing import Any

import structlog

from backends import Place, Reports
from launchers import Launcher, launcher
from records import Job
from slots import DONE, GIVEN_BACK, NOTE, RECORD, SETTLE_SECONDS, Record, Slot
from worker import LENGTH, READ_BYTES, WAKE

log = structlog.stdlib.get_logger("scheduler")

BUDGET_SECONDS = 0.005  # of expected work that a worker may have, beyond a single task
MOST_LEASES = 512
WEIGHT = 0.2  # of the newest duration in the mean
KNOWN_NAMES = 10_000
RESPAWN_SECONDS = 0.05  # doubled for each worker in a row that died before it was ready
LONGEST_RESPAWN_SECONDS = 5.0
FRAME_BYTES = 1024 * 1024  # of calls that are sent together; a single one may be larger
OVERHEAD_SECONDS = 8e-6  # of a worker per task


class _Worker:
    """A process and the tasks it was given: the one it runs and a short buffer."""

    def __init__(self, number: int, channel: Any, slot: Slot) -> None:
        self.number = number
        self.channel = channel
        self.slot = slot
        self.pid: int | None = None
        self.ready = False
        self.retiring = False
        self.leases: dict[int, Job | None] = {}  # None: nobody waits for it any more
        self.expected = 0.0
        self.next_index = 1
        self.outgoing: list[Any] = []
        self.outgoing_bytes = 0
        self.unsent = bytearray()
        self.received = bytearray()
        self.settles_at = inf  # when a revoke can be read back
        self.check_at = inf
        self.killed = False  # because it kept running what was abandoned
        self.busy = 0.0
        self.finished = 0

    @property
    def takes_work(self) -> bool:
        return (
            self.ready
            and self.pid is not None  # attempts name it, and it may be told later
            and not self.retiring
            and not self.killed
            and self.settles_at == inf
            and self.channel is not None
        )


class ProcessBackend:
    """Slots in processes that can be killed without hurting anybody else."""

    def __init__(self, number: int, result_limit: int, method: str = "auto") -> None:
        self.number = number
        self.result_limit = result_limit
        self.method = method
        self.workers: dict[int, _Worker] = {}
        self.means: dict[str, float] = {}
        self.busy = 0.0
        self.finished = 0
        self.deaths = 0
        self._next_number = 1
        self._candidates: list[_Worker] = []
        self._share = 1
        self._touched: set[_Worker] = set()
        self._unready_deaths = 0
        self._respawn_at = inf
        self._launcher: Launcher | None = None
        self._closed = False

    # --- contract: see ExecutorBackend ---

    def start(self, reports: Reports, selector: BaseSelector) -> None:
        """Start the launcher and the workers; what fails here fails the start."""
        self.reports = reports
        self.selector = selector
        self._start_launcher()
        for _ in range(self.number):
            self._launch()

    def expects(self, waiting: int) -> None:
        """Sort the workers that take work, so that the idlest is asked first."""
        able = [worker for worker in self.workers.values() if worker.takes_work]
        able.sort(key=lambda worker: worker.expected, reverse=True)
        self._candidates = able
        self._share = max(1, ceil(waiting / len(able))) if able else 1

    def place(self, job: Job) -> bool:
        """To the idlest worker within its budget of expected time and of bytes."""
        mean = self.means.get(job.name)
        size = len(job.args)
        if job.parent_data is not None:
            size += sum(len(data) for _, data in job.parent_data[1])
        candidates = self._candidates
        while candidates:
            worker = candidates[-1]
            leases = worker.leases
            if not leases or (
                mean is not None
                and worker.expected + mean <= BUDGET_SECONDS
                and len(leases) < MOST_LEASES
                and worker.outgoing_bytes + len(worker.unsent) + size <= FRAME_BYTES
            ):
                break
            candidates.pop()
        else:
            return False
        index = worker.next_index
        worker.next_index = index + 1
        leases[index] = job
        job.place = worker
        job.index = index
        # An unknown task fills a worker; the rest of the budget is for what is known.
        job.expect = BUDGET_SECONDS if mean is None else mean
        worker.expected += job.expect
        worker.outgoing.append(
            (index, job.fn, job.args, job.parent_data, job.id, job.attempts + 1, job.run)
        )
        worker.outgoing_bytes += size
        self._touched.add(worker)
        if len(worker.outgoing) >= self._share:
            candidates.pop()
        return True

    def flush(self) -> None:
        """One frame for each worker that was given something."""
        if not self._touched:
            return
        now = time.monotonic()
        for worker in self._touched:
            frame = pickle.dumps(worker.outgoing, 5)
            worker.outgoing.clear()
            worker.outgoing_bytes = 0
            self._send(worker, LENGTH.pack(len(frame)), frame)
            # Nothing can be late or stalled before this; then the slot tells what really runs.
            shortest = min(
                (job.timeout for job in worker.leases.values() if job and job.timeout is not None),
                default=inf,
            ) if len(worker.leases) < 8 else 0.0  # fmt: skip
            ahead = shortest if len(worker.leases) == 1 else min(2 * BUDGET_SECONDS, shortest)
            worker.check_at = min(worker.check_at, now + max(ahead, BUDGET_SECONDS))
        self._touched.clear()

    def catch_up(self, job: Job) -> None:
        """Read what its worker has finished."""
        worker: _Worker = job.place
        self._take_records(worker)

    def abandon(self, job: Job) -> None:
        """Take it back, or kill its worker once it is clear that it runs."""
        worker: _Worker = job.place
        if worker.leases.get(job.index) is not job:
            return
        worker.leases[job.index] = None
        if job.index not in (item[0] for item in worker.outgoing):
            self._revoke(worker)
            return
        worker.outgoing = [item for item in worker.outgoing if item[0] != job.index]
        self._forget(worker, job.index, job)

    def next_check(self) -> float:
        """The nearest moment of any worker, or of the next start."""
        nearest = self._respawn_at
        for worker in self.workers.values():
            nearest = min(nearest, worker.check_at, worker.settles_at)
        return nearest

    def check(self, now: float) -> None:
        """Settle what was revoked, look at who is late, start who is missing."""
        if now >= self._respawn_at:
            self._respawn_at = inf
            self._grow()
        for worker in list(self.workers.values()):
            if now >= worker.settles_at:
                self._settle(worker)
            if now >= worker.check_at:
                self._look(worker, now)

    def scale(self, number: int) -> None:
        """Grow at once; shrink by letting workers run dry."""
        self.number = number
        self._grow()
        self._shrink()

    def slots(self) -> int:
        """The number asked for, whatever drains or starts."""
        return self.number

    def places(self) -> list[Place]:
        """Each worker, with what its slot says it runs."""
        found = []
        now = time.monotonic()
        for worker in self.workers.values():
            index, since = worker.slot.running()
            job = worker.leases.get(index)
            state = (
                "starting" if not worker.ready
                else "draining" if worker.retiring
                else "busy" if worker.leases
                else "idle"
            )  # fmt: skip
            elapsed = max(0.0, now - since) if job is not None else 0.0
            found.append(
                Place(worker.number, "cpu", worker.pid, state, job.id if job else None,
                      worker.busy + elapsed, worker.finished)
            )  # fmt: skip
        return found

    def busy_seconds(self) -> float:
        """Time spent in tasks so far, the running ones included."""
        now, running = time.monotonic(), 0.0
        for worker in list(self.workers.values()):  # other threads may ask, for metrics
            index, since = worker.slot.running()
            if index in worker.leases:
                running += max(0.0, now - since)
        return self.busy + running

    def close(self) -> None:
        """Hang up on all; the launcher ends them."""
        self._closed = True
        for worker in list(self.workers.values()):
            self._hang_up(worker)
        self.workers.clear()
        if self._launcher is not None:
            with suppress(KeyError, ValueError):
                self.selector.unregister(self._launcher.fileno())
            self._launcher.close()
            self._launcher = None

    # --- life and death of workers ---

    def _start_launcher(self) -> None:
        self._launcher = launcher(self.method)
        self.selector.register(self._launcher.fileno(), EVENT_READ, self._on_launcher)

    def _grow(self) -> None:
        staying = [worker for worker in self.workers.values() if not worker.retiring]
        for worker in self.workers.values():
            if (
                len(staying) < self.number
                and worker.retiring
                and worker.channel
                and not worker.killed
            ):
                worker.retiring = False
                staying.append(worker)
        try:
            if self._launcher is None:
                self._start_launcher()
            for _ in range(self.number - len(staying)):
                self._launch()
        except OSError as error:  # no descriptors, memory or processes left: they come back
            log.warning("worker_not_started", error=str(error))
            self._grow_later()

    def _grow_later(self) -> None:
        """Not at once: no storm of starts that fail."""
        self._unready_deaths += 1
        wait = min(RESPAWN_SECONDS * 2 ** min(self._unready_deaths, 10), LONGEST_RESPAWN_SECONDS)
        self._respawn_at = min(self._respawn_at, time.monotonic() + wait)

    def _launch(self) -> None:
        assert self._launcher is not None
        number = self._next_number
        self._next_number += 1
        channel, memory = self._launcher.launch(number, self.result_limit)
        worker = self.workers[number] = _Worker(number, channel, Slot(memory))
        self.selector.register(channel, EVENT_READ, lambda mask: self._on_worker(worker, mask))

    def _shrink(self) -> None:
        staying = [worker for worker in self.workers.values() if not worker.retiring]
        staying.sort(key=lambda worker: (bool(worker.leases), worker.ready, worker.expected))
        for worker in staying[: max(0, len(staying) - self.number)]:
            worker.retiring = True
            if worker.leases:
                self._revoke(worker)
            elif worker.ready:
                self._hang_up(worker)

    def _hang_up(self, worker: _Worker) -> None:
        """Close our end; the worker ends by itself, and its launcher tells."""
        if worker.channel is not None:
            self.selector.unregister(worker.channel)
            worker.channel.close()
            worker.channel = None

    def _on_launcher(self, mask: int) -> None:
        del mask
        assert self._launcher is not None
        messages = self._launcher.messages()
        if messages is None:
            self._launcher_died()
            return
        for message in messages:
            if "born" in message:
                if worker := self.workers.get(message["born"]):
                    worker.pid = message["pid"]
            elif worker := self.workers.get(message["died"]):
                self._died(worker, _ending(message["status"]))

    def _launcher_died(self) -> None:
        """The zygote itself was killed: its workers have died with it."""
        assert self._launcher is not None
        self.selector.unregister(self._launcher.fileno())
        self._launcher.close()
        self._launcher = None
        workers = list(self.workers.values())
        for worker in workers:
            self._bury(worker, "its parent process was killed")
        self._replace(any(worker.ready for worker in workers))

    def _died(self, worker: _Worker, how: str) -> None:
        self._bury(worker, how)
        self._replace(worker.ready)

    def _replace(self, was_ready: bool) -> None:
        """Start others: at once, or later if what died had not got ready."""
        if self._closed:
            return
        if was_ready:
            self._unready_deaths = 0
            self._grow()
        else:
            self._grow_later()

    def _bury(self, worker: _Worker, how: str) -> None:
        """What it was running is to blame for its death; the rest is given back."""
        self._receive(worker)
        self._take_records(worker)
        self._hang_up(worker)
        del self.workers[worker.number]
        self._touched.discard(worker)
        claimed, _ = worker.slot.running()
        for index, job in worker.leases.items():
            if job is None:
                continue
            if index == claimed:
                self.reports.crashed(job, how)
            else:
                self.reports.given_back(job, "worker died")
        worker.leases.clear()
        self.deaths += not worker.retiring

    # --- what they say ---

    def _on_worker(self, worker: _Worker, mask: int) -> None:
        if mask & EVENT_WRITE:
            self._send(worker)
        if mask & EVENT_READ:
            self._receive(worker)
            self._take_records(worker)

    def _receive(self, worker: _Worker) -> None:
        while worker.channel is not None:
            try:
                data = worker.channel.recv(READ_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self._hang_up(worker)
                if self._launcher is not None:
                    self._launcher.hung_up(worker.number)
                break
            if not worker.ready:
                worker.ready = True
                self._unready_deaths = 0
                if worker.retiring:
                    self._hang_up(worker)
                    break
            if data != WAKE:
                worker.received += data
                self._large_records(worker)
            if len(data) < READ_BYTES:
                break

    def _large_records(self, worker: _Worker) -> None:
        received, start = worker.received, 0
        while start < len(received):
            if received[start] == 0:
                start += 1
                continue
            head = start + 1
            if len(received) < head + RECORD.size:
                break
            size, kind, index, began, elapsed = RECORD.unpack_from(received, head)
            end = head + RECORD.size + size
            if len(received) < end:
                break
            payload = bytes(received[head + RECORD.size : end])
            self._record(worker, (kind, index, began, elapsed, payload))
            start = end
        del received[:start]

    def _take_records(self, worker: _Worker) -> None:
        """Hand on what the worker has finished."""
        for record in worker.slot.take():
            self._record(worker, record)

    def _record(self, worker: _Worker, record: Record) -> None:
        kind, index, started, elapsed, payload = record
        if kind == NOTE:
            if job := worker.leases.get(index):
                what, value = _note_of(payload)
                self.reports.note(job, what, value)
            return
        if index not in worker.leases:
            return  # taken back before it was given back
        job = worker.leases[index]
        self._forget(worker, index, job)
        if kind == GIVEN_BACK:
            if job is not None:
                self.reports.given_back(job, "taken back")
        else:
            worker.busy += elapsed
            self.busy += elapsed
            worker.finished += 1
            self.finished += 1
            if job is not None:
                self._learn(job.name, elapsed + OVERHEAD_SECONDS)
                self.reports.ended(job, kind == DONE, started, elapsed, payload)
        if worker.retiring and not worker.leases and worker.settles_at == inf:
            self._hang_up(worker)

    def _learn(self, name: str, seconds: float) -> None:
        means = self.means
        mean = means.get(name)
        if mean is None:
            if len(means) >= KNOWN_NAMES:
                means.clear()
            means[name] = seconds
        else:
            means[name] = mean + (seconds - mean) * WEIGHT

    def _forget(self, worker: _Worker, index: int, job: Job | None) -> None:
        del worker.leases[index]
        if not worker.leases:
            worker.expected = 0.0
            worker.check_at = inf
        elif job is not None:
            worker.expected = max(0.0, worker.expected - job.expect)

    # --- taking back and killing ---

    def _look(self, worker: _Worker, now: float) -> None:
        """Is what it runs over its time, or keeping what is behind it too long?"""
        self._take_records(worker)
        worker.check_at = inf
        if not worker.leases:
            return
        index, started = worker.slot.running()
        job = worker.leases.get(index)
        if job is not None:
            elapsed = now - started
            if job.timeout is not None and elapsed >= job.timeout:
                self.reports.timed_out(job)  # which abandons it
                return
            if job.timeout is not None:
                worker.check_at = started + job.timeout
            if len(worker.leases) > 1 and elapsed > BUDGET_SECONDS:
                self._learn(job.name, elapsed)
                self._revoke(worker)
                return
        if len(worker.leases) > 1 or job is None:
            worker.check_at = min(worker.check_at, now + 2 * BUDGET_SECONDS)

    def _revoke(self, worker: _Worker) -> None:
        """Begin to take back everything that is not claimed."""
        worker.slot.revoke(worker.slot.running()[0] + 1, worker.next_index)
        worker.settles_at = time.monotonic() + SETTLE_SECONDS

    def _settle(self, worker: _Worker) -> None:
        """What is claimed now stays there; the rest is ours again."""
        worker.settles_at = inf
        self._take_records(worker)
        claimed, _ = worker.slot.running()
        for index in [index for index in worker.leases if index > claimed]:
            job = worker.leases[index]
            self._forget(worker, index, job)
            if job is not None:
                self.reports.given_back(job, "taken back")
        if claimed in worker.leases and worker.leases[claimed] is None:
            # Still busy with what nobody waits for, and nothing else can be hurt.
            if not worker.killed and self._launcher is not None:
                worker.killed = True
                self._launcher.kill(worker.number)
        elif worker.leases:
            worker.check_at = min(worker.check_at, time.monotonic() + 2 * BUDGET_SECONDS)
        elif worker.retiring:
            self._hang_up(worker)

    def _send(self, worker: _Worker, *parts: bytes) -> None:
        if worker.channel is None:
            return
        unsent, waited = worker.unsent, bool(worker.unsent)
        data = b"".join(parts)
        try:
            if not waited:
                data = data[worker.channel.send(data) :]
            unsent += data
            if waited:
                del unsent[: worker.channel.send(unsent)]
        except BlockingIOError:
            if not waited:
                unsent += data
        except OSError:
            return  # its death will be told
        if bool(unsent) != waited:
            mask = EVENT_READ | EVENT_WRITE if unsent else EVENT_READ
            self.selector.modify(worker.channel, mask, self._callback(worker))

    def _callback(self, worker: _Worker) -> Callable[[int], None]:
        return lambda mask: self._on_worker(worker, mask)


def _note_of(payload: bytes) -> tuple[str, Any]:
    what, value = json.loads(payload)
    return what, value


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit code {status}"
