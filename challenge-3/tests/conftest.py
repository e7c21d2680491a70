"""An empty registry for every test, and a real server with its own plugins directory."""

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
START_SECONDS = 30
VERIFY = False  # else each client first reads the certificates of the machine: 20 ms


@pytest.fixture(autouse=True)
def _leaves_no_plugins() -> Iterator[None]:
    """What a test registers in the process-wide registry is gone after it."""
    from utils import registry

    before = set(map(id, registry.snapshot()))
    yield
    registry.failures.clear()
    for plugin in registry.snapshot():
        if id(plugin) not in before:
            registry.withdraw(plugin)


class Server:
    """`uvicorn app:app` as a process of its own, on a spare loopback port, with its own data."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.plugins = data / "plugins"
        self.plugins.mkdir()
        self.log = data / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self, *, command: list[str] | None = None, **environment: str) -> "Server":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = command or [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(FOLDER)]
        environment = {"PLUGINS_DIR": str(self.plugins), **environment}
        if environment["PLUGINS_DIR"] == "default":
            del environment["PLUGINS_DIR"]
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

    def write(self, file: str, text: str | bytes) -> Path:
        """Put a file into the plugins directory."""
        path = self.plugins / file
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, verify=VERIFY, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> httpx2.Response:
        with self.client() as client:
            return client.post(path, json=json, **options)

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


@pytest.fixture(scope="module")
def bundled_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with the bundled plugins, for tests that leave nothing behind."""
    server = Server(tmp_path_factory.mktemp("bundled")).start(PLUGINS_DIR="default")
    yield server
    server.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
