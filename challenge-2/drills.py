"""Synthetic resources with chosen faults, to see what a manager makes of them.

A drill builds a graph of them, enters it under one manager, uses it, and reports what surfaced, in
which order things happened, and whether everything acquired was released exactly once.
"""

from __future__ import annotations

import asyncio
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from failures import described
from openings import Deps, Resource
from utils import ResourceManager

Fault = Literal[
    "none", "acquire_error", "acquire_hang", "use_error", "lost", "release_error", "release_hang",
    "stubborn",
]  # fmt: skip
FAULTS: tuple[str, ...] = get_args(Fault)
BODY_SECONDS = 0.03  # how long the body uses what it has
LOST_AFTER_SECONDS = 0.01
LOST_LIMIT_SECONDS = 0.5  # for the body to be cut short by a loss
STUBBORN_SECONDS = 0.6  # how long a stubborn release ignores its cancellation
LONGEST_START = 3.0
LONGEST_STOP = 2.0
SETTLE_SECONDS = 1.5  # for what was abandoned to end by itself


class DrillError(RuntimeError):
    """A fault that was asked for."""


@dataclass(frozen=True)
class Part:
    """One synthetic resource."""

    name: str
    needs: tuple[str, ...] = ()
    acquire_ms: float = 0.0
    release_ms: float = 0.0
    fault: Fault = "none"


@dataclass(frozen=True)
class Drill:
    """A graph, and what happens to its body."""

    parts: tuple[Part, ...]
    cancel_after_ms: float | None = None
    body_error: bool = False


@dataclass
class Tally:
    """What was acquired and released, by name: the truth that the manager is checked against."""

    acquired: dict[str, int] = field(default_factory=dict)
    released: dict[str, int] = field(default_factory=dict)

    @property
    def leaked(self) -> int:
        """How many acquisitions have not been released exactly once."""
        names = self.acquired.keys() | self.released.keys()
        return sum(abs(self.acquired.get(n, 0) - self.released.get(n, 0)) for n in names)


class Synthetic(Resource["Synthetic"]):
    """Acquired after its delay, released after another, with one fault."""

    kind = "drill"
    series_name = "drill"  # names from outside must not become labels

    def __init__(self, part: Part, tally: Tally) -> None:
        self.part = part
        self.name = part.name
        self._tally = tally
        self._dying: asyncio.TimerHandle | None = None

    async def acquire(self, deps: Deps) -> Synthetic:
        """Wait, then be there, or fail as asked."""
        del deps
        await asyncio.sleep(self.part.acquire_ms / 1000)
        if self.part.fault == "acquire_hang":
            await asyncio.get_running_loop().create_future()
        if self.part.fault == "acquire_error":
            raise DrillError(f"{self.part.name} refuses to be acquired")
        self._tally.acquired[self.part.name] = self._tally.acquired.get(self.part.name, 0) + 1
        if self.part.fault == "lost":
            loop = asyncio.get_running_loop()
            death = DrillError(f"{self.part.name} has died")
            self._dying = loop.call_later(LOST_AFTER_SECONDS, self.lost, death)
        return self

    def use(self) -> None:
        """Work, or fail as asked."""
        if self.part.fault == "use_error":
            raise DrillError(f"{self.part.name} fails while it is used")

    async def release(self, value: Synthetic, exc: BaseException | None) -> None:
        """Wait, then be gone; however that ends, it counts as released."""
        del value, exc
        if self._dying is not None:
            self._dying.cancel()
        try:
            await asyncio.sleep(self.part.release_ms / 1000)
            if self.part.fault == "release_hang":
                await asyncio.get_running_loop().create_future()
            if self.part.fault == "stubborn":
                await _stubbornly(STUBBORN_SECONDS)
            if self.part.fault == "release_error":
                raise DrillError(f"{self.part.name} fails while it is released")
        finally:
            self._tally.released[self.part.name] = self._tally.released.get(self.part.name, 0) + 1


async def _stubbornly(seconds: float) -> None:
    """Wait until a cancellation comes, and then for so long again, whatever else comes."""
    loop = asyncio.get_running_loop()
    gate: asyncio.Future[None] = loop.create_future()
    try:
        await gate
    except CancelledError:
        until = loop.time() + seconds
    while (left := until - loop.time()) > 0:
        try:
            await asyncio.sleep(left)
        except CancelledError:
            continue


def manager_of(
    drill: Drill, tally: Tally, *, clock: Callable[[], float] = time.perf_counter, **options: Any
) -> ResourceManager:
    """A manager that has the parts declared, with deadlines that keep a drill below 10 s."""
    count = max(1, len(drill.parts))
    delays = sum(part.acquire_ms for part in drill.parts) / 1000
    longest_release = max((part.release_ms for part in drill.parts), default=0) / 1000
    options.setdefault("acquire_timeout", min(LONGEST_START, delays + 0.5))
    options.setdefault("release_timeout", min(LONGEST_STOP, longest_release + 0.3))
    options.setdefault("release_grace", min(0.2, 1.0 / count))
    manager = ResourceManager(name="drill", clock=clock, **options)
    for part in drill.parts:
        manager.add(Synthetic(part, tally), part.name, part.needs)
    return manager


async def body_of(drill: Drill, scope: Any) -> None:
    """Use everything for a moment, then fail if that was asked for."""
    for part in drill.parts:
        scope[part.name].use()
    await asyncio.sleep(BODY_SECONDS)
    if drill.body_error:
        raise DrillError("the body fails")
    if any(part.fault == "lost" for part in drill.parts):
        await asyncio.sleep(LOST_LIMIT_SECONDS)


async def perform(drill: Drill, manager: ResourceManager) -> BaseException | None:
    """Run the drill in a task of its own; return what surfaced."""

    surfaced: list[BaseException] = []

    async def run() -> None:
        try:
            async with manager as scope:
                await body_of(drill, scope)
        except BaseException as error:  # noqa: BLE001  (whatever it is: it is what was asked for)
            surfaced.append(error)

    loop = asyncio.get_running_loop()
    task = loop.create_task(run())
    timer = None
    if drill.cancel_after_ms is not None:
        timer = loop.call_later(drill.cancel_after_ms / 1000, task.cancel)
    try:
        await asyncio.wait({task})
    except CancelledError:
        task.cancel()
        await asyncio.wait({task})
        raise
    finally:
        if timer is not None:
            timer.cancel()
    return surfaced[0] if surfaced else None


async def settled(manager: ResourceManager, sleep: Any = asyncio.sleep) -> None:
    """Wait for the tasks that the manager had to abandon."""
    run = manager.running
    waited = 0.0
    while run is not None and waited < SETTLE_SECONDS:
        if all(owner.task.done() for owner in run.owners if owner.abandoned):
            return
        await sleep(0.01)
        waited += 0.01


def described_tree(error: BaseException | None) -> dict[str, Any] | None:
    """An exception with its notes, its cause and its parts, as plain data."""
    if error is None:
        return None
    parts = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return {
        "type": type(error).__name__,
        "message": str(error) if not parts else error.args[0],
        "notes": list(getattr(error, "__notes__", ())),
        "cause": described(error.__cause__) if error.__cause__ is not None else None,
        "exceptions": [described_tree(part) for part in parts],
    }


# --- the catalogue ----------------------------------------------------------------------------


def catalogue() -> Iterator[tuple[str, str, Drill]]:
    """Twenty drills: a name, a sentence, and the drill."""

    def part(name: str, *needs: str, ms: float = 20, fault: Fault = "none") -> Part:
        return Part(name, needs, acquire_ms=ms, release_ms=ms / 2, fault=fault)

    database, cache, queue = part("database", ms=40), part("cache"), part("queue")
    service = part("service", "database", "cache", "queue", ms=10)
    base = (database, cache, queue, service)

    def with_fault(name: str, fault: Fault) -> tuple[Part, ...]:
        return tuple(
            Part(p.name, p.needs, p.acquire_ms, p.release_ms, fault) if p.name == name else p
            for p in base
        )

    diamond = (part("a"), part("b", "a"), part("c", "a", ms=40), part("d", "b", "c"))
    chain = tuple(part(f"n{i}", *([f"n{i - 1}"] if i else []), ms=5) for i in range(10))
    yield "all-well", "Four resources, nothing fails.", Drill(base)
    yield "diamond", "Two branches between one need and one user.", Drill(diamond)
    yield "chain", "Ten in a row: parallel start saves nothing.", Drill(chain)
    yield (
        "fifty-at-once",
        "Fifty independent resources of 50 ms.",
        Drill(tuple(part(f"r{i}", ms=50) for i in range(50))),
    )
    yield (
        "refused",
        "One cannot be acquired; its sibling in flight is cancelled.",
        Drill(with_fault("cache", "acquire_error")),
    )
    yield (
        "two-refused",
        "Two fail in the same moment: a group.",
        Drill((part("a", fault="acquire_error"), part("b", fault="acquire_error"), part("c"))),
    )
    yield (
        "never-answers",
        "One hangs until its deadline.",
        Drill(with_fault("queue", "acquire_hang")),
    )
    yield (
        "last-one-refused",
        "The last of a chain fails; nine are released.",
        Drill((*chain[:9], part("n9", "n8", ms=5, fault="acquire_error"))),
    )
    yield "body-fails", "The body's error surfaces, the same object.", Drill(base, body_error=True)
    yield "use-fails", "A resource fails in use.", Drill(with_fault("database", "use_error"))
    yield "lost", "A resource dies; the body is cut short.", Drill(with_fault("cache", "lost"))
    yield (
        "lost-need",
        "What others need dies.",
        Drill((part("a", fault="lost"), part("b", "a"), part("c", "b"))),
    )
    yield (
        "release-fails",
        "One cannot be released.",
        Drill(with_fault("cache", "release_error")),
    )
    yield (
        "all-releases-fail",
        "Every release fails: a group.",
        Drill(tuple(part(n, fault="release_error") for n in ("a", "b", "c"))),
    )
    yield (
        "body-and-releases-fail",
        "The body's error surfaces, the others are its notes.",
        Drill(
            tuple(part(n, fault="release_error") for n in ("a", "b", "c")),
            body_error=True,
        ),
    )
    yield (
        "release-hangs",
        "One hangs while it is released; only what it needs waits.",
        Drill(with_fault("service", "release_hang")),
    )
    yield (
        "stubborn",
        "One ignores its cancellation, and is abandoned.",
        Drill(with_fault("queue", "stubborn")),
    )
    yield (
        "cancelled-while-starting",
        "Cancelled after 25 ms, with some ready and some in flight.",
        Drill(base, cancel_after_ms=25),
    )
    yield "cancelled-in-use", "Cancelled in the body.", Drill(base, cancel_after_ms=65)
    yield (
        "cancelled-while-stopping",
        "Cancelled during release, which goes on; one of them fails.",
        Drill(
            tuple(
                Part(p.name, p.needs, p.acquire_ms, 60, p.fault)
                for p in with_fault("database", "release_error")
            ),
            cancel_after_ms=130,
        ),
    )
