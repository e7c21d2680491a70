"""A real server, and a pipeline without HTTP, for the tests of this folder."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

FOLDER = Path(__file__).resolve().parent.parent
START_SECONDS = 120  # on a machine that is busy with much else
VERIFY = False  # else each client first reads the certificates of the machine: 20 ms


class Server:
    """`uvicorn app:app` as a process of its own, on a spare loopback port, with its own data."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.log = data / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self, *, command: list[str] | None = None, **environment: str) -> "Server":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = command or [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(FOLDER)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(port)],
                cwd=self.data,
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
            )
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

    def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        given = {"content-type": "application/json"}
        given.update({name.replace("_", "-"): value for name, value in headers.items()})
        with self.client() as client:
            return client.post(path, content=body, headers=given)

    def get(self, path: str, **params: Any) -> Any:
        with self.client() as client:
            return client.get(path, params=params).json()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it politely; return the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=20)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[[], Server]]:
    servers: list[Server] = []

    def make() -> Server:
        data = tmp_path / f"server-{len(servers)}"
        data.mkdir()
        servers.append(Server(data))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def server(make_server: Callable[[], Server]) -> Server:
    return make_server().start()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for tests that do not depend on what others left in it."""
    server = Server(tmp_path_factory.mktemp("shared")).start()
    yield server
    server.close()


@pytest.fixture(scope="module")
def make_shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Servers of a module with an environment of their own."""
    servers: list[Server] = []

    def make(**environment: Any) -> Server:
        servers.append(Server(tmp_path_factory.mktemp("shared")).start(**environment))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def make_pipeline(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    from utils import Pipeline

    made = []

    def make(name: str = "one", **options: Any) -> Any:
        options.setdefault("db_path", tmp_path / name / "aggregates.db")
        made.append(Pipeline(**options))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
