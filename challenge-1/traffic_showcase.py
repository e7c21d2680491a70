"""What the folder does with services that fail and limit: modes fetch, deliver, resilience."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import structlog

import data_streaming_pipeline_test
from fetch import mock_servers, mock_sources
from fetch_settings import FetchSettings
from fetching import FetchRun
from limiter import RateLimiter, Slot
from resilience import Breaker, Failed, Guard, Limited, State
from utils import Pipeline

FOLDER = Path(__file__).resolve().parent


def say(text: str) -> None:
    """A line of progress."""
    print(f"    {text}", file=sys.stderr, flush=True)


def claim(text: str, figure: Any, passed: bool) -> None:
    """One claim, its figure, and whether it holds."""
    print(json.dumps({"claim": text, "figure": str(figure), "passed": bool(passed)}), flush=True)


# --- fetch ------------------------------------------------------------------------------------


def fetch(*, quick: bool, seed: int) -> None:
    """Three failing APIs, an outage that ends, a source that dies, and the rate at the server."""
    _quiet_logs()
    products, rate, recovery = (12, 20.0, 0.2) if quick else (75, 5.0, 2.0)
    common = ("--products", str(products), "--seed", str(seed))
    with (
        mock_servers("--dead", "corner:8-12", *common) as url,
        mock_servers("--dead", "corner:8", *common) as deadly,
    ):
        summary, partial = asyncio.run(_both(url, deadly, rate, recovery))
        seen = httpx2.get(f"{url}/seen").json()
    figures, corner = summary["summary"], summary["sources"]["corner"]
    missing = figures["requests_missing"]
    claim("products of three schemas, through failures and an outage",
          f"{figures['total']} in {figures['duration_seconds']:.1f} s, {missing} requests missing",
          figures["total"] + missing >= 3 * products and missing <= 1)  # fmt: skip
    claim("the breaker opened in the outage and recovered",
          f"{corner['breaker_openings']} openings, {corner['items']} of {products} products",
          corner["breaker_openings"] >= 1 and corner["items"] >= products - 1)  # fmt: skip
    worst = max(seen[name]["worst_second"] for name in ("atlas", "bazar", "corner"))
    claim("requests in the fullest closed second, as the server saw them",
          f"{worst} of {rate:g} allowed", worst <= rate)  # fmt: skip
    whole = sum(source["complete"] for source in partial["sources"].values())
    claim("with one source dead the result says what is missing",
          f"partial: {partial['partial']}, {partial['summary']['total']} products, "
          f"{whole} sources whole",
          partial["partial"] is True and partial["summary"]["total"] >= 2 * products)  # fmt: skip


async def _both(
    url: str, deadly: str, rate: float, recovery: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    whole, partial = await asyncio.gather(
        _fetch("outage", url, rate, recovery), _fetch("dead", deadly, 50, 0.1)
    )
    return whole, partial


async def _fetch(name: str, url: str, rate: float, recovery: float) -> dict[str, Any]:
    settings = FetchSettings(
        output_dir=Path(name),
        sources=mock_sources(url),
        rate_limit_rps=rate,
        timeout=60,
        breaker_recovery_seconds=recovery,
    )
    run = FetchRun(settings)
    running = asyncio.create_task(run.run())
    states: dict[str, str] = {}
    next_line = 1.0
    while not running.done():
        for each in run.progress():
            if states.get(each["source"], "closed") != each["breaker"]:
                say(f"{run.seconds:5.1f} s  {name}: breaker of {each['source']}: {each['breaker']}")
            states[each["source"]] = each["breaker"]
        if run.seconds >= next_line:
            next_line = run.seconds + 4
            shown = ", ".join(f"{p['source']} {p['items']}" for p in run.progress())
            say(f"{run.seconds:5.1f} s  {name}: products {shown}")
        await asyncio.wait({running}, timeout=0.05)
    return running.result()


# --- resilience -------------------------------------------------------------------------------


def resilience(*, quick: bool, seed: int) -> None:
    """Backoff, breaker and pause, timed on a service that does as it is told."""
    del seed
    _quiet_logs()
    asyncio.run(_resilience(1 if quick else 2, 3 if quick else 4))


async def _resilience(recovery: float, attempts: int) -> None:
    gaps, (opened, probes, after), paused = await asyncio.gather(
        _backoff(attempts), _half_open(recovery), _pause()
    )
    waits = (0.5, 1.0, 2.0)[: attempts - 1]
    shown = ", ".join(f"{gap:.2f}" for gap in gaps)
    say(f"attempts came after {shown} s")
    kept = all(abs(gap - wait) <= 0.1 * wait for gap, wait in zip(gaps, waits, strict=True))
    claim("retries come after 0.5, 1 and 2 s", f"{shown} s", kept)
    claim("the breaker opens at the third failure in a row", f"{opened} calls before it opened",
          opened == 3)  # fmt: skip
    claim("half-open, ten wait and one probe goes out", f"{probes} probe, {after} after it",
          (probes, after) == (1, 10))  # fmt: skip
    claim("a 429 pauses and costs no attempt", f"{paused:.2f} s", 1 <= paused < 1.3)


async def _backoff(attempts: int) -> list[float]:
    times: list[float] = []

    async def fail(slot: Slot) -> None:
        del slot
        times.append(time.monotonic())
        raise Failed("http_500", "It answered 500.")

    with contextlib.suppress(Failed):
        await Guard(RateLimiter(100), Breaker(10), attempts=attempts).call(fail)
    return [later - earlier for earlier, later in pairwise(times)]


async def _half_open(recovery: float) -> tuple[int, int, int]:
    def told(state: State) -> None:
        say(f"breaker: {state}")

    guard = Guard(RateLimiter(1000), Breaker(3, recovery, on_change=told), attempts=1)
    calls = during = 0
    works = False

    async def send(slot: Slot) -> None:
        del slot
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.2)
        if not works:
            raise Failed("http_500", "It answered 500.")

    opened = 0
    while guard.breaker.state is State.CLOSED:
        with contextlib.suppress(Failed):
            await guard.call(send)
        opened = calls
    calls, works = 0, True
    waiting = [asyncio.create_task(guard.call(send)) for _ in range(11)]
    await asyncio.sleep(recovery + 0.1)  # the probe is out, and takes 0.2 s
    during = calls
    await asyncio.gather(*waiting)
    return opened, during, calls - during


async def _pause() -> float:
    answers: list[Exception | None] = [Limited(1), None]
    began = time.monotonic()

    async def send(slot: Slot) -> None:
        del slot
        if (answer := answers.pop(0)) is not None:
            raise answer

    await Guard(RateLimiter(100), Breaker(1), attempts=1).call(send)
    return time.monotonic() - began


# --- deliver ----------------------------------------------------------------------------------


def deliver(*, quick: bool, seed: int) -> None:
    """Three streams to a downstream that admits 10 calls a second and fails 15 % of them."""
    _quiet_logs()
    found = asyncio.run(data_streaming_pipeline_test.scenario(2 if quick else 10, seed))
    metrics = found.metrics
    say(f"{metrics.total_processed} records, {found.rate:.1f}/s, backlog up to "
        f"{metrics.max_backlog_size}, {metrics.rate_limit_hits} times over the limit")  # fmt: skip
    for text, met in found.targets():
        if quick and "5/s" in text:
            continue  # two seconds are too short for the rate to mean anything
        claim(text, "met" if met else "missed", met)
    if not quick:
        _topic(60, 50)


def _topic(windows: int, rate: int) -> None:
    """Windows of the pipeline, posted one by one; ended in the middle, and gone on."""
    asyncio.run(_close_windows(windows))
    with mock_servers("--downstream-rps", str(rate)) as url:
        first = _deliver(url)
        while len(_accepted(url)) < windows // 3:
            time.sleep(0.02)
        first.terminate()
        first.wait(10)
        part = len(_accepted(url))
        _deliver(url, "--until-empty").wait(60)
        accepted = len(_accepted(url))
    say(f"ended by SIGTERM after {part} of {windows} windows; then {accepted}")
    claim("a topic is posted once per window, across SIGTERM", f"{accepted} of {windows}",
          accepted == windows)  # fmt: skip


async def _close_windows(count: int) -> None:
    async with Pipeline(db_path="windows.db", queue_dir="windows.queue") as pipeline:
        await pipeline.start_workers()
        await asyncio.gather(*(
            pipeline.ingest_q.put({"data": {"category": "a", "value": n, "quantity": 1,
                                            "ts": 1_700_000_000 + 10 * n}})
            for n in range(count + 1)
        ))  # fmt: skip


def _deliver(url: str, *options: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, str(FOLDER / "delivery.py"), "--topic", "aggregates", "--quiet",
         "--to", f"{url}/downstream/records", *options],
        env={**os.environ, "DB_PATH": "windows.db", "QUEUE_DIR": "windows.queue"},
    )  # fmt: skip


def _accepted(url: str) -> dict[str, int]:
    found: dict[str, int] = httpx2.get(f"{url}/downstream/accepted").json()
    return found


def _quiet_logs() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))


MODES: dict[str, Callable[..., None]] = {
    "fetch": fetch, "deliver": deliver, "resilience": resilience
}  # fmt: skip
