"""What this folder can do, as claims with figures: `python showcase.py lazy`.

Progress goes to stderr; stdout has one JSON object per claim, for the repository's `demo.py`.
"""

import argparse
import gc
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from demo import compare
from utils import LazyCollection, SourceExhaustedError, col, it


def say(text: str) -> None:
    """A line of progress."""
    print(f"    {text}".replace("\n", "\n    "), file=sys.stderr, flush=True)


def claim(text: str, figure: Any, passed: bool) -> None:
    """One claim, its figure, and whether it holds."""
    print(json.dumps({"claim": text, "figure": str(figure), "passed": bool(passed)}), flush=True)


def lazy(*, quick: bool, seed: int) -> None:
    """One chain over three sources; the speed of the loop; what is read, refused and closed."""
    _three_sources(5_000 if quick else None)
    _speed(seed, 50_000 if quick else 1_000_000)
    _contracts()
    _memory(100_000 if quick else 3_000_000)


def _three_sources(rows: int | None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        answers = compare(rows, Path(scratch), say)
    first, second, third = answers.values()
    claim("airports as CSV, NDJSON and SQLite give the same answer through the same chain",
          f"{len(first)} rows x 3", first == second == third and bool(first))  # fmt: skip


def _speed(seed: int, count: int) -> None:
    draw = random.Random(seed)
    records: list[dict[str, Any]] = [
        {"status": draw.choice(["paid", "open"]), "amount": draw.randrange(100)}
        for _ in range(count)
    ]

    def by_hand() -> list[int]:
        out = []
        for record in records:
            if record["status"] == "paid":
                amount = record["amount"]
                if amount > 50:
                    out.append(amount)
        return out

    def chained() -> list[int]:
        return (
            LazyCollection(records).filter(lambda r: r["status"] == "paid")
            .map(lambda r: r["amount"]).filter(lambda a: a > 50).collect()
        )  # fmt: skip

    def expressed() -> list[int]:
        return (
            LazyCollection(records).filter(col("status") == "paid").map(col("amount"))
            .filter(it > 50).collect()
        )  # fmt: skip

    def builtin() -> list[int]:
        paid = filter(lambda r: r["status"] == "paid", records)
        return list(filter(lambda a: a > 50, map(lambda r: r["amount"], paid)))  # noqa: C417

    contenders = {
        "hand": by_hand,
        "lambdas": chained,
        "expressions": expressed,
        "itertools": builtin,
    }
    same = len({tuple(contender()) for contender in contenders.values()}) == 1
    seconds = _interleaved(contenders, 15)
    for name in ("lambdas", "expressions"):
        to_hand = seconds[name] / seconds["hand"]
        to_builtin = seconds[name] / seconds["itertools"]
        figure = f"{to_hand:.2f}x the hand loop, {to_builtin:.2f}x filter() and map()"
        claim(f"a chain of {name} runs at the speed of the loop by hand", figure,
              same and to_hand < 1.35 and to_builtin < 0.85)  # fmt: skip


def _interleaved(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least time of this thread's own that each needs: what else runs only adds to it."""
    least = dict.fromkeys(contenders, math.inf)
    gc.disable()
    try:
        for _ in range(rounds):
            for name, contender in contenders.items():
                started = time.thread_time()
                contender()
                least[name] = min(least[name], time.thread_time() - started)
    finally:
        gc.enable()
    return least


def _contracts() -> None:
    pulled = closed = 0

    def numbers() -> Iterator[int]:
        nonlocal pulled, closed
        try:
            while True:
                pulled += 1
                yield pulled
        finally:
            closed += 1

    found = LazyCollection(numbers).filter(it % 3 == 0).batch(4).take(2).collect()
    claim("take and batch read exactly what they need from an endless source",
          f"{pulled} elements for {sum(map(len, found))}", pulled == 24)  # fmt: skip
    claim("the source is closed as soon as reading stops", f"{closed} of 1 closed", closed == 1)
    once = LazyCollection(n for n in range(5))
    total = once.sum()
    try:
        again = f"got {once.sum()}"
    except SourceExhaustedError as error:
        again = "raises SourceExhaustedError"
        say(str(error))
    claim("a spent generator is an error, not an empty result", again,
          total == 10 and again.startswith("raises"))  # fmt: skip
    try:
        LazyCollection([3, 1, 0]).map(lambda n: 6 // n).collect()
        note = ""
    except ZeroDivisionError as error:
        note = error.__notes__[0]
        say(f"ZeroDivisionError {note}")
    claim("an error names operation, source index and value", "op 1, source #2, value 0",
          all(part in note for part in ("op 1 map(", "source #2", "value 0")))  # fmt: skip


def _memory(count: int) -> None:
    import psutil

    process = psutil.Process()
    chain = LazyCollection(lambda: (n for n in range(count))).filter(it % 2 == 0).batch(1000)
    chain.take(5).collect()
    before = process.memory_info().rss
    batches = chain.count()
    grown = (process.memory_info().rss - before) / 1024 / 1024
    claim(f"{count:,} elements pass in flat memory", f"{grown:.2f} MiB more, {batches:,} batches",
          grown <= 2 and batches == count // 2000)  # fmt: skip


def main() -> None:
    """Run one mode."""
    parser = argparse.ArgumentParser(description="Show what this folder can do.")
    parser.add_argument("mode", choices=["lazy"])
    parser.add_argument("--quick", action="store_true", help="small numbers")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    lazy(quick=arguments.quick, seed=arguments.seed)


if __name__ == "__main__":
    main()
