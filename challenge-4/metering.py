"""Counts and times per operation, for `explain(analyze=True)`; and which one runs just now."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
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


def running_op(frame: FrameType | None) -> int | None:
    """The number of the operation that runs in these frames; None: none, such as the source.

    It is read from the lines of the generated code, so that nothing has to be noted down for it.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<lazy chain"):
            owner: int | None = frame.f_globals["OWNERS"][frame.f_lineno]
            return None if owner is None else int(frame.f_locals["run"].numbers[owner])
        if frame.f_code.co_filename == _GROUPING and "number" in frame.f_locals:
            return int(frame.f_locals["number"])
        frame = frame.f_back
    return None


_GROUPING = str(Path(__file__).with_name("grouping.py"))
