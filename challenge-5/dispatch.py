"""From the ready queues to the backends: the most urgent first, as long as there is room."""

from lifecycle import Lifecycle
from ready_queue import ReadyQueue
from records import Job
from residents import LOADED_TOGETHER, Residents
from tasks import QUEUED, RUNNING


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
                missing = _gather(lifecycle, job)
                if missing is not None:
                    queue.pop()
                    lifecycle.expired_parent(job, missing)
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


def _gather(lifecycle: Lifecycle, job: Job) -> str | None:
    """Put the results of the parents beside the call; the parent whose result is gone, or None."""
    residents, store, fresh = lifecycle.residents, lifecycle.store, lifecycle.batch.results
    absent = [parent for parent in job.parents if parent not in residents.by_id]
    kept = store.known(absent) if absent else {}
    numbers = {
        parent: kept[parent][0] if parent in kept else residents.by_id[parent].seq
        for parent in job.parents
    }
    stored = store.results([seq for seq in numbers.values() if seq not in fresh])
    data: list[tuple[str, bytes]] = []
    for parent, seq in numbers.items():
        value = fresh[seq][0] if seq in fresh else stored.get(seq)
        if value is None:
            return parent
        data.append((parent, value))
    job.parent_data = (job.positionally, data)
    return None
