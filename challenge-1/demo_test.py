"""A tour of the streaming pipeline, to be read from top to bottom: `python demo_test.py`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[TestClient]:
    """The app, with its data in an empty directory. It serves loopback only: so we are loopback."""
    import app

    monkeypatch.setattr(app.settings, "db_path", tmp_path / "results.db")
    monkeypatch.setattr(app.settings, "queue_dir", tmp_path / "message_queue")
    with TestClient(app.app, base_url="http://localhost", client=("127.0.0.1", 1)) as client:
        yield client


def told(step: str) -> None:
    print(f"  {step}")


def test_a_measurement_is_durable_then_counted(client: TestClient) -> None:
    event = {"data": {"category": "books", "value": 12.5, "quantity": 2,
                      "ts": "2026-01-15T10:00:03Z"}}  # fmt: skip

    answer = client.post("/webhook?wait=applied", json=event)

    assert answer.status_code == 202
    told(f"POST /webhook -> {answer.json()}")
    (window,) = client.get("/aggregates").json()["items"]
    assert window["values"] == {
        "count": 1, "sum_value": 12.5, "avg_value": 12.5, "sum_quantity": 2,
    }  # fmt: skip
    told(f"GET /aggregates -> {window['window_start']} {window['group']} {window['values']}")


def test_a_bad_line_costs_its_neighbours_nothing(client: TestClient) -> None:
    good = '{"data":{"category":"a","value":1,"quantity":1,"ts":1700000000}}'

    answer = client.post(
        "/webhook?wait=applied",
        content=f"{good}\nnonsense\n{good}\n",
        headers={"content-type": "application/x-ndjson"},
    ).json()

    assert (answer["accepted"], answer["rejected"]) == (2, 1)
    (letter,) = client.get("/dead-letters").json()["items"]
    assert (letter["line"], letter["text"]) == (2, "nonsense")
    told(f"line {letter['line']} was refused ({letter['message']}) and is kept: {letter['text']!r}")


def test_a_retry_never_counts_twice(client: TestClient) -> None:
    event = {"event_id": "evt-1", "source": "shop", "event_type": "order", "data": {"amount": 40}}

    first = client.post("/webhook/ingest?wait=applied", json=event).json()
    again = client.post("/webhook/ingest?wait=applied", json=event).json()

    assert (first["accepted"], again["duplicates"]) == (1, 1)
    told(f"the same event again -> {again}")


def test_a_late_event_revises_its_window(client: TestClient) -> None:
    for second in (3, 14, 5):  # the third belongs to a window that the second one has closed
        data = {"category": "a", "value": second, "quantity": 1,
                "ts": f"2026-01-15T10:00:{second:02}Z"}  # fmt: skip
        client.post("/webhook?wait=applied", json={"data": data})

    first, second = client.get("/aggregates").json()["items"]

    assert (first["values"]["sum_value"], first["revision"], first["final"]) == (8, 2, True)
    assert (second["revision"], second["final"]) == (1, False)
    told(f"the window from {first['window_start']} stands at revision {first['revision']}")


def test_what_was_acknowledged_is_there_after_a_restart(tmp_path: Path) -> None:
    import asyncio

    from storage import AggregateQuery
    from utils import Pipeline

    event = {"data": {"category": "a", "value": 1, "quantity": 1, "ts": 1_700_000_000}}

    async def accept_only() -> None:
        with Pipeline(db_path=tmp_path / "a.db") as pipeline:  # no worker: nothing is aggregated
            for _ in range(100):
                await pipeline.ingest_q.put(event)

    async def restart() -> int:
        async with Pipeline(db_path=tmp_path / "a.db") as pipeline:
            await pipeline.start_workers()
            await pipeline.stop_workers()
            (row,) = pipeline.store.aggregates(AggregateQuery())
            return row.count

    asyncio.run(accept_only())
    counted = asyncio.run(restart())

    assert counted == 100
    told(f"100 events were acknowledged and left in the log; after the restart {counted} count")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-s"]))
