"""After a restart: what an earlier scheduler has left is taken over, nothing accepted is forgotten.

What was queued, pending or retrying goes on as it was, with the time it still had to wait. What ran
is queued again, its attempts and crashes unchanged: nothing tells who killed the scheduler.
"""

from heapq import heappush

from lifecycle import Lifecycle
from residents import LOADED_TOGETHER
from store import Recovered
from tasks import LIVE, QUEUED, RETRYING, RUNNING


def recover(lifecycle: Lifecycle, recovered: Recovered) -> None:
    """Fill queues, timers and the graph; what changes by it is in the batch."""
    lifecycle.next_seq = recovered.next_seq
    lifecycle.counts.update(recovered.counts)
    by_queue: dict[tuple[str, int], list[int]] = {}
    running: list[int] = []
    retrying: list[int] = []
    edges: dict[int, list[int]] = {}
    for child, parent, state in recovered.edges:
        if state in LIVE:
            edges.setdefault(child, []).append(parent)
    for seq, kind, priority, state, run_at in recovered.live:
        if state == QUEUED:
            by_queue.setdefault((kind, priority), []).append(seq)
        elif state == RUNNING:
            running.append(seq)
        else:
            heappush(lifecycle.timers, (run_at or 0.0, seq))
            if state == RETRYING:
                retrying.append(seq)
            else:  # also without a time: whatever was met meanwhile fires at once
                lifecycle.graph.wait(seq, edges.get(seq, ()), for_time=True)
    for (kind, priority), seqs in by_queue.items():
        lifecycle.ready[kind].extend(priority, seqs)
    lifecycle.residents.fetch(retrying)
    for start in range(0, len(running), LOADED_TOGETHER):
        for job in lifecycle.residents.load(running[start : start + LOADED_TOGETHER]):
            lifecycle.queue(job, "the scheduler was killed")
