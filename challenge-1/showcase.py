"""What this folder can do, as claims with figures: `python showcase.py etl|webhook|…`.

Progress goes to stderr; stdout has one JSON object per claim, for the repository's `demo.py`. Data
is kept in the current directory.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import airportsdata
import httpx2
import psutil

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER / "benchmarks"))

from load import run, webhook_body  # noqa: E402  (found by the line above)

import pipelines_showcase  # noqa: E402
import traffic_showcase  # noqa: E402
from storage import AggregateQuery  # noqa: E402
from utils import Pipeline  # noqa: E402


def say(text: str) -> None:
    """A line of progress."""
    print(f"    {text}", file=sys.stderr, flush=True)


def claim(text: str, figure: Any, passed: bool) -> None:
    """One claim, its figure, and whether it holds."""
    print(json.dumps({"claim": text, "figure": str(figure), "passed": bool(passed)}), flush=True)


# --- etl --------------------------------------------------------------------------------------


def etl(*, quick: bool, seed: int) -> None:
    """This machine's own figures, live, then 28,000 airports, through the pipeline from Python."""
    asyncio.run(_live_figures(2 if quick else 5))
    asyncio.run(_airports(seed, 2_000 if quick else 30_000))


async def _live_figures(seconds: float) -> None:
    put = 0
    async with Pipeline(window_secs=1, db_path="live.db") as pipeline:
        await pipeline.start_workers()
        began = time.time()
        next_line = began + 1
        while time.time() < began + seconds:
            for event in _figures():
                await pipeline.ingest_q.put(event)
                put += 1
            if time.time() >= next_line:
                next_line += 1
                _show_windows(pipeline)
            await asyncio.sleep(0.05)
        await pipeline.stop_workers()
        rows = pipeline.store.aggregates(AggregateQuery(limit=1000))
    counted = sum(row.count for row in rows)
    windows = len({row.window_start for row in rows})
    claim("live figures of this machine are all counted", f"{counted} of {put}", counted == put)
    claim("windows fill while the stream goes on", f"{windows} windows", windows >= seconds)


def _figures() -> Iterator[dict[str, Any]]:
    memory, network = psutil.virtual_memory(), psutil.net_io_counters()
    for name, value in (
        ("cpu percent", psutil.cpu_percent()),
        ("memory MB", memory.used / 1e6),
        ("network kB", (network.bytes_sent + network.bytes_recv) / 1e3 if network else 0.0),
    ):
        yield {"data": {"category": name, "value": value, "quantity": 1, "ts": time.time()}}


def _show_windows(pipeline: Pipeline) -> None:
    rows = pipeline.store.aggregates(AggregateQuery(limit=1000))
    latest = max((row.window_start for row in rows), default=0)
    shown = ", ".join(
        f"{row.group[0]} {row.measures['value'].total / row.count:.1f} ({row.count}x)"
        for row in rows
        if row.window_start == latest
    )
    say(f"{len(rows)} rows; the open window: {shown}")


async def _airports(seed: int, count: int) -> None:
    airports = [a for a in airportsdata.load("ICAO").values() if a["country"]]
    random.Random(seed).shuffle(airports)
    del airports[count:]
    async with Pipeline(window_secs=86_400, db_path="airports.db") as pipeline:
        await pipeline.start_workers()
        started = time.perf_counter()
        for start in range(0, len(airports), 500):
            await asyncio.gather(*(
                pipeline.ingest_q.put({
                    "data": {"category": a["country"], "value": a["elevation"],
                             "quantity": abs(a["lat"]), "ts": "2026-01-01T00:00:00Z"},
                })
                for a in airports[start : start + 500]
            ))  # fmt: skip
        await pipeline.stop_workers()
        took = time.perf_counter() - started
        found = {
            row.group[0]: (row.count, row.measures["value"].total)
            for row in pipeline.store.aggregates(AggregateQuery(limit=1000))
        }
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE airports (country, elevation)")
    rows = [(a["country"], a["elevation"]) for a in airports]
    database.executemany("INSERT INTO airports VALUES (?, ?)", rows)
    expected = {
        country: (count, total)
        for country, count, total in database.execute(
            "SELECT country, count(*), sum(elevation) FROM airports GROUP BY country"
        )
    }
    same = found.keys() == expected.keys() and all(
        found[c][0] == expected[c][0] and math.isclose(found[c][1], expected[c][1], abs_tol=1e-6)
        for c in found
    )
    say(f"{len(airports):,} airports of {len(found)} countries in {took:.1f} s, one put each")
    claim("airports by country equal SQL", f"{len(airports):,} in {len(found)} groups", same)


# --- webhook ----------------------------------------------------------------------------------


class Server:
    """`uvicorn app:app` on a spare loopback port, with its data in the current directory."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> float:
        """Start it; return the seconds until it answered."""
        started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(FOLDER), "--port",
             str(self.port), "--log-level", "warning"],
            env={**os.environ, "LOG_LEVEL": "ERROR"},
        )  # fmt: skip
        while True:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/healthz").status_code == 200:
                    return time.monotonic() - started
            if self.process.poll() is not None or time.monotonic() - started > 30:
                raise RuntimeError("The server did not start.")
            time.sleep(0.02)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)


def webhook(*, quick: bool, seed: int) -> None:
    """The documented requests to a real server, a kill, and the same figures after it."""
    with Server() as server, httpx2.Client(base_url=server.url, timeout=30) as client:
        document = client.get("/openapi.json").json()
        statuses = []
        for path in ("/webhook", "/webhook/ingest", "/webhook/batch"):
            content = document["paths"][path]["post"]["requestBody"]["content"]
            for media_type, described in content.items():
                body = described["example"]
                text = body if isinstance(body, str) else json.dumps(body)
                answer = client.post(path, content=text, headers={"content-type": media_type})
                say(f"POST {path} ({media_type}) -> {answer.status_code} {answer.text[:60]}")
                statuses.append(answer.status_code)
        claim("documented requests are accepted", f"{statuses.count(202)} of {len(statuses)}",
              set(statuses) == {202})  # fmt: skip
        mixed = b'{"data":{"category":"a","value":1,"quantity":1,"ts":1700000000}}\nnonsense\n'
        answer = client.post("/webhook", content=mixed, headers={"content-type": "text/plain"})
        found = answer.json()
        say(f"a good and a bad line -> {found['errors']}")
        claim("a bad line costs its neighbour nothing",
              f"{found['accepted']} accepted, {found['rejected']} rejected",
              (found["accepted"], found["rejected"]) == (1, 1))  # fmt: skip
        _kill_and_count(server, client, seed, 200 if quick else 1000)


def _kill_and_count(server: Server, client: httpx2.Client, seed: int, count: int) -> None:
    chance = random.Random(seed)
    before = client.get("/stats").json()["accepted"]
    bodies = [
        json.dumps({"event_id": f"{seed}-{n}", "source": "demo", "event_type": "kill",
                    "data": {"x": chance.randrange(100)}})
        for n in range(count)
    ]  # fmt: skip
    kind = {"content-type": "application/json"}
    acknowledged = 0
    kill_at = count // 2
    for number, body in enumerate(bodies):
        acknowledged += client.post("/webhook/ingest", content=body, headers=kind).json()[
            "accepted"
        ]
        if number == kill_at:
            server.process.kill()
            server.process.wait()
            back = server.start()
            say(f"killed with SIGKILL after {number + 1} events; back in {back:.2f} s")
    again = [client.post("/webhook/ingest", content=b, headers=kind).json() for b in bodies[:50]]
    client.post("/webhook/ingest?wait=applied", content=bodies[0], headers=kind)
    stats = client.get("/stats").json()
    counted = stats["applied"] - before
    claim("after kill -9 every acknowledged event counts once", f"{counted} of {acknowledged}",
          counted == acknowledged == count)  # fmt: skip
    claim("back unaided", f"{back:.2f} s", back < 3)
    duplicates = sum(answer["duplicates"] for answer in again)
    claim("repeated events are duplicates, across the restart", f"{duplicates} of 50",
          duplicates == 50)  # fmt: skip
    reconciled = stats["received"] == sum(
        stats[name] for name in ("accepted", "rejected", "duplicates")
    )
    claim("received = accepted + rejected + duplicates", stats["received"], reconciled)


# --- performance ------------------------------------------------------------------------------


def performance(*, quick: bool, seed: int) -> None:
    """100,000 generated events: throughput, acknowledgement percentiles and memory."""
    events, size = (10_000 if quick else 100_000), 10
    with Server() as server:
        offset = seed * 1000

        def batch(number: int) -> bytes:
            return b"\n".join(webhook_body(offset + number * size + n) for n in range(size))

        process = psutil.Process(server.process.pid)
        found = asyncio.run(
            run(f"{server.url}/webhook", batch, connections=16,
                requests=events // size, content_type="application/x-ndjson")
        )  # fmt: skip
        rate = found["per_second"] * size
        say(f"{events:,} events in requests of {size}, 16 connections: {rate:,.0f} events/s")
        few = asyncio.run(
            run(f"{server.url}/webhook", webhook_body, connections=4,
                requests=500 if quick else 4000)
        )  # fmt: skip
        say(f"single events, 4 connections: p50 {few['p50_ms']:.2f}, p99 {few['p99_ms']:.2f} ms")
        with httpx2.Client(base_url=server.url, timeout=30) as client:
            while (stats := client.get("/stats").json())["backlog_events"]:
                time.sleep(0.05)
        memory = process.memory_info().rss / 1e6
    total = events + (500 if quick else 4000)
    claim("generated events are durable and counted", f"{stats['applied']:,} of {total:,}",
          stats["applied"] == total and set(found["statuses"]) == {"202"})  # fmt: skip
    claim("throughput, durable, in requests of ten", f"{rate:,.0f} events/s", rate > 10_000)
    claim("acknowledgement at 16 connections", f"p50 {found['p50_ms']:.2f} ms, "
          f"p99 {found['p99_ms']:.2f} ms", found["p50_ms"] < 50)  # fmt: skip
    claim("acknowledgement at 4 connections", f"p50 {few['p50_ms']:.2f} ms, "
          f"p99 {few['p99_ms']:.2f} ms", few["p50_ms"] < 50)  # fmt: skip
    claim("server memory afterwards", f"{memory:.0f} MB", memory <= 150)


def pipelines(*, quick: bool, seed: int) -> None:
    """Pipelines as data: windows of every kind, a replay, a bound on groups."""
    pipelines_showcase.pipelines(say, claim, quick=quick, seed=seed)


def queue(*, quick: bool, seed: int) -> None:
    """The message queue: topics with named consumers, from Python alone."""
    pipelines_showcase.queue(say, claim, quick=quick, seed=seed)


def main() -> None:
    """Run one mode."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    own = ("etl", "webhook", "performance", "pipelines", "queue")
    parser.add_argument("mode", choices=(*own, *traffic_showcase.MODES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    modes: dict[str, Callable[..., None]] = {
        "etl": etl, "webhook": webhook, "performance": performance,
        "pipelines": pipelines, "queue": queue, **traffic_showcase.MODES,
    }  # fmt: skip
    modes[arguments.mode](quick=arguments.quick, seed=arguments.seed)


if __name__ == "__main__":
    main()
