"""Counts and times per operation, for `explain(analyze=True)`."""

import time
from collections.abc import Callable, Iterator
from typing import Any


class Meter:
    """Counts what leaves each operation, and the time spent in it alone. 0 is the source."""

    def __init__(self, ops: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.counts = [0] * (ops + 1)
        self.seconds = [0.0] * (ops + 1)
        self.clock = clock

    def start(self) -> tuple[float, float]:
        """The time, and how much of it others have spent so far."""
        return self.clock(), sum(self.seconds)

    def stop(self, number: int, started: tuple[float, float]) -> None:
        """Book the time since, except what others have spent meanwhile."""
        now, others = self.start()
        self.seconds[number] += (now - started[0]) - (others - started[1])

    def measure(self, iterable: Any, number: int, *, counts: bool = True) -> Iterator[Any]:
        """The same elements, counted and timed for one operation."""
        iterator: Iterator[Any] = iter(iterable)
        try:
            while True:
                started = self.start()
                try:
                    value = next(iterator)
                except StopIteration:
                    return
                finally:
                    self.stop(number, started)
                self.counts[number] += counts
                yield value
        finally:
            if hasattr(iterable, "close"):
                iterable.close()
