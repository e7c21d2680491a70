"""From the ready queues to the backends: the most urgent first, as long as there is room."""

from errors import ResultExpired, ResultTooLarge, SchedulerError
from lifecycle import Lifecycle
from payloads import INPUT_BYTES
from ready_queue import ReadyQueue
from records import Job
from residents import LOADED_TOGETHER, Residents
from tasks import QUEUED, RUNNING

READ_TOGETHER = 16  # results of parents, so that too many are not all in memory


def dispatch(lifecycle: Lifecycle) -> None:
    """Place what is ready. Nothing is sent before the commit; see `ExecutorBackend.flush`."""
    residents, counts = lifecycle.residents, lifecycle.counts
    for kind, backend in lifecycle.backends.items():
        queue = lifecycle.ready[kind]
        if not len(queue):
            continue
        backend.expects(len(queue))
        dispatched = 0
        while (seq := queue.peek()) is not None:
            job = residents.by_seq.get(seq) or _load_next(residents, queue, seq)
            if job.parents and job.parent_data is None:
                try:
                    job.parent_data = job.positionally, _gather(lifecycle, job)
                except SchedulerError as error:
                    queue.pop()
                    lifecycle.cannot_run(job, error)
                    continue
            if not backend.place(job):
                break
            queue.pop()
            dispatched += 1
            lifecycle.run(job)
        counts[QUEUED] -= dispatched
        counts[RUNNING] += dispatched


def _load_next(residents: Residents, queue: ReadyQueue, seq: int) -> Job:
    residents.fetch([*queue.upcoming(LOADED_TOGETHER - 1), seq])
    return residents.by_seq[seq]


def _gather(lifecycle: Lifecycle, job: Job) -> list[tuple[str, bytes]]:
    """The results of the parents, by id, in order; raises if one is gone or all are too many."""
    residents, store, fresh = lifecycle.residents, lifecycle.store, lifecycle.batch.results
    absent = [parent for parent in job.parents if parent not in residents.by_id]
    kept = store.known(absent) if absent else {}
    numbers = {
        parent: kept[parent][0] if parent in kept else residents.by_id[parent].seq
        for parent in job.parents
    }
    found: list[tuple[str, bytes]] = []
    size = 0
    for start in range(0, len(job.parents), READ_TOGETHER):
        part = job.parents[start : start + READ_TOGETHER]
        wanted = [numbers[parent] for parent in part if numbers[parent] not in fresh]
        stored = store.results(wanted) if wanted else {}
        for parent in part:
            seq = numbers[parent]
            value = fresh[seq][0] if seq in fresh else stored.get(seq)
            if value is None:
                raise ResultExpired(f"The result of the parent {parent!r} is not kept any more.")
            size += len(value)
            if size > INPUT_BYTES:
                raise ResultTooLarge(
                    f"The parents returned more than {INPUT_BYTES:,} bytes together. Write large "
                    "output to files and return their paths."
                )
            found.append((parent, value))
    return found
