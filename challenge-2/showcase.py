"""What this folder can do, as claims with figures: `python showcase.py resources`.

Progress goes to stderr; stdout has one JSON object per claim, for the repository's `demo.py`. Data
is kept in the current directory.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import random
import sys
import time
from typing import Any

from drills import Drill, Part, Synthetic, Tally, catalogue, manager_of, perform, settled
from utils import ResourceManager


def say(text: str) -> None:
    """A line of progress."""
    print(f"    {text}", file=sys.stderr, flush=True)


def claim(text: str, figure: Any, passed: bool) -> None:
    """One claim, its figure, and whether it holds."""
    print(json.dumps({"claim": text, "figure": str(figure), "passed": bool(passed)}), flush=True)


async def parallel(count: int) -> None:
    """Many resources of 50 ms against one after the other."""
    tally = Tally()
    manager = ResourceManager(name="parallel")
    for number in range(count):
        part = Part(f"r{number}", acquire_ms=50, release_ms=50)
        manager.add(Synthetic(part, tally), part.name)
    async with manager:
        pass
    report = manager.report
    say(
        f"{count} x 50 ms: start {report.start_s * 1000:.0f} ms, stop {report.stop_s * 1000:.0f} ms"
    )
    claim(f"{count} resources of 50 ms start and stop together",
          f"{report.wall_s * 1000:.0f} ms instead of {report.sum_s:.1f} s",
          report.wall_s < 0.5)  # fmt: skip


async def drills() -> None:
    """All presets of the catalogue, at the same time."""

    async def run(name: str, drill: Drill) -> tuple[int, str]:
        tally = Tally()
        manager = manager_of(drill, tally)
        surfaced = await perform(drill, manager)
        await settled(manager)
        say(f"{name}: {type(surfaced).__name__ if surfaced else 'nothing'} surfaced")
        return tally.leaked, name

    found = await asyncio.gather(*(run(name, drill) for name, _, drill in catalogue()))
    leaked = sum(count for count, _ in found)
    claim("drills with faults leak nothing", f"{leaked} leaked in {len(found)} drills", leaked == 0)


async def cancelled(times: int, seed: int) -> None:
    """Random graphs, cancelled at random moments."""
    chance = random.Random(seed)
    leaked = acquired = 0
    for _ in range(times):
        parts = tuple(
            Part(f"n{node}",
                 tuple(f"n{need}" for need in chance.sample(range(node), min(node, 2))),
                 chance.uniform(0, 4), chance.uniform(0, 4))
            for node in range(20)
        )  # fmt: skip
        tally = Tally()
        drill = Drill(parts, cancel_after_ms=chance.uniform(0, 60))
        manager = manager_of(drill, tally)
        await perform(drill, manager)
        leaked += tally.leaked
        acquired += sum(tally.acquired.values())
    claim("cancelled at random moments, each is released once",
          f"{acquired} acquired, {leaked} leaked", leaked == 0 and acquired > 0)  # fmt: skip


def without_await() -> None:
    """The documented uses of a plain `with`."""
    with ResourceManager(enable_metrics=True) as rm:
        database, queue = rm.acquire_database(), rm.acquire_rabbitmq()
        database.execute("CREATE TABLE IF NOT EXISTS t (a)")
        with contextlib.suppress(ZeroDivisionError), database.transaction():
            database.execute("INSERT INTO t VALUES (1)")
            _ = 1 / 0
        rows = len(database.fetch("SELECT * FROM t"))
        queue.publish("demo", "durable")
    with ResourceManager() as rm:
        message = next(rm.acquire_rabbitmq().consume("demo", timeout=2))
    claim("a transaction whose body fails is rolled back", f"{rows} rows", rows == 0)
    claim("a message outlives its manager", message.decode(), message == b"durable")
    began = time.monotonic()
    try:
        with ResourceManager() as rm:
            rm.acquire_redis("redis://:secret-word@127.0.0.1:1/0")
        shown = "nothing was raised"
    except ConnectionError as error:
        shown = str(error)
    say(shown)
    claim("a server that is down is a ConnectionError without secrets",
          f"{time.monotonic() - began:.2f} s", ("127.0.0.1:1" in shown and "secret" not in shown)
          or "requirements-services" in shown)  # fmt: skip


def resources(*, quick: bool, seed: int) -> None:
    """Parallel start, faults, cancellation, and the plain `with`."""
    logging.disable(logging.ERROR)  # the faults are on purpose
    asyncio.run(parallel(20 if quick else 100))
    asyncio.run(drills())
    asyncio.run(cancelled(10 if quick else 60, seed))
    without_await()


def main() -> None:
    """Run one mode."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("mode", choices=("resources",))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    resources(quick=arguments.quick, seed=arguments.seed)


if __name__ == "__main__":
    main()
