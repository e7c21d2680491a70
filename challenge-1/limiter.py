"""When the next request may be sent, so that the service never sees too many in a second.

    acquire -> Slot: granted -> sent -> answered -> closed
                        |<- the service sees it ->|

`RateLimiter` keeps a known rate, `LearningLimiter` finds it. State machines with an injected clock.
"""

import asyncio
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar, Final

Clock = Callable[[], float]

NEVER: Final = -math.inf
HAIR_SECONDS: Final = 0.002  # a closed window needs more than its length
RECENT_ANSWERS: Final = 32
FEW_ANSWERS: Final = 5  # too few to tell what is usual
TOO_VARIED: Final = 0.8  # of the guard, from the fastest answer to the usual one
LEAST: Final = 0.75  # of the guard: the fastest answer was not quite without delay itself
STEP_SECONDS: Final = 0.001
LONGEST_LEAD_SECONDS: Final = 0.03
LEARNING_START: Final = 8.0  # calls per second, doubled until the service says no
DOUBLING_SECONDS: Final = 0.5
PATIENCE_SECONDS: Final = 5.0  # doubled where the first step is refused, up to the longest
LONGEST_PATIENCE_SECONDS: Final = 60.0
FIRST_STEP: Final = 0.05  # of the rate; doubled as long as there is no 429
IN_USE: Final = 0.35  # of the rate, in the last second: what is not used proves nothing
FALL: Final = 0.7  # of the rate, at most by one 429, which may be bad luck


class Slot:
    """The right to send one request, and until when the service may not yet have seen it.

    Call `sent` when its bytes are written, `answered` when the answer begins, and `close` in any
    case.
    """

    __slots__ = ("_limiter", "closed", "granted", "seen_by", "sent_at", "unseen_until", "used")

    def __init__(self, limiter: "RateLimiter", granted: float) -> None:
        self._limiter = limiter
        self.granted = self.sent_at = granted
        self.seen_by = math.inf
        self.unseen_until = NEVER
        self.closed = False
        self.used = True

    def sent(self) -> None:
        """From now on the service sees it within the guard."""
        self.sent_at = self._limiter.clock()
        self.seen_by = min(self.seen_by, self.sent_at + self._limiter.guard_seconds)
        self._limiter.notify()

    def answered(self) -> None:
        """It has been seen."""
        self._limiter.heard(self)

    def close(self, *, unused: bool = False) -> None:
        """The call is over; `unused` when nothing was sent. Idempotent."""
        if not self.closed:
            self.closed = True
            self.used = not unused
            self.seen_by = min(self.seen_by, self._limiter.clock())
            self._limiter.closed(self)


class Answers:
    """How long answers take, and what that says of when their requests were seen.

    An answer takes the way there, the work and the way back. Where the work takes much the same
    every time, all that an answer took longer than the fastest may have been the way there. Where
    it does not, that would say too much, and a guard has to do.
    """

    def __init__(self, guard_seconds: float) -> None:
        self.usual = 0.0
        self._guard_seconds = guard_seconds
        self._recent: deque[float] = deque(maxlen=RECENT_ANSWERS)

    def latest(self, took: float) -> float:
        """Seconds after sending, until which the request of this answer may not have been seen."""
        recent = self._recent
        recent.append(took)
        fastest, self.usual = min(recent), statistics.median_low(recent)
        if len(recent) < FEW_ANSWERS:
            return took
        if self.usual - fastest > TOO_VARIED * self._guard_seconds:
            return min(took, self._guard_seconds)
        return min(took, max(took - fastest, LEAST * self._guard_seconds))


class RateLimiter:
    """At most `rate` requests in every closed window of one second, as the service sees them.

    A request is seen after it was sent, and at the latest when it is answered. What counts is the
    latest moment that its answer leaves possible (see Answers), so a late timer, a slow connection
    or a busy core on either side does not squeeze a sixth request into a window. No more than
    `rate` requests go out without a sign of life; where that came much later than usual, they count
    as seen only then: the service may have stood still. For a rate that is no whole number the
    window is longer than a second, or shorter, so that its number is whole. First come, first
    served.
    """

    smoothness: ClassVar[float] = 0.6  # of an even spacing: what was lost to chance is caught up

    def __init__(
        self,
        rate: float,
        *,
        guard_seconds: float = 0.07,
        idle_since: float = NEVER,
        clock: Clock = time.monotonic,
    ) -> None:
        """`idle_since`: when the last request of others (a process before this one) may have been
        sent.
        """
        self.clock = clock
        self.guard_seconds = guard_seconds
        self.in_flight = 0
        self.granted = 0
        self._last = NEVER
        self._paused_until = idle_since + 1 + HAIR_SECONDS
        self._slots: deque[Slot] = deque()  # the last ones, as many as fit a window
        self._unheard: set[Slot] = set()  # under way, and no sign of life since
        self._answers = Answers(guard_seconds)
        self._lead_seconds = 0.0
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self.set_rate(rate)

    def set_rate(self, rate: float) -> None:
        """From now on this rate."""
        self.rate = rate
        self.burst = max(1, math.floor(rate))
        self.window_seconds = self.burst / rate
        self.notify()

    async def acquire(self) -> Slot:
        """Wait for a slot; close it in any case."""
        async with self._turn:
            while (wait := self._wait()) > 0:
                await self._rest(wait)
            slot = Slot(self, self.clock())
            self._last = slot.granted
            self._slots.append(slot)
            while len(self._slots) > 1 + self.burst:  # one more, where the last is not used
                self._slots.popleft()
            self._unheard.add(slot)
            self.in_flight += 1
            self.granted += 1
            return slot

    def pause(self, seconds: float) -> None:
        """Grant nothing for so long."""
        self._paused_until = max(self._paused_until, self.clock() + seconds)
        self.notify()

    def succeeded(self, slot: Slot) -> None:
        """The service admitted the request, whatever it answered."""

    def refused(self, slot: Slot, seconds: float) -> None:
        """The service answered 429 and asks for a pause."""
        del slot
        self.pause(seconds)

    def notify(self) -> None:
        """Something changed: the one who waits looks again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def heard(self, slot: Slot) -> None:
        """A slot is answered (called by it): a sign of life."""
        now = self.clock()
        silence = now - min((each.sent_at for each in self._unheard), default=now)
        stood_still = silence > 2 * self._answers.usual + self.guard_seconds
        latest = slot.sent_at + self._answers.latest(now - slot.sent_at)
        is_first = stood_still and slot in self._unheard
        slot.seen_by = now if is_first else min(now, max(latest, slot.unseen_until))
        for each in self._unheard - {slot} if stood_still else ():
            if each.seen_by < math.inf:  # they were sent, and may be seen only now
                each.unseen_until, each.seen_by = now, now + self.guard_seconds
        self._unheard = {each for each in self._unheard if each.seen_by > now}
        self.notify()

    def closed(self, slot: Slot) -> None:
        """A slot is over (called by it)."""
        self.in_flight -= 1
        self._unheard.discard(slot)
        if not slot.used:  # as if it had never been
            self._slots.remove(slot)
            self._last = self._slots[-1].granted if self._slots else NEVER
        self.notify()

    def _wait(self) -> float:
        """Seconds until the next grant, as far as is known."""
        if len(self._unheard) >= self.burst:
            return math.inf
        free = max(self._paused_until, self._last + self.smoothness / self.rate)
        if len(self._slots) >= self.burst:
            free = max(free, self._slots[-self.burst].seen_by + self.window_seconds + HAIR_SECONDS)
        return free - self.clock()

    async def _rest(self, wait: float) -> None:
        """Wait for a change, or so long: the end of it in small steps.

        Where the cores are busy a long sleep ends late, by 10 ms and more, a short one hardly. So a
        long one is cut by what the last ones were late.
        """
        changed = self._changed
        is_long = wait > self._lead_seconds + STEP_SECONDS
        nap = wait - self._lead_seconds if is_long else min(wait, STEP_SECONDS)
        until = self.clock() + nap
        with suppress(TimeoutError):
            async with asyncio.timeout(None if nap == math.inf else nap):
                await changed.wait()
                return
        if is_long:
            late = self.clock() - until
            self._lead_seconds = min(max(late, 0.8 * self._lead_seconds), LONGEST_LEAD_SECONDS)


class LearningLimiter(RateLimiter):
    """Finds the rate of a service that does not tell it, from its 429s.

    The rate doubles until the first 429; what was admitted in the second before is the limit.
    Later a little more is tried, and twice as much as long as that goes well; less often each time
    it was refused. A rate that is not used does not rise.
    """

    smoothness: ClassVar[float] = 0.9  # a service with a limit may look at less than a second

    def __init__(self, *, guard_seconds: float = 0.02, clock: Clock = time.monotonic) -> None:
        self._admitted: deque[float] = deque()  # when, within the last second
        self._settled = False
        self._decided = clock()
        self._refused_at = NEVER
        self._ceiling = math.inf
        self._step = 1.0
        self._patience = PATIENCE_SECONDS
        super().__init__(LEARNING_START, guard_seconds=guard_seconds, clock=clock)

    def succeeded(self, slot: Slot) -> None:
        """Remember it, and try a little more when it is time."""
        now = self.clock()
        self._admitted.append(slot.granted)
        self._forget(now)
        if slot.granted < self._refused_at:  # under way when the limit was found: part of it
            self.set_rate(min(self.rate + 1, self._ceiling))
        elif (
            now - self._decided >= self._patience_now()
            and len(self._admitted) >= IN_USE * self.rate
        ):
            self._decided = now
            self.set_rate(self.rate * (1 + self._step))
            self._step = min(2 * self._step, 1.0)

    def refused(self, slot: Slot, seconds: float) -> None:
        """Pause, and settle on what was admitted; calls from before the last decision are old."""
        self.pause(seconds)
        if slot.granted < self._decided and self._settled:
            return
        self._forget(slot.granted)
        if self._settled and self._step == 2 * FIRST_STEP:  # already the first step was too much
            self._patience = min(2 * self._patience, LONGEST_PATIENCE_SECONDS)
        else:
            self._patience = PATIENCE_SECONDS
        self._step = FIRST_STEP
        self._settled = True
        self._decided = self.clock()
        self._refused_at = slot.granted
        self._ceiling = self.rate * 0.99
        admitted = max(float(len(self._admitted)), FALL * self.rate)
        self.set_rate(max(0.5, min(self._ceiling, admitted)))

    def _patience_now(self) -> float:
        """Seconds without a 429, before a higher rate is tried."""
        if not self._settled:
            return DOUBLING_SECONDS
        return self._patience if self._step == FIRST_STEP else PATIENCE_SECONDS

    def _forget(self, now: float) -> None:
        while self._admitted and self._admitted[0] < now - 1:
            self._admitted.popleft()

    def _wait(self) -> float:
        if not self._settled and self.in_flight < 4 * self.burst:
            return max(self._paused_until, self._last + 1 / self.rate) - self.clock()
        return super()._wait()


def limiter_of(rate: float | None, *, guard_seconds: float, clock: Clock) -> RateLimiter:
    """A limiter for this rate; without one it is found from the 429s."""
    if rate is None:
        return LearningLimiter(guard_seconds=guard_seconds, clock=clock)
    return RateLimiter(rate, guard_seconds=guard_seconds, clock=clock)
