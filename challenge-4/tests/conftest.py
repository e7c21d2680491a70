"""Counting sources, and a real server, for the tests of this folder."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

FOLDER = Path(__file__).resolve().parent.parent
START_SECONDS = 30
VERIFY = False  # else each client first reads the certificates of the machine: 20 ms
DSN = "postgresql://postgres@127.0.0.1:5432/test"


class Counting:
    """An iterable that counts how often it was started, read and closed."""

    def __init__(self, elements: Any) -> None:
        self.elements = elements
        self.starts = self.pulls = self.closes = 0

    def __iter__(self) -> Iterator[Any]:
        self.starts += 1
        return self._read()

    def _read(self) -> Iterator[Any]:
        try:
            for element in self.elements:
                self.pulls += 1
                yield element
        finally:
            self.closes += 1


@pytest.fixture
def counting() -> Callable[[Any], Counting]:
    return Counting


@pytest.fixture(params=["inlined", "called"])
def inlining(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with functions written into the loop, and with functions called."""
    monkeypatch.setenv("LAZY_INLINE", "1" if request.param == "inlined" else "0")
    return str(request.param)


class Server:
    """`uvicorn app:app` as a process of its own, on a spare loopback port, with its own data."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.log = data / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self, **environment: str) -> "Server":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(FOLDER),
                 "--port", str(port)],
                cwd=self.data,
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended: {self.log.read_text()[-2000:]}")
            try:
                if httpx2.get(f"{self.url}/healthz", timeout=2, verify=VERIFY).status_code == 200:
                    return self
            except httpx2.TransportError:
                time.sleep(0.02)
        raise AssertionError(f"the server did not start: {self.log.read_text()[-2000:]}")

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, verify=VERIFY, **options)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it politely; return the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=20)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for tests that do not depend on what others left in it."""
    server = Server(tmp_path_factory.mktemp("server")).start()
    yield server
    server.close()


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(**environment: str) -> Server:
        data = tmp_path / f"server-{len(servers)}"
        data.mkdir()
        servers.append(Server(data))
        return servers[-1].start(**environment)

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Any]:
    missing = pytest.fail if os.environ.get("CI") else pytest.skip
    try:
        import psycopg

        connection = psycopg.connect(DSN, autocommit=True, connect_timeout=2)
    except ImportError:
        missing("needs psycopg: pip install -r requirements-services.txt")
    except psycopg.OperationalError:
        missing("needs PostgreSQL on 127.0.0.1:5432: docker compose up -d")
    schema = f"lazy_{uuid.uuid4().hex[:12]}"
    connection.execute(f"CREATE SCHEMA {schema}")
    try:
        yield connection, schema
    finally:
        connection.execute(f"DROP SCHEMA {schema} CASCADE")
        connection.close()
