"""A tour of the task scheduler, to be read from top to bottom: `python demo_test.py`."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Any]:
    """Two workers, every state on the disk before anybody sees it."""
    from utils import TaskScheduler

    with TaskScheduler(2, store=tmp_path / "tasks.db") as scheduler:
        yield scheduler


def told(step: str) -> None:
    print(f"  {step}")


def test_a_graph_passes_results_from_parents_to_children(scheduler: Any) -> None:
    from utils import Task

    scheduler.submit_many(
        [
            Task("total", lambda *parts: sum(parts), dependencies=["a", "b"]),
            Task("a", lambda: 40),
            Task("b", lambda: 2),
        ]
    )

    assert scheduler.handle("total").result(10) == 42
    told("a and b ran first, and total got their results: 42")


def test_a_loop_that_never_ends_is_ended(scheduler: Any) -> None:
    from utils import Task

    def for_ever() -> None:
        while True:
            pass

    began = time.monotonic()
    outcome = scheduler.submit(Task(func=for_ever, timeout=0.2)).outcome(10)

    assert outcome.status == "timed_out"
    told(f"a CPU loop with a timeout of 0.2 s was timed out after {time.monotonic() - began:.2f} s")


def test_a_poison_task_stops_and_hurts_nobody(scheduler: Any) -> None:
    import os

    from utils import WorkerCrashed

    neighbours = [scheduler.submit(pow, n, 2) for n in range(100)]
    poison = scheduler.submit(lambda: os._exit(1))

    with pytest.raises(WorkerCrashed) as caught:
        poison.result(20)
    assert [handle.result(10) for handle in neighbours] == [n * n for n in range(100)]
    told(f"100 neighbours finished; the poison: {caught.value}")


def test_work_survives_the_scheduler(tmp_path: Path) -> None:
    from utils import DistributedScheduler

    first = DistributedScheduler(store=tmp_path / "later.db")
    ids = [first.submit_task(pow, (n, 3)) for n in range(10)]  # not run: it stays queued
    first.shutdown(wait=False)
    with DistributedScheduler(store=tmp_path / "later.db") as second:
        found = [second.handle(task_id).result(10) for task_id in ids]

    assert found == [n**3 for n in range(10)]
    told(f"10 tasks were left by one scheduler and run by the next: {found[:4]}…")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-s"]))
