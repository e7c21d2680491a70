"""A tour of the resource manager, to be read from top to bottom: `python demo_test.py`."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def told(text: str) -> None:
    """A line for whoever runs this file as a script."""
    print(f"  {text}")


@contextlib.asynccontextmanager
async def slow(name: str, seconds: float = 0.05, fails: bool = False) -> AsyncIterator[str]:
    """A resource that takes its time to come and to go."""
    await asyncio.sleep(seconds)
    try:
        yield name
    finally:
        await asyncio.sleep(seconds)
        if fails:
            raise OSError(f"{name} is stuck")


async def test_everything_starts_at_once_along_its_needs() -> None:
    from utils import ResourceManager

    manager = ResourceManager()
    for name in ("database", "cache", "queue"):
        manager.add(slow(name), name)
    manager.add(slow("service"), "service", ("database", "cache", "queue"))
    async with manager as scope:
        assert scope.service == "service"

    report = manager.report
    assert report.saved_s > 0.1
    assert report.critical_path[-1] == "service"
    told(f"wall {report.wall_s * 1000:.0f} ms instead of {report.sum_s * 1000:.0f} ms")


async def test_the_bodys_own_error_surfaces_and_hides_no_other() -> None:
    from utils import ResourceManager

    manager = ResourceManager()
    manager.add(slow("cache", fails=True), "cache")
    with pytest.raises(ValueError, match="body") as caught:
        async with manager:
            raise ValueError("the body fails")
    assert "cache is stuck" in caught.value.__notes__[0]
    told(f"{caught.value!r}, and its note: {caught.value.__notes__[0]}")


async def test_a_server_that_is_down_is_a_connection_error_with_its_name() -> None:
    from utils import APIConnection, ResourceManager

    manager = ResourceManager()
    manager.add(APIConnection("http://127.0.0.1:1"), "billing")
    manager.add(slow("cache", 5), "cache")
    began = time.monotonic()
    with pytest.raises(ConnectionError) as caught:
        async with manager:
            pass
    assert time.monotonic() - began < 1
    told(str(caught.value))


async def test_a_close_that_hangs_delays_nobody() -> None:
    from utils import ReleaseTimeout, ResourceManager

    @contextlib.asynccontextmanager
    async def hangs() -> AsyncIterator[None]:
        yield
        await asyncio.sleep(60)

    manager = ResourceManager(release_timeout=0.1, release_grace=0.1)
    manager.add(hangs(), "broker")
    manager.add(slow("cache"), "cache")
    began = time.monotonic()
    with pytest.raises(ReleaseTimeout) as caught:
        async with manager:
            pass
    assert time.monotonic() - began < 1
    told(str(caught.value))


def test_the_same_without_await() -> None:
    from utils import ResourceManager

    with ResourceManager(enable_metrics=True) as rm:
        database: Any = rm.acquire_database()
        database.execute("CREATE TABLE t (a)")
        with contextlib.suppress(ZeroDivisionError), database.transaction():
            database.execute("INSERT INTO t VALUES (1)")
            _ = 1 / 0
        assert database.fetch("SELECT * FROM t") == []
    told("a transaction whose body failed left 0 rows")


def test_twenty_drills_leak_nothing() -> None:
    from drills import Tally, catalogue, manager_of, perform, settled

    async def run(drill: Any) -> int:
        tally = Tally()
        manager = manager_of(drill, tally)
        await perform(drill, manager)
        await settled(manager)
        return tally.leaked

    async def run_all() -> list[int]:
        return await asyncio.gather(*(run(drill) for _, _, drill in catalogue()))

    leaked = asyncio.run(run_all())
    assert leaked == [0] * 20
    told(f"{len(leaked)} drills with faults, leaked: {sum(leaked)}")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-s"]))
