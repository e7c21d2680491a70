"""What the delivery of streams is tried against: streams of data, and a downstream that fails.

`data_stream` yields `StreamData`; `DownstreamAPI.send_data` admits so many calls per second,
answers the rest with `RateLimitExceeded`, and fails about 15 % of those it admits: some before the
record was accepted, some after, when only the answer was lost. `PipelineMetrics` are the live
figures of a processor.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from limiter import Clock
from records import ProcessedRecord
from resilience import Failed, Limited

SOURCES = ("sensors", "orders", "clicks")


@dataclass(frozen=True)
class StreamData:
    """One element of a stream; `id` stays the same however often it is sent."""

    id: str
    source: str
    timestamp: datetime
    data: dict[str, Any]
    priority: int = 2


@dataclass
class PipelineMetrics:
    """The figures of a processor, live while it runs.

    The error rate is that of attempts; the final one is that of records. Processing time lasts from
    the moment a record was pulled to the moment it was accepted downstream.
    """

    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    total_pulled: int = 0
    total_processed: int = 0
    dead_lettered: int = 0
    attempts: int = 0
    failed_attempts: int = 0
    retries: int = 0
    rate_limit_hits: int = 0
    backlog_size: int = 0
    max_backlog_size: int = 0
    in_flight: int = 0
    processing_ms: float = 0.0  # of all processed records together

    @property
    def processing_rate(self) -> float:
        """Processed records per second."""
        return self.total_processed / self.seconds if self.seconds else 0.0

    @property
    def average_processing_time_ms(self) -> float:
        """Of a processed record."""
        return self.processing_ms / self.total_processed if self.total_processed else 0.0

    @property
    def error_rate(self) -> float:
        """Failed attempts among the attempts that were admitted."""
        return self.failed_attempts / self.attempts if self.attempts else 0.0

    @property
    def final_error_rate(self) -> float:
        """Records that were given up among those that were decided."""
        decided = self.total_processed + self.dead_lettered
        return self.dead_lettered / decided if decided else 0.0


class RateLimitExceeded(Limited):
    """More calls than the downstream admits; `retry_after` seconds from now there is room."""


class DownstreamError(Failed):
    """The call failed, or its answer was lost: the record may have been accepted, or not."""

    def __init__(self, message: str = "The downstream failed.") -> None:
        super().__init__("downstream", message)


class DownstreamAPI:
    """Somebody to deliver to: at most `rate_limit` calls in a second, of which a share fails."""

    def __init__(
        self,
        rate_limit: int = 10,
        error_rate: float = 0.15,
        *,
        latency_seconds: tuple[float, float] = (0.01, 0.04),
        seed: int = 7,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.rate_limit = rate_limit
        self.error_rate = error_rate
        self.accepted: dict[str, ProcessedRecord] = {}
        self.calls = self.admitted = self.failures = self.rate_limit_hits = self.duplicates = 0
        self._latency_seconds = latency_seconds
        self._chance = random.Random(seed)  # noqa: S311  (reproducible test data)
        self._recent: deque[float] = deque()
        self._clock = clock
        self._sleep = sleep

    async def send_data(self, record: ProcessedRecord) -> bool:
        """Accept a record once; False when it was there already.

        Raises RateLimitExceeded before anything else happens, or DownstreamError.
        """
        self.calls += 1
        now = self._clock()
        while self._recent and self._recent[0] < now - 1:
            self._recent.popleft()
        if len(self._recent) >= self.rate_limit:
            self.rate_limit_hits += 1
            raise RateLimitExceeded(self._recent[0] + 1.001 - now)
        self._recent.append(now)
        self.admitted += 1
        fate = self._chance.random()
        await self._sleep(self._chance.uniform(*self._latency_seconds))
        if fate < self.error_rate * 2 / 3:
            self.failures += 1
            raise DownstreamError
        is_new = record.record_id not in self.accepted
        self.duplicates += not is_new
        self.accepted.setdefault(record.record_id, record)
        if fate < self.error_rate:
            self.failures += 1
            raise DownstreamError("The answer was lost.")
        return is_new


async def data_stream(
    source: str = "sensors",
    *,
    per_second: float = 3.0,
    count: int | None = None,
    seed: int = 7,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncIterator[StreamData]:
    """Data as it comes: irregular, without an end unless `count` is given."""
    chance = random.Random(f"{seed}:{source}")  # noqa: S311  (reproducible test data)
    number = 0
    while count is None or number < count:
        number += 1
        yield StreamData(
            id=f"{source}-{seed}-{number}",
            source=source,
            timestamp=datetime.now(UTC),
            data={"value": round(chance.gauss(20, 5), 3), "sequence": number},
            priority=chance.randint(1, 4),
        )
        await sleep(chance.expovariate(per_second) if per_second else 0)
