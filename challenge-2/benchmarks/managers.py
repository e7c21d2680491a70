"""The manager beside its peers: what a resource costs, what parallel start saves, what leaks.

    python benchmarks/managers.py [--smoke] [--json] [--rounds N]

All contestants of a table run in this one process, in turn, every other round backwards. Figures
are medians of the rounds; ratios are medians of the ratios within a round. Managers, groups and
resources are made beforehand: what is timed is entering and leaving. The collector is off while a
round is timed, for everybody.
"""

import argparse
import asyncio
import gc
import importlib
import json
import os
import platform
import random
import sys
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))

from engine import abandoned_tasks  # noqa: E402  (found by the line above)
from utils import ResourceManager  # noqa: E402

Contestant = tuple[Callable[[], Any], Callable[[Any], Awaitable[Any]]]


@dataclass
class Row:
    """A figure, what stands beside it, and whether its goal is met; None: it has none."""

    what: str
    figure: str
    beside: str = ""
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None


@dataclass
class Sizes:
    """How much of everything."""

    rounds: int
    resources: int  # entered per contestant and round
    counts: tuple[int, ...]
    slow_rounds: int
    slow_counts: tuple[int, ...]
    nodes: int
    cycles: int


FULL = Sizes(15, 4000, (10, 100, 1000), 15, (10, 100, 1000), 300, 10_000)
SMOKE = Sizes(3, 400, (100,), 3, (10, 100), 60, 500)


GOALS_FROM = 100  # resources; below that the fixed cost of a manager is a share of each


class Trivial:
    """A resource that costs nothing."""

    __slots__ = ()

    async def __aenter__(self) -> "Trivial":
        return self

    async def __aexit__(self, *details: object) -> None:
        return None


class Slow:
    """A resource that takes its time to come and to go."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def __aenter__(self) -> "Slow":
        await asyncio.sleep(self.seconds)
        return self

    async def __aexit__(self, *details: object) -> None:
        await asyncio.sleep(self.seconds)


# --- contestants ------------------------------------------------------------------------------


async def bare_owner_tasks(resources: list[Any]) -> None:
    """The least that task affinity costs: a task for each, which waits between enter and exit."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    gates: list[asyncio.Future[None]] = []
    left = len(resources)

    async def own(resource: Any) -> None:
        nonlocal left
        await resource.__aenter__()
        gate = loop.create_future()
        gates.append(gate)
        left -= 1
        if not left:
            ready.set_result(None)
        await gate
        await resource.__aexit__(None, None, None)

    tasks = [asyncio.create_task(own(resource)) for resource in resources]
    await ready
    for gate in gates:
        gate.set_result(None)
    await asyncio.wait(tasks)


async def exit_stack(resources: list[Any]) -> None:
    async with AsyncExitStack() as stack:
        for resource in resources:
            await stack.enter_async_context(resource)


async def entered(manager: Any) -> None:
    async with manager:
        pass


def manager_of(count: int, **options: Any) -> ResourceManager:
    manager = ResourceManager(**options)
    for number in range(count):
        manager.add(Trivial(), f"r{number}")
    return manager


def contestants(count: int) -> dict[str, Contestant]:
    def trivial() -> list[Trivial]:
        return [Trivial() for _ in range(count)]

    found: dict[str, Contestant] = {
        "ours": (lambda: manager_of(count), entered),
        "bare owner tasks": (trivial, bare_owner_tasks),
        "ours, no metrics": (lambda: manager_of(count, enable_metrics=False), entered),
        "ours, sequential": (lambda: manager_of(count, sequential=True), entered),
        "AsyncExitStack": (trivial, exit_stack),
    }
    if aiotools := _peer("aiotools"):
        found["aiotools"] = (lambda: aiotools.AsyncContextGroup(trivial()), entered)
    if sys.version_info >= (3, 12) and (anyio_contextgroup := _peer("anyio_contextgroup")):

        async def context_group(resources: list[Any]) -> None:
            async with anyio_contextgroup.create_context_group() as group:
                for resource in resources:
                    await group.enter_async_context(context=resource)

        found["anyio-contextgroup"] = (trivial, context_group)
    return found


def _peer(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def timed(contestant: Contestant, times: int) -> float:
    """Seconds for entering and leaving so many of them, made beforehand."""
    make, run = contestant
    made = [make() for _ in range(times)]

    async def main() -> float:
        began = time.perf_counter()
        for each in made:
            await run(each)
        return time.perf_counter() - began

    gc.collect()
    gc.disable()
    try:
        return asyncio.run(main())
    finally:
        gc.enable()


# --- tables -----------------------------------------------------------------------------------


def per_resource(sizes: Sizes) -> list[Row]:
    rows: list[Row] = []
    ours: dict[int, float] = {}
    for count in sizes.counts:
        every = contestants(count)
        times = max(1, sizes.resources // count)
        samples: dict[str, list[float]] = {name: [] for name in every}
        for number in range(sizes.rounds + 1):
            names = list(every) if number % 2 else list(reversed(every))
            for name in names:
                cost = timed(every[name], times) / times / count * 1e6
                if number:  # the first round warms up
                    samples[name].append(cost)
        ours[count] = median(samples["ours"])
        rows += _ratios(count, samples)
    if len(ours) > 1:
        few, many = sorted(ours)[-2:]
        ratio = ours[many] / ours[few]
        rows.append(
            Row(f"per resource, N={many:,}", _micro(ours[many]), f"N={few} {_micro(ours[few])}",
                ratio, "<= 1.5x", ratio <= 1.5)
        )  # fmt: skip
    return rows


def _ratios(count: int, samples: dict[str, list[float]]) -> list[Row]:
    goals = {
        ("ours", "bare owner tasks"): 1.4,
        ("ours", "aiotools"): 1.0,
        ("ours", "anyio-contextgroup"): 0.5,
        ("ours, sequential", "AsyncExitStack"): 2.5,
        ("ours", "ours, no metrics"): None,
    }
    rows = []
    for (mine, other), goal in goals.items():
        if other not in samples:
            needs = "needs Python 3.12" if other == "anyio-contextgroup" else "not installed"
            rows.append(Row(f"{mine}, N={count:,}", _micro(median(samples[mine])),
                            f"{other}: left out, {needs}"))  # fmt: skip
            continue
        pairs = zip(samples[mine], samples[other], strict=True)
        ratio = median(a / b for a, b in pairs)
        goal = goal if count >= GOALS_FROM else None
        rows.append(
            Row(f"{mine}, N={count:,}", _micro(median(samples[mine])),
                f"{other} {_micro(median(samples[other]))}", ratio,
                "" if goal is None else f"<= {goal:g}x", None if goal is None else ratio <= goal)
        )  # fmt: skip
    return rows


def _micro(value: float) -> str:
    return f"{value:.2f} us"


def fifty_milliseconds(sizes: Sizes) -> list[Row]:
    """The wall time of many resources of 50 ms against that of one, start and stop."""

    async def walls(count: int) -> tuple[float, float]:
        manager = ResourceManager()
        for number in range(count):
            manager.add(Slow(0.05), f"r{number}")
        async with manager:
            pass
        return manager.report.start_s, manager.report.stop_s

    samples: dict[int, list[tuple[float, float]]] = {n: [] for n in (1, *sizes.slow_counts)}
    for _ in range(sizes.slow_rounds):
        for count in samples:
            gc.collect()
            gc.disable()
            samples[count].append(asyncio.run(walls(count)))
            gc.enable()
    rows = []
    for count in sizes.slow_counts:
        goal = {10: 1.03, 100: 1.05, 1000: 1.25}[count]
        for phase, name in enumerate(("start", "stop")):
            wall = median(sample[phase] for sample in samples[count])
            one = median(sample[phase] for sample in samples[1])
            rows.append(
                Row(f"{name} {count:,} x 50 ms", f"{wall * 1000:.1f} ms",
                    f"one: {one * 1000:.1f} ms", wall / one, f"<= {goal:g}x", wall / one <= goal)
            )  # fmt: skip
    return rows


def random_graph(sizes: Sizes, seed: int) -> list[Row]:
    """A random graph against its critical path: no waves, no waiting for the slowest of a level."""
    ratios: dict[str, list[float]] = {"start": [], "stop": []}
    saved = []
    for number in range(sizes.slow_rounds // 3):
        chance = random.Random(seed + number)
        manager = ResourceManager()
        delays: list[float] = []
        longest: list[float] = []  # until it is ready
        needs_of: list[list[int]] = []
        for node in range(sizes.nodes):
            needs = chance.sample(range(node), min(node, chance.randrange(4)))
            delays.append(chance.uniform(0.005, 0.05))
            longest.append(delays[node] + max((longest[need] for need in needs), default=0.0))
            needs_of.append(needs)
            manager.add(Slow(delays[node]), f"n{node}", [f"n{need}" for need in needs])
        gc.collect()
        asyncio.run(_entered_quietly(manager))
        critical = max(longest)  # the same both ways: stop runs the same paths backwards
        report = manager.report
        ratios["start"].append(report.start_s / critical)
        ratios["stop"].append(report.stop_s / critical)
        saved.append(report.sum_s / report.wall_s)
    return [
        Row(f"random graph of {sizes.nodes}, {name}", f"{median(found):.3f}x",
            f"critical path (sum: {median(saved):.0f}x)", median(found), "<= 1.1x",
            median(found) <= 1.1)
        for name, found in ratios.items()
    ]  # fmt: skip


async def _entered_quietly(manager: ResourceManager) -> None:
    async with manager:
        pass


def cycles(sizes: Sizes) -> list[Row]:
    """What so many lives of a manager leave behind."""

    async def main() -> dict[str, Any]:
        process = psutil.Process()

        async def turn(times: int) -> None:
            for _ in range(times):
                manager = manager_of(2)
                manager.add(lambda r0, r1: (r0, r1), "both")
                async with manager:
                    pass

        await turn(100)
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        descriptors = process.num_fds() if hasattr(process, "num_fds") else 0
        threads = threading.active_count()
        await turn(sizes.cycles)
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return {
            "tasks": len(asyncio.all_tasks()) - 1 + len(abandoned_tasks),
            "descriptors": (process.num_fds() if hasattr(process, "num_fds") else 0) - descriptors,
            "threads": threading.active_count() - threads,
            "kB": (after - before) / 1000,
        }

    left = asyncio.run(main())
    flat = left["kB"] <= 50
    return [
        Row(f"left after {sizes.cycles:,} cycles",
            f"{left['tasks']} tasks, {left['descriptors']} descriptors, {left['threads']} threads",
            goal="none", met=not (left["tasks"] or left["descriptors"] or left["threads"])),
        Row(f"memory after {sizes.cycles:,} cycles", f"{left['kB']:+.1f} kB", goal="flat, <= 50 kB",
            met=flat),
    ]  # fmt: skip


def table(rows: list[Row]) -> str:
    verdicts = {True: "met", False: "MISSED", None: ""}
    lines = [
        ("", "figure", "beside it", "ratio", "goal", ""),
        *(
            (row.what, row.figure, row.beside, "" if row.ratio is None else f"{row.ratio:.2f}x",
             row.goal, verdicts[row.met])
            for row in rows
        ),
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--smoke", action="store_true", help="small numbers, in seconds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, help="rounds of the first table")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    sizes = SMOKE if arguments.smoke else FULL
    if arguments.rounds:
        sizes.rounds = arguments.rounds
    rows = [
        *per_resource(sizes), *fifty_milliseconds(sizes), *random_graph(sizes, arguments.seed),
        *cycles(sizes),
    ]  # fmt: skip
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(
            f"Python {platform.python_version()}, {os.cpu_count()} cores, "
            f"medians of {sizes.rounds} rounds{' (smoke: no figures to quote)' * arguments.smoke}"
        )
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
