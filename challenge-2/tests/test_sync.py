"""A plain `with`: the same without await, in the caller's own thread where it matters."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from stopwatch import Stopwatch

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).resolve().parent.parent


def own_threads() -> list[str]:
    names = (thread.name for thread in threading.enumerate())
    return [name for name in names if name.startswith(("resource", "sqlite"))]


class Plain:
    """A blocking context manager that may only be used in one thread."""

    def __init__(self, log: list[str], name: str = "plain", error: Any = None) -> None:
        self.log = log
        self.name = name
        self.error = error
        self.thread = 0

    def __enter__(self) -> "Plain":
        self.thread = threading.get_ident()
        self.log.append(f"enter {self.name}")
        return self

    def __exit__(self, *details: Any) -> None:
        assert threading.get_ident() == self.thread
        self.log.append(f"leave {self.name}")
        if self.error:
            raise self.error


@contextlib.asynccontextmanager
async def slow(seconds: float, log: list[str] | None = None) -> AsyncIterator[str]:
    await asyncio.sleep(seconds)
    yield "slow"
    if log is not None:
        log.append("left slow")


def test_the_documented_uses_of_the_predecessors_run() -> None:
    from resource_manager import ResourceManager

    with ResourceManager(enable_metrics=True) as rm:
        database = rm.acquire_database()
        cache = rm.acquire_redis()
        queue = rm.acquire_rabbitmq()
        database.execute("CREATE TABLE IF NOT EXISTS t (a)")
        database.execute("INSERT INTO t VALUES (?)", (1,))
        cache.set("key", {"a": 1})
        queue.publish("jobs", "body")
        with rm.nest(ResourceManager()) as inner:
            analytics = inner.acquire_database(name="analytics")
            assert analytics.fetch("SELECT a FROM t") == [(1,)]
            assert inner.analytics.fetch("SELECT 1") == [(1,)]
        assert cache.get("key") == {"a": 1}
        assert next(queue.consume("jobs")) == b"body"
        metrics = rm.get_metrics()
    assert metrics["in_use"] == 3
    assert metrics["resources"]["database"]["acquire_s"] > 0

    with pytest.raises(ConnectionError), ResourceManager() as rm:
        rm.acquire_database(host="invalid_host")


def test_a_transaction_lasts_over_several_calls_and_rolls_back() -> None:
    from utils import ResourceManager

    with ResourceManager() as rm:
        database = rm.acquire_database()
        database.execute("CREATE TABLE t (a)")
        with pytest.raises(KeyError), database.transaction():
            database.execute("INSERT INTO t VALUES (1)")
            assert database.fetch("SELECT a FROM t") == [(1,)]
            raise KeyError
        assert database.fetch("SELECT a FROM t") == []
        with database.transaction() as inside:
            inside.execute("INSERT INTO t VALUES (2)")
        assert database.fetch("SELECT a FROM t")[0]["a"] == 2


def test_a_real_database_serves_a_plain_with_too(needs: Any) -> None:
    from utils import ResourceManager

    needs.package("psycopg_pool")
    _, port = needs.server("PostgreSQL", 5432)
    with ResourceManager() as rm:
        database = rm.acquire_database(f"postgresql://postgres@127.0.0.1:{port}/test")
        assert database.fetch("SELECT ? + 1 AS two", (1,))[0]["two"] == 2


def test_messages_are_iterated() -> None:
    from utils import ResourceManager

    with ResourceManager() as rm:
        queue = rm.acquire_rabbitmq()
        for number in range(3):
            queue.publish("q", str(number))
        assert [m.body for m in queue.consume("q", timeout=0.2)] == [b"0", b"1", b"2"]
        api = rm.acquire_api()
        assert api.get("/x").json()["path"] == "/x"


def test_blocking_resources_stay_in_the_callers_thread_async_ones_start_in_parallel() -> None:
    from utils import ResourceManager

    log: list[str] = []
    manager = ResourceManager()
    plain = Plain(log)
    for number in range(10):
        manager.add(slow(0.05), f"slow{number}")
    manager.add(plain, "plain")
    manager.add(Plain(log, "user"), "user", ("plain", "slow0"))
    began = Stopwatch()
    with manager as rm:
        assert began.seconds() < 0.3
        assert plain.thread == threading.get_ident()
        assert rm.slow3 == "slow"
        assert rm["plain"] is plain
        assert rm.acquire(Plain(log, "late")).thread == threading.get_ident()

    assert log.index("leave user") < log.index("leave plain")
    assert not own_threads()


def test_the_bodys_error_surfaces_with_notes() -> None:
    from utils import ReleaseError, ResourceManager

    original = ValueError("body")
    manager = ResourceManager(Plain([], error=OSError("stuck")))
    with pytest.raises(ValueError, match="body") as caught, manager:
        raise original
    assert caught.value is original
    assert "stuck" in caught.value.__notes__[0]
    manager = ResourceManager(Plain([], error=OSError("stuck")))
    with pytest.raises(ReleaseError, match="stuck"), manager:
        pass


def test_children_that_are_still_open_close_first() -> None:
    from utils import ResourceManager

    log: list[str] = []
    with ResourceManager(Plain(log, "outer")) as rm:
        inner = rm.nest(ResourceManager(Plain(log, "inner")))
        inner.__enter__()
    assert log[-2:] == ["leave inner", "leave outer"]


def test_it_is_used_once_and_closed_once() -> None:
    from utils import ResourceClosed, ResourceManager

    manager = ResourceManager()
    with manager as rm:
        rm.acquire(slow(0), "a")
        rm.close()
        rm.close()
        with pytest.raises(ResourceClosed):
            rm.a  # noqa: B018
        with pytest.raises(ResourceClosed):
            rm.acquire(slow(0), "b")
    with pytest.raises(RuntimeError, match="used once"):
        manager.__enter__()
    assert not own_threads()


def test_a_failed_start_leaves_no_thread() -> None:
    from utils import AcquireError, ResourceManager

    log: list[str] = []

    def fails() -> None:
        time.sleep(0.02)
        raise OSError("no")

    manager = ResourceManager(Plain(log))
    manager.add(fails, "fails")
    with pytest.raises(AcquireError, match="'fails'"):
        manager.__enter__()
    assert log == ["enter plain", "leave plain"]
    assert not own_threads()


def test_a_loss_is_told_at_the_end_and_on_access() -> None:
    from utils import ResourceLost, ResourceManager

    with pytest.raises(ResourceLost, match="dead"), ResourceManager() as rm:
        rm.acquire(slow(0), "a")
        rm.portal.loop.call_soon_threadsafe(rm.lost, "a", OSError("dead"))
        time.sleep(0.05)
        with pytest.raises(ResourceLost):
            rm.a  # noqa: B018


def test_several_threads_share_a_scope() -> None:
    from concurrent.futures import ThreadPoolExecutor

    from utils import ResourceManager

    with ResourceManager() as rm:
        database = rm.acquire_database()
        database.execute("CREATE TABLE t (a)")

        def work(number: int) -> None:
            with database.transaction():
                database.execute("INSERT INTO t VALUES (?)", (number,))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(20)))
        assert database.fetch("SELECT count(*) FROM t") == [(20,)]
        assert rm.health().status == "healthy"


class TestInsideARunningLoop:
    def test_a_sync_native_set_works(self) -> None:
        from utils import ResourceManager

        async def main() -> None:
            with ResourceManager.for_pipeline(db_path="a.db", queue_maxsize=3) as rm:
                assert isinstance(rm.db, sqlite3.Connection)
                rm.db.execute("SELECT * FROM aggregates")
                await rm.queues["ingest_q"].put(1)
                assert rm.queues["ingest_q"].maxsize == 3
                assert rm.acquire_database().fetch("SELECT 1") == [(1,)]

        asyncio.run(main())

    def test_an_async_only_resource_is_a_clear_error_at_once(self) -> None:
        from utils import ResourceManager

        async def main() -> None:
            with pytest.raises(RuntimeError, match="async with"):
                ResourceManager(slow(0)).__enter__()
            with ResourceManager() as rm, pytest.raises(RuntimeError, match="async with"):
                rm.acquire(slow(0))

        asyncio.run(main())
        assert not own_threads()

    def test_an_async_caller_affine_one_needs_async_with(self) -> None:
        from utils import ResourceManager

        manager = ResourceManager()
        manager.add(slow(0), "limit", affinity="caller")
        with pytest.raises(RuntimeError, match="async with"):
            manager.__enter__()


def test_ten_thousand_cycles_leave_no_thread() -> None:
    from utils import ResourceManager

    for _ in range(200):
        with ResourceManager(Plain([])):
            pass
    assert not own_threads()


@pytest.mark.kill
def test_ctrl_c_releases_what_is_held(tmp_path: Path) -> None:
    script = f"""
import sys, time
sys.path.insert(0, {str(FOLDER)!r})
from utils import ResourceManager
class Plain:
    def __enter__(self): print("entered", flush=True)
    def __exit__(self, *d): print("left", d[0].__name__, flush=True)
class Slow:
    async def __aenter__(self):
        import asyncio
        print("waiting", flush=True)
        await asyncio.sleep(60)
    async def __aexit__(self, *d): pass
manager = ResourceManager(Plain(), acquire_timeout=100)
if sys.argv[1] == "start":
    manager.add(Slow())
with manager:
    print("body", flush=True)
    time.sleep(60)
"""
    for phase, ready in (("start", "waiting"), ("body", "body")):
        process = subprocess.Popen(
            [sys.executable, "-c", script, phase], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=tmp_path,
        )  # fmt: skip
        assert process.stdout is not None
        lines: Iterator[str] = iter(process.stdout.readline, "")
        for line in lines:
            if ready in line:
                break
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert "left KeyboardInterrupt" in out or "left CancelledError" in out, (out, err)
        assert "KeyboardInterrupt" in err


def test_what_is_used_after_the_end_is_refused_whatever_it_is() -> None:
    from utils import ResourceClosed, ResourceManager

    with ResourceManager() as rm:
        database, cache = rm.acquire_database("sqlite://"), rm.acquire_cache()
        messages = rm.acquire_rabbitmq("sqlite:///queue.db").consume("none")
    for use in (
        lambda: database.fetch("SELECT 1"), lambda: database.transaction(),
        lambda: cache.get("a"), lambda: next(messages), rm.health,
    ):  # fmt: skip
        with pytest.raises(ResourceClosed):
            use()


def test_threads_that_still_use_a_scope_when_it_ends_are_refused_and_do_not_hang() -> None:
    from utils import OperationError, ResourceClosed, ResourceManager

    ends: list[type[BaseException]] = []

    def use(database: Any) -> None:
        try:
            while True:
                database.fetch("SELECT 1")
        except (ResourceClosed, OperationError) as error:
            ends.append(type(error))

    for _ in range(20):
        with ResourceManager() as rm:
            database = rm.acquire_database("sqlite://")
            threads = [threading.Thread(target=use, args=(database,)) for _ in range(3)]
            for thread in threads:
                thread.start()
        for thread in threads:
            thread.join(10)
    assert len(ends) == 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused_and_leaves_what_is_its_parents(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(FOLDER)!r})
from utils import ResourceClosed, ResourceManager
with ResourceManager() as rm:
    database = rm.acquire_database("sqlite:///f.db")
    child = os.fork()
    if not child:
        signal.alarm(20)
        for use in (lambda: database.fetch("SELECT 1"), rm.acquire_cache, rm.health):
            try:
                use()
            except ResourceClosed:
                print("refused", flush=True)
    else:
        _, status = os.waitpid(child, 0)
        print("child", status, database.fetch("SELECT 1 AS one"), flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False,
        cwd=tmp_path,
    )  # fmt: skip

    assert done.stdout.split() == ["refused"] * 3 + ["child", "0", "[(1,)]"], done


def test_an_interrupt_that_comes_too_late_for_its_command_ends_no_other() -> None:
    from utils import ResourceManager

    done: list[int] = []

    def use() -> None:
        with ResourceManager() as rm:
            rm.portal.loop.call_soon_threadsafe(rm.host.task.cancel)
            done.append(rm.acquire_cache().set("a", 1) or 1)
        done.append(2)

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(10)
    assert done == [1, 2]


@pytest.mark.kill
def test_ctrl_c_during_release_is_raised_once_everything_is_released() -> None:
    from utils import ResourceManager

    log: list[str] = []

    @contextlib.asynccontextmanager
    async def slow_to_go() -> AsyncIterator[None]:
        yield
        await asyncio.sleep(0.4)
        log.append("gone")
        raise OSError("stuck")

    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    manager = ResourceManager(Plain(log))
    manager.add(slow_to_go(), "slow")
    with pytest.raises(KeyboardInterrupt) as caught, manager:
        timer.start()
    timer.join()

    assert log == ["enter plain", "leave plain", "gone"]
    assert "'slow'" in "".join(caught.value.__notes__)
    assert not own_threads()
