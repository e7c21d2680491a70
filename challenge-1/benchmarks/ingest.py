"""Durable ingest beside the obvious in-memory route, and the log beside persist-queue.

    python benchmarks/ingest.py [--smoke] [--json]

References and peers run interleaved in one run; figures are medians of the rounds, ratios those of
the medians. The load generator has one core, the server the other.
"""

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))
sys.path.insert(0, str(FOLDER / "benchmarks"))

from load import event_body, run, webhook_body  # noqa: E402  (found by the lines above)

from spool import FileQueue  # noqa: E402

PRODUCERS = 128


@dataclass
class Goal:
    """A figure, what it is measured against, and whether it is reached."""

    what: str
    figure: str
    goal: str
    met: bool | None  # None: the peer is not installed


class Server:
    """A server in a process of its own, and the most memory it was seen to hold."""

    def __init__(self, app: str, directory: Path, data: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", app, "--app-dir", str(directory), "--port", str(port),
             "--no-access-log", "--log-level", "warning"],
            cwd=data,
            env={**os.environ, "LOG_LEVEL": "WARNING"},
        )  # fmt: skip
        self.peak = 0
        self._ended = threading.Event()
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/healthz").status_code == 200:
                    break
            if time.monotonic() > deadline:
                raise RuntimeError("the server did not start")
            time.sleep(0.05)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        process = psutil.Process(self.process.pid)
        while not self._ended.wait(0.1):
            with contextlib.suppress(psutil.Error):
                self.peak = max(self.peak, process.memory_info().rss)

    def stop(self) -> None:
        self._ended.set()
        self.process.terminate()
        self.process.wait(30)


def load(url: str, path: str, connections: int, requests: int, run_id: str) -> dict[str, Any]:
    body: Callable[[int], bytes] = webhook_body
    if path != "/webhook":
        body = lambda number: event_body(number, run_id)  # noqa: E731
    result: dict[str, Any] = _loop_run(
        run(url + path, body, connections=connections, requests=requests)
    )
    assert set(result["statuses"]) == {"202"}, result
    return result


def _loop_run(coroutine: Any) -> Any:
    try:
        uvloop = importlib.import_module("uvloop")
    except ImportError:
        return asyncio.run(coroutine)
    return uvloop.run(coroutine)


def single_events(ours: Server, peer: Server, rounds: int, requests: int) -> Iterator[Goal]:
    """Rates at 64 connections, then latencies at few."""
    rates: dict[str, list[float]] = {"peer": [], "/webhook": [], "/webhook/ingest": []}
    for number in range(rounds):
        rates["peer"].append(load(peer.url, "/webhook", 64, requests // 2, "")["per_second"])
        for path in ("/webhook", "/webhook/ingest"):
            found = load(ours.url, path, 64, requests, f"r{number}")
            rates[path].append(found["per_second"])
    reference = statistics.median(rates["peer"])
    for path in ("/webhook", "/webhook/ingest"):
        rate = statistics.median(rates[path])
        yield Goal(f"durable single events on {path}", f"{rate:,.0f}/s", ">= 10,000/s",
                   rate >= 10_000)  # fmt: skip
        yield Goal(f"  vs FastAPI + pydantic in memory ({reference:,.0f}/s)",
                   f"{rate / reference:.2f}x", ">= 1.5x", rate / reference >= 1.5)  # fmt: skip
    for connections in (1, 4):
        for path in ("/webhook", "/webhook/ingest"):
            middle = statistics.median(
                load(ours.url, path, connections, requests // 10, f"l{connections}-{n}")["p50_ms"]
                for n in range(rounds)
            )
            yield Goal(f"acknowledgement p50, {connections} connections, {path}",
                       f"{middle:.2f} ms", "< 1 ms", middle < 1)  # fmt: skip


def uploads(ours: Server, peer: Server, rounds: int, events: int) -> Iterator[Goal]:
    """One streamed NDJSON body to us, the same events as one array to the peer."""
    lines = [webhook_body(number) for number in range(events)]
    ndjson, array = b"\n".join(lines), b"[" + b",".join(lines) + b"]"
    rates: dict[str, list[float]] = {"ours": [], "applied": [], "peer": []}
    with httpx2.Client(timeout=300) as client:
        for _ in range(rounds):
            for name, url, body, kind in (
                ("peer", f"{peer.url}/upload", array, "application/json"),
                ("ours", f"{ours.url}/webhook", ndjson, "application/x-ndjson"),
                ("applied", f"{ours.url}/webhook?wait=applied", ndjson, "application/x-ndjson"),
            ):
                drain(client, ours)
                started = time.perf_counter()
                answer = client.post(url, content=pieces(body), headers={"content-type": kind})
                rates[name].append(events / (time.perf_counter() - started))
                assert answer.json()["accepted"] == events, answer.text
    ours_, applied, peer_ = (statistics.median(rates[k]) for k in ("ours", "applied", "peer"))
    yield Goal(f"durable streamed upload vs list[Model] ({peer_:,.0f}/s)",
               f"{ours_:,.0f}/s = {ours_ / peer_:.1f}x", ">= 6x", ours_ / peer_ >= 6)  # fmt: skip
    yield Goal("  the same until it is aggregated", f"{applied:,.0f}/s = {applied / peer_:.1f}x",
               "(no goal)", True)  # fmt: skip


def pieces(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 65_536):
        yield body[start : start + 65_536]


def drain(client: httpx2.Client, ours: Server) -> None:
    while client.get(f"{ours.url}/stats").json()["backlog_bytes"]:
        time.sleep(0.02)


async def append_to_ours(directory: Path, puts: int) -> float:
    queue = FileQueue(directory)

    async def produce() -> None:
        for _ in range(puts // PRODUCERS):
            await queue.submit(1, BODY)

    started = time.perf_counter()
    await asyncio.gather(*(produce() for _ in range(PRODUCERS)))
    took = time.perf_counter() - started
    queue.close()
    return puts / took


BODY = webhook_body(1)


def append_to_persist_queue(module: Any, directory: Path, puts: int) -> float:
    queue = module.SQLiteQueue(str(directory), auto_commit=True, multithreading=True)

    def produce() -> None:
        for _ in range(puts // PRODUCERS):
            queue.put(BODY)

    threads = [threading.Thread(target=produce) for _ in range(PRODUCERS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - started
    queue.close()
    return puts / took


def appends(scratch: Path, rounds: int, puts: int) -> Iterator[Goal]:
    """The log alone, at 128 producers."""
    try:
        module = importlib.import_module("persistqueue")
    except ImportError:
        yield Goal("log appends vs persist-queue (SQLite)", "persist-queue is not installed",
                   ">= 20x", None)  # fmt: skip
        return
    ours, peer = [], []
    for number in range(rounds):
        peer.append(append_to_persist_queue(module, scratch / f"p{number}", puts // 20))
        ours.append(_loop_run(append_to_ours(scratch / f"o{number}", puts)))
    rate, reference = statistics.median(ours), statistics.median(peer)
    times = rate / reference
    yield Goal(f"log appends at {PRODUCERS} producers vs persist-queue SQLite ({reference:,.0f}/s)",
               f"{rate:,.0f}/s = {times:.0f}x", ">= 20x", times >= 20)  # fmt: skip


def measure(*, smoke: bool) -> list[Goal]:
    rounds = 1 if smoke else 3
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        ours = Server("app:app", FOLDER, scratch)
        peer = Server("peer:app", FOLDER / "benchmarks", scratch)
        try:
            goals = [*single_events(ours, peer, rounds, 2_000 if smoke else 40_000)]
            peak_singles = ours.peak
            goals += uploads(ours, peer, rounds, 5_000 if smoke else 400_000)
        finally:
            ours.stop()
            peer.stop()
        goals += appends(scratch, rounds, 12_800 if smoke else 256_000)
    for what, peak in (("single events", peak_singles), ("uploads too", ours.peak)):
        goals.append(Goal(f"server memory at its peak, {what}", f"{peak / 1e6:.0f} MB",
                          "<= 100 MB", peak <= 100e6))  # fmt: skip
    return goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny numbers, which prove nothing")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    started = time.monotonic()
    goals = measure(smoke=arguments.smoke)
    if arguments.json:
        print(json.dumps([asdict(goal) for goal in goals], indent=2))
        return
    width = max(len(goal.what) for goal in goals)
    for goal in goals:
        verdict = {True: "met", False: "MISSED", None: "left out"}[goal.met]
        print(f"{goal.what:<{width}}  {goal.figure:<32}  {goal.goal:<11}  {verdict}")
    print(
        f"\nPython {platform.python_version()}, {os.cpu_count()} cores, "
        f"{time.monotonic() - started:.0f} s{', smoke only' if arguments.smoke else ''}"
    )


if __name__ == "__main__":
    main()
