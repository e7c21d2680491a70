"""Chains beside the loop one would have written, and beside the libraries people use.

    python benchmarks/chains.py [--smoke] [--json] [--rounds N] [--elements N]

Contenders of a case run interleaved in one process, the garbage collector off, each round in the
reverse order of the one before. Figures are medians of the thread's own time (of the wall's clock
where PostgreSQL works), ratios those of the medians. A ratio below 1.00 means less time than the
loop by hand.
"""

import argparse
import gc
import importlib
import itertools
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))

from utils import DatabaseLazyCollection, LazyCollection, col, it  # noqa: E402

Contender = Callable[[], Any]
POSTGRES = "postgresql://postgres@127.0.0.1:5432/test"


@dataclass
class Case:
    """Contenders for one result; the first by hand, goals as ratios to it or to the best peer."""

    name: str
    hand: Contender
    ours: dict[str, Contender]
    peers: dict[str, Contender] = field(default_factory=dict)
    to_hand: float | None = None
    to_peer: float | None = None
    clock: Callable[[], float] = time.thread_time  # a server's time is nobody's but the wall's


@dataclass
class Result:
    """Seconds per contender, and whether the goals are met."""

    case: str
    seconds: dict[str, float]
    ratios: dict[str, float]
    goal: str
    met: bool | None


def peer(name: str) -> Any:
    """A peer's module, or None with a line on stderr."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed: pip install -r requirements-dev.txt", file=sys.stderr)
        return None


def chains(numbers: list[int], records: list[dict[str, Any]]) -> list[Case]:
    """The chains of the issue."""
    return [integers(numbers), with_take(numbers), dicts(records), called(numbers),
            flattened(numbers), batches(numbers), distinct(numbers)]  # fmt: skip


def even(n: int) -> bool:
    return n % 2 == 0


def treble(n: int) -> int:
    return n * 3


def no_five(n: int) -> bool:
    return n % 5 != 0


def integers(numbers: list[int]) -> Case:
    def hand() -> list[int]:
        out = []
        for n in numbers:
            if n % 2 == 0:
                m = n * 3
                if m % 5 != 0:
                    out.append(m)
        return out

    steps = (lambda n: n % 2 == 0), (lambda n: n * 3), (lambda n: n % 5 != 0)
    return Case(
        "ints: filter, map, filter, to list", hand,
        {
            "lambdas": lambda: LazyCollection(numbers).filter(lambda n: n % 2 == 0)
            .map(lambda n: n * 3).filter(lambda n: n % 5 != 0).collect(),
            "expressions": lambda: LazyCollection(numbers).filter(it % 2 == 0).map(it * 3)
            .filter(it % 5 != 0).collect(),
        },
        peers(numbers, [("filter", steps[0]), ("map", steps[1]), ("filter", steps[2])]),
        to_hand=1.15, to_peer=0.70,
    )  # fmt: skip


def with_take(numbers: list[int]) -> Case:
    size = len(numbers) // 4

    def hand() -> list[int]:
        out: list[int] = []
        left = size
        for n in numbers:
            if n % 2 == 0:
                m = n * 3
                if m % 5 != 0:
                    out.append(m)
                    left -= 1
                    if not left:
                        break
        return out

    steps = (lambda n: n % 2 == 0), (lambda n: n * 3), (lambda n: n % 5 != 0)
    return Case(
        "ints, with take(N/4)", hand,
        {
            "lambdas": lambda: LazyCollection(numbers).filter(lambda n: n % 2 == 0)
            .map(lambda n: n * 3).filter(lambda n: n % 5 != 0).take(size).collect(),
            "expressions": lambda: LazyCollection(numbers).filter(it % 2 == 0).map(it * 3)
            .filter(it % 5 != 0).take(size).collect(),
        },
        peers(numbers, [("filter", steps[0]), ("map", steps[1]), ("filter", steps[2]),
                        ("take", size)]),
        to_hand=1.15, to_peer=0.70,
    )  # fmt: skip


def dicts(records: list[dict[str, Any]]) -> Case:
    def hand() -> list[int]:
        out = []
        for record in records:
            if record["status"] == "paid":
                amount = record["amount"]
                if amount > 50:
                    out.append(amount)
        return out

    steps = (lambda r: r["status"] == "paid"), (lambda r: r["amount"]), (lambda a: a > 50)
    return Case(
        "dict records: filter, project, filter", hand,
        {
            "lambdas": lambda: LazyCollection(records).filter(lambda r: r["status"] == "paid")
            .map(lambda r: r["amount"]).filter(lambda a: a > 50).collect(),
            "expressions": lambda: LazyCollection(records).filter(col("status") == "paid")
            .map(col("amount")).filter(it > 50).collect(),
        },
        peers(records, [("filter", steps[0]), ("map", steps[1]), ("filter", steps[2])]),
        to_hand=1.15, to_peer=0.70,
    )  # fmt: skip


def called(numbers: list[int]) -> Case:
    """Functions that cannot be written into the loop: they call something themselves."""

    def keeps(n: int) -> bool:
        return abs(n) % 2 == 0

    def changes(n: int) -> int:
        return abs(n) * 3

    def hand() -> list[int]:
        out = []
        for n in numbers:
            if keeps(n):
                m = changes(n)
                if keeps(m):
                    out.append(m)
        return out

    return Case(
        "functions that must be called", hand,
        {"chain": lambda: LazyCollection(numbers).filter(keeps).map(changes).filter(keeps)
         .collect()},
        peers(numbers, [("filter", keeps), ("map", changes), ("filter", keeps)]),
        to_hand=1.15,
    )  # fmt: skip


def flattened(numbers: list[int]) -> Case:
    def hand() -> list[int]:
        out = []
        for n in numbers:
            for m in (n, n + 1):
                out.append(m)  # noqa: PERF402
        return out

    def pair(n: int) -> tuple[int, int]:
        return (n, n + 1)

    return Case(
        "flat_map to pairs", hand,
        {"chain": lambda: LazyCollection(numbers).flat_map(lambda n: (n, n + 1)).collect()},
        {"itertools": lambda: list(itertools.chain.from_iterable(map(pair, numbers))),
         **others(numbers, "flat_map", pair)},
        to_hand=1.2,
    )  # fmt: skip


def batches(numbers: list[int]) -> Case:
    def hand() -> list[list[int]]:
        out: list[list[int]] = []
        held: list[int] = []
        for n in numbers:
            held.append(n)
            if len(held) == 100:
                out.append(held)
                held = []
        if held:
            out.append(held)
        return out

    made: dict[str, Contender] = {}
    if more := peer("more_itertools"):
        made["more-itertools"] = lambda: list(more.chunked(numbers, 100))
    if toolz := peer("toolz"):
        made["toolz"] = lambda: [list(part) for part in toolz.partition_all(100, numbers)]
    return Case(
        "batch(100)", hand, {"chain": lambda: LazyCollection(numbers).batch(100).collect()},
        {**made, **others(numbers, "batch", 100)}, to_hand=0.7,
    )  # fmt: skip


def distinct(numbers: list[int]) -> Case:
    def hand() -> list[int]:
        seen: set[int] = set()
        add, out = seen.add, []
        for n in numbers:
            key = n % 1000
            if key not in seen:
                add(key)
                out.append(n)
        return out

    made: dict[str, Contender] = {}
    if more := peer("more_itertools"):
        made["more-itertools"] = lambda: list(more.unique_everseen(numbers, lambda n: n % 1000))
    if toolz := peer("toolz"):
        made["toolz"] = lambda: list(toolz.unique(numbers, key=lambda n: n % 1000))
    return Case(
        "distinct by a key", hand,
        {"chain": lambda: LazyCollection(numbers).distinct(lambda n: n % 1000).collect()},
        made, to_hand=1.1,
    )  # fmt: skip


def peers(source: list[Any], steps: list[tuple[str, Any]]) -> dict[str, Contender]:
    """The same chain of filter, map and take in every peer."""

    def with_itertools() -> list[Any]:
        result: Any = source
        for name, argument in steps:
            if name == "take":
                result = itertools.islice(result, argument)
            else:
                result = (filter if name == "filter" else map)(argument, result)
        return list(result)

    made: dict[str, Contender] = {"itertools": with_itertools}
    if toolz := peer("toolz"):
        curried = importlib.import_module("toolz.curried")
        stages = [getattr(curried, name)(argument) for name, argument in steps]
        made["toolz"] = lambda: list(toolz.pipe(source, *stages))
    if functional := peer("functional"):
        made["PyFunctional"] = lambda: chained(functional.seq(source), steps).to_list()
    if streamable := peer("streamable"):
        made["streamable"] = lambda: list(chained(streamable.stream(source), steps))
    return made


def chained(start: Any, steps: list[tuple[str, Any]]) -> Any:
    for name, argument in steps:
        start = getattr(start, name)(argument)
    return start


def others(source: list[Any], what: str, argument: Any) -> dict[str, Contender]:
    made: dict[str, Contender] = {}
    if functional := peer("functional"):
        name = {"flat_map": "flat_map", "batch": "grouped"}[what]
        made["PyFunctional"] = lambda: getattr(functional.seq(source), name)(argument).to_list()
    if streamable := peer("streamable"):
        if what == "flat_map":
            made["streamable"] = lambda: list(streamable.stream(source).map(argument).flatten())
        else:
            made["streamable"] = lambda: list(streamable.stream(source).group(argument))
    return made


# --- running ----------------------------------------------------------------------------------


def run(case: Case, rounds: int) -> Result:
    """Interleaved rounds; every contender must give what the loop by hand gives."""
    contenders = {"hand": case.hand, **{f"our {k}": v for k, v in case.ours.items()}, **case.peers}
    expected = normal(case.hand())
    for name, contender in list(contenders.items()):
        if normal(contender()) != expected:
            raise SystemExit(f"{case.name}: {name} gives another result than the loop by hand")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    order = list(contenders.items())
    for _ in range(rounds):
        for name, contender in order:
            started = case.clock()
            contender()
            seconds[name].append(case.clock() - started)
        order.reverse()
    gc.enable()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: value / medians["hand"] for name, value in medians.items()}
    worst = max(ratios[f"our {name}"] for name in case.ours)
    best_peer = min((ratios[name] for name in case.peers), default=None)
    goals, kept = [], []
    if case.to_hand is not None:
        goals.append(f"<= {case.to_hand:g}x by hand")
        kept.append(worst <= case.to_hand)
    if case.to_peer is not None and best_peer is not None:
        goals.append(f"<= {case.to_peer:g}x best peer (is {worst / best_peer:.2f}x)")
        kept.append(worst <= case.to_peer * best_peer)
    return Result(case.name, medians, ratios, ", ".join(goals), all(kept) if kept else None)


def normal(value: Any) -> Any:
    return [list(part) if isinstance(part, tuple | list) else part for part in value]


def building(rounds: int) -> Result:
    """Microseconds to build a chain of four operations, and to build and drain ten elements."""
    numbers = list(range(10))

    def build() -> Any:
        return LazyCollection(numbers).filter(even).map(treble).filter(no_five).take(5)

    samples: dict[str, list[float]] = {"build 4 ops": [], "build and drain 10": []}
    for _ in range(rounds):
        for name, action in (("build 4 ops", build), ("build and drain 10",
                                                      lambda: build().collect())):  # fmt: skip
            started = time.thread_time()
            for _ in range(5000):
                action()
            samples[name].append((time.thread_time() - started) / 5000)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    met = medians["build 4 ops"] <= 1.5e-6
    return Result("building", medians, {}, "build <= 1.5 us", met)


MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from utils import LazyCollection
def run(n):
    return LazyCollection(lambda: (i for i in range(n))).filter(lambda i: i % 3 != 0).map(
        lambda i: i + 1).batch(1000).map(len).sum()
assert run(10_000) == 6666
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = run(int(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, total)
"""


def memory(elements: int) -> Result:
    """Growth of the memory's peak while many elements pass, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(FOLDER), str(elements)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    growth, total = map(int, done.stdout.split())
    assert total == elements - (elements + 2) // 3  # flat only counts if all came through
    mebibytes = growth / 1024
    name = f"memory growth, {elements:,} elements through filter/map/batch"
    return Result(name, {"MiB": mebibytes}, {}, "<= 2 MiB", mebibytes <= 2)


def sql(rows: int, rounds: int) -> list[Result]:
    """The push-down beside the same SQL by hand, giving the same dicts."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "bench.sqlite"
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, status TEXT, "
                               "amount INTEGER, note TEXT)")  # fmt: skip
            connection.executemany(
                "INSERT INTO orders VALUES (?, ?, ?, ?)",
                ((n, "paid" if n % 3 else "open", n % 100, "x" * 40) for n in range(rows)),
            )
        connection.close()
        results = [run(sqlite_case(path), rounds)]
    try:
        psycopg = importlib.import_module("psycopg")
        connection = psycopg.connect(POSTGRES, autocommit=True, connect_timeout=2)
    except Exception as error:
        print(f"PostgreSQL is left out: {type(error).__name__}", file=sys.stderr)
        return results
    table = f"lazy_bench_{os.getpid()}"
    try:
        connection.execute(
            f"CREATE TABLE {table} AS SELECT i AS id, CASE WHEN i % 3 = 0 THEN 'open' ELSE 'paid' "
            f"END AS status, (i % 100)::int AS amount, repeat('x', 40) AS note "
            f"FROM generate_series(1, {rows}) i"
        )
        connection.execute(f"ALTER TABLE {table} ADD PRIMARY KEY (id)")
        connection.execute(f"ANALYZE {table}")
        results += [run(case, rounds) for case in postgres_cases(psycopg, table)]
    finally:
        connection.execute(f"DROP TABLE IF EXISTS {table}")
        connection.close()
    return results


def sqlite_case(path: Path) -> Case:
    def hand() -> list[dict[str, Any]]:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            cursor = connection.execute(
                "SELECT id, amount FROM orders WHERE status = ? AND amount > ? ORDER BY id",
                ("paid", 50),
            )
            return [{"id": row[0], "amount": row[1]} for row in cursor]
        finally:
            connection.close()

    table = DatabaseLazyCollection.from_table("orders", connection=path)
    return Case(
        "SQLite: predicate and projection pushed", hand,
        {"chain": lambda: table.filter((col("status") == "paid") & (col("amount") > 50))
         .select("id", "amount").collect()},
        {"Python filter": lambda: table.filter(
            lambda r: r["status"] == "paid" and r["amount"] > 50)
            .map(lambda r: {"id": r["id"], "amount": r["amount"]}).collect()},
        to_hand=1.15,
    )  # fmt: skip


def postgres_cases(psycopg: Any, table: str) -> list[Case]:
    def hand() -> list[dict[str, Any]]:
        with psycopg.connect(POSTGRES) as connection:
            cursor = connection.cursor("by_hand")
            cursor.itersize = 1000
            cursor.execute(
                f"SELECT id, amount FROM {table} WHERE status = %s AND amount > %s ORDER BY id",
                ("paid", 50),
            )
            return [{"id": row[0], "amount": row[1]} for row in cursor]

    def hand_ten() -> list[dict[str, Any]]:
        with psycopg.connect(POSTGRES) as connection:
            cursor = connection.execute(f"SELECT id, amount FROM {table} ORDER BY id LIMIT 10")
            return [{"id": row[0], "amount": row[1]} for row in cursor]

    rows = DatabaseLazyCollection.from_table(table, connection=POSTGRES)
    return [
        Case(
            "PostgreSQL: predicate and projection pushed", hand,
            {"chain": lambda: rows.filter((col("status") == "paid") & (col("amount") > 50))
             .select("id", "amount").collect()},
            to_hand=1.15, clock=time.perf_counter,
        ),
        Case("PostgreSQL: take(10), connecting included", hand_ten,
             {"chain": lambda: rows.select("id", "amount").take(10).collect()},
             clock=time.perf_counter),
    ]  # fmt: skip


# --- showing ----------------------------------------------------------------------------------


def show(result: Result) -> None:
    verdict = {True: "met", False: "MISSED", None: ""}[result.met]
    print(f"\n{result.case}   {result.goal}   {verdict}".rstrip())
    for name, value in result.seconds.items():
        if not result.ratios:
            unit = f"{value:.2f} MiB" if name == "MiB" else f"{value * 1e6:.2f} us"
            print(f"  {name:<22} {unit:>12}")
            continue
        print(f"  {name:<22} {value * 1000:>9.2f} ms  {result.ratios[name]:>6.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description="Chains beside loops by hand and other libraries.")
    parser.add_argument("--smoke", action="store_true", help="small numbers, seconds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--elements", type=int, default=500_000)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds, arguments.elements = 1, 2_000
    numbers = list(range(arguments.elements))
    records = [{"status": "paid" if n % 3 else "open", "amount": n % 100, "id": n} for n in numbers]
    results = [run(case, arguments.rounds) for case in chains(numbers, records)]
    results.append(building(max(3, arguments.rounds)))
    results.append(memory(20_000 if arguments.smoke else 10_000_000))
    results += sql(2_000 if arguments.smoke else 500_000, 1 if arguments.smoke else 5)
    if arguments.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
        return
    print(f"CPython {platform.python_version()}, {os.cpu_count()} cores, "
          f"{arguments.elements:,} elements, medians of {arguments.rounds} rounds")  # fmt: skip
    for result in results:
        show(result)
    missed = [result.case for result in results if result.met is False]
    print(f"\n{sum(r.met is True for r in results)} goals met, {len(missed)} missed: {missed}")


if __name__ == "__main__":
    main()
