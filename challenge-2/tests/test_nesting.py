"""Managers in managers, and managers that several tasks handle: nothing leaks, nothing waits."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytestmark = [pytest.mark.unit, pytest.mark.anyio]


@pytest.fixture
def held() -> list[str]:
    """The names of what is held now."""
    return []


@pytest.fixture
def slow(held: list[str]) -> Any:
    @contextlib.asynccontextmanager
    async def make(name: str, acquire: float = 0, release: float = 0) -> AsyncIterator[str]:
        await asyncio.sleep(acquire)
        held.append(name)
        try:
            yield name
        finally:
            held.remove(name)
            await asyncio.sleep(release)

    return make


async def test_a_parent_that_ends_gives_up_the_start_of_its_child(slow: Any, held: Any) -> None:
    from utils import AcquireError, ResourceManager

    child = ResourceManager(name="child")
    child.add(slow("quick"), "quick")
    child.add(slow("slow", 60), "slow")
    child.add(slow("user"), "user", ("slow",))
    async with asyncio.timeout(2):
        async with ResourceManager(slow("base")) as scope:
            nesting = asyncio.create_task(scope.nest(child))
            while "quick" not in held:
                await asyncio.sleep(0)
        with pytest.raises(AcquireError, match="closed while"):
            await nesting

    assert held == []
    assert child.report.resources["user"].state == "declared"


async def test_a_manager_may_be_closed_while_another_task_enters_it(slow: Any, held: Any) -> None:
    from utils import AcquireError, ResourceManager

    manager = ResourceManager(slow("quick"), slow("slow", 60))
    entering = asyncio.create_task(manager.__aenter__())
    while not held:
        await asyncio.sleep(0)
    async with asyncio.timeout(2):
        await asyncio.gather(manager.aclose(), manager.aclose())
        with pytest.raises(AcquireError, match="closed while"):
            await entering

    assert held == []


async def test_a_parent_that_waits_for_a_child_to_close_may_be_cancelled(
    slow: Any, held: Any
) -> None:
    from utils import ResourceManager

    closing: list[asyncio.Task[None]] = []

    async def run() -> None:
        async with ResourceManager(slow("base", release=0.01)) as scope:
            inner = await scope.nest(ResourceManager(slow("inner", release=0.1)))
            closing.append(asyncio.create_task(inner.aclose()))
            await asyncio.sleep(0)

    task = asyncio.create_task(run())
    while not closing or "inner" in held:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await closing[0]

    assert held == []


@pytest.mark.parametrize("sequential", [False, True])
async def test_only_the_task_that_entered_may_acquire_in_the_task_of_the_caller(
    slow: Any, held: Any, sequential: bool
) -> None:
    from utils import ResourceManager

    async with ResourceManager(slow("base"), sequential=sequential) as scope:
        other = asyncio.create_task(scope.acquire(slow("late"), "late", affinity="caller"))
        with pytest.raises(RuntimeError, match="only the task that entered"):
            await other
        assert held == ["base"]
        await scope.acquire(slow("late"), "late", affinity="caller")

    assert held == []


async def test_a_parent_closed_by_a_task_that_may_not_close_its_child_stays_open(
    slow: Any, held: Any
) -> None:
    from utils import ResourceManager

    child = ResourceManager()
    child.add(slow("inner"), "inner", affinity="caller")
    async with ResourceManager(slow("base")) as scope:
        await scope.nest(child)
        other = asyncio.create_task(scope.aclose())
        with pytest.raises(RuntimeError, match="only the task that entered"):
            await other
        assert held == ["base", "inner"]

    assert held == []


async def test_another_task_cannot_nest_what_lives_in_its_own_task(slow: Any, held: Any) -> None:
    from utils import ResourceManager

    child = ResourceManager()
    child.add(slow("inner"), "inner", affinity="caller")
    async with ResourceManager(slow("base")) as scope:
        other = asyncio.create_task(scope.nest(child))
        with pytest.raises(RuntimeError, match="only the task that entered"):
            await other

    assert held == []


async def test_what_a_child_could_not_release_is_named_although_its_parent_is_lost(
    slow: Any,
) -> None:
    from utils import ResourceLost, ResourceManager

    @contextlib.asynccontextmanager
    async def stuck() -> AsyncIterator[None]:
        try:
            yield
        finally:
            raise OSError("stuck")

    manager = ResourceManager()
    manager.add(slow("base"), "base")
    with pytest.raises(ResourceLost, match="'base'") as caught:
        async with manager as scope:
            child = ResourceManager()
            child.add(stuck(), "one")
            await scope.nest(child)
            manager.lost("base", OSError("dead"))
            await asyncio.sleep(1)

    assert any("'one'" in note for note in caught.value.__notes__)


async def test_a_cancellation_tells_each_part_of_a_group_it_outranks(slow: Any) -> None:
    from utils import ResourceManager

    @contextlib.asynccontextmanager
    async def stuck() -> AsyncIterator[None]:
        yield
        raise OSError("stuck")

    async def run() -> None:
        async with ResourceManager(slow("base", release=0.05)) as scope:
            child = ResourceManager()
            child.add(stuck(), "one")
            child.add(stuck(), "two")
            await scope.nest(child)
            ended.set()

    ended = asyncio.Event()
    task = asyncio.create_task(run())
    await ended.wait()
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    notes = "\n".join(caught.value.__notes__)
    assert "'one'" in notes
    assert "'two'" in notes


async def test_what_lives_in_another_task_is_left_by_it_after_its_parent_has_ended(
    slow: Any, held: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from utils import ReleaseError, ResourceManager

    go_on, nested = asyncio.Event(), asyncio.Event()

    async def request(scope: Any) -> None:
        inner = await scope.nest(ResourceManager(slow("plain"), name="request"))
        await inner.acquire(slow("mine"), "mine", affinity="caller")
        nested.set()
        await go_on.wait()
        await inner.aclose()

    async with asyncio.timeout(2):
        with pytest.raises(ReleaseError, match=r"'mine'.*lives in another task"):
            async with ResourceManager(slow("base")) as scope:
                task = asyncio.create_task(request(scope))
                await nested.wait()
        assert held == ["mine"]
        go_on.set()
        await task

    assert held == []


async def test_a_cancellation_while_a_late_start_is_ended_surfaces(slow: Any, held: Any) -> None:
    from utils import AcquireError, ResourceManager

    @contextlib.asynccontextmanager
    async def stubborn() -> AsyncIterator[None]:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(0.05)
        yield

    late: list[asyncio.Task[Any]] = []

    async def run() -> None:
        async with ResourceManager(slow("base")) as scope:
            late.append(asyncio.create_task(scope.acquire(stubborn(), "stubborn")))
            await asyncio.sleep(0.01)
            asyncio.get_running_loop().call_later(0.01, task.cancel)

    task = asyncio.create_task(run())
    with pytest.raises(asyncio.CancelledError):
        await task
    with contextlib.suppress(AcquireError):
        await late[0]

    assert held == []
