"""A scheduler to be killed: submits for ever, and writes down what was acknowledged.

    crash_child.py DATABASE LEDGER RUNS DURABILITY

The ledger gets `S id` once a submit has returned and `R id value` once a result was seen, each
written before the next step; every run of a task appends its id to RUNS.
"""

import itertools
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import samples  # noqa: E402

from utils import RetryPolicy, Task, TaskScheduler  # noqa: E402


def main() -> None:
    database, ledger_path, runs, durability = sys.argv[1:]
    ledger = os.open(ledger_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    prefix = os.urandom(4).hex()
    options: dict[str, Any] = {"durability": durability, "max_tasks": 100_000}
    scheduler = TaskScheduler(2, store=database, **options).run()
    os.write(ledger, b"U\n")
    for n in itertools.count():
        ids = [f"{prefix}-{n}-{m}" for m in range(6)]
        tasks = [Task(i, samples.append, (runs, i)) for i in ids[:4]]
        tasks.append(Task(ids[4], samples.echo, dependencies=[ids[0]]))
        retry = RetryPolicy(max_attempts=2, base=3600, max_delay=3600, jitter="none")
        tasks.append(Task(ids[5], samples.boom, (ids[5],), retry=retry))
        handles = scheduler.submit_many(tasks)
        os.write(ledger, "".join(f"S {i}\n" for i in ids).encode())
        for handle in handles[:5] if n % 3 == 0 else handles[:1]:
            value = handle.result(60)
            os.write(ledger, f"R {handle.id} {value}\n".encode())


if __name__ == "__main__":
    main()
