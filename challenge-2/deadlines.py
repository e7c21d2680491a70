"""All deadlines of a run on one timer.

A timer per resource would double the price of a trivial one. This one is set for the soonest
deadline; when that has come it looks at everybody: who is overdue is cancelled, who has ignored
that for the grace is abandoned, and the soonest of the rest is waited for. Between start and stop
it stays as it is, so that a short run sets it once.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from owners import ACQUIRING, RELEASING, Owner

if TYPE_CHECKING:
    from engine import Run

EARLY_SECONDS = 0.0005  # a loop's timer may come this much before its time


class Deadlines:
    """The limits of one run, and the timer that enforces them."""

    def __init__(self, run: Run, acquire: float, release: float, grace: float) -> None:
        self._run = run
        self.acquire = acquire
        self.release = release
        self.grace = grace  # for a cancellation to have its effect
        self._phase_ends = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def begin_start(self, now: float) -> None:
        """The start has one deadline, which a resource with a longer one of its own extends."""
        self._begin(now, self.acquire, [o.acquire_timeout for o in self._run.owners])

    def begin_stop(self, now: float) -> None:
        """The stop has one deadline, and what begins after that has the grace."""
        self._begin(now, self.release, [o.release_timeout for o in self._run.owners])

    def _begin(self, now: float, limit: float, own_limits: list[float | None]) -> None:
        limits = [limit, *(own for own in own_limits if own is not None)]
        self._phase_ends = now + max(limits)
        self.arm(now + min(limits))

    def limit_of(self, owner: Owner, *, releasing: bool) -> float:
        """The seconds it has, its own or those of all."""
        own = owner.release_timeout if releasing else owner.acquire_timeout
        if own is not None:
            return own
        return self.release if releasing else self.acquire

    def watch_release(self, owner: Owner) -> None:
        """It begins to be left, maybe long after the timer has looked at the others."""
        self.arm(self._due(owner, owner.releasing_at, releasing=True))

    def arm(self, at: float) -> None:
        """Look then, or sooner."""
        if at < self._timer_at:
            self.disarm()
            self._timer_at = at
            self._timer = self._run.loop.call_later(
                at - self._run.clock() + EARLY_SECONDS, self._look
            )

    def disarm(self) -> None:
        """Nobody is in flight any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._timer_at = None, math.inf

    def _look(self) -> None:
        self._timer, self._timer_at = None, math.inf
        run = self._run
        now, before = run.clock(), -1
        while before != run.abandoned:  # what is abandoned lets needs begin that were looked at
            before = run.abandoned
            soonest = min((self._enforce(owner, now) for owner in run.owners), default=math.inf)
        if soonest < math.inf:
            self.arm(soonest)

    def _enforce(self, owner: Owner, now: float) -> float:
        """Cancel or abandon it if it is due; return when it has to be looked at again."""
        if owner.state is ACQUIRING:
            due = self._due(owner, owner.acquiring_at or now, releasing=False)
        elif owner.state is RELEASING:
            due = self._due(owner, owner.releasing_at or now, releasing=True)
        else:
            return math.inf
        if owner.cancelled_at > (owner.ready_at or 0.0):  # asked to stop in this phase
            due = owner.cancelled_at + self.grace
            if now < due:
                return due
            if not owner.here:
                self._run.abandon(owner)
                return math.inf
            self._run.cancel(owner, now)  # the caller's task cannot be left behind: asked again
            return now + self.grace
        if now < due:
            return due
        owner.timed_out = True
        self._run.cancel(owner, now)
        return now + self.grace

    def _due(self, owner: Owner, begun: float, *, releasing: bool) -> float:
        """Its own deadline, cut short by that of the phase; who begins late has the grace."""
        due = begun + self.limit_of(owner, releasing=releasing)
        if owner.late and not self._run.stopping:
            return due
        return min(due, max(self._phase_ends, begun + self.grace))
