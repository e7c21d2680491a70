"""The scheduler beside ProcessPoolExecutor and the task queues people use.

    python benchmarks/scheduler.py [--smoke] [--json] [--part NAME]

ProcessPoolExecutor(2) runs before and after ours in every round; a figure is the median of the
rounds, a ratio is the median of the rounds' ratios. All features are on: every transition is an
event row, and committed before it is visible.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

FOLDER = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(FOLDER), str(FOLDER / "benchmarks")]

import peers  # noqa: E402  (found by the line above)
import workload  # noqa: E402
from report import Row, row, table  # noqa: E402

from utils import DistributedScheduler, Task, TaskPriority, TaskScheduler  # noqa: E402

MODES = ("full", "normal", "off")
Samples = defaultdict[str, list[float]]


@dataclass
class Sizes:
    """How much of everything."""

    rounds: int
    tasks: int
    sequential: int
    criticals: int
    cpu: int  # tasks of about 50 ms
    kills: int
    pending: int
    recovered: int
    peer_tasks: int


FULL = Sizes(5, 15_000, 400, 40, 24, 20, 1_000_000, 100_000, 400)
SMOKE = Sizes(1, 600, 30, 4, 4, 2, 5_000, 5_000, 20)


class Bench:
    """One run of everything."""

    def __init__(self, sizes: Sizes, scratch: Path) -> None:
        self.sizes = sizes
        self.scratch = scratch
        self.files = 0

    def scheduler(self, durability: str = "full", **options: Any) -> TaskScheduler:
        self.files += 1
        path = self.scratch / f"tasks-{self.files}.db"
        options.setdefault("max_tasks", 2_000_000)
        options["durability"] = durability
        scheduler = TaskScheduler(2, store=path, **options)
        scheduler.run()
        for handle in [scheduler.submit(workload.noop) for _ in range(500)]:
            handle.result()
        return scheduler

    def throughput(self) -> Iterator[Row]:
        """No-ops: submit all, then take all results; and one after the other."""
        rates: Samples = defaultdict(list)
        ratios: Samples = defaultdict(list)
        waits: Samples = defaultdict(list)
        costs: Samples = defaultdict(list)
        for number in range(self.sizes.rounds):
            before = self._pool(rates, waits, costs)
            ours = {}
            for mode in MODES if number % 2 == 0 else reversed(MODES):
                with self.scheduler(mode) as scheduler:
                    spent = _processor_seconds()
                    ours[mode] = self._burst(scheduler.submit, self.sizes.tasks)
                    spent = _processor_seconds() - spent
                    costs[mode].append(spent / self.sizes.tasks * 1e6)
                    one = self._sequential(scheduler.submit)
                    rates[mode].append(ours[mode])
                    waits[mode].append(one)
            after = self._pool(rates, waits, costs)
            for mode in MODES:
                ratios[mode].append(ours[mode] / median((before, after)))
        for mode, least, stretch in (("full", 1.5, 2.5), ("normal", 2.0, None), ("off", 2.5, None)):
            found = row(f"no-op tasks, durability {mode}", "/s", rates[mode],
                        beside="ProcessPoolExecutor", references=rates["pool"],
                        times=least)  # fmt: skip
            found.ratio = median(ratios[mode])
            found.met = found.ratio >= least
            if stretch:
                found.goal += f" (stretch {stretch}x)"
            yield found
        for mode in MODES:
            yield row(f"  processor time of one, durability {mode}", "µs", costs[mode],
                      beside="ProcessPoolExecutor", references=costs["pool"])  # fmt: skip
        for mode in MODES:
            found = row(f"sequential p50, durability {mode}", "ms", waits[mode],
                        beside="ProcessPoolExecutor", references=waits["pool"])  # fmt: skip
            if mode == "off":
                found.goal = "<= 1.3x"
                found.met = found.ratio is not None and found.ratio <= 1.3
            yield found
        self.full_rate = median(rates["full"])

    def _pool(self, rates: Samples, waits: Samples, costs: Samples) -> float:
        number = self.sizes.tasks // 2
        with peers.process_pool() as pool:
            spent = _processor_seconds()
            rate = self._burst(pool.submit, number)
            costs["pool"].append((_processor_seconds() - spent) / number * 1e6)
            rates["pool"].append(rate)
            waits["pool"].append(self._sequential(pool.submit))
        return rate

    @staticmethod
    def _burst(submit: Callable[..., Any], number: int) -> float:
        began = time.perf_counter()
        for handle in [submit(workload.noop) for _ in range(number)]:
            handle.result()
        return number / (time.perf_counter() - began)

    def _sequential(self, submit: Callable[..., Any]) -> float:
        found = []
        for _ in range(self.sizes.sequential):
            began = time.perf_counter()
            submit(workload.noop).result()
            found.append((time.perf_counter() - began) * 1000)
        return median(found)

    def priority(self) -> Iterator[Row]:
        """Critical no-ops behind a backlog of 10 ms tasks, configured as for the throughput."""
        waits = []
        chance = random.Random(1)
        with self.scheduler() as scheduler:
            low = Task(func=workload.nap, args=(0.01,), priority=TaskPriority.LOW)
            for _ in range(self.sizes.criticals):
                scheduler.submit_many([low] * 10)
                time.sleep(chance.uniform(0.002, 0.02))
                path = self.scratch / "stamp"
                began = time.monotonic()
                scheduler.submit(
                    Task(func=workload.stamp, args=(str(path),), priority=TaskPriority.CRITICAL)
                ).result()
                waits.append((float(path.read_text()) - began) * 1000)
            waiting = scheduler.get_statistics()["states"]["queued"]
            scheduler.shutdown(wait=False)
        waits.sort()
        worst = waits[max(0, round(0.95 * len(waits)) - 1)]
        yield row(f"CRITICAL behind 10 ms LOW ({waiting} waiting), 95th percentile of {len(waits)}",
                  "ms", [worst], at_most=20)  # fmt: skip

    def cpu(self) -> Iterator[Row]:
        """The same CPU work by one process, by the pool and by ours."""
        number, size = self.sizes.cpu, 600_000
        samples: Samples = defaultdict(list)

        def timed(submit: Callable[..., Any]) -> float:
            began = time.perf_counter()
            for handle in [submit(workload.count, size) for _ in range(number)]:
                handle.result()
            return time.perf_counter() - began

        for _ in range(max(1, self.sizes.rounds - 2)):
            began = time.perf_counter()
            for _ in range(number):
                workload.count(size)
            alone = time.perf_counter() - began
            with peers.process_pool() as pool:
                before = timed(pool.submit)
            with self.scheduler() as scheduler:
                ours = timed(scheduler.submit)
            with peers.process_pool() as pool:
                after = timed(pool.submit)
            samples["ours"].append(alone / ours)
            samples["pool"].append(alone / median((before, after)))
        yield row("CPU speed-up with 2 workers", "x", samples["ours"],
                  beside="ProcessPoolExecutor", references=samples["pool"], times=0.95)  # fmt: skip

    def ends(self) -> Iterator[Row]:
        """A CPU loop over its deadline, a cancelled one, and the worker that takes its place."""
        late, cancelled, replaced = [], [], []
        with self.scheduler() as scheduler:
            for _ in range(self.sizes.kills):
                began = time.perf_counter()
                scheduler.submit(Task(func=workload.spin, timeout=0.1)).outcome()
                late.append((time.perf_counter() - began - 0.1) * 1000)
                scheduler.submit(workload.noop).result()
                handle = scheduler.submit(workload.spin)
                while handle.status() != "running":
                    pass
                began = time.perf_counter()
                handle.cancel()
                cancelled.append((time.perf_counter() - began) * 1000)
            for _ in range(self.sizes.kills):
                handle = scheduler.submit(workload.spin)
                while handle.status() != "running":
                    pass
                time.sleep(0.02)  # until the slot shows it
                workers = scheduler.get_statistics()["workers"]
                victim = next(w["pid"] for w in workers if w["task"] == handle.id)
                began = time.perf_counter()
                os.kill(victim, 9)
                while True:
                    workers = scheduler.engine.figures().places
                    alive = [w for w in workers if w.kind == "cpu" and w.state in ("idle", "busy")]
                    if len(alive) == 2 and victim not in {w.pid for w in alive}:
                        break
                replaced.append((time.perf_counter() - began) * 1000)
                handle.cancel()
            scheduler.shutdown(wait=False)
        yield row(
            "CPU loop shown timed out after its deadline, worst", "ms", [max(late)], at_most=100
        )
        yield row("CPU loop shown cancelled, worst", "ms", [max(cancelled)], at_most=100)
        yield row("killed worker replaced, median", "ms", [median(replaced)], at_most=50)

    def scale(self) -> Iterator[Row]:
        """What pending tasks cost in memory, and how soon they are back after a restart."""
        import gc
        import subprocess

        path = self.scratch / "pending.db"
        script = (
            f"import sys; sys.path[:0] = {sys.path[:2]!r}\n"
            "import json, psutil, time, workload\n"
            "from utils import DistributedScheduler, Task\n"
            f"number, path = {self.sizes.pending}, {str(path)!r}\n"
            "scheduler = DistributedScheduler(2, store=path, max_tasks=10**7)\n"
            "scheduler.initialize()\n"
            "before = psutil.Process().memory_info().rss\n"
            "step = min(5_000, number)\n"
            "for _ in range(0, number, step):\n"
            "    scheduler.submit_many([Task(func=workload.noop)] * step)\n"
            "grown = psutil.Process().memory_info().rss - before\n"
            "began = time.perf_counter()\n"
            "scheduler.run()\n"
            "scheduler.submit(Task(func=workload.noop, priority='CRITICAL')).result()\n"
            "first = time.perf_counter() - began\n"
            "scheduler.shutdown(wait=False)\n"
            "print(json.dumps([grown / 1e6, first * 1000]))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=600
        )
        grown, first = json.loads(done.stdout)
        yield row(f"memory of {self.sizes.pending:,} pending tasks", "MB", [grown], at_most=600)
        yield row("  first CRITICAL task among them", "ms", [first], at_most=1000)
        path = self.scratch / "recovery.db"
        scheduler = DistributedScheduler(2, store=path, max_tasks=10**7, durability="off")
        for _ in range(0, self.sizes.recovered, 5_000):
            scheduler.submit_many([Task(func=workload.noop)] * 5_000)
        scheduler.shutdown(wait=False)
        gc.collect()
        took = []
        for _ in range(3):
            began = time.perf_counter()
            scheduler = DistributedScheduler(2, store=path, max_tasks=10**7)
            scheduler.initialize()
            took.append((time.perf_counter() - began) * 1000)
            waiting = scheduler.get_statistics()["states"]["queued"]
            if waiting != self.sizes.recovered:
                raise RuntimeError(f"{waiting} tasks are back")
            scheduler.shutdown(wait=False)
        yield row(f"{self.sizes.recovered:,} pending tasks back after a restart", "ms", took,
                  at_most=1000)  # fmt: skip

    def queues(self) -> Iterator[Row]:
        """Task queues, each with two workers, between two runs of ours with full durability."""
        rates: Samples = defaultdict(list)
        number = self.sizes.peer_tasks
        runs: list[tuple[str, float, Callable[[], float]]] = [
            ("SqliteHuey", 50, lambda: peers.sqlite_huey(number, self.scratch)),
            ("Celery on Redis", 20, lambda: peers.celery(number)),
            ("Dramatiq on Redis", 20, lambda: peers.dramatiq(number)),
            ("RQ on Redis", 20, lambda: peers.rq(number)),
            ("Dask map", 20, lambda: peers.dask_map(number)),
            ("loky", 0, lambda: peers.loky(number * 5)),
        ]
        for name, least, measure in runs:
            ratios: list[float] = []
            for _ in range(min(self.sizes.rounds, 3)):
                with self.scheduler() as scheduler:
                    before = self._burst(scheduler.submit, self.sizes.tasks)
                try:
                    rates[name].append(measure())
                except Exception as error:
                    print(
                        f"{name} could not be measured: {type(error).__name__}: {error}",
                        file=sys.stderr,
                    )
                    break
                with self.scheduler() as scheduler:
                    after = self._burst(scheduler.submit, self.sizes.tasks)
                rates[f"beside {name}"] += [before, after]
                ratios.append(median((before, after)) / rates[name][-1])
            if not ratios:
                continue
            found = row(f"no-op tasks against {name}", "/s", rates[f"beside {name}"], beside=name,
                        references=rates[name], times=least or None)  # fmt: skip
            found.ratio = median(ratios)
            found.met = found.ratio >= least if least else None
            yield found


def _processor_seconds() -> float:
    """Of this process and all its children: what the load of others does not change much."""
    process = psutil.Process()
    times = [process.cpu_times()]
    times += [child.cpu_times() for child in process.children(recursive=True)]
    return sum(each.user + each.system for each in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--smoke", action="store_true", help="small numbers, no meaning")
    parser.add_argument("--json", action="store_true")
    parts = ("throughput", "priority", "cpu", "ends", "scale", "queues")
    parser.add_argument("--part", choices=parts, action="append", help="only these (default: all)")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        bench = Bench(SMOKE if arguments.smoke else FULL, Path(scratch))
        for part in arguments.part or parts:
            for found in getattr(bench, part)():
                rows.append(found)
                if not arguments.json:
                    print(f"  {found.what}: {found.figure:,.2f} {found.unit}", file=sys.stderr)
    if arguments.json:
        print(json.dumps([asdict(each) for each in rows], indent=2))
        return
    print(
        f"CPython {platform.python_version()}, {psutil.cpu_count()} cores, {platform.machine()}\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
