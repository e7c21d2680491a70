"""The engine: owners are started along the graph of their needs, and stopped against it.

An `Owner` (`owners.py`) is a declared resource, whose own task enters and leaves it. A `Run` begins
each owner the moment its last need is ready, and releases it the moment the last one alive that
needs it has gone: two countdowns, `unmet` and `blockers`. Who lives in the caller's own task is in
`caller.py`, what is overdue in `deadlines.py`, what surfaces in `outcomes.py`.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import time
from asyncio import CancelledError
from collections.abc import Callable
from typing import Any, cast

from caller import Caller
from deadlines import Deadlines
from failures import AcquireError, described
from outcomes import Outcome
from owners import (
    ABANDONED,
    ACQUIRING,
    DECLARED,
    FAILED,
    READY,
    RELEASED,
    RELEASING,
    Observe,
    Owner,
    State,
    abandoned_tasks,
    own,
    topological,
)

__all__ = [
    "ABANDONED", "FAILED", "READY", "Observe", "Owner", "Run", "State", "abandoned_tasks",
    "topological",
]  # fmt: skip

log = logging.getLogger("resources")


class Run:
    """Starts the owners of one manager, holds them, and stops them."""

    loop: asyncio.AbstractEventLoop
    context: contextvars.Context

    def __init__(
        self,
        owners: list[Owner],
        *,
        sequential: bool,
        acquire_timeout: float,
        release_timeout: float,
        release_grace: float,
        cancel_when_lost: bool,
        interrupts: bool = True,
        clock: Callable[[], float] = time.perf_counter,
        observe: Observe | None = None,
    ) -> None:
        self.owners = owners
        self.sequential = sequential
        self.interrupts = interrupts  # False: the body is no task, and is told only at its end
        self.clock = clock
        self.observe = observe
        self.caller = Caller(self)
        self.deadlines = Deadlines(self, acquire_timeout, release_timeout, release_grace)
        self.outcome = Outcome(cancel_when_lost=cancel_when_lost)
        self.error: BaseException | None = None  # what owners are told when they are left
        self.began_at = self.started_at = self.stopping_at = self.stopped_at = 0.0
        self.unready = self.inflight = self.unreleased = 0
        self.suppressed = self.abandoned = 0
        self.aborting = self.stopping = False

    # --- start ---

    async def start(self) -> None:
        """Acquire everything, in parallel along the graph; raise what kept it from being ready."""
        self.loop = asyncio.get_running_loop()
        host = cast("asyncio.Task[Any]", asyncio.current_task())
        self.caller.task, self.caller.baseline = host, host.cancelling()
        # One context for all owners: what one sets, those who need it see. From 3.12 on it is the
        # caller's own, so that its body sees it too.
        if sys.version_info >= (3, 12):
            self.context = host.get_context()
        else:
            self.context = contextvars.copy_context()
        self.began_at = now = self.clock()
        self.deadlines.begin_start(now)
        if self.sequential:
            await self.caller.enter_in_turn()
        else:
            await self._start_along_the_graph()
        self.started_at = self.clock()
        if self.outcome.start_failed or self.caller.unwinding is not None:
            primary = self.outcome.of_start(self.caller.unwinding)
            surfaced = await self.stop(primary)
            raise primary if surfaced is None else surfaced

    async def _start_along_the_graph(self) -> None:
        self.unready = len(self.owners)
        for owner in self.owners:
            owner.unmet = len(owner.needs)
            if not owner.unmet:
                self.begin(owner)
        jobs = self.caller.jobs
        while self.inflight if self.aborting else self.unready:
            if jobs:
                await self.caller.enter(jobs.popleft())
            elif await self.caller.pause():
                self.abort()

    def begin(self, owner: Owner) -> None:
        """Everything it needs is ready: start it."""
        owner.state = ACQUIRING
        self.inflight += 1
        if owner.acquire_timeout is not None:
            self.deadlines.arm(self.clock() + owner.acquire_timeout)
        if owner.here:
            self.caller.jobs.append(owner)
            self.caller.wake_up()
        else:
            owner.task = self.loop.create_task(own(self, owner), context=self.context)

    def acquired(self, owner: Owner) -> None:
        """It is ready; start those it was the last need of."""
        owner.state = READY
        self.inflight -= 1
        if self.observe is not None:
            self.observe(owner, "acquired", owner.ready_at - owner.acquiring_at, None)
        self._settle(owner)

    def _settle(self, owner: Owner) -> None:
        if owner.waiter is not None and not owner.waiter.done():
            owner.waiter.set_result(None)
        if owner.late:
            self.caller.wake_up()
            return
        if self.aborting:
            if not self.inflight:
                self.caller.wake_up()
            return
        self.unready -= 1
        for dependent in owner.dependents:
            dependent.unmet -= 1
            if not dependent.unmet and dependent.state is DECLARED:
                self.begin(dependent)
        if not self.unready:
            self.caller.wake_up()

    def not_acquired(self, owner: Owner, error: BaseException) -> None:
        """It failed: alone if it was optional or asked for late, else the start is given up."""
        if owner.state is ABANDONED:
            abandoned_tasks.discard(owner.task)
            return
        self.inflight -= 1
        owner.state = FAILED
        owner.released_at = self.clock()
        limit = self.deadlines.limit_of(owner, releasing=False)
        owner.error = failure = self.outcome.not_acquired(owner, error, limit)
        if self.observe is not None:
            seconds = owner.released_at - (owner.acquiring_at or owner.released_at)
            self.observe(owner, "acquire_failed", seconds, failure)
        if owner.optional and isinstance(failure, AcquireError):
            log.warning("optional resource %r is left out: %s", owner.name, described(error))
        elif owner.cancels and not owner.timed_out:
            if failure is not error:  # an error of its own, in answer to our cancellation
                self.outcome.hidden_failures.append((owner, failure))
        elif not owner.late:
            self.outcome.acquire_failures.append((owner, failure))
            self.abort()
        self._settle(owner)

    def abort(self) -> None:
        """Give the start up: nothing new begins, and what is in flight is cancelled.

        The cancellation waits for the end of this turn of the loop, so that what failed in the
        same moment is reported and not cancelled.
        """
        if not self.aborting:
            self.aborting = True
            self.inflight -= self.caller.withdraw_jobs()
            self.loop.call_soon(self._cancel_inflight)

    def withdraw(self) -> None:
        """Give the start up because the manager is being closed by another task."""
        self.outcome.withdrawn = True
        self.abort()

    def _cancel_inflight(self) -> None:
        now = self.clock()
        for owner in self.owners:
            if owner.state is ACQUIRING and not owner.cancelled_at:
                self.cancel(owner, now)
        self.caller.wake_up()

    def cancel(self, owner: Owner, now: float) -> None:
        """Ask it to stop what it is doing; after the grace it is abandoned."""
        owner.cancelled_at = now
        owner.cancels += 1
        self.deadlines.arm(now + self.deadlines.grace)
        if owner.here:
            self.caller.task.cancel()
        elif owner.state is ACQUIRING and not owner.acquiring_at:
            self.not_acquired(owner, CancelledError())  # its task has not had its first step
        else:
            owner.task.cancel()

    async def acquire_late(self, owner: Owner) -> Any:
        """One more, after the start: it fails alone, and is released if the caller gives up."""
        owner.late = True
        owner.here = owner.here or self.sequential
        owner.asked_at = now = self.clock()
        self.owners.append(owner)
        self.deadlines.arm(now + self.deadlines.limit_of(owner, releasing=False))
        cancelled: CancelledError | None = None
        if owner.here:
            owner.state = ACQUIRING
            self.inflight += 1
            await self.caller.enter(owner)
            if isinstance(self.caller.unwinding, CancelledError):
                cancelled, self.caller.unwinding = self.caller.unwinding, None
        else:
            self.begin(owner)
            while owner.state is ACQUIRING:
                owner.waiter = self.loop.create_future()
                try:
                    await owner.waiter
                except CancelledError as error:
                    cancelled = cancelled or error
                    if owner.state is ACQUIRING and not owner.cancelled_at:
                        self.cancel(owner, self.clock())
            owner.waiter = None
        if cancelled is not None:
            raise cancelled
        if owner.state is not READY:
            return _nothing_of(owner)
        return owner.value

    # --- lost while in use ---

    def lose(self, owner: Owner, error: BaseException) -> None:
        """It has died: mark it, and cut the body short."""
        if owner.loss is not None or owner.state is not READY:
            return
        owner.loss = error
        self.outcome.losses.append(owner)
        if self.observe is not None:
            self.observe(owner, "lost", self.clock() - owner.ready_at, error)
        if self.stopping or not self.outcome.cancel_when_lost:
            return
        if not self.started_at:
            self.abort()
        elif self.interrupts:
            self.caller.cut_short(owner)

    # --- stop ---

    async def stop(self, exc: BaseException | None) -> BaseException | None:
        """Release everything in reverse, in parallel; return what has to surface."""
        self.stopping = True
        context = None if exc is None else exc.__context__
        caller, task = self.caller, cast("asyncio.Task[Any]", asyncio.current_task())
        self.error = caller.unwinding = exc
        level = task.cancelling()
        await self._end_late_starts()
        if caller.stack and not caller.is_current:
            caller.disown()
        self.stopping_at = now = self.clock()
        self.deadlines.begin_stop(now)
        if self.sequential:
            await caller.leave_in_turn()
        else:
            await self._stop_along_the_graph()
        self.deadlines.disarm()
        self.stopped_at = self.clock()
        if exc is not None:
            exc.__context__ = context
        if task.cancelling() > level and not isinstance(caller.unwinding, CancelledError):
            caller.remember(CancelledError())  # an exit in the caller's task has kept it
        by_loss = await caller.take_back_loss()
        surfaced = self.outcome.of_stop(exc, caller.unwinding, by_loss=by_loss)
        self.error = caller.unwinding = None
        return surfaced

    async def _end_late_starts(self) -> None:
        if any(owner.state is ACQUIRING for owner in self.owners):
            self._cancel_inflight()
            while any(owner.state is ACQUIRING for owner in self.owners):
                await self.caller.pause()

    async def _stop_along_the_graph(self) -> None:
        alive = [owner for owner in self.owners if owner.state is READY or owner.state is RELEASING]
        self.unreleased = len(alive)
        for owner in alive:
            for need in owner.needs:
                need.blockers += 1
        for owner in reversed(alive):
            if not owner.blockers:
                self.begin_release(owner)
        stack = self.caller.stack
        while self.unreleased:
            if stack and not stack[-1].blockers:
                await self.caller.leave(stack.pop())
            else:
                await self.caller.pause()

    def begin_release(self, owner: Owner) -> None:
        """Nothing alive needs it any more: let its task leave it."""
        if owner.here:
            self.caller.wake_up()
        elif owner.state is READY:
            owner.state = RELEASING
            if owner.release_timeout is not None:
                self.deadlines.arm(self.clock() + owner.release_timeout)
            if owner.gate is not None and not owner.gate.done():
                owner.gate.set_result(None)

    def released(self, owner: Owner, error: BaseException | None) -> None:
        """Its task has left it, well or badly; go on with what it needed."""
        owner.released_at = now = self.clock()
        if owner.state is ABANDONED:
            abandoned_tasks.discard(owner.task)
            if self.observe is not None:
                self.observe(owner, "released", now - owner.releasing_at, None)
            return
        owner.state = RELEASED
        if owner.loss is not None and isinstance(owner.loss, CancelledError):
            owner.loss, error = error or owner.loss, None
            owner.error = owner.loss
        if error is not None:
            self.not_released(owner, error)
        elif self.observe is not None:
            self.observe(owner, "released", now - owner.releasing_at, None)
        self.has_left(owner)

    def has_left(self, owner: Owner) -> None:
        """One less that keeps its needs from being released."""
        if not self.unreleased:  # in turn, or on its own before the stop
            return
        self.unreleased -= 1
        for need in owner.needs:
            need.blockers -= 1
            if not need.blockers:
                self.begin_release(need)
        if not self.unreleased:
            self.caller.wake_up()

    def not_released(self, owner: Owner, error: BaseException) -> None:
        """It was left badly."""
        limit = self.deadlines.limit_of(owner, releasing=True)
        failure = self.outcome.not_released(owner, error, limit)
        if self.observe is not None and not owner.abandoned:
            self.observe(owner, "release_failed", self.clock() - owner.releasing_at, failure)

    def abandon(self, owner: Owner) -> None:
        """It ignores its cancellation, or lives in another task: nobody waits for it any longer."""
        owner.abandoned = True
        why = "it lives in another task" if owner.here else "it ignores its cancellation"
        log.error("resource %r is abandoned: %s", owner.name, why)
        if not owner.here:
            abandoned_tasks.add(owner.task)
        self.abandoned += 1
        if owner.state is ACQUIRING:
            self.not_acquired(owner, CancelledError(why))
            owner.state = ABANDONED
        else:
            owner.state = ABANDONED
            self.not_released(owner, CancelledError(why))
            self.has_left(owner)
        if self.observe is not None:
            self.observe(owner, "abandoned", None, owner.error)


def _nothing_of(owner: Owner) -> None:
    """A late one is not ready: say why, unless it was optional."""
    failure = owner.error or AcquireError(f"resource {owner.name!r} is not ready")
    if owner.optional and isinstance(failure, AcquireError):
        return
    if owner.cancels and isinstance(failure, CancelledError):
        raise AcquireError(
            f"resource {owner.name!r} was being acquired when the manager stopped",
            resource=owner.name,
        ) from failure
    raise failure
