"""The real resources: one suite for each interface, over all that implement it."""

import asyncio
import contextlib
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from stopwatch import Stopwatch

pytestmark = [pytest.mark.integration, pytest.mark.anyio]


@pytest.fixture(params=["sqlite", "postgresql"])
def database_options(request: Any, needs: Any, tmp_path: Path) -> dict[str, Any]:
    if request.param == "sqlite":
        return {"url": f"sqlite:///{tmp_path / 'test.db'}"}
    needs.package("psycopg_pool")
    _, port = needs.server("PostgreSQL", 5432)
    return {"url": f"postgresql://postgres@127.0.0.1:{port}/test"}


@pytest.fixture
async def database(database_options: Any) -> AsyncIterator[Any]:
    from utils import ResourceManager

    async with ResourceManager() as scope:
        found: Any = await scope.acquire_database(**database_options)
        table = f"c2_{uuid.uuid4().hex}"
        await found.execute(f"CREATE TABLE {table} (id INTEGER, word TEXT)")
        found.table = table
        yield found
        await found.execute(f"DROP TABLE {table}")


class TestDatabase:
    async def test_rows_are_read_by_position_and_by_name(self, database: Any) -> None:
        insert = f"INSERT INTO {database.table} VALUES (?, ?)"
        assert await database.execute(insert, (1, "who?")) == 1
        await database.execute(insert, (2, None))

        rows = await database.fetch(f"SELECT id, word FROM {database.table} ORDER BY id")

        assert rows == [(1, "who?"), (2, None)]
        assert rows[0]["word"] == rows[0][1] == "who?"
        assert dict(rows[0]) == {"id": 1, "word": "who?"}
        asked = f"SELECT 'why?' AS why, word FROM {database.table} WHERE id = ?"
        assert await database.fetch(asked, (1,)) == [("why?", "who?")]

    async def test_a_transaction_is_rolled_back_when_its_body_fails(self, database: Any) -> None:
        with pytest.raises(KeyError):
            async with database.transaction():
                await database.execute(f"INSERT INTO {database.table} VALUES (1, 'a')")
                assert len(await database.fetch(f"SELECT * FROM {database.table}")) == 1
                raise KeyError

        assert await database.fetch(f"SELECT * FROM {database.table}") == []

    async def test_a_transaction_is_rolled_back_when_it_is_cancelled(self, database: Any) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), database.transaction():
                await database.execute(f"INSERT INTO {database.table} VALUES (1, 'a')")
                await asyncio.sleep(5)

        assert await database.fetch(f"SELECT * FROM {database.table}") == []

    async def test_a_nested_transaction_is_a_savepoint(self, database: Any) -> None:
        async with database.transaction() as inside:
            await inside.execute(f"INSERT INTO {database.table} VALUES (1, 'a')")
            with contextlib.suppress(KeyError):
                async with database.transaction():
                    await database.execute(f"INSERT INTO {database.table} VALUES (2, 'b')")
                    raise KeyError
            async with database.transaction():
                await database.execute(f"INSERT INTO {database.table} VALUES (3, 'c')")

        rows = await database.fetch(f"SELECT id FROM {database.table} ORDER BY id")
        assert rows == [(1,), (3,)]

    async def test_others_do_not_see_or_join_an_open_transaction(self, database: Any) -> None:
        inserted, looked = asyncio.Event(), asyncio.Event()

        async def other() -> int:
            await inserted.wait()
            looked.set()
            return len(await database.fetch(f"SELECT * FROM {database.table}"))

        task = asyncio.create_task(other())
        with contextlib.suppress(KeyError):
            async with database.transaction():
                await database.execute(f"INSERT INTO {database.table} VALUES (1, 'a')")
                inserted.set()
                await looked.wait()
                await asyncio.sleep(0.02)
                raise KeyError

        assert await task == 0

    async def test_a_body_that_fails_under_the_manager_rolls_back(
        self, database: Any, database_options: Any
    ) -> None:
        from utils import ResourceManager

        with pytest.raises(ValueError, match="body"):
            async with ResourceManager() as scope:
                other = await scope.acquire_database(**database_options)
                await scope.acquire(other.transaction(), "unit", ("database",), affinity="caller")
                await other.execute(f"INSERT INTO {database.table} VALUES (1, 'a')")
                raise ValueError("body")

        assert await database.fetch(f"SELECT * FROM {database.table}") == []

    async def test_errors_of_the_driver_are_wrapped(self, database: Any) -> None:
        from utils import OperationError

        with pytest.raises(OperationError, match="syntax error") as caught:
            await database.fetch("SELEC")
        assert caught.value.__cause__ is not None
        assert not isinstance(caught.value, ConnectionError)

    async def test_used_after_its_end_it_says_so(self, database_options: Any) -> None:
        from utils import ResourceClosed, ResourceManager

        async with ResourceManager() as scope:
            database = await scope.acquire_database(**database_options)
        with pytest.raises(ResourceClosed):
            await database.fetch("SELECT 1")
        with pytest.raises(ResourceClosed):
            async with database.transaction():
                pass

    async def test_a_query_reads_within_limits_and_cannot_write(self, database: Any) -> None:
        from utils import OperationError, OperationTimeout

        await database.execute(f"INSERT INTO {database.table} VALUES (1, 'a'), (2, 'b'), (3, 'c')")
        found = await database.query(
            f"SELECT id FROM {database.table} ORDER BY id;", rows=2, seconds=5
        )
        assert found == (["id"], [(1,), (2,)], True)
        nothing = f"SELECT id, id AS twice FROM {database.table} WHERE id > 9"
        assert await database.query(nothing, rows=2, seconds=5) == (["id", "twice"], [], False)
        for sql in (
            f"DELETE FROM {database.table}", f"DROP TABLE {database.table}", "", ";", "SELEC",
            f"SELECT 1; DROP TABLE {database.table}", "CREATE TABLE x (y INTEGER)", "BEGIN",
            f"SELECT 1) AS x; DROP TABLE {database.table}; --",
            f"SELECT 1) AS x; COMMIT; DROP TABLE {database.table}; --", "PRAGMA user_version = 1",
            f"WITH gone AS (DELETE FROM {database.table} RETURNING id) SELECT * FROM gone",
            "ATTACH DATABASE '/tmp/x' AS x", "SELECT load_extension('x')", "SELECT '\0'",
        ):  # fmt: skip
            with pytest.raises(OperationError):
                await database.query(sql, rows=2, seconds=5)
        forever = (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
        )
        began = Stopwatch()
        with pytest.raises(OperationTimeout):
            await database.query(forever, rows=2, seconds=0.2)
        assert began.seconds() < 2
        assert len(await database.fetch(f"SELECT * FROM {database.table}")) == 3

    async def test_an_answer_has_a_size_too(self, database: Any) -> None:
        from rows import ANSWER_BYTES

        await database.execute(
            f"INSERT INTO {database.table} VALUES (?, ?)", (1, "x" * (ANSWER_BYTES // 8))
        )
        crossed = " CROSS JOIN ".join(
            f"(SELECT 1 AS a UNION ALL SELECT 2) AS t{n}" for n in "abcde"
        )
        found = await database.query(
            f"SELECT word FROM {database.table} CROSS JOIN {crossed}",
            rows=1000, seconds=20,
        )  # fmt: skip

        assert found.more
        assert 6 <= len(found.rows) <= 8
        assert (await database.query("SELECT 1 AS one", rows=1, seconds=20)).rows == [(1,)]

    async def test_many_at_the_same_time(self, database: Any) -> None:
        async def add(number: int) -> None:
            async with database.transaction():
                await database.execute(f"INSERT INTO {database.table} VALUES (?, 'x')", (number,))

        await asyncio.gather(*(add(number) for number in range(30)))

        assert await database.fetch(f"SELECT count(*) FROM {database.table}") == [(30,)]
        assert database.stats()["used"] == 0


class TestSqlite:
    async def test_closing_after_a_cancelled_query_does_not_crash(self, tmp_path: Path) -> None:
        from utils import ResourceManager

        slow = (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
        )
        for _ in range(10):
            async with ResourceManager() as scope:
                database = await scope.acquire_database(f"sqlite:///{tmp_path}/a.db")
                task = asyncio.create_task(database.fetch(slow))
                await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                task = asyncio.create_task(database.fetch(slow))
                await asyncio.sleep(0.01)
                began = Stopwatch()
            assert began.seconds() < 0.5
            with pytest.raises(Exception, match=r"interrupted|closed"):
                await task

    async def test_an_operation_gives_up_at_its_deadline(self, tmp_path: Path) -> None:
        from utils import OperationTimeout, ResourceManager

        async with ResourceManager() as scope:
            url = f"sqlite:///{tmp_path}/a.db"
            database = await scope.acquire_database(url, operation_timeout=0.1)
            with pytest.raises(OperationTimeout):
                await database.fetch(
                    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
                    "SELECT count(*) FROM n"
                )
            assert await database.fetch("SELECT 1") == [(1,)]

    async def test_the_file_is_readable_by_its_owner_alone(self, tmp_path: Path) -> None:
        from utils import ResourceManager

        async with ResourceManager() as scope:
            database = await scope.acquire_database(f"sqlite:///{tmp_path}/a.db")
            await database.execute("CREATE TABLE t (a)")
            for path in tmp_path.glob("a.db*"):
                assert path.stat().st_mode & 0o077 == 0

    async def test_a_path_that_cannot_be_opened_is_an_acquire_error(self) -> None:
        from utils import AcquireError, ResourceManager

        with pytest.raises(AcquireError, match=r"/nowhere/a\.db"):
            async with ResourceManager() as scope:
                await scope.acquire_database("sqlite:////nowhere/a.db")

    async def test_memory_can_be_queried_too(self) -> None:
        from utils import OperationError, ResourceManager

        async with ResourceManager() as scope:
            database = await scope.acquire_database("sqlite:///:memory:")
            await database.execute("CREATE TABLE t (a)")
            await database.execute("INSERT INTO t VALUES (7)")
            found = await database.query("SELECT a FROM t", rows=5, seconds=1)
            assert (found.rows, found.more) == ([(7,)], False)
            with pytest.raises(OperationError):
                await database.query("DELETE FROM t", rows=5, seconds=1)
            await database.execute("DELETE FROM t")


@pytest.fixture(params=["memory", "redis"])
async def cache(request: Any, needs: Any) -> AsyncIterator[Any]:
    from utils import ResourceManager

    url = "memory://"
    if request.param == "redis":
        needs.package("redis")
        _, port = needs.server("Redis", 6379)
        url = f"redis://127.0.0.1:{port}/0"
    async with ResourceManager() as scope:
        found: Any = await scope.acquire_cache(url)
        found.prefix = f"c2:{uuid.uuid4().hex}:"
        yield found
        for name in "abcdefgh":
            await found.delete(found.prefix + name)


class TestCache:
    @pytest.mark.parametrize(
        "value", ["text", 7, 1.5, True, None, [1, {"a": [None]}], {"ü": "\u2028"}, b"\x00\xff", ""]
    )
    async def test_what_is_set_is_got(self, cache: Any, value: Any) -> None:
        key = cache.prefix + "a"
        await cache.set(key, value)

        found = await cache.get(key, "missing")

        assert found == value
        assert type(found) is type(value)

    async def test_missing_and_deleted(self, cache: Any) -> None:
        key = cache.prefix + "b"
        assert await cache.get(key) is None
        assert await cache.get(key, 5) == 5
        await cache.set(key, 1)
        assert await cache.delete(key) is True
        assert await cache.delete(key) is False
        assert await cache.get(key) is None

    async def test_its_time_is_over(self, cache: Any) -> None:
        key = cache.prefix + "c"
        await cache.set(key, 1, ttl=0.05)
        assert await cache.get(key) == 1
        await asyncio.sleep(0.08)
        assert await cache.get(key) is None

    async def test_what_cannot_be_kept_is_refused(self, cache: Any) -> None:
        for value in (object(), {1, 2}, float("nan")):
            with pytest.raises(TypeError, match="cannot be kept"):
                await cache.set(cache.prefix + "d", value)
        with pytest.raises(ValueError, match="key"):
            await cache.set("", 1)
        with pytest.raises(ValueError, match="time to live"):
            await cache.set(cache.prefix + "d", 1, ttl=0)

    async def test_nobody_shares_an_object_with_it(self, cache: Any) -> None:
        value = {"list": [1]}
        await cache.set(cache.prefix + "e", value)
        value["list"].append(2)
        (await cache.get(cache.prefix + "e"))["list"].append(3)
        assert await cache.get(cache.prefix + "e") == {"list": [1]}

    async def test_a_hundred_who_wait_cause_one_load(self, cache: Any) -> None:
        loads = []

        async def load() -> int:
            loads.append(1)
            await asyncio.sleep(0.02)
            return len(loads)

        key = cache.prefix + "f"
        found = await asyncio.gather(*(cache.get_or_load(key, load) for _ in range(100)))

        assert found == [1] * 100
        assert await cache.get_or_load(key, load) == 1

    async def test_an_error_of_a_load_reaches_all_and_is_not_kept(self, cache: Any) -> None:
        async def fail() -> int:
            await asyncio.sleep(0.01)
            raise KeyError("no")

        key = cache.prefix + "g"
        waiting = [cache.get_or_load(key, fail) for _ in range(3)]
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in found] == [KeyError] * 3
        assert await cache.get_or_load(key, lambda: 7) == 7

    async def test_a_load_outlives_one_who_gives_up_and_ends_with_the_last(
        self, cache: Any
    ) -> None:
        ended = []
        gate = asyncio.Event()

        async def load() -> int:
            try:
                await gate.wait()
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise
            return 1

        async def waited_for(key: str, count: int) -> None:
            while key not in cache._loading or cache._loading[key][1] != [count]:
                await asyncio.sleep(0.001)

        key = cache.prefix + "h"
        first = asyncio.create_task(cache.get_or_load(key, load))
        second = asyncio.create_task(cache.get_or_load(key, load))
        await waited_for(key, 2)
        first.cancel()
        await asyncio.wait({first})
        gate.set()
        assert await second == 1
        gate.clear()
        third = asyncio.create_task(cache.get_or_load(key + "h", load))
        await waited_for(key + "h", 1)
        await asyncio.sleep(0)  # the load has begun
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third
        await asyncio.sleep(0)
        assert ended == ["cancelled"]

    async def test_it_works_when_asked(self, cache: Any) -> None:
        await cache.check()
        assert cache.stats()["in_use"] == 0


async def test_a_memory_cache_drops_the_least_recently_used() -> None:
    from utils import CacheConnection, ResourceManager

    now = [0.0]
    connection = CacheConnection("memory://", maxsize=2, ttl=10, timer=lambda: now[0])
    async with ResourceManager() as scope:
        cache = await scope.acquire(connection, "cache")
        await cache.set("a", 1)
        await cache.set("b", 2)
        await cache.get("a")
        await cache.set("c", 3)
        assert [await cache.get(key) for key in "abc"] == [1, None, 3]
        assert cache.stats()["evictions"] == 1
        now[0] = 11.0
        assert await cache.get("a") is None


@pytest.fixture(params=["sqlite", "rabbitmq"])
def queue_url(request: Any, needs: Any, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'queue.db'}"
    needs.package("aio_pika")
    _, port = needs.server("RabbitMQ", 5672)
    return f"amqp://guest:guest@127.0.0.1:{port}/"


@pytest.fixture
async def queue(queue_url: str) -> AsyncIterator[Any]:
    from utils import ResourceManager

    async with ResourceManager() as scope:
        found: Any = await scope.acquire_rabbitmq(queue_url, name="queue")
        found.topic = f"c2-{uuid.uuid4().hex}"
        yield found
        await found.purge(found.topic)


class TestQueue:
    async def test_messages_come_in_order_and_are_their_bodies(self, queue: Any) -> None:
        for body in (b"\x00\xff", "text", {"json": [1]}):
            await queue.publish(queue.topic, body)
        assert await queue.depth(queue.topic) == 3

        found = [message async for message in queue.consume(queue.topic, timeout=0.3)]

        assert [m.body for m in found] == [b"\x00\xff", b"text", b'{"json": [1]}']
        assert found[0] == b"\x00\xff"
        assert found[2].json() == {"json": [1]}
        assert await queue.depth(queue.topic) == 0

    async def test_a_single_one_is_awaited_and_acknowledged(self, queue: Any) -> None:
        await queue.publish(queue.topic, "one")

        message = await queue.consume(queue.topic)
        assert not message.settled
        await message.ack()
        await message.ack()

        assert message.settled
        assert await queue.depth(queue.topic) == 0

    async def test_who_waits_gets_what_comes(self, queue: Any) -> None:
        consumer = queue.consume(queue.topic)
        task = asyncio.create_task(consumer.__anext__())
        await asyncio.sleep(0.05)
        await queue.publish(queue.topic, "late")
        assert await asyncio.wait_for(task, 2) == b"late"
        await consumer.aclose()

    async def test_nothing_came_in_time(self, queue: Any) -> None:
        from utils import OperationTimeout

        with pytest.raises(OperationTimeout, match="No message"):
            await queue.consume(queue.topic, timeout=0.1)

    async def test_a_loop_that_fails_gives_its_message_back(self, queue: Any) -> None:
        await queue.publish(queue.topic, "first")
        await queue.publish(queue.topic, "second")
        with pytest.raises(KeyError):
            async with queue.consume(queue.topic) as messages:
                async for _ in messages:
                    raise KeyError

        async with queue.consume(queue.topic, timeout=2) as messages:
            message = await messages.__anext__()
            assert message == b"first"
            assert message.redelivered

    async def test_what_was_not_acknowledged_comes_again_after_a_close(
        self, queue: Any, queue_url: str
    ) -> None:
        from utils import ResourceManager

        await queue.publish(queue.topic, "kept")
        async with ResourceManager() as scope:
            other = await scope.acquire_rabbitmq(queue_url)
            message = await other.consume(queue.topic)
            assert message == b"kept"

        again = await asyncio.wait_for(queue.consume(queue.topic), 5)
        assert again == b"kept"
        assert again.redelivered
        await again.nack()

    async def test_two_consumers_share_the_messages(self, queue: Any) -> None:
        for number in range(10):
            await queue.publish(queue.topic, str(number))

        async def take() -> list[bytes]:
            return [m.body async for m in queue.consume(queue.topic, timeout=0.5)]

        both = await asyncio.gather(take(), take())

        assert sorted(both[0] + both[1]) == [str(n).encode() for n in range(10)]

    async def test_a_name_that_is_none_is_refused(self, queue: Any) -> None:
        with pytest.raises(ValueError, match="queue name"):
            await queue.publish("no spaces", b"")
        with pytest.raises(ValueError, match="queue name"):
            queue.consume("")

    async def test_it_works_when_asked(self, queue: Any) -> None:
        await queue.check()


async def test_a_lease_that_ran_out_frees_the_message(tmp_path: Path) -> None:
    from utils import QueueConnection, ResourceManager

    connection = QueueConnection(f"sqlite:///{tmp_path}/q.db", lease_seconds=0.05)
    async with ResourceManager() as scope:
        queue = await scope.acquire(connection, "queue")
        await queue.publish("q", "x")
        first = await queue.consume("q")
        second = await asyncio.wait_for(queue.consume("q"), 2)
        assert (first, second.redelivered) == (second, True)
        await first.ack()  # too late: it is not its own any more
        await second.ack()
        assert await queue.depth("q") == 0


# --- HTTP APIs --------------------------------------------------------------------------------


class Upstream:
    """Answers from a list of statuses, or raises."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.requests: list[Any] = []
        self.at_once = self.most_at_once = 0

    async def __call__(self, request: Any) -> Any:
        import httpx2

        self.requests.append(request)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(0.005)
        finally:
            self.at_once -= 1
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            return answer(request)
        return httpx2.Response(answer, json={"status": answer})


@pytest.fixture
def make_api() -> Callable[..., Any]:
    @contextlib.asynccontextmanager
    async def make(upstream: Upstream, **options: Any) -> AsyncIterator[Any]:
        import httpx2

        from utils import APIConnection, ResourceManager

        connection = APIConnection(
            "http://upstream/v1", transport=httpx2.MockTransport(upstream), **options
        )
        async with ResourceManager(connection) as scope:
            upstream.requests.clear()
            upstream.most_at_once = 0
            yield scope.api

    return make


class TestApi:
    async def test_the_embedded_one_echoes(self) -> None:
        from utils import ResourceManager

        async with ResourceManager() as scope:
            api = await scope.acquire_api()
            answer = await api.request("POST", "/a", json={"b": 1}, params={"c": "d"})

        assert answer.status_code == 200
        assert answer.json() == {"method": "POST", "path": "/a", "query": "c=d", "body": '{"b":1}'}

    async def test_idempotent_requests_are_tried_again(self, make_api: Any) -> None:
        import httpx2

        upstream = Upstream(200, 503, httpx2.ConnectError("down"), 200)
        async with make_api(upstream) as api:
            answer = await api.get("/x")
            assert answer.status_code == 200
            assert len(upstream.requests) == 3
            assert str(upstream.requests[0].url) == "http://upstream/v1/x"

            upstream.answers = [503]
            assert (await api.request("POST", "/x")).status_code == 503
            assert len(upstream.requests) == 4

    async def test_the_last_answer_counts(self, make_api: Any) -> None:
        upstream = Upstream(200, 503, 503, 503, 503)
        async with make_api(upstream, retries=1) as api:
            assert (await api.get("/x")).status_code == 503
            assert len(upstream.requests) == 2

    async def test_a_broken_connection_is_wrapped(self, make_api: Any) -> None:
        import httpx2

        from utils import ConnectionBroken

        upstream = Upstream(200, *(httpx2.ConnectError("down") for _ in range(5)))
        async with make_api(upstream) as api:
            with pytest.raises(ConnectionBroken, match="down"):
                await api.get("/x")

    async def test_the_breaker_opens_and_lets_one_try_later(self, make_api: Any) -> None:
        from breaker import Breaker
        from utils import ConnectionBroken

        now = [0.0]
        upstream = Upstream(200, *[500] * 3)
        breaker = Breaker(3, 10, clock=lambda: now[0])
        async with make_api(upstream, breaker=breaker) as api:
            for _ in range(3):
                assert (await api.get("/x")).status_code == 500
            with pytest.raises(ConnectionBroken, match="too often"):
                await api.get("/x")
            assert len(upstream.requests) == 3
            assert api.stats()["breaker_open"] == 1
            now[0] = 11
            assert (await api.get("/x")).status_code == 200
            assert api.stats()["breaker_open"] == 0

    async def test_connections_and_rate_are_limited(self, make_api: Any) -> None:
        upstream = Upstream()
        async with make_api(upstream, max_connections=3) as api:
            await asyncio.gather(*(api.get("/x") for _ in range(12)))
        assert upstream.most_at_once == 3

        async with make_api(upstream, rate=50) as api:
            began = time.monotonic()
            await asyncio.gather(*(api.get("/x") for _ in range(6)))
            assert time.monotonic() - began > 0.09

    async def test_an_endless_answer_is_cut_off(self, make_api: Any) -> None:
        import httpx2

        from utils import OperationError

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b"x" * 1_000_000

        upstream = Upstream(200, lambda request: httpx2.Response(200, content=endless()))
        async with make_api(upstream) as api:
            with pytest.raises(OperationError, match="more than"):
                await api.get("/x")

    async def test_a_compressed_answer_is_read(self, make_api: Any) -> None:
        import gzip

        import httpx2

        def answer(request: Any) -> Any:
            return httpx2.Response(
                200, content=gzip.compress(b"hello"), headers={"content-encoding": "gzip"}
            )

        async with make_api(Upstream(200, answer)) as api:
            assert (await api.get("/x")).text == "hello"

    async def test_a_health_path_has_to_answer_well(self, make_api: Any) -> None:
        from utils import AcquireError

        with pytest.raises(AcquireError, match="503"):
            async with make_api(Upstream(503), health="/health"):
                pass
        upstream = Upstream(404)
        async with make_api(upstream) as api:
            await api.check()

    async def test_urls_of_other_places_are_refused(self, make_api: Any) -> None:
        async with make_api(Upstream()) as api:
            for path in ("http://other/", "//other/x"):
                with pytest.raises(ValueError, match="path of this API"):
                    await api.get(path)


class TestBreaker:
    def test_a_failed_try_opens_it_again(self) -> None:
        from breaker import Breaker, BreakerState

        now = [0.0]
        breaker: Any = Breaker(2, 10, clock=lambda: now[0])
        assert breaker.admit()
        breaker.failed()
        breaker.succeeded()
        breaker.failed()
        assert breaker.state == BreakerState.CLOSED
        breaker.failed()
        assert not breaker.admit()
        assert breaker.seconds_left() == 10
        now[0] = 10.5
        assert breaker.admit()
        assert not breaker.admit()
        breaker.failed()
        assert breaker.state.value == "open"
        now[0] = 21
        assert breaker.admit()
        breaker.withdrawn()
        assert breaker.admit()
        breaker.succeeded()
        assert breaker.admit()
        assert breaker.rejected == 2

    def test_figures_that_make_no_sense_are_refused(self) -> None:
        from breaker import Breaker

        with pytest.raises(ValueError, match="breaker"):
            Breaker(0)


# --- choosing ---------------------------------------------------------------------------------


class TestChoosing:
    @pytest.mark.parametrize(
        ("environment", "kind", "shown"),
        [
            ({}, "database", "sqlite:///resources.db"),
            ({}, "cache", "memory://"),
            ({}, "queue", "sqlite:///queue.db"),
            ({}, "api", "embedded:///echo"),
            ({"DATABASE_URL": "postgres://u:p@h/d"}, "database", "postgresql://h:5432/d"),
            ({"POSTGRES_HOST": "h", "POSTGRES_PORT": "5", "POSTGRES_DB": "d"}, "database",
             "postgresql://h:5/d"),
            ({"POSTGRES_PORT": "5"}, "database", "sqlite:///resources.db"),
            ({"REDIS_URL": "redis://:pw@h"}, "cache", "redis://h:6379"),
            ({"REDIS_HOST": "h", "REDIS_PORT": "5", "REDIS_DB": "3"}, "cache", "redis://h:5/3"),
            ({"AMQP_URL": "amqp://u:p@h/"}, "queue", "amqp://h:5672"),
            ({"RABBITMQ_HOST": "h", "RABBITMQ_PORT": "5"}, "queue", "amqp://h:5"),
            ({"API_URL": "https://u:p@h/v1"}, "api", "https://h/v1"),
            ({"DATABASE_URL": "sqlite:///x.db", "POSTGRES_HOST": "h"}, "database",
             "sqlite:///x.db"),
        ],
    )  # fmt: skip
    def test_url_then_parts_then_embedded(
        self, monkeypatch: pytest.MonkeyPatch, environment: Any, kind: str, shown: str
    ) -> None:
        from addresses import chosen

        for name, value in environment.items():
            monkeypatch.setenv(name, value)

        assert chosen(kind, None, None, {}).shown == shown

    def test_parts_carry_the_login(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from addresses import chosen

        monkeypatch.setenv("POSTGRES_USER", "me")
        monkeypatch.setenv("POSTGRES_PASSWORD", "p@ss/word")
        address = chosen("database", None, "h", {})
        assert address.url == "postgresql://me:p%40ss%2Fword@h:5432/postgres"
        assert "p@ss" not in repr(address) + address.shown
        monkeypatch.setenv("RABBITMQ_USER", "rabbit")
        monkeypatch.setenv("RABBITMQ_PASSWORD", "carrot")
        assert chosen("queue", None, "h", {}).url == "amqp://rabbit:carrot@h:5672/"

    @pytest.mark.parametrize("url", ["nonsense", "mysql://h/d", "postgresql://h:port/d", "redis://", "postgresql:///d"])  # noqa: E501  # fmt: skip
    def test_a_url_that_makes_no_sense_is_refused_without_repeating_it(self, url: str) -> None:
        from utils import DatabaseConnection

        with pytest.raises(ValueError, match="URL") as caught:
            DatabaseConnection(url)
        assert url not in str(caught.value)

    async def test_a_missing_client_is_named_with_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import sys

        from utils import AcquireError, MissingDriver, ResourceManager

        for module in ("psycopg", "redis", "aio_pika"):
            monkeypatch.setitem(sys.modules, module, None)
        async with ResourceManager() as scope:
            for acquire in (scope.acquire_database, scope.acquire_redis, scope.acquire_rabbitmq):
                with pytest.raises(MissingDriver, match=r"requirements-services\.txt") as caught:
                    await acquire(host="127.0.0.1")
                assert isinstance(caught.value, AcquireError)
                assert isinstance(caught.value, ConnectionError)

    async def test_a_fallback_serves_only_when_asked_for_and_says_so(self) -> None:
        from own_servers import free_port

        from utils import AcquireError, ResourceManager

        port = free_port()
        async with ResourceManager() as scope:
            with pytest.raises(AcquireError):
                await scope.acquire_redis(host="127.0.0.1", port=port)
            cache = await scope.acquire_redis(host="127.0.0.1", port=port, fallback="embedded")
            await cache.set("a", 1)
            health = await scope.health()
            assert health.status == "degraded"
            assert scope.report.degraded == ("redis",)
        with pytest.raises(ValueError, match="fallback"):
            from utils import CacheConnection

            CacheConnection(fallback="wrong")


async def test_the_pipeline_manager_gives_a_database_and_queues() -> None:
    from utils import ResourceManager

    async with ResourceManager.for_pipeline(db_path="a.db", queue_maxsize=7) as scope:
        await scope.db.execute("INSERT INTO aggregates (window_start, category) VALUES (0, 'a')")
        assert scope.queues["ingest_q"].maxsize == 7
    async with ResourceManager.for_pipeline(db_path="a.db", setup_schema=False) as scope:
        assert await scope.db.fetch("SELECT category FROM aggregates") == [("a",)]
    plain = ResourceManager.for_pipeline(db_path="b.db", setup_schema=False)
    with plain as scope, pytest.raises(sqlite3.OperationalError):
        scope.db.execute("SELECT * FROM aggregates")
