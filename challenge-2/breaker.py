"""A circuit breaker: after some failures in a row it refuses at once, and later lets one try."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable


class BreakerState(enum.Enum):
    """Whether requests go through."""

    CLOSED = "closed"  # all of them
    OPEN = "open"  # none, until the pause is over
    HALF_OPEN = "half_open"  # one, whose outcome decides


class Breaker:
    """Opens after `failures` in a row, for `pause` seconds; then one request is let through."""

    def __init__(
        self,
        failures: int = 5,
        pause: float = 10.0,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if failures < 1 or pause <= 0:
            raise ValueError("A breaker counts one failure or more, and pauses for some time.")
        self._limit = failures
        self._pause = pause
        self._clock = clock
        self._in_a_row = 0
        self._opened_at = 0.0
        self._trying = False
        self.state = BreakerState.CLOSED
        self.rejected = 0

    def seconds_left(self) -> float:
        """How long it stays open; zero if a request may go through now."""
        if self.state is BreakerState.OPEN:
            left = self._opened_at + self._pause - self._clock()
            if left > 0:
                return left
            self.state = BreakerState.HALF_OPEN
            self._trying = False
        if self.state is BreakerState.HALF_OPEN and self._trying:
            return self._pause
        return 0.0

    def admit(self) -> bool:
        """Whether a request may go through; its outcome has to be told."""
        if self.seconds_left() > 0:
            self.rejected += 1
            return False
        self._trying = self.state is BreakerState.HALF_OPEN
        return True

    def succeeded(self) -> None:
        """It was answered."""
        self._in_a_row = 0
        self._trying = False
        self.state = BreakerState.CLOSED

    def failed(self) -> None:
        """It was not."""
        self._in_a_row += 1
        if self.state is BreakerState.HALF_OPEN or self._in_a_row >= self._limit:
            self.state = BreakerState.OPEN
            self._opened_at = self._clock()
        self._trying = False

    def withdrawn(self) -> None:
        """It was cancelled before its outcome was known."""
        self._trying = False
