"""Which tasks are whole in memory: what runs, and what is near. All others are rows of the store.

A number in a queue costs 40 bytes, a whole task two kilobytes: a million tasks may wait.
"""

from collections.abc import Callable, Iterable, Sequence

from errors import UnknownTask
from records import Job
from store import Store
from tasks import LIVE, PENDING, QUEUED

HOT_TASKS = 20_000  # whole in memory; beyond, and beyond so many bytes, only as numbers
HOT_BYTES = 32 * 1024 * 1024
LOADED_TOGETHER = 64


class Residents:
    """Unfinished jobs by number and by id, as far as they are in memory."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.by_seq: dict[int, Job] = {}
        self.by_id: dict[str, Job] = {}
        self._bytes = 0

    def add(self, job: Job) -> None:
        """Keep it whole."""
        self.by_seq[job.seq] = self.by_id[job.id] = job
        self._bytes += len(job.fn) + len(job.args)

    def remove(self, jobs: Iterable[Job]) -> None:
        """They have ended, and that is stored."""
        for job in jobs:
            if self.by_seq.pop(job.seq, None) is not None:
                self._bytes -= len(job.fn) + len(job.args)
            self.by_id.pop(job.id, None)

    def named(self, task_id: str) -> Job:
        """The task of this id, whatever its state; UnknownTask if there is none."""
        present = self.by_id.get(task_id)
        if present is not None:
            return present
        known = self.store.known([task_id]).get(task_id)
        if known is None:
            raise UnknownTask(f"There is no task {task_id!r}.")
        return self.numbered(known[0])

    def numbered(self, seq: int) -> Job:
        """The task of this number, whatever its state."""
        return self.by_seq.get(seq) or self.load([seq])[0]

    def load(self, seqs: Sequence[int]) -> list[Job]:
        """Tasks from the store; unfinished ones stay in memory from now on."""
        jobs = self.store.load(seqs)
        for job in jobs:
            if job.state in LIVE:
                job.queued = job.since
                self.add(job)
        return jobs

    def fetch(self, seqs: Sequence[int]) -> None:
        """Have these in memory, loaded together."""
        missing = [seq for seq in seqs if seq not in self.by_seq]
        for start in range(0, len(missing), LOADED_TOGETHER):
            self.load(missing[start : start + LOADED_TOGETHER])

    def cool(self, jobs: Iterable[Job], forgotten: Callable[[Job], None]) -> None:
        """When memory is full: keep of stored tasks that have to wait only their numbers."""
        if len(self.by_seq) <= HOT_TASKS and self._bytes <= HOT_BYTES:
            return
        for job in jobs:
            if job.state in (QUEUED, PENDING) and job.live is None and job.seq in self.by_seq:
                self.remove([job])
                forgotten(job)
