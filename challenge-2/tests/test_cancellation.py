"""Cancellation at every step of every drill: what was acquired is released exactly once."""

import asyncio
from typing import Any

import pytest

NAMES = [
    "all-well", "diamond", "chain", "fifty-at-once", "refused", "two-refused", "never-answers",
    "last-one-refused", "body-fails", "use-fails", "lost", "lost-need", "release-fails",
    "all-releases-fail", "body-and-releases-fail", "release-hangs", "stubborn",
    "cancelled-while-starting", "cancelled-in-use", "cancelled-while-stopping",
]  # fmt: skip


def perform(virtually: Any, name: str, cancel_at: int | None, **options: Any) -> Any:
    """Run a drill in virtual time, cancelled at one turn of the loop; return what is left of it."""
    from drills import Tally, body_of, catalogue, manager_of, settled

    drill = {found: drill for found, _, drill in catalogue()}[name]
    tally = Tally()
    tasks: list[asyncio.Task[None]] = []
    managers: list[Any] = []

    async def main(loop: Any) -> Any:
        manager = manager_of(drill, tally, clock=loop.time, **options)
        managers.append(manager)

        async def run() -> None:
            async with manager as scope:
                await body_of(drill, scope)

        tasks.append(asyncio.create_task(run()))
        if drill.cancel_after_ms is not None:
            loop.call_later(drill.cancel_after_ms / 1000, tasks[0].cancel)
        await asyncio.wait(tasks)
        ended = loop.steps
        await settled(manager)
        await asyncio.sleep(0)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        surfaced = asyncio.CancelledError() if tasks[0].cancelled() else tasks[0].exception()
        return surfaced, others, ended

    def inject(step: int) -> None:
        if step == cancel_at and tasks and not tasks[0].done():
            tasks[0].cancel()

    (surfaced, others, steps), _ = virtually(main, inject)
    return surfaced, others, steps, tally, managers[0]


@pytest.mark.unit
def test_the_names_above_are_those_of_the_catalogue() -> None:
    from drills import catalogue

    assert [name for name, _, _ in catalogue()] == NAMES


@pytest.mark.unit
@pytest.mark.parametrize("sequential", [False, True], ids=["parallel", "sequential"])
@pytest.mark.parametrize("name", NAMES)
def test_cancelled_at_any_step_each_acquired_resource_is_released_once(
    virtually: Any, name: str, sequential: bool
) -> None:
    options = {"sequential": sequential}
    *_, steps, _, _ = perform(virtually, name, None, **options)

    for step in range(1, steps + 1):
        surfaced, others, _, tally, manager = perform(virtually, name, step, **options)

        assert tally.acquired == tally.released, (step, tally)
        assert set(tally.acquired.values()) <= {1}, step
        assert not others, (step, others)
        assert surfaced is not None or step > steps - 3 or step <= 2, step
        states = {timing.state for timing in manager.report.resources.values()}
        assert not states & {"acquiring", "ready", "releasing"}, (step, states)


@pytest.mark.unit
@pytest.mark.parametrize("name", ["all-well", "diamond", "refused", "stubborn", "release-hangs"])
def test_cancelled_twice_at_any_two_steps_nothing_leaks(virtually: Any, name: str) -> None:
    from drills import Tally, body_of, catalogue, manager_of, settled

    drill = {found: drill for found, _, drill in catalogue()}[name]
    *_, steps, _, _ = perform(virtually, name, None)
    for first in range(1, steps + 1):
        for second in range(first, min(steps, first + 12) + 1):
            tally = Tally()
            tasks: list[asyncio.Task[None]] = []

            async def main(loop: Any, tally: Any = tally, tasks: Any = tasks) -> None:
                manager = manager_of(drill, tally, clock=loop.time)

                async def run() -> None:
                    async with manager as scope:
                        await body_of(drill, scope)

                tasks.append(asyncio.create_task(run()))
                await asyncio.wait(tasks)
                await settled(manager)

            def inject(step: int, tasks: Any = tasks, at: Any = (first, second)) -> None:
                if step in at and tasks:
                    tasks[0].cancel()

            virtually(main, inject)

            assert tally.acquired == tally.released, (first, second, tally)
