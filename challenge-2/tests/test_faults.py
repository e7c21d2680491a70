"""Servers that refuse, never answer, break off, go dark, are killed, and come back."""

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import own_servers
import pytest
from stopwatch import Stopwatch

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

KINDS = ["database", "redis", "rabbitmq", "api"]
URLS = {
    "database": "postgresql://postgres:{secret}@127.0.0.1:{port}/postgres",
    "redis": "redis://:{secret}@127.0.0.1:{port}/0",
    "rabbitmq": "amqp://guest:{secret}@127.0.0.1:{port}/",
    "api": "http://user:{secret}@127.0.0.1:{port}/",
}
PACKAGES = {"database": "psycopg_pool", "redis": "redis", "rabbitmq": "aio_pika", "api": "httpx2"}
SHARED = {
    "database": ("PostgreSQL", 5432), "redis": ("Redis", 6379), "rabbitmq": ("RabbitMQ", 5672),
}  # fmt: skip
SECRET = "very-secret-7"


def url_of(kind: str, port: int, secret: str = SECRET) -> str:
    url = URLS[kind].format(secret=secret, port=port)
    return url.replace(":@", "@").replace("redis://@", "redis://")


def acquire(scope: Any, kind: str, port: int, secret: str = SECRET, **options: Any) -> Any:
    return getattr(scope, f"acquire_{kind}")(url_of(kind, port, secret), **options)


async def operate(kind: str, value: Any) -> Any:
    if kind == "database":
        return await value.fetch("SELECT 1")
    if kind == "redis":
        return await value.set("c2:fault", 1)
    if kind == "rabbitmq":
        return await value.publish("c2-fault", "x")
    return await value.get("/")


@pytest.fixture
def silent() -> Iterator[int]:
    listener, port = own_servers.silent()
    yield port
    listener.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_refused_server_is_reported_at_once(kind: str, needs: Any) -> None:
    from utils import AcquireError, ResourceManager

    needs.package(PACKAGES[kind])
    async with ResourceManager() as scope:
        began = Stopwatch()
        with pytest.raises(AcquireError) as caught:
            await acquire(scope, kind, own_servers.free_port())

    assert began.seconds() < 0.5
    assert isinstance(caught.value, ConnectionError)
    assert caught.value.resource == kind
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_that_never_answers_is_reported_at_the_deadline(
    kind: str, needs: Any, silent: int
) -> None:
    from utils import AcquireTimeout, ResourceManager

    needs.package(PACKAGES[kind])
    async with ResourceManager(acquire_timeout=0.5) as scope:
        began = Stopwatch()
        with pytest.raises(AcquireTimeout):
            await acquire(scope, kind, silent)

    assert began.wall_seconds() > 0.45
    assert began.seconds() < 0.75


@pytest.mark.parametrize("kind", KINDS)
async def test_secrets_appear_nowhere(
    kind: str, needs: Any, silent: int, caplog: pytest.LogCaptureFixture
) -> None:
    from utils import AcquireErrorGroup, ResourceManager

    needs.package(PACKAGES[kind])
    caplog.set_level(logging.DEBUG)
    shown: list[str] = []
    for port in (own_servers.free_port(), silent, 1):
        manager = ResourceManager(acquire_timeout=0.3)
        async with manager as scope:
            try:
                await acquire(scope, kind, port)
            except (ConnectionError, AcquireErrorGroup) as error:
                shown += ["".join(traceback.format_exception(error)), repr(error)]
        shown += [repr(manager.report), repr(manager.get_metrics())]
    if kind in SHARED and kind != "database":  # that one trusts everybody
        _, port = needs.server(*SHARED[kind])
        async with ResourceManager() as scope:
            try:
                value = await acquire(scope, kind, port)
                shown += [repr(value), str(value.stats())]
            except ConnectionError as error:
                shown += ["".join(traceback.format_exception(error)), repr(error)]
    resource = _connector(kind, own_servers.free_port())
    shown += [repr(resource), repr(resource.redact()), repr(vars(resource)["address"]), caplog.text]

    assert not [text for text in shown if SECRET in text]


def _connector(kind: str, port: int) -> Any:
    import utils

    made = {
        "database": utils.DatabaseConnection, "redis": utils.CacheConnection,
        "rabbitmq": utils.QueueConnection, "api": utils.APIConnection,
    }[kind]  # fmt: skip
    return made(url_of(kind, port))


@pytest.fixture(params=["database", "redis", "rabbitmq"])
def proxied(request: Any, needs: Any) -> Iterator[tuple[str, own_servers.Proxy]]:
    needs.package(PACKAGES[request.param])
    _, port = needs.server(*SHARED[request.param])
    proxy = own_servers.Proxy(port)
    yield request.param, proxy
    proxy.close()


@contextlib.asynccontextmanager
async def through(kind: str, proxy: own_servers.Proxy) -> AsyncIterator[Any]:
    from utils import ResourceManager

    secret = {"database": "", "redis": "", "rabbitmq": "guest"}[kind]
    async with ResourceManager(release_timeout=3) as scope:
        yield await acquire(scope, kind, proxy.port, secret, operation_timeout=0.4)


class TestCutOff:
    async def test_a_broken_connection_is_a_wrapped_error_and_heals(self, proxied: Any) -> None:
        from utils import ConnectionBroken

        kind, proxy = proxied
        async with through(kind, proxy) as value:
            await operate(kind, value)
            proxy.cut()
            with pytest.raises(ConnectionBroken) as caught:
                await operate(kind, value)
            assert isinstance(caught.value, ConnectionError)
            assert caught.value.__cause__ is not None
            for _ in range(3):
                await operate(kind, value)

    async def test_a_server_gone_dark_ends_operations_at_their_deadline(self, proxied: Any) -> None:
        from utils import OperationTimeout

        kind, proxy = proxied
        async with through(kind, proxy) as value:
            await operate(kind, value)
            proxy.hole = True
            for _ in range(3):
                began = Stopwatch()
                with pytest.raises(OperationTimeout):
                    await operate(kind, value)
                assert began.seconds() < 2
            proxy.hole = False
            for _ in range(50):
                with contextlib.suppress(ConnectionError, TimeoutError):
                    await operate(kind, value)
                    break
            await operate(kind, value)

    async def test_closing_does_not_wait_for_a_server_gone_dark(self, proxied: Any) -> None:
        kind, proxy = proxied
        async with through(kind, proxy) as value:
            await operate(kind, value)
            proxy.hole = True
            began = Stopwatch()
        assert began.seconds() < 2

    async def test_a_cancelled_operation_ends_soon_although_nothing_answers(
        self, proxied: Any
    ) -> None:
        kind, proxy = proxied
        async with through(kind, proxy) as value:
            value.operation_timeout = 30
            await operate(kind, value)
            proxy.hole = True
            task = asyncio.create_task(operate(kind, value))
            await asyncio.sleep(0.05)
            began = Stopwatch()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert began.seconds() < 3
            proxy.hole = False

    async def test_a_transaction_on_a_broken_connection_fails_with_its_own_error(
        self, needs: Any
    ) -> None:
        needs.package("psycopg_pool")
        _, port = needs.server("PostgreSQL", 5432)
        proxy = own_servers.Proxy(port)
        try:
            async with through("database", proxy) as database:
                with pytest.raises(KeyError, match="body"):
                    async with database.transaction():
                        await database.fetch("SELECT 1")
                        proxy.cut()
                        raise KeyError("body")
                for _ in range(20):
                    with contextlib.suppress(ConnectionError):
                        assert await database.fetch("SELECT 1") == [(1,)]
                        break
                async with asyncio.timeout(5):  # the pool makes the broken one anew meanwhile
                    while database.stats()["used"]:
                        await asyncio.sleep(0.01)
        finally:
            proxy.close()

    async def test_a_consumer_hears_that_its_broker_is_gone(self, needs: Any) -> None:
        from utils import ConnectionBroken

        needs.package("aio_pika")
        _, port = needs.server("RabbitMQ", 5672)
        proxy = own_servers.Proxy(port)
        try:
            async with through("rabbitmq", proxy) as queue:
                consumer = queue.consume("c2-fault-consumer")
                task = asyncio.create_task(consumer.__anext__())
                await asyncio.sleep(0.2)
                proxy.cut()
                with pytest.raises(ConnectionBroken):
                    await asyncio.wait_for(task, 5)
                await queue.purge("c2-fault-consumer")
        finally:
            proxy.close()


MAKERS: dict[str, Callable[[Path], own_servers.Process]] = {
    "database": own_servers.postgres, "redis": own_servers.redis,
    "rabbitmq": own_servers.rabbitmq,
}  # fmt: skip


@pytest.mark.kill
@pytest.mark.parametrize("kind", ["database", "redis", "rabbitmq"])
async def test_a_server_killed_in_use_is_a_wrapped_error_and_may_come_back(
    kind: str, needs: Any, tmp_path: Path
) -> None:
    from utils import ResourceManager

    needs.package(PACKAGES[kind])
    server = MAKERS[kind](tmp_path)
    secret = "guest" if kind == "rabbitmq" else ""
    server.start()
    try:
        manager = ResourceManager(release_timeout=3)
        manager.add(_waiting_for(kind, server.port, secret), kind, wait=20)
        async with manager as scope:
            value = scope[kind]
            await operate(kind, value)
            server.kill()
            for _ in range(2):
                began = Stopwatch()
                with pytest.raises((ConnectionError, TimeoutError)) as caught:
                    await operate(kind, value)
                assert type(caught.value).__module__ == "failures"
                assert began.seconds() < 3
            health = await scope.health(timeout=1)
            assert health.resources[kind].status == "down"
            server.start()
            deadline = time.monotonic() + 20
            while (await scope.health(timeout=1)).status != "healthy":
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            await operate(kind, value)
            server.kill()
            began = Stopwatch()
        assert began.seconds() < 3
    finally:
        server.kill()


def _waiting_for(kind: str, port: int, secret: str) -> Any:
    connector = _connector(kind, port)
    return type(connector)(url_of(kind, port, secret), operation_timeout=1.0)


@pytest.mark.kill
def test_a_service_is_unready_while_its_database_is_down_and_recovers(
    needs: Any, tmp_path: Path, make_server: Any
) -> None:
    needs.package("psycopg_pool")
    database = own_servers.postgres(tmp_path).start()
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", database.port), 1).close()
                break
        time.sleep(0.3)
        impatient = (
            "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); import connections;"
            "connections.Connector.__init__.__kwdefaults__['operation_timeout'] = 2.0;"  # else 8
            "sys.argv = ['uvicorn', 'app:app', *sys.argv[1:]];"
            "runpy.run_module('uvicorn', run_name='__main__')"
        )
        folder = Path(__file__).resolve().parent.parent
        server = make_server().start(
            command=[sys.executable, "-c", impatient, str(folder)],
            DATABASE_URL=f"postgresql://postgres@127.0.0.1:{database.port}/postgres",
        )
        with server.client() as client:
            assert client.get("/readyz").status_code == 200
            figures = client.get("/metrics").text
            assert 'resource_pool{figure="max",kind="database",resource="database"} 4.0' in figures
            answer = client.post("/query", json={"sql": "SELECT 1 AS one"})
            assert answer.json()["rows"] == [[1]]
            database.kill()
            began = Stopwatch()
            assert client.get("/readyz").status_code == 503
            assert began.seconds() < 3
            assert client.post("/query", json={"sql": "SELECT 1"}).status_code == 503
            database.start()
            deadline = time.monotonic() + 20
            while client.get("/readyz").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert client.post("/query", json={"sql": "SELECT 1"}).status_code == 200
        assert server.stop() in (0, -15)
    finally:
        database.kill()


def test_a_service_whose_database_is_down_does_not_start_and_says_why(
    needs: Any, tmp_path: Path
) -> None:
    needs.package("psycopg_pool")
    port = own_servers.free_port()
    folder = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(folder), "--port", "0"]
    environment = {
        "PATH": "/usr/bin:/bin",
        "DATABASE_URL": f"postgresql://u:{SECRET}@127.0.0.1:{port}/d",
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30,
        check=False,
    )  # fmt: skip

    assert done.returncode != 0
    assert f"postgresql://127.0.0.1:{port}/d cannot be used" in done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
