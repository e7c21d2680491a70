"""What makes a caller polite and patient with one service that fails and limits.

    breaker: may I? -> limiter: when? -> the call, with a deadline -> again after 0.5, 1 and 2 s

`Guard.call` is that line; `Breaker` and `RateLimiter` (limiter.py) are state machines with an
injected clock.
A 429 pauses the limiter and costs neither an attempt nor the breaker's patience.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Container
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeVar

import stamina
import structlog

from limiter import NEVER, Clock, RateLimiter, Slot

stamina.instrumentation.set_on_retry_hooks(())  # every retry is counted and logged by its Guard

T = TypeVar("T")

RETRY_SECONDS: Final = (
    0.5,
    1.0,
    2.0,
)  # before the 2nd, 3rd and 4th attempt; later ones like the last


class CallError(Exception):
    """A call did not give what it should; `kind` is a word to count it by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Failed(CallError):
    """It may work the next time: counted by the breaker, and tried again."""


class Refused(CallError):
    """The service works and says no: trying again would not help."""


class StillDown(CallError):
    """The service stayed down for as many probes as the breaker has patience for."""


class Limited(Exception):
    """The service asks for a pause (429) of so many seconds, if it said."""

    def __init__(self, retry_after: float | None = None) -> None:
        super().__init__(f"Asked to pause for {retry_after} s.")
        self.retry_after = retry_after


class State(StrEnum):
    """Of a breaker."""

    CLOSED = "closed"  # calls pass
    OPEN = "open"  # nobody passes until the recovery time is over
    HALF_OPEN = "half-open"  # one probe is out, or may be sent; everybody else waits


class Breaker:
    """Opens at so many failures in a row, then lets exactly one probe through at a time.

    `admit` hands out the generation of the state; an outcome reported with an older one is that of
    a call that began before the state changed, and does not count. Every failed probe doubles the
    recovery time; after `patience` of them in a row, `enter` raises StillDown instead of waiting.
    """

    def __init__(
        self,
        failures: int = 3,
        recovery_seconds: float = 2.0,
        *,
        longest_seconds: float = 30.0,
        patience: int | None = None,
        clock: Clock = time.monotonic,
        on_change: Callable[[State], None] = lambda _: None,
    ) -> None:
        self.failures = failures
        self.recovery_seconds = recovery_seconds
        self.longest_seconds = longest_seconds
        self.patience = patience
        self.state = State.CLOSED
        self.openings = 0
        self.failed_probes = 0  # in a row
        self.generation = 0
        self._in_a_row = 0
        self._opens_until = NEVER
        self._probing = False
        self._clock = clock
        self._on_change = on_change
        self._changed = asyncio.Event()

    def admit(self) -> int | None:
        """A ticket for one call, or None: not now."""
        if self.state is State.OPEN and self._clock() >= self._opens_until:
            self._turn(State.HALF_OPEN)
        if self.state is State.CLOSED:
            return self.generation
        if self.state is State.HALF_OPEN and not self._probing:
            self._probing = True
            return self.generation
        return None

    async def enter(self) -> int:
        """Wait for a ticket; raise StillDown when patience has run out."""
        while True:
            if self.patience is not None and self.failed_probes >= self.patience:
                raise StillDown(
                    "down", f"It failed {self.failed_probes} probes in a row and was given up."
                )
            if (ticket := self.admit()) is not None:
                return ticket
            wait = None if self.state is State.HALF_OPEN else self._opens_until - self._clock()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._changed.wait()

    def is_current(self, ticket: int) -> bool:
        """Whether the state is still that of the ticket."""
        return ticket == self.generation

    def is_probe(self, ticket: int) -> bool:
        """Whether this ticket is that of the one probe that is out."""
        return self._probing and ticket == self.generation

    def success(self, ticket: int) -> None:
        """The service works: it closes."""
        if not self.is_current(ticket):
            return
        self._in_a_row = 0
        if self.state is State.HALF_OPEN:
            self.failed_probes = 0
            self._turn(State.CLOSED)

    def failure(self, ticket: int) -> None:
        """One failure more: in a row they open it, a failed probe does at once."""
        if not self.is_current(ticket):
            return
        self._in_a_row += 1
        if self.state is State.HALF_OPEN:
            self.failed_probes += 1
            self._open()
        elif self._in_a_row >= self.failures:
            self._open()

    def release(self, ticket: int) -> None:
        """The call ended without a verdict (429, cancelled): the next one may probe."""
        if self.is_probe(ticket):
            self._probing = False
            self._notify()

    def _open(self) -> None:
        self.openings += 1
        pause = min(self.recovery_seconds * 2**self.failed_probes, self.longest_seconds)
        self._opens_until = self._clock() + pause
        self._turn(State.OPEN)

    def _turn(self, state: State) -> None:
        self.state = state
        self.generation += 1
        self._probing = False
        self._in_a_row = 0
        self._on_change(state)
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


@dataclass
class Tally:
    """What became of the calls of one guard."""

    attempts: int = 0
    retries: int = 0
    succeeded: int = 0
    limited: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    backoffs: list[float] = field(default_factory=list)  # the first hundred, in seconds


class Guard:
    """Calls one service: breaker, rate, deadline, retries.

    A probe that fails with one of the `patient_with` kinds (no connection, 503) is the service's
    fault and not the item's: it costs the item no attempt, so that an outage of any length uses up
    nobody's attempts.
    """

    def __init__(
        self,
        limiter: RateLimiter,
        breaker: Breaker,
        *,
        attempts: int = 1 + len(RETRY_SECONDS),
        call_seconds: float | None = 5.0,
        longest_pause_seconds: float = 30.0,
        patient_with: Container[str] = (),
        log: Any = None,
    ) -> None:
        self.limiter = limiter
        self.breaker = breaker
        self.attempts = attempts
        self.call_seconds = call_seconds
        self.longest_pause_seconds = longest_pause_seconds
        self.patient_with = patient_with
        self.tally = Tally()
        self._log = log or structlog.stdlib.get_logger("guard")

    async def call(self, send: Callable[[Slot], Awaitable[T]]) -> T:
        """The result of `send`, tried until the attempts are used up.

        `send` raises Failed, Refused or Limited; Failed, Refused and StillDown come out of here.
        """
        schedule = stamina.retry_context(
            on=Failed,
            attempts=self.attempts,
            timeout=None,
            wait_initial=RETRY_SECONDS[0],
            wait_max=RETRY_SECONDS[-1],
            wait_jitter=0,
        )
        async for attempt in schedule:
            with attempt:
                if attempt.num > 1:
                    self.tally.retries += 1
                try:
                    return await self._attempt(send)
                except Failed as failure:
                    if attempt.num < self.attempts:
                        wait = attempt.next_wait
                        if len(self.tally.backoffs) < 100:
                            self.tally.backoffs.append(wait)
                        self._log.debug("retry", kind=failure.kind, attempt=attempt.num, wait=wait)
                    raise
        raise AssertionError  # the schedule raises the last failure

    async def _attempt(self, send: Callable[[Slot], Awaitable[T]]) -> T:
        """One attempt: as many calls as 429s and patience make of it."""
        breaker, limiter, tally = self.breaker, self.limiter, self.tally
        while True:
            ticket, slot = await self._enter()
            tally.attempts += 1
            try:
                async with asyncio.timeout(self.call_seconds):
                    result = await send(slot)
            except Limited as limit:
                tally.limited += 1
                asked = 1.0 if limit.retry_after is None else limit.retry_after
                pause = min(max(asked, 0.0), self.longest_pause_seconds)
                breaker.release(ticket)
                limiter.refused(slot, pause)
                self._log.info("paused", asked_seconds=asked, seconds=pause)
            except (Failed, TimeoutError) as error:
                failure = error if isinstance(error, Failed) else self._too_late()
                tally.failures[failure.kind] += 1
                limiter.succeeded(slot)
                was_probe = breaker.is_probe(ticket)
                breaker.failure(ticket)
                if not (was_probe and failure.kind in self.patient_with):
                    raise failure from error
            except Refused as refusal:
                tally.failures[refusal.kind] += 1
                limiter.succeeded(slot)
                breaker.success(ticket)
                raise
            except BaseException:
                breaker.release(ticket)
                raise
            else:
                tally.succeeded += 1
                limiter.succeeded(slot)
                breaker.success(ticket)
                return result
            finally:
                slot.close()

    async def _enter(self) -> tuple[int, Slot]:
        """A ticket and a slot that belong together: while one waits for a slot, it may open."""
        while True:
            ticket = await self.breaker.enter()
            try:
                slot = await self.limiter.acquire()
            except BaseException:
                self.breaker.release(ticket)
                raise
            if self.breaker.is_current(ticket):
                return ticket, slot
            slot.close(unused=True)

    def _too_late(self) -> Failed:
        within = "in time" if self.call_seconds is None else f"within {self.call_seconds:g} s"
        return Failed("timeout", f"There was no whole answer {within}.")
