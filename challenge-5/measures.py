"""Figures of the running scheduler: throughput, utilisation, and how long tasks wait."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from backends import Place

WINDOW_SECONDS = 60
WAITS = 4096


@dataclass(frozen=True)
class Figures:
    """A consistent look at the engine; the counts are those of the stored tasks."""

    counts: dict[str, int]
    queued_by_priority: dict[str, int]
    places: list[Place]
    slots: dict[str, int]
    busy_seconds: dict[str, float]
    utilisation: float
    per_second: float
    ended: int
    waits: list[float]
    worker_deaths: int
    threads_abandoned: int
    commits: int
    store_works: bool


class Meter:
    """Counts ended tasks by second, samples busy time, and keeps the latest queue waits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._ended: deque[tuple[int, int]] = deque()  # (second, tasks that ended in it)
        self._busy: deque[tuple[float, float]] = deque()  # (moment, busy seconds until then)
        self.waits: deque[float] = deque(maxlen=WAITS)
        self.total = 0

    def count(self, number: int) -> None:
        """So many tasks have ended now."""
        self.total += number
        second = int(self._clock())
        if self._ended and self._ended[-1][0] == second:
            self._ended[-1] = (second, self._ended[-1][1] + number)
        else:
            self._ended.append((second, number))
            while self._ended[0][0] < second - WINDOW_SECONDS:
                self._ended.popleft()

    def per_second(self) -> float:
        """Ended tasks per second of the last minute, or of the time since the start."""
        now = self._clock()
        since = max(now - WINDOW_SECONDS, self._began)
        recent = sum(n for second, n in self._ended if second >= int(since))
        return recent / max(now - since, 1.0)

    def sample(self, busy_seconds: Callable[[], float]) -> None:
        """Note the busy time so far, at most once a second."""
        now = self._clock()
        if not self._busy or now - self._busy[-1][0] >= 1:
            self._busy.append((now, busy_seconds()))
            while now - self._busy[0][0] > WINDOW_SECONDS:
                self._busy.popleft()

    def utilisation(self, busy_seconds: float, slots: int) -> float:
        """Busy time / (slots x time) over the last minute, or since the start."""
        now = self._clock()
        since, before = self._busy[0] if self._busy else (self._began, 0.0)
        elapsed = now - since
        if elapsed <= 0 or slots == 0:
            return 0.0
        return min(max((busy_seconds - before) / (elapsed * slots), 0.0), 1.0)


def percentile(values: Sequence[float], fraction: float) -> float | None:
    """The value below which that part of the values lies; None of none."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, math.ceil(fraction * len(ordered)) - 1)]
