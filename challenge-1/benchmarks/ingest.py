"""Durable ingest beside the obvious in-memory route, and the log beside persist-queue.

    python benchmarks/ingest.py [--smoke] [--json] [--rounds N] [--data DIRECTORY]

References and peers run interleaved in one run, each round in the reverse order of the one before,
and only once everything acknowledged is applied. Figures are medians of the rounds, ratios those of
the medians. The load generator has one core, the server the other.
"""

import argparse
import asyncio
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import psutil
from appends import (
    PRODUCERS,
    sync_milliseconds,
    to_ours,
    to_persist_queue_in_line,
    to_persist_queue_in_threads,
)
from load import event_body, run, webhook_body
from report import Row, row, table
from servers import FOLDER, Server

ROUTES = ("/webhook", "/webhook/ingest")
FEW = (1, 4)
T = TypeVar("T")
Samples = defaultdict[str, list[float]]


@dataclass
class Sizes:
    """How much of everything."""

    rounds: int
    singles: int  # requests of a round at 64 connections
    acknowledgements: int  # requests of a round at few connections
    uploaded: int  # events of a streamed body
    appends: int
    peer_appends: int
    remembered: int  # event ids, to see what remembering them costs


FULL = Sizes(5, 20_000, 2_000, 400_000, 128_000, 6_400, 1_000_000)
SMOKE = Sizes(1, 400, 100, 2_000, 2_560, 256, 2_000)


def in_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run it in the loop that uvicorn would choose."""
    try:
        uvloop = importlib.import_module("uvloop")
    except ImportError:
        return asyncio.run(coroutine)
    result: T = uvloop.run(coroutine)
    return result


def in_turn(runs: list[Callable[[], None]], number: int) -> None:
    """Run each once, every other round backwards: none always stands behind the same one."""
    for each in runs if number % 2 == 0 else reversed(runs):
        each()


class Bench:
    """Our server, the peer and the bare one, and what has been sent to ours."""

    def __init__(self, stack: ExitStack, scratch: Path, sizes: Sizes) -> None:
        self.sizes = sizes
        self.scratch = scratch
        code = FOLDER / "benchmarks"
        self.ours = stack.enter_context(Server("app:app", FOLDER, scratch / "ours"))
        self.peer = stack.enter_context(Server("peer:app", code, scratch / "peer"))
        self.bare = stack.enter_context(Server("peer:bare", code, scratch / "bare"))
        for server in (self.ours, self.peer, self.bare):
            server.wait_until_up()
        self.sent = 0
        self._runs = count()

    def load(self, server: Server, path: str, connections: int, requests: int) -> dict[str, Any]:
        """One closed-loop run with event ids of its own; every answer has to be 202."""
        stamp = f"run-{next(self._runs)}"
        body: Callable[[int], bytes] = webhook_body
        if path != "/webhook":

            def body(number: int) -> bytes:
                return event_body(number, stamp)

        found = in_loop(run(server.url + path, body, connections=connections, requests=requests))
        if found["statuses"] != {"202": requests}:
            raise RuntimeError(f"{requests} requests to {path} got {found['statuses']}")
        if server is self.ours:
            self.sent += requests
            server.drain()
        return found

    def upload(self, path: str, body: bytes, events: int) -> float:
        """Stream a body to ours; return the seconds until its answer."""
        started = time.perf_counter()
        accepted = self.ours.upload(path, body, "application/x-ndjson")
        took = time.perf_counter() - started
        if accepted != events:
            raise RuntimeError(f"{accepted} of {events} events were accepted")
        self.sent += events
        return took

    def check(self) -> None:
        """Nothing was refused, taken for a duplicate, or not counted."""
        figures = self.ours.stats()
        found = tuple(figures[name] for name in ("accepted", "applied", "rejected", "duplicates"))
        if found != (self.sent, self.sent, 0, 0):
            raise RuntimeError(f"{self.sent} events were sent, counted were {found}")

    def warm_up(self) -> None:
        for path in ROUTES:
            for server in (self.ours, self.peer, self.bare):
                self.load(server, path, 64, max(self.sizes.singles // 10, 64))

    # --- what is measured ---

    def singles(self) -> Iterator[Row]:
        """Rates at 64 connections."""
        rates: Samples = defaultdict(list)

        def rate(name: str, server: Server, path: str) -> Callable[[], None]:
            def measure() -> None:
                found = self.load(server, path, 64, self.sizes.singles)
                rates[f"{name} {path}"].append(found["per_second"])

            return measure

        runs = [
            rate("peer", self.peer, "/webhook"),
            rate("ours", self.ours, "/webhook"),
            rate("bare", self.bare, "/webhook"),
            rate("peer", self.peer, "/webhook/ingest"),
            rate("ours", self.ours, "/webhook/ingest"),
        ]
        for number in range(self.sizes.rounds):
            in_turn(runs, number)
        for path in ROUTES:
            yield row(f"durable events on {path}, 64 connections", "/s", rates[f"ours {path}"],
                      beside="FastAPI + pydantic in memory", references=rates[f"peer {path}"],
                      least=10_000, times=1.5)  # fmt: skip
        yield row("  reference: a bare ASGI route, 64 connections", "/s", rates["bare /webhook"])

    def acknowledgements(self) -> Iterator[Row]:
        """Medians of the time to an answer, at few connections."""
        latencies: Samples = defaultdict(list)

        def latency(name: str, server: Server, path: str, few: int) -> Callable[[], None]:
            def measure() -> None:
                found = self.load(server, path, few, self.sizes.acknowledgements)
                latencies[f"{name} {path} {few}"].append(found["p50_ms"])

            return measure

        def sync() -> None:
            latencies["sync"].append(sync_milliseconds(self.scratch, 200))

        runs = [
            latency(name, server, path, few)
            for few in FEW
            for path in ROUTES
            for name, server in (("peer", self.peer), ("ours", self.ours))
        ]
        for number in range(self.sizes.rounds):
            in_turn([*runs, sync], number)
        for few in FEW:
            for path in ROUTES:
                name = f"{path} {few}"
                connections = "1 connection" if few == 1 else f"{few} connections"
                yield row(f"acknowledgement p50 on {path}, {connections}", "ms",
                          latencies[f"ours {name}"], beside="FastAPI + pydantic in memory",
                          references=latencies[f"peer {name}"], below=1)  # fmt: skip
        yield row("  reference: one append and sync on this disk", "ms", latencies["sync"])

    def uploads(self) -> Iterator[Row]:
        """One streamed NDJSON body to ours, the same events as one array to the peer."""
        events = self.sizes.uploaded
        lines = [webhook_body(number) for number in range(events)]
        ndjson, array = b"\n".join(lines), b"[" + b",".join(lines) + b"]"
        del lines
        rates: Samples = defaultdict(list)

        def ours() -> None:
            started = time.perf_counter()
            rates["ours"].append(events / self.upload("/webhook", ndjson, events))
            self.ours.drain()
            rates["applied"].append(events / (time.perf_counter() - started))

        def peer() -> None:
            started = time.perf_counter()
            if self.peer.upload("/upload", array, "application/json") != events:
                raise RuntimeError("the peer did not accept every event")
            rates["peer"].append(events / (time.perf_counter() - started))

        for number in range(self.sizes.rounds):
            in_turn([peer, ours], number)
        beside = "FastAPI list[Model] in memory"
        yield row(f"durable streamed upload of {len(ndjson) / 1e6:,.0f} MB", "/s", rates["ours"],
                  beside=beside, references=rates["peer"], times=6)  # fmt: skip
        yield row("  the same until it is aggregated", "/s", rates["applied"],
                  beside=beside, references=rates["peer"])  # fmt: skip

    def appends(self) -> Iterator[Row]:
        """The log alone."""
        try:
            module = importlib.import_module("persistqueue")
        except ImportError:
            module = None
        rates: Samples = defaultdict(list)
        directories = count()

        def fresh() -> Path:
            return self.scratch / f"log-{next(directories)}"

        def ours() -> None:
            rates["ours"].append(in_loop(to_ours(fresh(), self.sizes.appends)))

        def threads() -> None:
            found = to_persist_queue_in_threads(module, fresh(), self.sizes.peer_appends)
            rates["in threads"].append(found)

        def line() -> None:
            found = to_persist_queue_in_line(module, fresh(), self.sizes.peer_appends)
            rates["in one loop"].append(found)

        for number in range(self.sizes.rounds):
            in_turn([threads, ours, line] if module else [ours], number)
        what = f"log appends, {PRODUCERS} producers"
        if module is None:
            yield row(what, "/s", rates["ours"], beside="persist-queue is not installed: left out")
            return
        best = max(("in threads", "in one loop"), key=lambda name: median(rates[name]))
        yield row(what, "/s", rates["ours"], beside=f"persist-queue SQLite {best}",
                  references=rates[best], times=20)  # fmt: skip

    def memory(self, what: str) -> Row:
        """The most that our server was seen to hold so far."""
        return row(f"server memory at its peak, {what}", "MB", [self.ours.peak / 1e6],
                   beside="the peer", references=[self.peer.peak / 1e6], at_most=100)  # fmt: skip

    def remember(self) -> Row:
        """Send as many event ids as are kept, then look at the memory again."""
        events, at_once = self.sizes.remembered, 100_000
        for start in range(0, events, at_once):
            lines = [event_body(n, "kept") for n in range(start, min(start + at_once, events))]
            self.upload("/webhook/batch", b"\n".join(lines), len(lines))
        self.ours.drain()
        return self.memory(f"and {events:,} more event ids remembered")


def measure(sizes: Sizes, directory: Path | None) -> list[Row]:
    """Everything, on a disk of one's choice."""
    with tempfile.TemporaryDirectory(dir=directory) as name, ExitStack() as stack:
        bench = Bench(stack, Path(name), sizes)
        bench.warm_up()
        rows = [*bench.singles(), *bench.acknowledgements()]
        memory = [bench.memory("single events")]
        rows += bench.uploads()
        memory.append(bench.memory("and uploads"))
        rows += bench.appends()
        memory.append(bench.remember())
        bench.check()
        return rows + memory


def file_system(directory: Path) -> str:
    """The type of the file system there: in memory a sync would cost nothing."""
    holding = [
        part
        for part in psutil.disk_partitions(all=True)
        if directory.is_relative_to(part.mountpoint)
    ]
    return max(holding, key=lambda part: len(part.mountpoint)).fstype if holding else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny numbers, which prove nothing")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, help="5 unless told")
    parser.add_argument(
        "--data", type=Path, help="write below this directory, not the temporary one"
    )
    arguments = parser.parse_args()
    sizes = SMOKE if arguments.smoke else FULL
    if arguments.rounds is not None:
        sizes.rounds = max(arguments.rounds, 1)
    directory = (arguments.data or Path(tempfile.gettempdir())).resolve()
    started = time.monotonic()
    try:
        rows = measure(sizes, directory)
    except RuntimeError as error:
        sys.exit(f"The run proves nothing: {error}")
    about = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "file_system": file_system(directory),
        "rounds": sizes.rounds,
        "seconds": round(time.monotonic() - started),
        "smoke": arguments.smoke,
    }
    if arguments.json:
        print(json.dumps({**about, "rows": [asdict(each) for each in rows]}, indent=2))
        return
    print(table(rows))
    print(
        f"\nPython {about['python']}, {about['cores']} cores, data on {about['file_system']}, "
        f"{sizes.rounds} rounds, {about['seconds']} s"
        + (", smoke only: these numbers prove nothing" if arguments.smoke else "")
    )


if __name__ == "__main__":
    main()
