"""Deliver to somebody who limits and fails: everything once, nothing lost, nobody hammered.

    streams -> room (backlog <= 100) -> transform -> validate -> Guard (rate, retries) -> downstream
                 ^ backpressure                                         |
                 +---------------- accepted, or dead-lettered ----------+

    python delivery.py --topic aggregates --to URL [--rate-limit 10]

delivers the messages of a queue topic as a named consumer, with the service running or stopped.
"""

from stopping import on_stop_signals, remember_stop_signals

if __name__ == "__main__":  # the imports below take half a second
    remember_stop_signals()

import argparse
import asyncio
import inspect
import re
import sqlite3
import sys
import time
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import structlog
from pydantic import ValidationError

from commands import configure_logs, service_settings
from forwarding import DeadLetterFile, HttpDownstream, TopicForwarder, identity_of
from holder import Held, Holder
from limiter import Clock, Slot, limiter_of
from records import ProcessedRecord
from resilience import Breaker, CallError, Guard
from spool import QueueError, make_directory
from storage import StoreError, StoreRefused
from streaming_test_framework import PipelineMetrics, StreamData
from topics import TOPICS, Item, Topics

log = structlog.stdlib.get_logger("delivery")

ATTEMPTS: Final = 7  # of a record: at 15 % failures one in 600,000 is given up
BREAKER_FAILURES: Final = 10  # in a row: not bad luck any more
GUARD_SECONDS: Final = 0.02
KEPT_DEAD_LETTERS: Final = 10_000
HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
HEADER_VALUE: Final = re.compile(r"[\x20-\x7e\t]*")
PROGRESS_SECONDS: Final = 2.0


class Downstream(Protocol):
    """Somebody to deliver to."""

    async def send_data(self, record: ProcessedRecord) -> Any:
        """Accept a record once; raise Limited, Failed or Refused (see resilience.py)."""
        ...


@dataclass(frozen=True)
class DeadRecord:
    """A record that was not delivered, and why."""

    data: StreamData
    kind: str
    message: str


def delivery_guard(
    rate_limit: float | None, *, clock: Clock = time.monotonic, attempts: int = ATTEMPTS,
    call_seconds: float = 10.0,
) -> Guard:  # fmt: skip
    """A guard for deliveries; without a rate it is found from the 429s."""
    limiter = limiter_of(rate_limit, guard_seconds=GUARD_SECONDS, clock=clock)
    breaker = Breaker(BREAKER_FAILURES, 1.0, clock=clock)
    return Guard(limiter, breaker, attempts=attempts, call_seconds=call_seconds)


class StreamProcessor:
    """Consumes streams concurrently and delivers every record, at most `max_backlog` at a time.

    A stream is asked for its next element only when there is room, so what waits for the downstream
    waits in the streams. Records that cannot be valid, or were tried often enough, end in
    `dead_letters`. Override `transform_data` for your own transformation.
    """

    def __init__(
        self,
        streams: Iterable[AsyncIterable[StreamData]],
        downstream_api: Downstream,
        *,
        rate_limit: float | None = None,
        max_backlog: int = 100,
        attempts: int = ATTEMPTS,
        clock: Clock = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        on_dead_letter: Callable[[DeadRecord], None] = lambda _: None,
    ) -> None:
        self.streams = list(streams)
        if len(self.streams) > max_backlog:
            raise ValueError(
                f"{len(self.streams)} streams need a place each, but the backlog has only "
                f"{max_backlog}. Raise max_backlog."
            )
        self.downstream_api = downstream_api
        self.max_backlog = max_backlog
        self.guard = delivery_guard(rate_limit, clock=clock, attempts=attempts)
        self.dead_letters: deque[DeadRecord] = deque(maxlen=KEPT_DEAD_LETTERS)
        self.metrics = PipelineMetrics(started=clock())
        self._clock = clock
        self._now = now
        self._on_dead_letter = on_dead_letter
        self._room = asyncio.Semaphore(max_backlog)

    def transform_data(self, data: StreamData) -> Mapping[str, Any] | Awaitable[Mapping[str, Any]]:
        """What of an element is delivered; may be a coroutine."""
        return {**data.data, "source": data.source}

    async def run(
        self, seconds: float | None = None, *, drain_seconds: float | None = None
    ) -> PipelineMetrics:
        """Until the streams end, or for so many seconds; then deliver what was pulled.

        After `drain_seconds` what is still undelivered is left, and shows in `backlog_size`.
        """
        self.metrics.started = self._clock()
        deliveries: set[asyncio.Task[None]] = set()
        readers = [asyncio.create_task(self._read(each, deliveries)) for each in self.streams]
        try:
            if readers:
                await asyncio.wait(readers, timeout=seconds)
            await _ended(readers)
            if deliveries:
                await asyncio.wait(deliveries, timeout=drain_seconds)
            for reader in readers:  # a stream that broke is told once the others' records are safe
                if not reader.cancelled():
                    reader.result()
        finally:
            await _ended([*readers, *deliveries])
            self._measure()
        return self.metrics

    async def _read(
        self, stream: AsyncIterable[StreamData], deliveries: set[asyncio.Task[None]]
    ) -> None:
        elements = aiter(stream)
        while True:
            await self._room.acquire()
            try:
                data = await anext(elements)
            except StopAsyncIteration:
                self._room.release()
                return
            except BaseException:
                self._room.release()
                raise
            metrics = self.metrics
            metrics.total_pulled += 1
            metrics.backlog_size += 1
            metrics.max_backlog_size = max(metrics.max_backlog_size, metrics.backlog_size)
            task = asyncio.create_task(self._deliver(data))
            deliveries.add(task)
            task.add_done_callback(deliveries.discard)

    async def _deliver(self, data: StreamData) -> None:
        """Bring one record to its end: accepted once, or dead-lettered."""
        pulled = self._clock()
        try:
            record = await self._record(data, pulled)

            async def send(slot: Slot) -> None:
                slot.sent()
                await self.downstream_api.send_data(record)
                slot.answered()

            await self.guard.call(send)
        except asyncio.CancelledError:
            raise  # neither delivered nor given up: it stays in the backlog
        except ValidationError as error:
            self._give_up(data, "invalid", "; ".join(each["msg"] for each in error.errors()))
        except CallError as error:
            self._give_up(data, error.kind, str(error))
        except Exception as error:
            # The boundary to code that is not ours (transformation, downstream): one record fails.
            log.exception("record_failed", record=data.id, error=type(error).__name__)
            self._give_up(data, "error", f"{type(error).__name__}.")
        else:
            self.metrics.total_processed += 1
            self.metrics.processing_ms += (self._clock() - pulled) * 1000
            self._decided()

    async def _record(self, data: StreamData, pulled: float) -> ProcessedRecord:
        transformed = self.transform_data(data)
        if inspect.isawaitable(transformed):
            transformed = await transformed
        return ProcessedRecord(
            record_id=data.id,
            source=data.source,
            timestamp=data.timestamp,
            processed_at=self._now(),
            priority=data.priority,
            processing_time_ms=(self._clock() - pulled) * 1000,
            transformed_data=dict(transformed),
        )

    def _give_up(self, data: StreamData, kind: str, message: str) -> None:
        dead = DeadRecord(data, kind, message)
        self.dead_letters.append(dead)
        self._on_dead_letter(dead)
        self.metrics.dead_lettered += 1
        log.warning("record_given_up", record=data.id, kind=kind, reason=message)
        self._decided()

    def _decided(self) -> None:
        self.metrics.backlog_size -= 1
        self._room.release()
        self._measure()

    def _measure(self) -> None:
        metrics, tally = self.metrics, self.guard.tally
        metrics.seconds = self._clock() - metrics.started
        metrics.attempts = tally.attempts - tally.limited
        metrics.failed_attempts = sum(tally.failures.values())
        metrics.retries = tally.retries
        metrics.rate_limit_hits = tally.limited
        metrics.in_flight = self.guard.limiter.in_flight


async def _ended(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel what still runs, and wait for it."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)


# --- the command ------------------------------------------------------------------------------


class ConsumedTopic:
    """A topic of the message queue as one consumer reads it."""

    def __init__(self, topics: Topics, topic: str, consumer: str) -> None:
        self._topics = topics
        self._topic = topic
        self._consumer = consumer

    def read(self, offset: int, limit: int) -> Sequence[Item]:
        """The messages from an offset on."""
        return self._topics.read(self._topic, offset, limit=limit).items

    def position(self) -> int:
        """The offset the consumer has committed."""
        return self._topics.position(self._topic, self._consumer)

    def commit(self, offset: int) -> None:
        """Move it, durably."""
        self._topics.commit(self._topic, self._consumer, offset)


def main(arguments: list[str] | None = None) -> int:
    """Deliver a topic until told to stop; 0 then, 2 when it cannot start, 1 when it broke."""
    try:
        options = _parser().parse_args(arguments)
        configure_logs("ERROR" if options.quiet else "INFO")
        asyncio.run(_forward(options, _checked(options)))
    except (ValueError, StoreError, QueueError, Held) as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, sqlite3.Error, StoreRefused) as error:
        print(f"The delivery ended: {error}. What was decided is committed.", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    settings = service_settings()
    parser = argparse.ArgumentParser(
        description="Deliver the messages of a topic of the queue: one POST each.",
        epilog="The data is that of DB_PATH and QUEUE_DIR, whether the service runs or not. Every "
        "message has an Idempotency-Key that stays the same when it is sent again.",
        allow_abbrev=False,
    )
    parser.add_argument("--topic", choices=TOPICS, required=True)
    parser.add_argument("--to", required=True, metavar="URL")
    parser.add_argument("--consumer", default="delivery", help="whose offset moves (%(default)s)")
    parser.add_argument("--rate-limit", type=float, metavar="N",
                        help="calls per second (default: found from the 429s)")  # fmt: skip
    parser.add_argument("--header", action="append", default=[], metavar="'Name: value'",
                        help="sent with every message")  # fmt: skip
    parser.add_argument("--until-empty", action="store_true", help="end when all is delivered")
    parser.add_argument("--quiet", action="store_true", help="no progress; only errors")
    parser.add_argument("--db", type=Path, default=settings.db_path, help="DB_PATH (%(default)s)")
    parser.add_argument("--queue", type=Path, default=settings.queue_dir,
                        help="QUEUE_DIR (%(default)s)")  # fmt: skip
    return parser


def _checked(options: argparse.Namespace) -> dict[str, str]:
    """The headers to send; raises ValueError for options that make no sense."""
    if not _is_http(options.to):
        raise ValueError("--to needs an absolute http or https URL.")
    if options.rate_limit is not None and not 0 < options.rate_limit <= 10_000:
        raise ValueError("--rate-limit is a number of calls per second, up to 10,000.")
    return dict(_header(text) for text in options.header)


def _header(text: str) -> tuple[str, str]:
    name, colon, value = (part.strip(" \t") for part in text.partition(":"))
    if not colon or not HEADER_NAME.fullmatch(name) or not HEADER_VALUE.fullmatch(value):
        raise ValueError("--header needs the form 'Name: value', in ASCII.")
    if name.lower() in ("content-type", "content-length", "host", "idempotency-key"):
        raise ValueError(f"--header cannot set {name}: every message has its own.")
    return name, value


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        return False


async def _forward(options: argparse.Namespace, headers: Mapping[str, str]) -> None:
    with ExitStack() as stack:
        topics = stack.enter_context(Topics.open(options.db, options.queue))
        topic = ConsumedTopic(topics, options.topic, options.consumer)
        position, end = topic.position(), topics.state(options.topic).next
        if position > end:
            raise ValueError(
                f"The consumer {options.consumer} stands at {position:,}, but the topic ends at "
                f"{end:,}: DB_PATH and QUEUE_DIR do not belong together."
            )
        kept = options.queue / "undelivered"
        make_directory(kept)
        name = f"{options.topic}-{options.consumer}"
        stack.callback(_only_one(kept / f"{name}.lock", options.consumer).release)
        async with HttpDownstream(options.to, headers=headers) as downstream:
            forwarder = TopicForwarder(
                topic,
                downstream,
                DeadLetterFile(kept / f"{name}.ndjson"),
                prefix=f"{identity_of(options.db)}-{options.topic}",
                rate_limit=options.rate_limit,
            )
            on_stop_signals(lambda _: forwarder.stop())
            await _run(forwarder, options)


def _only_one(path: Path, consumer: str) -> Holder:
    try:
        return Holder(path)
    except Held:
        raise ValueError(
            f"The consumer {consumer} is at work already; give this one another --consumer."
        ) from None


async def _run(forwarder: TopicForwarder, options: argparse.Namespace) -> None:
    progress = None if options.quiet else asyncio.create_task(_progress(forwarder))
    try:
        await forwarder.run(until_empty=options.until_empty)
    finally:
        if progress is not None:
            progress.cancel()
            print(_figures(forwarder), flush=True)


async def _progress(forwarder: TopicForwarder) -> None:
    shown = ""
    while True:
        await asyncio.sleep(PROGRESS_SECONDS)
        if (figures := _figures(forwarder)) != shown:
            shown = figures
            print(figures, flush=True)


def _figures(forwarder: TopicForwarder) -> str:
    tally = forwarder.guard.tally
    return (
        f"{forwarder.delivered} delivered, {forwarder.waiting} waiting, {forwarder.dead} given up, "
        f"{tally.retries} retries, {tally.limited} times over the limit, breaker "
        f"{forwarder.guard.breaker.state}, offset {forwarder.position}"
    )


if __name__ == "__main__":
    sys.exit(main())
