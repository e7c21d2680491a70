"""Seconds that something took, less those for which a busy machine let nobody run."""

import threading
import time

TICK_SECONDS = 0.005
LONGEST_SECONDS = 60.0


class Stopwatch:
    """Started when it is made; `seconds()` stops it.

    A thread of its own sleeps in short ticks: what they take longer than they should is what the
    machine kept from everybody here.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._kept_waiting = 0.0
        threading.Thread(target=self._tick, name="stopwatch", daemon=True).start()

    def _tick(self) -> None:
        before = self._began
        while not self._stop.wait(TICK_SECONDS) and before - self._began < LONGEST_SECONDS:
            now = time.monotonic()
            self._kept_waiting += max(0.0, now - before - TICK_SECONDS)
            before = now

    def wall_seconds(self) -> float:
        return time.monotonic() - self._began

    def seconds(self) -> float:
        self._stop.set()
        return self.wall_seconds() - self._kept_waiting
