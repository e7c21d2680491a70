"""Windows against a naive model: one event after the other, everything kept, nothing clever."""

import math
import random
from collections import defaultdict
from typing import Any

import msgspec
import pytest

from aggregation import State, evolved
from projection import Projection, compile_spec
from specs import PipelineSpec
from windows import (
    BEGINNING,
    FOREVER,
    MICROSECONDS,
    OTHER,
    REMEMBERED_SOURCES,
    Clock,
    Window,
    Windows,
)

pytestmark = pytest.mark.unit

WINDOWS: dict[str, dict[str, Any]] = {
    "tumbling": {"kind": "tumbling", "size_seconds": 10},
    "tumbling with bounds": {"kind": "tumbling", "size_seconds": 10, "out_of_order_seconds": 3,
                             "allowed_lateness_seconds": 15},
    "sliding": {"kind": "sliding", "size_seconds": 60, "slide_seconds": 10},
    "sliding with bounds": {"kind": "sliding", "size_seconds": 20, "slide_seconds": 8,
                            "out_of_order_seconds": 2, "allowed_lateness_seconds": 12},
    "session": {"kind": "session", "gap_seconds": 4},
    "session with bounds": {"kind": "session", "gap_seconds": 6, "out_of_order_seconds": 5,
                            "allowed_lateness_seconds": 9},
    "none": {"kind": "none"},
}  # fmt: skip


def projection(window: dict[str, Any], *, by_source: bool) -> Projection:
    group = ["source", "kind"] if by_source else ["kind"]
    return compile_spec(
        "p",
        PipelineSpec.model_validate(
            {
                "select": {"source": "from.name", "kind": "kind", "value": "x.value"},
                "event_time": "at",
                "group_by": group,
                "aggregates": [
                    {"op": "count"}, {"op": "sum", "field": "value"},
                    {"op": "max", "field": "value"}, {"op": "p95", "field": "value"},
                    {"op": "count", "field": "value"}, {"op": "distinct", "field": "value"},
                ],
                "window": window,
            }
        ),
    )  # fmt: skip


def stream(seed: int, count: int = 500, kinds: str = "abc") -> list[dict[str, Any]]:
    chance = random.Random(seed)
    made = []
    for number in range(count):
        at = 1_700_000_000 + number / 3 + chance.choice([0, 0, 0, 0, -2, -7, -15, -40, -300])
        value = chance.choice([None, 1, 2.5, -1, 1e15, -1e15, number])
        made.append({"from": {"name": chance.choice("pq")}, "kind": chance.choice(kinds),
                     "x": {"value": value, "noise": [1]}, "at": at})  # fmt: skip
    return made


class Naive:
    """The obvious model."""

    def __init__(self, window: Window, *, by_source: bool, max_keys: int = 10**9) -> None:
        self.window, self.by_source, self.max_keys = window, by_source, max_keys
        self.latest: dict[str, int] = defaultdict(lambda: BEGINNING)
        self.rows: dict[Any, dict[str, Any]] = {}
        self.live: dict[Any, tuple[str, int]] = {}
        self.dropped = 0

    def watermark(self, source: str) -> int:
        return max(self.latest[source] - self.window.out_of_order, BEGINNING)

    def windows_of(self, t: int) -> list[tuple[int, int]]:
        w = self.window
        if w.kind == "none":
            return [(0, FOREVER)]
        first = (t - w.size) // w.slide * w.slide
        starts = range(first, t + w.slide, w.slide)
        return [(s, s + w.size) for s in starts if s <= t < s + w.size]

    def take(self, event: dict[str, Any]) -> None:
        t = round(event["at"] * MICROSECONDS)
        source = event["from"]["name"] if self.by_source else ""
        group: Any = (source, event["kind"]) if self.by_source else (event["kind"],)
        mark = self.watermark(source)
        value = event["x"]["value"]
        if self.window.kind == "session":
            taken = self.take_session(t, source, group, mark, value)
        else:
            taken = self.take_window(t, source, group, mark, value)
        if taken:
            self.latest[source] = max(self.latest[source], t)
        else:
            self.dropped += 1

    def expire(self) -> None:
        self.live = {g: (s, e) for g, (s, e) in self.live.items() if e > self.watermark(s)}

    def take_window(self, t: int, source: str, group: Any, mark: int, value: Any) -> bool:
        w = self.window
        accepted = [(s, e) for s, e in self.windows_of(t) if e + w.lateness > mark]
        if not accepted:
            return False
        if w.out_of_order == 0:
            self.latest[source] = max(self.latest[source], t)
        else:
            self.latest[source] = max(self.latest[source], t)
        self.expire()
        expiry = accepted[-1][1] + w.lateness
        if group in self.live:
            self.live[group] = (source, max(expiry, self.live[group][1]))
        elif expiry > self.watermark(source):
            if len(self.live) >= self.max_keys:
                group = (OTHER,) * len(group)
            else:
                self.live[group] = (source, expiry)
        for s, e in accepted:
            row = self.rows.setdefault((s, e, group), {"count": 0, "late": 0, "values": []})
            row["count"] += 1
            row["late"] += e <= mark
            row["values"] += [value] if value is not None else []
        return True

    def take_session(self, t: int, source: str, group: Any, mark: int, value: Any) -> bool:
        w = self.window
        start, end, late = t, t + w.gap, 0
        joined = [
            key for key in self.rows
            if key[2] == group and key[0] < end and start < key[1] and key[1] + w.lateness > mark
        ]  # fmt: skip
        for s, e, _ in joined:
            start, end = min(start, s), max(end, e)
        if end + w.lateness <= mark:
            return False
        late = int(any(e <= mark for _, e, _ in joined))
        merged = {"count": 1, "late": late, "values": [value] if value is not None else []}
        for key in joined:
            row = self.rows.pop(key)
            for name in merged:
                merged[name] = row[name] + merged[name]
        self.rows[start, end, group] = merged
        return True


class Kept:
    """What a store keeps of deltas."""

    def __init__(self) -> None:
        self.rows: dict[Any, Any] = {}

    def apply(self, delta: Any) -> None:
        if delta.steps is not None:
            at = {key[0]: key for key in self.rows if key[2] == delta.group}
            state, count, late = evolved(delta.steps, lambda start: self.rows.pop(at[start]))
        else:
            key = (delta.window_start, delta.window_end, delta.group)
            state, count, late = self.rows.get(key, (State(), 0, 0))
            state.add(delta)
            count += delta.count
        key = (delta.window_start, delta.window_end, delta.group)
        self.rows[key] = (state, count, late + delta.late)


def run(p: Projection, made: list[dict[str, Any]], seed: int, max_keys: int = 10**9) -> Any:
    chance = random.Random(seed)
    decoder = msgspec.json.Decoder(p.shape)
    windows = Windows(p.window, lambda source: None, max_keys=max_keys)
    kept, dropped, at = Kept(), 0, 0
    while at < len(made):
        size = chance.choice([1, 2, 7, 100])
        events = decoder.decode_lines(b"\n".join(map(msgspec.json.encode, made[at : at + size])))
        assert p.normalise(events, FOREVER) == 0
        folded = p.fold(events, windows)
        dropped += len(folded.dropped)
        for delta in folded.deltas:
            kept.apply(delta)
        at += size
    return kept.rows, dropped, windows


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("by_source", [False, True])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_stream_cut_into_any_batches_gives_what_the_naive_model_gives(
    name: str, by_source: bool, seed: int
) -> None:
    p = projection(WINDOWS[name], by_source=by_source)
    made = stream(seed)
    naive = Naive(p.window, by_source=by_source)
    for event in made:
        naive.take(event)

    rows, dropped, _ = run(p, made, seed)

    assert rows.keys() == naive.rows.keys()
    assert dropped == naive.dropped
    for key, (state, count, late) in rows.items():
        expected = naive.rows[key]
        values = expected["values"]
        assert (count, late) == (expected["count"], expected["late"]), key
        shown = p.values(count, state)
        assert shown["count_value"] == len(values)
        assert shown["distinct_value"] == len(set(map(float, values)))
        if values:
            assert shown["sum_value"] == pytest.approx(math.fsum(values), rel=1e-15, abs=1e-9)
            assert shown["max_value"] == max(values)
        else:
            assert shown["sum_value"] is None


@pytest.mark.parametrize("name", ["tumbling with bounds", "sliding", "none"])
@pytest.mark.parametrize("seed", range(4))
def test_groups_beyond_the_bound_are_counted_together_and_nothing_is_lost(
    name: str, seed: int
) -> None:
    p = projection(WINDOWS[name], by_source=False)
    made = stream(seed, kinds="abcdefghijkl")
    naive = Naive(p.window, by_source=False, max_keys=5)
    for event in made:
        naive.take(event)

    rows, dropped, windows = run(p, made, seed, max_keys=5)

    assert {k: (c, late) for k, (_, c, late) in rows.items()} == {
        k: (row["count"], row["late"]) for k, row in naive.rows.items()
    }
    assert dropped == naive.dropped
    assert any(key[2] == (OTHER,) for key in rows)
    assert len(windows.live) <= 5


@pytest.mark.parametrize("name", WINDOWS)
def test_percentiles_do_not_depend_on_the_batches(name: str) -> None:
    p = projection({**WINDOWS[name], "allowed_lateness_seconds": 1000}, by_source=False)
    made = stream(1, count=4000, kinds="a")

    def shown(rows: Any) -> Any:
        return {key: p.values(count, state) for key, (state, count, _) in rows.items()}

    one, two, three = (shown(run(p, made, seed)[0]) for seed in (1, 2, 3))

    assert one == two == three


def test_state_is_freed_when_windows_close() -> None:
    p = projection(WINDOWS["tumbling"], by_source=True)
    windows = Windows(p.window, lambda source: None)
    for second in range(0, 1000, 10):
        for n in range(20):
            assert windows.place((f"g{second}-{n}",), "s", (second + 10) * MICROSECONDS, second)
        windows.advance(windows.clock("s"), "s", second * MICROSECONDS)
        assert len(windows.live) <= 40
    windows.touch("s")
    windows.idle("s", windows.clock("s").seen)
    assert not windows.live


def test_more_sources_than_memory_holds_are_looked_up_in_the_store() -> None:
    stored: dict[str, Clock] = {}
    windows = Windows(Window.of("tumbling", 10), stored.get)
    for number in range(REMEMBERED_SOURCES + 10):
        source = f"s{number}"
        windows.advance(windows.clock(source), source, 100 + number)
        windows.touch(source)
    stored.update(windows.take_touched())

    assert len(windows.clocks) == REMEMBERED_SOURCES
    assert windows.clock("s0").latest == 100


class TestIdle:
    @pytest.mark.parametrize(
        ("window", "closes"),
        [("tumbling", 10), ("sliding", 60), ("session", 7)],
    )
    def test_a_quiet_source_closes_its_last_window_and_no_more(
        self, window: str, closes: int
    ) -> None:
        windows = Windows(Window.of(**WINDOWS[window]), lambda source: None)
        clock = windows.clock("s")
        windows.advance(clock, "s", 3 * MICROSECONDS)
        clock.seen = 77

        assert not windows.idle("s", 76)
        assert windows.watermark(clock) == 3 * MICROSECONDS
        assert windows.idle("s", 77)
        assert windows.watermark(clock) == closes * MICROSECONDS

    def test_the_stream_may_go_on_after_it(self) -> None:
        p = projection(WINDOWS["tumbling"], by_source=False)
        windows = Windows(p.window, lambda source: None)
        decoder = msgspec.json.Decoder(p.shape)

        def fold(at: float) -> Any:
            document = {"kind": "a", "x": {"value": 1}, "at": at, "from": {"name": "s"}}
            events = [decoder.decode(msgspec.json.encode(document))]
            p.normalise(events, FOREVER)
            return p.fold(events, windows)

        fold(3)
        windows.idle("", 0)

        assert len(fold(9).dropped) == 1
        assert fold(10).deltas[0].window_start == 10 * MICROSECONDS


class TestShapes:
    @pytest.mark.parametrize(
        ("window", "sentence"),
        [
            ({"kind": "sliding", "size_seconds": 10, "slide_seconds": 15}, "would be lost"),
            ({"kind": "sliding", "size_seconds": 3600, "slide_seconds": 1}, "3,600 windows"),
            ({"kind": "tumbling"}, "size_seconds"),
            ({"kind": "tumbling", "size_seconds": 0}, "sizes from"),
            ({"kind": "tumbling", "size_seconds": 1e9}, "sizes from"),
            ({"kind": "session", "size_seconds": 5}, "gap_seconds"),
            ({"kind": "none", "gap_seconds": 5}, "no size"),
        ],
    )
    def test_a_window_that_makes_no_sense_is_refused_in_a_sentence(
        self, window: dict[str, Any], sentence: str
    ) -> None:
        with pytest.raises(ValueError, match=sentence):
            Window.of(**window)

    def test_windows_are_aligned_to_the_epoch_and_hold_their_start_but_not_their_end(self) -> None:
        window = Window.of("sliding", 60, 10)

        for second in (-0.5, 0, 9.999, 10, 59.9):
            starts = window.starts(int(second * MICROSECONDS // window.pane))
            moment = second * MICROSECONDS
            assert len(starts) == 6
            assert all(s <= moment < s + window.size for s in starts)
            assert all(s % window.slide == 0 for s in starts)
