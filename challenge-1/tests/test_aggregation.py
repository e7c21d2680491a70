"""Windows, watermarks and sums: the outcome depends on the log alone, never on batches."""

import datetime as dt
import json
import math
import random
from collections import defaultdict
from typing import Any

import pytest

from aggregation import EVENTS, PIPELINES, WEBHOOK, Measure, measure, micros
from parsing import Decoder
from windows import MICROSECONDS, REMEMBERED_SOURCES, Tumbling, Watermarks

pytestmark = pytest.mark.unit

TEN_SECONDS = Tumbling.of_seconds(10)


def nothing_stored(pipeline: str, source: str) -> int | None:
    return None


def decode(name: str, documents: list[dict[str, Any]]) -> list[Any]:
    decoder = Decoder(PIPELINES[name])
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


class TestWindows:
    def test_windows_are_aligned_to_the_epoch_and_hold_their_start_but_not_their_end(self) -> None:
        events = decode("webhook", [measurement("a", 1, ts) for ts in (-0.5, 0, 9.999, 10)])

        deltas = WEBHOOK.fold(events, TEN_SECONDS, Watermarks(nothing_stored))

        seconds = [(d.window_start // MICROSECONDS, d.count) for d in deltas]
        assert sorted(seconds) == [(-10, 1), (0, 2), (10, 1)]

    @pytest.mark.parametrize("size", [0, -1, 0.0001, 10**9, math.nan])
    def test_a_size_that_makes_no_sense_is_refused(self, size: float) -> None:
        with pytest.raises(ValueError, match="sizes from"):
            Tumbling.of_seconds(size)

    def test_an_event_is_late_once_its_window_has_ended_for_its_source(self) -> None:
        watermarks = Watermarks(nothing_stored)
        size = TEN_SECONDS.size

        def late(source: str, second: float) -> bool:
            return watermarks.is_late("events", source, int(second * MICROSECONDS), size)

        assert not late("a", 5)
        assert not late("a", 9.9)
        assert not late("a", 2)
        assert not late("a", 10)
        assert late("a", 9.9)
        assert not late("b", 1)

    def test_more_sources_than_memory_holds_are_looked_up_in_the_store(self) -> None:
        stored: dict[tuple[str, str], int] = {}
        watermarks = Watermarks(lambda pipeline, source: stored.get((pipeline, source)))
        for number in range(REMEMBERED_SOURCES + 10):
            watermarks.advance("events", f"s{number}", 100 + number)
        stored.update(watermarks.take_changes())

        assert len(watermarks._latest) == REMEMBERED_SOURCES
        assert watermarks.latest("events", "s0") == 100

    def test_after_a_refused_batch_the_watermark_is_what_is_stored(self) -> None:
        watermarks = Watermarks(lambda *_: 50)
        watermarks.advance("events", "a", 100)

        watermarks.forget()

        assert watermarks.latest("events", "a") == 50
        assert watermarks.take_changes() == {}


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
        start = math.floor(ts / 10) * 10
        found = groups[start, group]
        found["count"] += 1
        found["late"] += start + 10 <= latest.get(source, -math.inf)
        latest[source] = max(latest.get(source, -math.inf), ts)
        for member, value in members.items():
            found["members"].setdefault(member, []).append(value)
    return dict(groups)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", ["webhook", "events"])
def test_a_stream_cut_into_any_batches_gives_what_the_naive_model_gives(
    name: str, seed: int
) -> None:
    made = documents(name, seed)
    events = decode(name, made)
    chance = random.Random(seed)
    watermarks = Watermarks(nothing_stored)
    groups: dict[Any, Any] = defaultdict(lambda: {"count": 0, "late": 0, "members": {}})
    at = 0
    while at < len(events):
        size = chance.choice([1, 2, 7, 100])
        for delta in PIPELINES[name].fold(events[at : at + size], TEN_SECONDS, watermarks):
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
            assert abs(total - exact) <= max(1e-30 * magnitude, math.ulp(exact))
            assert sum(m.count for m in parts) == len(values)
            assert min(m.least for m in parts) == min(values)
            assert max(m.greatest for m in parts) == max(values)


def test_the_shown_values_have_the_documented_names() -> None:
    measures = {"value": Measure(2, 3.0, 0.0, 1.0, 2.0), "quantity": Measure(2, 5.5, 0.0, 1, 2)}

    assert WEBHOOK.values(2, measures) == {
        "count": 2, "sum_value": 3, "avg_value": 1.5, "sum_quantity": 5.5,
    }  # fmt: skip
    assert EVENTS.values(2, {"x": measures["value"]}) == {
        "count": 2, "sum_x": 3, "avg_x": 1.5, "min_x": 1, "max_x": 2,
    }  # fmt: skip


def test_an_event_without_a_time_of_its_own_counts_when_it_arrived() -> None:
    events = decode("events", [{"event_id": "1", "source": "s", "event_type": "t", "data": {}}])

    EVENTS.arrived(events, 1_700_000_003 * MICROSECONDS)
    (delta,) = EVENTS.fold(events, TEN_SECONDS, Watermarks(nothing_stored))

    assert delta.window_start == 1_700_000_000 * MICROSECONDS
