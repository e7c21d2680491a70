"""Streams to a downstream that limits and fails, in virtual time; and what a record must be."""

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from pydantic import ValidationError
from virtual_time import clock, run

import data_streaming_pipeline_test
from delivery import StreamProcessor
from models import ProcessedRecord
from resilience import Refused
from streaming_test_framework import (
    DownstreamAPI,
    DownstreamError,
    PipelineMetrics,
    RateLimitExceeded,
    StreamData,
    data_stream,
)

pytestmark = pytest.mark.unit
T0 = dt.datetime(2026, 1, 15, 10, tzinfo=dt.UTC)
GOOD: dict[str, Any] = {
    "record_id": "r-1", "source": "shop", "timestamp": T0, "processed_at": T0, "priority": 1,
    "processing_time_ms": 0.0, "transformed_data": {"a": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"priority": 4}, {"processing_time_ms": 3_600_000}, {"processing_time_ms": 5},
        {"processed_at": T0.astimezone(dt.timezone(dt.timedelta(hours=5)))},
        {"timestamp": "2026-01-15T09:59:59Z"}, {"transformed_data": {"a": 0, "b": None}},
    ],
)  # fmt: skip
def test_a_record_that_says_what_it_must_is_valid(changes: dict[str, Any]) -> None:
    assert ProcessedRecord(**{**GOOD, **changes}).source == "shop"


@pytest.mark.parametrize(
    "changes",
    [
        {"priority": 0}, {"priority": 5}, {"priority": True}, {"priority": "1"}, {"priority": 1.5},
        {"processing_time_ms": -0.1}, {"processing_time_ms": float("nan")},
        {"processing_time_ms": float("inf")}, {"processing_time_ms": 3_600_000.1},
        {"processing_time_ms": True},
        {"processed_at": T0 - dt.timedelta(microseconds=1)},
        {"processed_at": T0.replace(tzinfo=None)}, {"timestamp": T0.replace(tzinfo=None)},
        {"source": ""}, {"source": " \t"}, {"record_id": " "},
        {"transformed_data": {}}, {"transformed_data": {"a": " "}}, {"transformed_data": "  "},
        {"transformed_data": {" ": 1}}, {"transformed_data": {"a": float("nan")}},
        {"transformed_data": {"a": object()}}, {"transformed_data": None},
        {"transformed_data": {"a": {"b": None}}}, {"transformed_data": {"a": [" ", {}]}},
        {"transformed_data": {"a": "\ud800"}}, {"source": "\u200b"},
    ],
)  # fmt: skip
def test_any_other_record_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ProcessedRecord(**{**GOOD, **changes})


def element(number: int, **changes: Any) -> StreamData:
    given = {"id": f"e-{number}", "source": "s", "timestamp": T0, "data": {"n": number}}
    return StreamData(**{**given, **changes})


async def elements(count: int, pause: float = 0.0) -> AsyncIterator[StreamData]:
    for number in range(count):
        if pause:
            await asyncio.sleep(pause)
        yield element(number)


class Watched(DownstreamAPI):
    """Looks at the backlog at every call."""

    processor: StreamProcessor

    def __init__(self, **options: Any) -> None:
        super().__init__(clock=clock, **options)
        self.backlogs: list[int] = []

    async def send_data(self, record: ProcessedRecord) -> bool:
        self.backlogs.append(self.processor.metrics.backlog_size)
        return await super().send_data(record)


def process(
    streams: Callable[[], list[AsyncIterator[StreamData]]],
    downstream: Callable[[], Any] | None = None,
    *,
    seconds: float | None = None,
    drain_seconds: float | None = None,
    kind: type[StreamProcessor] = StreamProcessor,
    **options: Any,
) -> tuple[StreamProcessor, Any]:
    async def main() -> tuple[StreamProcessor, Any]:
        api = (downstream or Watched)()
        processor = kind(streams(), api, clock=clock, **options)
        api.processor = processor
        await processor.run(seconds, drain_seconds=drain_seconds)
        return processor, api

    return run(main())


def endless(source: str = "s", *, per_second: float = 0) -> AsyncIterator[StreamData]:
    return data_stream(source, per_second=per_second)


class TestProcessor:
    @pytest.mark.parametrize(("told", "share"), [(10, 0.95), (None, 0.85)])
    @pytest.mark.parametrize("seed", range(5))
    def test_of_what_a_limited_downstream_admits_nearly_all_is_used(
        self, told: float | None, share: float, seed: int
    ) -> None:
        processor, api = process(
            lambda: [endless("a", per_second=5), endless("b"), endless("c", per_second=2)],
            lambda: Watched(seed=seed),
            seconds=30, drain_seconds=0, rate_limit=told,
        )  # fmt: skip
        metrics = processor.metrics

        assert api.admitted >= share * 10 * 30
        assert metrics.total_processed >= share * 0.80 * 10 * 30  # about 15 % of calls fail
        assert api.rate_limit_hits <= 0.05 * api.calls  # nobody is hammered
        assert max(api.backlogs) <= metrics.max_backlog_size <= 100
        assert metrics.backlog_size + metrics.total_processed == metrics.total_pulled

    @pytest.mark.parametrize("seed", range(10))
    def test_every_record_is_accepted_once_although_answers_get_lost(self, seed: int) -> None:
        processor, api = process(
            lambda: [elements(200), data_stream("b", per_second=0, count=100)],
            lambda: Watched(seed=seed, rate_limit=50),
        )
        metrics = processor.metrics

        assert metrics.total_processed + metrics.dead_lettered == 300
        assert metrics.final_error_rate <= 0.01
        assert 0.05 < metrics.error_rate < 0.25
        assert api.duplicates > 0  # sent again, and known again
        assert len(api.accepted) >= metrics.total_processed
        assert metrics.backlog_size == 0

    def test_streams_are_not_asked_for_more_than_there_is_room_for(self) -> None:
        pulled = 0

        async def counting() -> AsyncIterator[StreamData]:
            nonlocal pulled
            while True:
                pulled += 1
                yield element(pulled)

        processor, _ = process(
            lambda: [counting(), counting()], seconds=5, drain_seconds=0, max_backlog=7
        )

        assert processor.metrics.max_backlog_size <= 7
        assert pulled <= processor.metrics.total_processed + 7

    def test_a_slow_stream_holds_up_no_other(self) -> None:
        processor, _ = process(
            lambda: [elements(3, pause=100), elements(50)], lambda: Watched(error_rate=0)
        )

        assert processor.metrics.total_processed == 53

    def test_after_its_attempts_a_record_is_dead_lettered_with_the_reason(self) -> None:
        told: list[Any] = []
        processor, api = process(
            lambda: [elements(3)], lambda: Watched(error_rate=1.5, rate_limit=1000),
            attempts=3, on_dead_letter=told.append,
        )  # fmt: skip
        assert api.calls == 9
        assert [dead.kind for dead in processor.dead_letters] == ["downstream"] * 3
        assert list(processor.dead_letters) == told
        assert processor.metrics.final_error_rate == 1

    def test_what_cannot_be_a_record_is_dead_lettered_and_not_sent(self) -> None:
        late = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
        naive = T0.replace(tzinfo=None)
        bad = [element(1, priority=0), element(2, data={}, source=" "), element(5, priority=True),
               element(3, timestamp=late), element(4, timestamp=naive)]  # fmt: skip

        async def stream() -> AsyncIterator[StreamData]:
            for each in (*bad, element(6)):
                yield each

        processor, api = process(lambda: [stream()], lambda: Watched(error_rate=0))

        assert [dead.data for dead in processor.dead_letters] == bad
        assert {dead.kind for dead in processor.dead_letters} == {"invalid"}
        assert list(api.accepted) == ["e-6"]

    def test_a_transformation_or_downstream_that_breaks_costs_its_record_only(self) -> None:
        class Breaking(StreamProcessor):
            async def transform_data(self, data: StreamData) -> dict[str, Any]:
                if data.id == "e-1":
                    raise ZeroDivisionError
                return {"doubled": data.data["n"] * 2}

        class Odd(Watched):
            async def send_data(self, record: ProcessedRecord) -> bool:
                if record.record_id == "e-2":
                    raise KeyError("secret")
                if record.record_id == "e-3":
                    raise Refused("http_400", "no")
                return await super().send_data(record)

        processor, api = process(lambda: [elements(5)], lambda: Odd(error_rate=0), kind=Breaking)

        dead = {each.data.id: (each.kind, each.message) for each in processor.dead_letters}
        assert dead == {"e-1": ("error", "ZeroDivisionError."), "e-2": ("error", "KeyError."),
                        "e-3": ("http_400", "no")}  # fmt: skip
        assert {r.transformed_data["doubled"] for r in api.accepted.values()} == {0, 8}

    def test_a_downstream_that_is_down_for_a_minute_loses_nobody(self) -> None:
        class Down(Watched):
            async def send_data(self, record: ProcessedRecord) -> bool:
                if 1002 < clock() < 1062:
                    raise DownstreamError
                return await super().send_data(record)

        processor, api = process(lambda: [elements(60)], lambda: Down(error_rate=0))

        assert processor.metrics.total_processed == len(api.accepted) == 60
        assert processor.guard.breaker.openings >= 1

    def test_more_streams_than_places_is_a_sentence(self) -> None:
        with pytest.raises(ValueError, match="Raise max_backlog"):
            StreamProcessor([elements(1) for _ in range(3)], DownstreamAPI(), max_backlog=2)

    def test_metrics_are_live(self) -> None:
        async def main() -> list[tuple[int, float]]:
            processor = StreamProcessor([endless()], DownstreamAPI(clock=clock), clock=clock)
            running = asyncio.create_task(processor.run(4, drain_seconds=0))
            seen = []
            for _ in range(3):
                await asyncio.sleep(1)
                metrics = processor.metrics
                seen.append((metrics.total_processed, metrics.processing_rate))
            await running
            return seen

        seen = run(main())

        assert seen[0][0] < seen[1][0] < seen[2][0]
        assert all(rate > 4 for _, rate in seen)

    def test_a_stream_that_breaks_is_an_error_and_the_rest_is_delivered(self) -> None:
        async def broken() -> AsyncIterator[StreamData]:
            yield element(1)
            raise OSError("the stream broke")

        async def main() -> tuple[Any, StreamProcessor]:
            processor = StreamProcessor(
                [broken(), elements(30)], DownstreamAPI(clock=clock), clock=clock
            )
            with pytest.raises(OSError, match="broke") as raised:
                await processor.run()
            return raised, processor

        _, processor = run(main())

        assert processor.metrics.total_processed == 31


class TestFramework:
    def test_the_downstream_admits_its_limit_and_says_when_there_is_room(self) -> None:
        async def main() -> tuple[DownstreamAPI, float]:
            api = DownstreamAPI(5, 0, clock=clock)
            record = ProcessedRecord(**GOOD)
            assert await api.send_data(record)
            for _ in range(4):
                assert not await api.send_data(record)
            with pytest.raises(RateLimitExceeded) as raised:
                await api.send_data(record)
            wait = raised.value.retry_after
            assert wait is not None
            await asyncio.sleep(wait)
            await api.send_data(record)
            return api, wait

        api, wait = run(main())

        assert 0 < wait < 1.01
        assert (len(api.accepted), api.duplicates, api.admitted, api.calls) == (1, 5, 6, 7)

    def test_about_15_percent_of_the_calls_fail(self) -> None:
        async def main() -> DownstreamAPI:
            api = DownstreamAPI(10**9, clock=clock)

            for _ in range(4000):
                with contextlib.suppress(DownstreamError):
                    await api.send_data(ProcessedRecord(**GOOD))
            return api

        api = run(main())

        assert 0.13 < api.failures / api.calls < 0.17

    def test_a_stream_is_the_same_for_the_same_seed(self) -> None:
        async def main(seed: int) -> list[Any]:
            return [(data.id, data.data, data.priority)
                    async for data in data_stream("x", count=20, seed=seed)]  # fmt: skip

        assert run(main(1)) == run(main(1)) != run(main(2))

    def test_figures_of_nothing_are_zero(self) -> None:
        metrics = PipelineMetrics()

        assert (metrics.processing_rate, metrics.average_processing_time_ms) == (0, 0)
        assert (metrics.error_rate, metrics.final_error_rate) == (0, 0)


class TestScenario:
    @pytest.mark.parametrize("seed", range(20))
    def test_the_ten_seconds_meet_their_targets_for_any_seed(self, seed: int) -> None:
        async def main() -> Any:
            return await data_streaming_pipeline_test.scenario(seed=seed, clock=clock)

        outcome = run(main())

        assert [text for text, met in outcome.targets() if not met] == []
        assert outcome.metrics.backlog_size == 0
        assert outcome.seconds == pytest.approx(10, abs=0.2)
