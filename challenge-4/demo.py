"""One chain over three sources: `python demo.py [--rows N]`.

The airports of the world as a CSV file, an NDJSON file and a SQLite table. The same chain gives the
same answer from each, and `explain` shows where the work was done and how many elements passed.
"""

import argparse
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import airportsdata

from utils import DatabaseLazyCollection, LazyCollection, col

FIELDS = ("icao", "name", "city", "country", "elevation")
Say = Callable[[str], None]


def airports(rows: int | None = None) -> list[dict[str, Any]]:
    """The airports, in the order of their codes; of N the same share from everywhere."""
    found: list[Any] = sorted(
        airportsdata.load("ICAO").values(), key=lambda airport: airport["icao"]
    )
    step = max(1, len(found) // (rows or len(found)))
    return [{name: airport[name] for name in FIELDS} for airport in found[::step]]


def sources(records: list[dict[str, Any]], directory: Path) -> dict[str, LazyCollection[Any]]:
    """The same records in three places."""
    base = LazyCollection(records)
    base.to_csv(directory / "airports.csv")
    base.to_ndjson(directory / "airports.ndjson.gz")
    with sqlite3.connect(directory / "airports.sqlite") as connection:
        connection.execute("CREATE TABLE airports (icao TEXT PRIMARY KEY, name TEXT, city TEXT, "
                           "country TEXT, elevation REAL)")  # fmt: skip
        connection.executemany("INSERT INTO airports VALUES (?, ?, ?, ?, ?)",
                               (tuple(record.values()) for record in records))  # fmt: skip
    connection.close()
    return {
        "CSV file": LazyCollection.from_csv(directory / "airports.csv"),
        "NDJSON file": LazyCollection.from_ndjson(directory / "airports.ndjson.gz"),
        "SQLite table": DatabaseLazyCollection.from_table(
            "airports", connection=directory / "airports.sqlite"
        ),
    }


def chain(base: LazyCollection[Any]) -> LazyCollection[Any]:
    """The ten highest Swiss and Austrian airfields outside the towns named like them."""
    return (
        base.filter(col("country").is_in(["CH", "AT"]) & (col("city") != ""))
        .select("icao", "name", "city", "elevation")
        .map(lambda row: {**row, "elevation": float(row["elevation"])})  # CSV knows texts only
        .filter(lambda row: row["city"] not in row["name"])
        .sort(lambda row: (-row["elevation"], row["icao"]))
        .take(10)
    )


def compare(rows: int | None, directory: Path, say: Say) -> dict[str, list[dict[str, Any]]]:
    """Run the chain over each source, and tell what happened."""
    answers = {}
    for name, base in sources(airports(rows), directory).items():
        plan = chain(base)
        started = time.perf_counter()
        answers[name] = plan.collect()
        took = time.perf_counter() - started
        say(f"\n{name}: {len(answers[name])} rows in {took * 1000:.0f} ms")
        say(str(plan.explain(analyze=True)))
    return answers


def main() -> int:
    """Print plan, counts and answer; 0 if the three agree."""
    parser = argparse.ArgumentParser(description="One chain over a CSV file, NDJSON and SQLite.")
    parser.add_argument("--rows", type=int, default=None, help="about N airports only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        answers = list(compare(arguments.rows, Path(scratch), print).values())
    print("\nicao  elevation (ft)  name")
    for row in answers[0]:
        print(f"{row['icao']}  {row['elevation']:>14,.0f}  {row['name']} ({row['city']})")
    same = answers[0] == answers[1] == answers[2]
    print(f"\nThe three sources give {'the same answer' if same else 'DIFFERENT ANSWERS'}.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
