"""A topic over HTTP: once each, in order of commit, across outages, stops and kills."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.responses import JSONResponse, Response
from virtual_time import clock, run

from forwarding import DeadLetterFile, HttpDownstream, TopicForwarder
from records import ProcessedRecord
from resilience import Failed
from simulators import Behaviour, Simulation, create_app, worst_window

pytestmark = pytest.mark.unit
TAME = Behaviour(failure_rate=0, limited_rate=0, malformed_rate=0)


@dataclass(frozen=True)
class Item:
    offset: int

    @property
    def value(self) -> bytes:
        return b'{"n":%d}' % self.offset

    @property
    def next(self) -> int:
        return self.offset + 3  # offsets have gaps


@dataclass
class FakeTopic:
    count: int
    at: int = 0
    commits: list[int] = field(default_factory=list)
    refuses: bool = False

    def read(self, offset: int, limit: int) -> list[Item]:
        offsets = range(0, 3 * self.count, 3)
        return [Item(each) for each in offsets if each >= offset][: min(limit, 40)]

    def position(self) -> int:
        return self.at

    def commit(self, offset: int) -> None:
        if self.refuses:
            raise OSError(28, "No space left on device")
        assert offset > self.at
        self.at = offset
        self.commits.append(offset)


def served(behaviour: Behaviour = TAME) -> Simulation:
    return Simulation(downstream=behaviour, clock=clock)


def forward(
    topic: FakeTopic,
    application: Any,
    *,
    stop_after: float | None = None,
    check: Callable[[TopicForwarder], None] = lambda _: None,
    **options: Any,
) -> TopicForwarder:
    async def main() -> TopicForwarder:
        import asyncio

        transport = httpx2.ASGITransport(application)
        async with HttpDownstream("http://down.test/downstream/records", transport=transport) as to:
            forwarder = TopicForwarder(
                topic, to, DeadLetterFile(Path("undelivered.ndjson")), prefix="id-aggregates",
                clock=clock, **options,
            )  # fmt: skip
            if stop_after is not None:
                asyncio.get_running_loop().call_later(stop_after, forwarder.stop)
            await forwarder.run(until_empty=stop_after is None)
            check(forwarder)
            return forwarder

    return run(main())


class TestForwarding:
    @pytest.mark.parametrize("rate_limit", [None, 10])
    def test_every_message_is_accepted_once_under_a_stable_key(
        self, rate_limit: float | None
    ) -> None:
        simulation = served(
            Behaviour(failure_rate=0.1, lost_rate=0.05, limited_rate=0, malformed_rate=0,
                      limit_per_second=10)
        )  # fmt: skip
        topic = FakeTopic(200)
        forwarder = forward(topic, create_app(simulation), rate_limit=rate_limit)

        assert set(simulation.accepted) == {f"id-aggregates-{n}" for n in range(0, 600, 3)}
        assert max(simulation.accepted.values()) > 1  # an answer was lost; the key was known
        assert (forwarder.delivered, forwarder.dead, topic.at) == (200, 0, 600)
        assert worst_window(simulation.admitted) <= 10
        assert forwarder.guard.tally.limited <= 25

    @pytest.mark.parametrize("stop_after", [0.0, 0.4, 1.0, 2.3, 5.0, 8.1])
    def test_stopped_anywhere_it_goes_on_where_it_stood(self, stop_after: float) -> None:
        simulation, topic = served(replace(TAME, failure_rate=0.15)), FakeTopic(120)
        first = forward(topic, create_app(simulation), stop_after=stop_after, rate_limit=20)
        committed = topic.at

        for offset in range(0, committed, 3):
            assert f"id-aggregates-{offset}" in simulation.accepted

        second = forward(topic, create_app(simulation), rate_limit=20)

        assert len(simulation.accepted) == 120
        assert topic.at == 360
        assert first.delivered + second.delivered <= 120 + 100  # what was undecided comes again
        assert second.delivered == 120 - committed // 3

    def test_the_offset_never_passes_an_undecided_message(self) -> None:
        async def slow_first(scope: Any, receive: Any, send: Any) -> None:
            import asyncio

            headers = dict(scope["headers"])
            if headers[b"idempotency-key"].endswith(b"-0"):
                await asyncio.sleep(6)
                assert topic.commits == []
            await Response(status_code=204)(scope, receive, send)

        topic = FakeTopic(50)
        forward(topic, slow_first, rate_limit=100)

        assert topic.at == 150

    def test_an_outage_of_an_hour_gives_nothing_up(self) -> None:
        async def down(scope: Any, receive: Any, send: Any) -> None:
            if clock() < 1000 + 3600:
                raise httpx2.ConnectError("refused")
            await app(scope, receive, send)

        simulation, topic = served(), FakeTopic(30)
        app = create_app(simulation)
        forwarder = forward(topic, down)

        assert (forwarder.delivered, forwarder.dead) == (30, 0)
        assert forwarder.guard.tally.attempts < 300  # a probe now and then, no hammering

    def test_what_is_refused_or_used_up_is_kept_with_the_reason_and_does_not_block(self) -> None:
        async def picky(scope: Any, receive: Any, send: Any) -> None:
            key = dict(scope["headers"])[b"idempotency-key"]
            status = {b"3": 422, b"6": 500, b"9": 307}.get(key.rpartition(b"-")[2], 200)
            await JSONResponse({}, status, {"location": "/"})(scope, receive, send)

        topic = FakeTopic(20)
        forwarder = forward(topic, picky, rate_limit=100)

        kept = [json.loads(line) for line in Path("undelivered.ndjson").read_text().splitlines()]
        assert {line["offset"]: (line["kind"], line["value"]) for line in kept} == {
            3: ("http_422", '{"n":3}'), 6: ("http_500", '{"n":6}'), 9: ("http_307", '{"n":9}')
        }  # fmt: skip
        assert Path("undelivered.ndjson").stat().st_mode & 0o777 == 0o600
        assert (forwarder.delivered, forwarder.dead, topic.at) == (17, 3, 60)

    def test_a_disk_that_refuses_the_offset_ends_it_with_the_error(self) -> None:
        topic = FakeTopic(10, refuses=True)
        with pytest.raises(OSError, match="No space"):
            forward(topic, create_app(served()))

    def test_an_endless_answer_is_left_after_a_bounded_part(self) -> None:
        pieces = 0

        class Endless(httpx2.AsyncByteStream):
            async def __aiter__(self) -> Any:
                nonlocal pieces
                while True:
                    pieces += 1
                    yield bytes(8192)

        class Transport(httpx2.AsyncBaseTransport):
            async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
                return httpx2.Response(200, stream=Endless())

        async def main() -> None:
            async with HttpDownstream("http://x.test/", transport=Transport()) as downstream:
                await downstream.post("k", b"{}")

        run(main())
        assert pieces < 20

    def test_records_of_a_stream_can_be_sent_there_too(self) -> None:
        got: list[Any] = []

        async def take(scope: Any, receive: Any, send: Any) -> None:
            got.append((dict(scope["headers"])[b"idempotency-key"],
                        json.loads((await receive())["body"])))  # fmt: skip
            await Response(status_code=500 if len(got) == 2 else 201)(scope, receive, send)

        record = ProcessedRecord.model_validate(
            {"record_id": "r-1", "source": "s", "timestamp": "2026-01-15T10:00:00Z",
             "processed_at": "2026-01-15T10:00:01Z", "priority": 2, "processing_time_ms": 1.0,
             "transformed_data": {"a": 1}}
        )  # fmt: skip

        async def main() -> None:
            transport = httpx2.ASGITransport(take)
            async with HttpDownstream("http://x.test/", transport=transport) as downstream:
                await downstream.send_data(record)
                with pytest.raises(Failed):
                    await downstream.send_data(record)

        run(main())

        assert got[0][0] == b"r-1"
        assert got[0][1]["transformed_data"] == {"a": 1}
