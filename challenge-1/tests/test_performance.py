"""The load test: `python -m tests.test_performance --events=100000 --workers=8`, in this folder.

Clients in processes of their own send events to a real server in requests of `--batch` events; the
same number of events is sent by 1, 2, 4 … workers, and the table tells what more of them gain.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

FOLDER = Path(__file__).resolve().parent.parent
CONNECTIONS = 4  # of each worker


@dataclass
class Run:
    """What some workers came to."""

    workers: int
    per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    memory_mb: float
    cpu_percent: float
    counted: int


def worker(url: str, number: int, requests: int, batch: int) -> None:
    """One client process: send, then print its latencies as JSON."""
    sys.path.insert(0, str(FOLDER / "benchmarks"))
    from load import event_body, run

    stamp = f"{os.getpid()}-{time.time_ns()}-{number}"

    def body(request: int) -> bytes:
        first = request * batch
        return b"\n".join(event_body(first + n, stamp) for n in range(batch))

    found = asyncio.run(
        run(f"{url}/webhook/batch", body, connections=CONNECTIONS, requests=requests,
            content_type="application/x-ndjson")
    )  # fmt: skip
    print(json.dumps({"statuses": found["statuses"], "latencies": found["latencies"]}))


def measure(server: Any, workers: int, events: int, batch: int) -> Run:
    """Send that many events by that many workers; return when they are aggregated."""
    requests = max(1, events // batch // workers)
    process = psutil.Process(server.process.pid)
    before = server.get("/stats")["applied"]
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            peak[0] = max(peak[0], process.memory_info().rss / 1e6)

    watching = threading.Thread(target=watch)
    watching.start()
    cpu, started = sum(process.cpu_times()[:2]), time.perf_counter()
    clients = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.test_performance", "--worker", server.url, str(number),
             str(requests), str(batch)],
            cwd=FOLDER, stdout=subprocess.PIPE,
        )
        for number in range(workers)
    ]  # fmt: skip
    latencies: list[float] = []
    for client in clients:
        output, _ = client.communicate(timeout=600)
        found = json.loads(output)
        assert set(found["statuses"]) == {"202"}, found["statuses"]
        latencies += found["latencies"]
    took = time.perf_counter() - started
    while server.get("/stats")["backlog_events"]:
        time.sleep(0.02)
    ended.set()
    watching.join()
    latencies.sort()

    def at(share: float) -> float:
        return latencies[min(int(len(latencies) * share), len(latencies) - 1)] * 1000

    sent = requests * workers * batch
    return Run(
        workers, sent / took, at(0.5), at(0.95), at(0.99), peak[0],
        100 * (sum(process.cpu_times()[:2]) - cpu) / took,
        server.get("/stats")["applied"] - before,
    )  # fmt: skip


def report(runs: list[Run], events: int, batch: int) -> str:
    """The runs as a table, and a sentence about what more workers gain."""
    lines = [
        f"{events:,} events in requests of {batch}, {CONNECTIONS} connections per worker, "
        f"{os.cpu_count()} cores",
        "workers  events/s   p50 ms   p95 ms   p99 ms  memory MB  server CPU %",
    ]
    lines += [
        f"{run.workers:7}  {run.per_second:8,.0f}  {run.p50_ms:7.2f}  {run.p95_ms:7.2f}  "
        f"{run.p99_ms:7.2f}  {run.memory_mb:9.0f}  {run.cpu_percent:12.0f}"
        for run in runs
    ]
    best, last = max(runs, key=lambda run: run.per_second), runs[-1]
    gain = best.per_second / runs[0].per_second
    noun = "worker sends" if best.workers == 1 else "workers send"
    verdict = f"{best.workers} {noun} {gain:.2f}x what one sends"
    if last is not best:
        verdict += (
            f"; {last.workers} gain nothing over that, they only wait longer "
            f"(p50 {last.p50_ms / runs[0].p50_ms:.1f}x): one process serves, and its core is busy."
        )
    lines.append(verdict)
    return "\n".join(lines)


def main() -> None:
    """Start a server, and send by more and more workers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--events", type=int, default=100_000, help="sent in each run")
    parser.add_argument("--workers", type=int, default=8, help="the most client processes")
    parser.add_argument("--batch", type=int, default=10, help="events in a request")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        url, number, requests, batch = given.worker
        worker(url, int(number), int(requests), int(batch))
        return
    sys.path.insert(0, str(FOLDER / "tests"))
    from conftest import Server

    steps = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < given.workers] + [given.workers]
    with tempfile.TemporaryDirectory() as scratch:
        server: Any = Server(Path(scratch)).start(LOG_LEVEL="ERROR")
        try:
            measure(server, 1, max(given.events // 20, given.batch), given.batch)
            runs = []
            for workers in steps:
                runs.append(measure(server, workers, given.events, given.batch))
                print(
                    f"... {workers} workers: {runs[-1].per_second:,.0f} events/s", file=sys.stderr
                )
        finally:
            server.close()
    print(report(runs, given.events, given.batch))


@pytest.mark.performance
@pytest.mark.load
def test_everything_that_was_sent_is_counted_and_the_table_says_what_workers_gain(
    server: Any,
) -> None:
    runs = [measure(server, workers, 2_000, 10) for workers in (1, 2)]

    assert [run.counted for run in runs] == [2_000, 2_000]
    assert server.get("/stats")["duplicates"] == 0
    text = report(runs, 2_000, 10)
    assert "events/s" in text
    assert "what one sends" in text


@pytest.mark.performance
@pytest.mark.load
def test_memory_stays_flat_under_a_million_distinct_keys(server: Any) -> None:
    def lines(start: int) -> Any:
        for first in range(start, start + 250_000, 1000):
            yield b"".join(
                b'{"data":{"category":"key-%d","value":1,"quantity":1,"ts":1700000000}}\n' % n
                for n in range(first, first + 1000)
            )

    peak, ended = [0], threading.Event()
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss

    def watch() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    peaks = []
    for start in range(0, 1_000_000, 250_000):
        answer = server.post("/webhook?wait=applied", lines(start), content_type="text/plain")
        assert answer.json()["accepted"] == 250_000
        peaks.append(peak[0])
    ended.set()
    watching.join()

    stats = server.get("/stats")
    assert stats["aggregated"] == stats["received"] == 1_000_000
    (other,) = server.get("/aggregates", group="category:(other)")["items"]
    assert other["values"]["count"] == 900_000
    assert peaks[-1] - before <= 256_000_000
    assert peaks[-1] - peaks[0] <= 32_000_000


if __name__ == "__main__":
    main()
