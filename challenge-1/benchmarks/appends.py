"""The durable log alone, beside persist-queue's SQLite queue and the disk itself."""

import asyncio
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load import webhook_body

from spool import FDATASYNC, FileQueue

PRODUCERS = 128
PAYLOAD = webhook_body(1)


async def to_ours(directory: Path, puts: int) -> float:
    """Appends per second of tasks that each wait until theirs is durable."""
    queue = FileQueue(directory)
    each = puts // PRODUCERS

    async def produce() -> None:
        for _ in range(each):
            await queue.submit(1, PAYLOAD)

    started = time.perf_counter()
    await asyncio.gather(*(produce() for _ in range(PRODUCERS)))
    took = time.perf_counter() - started
    kept = sum(1 for message in queue.read(0) if message.payload == PAYLOAD)
    queue.close()
    if kept != each * PRODUCERS:
        raise RuntimeError(f"{each * PRODUCERS} messages were appended, {kept} are there")
    return kept / took


def to_persist_queue_in_threads(module: Any, directory: Path, puts: int) -> float:
    """The same of a thread per producer."""
    each = puts // PRODUCERS

    def fill(queue: Any) -> None:
        def produce() -> None:
            for _ in range(each):
                queue.put(PAYLOAD)

        threads = [threading.Thread(target=produce) for _ in range(PRODUCERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return _timed(module, directory, fill, each * PRODUCERS)


def to_persist_queue_in_line(module: Any, directory: Path, puts: int) -> float:
    """The same of one thread that puts for all of them, which spares it every lock contention."""

    def fill(queue: Any) -> None:
        for _ in range(puts):
            queue.put(PAYLOAD)

    return _timed(module, directory, fill, puts)


def _timed(module: Any, directory: Path, fill: Callable[[Any], None], puts: int) -> float:
    queue = module.SQLiteQueue(str(directory), multithreading=True, auto_commit=True)
    try:
        started = time.perf_counter()
        fill(queue)
        took = time.perf_counter() - started
        if queue.qsize() != puts:
            raise RuntimeError(f"{puts} messages were put, {queue.qsize()} are there")
    finally:
        queue.close()
    return puts / took


def sync_milliseconds(directory: Path, times: int) -> float:
    """What one small append costs on this disk until it is durable."""
    found = []
    fd = os.open(directory / "probe", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for _ in range(times):
            started = time.perf_counter()
            os.write(fd, PAYLOAD)
            FDATASYNC(fd)
            found.append(time.perf_counter() - started)
    finally:
        os.close(fd)
    return statistics.median(found) * 1000
