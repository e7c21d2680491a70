"""Rates and percentiles of the last minute, in constant memory."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

HALF_SECONDS: Final = 30.0
RATE_SECONDS: Final = 10
# Bucket bounds grow by a tenth from 10 microseconds to 200 s, so a percentile is right within 10 %.
BOUNDS: Final = [1e-5 * 1.1**n for n in range(178)]


@dataclass(frozen=True)
class Percentiles:
    """Of the last 30 to 60 seconds, in milliseconds; None where nothing was measured."""

    count: int
    p50: float | None
    p95: float | None
    p99: float | None


class Latencies:
    """A histogram in two halves of 30 s each, the older of which is forgotten."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = clock()
        self._new = [0] * (len(BOUNDS) + 1)
        self._old = [0] * (len(BOUNDS) + 1)

    def add(self, seconds: float, now: float, times: int = 1) -> None:
        """Note a duration."""
        if now - self._since >= HALF_SECONDS:
            self._turn(now)
        self._new[bisect_right(BOUNDS, seconds)] += times

    def _turn(self, now: float) -> None:
        empty = [0] * (len(BOUNDS) + 1)
        self._old = self._new if now - self._since < 2 * HALF_SECONDS else empty
        self._new = [0] * (len(BOUNDS) + 1)
        self._since = now

    def percentiles(self) -> Percentiles:
        """The percentiles now."""
        now = self._clock()
        if now - self._since >= HALF_SECONDS:
            self._turn(now)
        counts = [a + b for a, b in zip(self._new, self._old, strict=True)]
        total = sum(counts)

        def at(share: float) -> float | None:
            left = share * total
            for bucket, count in enumerate(counts):
                left -= count
                if count and left <= 0:
                    return round(BOUNDS[min(bucket, len(BOUNDS) - 1)] * 1000, 3)
            return None

        return Percentiles(total, at(0.5), at(0.95), at(0.99))


class Rate:
    """Events per second over the last ten whole seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counts = [0] * (RATE_SECONDS + 1)
        self._second = int(clock())

    def add(self, count: int, now: float) -> None:
        """Count events."""
        self._move(int(now))
        self._counts[self._second % len(self._counts)] += count

    def _move(self, second: int) -> None:
        for passed in range(self._second + 1, min(second, self._second + len(self._counts)) + 1):
            self._counts[passed % len(self._counts)] = 0
        self._second = max(second, self._second)

    def per_second(self) -> float:
        """The mean of the last ten whole seconds; the one running is left out."""
        self._move(int(self._clock()))
        running = self._counts[self._second % len(self._counts)]
        return (sum(self._counts) - running) / RATE_SECONDS
