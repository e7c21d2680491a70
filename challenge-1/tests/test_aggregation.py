"""Windows, watermarks and sums: the outcome depends on the log alone, never on batches."""

import datetime as dt
import json
import math
import random
from collections import defaultdict
from typing import Any

import pytest

from aggregation import Measure, State, measure, micros
from builtin import PROJECTIONS
from parsing import Decoder
from windows import MICROSECONDS, Windows

pytestmark = pytest.mark.unit

WEBHOOK, EVENTS = PROJECTIONS["webhook"], PROJECTIONS["events"]


def decode(name: str, documents: list[dict[str, Any]]) -> list[Any]:
    decoder = Decoder(PROJECTIONS[name])
    return [decoder.one(json.dumps(document).encode()) for document in documents]


def measurement(category: str, value: float, ts: Any, quantity: float = 1) -> dict[str, Any]:
    return {"data": {"category": category, "value": value, "quantity": quantity, "ts": ts}}


class TestSums:
    def test_what_rounding_takes_from_the_sum_is_kept_beside_it(self) -> None:
        measured = measure([1e100, 1.0, -1e100, 1e-20])

        assert (measured.total, measured.rest) == (1.0, 1e-20)

    @pytest.mark.parametrize("seed", range(20))
    def test_total_and_rest_hold_what_one_float_would_lose(self, seed: int) -> None:
        chance = random.Random(seed)
        values = [chance.uniform(-1, 1) * 10 ** chance.randrange(-20, 20) for _ in range(500)]

        measured = measure(values)

        assert measured.total == math.fsum(values)
        assert measured.least == min(values)
        assert measured.greatest == max(values)


class TestTimes:
    @pytest.mark.parametrize(
        ("moment", "seconds"),
        [
            (dt.datetime(1970, 1, 1, tzinfo=dt.UTC), 0),
            (dt.datetime(1970, 1, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1))), 0),
            (1_700_000_000.25, 1_700_000_000.25),
            (1_700_000_000_250.0, 1_700_000_000.25),
            (-1.5, -1.5),
            (1e11, 1e11),
        ],
    )
    def test_numbers_above_1e11_are_milliseconds(self, moment: Any, seconds: float) -> None:
        assert micros(moment) == seconds * MICROSECONDS

    def test_a_moment_no_calendar_knows_is_refused(self) -> None:
        for moment in (1e300, -1e11, dt.datetime(9999, 1, 1, tzinfo=dt.UTC)):
            with pytest.raises(ValueError, match="out of range"):
                micros(moment)


def documents(name: str, seed: int, count: int = 400) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    made = []
    for number in range(count):
        ts = 1_700_000_000 + number / 4 + chance.choice([0, 0, 0, -1, -15, -300])
        value = chance.choice([1, -2.5, 1e15, -1e15, 0.1, 1e-9])
        if name == "webhook":
            made.append(measurement(chance.choice("abc"), value, ts, chance.randrange(5)))
        else:
            data = {"x": value, "flag": True, "text": "1", "none": None, "deep": {"x": 1}}
            if chance.random() < 0.5:
                data["y"] = chance.randrange(10)
            made.append(
                {
                    "event_id": str(number),
                    "source": chance.choice("pq"),
                    "event_type": chance.choice("mn"),
                    "data": data,
                    "timestamp": ts,
                }
            )
    return made


def naive(name: str, made: list[dict[str, Any]]) -> dict[Any, Any]:
    """The obvious model: one event after the other, everything kept."""
    groups: dict[Any, Any] = defaultdict(lambda: {"count": 0, "late": 0, "members": {}})
    latest: dict[str, float] = {}
    size = 10 if name == "webhook" else 60
    group: tuple[str, ...]
    for document in made:
        data = document["data"]
        if name == "webhook":
            source, group, ts = "", (data["category"],), data["ts"]
            members = {"value": data["value"], "quantity": data["quantity"]}
        else:
            source, ts = document["source"], document["timestamp"]
            group = (source, document["event_type"])
            members = {k: v for k, v in data.items() if type(v) in (int, float)}
        last = math.floor(ts / 10) * 10
        for start in range(last - size + 10, last + 1, 10):
            found = groups[start, group]
            found["count"] += 1
            found["late"] += start + size <= latest.get(source, -math.inf)
            for member, value in members.items():
                found["members"].setdefault(member, []).append(value)
        latest[source] = max(latest.get(source, -math.inf), ts)
    return dict(groups)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["webhook", "events"])
def test_a_stream_cut_into_any_batches_gives_what_the_naive_model_gives(
    name: str, seed: int
) -> None:
    made = documents(name, seed)
    events = decode(name, made)
    chance = random.Random(seed)
    windows = Windows(PROJECTIONS[name].window, lambda source: None)
    groups: dict[Any, Any] = defaultdict(lambda: {"count": 0, "late": 0, "members": {}})
    at = 0
    while at < len(events):
        size = chance.choice([1, 2, 7, 100])
        folded = PROJECTIONS[name].fold(events[at : at + size], windows)
        assert folded.dropped == []
        for delta in folded.deltas:
            found = groups[delta.window_start // MICROSECONDS, delta.group]
            found["count"] += delta.count
            found["late"] += delta.late
            for member, part in delta.measures.items():
                found["members"].setdefault(member, []).append(part)
        at += size

    expected = naive(name, made)
    assert groups.keys() == expected.keys()
    for key, found in groups.items():
        assert (found["count"], found["late"]) == (expected[key]["count"], expected[key]["late"])
        assert found["members"].keys() == expected[key]["members"].keys()
        for member, parts in found["members"].items():
            values = expected[key]["members"][member]
            total = math.fsum(x for part in parts for x in (part.total, part.rest))
            exact, magnitude = math.fsum(values), math.fsum(map(abs, values))
            assert abs(total - exact) <= max(1e-29 * magnitude, math.ulp(exact))
            assert sum(m.count for m in parts) == len(values)
            if name == "events":
                assert min(m.least for m in parts) == min(values)
                assert max(m.greatest for m in parts) == max(values)


def test_the_shown_values_have_the_documented_names() -> None:
    measures = {"value": Measure(2, 3.0, 0.0, 1.0, 2.0), "quantity": Measure(2, 5.5, 0.0, 1, 2)}

    assert WEBHOOK.values(2, State(measures)) == {
        "count": 2, "sum_value": 3, "avg_value": 1.5, "sum_quantity": 5.5,
    }  # fmt: skip
    assert EVENTS.values(2, State({"x": measures["value"]})) == {
        "count": 2, "sum_x": 3, "avg_x": 1.5, "min_x": 1, "max_x": 2,
    }  # fmt: skip


def test_an_event_without_a_time_of_its_own_counts_when_it_arrived() -> None:
    events = decode("events", [{"event_id": "1", "source": "s", "event_type": "t", "data": {}}])

    EVENTS.arrived(events, 1_700_000_003 * MICROSECONDS)
    folded = EVENTS.fold(events, Windows(EVENTS.window, lambda source: None))

    starts = [delta.window_start for delta in folded.deltas]
    assert starts == [(1_699_999_950 + 10 * n) * MICROSECONDS for n in range(6)]
