"""How long a run may go on, and what it did with its time."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from metering import running_op

CHECK_ROWS = 256  # rows between two looks at the clock
SAMPLES = 8  # looks at what a run is doing, in its time


class Stopped(Exception):
    """A run was ended: its time was up, nobody waits for it any more, or the service stops."""


class Budget:
    """The time of a run. Who runs it looks at the clock; who waits may look at what it is doing."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._deadline = clock() + seconds
        self.left = threading.Event()  # nobody waits for it any more
        self.stopping = threading.Event()  # the service ends
        self._thread: int | None = None
        self._seen: Counter[int] = Counter()

    def over(self) -> bool:
        """Whether to stop."""
        return self.left.is_set() or self.stopping.is_set() or self._clock() > self._deadline

    def check(self) -> None:
        """Stop if it is time."""
        if self.over():
            raise Stopped(f"It ran for more than {self.seconds:g} s.")

    def watch(self, rows: Iterable[Any]) -> Iterator[Any]:
        """The rows, with a look at the clock now and then."""
        self.check()
        for number, row in enumerate(rows):
            if number % CHECK_ROWS == 0:
                self.check()
            yield row

    def __enter__(self) -> "Budget":
        """From here on this thread is the one that runs."""
        self._thread = threading.get_ident()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread = None

    def sample(self) -> None:
        """Note which operation is running just now; from any other thread."""
        thread = self._thread
        if thread is not None:
            self._seen[running_op(sys._current_frames().get(thread)) or 0] += 1

    def busiest(self) -> int:
        """The number of the operation that was seen most often; 0: the source, or nothing yet."""
        return max(self._seen, key=lambda number: self._seen[number], default=0)
