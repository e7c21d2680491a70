"""The engine: one owner task per resource, started along the graph and stopped against it.

An `Owner` is a declared resource; the task that enters it also leaves it. A `Run` starts each owner
the moment its needs are ready, and releases each the moment nothing alive needs it any more. Both
phases have one timer, which looks only when a deadline has come; everything else is a countdown.
Owners with `here` set live in the caller's own task instead, last in, first out.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import enum
import heapq
import logging
import math
import sys
import time
from asyncio import CancelledError
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

from failures import (
    AcquireError,
    AcquireErrorGroup,
    AcquireTimeout,
    ReleaseError,
    ReleaseErrorGroup,
    ReleaseTimeout,
    ResourceError,
    ResourceLost,
    described,
)

log = logging.getLogger("resources")

EARLY_SECONDS = 0.0005  # a loop's timer may come this much before its time
abandoned_tasks: set[asyncio.Task[None]] = set()  # kept referenced until they end by themselves


class State(enum.Enum):
    """Where a resource stands."""

    DECLARED = "declared"  # nothing has been asked of it
    ACQUIRING = "acquiring"  # its task is entering it, or about to
    READY = "ready"  # in use
    RELEASING = "releasing"  # its task is leaving it, or about to
    RELEASED = "released"  # over
    FAILED = "failed"  # it was never ready
    ABANDONED = "abandoned"  # it ignored its cancellation, and nobody waits for it any more


DECLARED, ACQUIRING, READY, RELEASING, RELEASED, FAILED, ABANDONED = State
Observe = Callable[["Owner", str, float | None, BaseException | None], None]


class Owner:
    """One resource of one manager: what it needs, how it is entered and left, and its moments."""

    __slots__ = (
        "abandoned", "acquire_timeout", "acquiring_at", "asked_at", "attempts", "blockers",
        "cancelled_at", "cancels", "dependents", "enter", "error", "gate", "here", "kind", "late",
        "leave", "loss", "name", "needs", "opening", "optional", "ready_at", "release_timeout",
        "released_at", "releasing_at", "series", "state", "task", "timed_out", "unmet", "value",
        "waiter",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        opening: Any,
        *,
        kind: str = "resource",
        optional: bool = False,
        here: bool = False,
        acquire_timeout: float | None = None,
        release_timeout: float | None = None,
    ) -> None:
        self.name = name
        self.opening = opening
        self.kind = kind
        self.optional = optional
        self.here = here
        self.acquire_timeout = acquire_timeout
        self.release_timeout = release_timeout
        self.enter: Callable[[], Awaitable[Any]] = opening.enter
        self.leave: Callable[..., Awaitable[Any]] = opening.leave
        self.needs: list[Owner] = []
        self.dependents: list[Owner] = []
        self.unmet = self.blockers = self.cancels = 0
        self.attempts = 1
        self.state = DECLARED
        self.value: Any = None
        self.error: BaseException | None = None
        self.loss: BaseException | None = None  # what it died of
        self.gate: asyncio.Future[None] | None = None
        self.task: asyncio.Task[None]
        self.waiter: asyncio.Future[None] | None = None
        self.series: Any = None
        self.late = self.abandoned = self.timed_out = False
        self.asked_at = self.cancelled_at = 0.0
        self.acquiring_at = self.ready_at = self.releasing_at = self.released_at = 0.0

    @property
    def status(self) -> str:
        """The state in one word, `lost` included."""
        return "lost" if self.loss is not None else self.state.value

    @property
    def degraded(self) -> bool:
        """Whether an embedded stand-in serves instead of what was configured."""
        return bool(getattr(self.value, "degraded", False))


async def own(run: Run, owner: Owner) -> None:
    """The life of one resource, from the first step to the last in one task."""
    if owner.state is not ACQUIRING:  # withdrawn before the first step
        return
    clock = run.clock
    owner.acquiring_at = clock()
    if run.observe is not None:
        run.observe(owner, "acquiring", None, None)
    try:
        owner.value = await owner.enter()
    except BaseException as error:  # noqa: BLE001  (whatever it is, it belongs to the run)
        run.not_acquired(owner, error)
        return
    owner.ready_at = clock()
    if owner.cancels:
        await _forget_cancellation(owner)
    exc: BaseException | None
    if owner.state is ABANDONED:  # nobody waits for it any more: it is released at once
        exc = owner.error
    else:
        owner.gate = gate = run.loop.create_future()
        run.acquired(owner)
        try:
            await gate
            exc = run.error
        except CancelledError as error:  # not by us: what it holds has died
            run.lose(owner, error)
            owner.state = RELEASING
            exc = error
    owner.releasing_at = clock()
    try:
        if exc is None:
            await owner.leave(None, None, None)
        elif await owner.leave(type(exc), exc, exc.__traceback__):
            run.suppressed += 1  # only `affinity="caller"` may decide about the body's error
    except BaseException as error:  # noqa: BLE001  (as above)
        run.released(owner, None if error is exc else error)
    else:
        run.released(owner, None)


async def _forget_cancellation(owner: Owner) -> None:
    """It became ready although we had asked it to stop: it counts as ready."""
    owner.timed_out = False
    with contextlib.suppress(CancelledError):
        await asyncio.sleep(0)  # takes the cancellation, if that came too late for its entry
    for _ in range(owner.cancels):
        owner.task.uncancel()
    owner.cancels = 0


class Run:
    """Starts the owners of one manager, holds them, and stops them."""

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
        self.acquire_timeout = acquire_timeout
        self.release_timeout = release_timeout
        self.grace = release_grace
        self.cancel_when_lost = cancel_when_lost
        self.interrupts = interrupts  # False: the body is no task, and is told only at its end
        self.clock = clock
        self.observe = observe
        self.loop: asyncio.AbstractEventLoop
        self.context: contextvars.Context | None = None
        self.host: asyncio.Task[Any]
        self.baseline = 0  # cancellations of the host that are none of ours
        self.began_at = self.started_at = self.stopping_at = self.stopped_at = 0.0
        self.deadline = math.inf
        self.unready = self.inflight = self.unreleased = 0
        self.aborting = self.stopping = self.host_cancelled = False
        self.wake: asyncio.Future[None] | None = None
        self.jobs: deque[Owner] = deque()  # for the caller's task to enter
        self.stack: list[Owner] = []  # what the caller's task has entered
        self.error: BaseException | None = None  # what owners are told when they are left
        self.current: BaseException | None = None  # what the caller's task is unwinding
        self.acquire_failures: list[tuple[Owner, BaseException]] = []
        self.hidden_failures: list[tuple[Owner, BaseException]] = []  # of what we had cancelled
        self.release_failures: list[tuple[Owner, BaseException]] = []
        self.losses: list[Owner] = []
        self.suppressed = self.abandoned = 0
        self.timer: asyncio.TimerHandle | None = None
        self.timer_at = math.inf

    # --- start ---

    async def start(self) -> None:
        """Acquire everything, in parallel along the graph; raise what kept it from being ready."""
        self.loop = asyncio.get_running_loop()
        self.host = host = cast("asyncio.Task[Any]", asyncio.current_task())
        self.baseline = host.cancelling()
        # One context for all owners: what one sets, those who need it see. From 3.12 on it is the
        # caller's own, so that its body sees it too.
        if sys.version_info >= (3, 12):
            self.context = host.get_context()
        else:
            self.context = contextvars.copy_context()
        self.began_at = self.clock()
        shortest = self.acquire_timeout
        for owner in self.owners:
            if owner.acquire_timeout is not None:
                shortest = min(shortest, owner.acquire_timeout)
        self.deadline = self.began_at + max(
            [self.acquire_timeout, *(o.acquire_timeout for o in self.owners if o.acquire_timeout)]
        )
        self.arm(self.began_at + shortest)
        if self.sequential:
            await self._start_in_turn()
        else:
            self.unready = len(self.owners)
            for owner in self.owners:
                owner.unmet = len(owner.needs)
                if not owner.unmet:
                    self.begin(owner)
            await self._join_start()
        self.started_at = self.clock()
        if self.acquire_failures or self.current is not None or self.losses:
            await self._give_up_start()
        self._disarm()

    def begin(self, owner: Owner) -> None:
        """Everything it needs is ready: start it."""
        owner.state = ACQUIRING
        self.inflight += 1
        if owner.here:
            self.jobs.append(owner)
            self.wake_up()
        else:
            owner.task = self.loop.create_task(own(self, owner), context=self.context)

    def acquired(self, owner: Owner) -> None:
        """It is ready; start those it was the last need of."""
        owner.state = READY
        self.inflight -= 1
        if self.observe is not None:
            self.observe(owner, "acquired", owner.ready_at - owner.acquiring_at, None)
        self._settle(owner)

    def not_acquired(self, owner: Owner, error: BaseException) -> None:
        """It failed: alone if it was optional or asked for late, else the start is given up."""
        if owner.state is ABANDONED:
            abandoned_tasks.discard(owner.task)
            return
        self.inflight -= 1
        owner.state = FAILED
        owner.released_at = self.clock()
        owner.error = failure = self._acquire_failure(owner, error)
        if self.observe is not None:
            seconds = owner.released_at - (owner.acquiring_at or owner.released_at)
            self.observe(owner, "acquire_failed", seconds, failure)
        if owner.optional and isinstance(failure, AcquireError):
            log.warning("optional resource %r is left out: %s", owner.name, described(error))
        elif owner.cancels and not owner.timed_out:
            if failure is not error:  # an error of its own, in answer to our cancellation
                self.hidden_failures.append((owner, failure))
        elif not owner.late:
            self.acquire_failures.append((owner, failure))
            self.abort()
        self._settle(owner)

    def _settle(self, owner: Owner) -> None:
        if owner.waiter is not None and not owner.waiter.done():
            owner.waiter.set_result(None)
        if owner.late:
            self.wake_up()
            return
        if self.aborting:
            if not self.inflight:
                self.wake_up()
            return
        self.unready -= 1
        for dependent in owner.dependents:
            dependent.unmet -= 1
            if not dependent.unmet and dependent.state is DECLARED:
                self.begin(dependent)
        if not self.unready:
            self.wake_up()

    def _acquire_failure(self, owner: Owner, error: BaseException) -> BaseException:
        """The error as the one that names the resource; what ends programs stays what it is."""
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            return error
        if owner.timed_out:
            limit = self.acquire_timeout if owner.acquire_timeout is None else owner.acquire_timeout
            failure: AcquireError = AcquireTimeout(
                f"resource {owner.name!r} was not ready within {limit:g} s", resource=owner.name
            )
        elif owner.cancels and isinstance(error, CancelledError):
            return error
        elif isinstance(error, AcquireError):
            if error.resource is None:
                error.resource = owner.name
                error.args = (f"resource {owner.name!r}: {error}",)
            return error
        else:
            failure = AcquireError(
                f"resource {owner.name!r} could not be acquired: {described(error)}",
                resource=owner.name,
            )
        failure.__cause__ = error
        return failure

    def abort(self) -> None:
        """Give the start up: nothing new begins, and what is in flight is cancelled.

        The cancellation waits for the end of this turn of the loop, so that what failed in the
        same moment is reported and not cancelled.
        """
        if not self.aborting:
            self.aborting = True
            self.inflight -= len(self.jobs)
            for owner in self.jobs:
                owner.state = DECLARED
            self.jobs.clear()
            self.loop.call_soon(self._cancel_inflight)

    def _cancel_inflight(self) -> None:
        now = self.clock()
        for owner in self.owners:
            if owner.state is ACQUIRING and not owner.cancelled_at:
                self.cancel(owner, now)
        self.wake_up()

    def cancel(self, owner: Owner, now: float) -> None:
        """Ask it to stop what it is doing; after the grace it is abandoned."""
        owner.cancelled_at = now
        owner.cancels += 1
        self.arm(now + self.grace)
        if owner.here:
            self.host.cancel()
        elif owner.state is ACQUIRING and not owner.acquiring_at:
            self.not_acquired(owner, CancelledError())  # its task has not had its first step
        else:
            owner.task.cancel()

    async def _join_start(self) -> None:
        while self.inflight if self.aborting else self.unready:
            if self.jobs:
                await self._enter_here(self.jobs.popleft())
            elif await self.pause():
                self.abort()

    async def pause(self) -> bool:
        """Wait for news; True if the caller was cancelled meanwhile, which is remembered."""
        self.wake = self.loop.create_future()
        try:
            await self.wake
        except CancelledError as error:
            if self.host_cancelled and self.host.cancelling() <= self.baseline + 1:
                return False  # our own news of a loss, which came too late for the body
            self._remember(error)
            return True
        finally:
            self.wake = None
        return False

    def _remember(self, error: CancelledError) -> None:
        if not isinstance(self.current, (KeyboardInterrupt, SystemExit)):
            self.current = error

    def wake_up(self) -> None:
        """Let the caller look again."""
        if self.wake is not None and not self.wake.done():
            self.wake.set_result(None)

    async def _start_in_turn(self) -> None:
        clock, stack, last = self.clock, self.stack, self.began_at
        for owner in self.owners:
            owner.here = True
            owner.state = ACQUIRING
            owner.acquiring_at = last
            if self.observe is not None:
                self.observe(owner, "acquiring", None, None)
            try:
                owner.value = await owner.enter()
            except BaseException as error:  # noqa: BLE001  (it belongs to the run)
                self.inflight += 1
                await self._failed_here(owner, error)
                if self.aborting:
                    return
                last = clock()
                continue
            last = owner.ready_at = clock()
            owner.state = READY
            stack.append(owner)
            if self.observe is not None:
                self.observe(owner, "acquired", owner.ready_at - owner.acquiring_at, None)
            if owner.cancels:
                await self._forget_interrupt()

    async def _enter_here(self, owner: Owner) -> None:
        owner.acquiring_at = self.clock()
        if self.observe is not None:
            self.observe(owner, "acquiring", None, None)
        try:
            owner.value = await owner.enter()
        except BaseException as error:  # noqa: BLE001  (it belongs to the run)
            await self._failed_here(owner, error)
            return
        owner.ready_at = self.clock()
        self.stack.append(owner)
        self.acquired(owner)
        if owner.cancels:
            await self._forget_interrupt()

    async def _failed_here(self, owner: Owner, error: BaseException) -> None:
        if owner.cancels:
            await self._forget_interrupt(delivered=isinstance(error, CancelledError))
        elif isinstance(error, CancelledError):  # from outside: the whole start is cancelled
            self._remember(error)
            owner.cancels = 1
            self.not_acquired(owner, error)
            self.abort()
            return
        self.not_acquired(owner, error)

    async def _forget_interrupt(self, *, delivered: bool = False) -> None:
        """Take back our own cancellation of the caller's task."""
        self.host.uncancel()
        if not delivered:
            try:
                await asyncio.sleep(0)
            except CancelledError as error:
                if self.host.cancelling() > self.baseline:
                    self._remember(error)

    async def _give_up_start(self) -> None:
        """Release what was ready, and raise what kept the rest from being so."""
        failures = [failure for _, failure in self.acquire_failures]
        fatal = [e for e in failures if isinstance(e, (KeyboardInterrupt, SystemExit))]
        errors = [e for e in failures if isinstance(e, AcquireError)]
        primary: BaseException
        if fatal:
            primary = fatal[0]
        elif self.current is not None:
            primary = self.current
        elif not errors:
            primary = self._lost_error(self.losses[0])
        elif len(errors) == 1:
            primary = errors[0]
        else:
            primary = AcquireErrorGroup(f"{len(errors)} resources could not be acquired", errors)
        shown = errors if isinstance(primary, AcquireErrorGroup) else [primary]
        for owner, failure in [*self.acquire_failures, *self.hidden_failures]:
            if failure not in shown:
                primary.add_note(f"besides, {told(owner, failure)}")
        surfaced = await self.stop(primary)
        if surfaced is not None and surfaced is not primary:
            raise surfaced
        raise primary

    async def acquire_late(self, owner: Owner) -> Any:
        """One more, after the start: it fails alone, and is released if the caller gives up."""
        owner.late = True
        owner.asked_at = now = self.clock()
        self.owners.append(owner)
        limit = self.acquire_timeout if owner.acquire_timeout is None else owner.acquire_timeout
        self.arm(now + limit)
        cancelled: CancelledError | None = None
        if self.sequential or owner.here:
            owner.here = True
            owner.state = ACQUIRING
            self.inflight += 1
            await self._enter_here(owner)
            if isinstance(self.current, CancelledError):
                cancelled, self.current = self.current, None
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
            failure = owner.error or AcquireError(f"resource {owner.name!r} is not ready")
            if owner.optional and isinstance(failure, AcquireError):
                return None
            if owner.cancels and isinstance(failure, CancelledError):
                raise AcquireError(
                    f"resource {owner.name!r} was being acquired when the manager stopped",
                    resource=owner.name,
                ) from failure
            raise failure
        return owner.value

    # --- lost while in use ---

    def lose(self, owner: Owner, error: BaseException) -> None:
        """It has died: mark it, and cut the body short."""
        if owner.loss is not None or owner.state is not READY:
            return
        owner.loss = error
        self.losses.append(owner)
        if self.observe is not None:
            self.observe(owner, "lost", self.clock() - owner.ready_at, error)
        if self.stopping or not self.cancel_when_lost:
            return
        if not self.started_at:
            self.abort()
        elif self.interrupts and not self.host_cancelled and not self.host.done():
            self.host_cancelled = True
            self.host.cancel(f"resource {owner.name!r} was lost")

    def _lost_error(self, owner: Owner) -> ResourceLost:
        lost = ResourceLost(
            f"resource {owner.name!r} was lost while it was in use: {described_loss(owner)}",
            resource=owner.name,
        )
        lost.__cause__ = owner.loss
        for other in self.losses:
            if other is not owner:
                lost.add_note(f"resource {other.name!r} was lost too: {described_loss(other)}")
        return lost

    # --- stop ---

    async def stop(self, exc: BaseException | None) -> BaseException | None:
        """Release everything in reverse, in parallel; return what has to surface."""
        body, self.stopping = exc, True
        context = None if exc is None else exc.__context__
        await self._end_late_starts()
        self.error = self.current = exc
        task = asyncio.current_task()
        cancelling = 0 if task is None else task.cancelling()
        self.stopping_at = now = self.clock()
        if self.sequential:
            self._arm_stop(now)
            await self._stop_in_turn()
        else:
            await self._stop_along_the_graph(now)
        self._disarm()
        self.stopped_at = self.clock()
        if body is not None:
            body.__context__ = context
        swallowed = task is not None and task.cancelling() > cancelling
        if swallowed and not isinstance(self.current, CancelledError):
            self._remember(CancelledError())  # an exit in the caller's task has kept it
        surfaced = await self._surface(body)
        self.error = self.current = None
        return surfaced

    async def _end_late_starts(self) -> None:
        if any(owner.state is ACQUIRING for owner in self.owners):
            self._cancel_inflight()
            while any(owner.state is ACQUIRING for owner in self.owners):
                await self.pause()

    def _arm_stop(self, now: float) -> None:
        self.deadline = now + self.release_timeout
        shortest = self.release_timeout
        for owner in self.owners:
            if owner.release_timeout is not None:
                shortest = min(shortest, owner.release_timeout)
                self.deadline = max(self.deadline, now + owner.release_timeout)
        self.arm(now + shortest)

    async def _stop_along_the_graph(self, now: float) -> None:
        alive = [owner for owner in self.owners if owner.state is READY or owner.state is RELEASING]
        self.unreleased = len(alive)
        if not alive:
            return
        self._arm_stop(now)
        for owner in alive:
            for need in owner.needs:
                need.blockers += 1
        for owner in reversed(alive):
            if not owner.blockers:
                self.begin_release(owner)
        stack = self.stack
        while self.unreleased:
            if stack and not stack[-1].blockers:
                await self._leave_here(stack.pop())
            else:
                await self.pause()

    def begin_release(self, owner: Owner) -> None:
        """Nothing alive needs it any more: let its task leave it."""
        if owner.here:
            self.wake_up()
        elif owner.state is READY:
            owner.state = RELEASING
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
            self._release_failed(owner, error)
        elif self.observe is not None:
            self.observe(owner, "released", now - owner.releasing_at, None)
        if self.unreleased:
            self._unblock(owner)

    def _unblock(self, owner: Owner) -> None:
        self.unreleased -= 1
        for need in owner.needs:
            need.blockers -= 1
            if not need.blockers:
                self.begin_release(need)
        if not self.unreleased:
            self.wake_up()

    def _release_failed(self, owner: Owner, error: BaseException) -> None:
        failure = error
        if not isinstance(error, (KeyboardInterrupt, SystemExit, ReleaseError)):
            limit = self.release_timeout if owner.release_timeout is None else owner.release_timeout
            if owner.timed_out:
                failure = ReleaseTimeout(
                    f"resource {owner.name!r} was not released within {limit:g} s and was "
                    + ("abandoned" if owner.abandoned else "cancelled"),
                    resource=owner.name,
                )
            else:
                failure = ReleaseError(
                    f"resource {owner.name!r} could not be released: {described(error)}",
                    resource=owner.name,
                )
            failure.__cause__ = error
        owner.error = failure
        self.release_failures.append((owner, failure))
        if self.observe is not None and not owner.abandoned:
            self.observe(owner, "release_failed", self.clock() - owner.releasing_at, failure)

    async def _stop_in_turn(self) -> None:
        clock, stack, last = self.clock, self.stack, self.stopping_at
        while stack:
            owner = stack.pop()
            if self.current is not None or self.observe is not None:
                await self._leave_here(owner)
                last = owner.released_at
                continue
            owner.state = RELEASING
            owner.releasing_at = last
            try:
                await owner.leave(None, None, None)
            except BaseException as error:  # noqa: BLE001  (it belongs to the run)
                await self._left_badly(owner, error, None, 0)
            last = owner.released_at = clock()
            owner.state = RELEASED

    async def _leave_here(self, owner: Owner) -> None:
        exc = self.current
        before = self.host.cancelling()
        owner.state = RELEASING
        owner.releasing_at = self.clock()
        error: BaseException | None = None
        try:
            if exc is None:
                await owner.leave(None, None, None)
            elif await owner.leave(type(exc), exc, exc.__traceback__):
                self._answer(exc, None)
        except BaseException as raised:  # noqa: BLE001  (as above)
            error = await self._left_badly(owner, raised, exc, before)
        owner.state = RELEASED
        owner.released_at = self.clock()
        if self.observe is not None and error is None:
            self.observe(owner, "released", owner.released_at - owner.releasing_at, None)
        if self.unreleased:
            self._unblock(owner)

    async def _left_badly(
        self, owner: Owner, error: BaseException, exc: BaseException | None, before: int
    ) -> BaseException | None:
        """What an exit in the caller's task raised: an answer to what it was told, or a failure."""
        owner.released_at = self.clock()
        if owner.cancels:
            await self._forget_interrupt(delivered=isinstance(error, CancelledError))
        elif error is exc:
            return None
        elif isinstance(error, CancelledError):
            self._remember(error)
            return None
        elif isinstance(exc, CancelledError) and (
            self.host.cancelling() < before or error.__cause__ is exc
        ):
            self._answer(exc, error)
            return None
        self._release_failed(owner, error)
        if self.current is None:
            self.current = owner.error  # those around it see it, as they would in nested blocks
        return error

    def _answer(self, exc: BaseException, error: BaseException | None) -> None:
        """What was being unwound is replaced, or suppressed with what came of it in this task."""
        self.current = error
        if error is None:
            self.release_failures = [pair for pair in self.release_failures if not pair[0].here]
        else:
            self.release_failures = [pair for pair in self.release_failures if pair[1] is not exc]

    async def _surface(self, body: BaseException | None) -> BaseException | None:
        """Exactly one thing surfaces; what ranks lower becomes a note that names its resource."""
        current, ours = self.current, False
        if self.host_cancelled:
            ours = self.host.uncancel() <= self.baseline
            self.host_cancelled = False
            if ours and not isinstance(current, CancelledError) and self.host is asyncio.current_task():  # noqa: E501  # fmt: skip
                with contextlib.suppress(CancelledError):
                    await asyncio.sleep(0)  # it came too late for the body
        fatal = [e for _, e in self.release_failures if not isinstance(e, ReleaseError)]
        errors = [e for _, e in self.release_failures if isinstance(e, ReleaseError)]
        if isinstance(current, (KeyboardInterrupt, SystemExit)):
            primary: BaseException | None = current
        elif fatal:
            primary = fatal[0]
        elif (
            self.losses
            and self.cancel_when_lost
            and (current is None or (ours and isinstance(current, CancelledError)))
        ):
            primary = self._lost_error(self.losses[0])
        elif current is not None and (current is body or not isinstance(current, ReleaseError)):
            primary = current
        elif len(errors) > 1:
            primary = ReleaseErrorGroup(f"{len(errors)} resources could not be released", errors)
        else:
            primary = errors[0] if errors else None
        self._add_notes(primary, body)
        return primary

    def _add_notes(self, primary: BaseException | None, body: BaseException | None) -> None:
        if primary is None:
            return
        if primary is not body and isinstance(primary, (ReleaseError, ReleaseErrorGroup)):
            return
        for owner, failure in self.release_failures:
            if failure is not primary:
                primary.add_note(f"besides, {told(owner, failure)}")
                log.error("%s", told(owner, failure))
        if body is not None and primary is not body and not isinstance(body, CancelledError):
            primary.add_note(f"before that: {described(body)}")
        if not isinstance(primary, ResourceLost):
            for owner in self.losses:
                primary.add_note(f"resource {owner.name!r} was lost: {described_loss(owner)}")

    # --- deadlines ---

    def arm(self, at: float) -> None:
        """Look at the deadlines then, or sooner."""
        if at < self.timer_at:
            if self.timer is not None:
                self.timer.cancel()
            self.timer_at = at
            self.timer = self.loop.call_later(at - self.clock() + EARLY_SECONDS, self._sweep)

    def _disarm(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer, self.timer_at = None, math.inf

    def _sweep(self) -> None:
        self.timer, self.timer_at = None, math.inf
        now = self.clock()
        before = -1
        while before != self.abandoned:  # what is abandoned lets needs begin that were looked at
            before = self.abandoned
            soonest = self._look_at_deadlines(now)
        if soonest < math.inf:
            self.arm(soonest)

    def _look_at_deadlines(self, now: float) -> float:
        """Cancel or abandon who is due; return when the next one will be."""
        soonest = math.inf
        for owner in self.owners:
            if owner.state is ACQUIRING:
                due = self._due(owner, owner.acquiring_at or now, owner.acquire_timeout)
            elif owner.state is RELEASING:
                due = self._due(owner, owner.releasing_at or now, owner.release_timeout)
            else:
                continue
            if owner.cancelled_at > (owner.ready_at or 0.0):  # asked to stop in this phase
                due = owner.cancelled_at + self.grace
                if now >= due:
                    due = math.inf
                    self._abandon(owner)
            elif now >= due:
                owner.timed_out = True
                self.cancel(owner, now)
                due = now + self.grace
            soonest = min(soonest, due)
        return soonest

    def _due(self, owner: Owner, begun: float, own_limit: float | None) -> float:
        """Its own deadline, cut short by that of the phase; who begins late has the grace."""
        limit = own_limit
        if limit is None:
            limit = self.acquire_timeout if owner.state is ACQUIRING else self.release_timeout
        if owner.late and not self.stopping:
            return begun + limit
        return min(begun + limit, max(self.deadline, begun + self.grace))

    def _abandon(self, owner: Owner) -> None:
        """It ignores its cancellation: nobody waits for it any longer."""
        if owner.here:  # the caller's own task cannot be left behind; it is asked again
            owner.cancelled_at = self.clock()
            return
        log.error("resource %r ignores its cancellation and is abandoned", owner.name)
        abandoned_tasks.add(owner.task)
        owner.abandoned = True
        self.abandoned += 1
        if owner.state is ACQUIRING:
            self.not_acquired(owner, CancelledError("it ignores its cancellation"))
            owner.state = ABANDONED
        else:
            owner.state = ABANDONED
            owner.released_at = self.clock()
            self._release_failed(owner, CancelledError("it ignores its cancellation"))
            owner.released_at = 0.0
            self._unblock(owner)
        if self.observe is not None:
            self.observe(owner, "abandoned", None, owner.error)


def told(owner: Owner, failure: BaseException) -> str:
    """A failure in a sentence that names its resource."""
    if isinstance(failure, ResourceError):
        return str(failure)
    return f"resource {owner.name!r} ended with {described(failure)}"


def described_loss(owner: Owner) -> str:
    """What it died of, in one line."""
    if owner.loss is None or isinstance(owner.loss, CancelledError):
        return "its task was cancelled from inside"
    return described(owner.loss)


def topological(owners: Iterable[Owner]) -> list[Owner]:
    """The owners so that needs come first, and otherwise as declared; needs no recursion."""
    owners = list(owners)
    place = {owner: number for number, owner in enumerate(owners)}
    unmet = {owner: len(owner.needs) for owner in owners}
    ready = [place[owner] for owner in owners if not unmet[owner]]
    order = []
    while ready:
        owner = owners[heapq.heappop(ready)]
        order.append(owner)
        for dependent in owner.dependents:
            unmet[dependent] -= 1
            if not unmet[dependent]:
                heapq.heappush(ready, place[dependent])
    return order
