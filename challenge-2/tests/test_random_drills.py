"""Random graphs with every combination of faults and declarations, against a simple model.

A case is a graph of up to 50 synthetic resources, some of them optional, in the caller's task,
tried again, with deadlines of their own or in a nested manager; it is cancelled at random turns of
the loop or not at all. Time is virtual. The model knows only what every user is told: each acquired
resource is released once, needs first and last; who ranks highest surfaces; every failure is named.
"""

import asyncio
import logging
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

pytestmark = pytest.mark.unit
ROUNDS = 40  # cases per seed
SECONDS_MAX = 10.0


@dataclass
class Case:
    """What is drawn, and what came of it."""

    parts: list[Any]
    declared: dict[str, dict[str, Any]]
    nested: set[str]
    body_error: bool
    cancel_at: set[int]
    options: dict[str, Any]
    tally: Any = None
    events: list[tuple[str, str]] = field(default_factory=list)
    surfaced: BaseException | None = None
    raised: BaseException | None = None  # by the body
    cancelled: bool = False
    seconds: float = 0.0
    left: set[Any] = field(default_factory=set)
    reports: list[Any] = field(default_factory=list)


def drawn(chance: random.Random) -> Case:
    from drills import FAULTS, Part

    count = chance.choice([1, 2, 3, 5, 8, 50])
    faulty = chance.choice([0.02, 0.1, 0.4, 0.9])
    odd = chance.choice([0.0, 0.1, 0.5])
    parts = []
    for node in range(count):
        needs = sorted({chance.randrange(node) for _ in range(chance.randint(0, 3)) if node})
        fault: Any = chance.choice(FAULTS[1:]) if chance.random() < faulty else "none"
        acquire, release = (chance.choice([0, 0, chance.randint(0, 50)]) for _ in range(2))
        parts.append(Part(f"n{node}", tuple(f"n{n}" for n in needs), acquire, release, fault))
    declared: dict[str, dict[str, Any]] = {part.name: {} for part in parts}
    for how in declared.values():
        if chance.random() < odd:
            how["affinity"] = "caller"
        if chance.random() < odd:
            how["optional"] = True
        if chance.random() < odd:
            how["retry"] = chance.randint(1, 3)
        if chance.random() < odd / 2:
            how["wait"] = chance.uniform(0, 0.3)
        if chance.random() < odd:
            how["acquire_timeout"] = chance.uniform(0.02, 0.5)
        if chance.random() < odd:
            how["release_timeout"] = chance.uniform(0.02, 0.5)
    split = chance.choice([count, count, chance.randint(0, count)])
    nested = {part.name for part in parts[split:]}
    chance.shuffle(parts)
    return Case(
        parts, declared, nested,
        body_error=chance.random() < 0.3,
        cancel_at={chance.randint(1, 3 * count + 60) for _ in range(chance.choice([0, 0, 1, 2]))},
        options={
            "sequential": chance.random() < 0.25,
            "on_lost": chance.choice(["cancel", "cancel", "mark"]),
            "acquire_timeout": 0.4, "release_timeout": 0.2,
            "release_grace": chance.choice([0.01, 0.1]),
        },
    )  # fmt: skip


class Recorder:
    """Stands where the connection log would."""

    def __init__(self, events: list[tuple[str, str]]) -> None:
        self.events = events

    def observer(self, run_id: str, manager: str, run: Any) -> Any:
        return lambda owner, event, seconds, error: self.events.append((event, owner.name))

    def ended(self, run_id: str, manager: str, run: Any) -> None:
        pass


def performed(case: Case, virtually: Any) -> Case:
    from drills import BODY_SECONDS, DrillError, Synthetic, Tally, settled
    from utils import ResourceManager

    case.tally = Tally()
    tasks: list[asyncio.Task[None]] = []

    async def main(loop: Any) -> None:
        options = {**case.options, "clock": loop.time, "events": Recorder(case.events)}
        outer, inner = ResourceManager(**options), ResourceManager(name="inner", **options)
        for part in case.parts:
            manager = inner if part.name in case.nested else outer
            manager.add(
                Synthetic(part, case.tally), part.name, part.needs, **case.declared[part.name]
            )

        async def body(scope: Any) -> None:
            if case.nested:
                scope = await scope.nest(inner)
            for part in case.parts:
                value = scope[part.name]
                if value is not None:
                    value.use()
            await asyncio.sleep(BODY_SECONDS)
            if case.body_error:
                raise DrillError("the body fails")

        async def run() -> None:
            async with outer as scope:
                try:
                    await body(scope)
                except BaseException as error:
                    case.raised = error
                    raise

        async def kept() -> None:
            try:
                await run()
            except BaseException as error:  # noqa: BLE001  (it is what the model is asked about)
                case.surfaced = error

        began = loop.time()
        tasks.append(asyncio.create_task(kept()))
        await asyncio.wait(tasks)
        if tasks[0].cancelled():  # before its first step
            case.surfaced = asyncio.CancelledError()
        case.seconds = loop.time() - began
        for manager in (outer, inner):
            await settled(manager)
        await asyncio.sleep(0)
        case.left = asyncio.all_tasks() - {asyncio.current_task()}
        case.reports = [outer.report, inner.report]

    def inject(step: int) -> None:
        if step in case.cancel_at and tasks and not tasks[0].done():
            case.cancelled |= tasks[0].cancel()

    virtually(main, inject)
    return case


def check(case: Case) -> str:
    from failures import (
        AcquireError,
        AcquireErrorGroup,
        ReleaseError,
        ReleaseErrorGroup,
        ResourceLost,
    )

    tally, surfaced = case.tally, case.surfaced
    assert tally.acquired == tally.released
    assert not case.left
    assert case.options["sequential"] or case.seconds < SECONDS_MAX
    states = {t.state for report in case.reports for t in report.resources.values()}
    assert not states & {"acquiring", "ready", "releasing"}

    first = {event: place for place, event in reversed(list(enumerate(case.events)))}
    ends = ("abandoned", "release_failed", "released")
    ended = {
        name: min(first[event, name] for event in ends if (event, name) in first)
        for name in tally.acquired
    }
    for part in case.parts:
        for need in part.needs:
            if ("acquiring", part.name) in first and not case.declared[need].get("optional"):
                assert first["acquired", need] < first["acquiring", part.name]
            if ("acquired", part.name) in first and ("acquired", need) in first:
                assert ended[part.name] < ended[need]

    def names(event: str) -> set[str]:
        return {name for found, name in case.events if found == event}

    told = " ".join([str(surfaced), *getattr(surfaced, "__notes__", ())])
    if isinstance(surfaced, BaseExceptionGroup):
        told += " ".join(map(str, surfaced.exceptions))
    for name in (names("release_failed") | names("abandoned")) & set(tally.acquired):
        assert f"'{name}'" in told, (name, told)

    if case.cancelled:
        assert isinstance(surfaced, asyncio.CancelledError)
    elif isinstance(surfaced, (AcquireError, AcquireErrorGroup)):
        errors: Any = getattr(surfaced, "exceptions", (surfaced,))
        failed = names("acquire_failed")
        assert {error.resource for error in errors} <= failed
        assert case.raised is None or case.raised is surfaced
        assert not any(case.declared[str(error.resource)].get("optional") for error in errors)
    elif isinstance(surfaced, (ReleaseError, ReleaseErrorGroup)):
        assert case.raised is None
        assert case.options["on_lost"] == "mark" or not names("lost")
    elif isinstance(surfaced, ResourceLost):
        assert names("lost")
    elif surfaced is not None:
        assert surfaced is case.raised
    else:
        assert case.raised is None
        assert not names("release_failed") | names("abandoned") & set(tally.acquired)
        assert case.options["on_lost"] == "mark" or not names("lost")
    return type(surfaced).__name__


@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_drawn_the_model_holds(
    virtually: Any, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1)
    chance = random.Random(seed)
    seen: Counter[str] = Counter()
    for _ in range(ROUNDS):
        case = drawn(chance)
        seen[check(performed(case, virtually))] += 1

    assert len(seen) >= 4, seen
