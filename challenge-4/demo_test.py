"""A tour of lazy collections, to be read from top to bottom: `python demo_test.py`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[TestClient]:
    """The app, with its data in an empty directory. It serves loopback only: so we are loopback."""
    import app

    monkeypatch.setattr(app.settings, "data_dir", tmp_path / "lazy_data")
    with TestClient(app.app, base_url="http://localhost", client=("127.0.0.1", 1)) as client:
        yield client


def told(step: str) -> None:
    print(f"  {step}")


def test_a_chain_is_a_plan_and_running_it_is_one_loop() -> None:
    from utils import LazyCollection

    chain = LazyCollection(range(10**9)).filter(lambda n: n % 7 == 0).map(lambda n: n * n).take(3)

    told(f"built, nothing has run: {chain!r}")
    assert chain.collect() == [0, 49, 196]
    plan = chain.explain(analyze=True)
    told(str(plan).replace("\n", "\n  "))
    assert plan.counts == [15, 3, 3, 3]  # 15 of a billion numbers were read


def test_a_spent_generator_says_so() -> None:
    from utils import LazyCollection, SourceExhaustedError

    lines = LazyCollection(line for line in ("a", "b"))
    assert lines.count() == 2

    with pytest.raises(SourceExhaustedError) as caught:
        lines.count()
    told(str(caught.value))
    kept = LazyCollection(iter("ab")).cache()
    assert kept.count() == kept.count() == 2


def test_an_error_says_where() -> None:
    from utils import LazyCollection

    with pytest.raises(ValueError) as caught:  # noqa: PT011
        LazyCollection(["1", "2", "x"]).map(int).collect()

    told(f"ValueError {caught.value.__notes__[0]}")
    assert "op 1 map(int) · source #2 · value 'x'" in caught.value.__notes__[0]


def test_the_same_chain_becomes_sql_over_a_table() -> None:
    from utils import DatabaseLazyCollection, col

    events = DatabaseLazyCollection.from_table("processed_events")
    chain = events.filter((col("source") == "shop") & (col("event_type") == "refund"))

    page = chain.select("event_id", "timestamp").page(1, size=3)

    told(chain.select("event_id", "timestamp").explain().sql or "")
    told(f"page 1: {[row['event_id'] for row in page]}, cursor {(page.cursor or '')[:12]}…")
    following = chain.select("event_id", "timestamp").after(page.cursor or "").first()
    assert following == chain.select("event_id", "timestamp")[3]


def test_pipelines_over_http_are_data_not_code(client: TestClient) -> None:
    body: dict[str, Any] = {
        "dataset": "airports",
        "ops": [
            {"op": "filter", "field": "elevation", "cmp": "gt", "value": 13000},
            {"op": "map", "select": ["icao", "country", "elevation"]},
        ],
    }

    answer = client.post("/pipelines/run", json=body).json()

    told(f"POST /pipelines/run -> {answer['count']} airports, such as {answer['items'][0]}")
    assert all(item["elevation"] > 13000 for item in answer["items"])
    stream = client.post("/pipelines/stream", json=body).text.splitlines()
    assert stream[-1] == f'{{"end":true,"count":{answer["count"]}}}'
    body["ops"][0]["cmp"] = "matches"
    refused = client.post("/pipelines/run", json=body)
    told(f"an unknown comparison -> {refused.status_code} {refused.json()['errors'][0]['pointer']}")
    assert refused.status_code == 422


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-s"]))
