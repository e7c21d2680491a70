"""The caller's own task: what it enters and leaves itself, and what interrupts it meanwhile.

Resources with `affinity="caller"`, and all of a sequential run, live here as a stack, last in,
first out, like those of nested `async with` blocks: what one exit raises is what the next one sees.
A cancellation from outside is remembered and surfaces at the end; our own, at a deadline or because
of a loss, are counted and taken back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from asyncio import CancelledError
from collections import deque
from typing import TYPE_CHECKING, Any

from outcomes import ENDS_PROGRAMS, told
from owners import ACQUIRING, DECLARED, READY, RELEASED, RELEASING, Owner

if TYPE_CHECKING:
    from engine import Run

log = logging.getLogger("resources")


class Caller:
    """The task that entered a manager, as far as its run is concerned."""

    task: asyncio.Task[Any]
    baseline: int  # cancellations of the task that are none of ours

    def __init__(self, run: Run) -> None:
        self._run = run
        self.stack: list[Owner] = []  # what this task has entered and not left
        self.jobs: deque[Owner] = deque()  # what it is to enter
        self.unwinding: BaseException | None = None  # what an exit is told, and may change
        self.told_of_loss = False
        self._wake: asyncio.Future[None] | None = None
        self._orphans: list[Owner] = []

    @property
    def is_current(self) -> bool:
        """Whether this is the task that runs now."""
        return asyncio.current_task() is self.task

    # --- waiting ---

    async def pause(self) -> bool:
        """Wait for news; True if the task was cancelled meanwhile, which is remembered."""
        self._wake = self._run.loop.create_future()
        try:
            await self._wake
        except CancelledError as error:
            if self.told_of_loss and self.task.cancelling() <= self.baseline + 1:
                return False  # our own news of a loss, which came too late for the body
            self.remember(error)
            return True
        finally:
            self._wake = None
        return False

    def wake_up(self) -> None:
        """There is news."""
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def remember(self, error: CancelledError) -> None:
        """It surfaces once everything is over."""
        if not isinstance(self.unwinding, ENDS_PROGRAMS):
            self.unwinding = error

    # --- our own cancellations ---

    def cut_short(self, owner: Owner) -> None:
        """Cancel the body, once, because of a loss."""
        if not self.told_of_loss and not self.task.done():
            self.told_of_loss = True
            self.task.cancel(f"resource {owner.name!r} was lost")

    async def take_back_loss(self) -> bool:
        """Whether the body was cancelled by us and by nobody else."""
        if not self.told_of_loss:
            return False
        self.told_of_loss = False
        level = self.task.uncancel()
        here = self.task is asyncio.current_task()
        if level <= self.baseline and here and not isinstance(self.unwinding, CancelledError):
            with contextlib.suppress(CancelledError):
                await asyncio.sleep(0)  # it came too late for the body
            if self.task.cancelling() > level:
                self.remember(CancelledError())
        return self.task.cancelling() <= self.baseline

    async def _take_back(self, owner: Owner, level: float = math.inf) -> None:
        """What a deadline did to the task; what is above the level came from outside."""
        for _ in range(owner.cancels):
            self.task.uncancel()
        with contextlib.suppress(CancelledError):
            await asyncio.sleep(0)  # it may have come too late for who was meant
        if self.task.cancelling() > level:
            self.remember(CancelledError())

    # --- entering ---

    async def enter(self, owner: Owner) -> None:
        """Enter one, beside others that have tasks of their own."""
        run = self._run
        level = self.task.cancelling()
        owner.acquiring_at = run.clock()
        if run.observe is not None:
            run.observe(owner, "acquiring", None, None)
        try:
            owner.value = await owner.enter()
        except BaseException as error:  # noqa: BLE001  (it belongs to the run)
            await self._not_entered(owner, error, level)
            return
        owner.ready_at = run.clock()
        self.stack.append(owner)
        run.acquired(owner)
        if owner.cancels:
            await self._take_back(owner, level)
            owner.cancels, owner.timed_out = 0, False

    async def enter_in_turn(self) -> None:
        """Enter all, one after the other."""
        run, stack, clock, observe = self._run, self.stack, self._run.clock, self._run.observe
        last = run.began_at
        for owner in run.owners:
            owner.here = True
            owner.state = ACQUIRING
            owner.acquiring_at = last
            if observe is not None:
                observe(owner, "acquiring", None, None)
            if owner.acquire_timeout is not None:
                run.deadlines.arm(last + owner.acquire_timeout)
            try:
                owner.value = await owner.enter()
            except BaseException as error:  # noqa: BLE001  (as above)
                run.inflight += 1
                await self._not_entered(owner, error, self.baseline)
                if run.aborting:
                    return
                last = clock()
                continue
            last = owner.ready_at = clock()
            owner.state = READY
            stack.append(owner)
            if observe is not None:
                observe(owner, "acquired", last - owner.acquiring_at, None)
            if owner.cancels:
                await self._take_back(owner, self.baseline)
                owner.cancels, owner.timed_out = 0, False
                if run.aborting:
                    return

    async def _not_entered(self, owner: Owner, error: BaseException, level: int) -> None:
        if owner.cancels:
            await self._take_back(owner, level)
        elif isinstance(error, CancelledError):  # from outside: the whole start is cancelled
            self.remember(error)
            self._run.abort()
            owner.cancels = 1
        self._run.not_acquired(owner, error)

    def withdraw_jobs(self) -> int:
        """Enter nothing more; how many that were."""
        count = len(self.jobs)
        for owner in self.jobs:
            owner.state = DECLARED
        self.jobs.clear()
        return count

    # --- leaving ---

    async def leave_in_turn(self) -> None:
        """Leave all, the last one first."""
        run, stack, clock, observe = self._run, self.stack, self._run.clock, self._run.observe
        last = run.stopping_at
        while stack:
            owner = stack.pop()
            if observe is not None or self.unwinding is not None:
                await self.leave(owner)
                last = owner.released_at
                continue
            owner.state = RELEASING
            owner.releasing_at = last
            if owner.release_timeout is not None:
                run.deadlines.arm(last + owner.release_timeout)
            try:
                await owner.leave(None, None, None)
            except BaseException as error:  # noqa: BLE001  (as above)
                await self._left_badly(owner, error, None, 0)
            else:
                if owner.cancels:
                    await self._take_back(owner)
            last = owner.released_at = clock()
            owner.state = RELEASED

    def disown(self) -> None:
        """Another task stops the run: what lives here stays until this one comes to leave it."""
        self._orphans, self.stack = self.stack, []
        for owner in reversed(self._orphans):
            self._run.abandon(owner)

    async def leave_orphans(self, exc: BaseException | None) -> None:
        """This task has come."""
        while self._orphans and self.is_current:
            owner = self._orphans.pop()
            details = (None, None, None) if exc is None else (type(exc), exc, exc.__traceback__)
            try:
                await owner.leave(*details)
            except BaseException as error:  # the run is over: it can only be told
                if error is not exc:
                    log.error("%s", told(owner, error))  # noqa: TRY400  (without a traceback)
                if isinstance(error, ENDS_PROGRAMS):
                    raise

    async def leave(self, owner: Owner) -> None:
        """Leave one, which is told what is being unwound, and may answer."""
        run, exc = self._run, self.unwinding
        level = self.task.cancelling()
        owner.state = RELEASING
        owner.releasing_at = run.clock()
        run.deadlines.watch_release(owner)
        failure: BaseException | None = None
        try:
            if exc is None:
                suppress = await owner.leave(None, None, None)
            else:
                suppress = await owner.leave(type(exc), exc, exc.__traceback__)
        except BaseException as error:  # noqa: BLE001  (as above)
            failure = await self._left_badly(owner, error, exc, level)
        else:
            if owner.cancels:
                await self._take_back(owner)
            if exc is not None and suppress:
                self._answer(exc, None)
        owner.state = RELEASED
        owner.released_at = run.clock()
        if run.observe is not None and failure is None:
            run.observe(owner, "released", owner.released_at - owner.releasing_at, None)
        run.has_left(owner)

    async def _left_badly(
        self, owner: Owner, error: BaseException, exc: BaseException | None, level: int
    ) -> BaseException | None:
        """What an exit raised: an answer to what it was told, or a failure, which is returned."""
        owner.released_at = self._run.clock()
        if owner.cancels:
            await self._take_back(owner)
        elif error is exc:
            return None
        elif isinstance(error, CancelledError):
            self.remember(error)
            return None
        elif isinstance(exc, CancelledError) and (
            self.task.cancelling() < level or error.__cause__ is exc
        ):
            self._answer(exc, error)
            return None
        self._run.not_released(owner, error)
        if self.unwinding is None:
            self.unwinding = owner.error  # those around it see it, as in nested blocks
        return error

    def _answer(self, exc: BaseException, error: BaseException | None) -> None:
        """What was being unwound in this task is replaced, or suppressed."""
        self.unwinding = error
        self._run.outcome.answered(exc, error)
