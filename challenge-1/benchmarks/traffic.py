"""Pulling at a rate, and delivering to somebody who limits, beside what people write first.

    python benchmarks/traffic.py [--smoke] [--json] [--seconds N]

Pull: 300 single-product requests over three endpoints, beside the floor of 20 s; then the fullest
closed second the server saw while both cores are busy, beside aiolimiter. Deliver: a downstream
that admits 10 calls a second, beside a loop that retries; what was possible is 10/s without the
share that fails.
"""

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import structlog
from aiolimiter import AsyncLimiter
from report import Row, row, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from delivery import StreamProcessor
from fetch import mock_servers
from fetch_settings import FetchSettings, Source
from fetching import FetchRun
from records import ProcessedRecord
from streaming_test_framework import (
    DownstreamAPI,
    DownstreamError,
    RateLimitExceeded,
    data_stream,
)

LIMIT = 10
TAME = ("--failure-rate", "0", "--limited-rate", "0", "--malformed-rate", "0")
ITEMS = {
    "atlas": ("atlas/products", "id", "title"),
    "bazar": ("bazar/items", "sku", "name"),
    "corner": ("corner/items", "productId", "label"),
}
# The ids of all three come from one index, which is corner's: its requests are not the products'.
SATURATED = ("atlas", "bazar")


def singles(url: str) -> list[Source]:
    """The three endpoints, product by product."""
    return [
        Source.model_validate({
            "name": name, "paging": "single", "url": f"{url}/corner/index", "ids": "ids",
            "item_url": f"{url}/{path}/{{id}}", "fields": {"id": key, "name": label},
        })
        for name, (path, key, label) in ITEMS.items()
    ]  # fmt: skip


def pull(products: int) -> tuple[float, int]:
    """Seconds for all the products, and the fullest second the server saw."""
    with tempfile.TemporaryDirectory() as scratch, mock_servers(
        *TAME, "--products", str(products)
    ) as url:  # fmt: skip
        settings = FetchSettings(sources=singles(url), output_dir=Path(scratch), timeout=120)
        began = time.monotonic()
        summary = asyncio.run(FetchRun(settings).run())
        took = time.monotonic() - began
        seen = httpx2.get(f"{url}/seen").json()
    assert summary["summary"]["total"] == 3 * products
    return took, max(seen[name]["worst_second"] for name in SATURATED)


def busy(seconds: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the server saw of each endpoint with all cores busy: of ours, and of aiolimiter."""
    hogs = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 2)
    ]
    try:
        with tempfile.TemporaryDirectory() as scratch, mock_servers(*TAME) as ours, mock_servers(
            *TAME
        ) as theirs:  # fmt: skip
            settings = FetchSettings(
                sources=singles(ours), output_dir=Path(scratch), timeout=seconds
            )

            async def both() -> None:
                await asyncio.gather(FetchRun(settings).run(), with_aiolimiter(theirs, seconds))

            asyncio.run(both())
            of_ours, of_theirs = (httpx2.get(f"{url}/seen").json() for url in (ours, theirs))
            return [of_ours[name] for name in SATURATED], [of_theirs[name] for name in SATURATED]
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


async def with_aiolimiter(url: str, seconds: float) -> None:
    """The form its documentation names for an even flow: one per interval, with 2 % to spare."""
    async with httpx2.AsyncClient(trust_env=False) as client:

        async def source(path: str) -> None:
            limiter = AsyncLimiter(1, 1 / 5 * 1.02)

            async def one(number: int) -> None:
                await client.get(f"{url}/{path}/{number}")

            async with asyncio.TaskGroup() as group:
                for number in range(1, 10_000):
                    await limiter.acquire()
                    group.create_task(one(number))

        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(source(ITEMS[name][0]) for name in SATURATED))


# --- deliver ----------------------------------------------------------------------------------


async def ours(seconds: float, rate: float | None) -> tuple[int, DownstreamAPI]:
    downstream = DownstreamAPI(LIMIT)
    streams = [data_stream(name, per_second=0) for name in ("a", "b", "c")]
    processor = StreamProcessor(streams, downstream, rate_limit=rate)
    metrics = await processor.run(seconds, drain_seconds=0)
    return metrics.total_processed, downstream


async def naive(seconds: float) -> tuple[int, DownstreamAPI]:
    """A pool of workers that try again at once, or after 50 ms when they are refused."""
    downstream = DownstreamAPI(LIMIT)
    records = 0
    numbers = itertools.count()

    async def worker() -> None:
        nonlocal records
        while True:
            number, now = next(numbers), datetime.now(UTC)
            record = ProcessedRecord(
                record_id=f"naive-{number}",
                source="a",
                timestamp=now,
                processed_at=now,
                priority=2,
                processing_time_ms=0.0,
                transformed_data={"value": number},
            )
            while True:
                try:
                    await downstream.send_data(record)
                except RateLimitExceeded:
                    await asyncio.sleep(0.05)
                except DownstreamError:
                    continue
                else:
                    records += 1
                    break

    with suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(worker())
    return records, downstream


def deliver(run: Callable[[], Any], seconds: float) -> dict[str, float]:
    began = time.process_time()
    records, downstream = asyncio.run(run())
    cpu = time.process_time() - began
    possible = LIMIT * seconds * (1 - downstream.failures / max(1, downstream.admitted))
    return {
        "share": 100 * records / possible,
        "cpu_ms": 1000 * cpu / max(1, records),
        "calls": downstream.calls / max(1, records),
    }


def rows(*, products: int, seconds: float, rounds: int) -> list[Row]:
    found: dict[str, list[dict[str, float]]] = {"told": [], "found": [], "naive": []}
    pulled = [pull(products) for _ in range(rounds)]
    under_load = [busy(seconds) for _ in range(rounds)]
    for _ in range(rounds):
        found["told"].append(deliver(lambda: ours(seconds, LIMIT), seconds))
        found["found"].append(deliver(lambda: ours(seconds, None), seconds))
        found["naive"].append(deliver(lambda: naive(seconds), seconds))
    floor = products / 5

    def of(name: str, key: str) -> list[float]:
        return [each[key] for each in found[name]]

    return [
        row(f"{3 * products} single products, 3 endpoints, 5/s", "s", [took for took, _ in pulled],
            beside="floor", references=[floor], at_most=1.15 * floor),
        row("fullest closed second at the server", "requests", [worst for _, worst in pulled],
            at_most=5),
        row("the same with all cores busy", "requests",
            [max(each["worst_second"] for each in ours) for ours, _ in under_load],
            beside="aiolimiter (1, 0.204)",
            references=[max(each["worst_second"] for each in theirs) for _, theirs in under_load],
            at_most=5),
        row("saturated, all cores busy", "requests/s",
            [min(each["per_second"] or 0 for each in ours) for ours, _ in under_load],
            beside="aiolimiter (1, 0.204)",
            references=[min(each["per_second"] or 0 for each in theirs)
                        for _, theirs in under_load],
            least=4.6),
        row("delivered of the possible, limit told", "%", of("told", "share"),
            beside="naive", references=of("naive", "share"), least=95),
        row("delivered of the possible, limit found", "%", of("found", "share"),
            beside="naive", references=of("naive", "share"), least=85),
        row("calls per delivered record, limit found", "calls", of("found", "calls"),
            beside="naive", references=of("naive", "calls")),
        row("CPU per delivered record, limit told", "ms", of("told", "cpu_ms"),
            beside="naive", references=of("naive", "cpu_ms")),
        row("CPU per delivered record, limit found", "ms", of("found", "cpu_ms"),
            beside="naive", references=of("naive", "cpu_ms")),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each delivery")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    products, seconds = (5, 1.0) if options.smoke else (100, options.seconds)
    made = rows(products=products, seconds=seconds, rounds=options.rounds)
    print(json.dumps([asdict(each) for each in made]) if options.json else table(made))


if __name__ == "__main__":
    main()
