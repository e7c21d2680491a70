"""A declared resource and its life: entered, held and left by one task of its own.

`own` is that life. Its `Run` (in `engine.py`) decides when it begins and when it ends; the moments
and the state are kept in the `Owner`, where reports, the log and the metrics read them.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import heapq
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine import Run

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
