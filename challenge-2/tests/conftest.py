"""A loop with virtual time, servers of its own, and what else the tests of this folder share."""

import asyncio
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest

FOLDER = Path(__file__).resolve().parent.parent
START_SECONDS = 30
VERIFY = False  # else each client first reads the certificates of the machine: 20 ms
T = TypeVar("T")


class VirtualSelector(selectors.SelectSelector):
    """Never waits: the time that a loop would have waited passes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0  # a moment of zero means "not yet" in the engine

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise AssertionError("the loop waits for something that never comes")
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its clock jumps to the next timer; `on_step` is called before each of its turns."""

    def __init__(self) -> None:
        self.virtual = VirtualSelector()
        super().__init__(self.virtual)
        self.steps = 0
        self.on_step: Callable[[int], None] | None = None

    def time(self) -> float:
        return self.virtual.now

    def _run_once(self) -> None:
        self.steps += 1
        if self.on_step is not None:
            self.on_step(self.steps)
        super()._run_once()  # type: ignore[misc]


def run_virtually(
    make: Callable[[VirtualLoop], Coroutine[Any, Any, T]],
    on_step: Callable[[int], None] | None = None,
) -> tuple[T, VirtualLoop]:
    loop = VirtualLoop()
    try:
        asyncio.set_event_loop(loop)
        main = loop.create_task(make(loop))
        loop.on_step = on_step
        return loop.run_until_complete(main), loop
    finally:
        loop.on_step = None
        asyncio.set_event_loop(None)
        loop.close()


@pytest.fixture
def virtually() -> Any:
    """Run a coroutine function, which gets the loop, in virtual time."""
    return run_virtually


class Server:
    """`uvicorn app:app` as a process of its own, on a spare loopback port, with its own data."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.log = data / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self, *, command: list[str] | None = None, **environment: str) -> "Server":
        self.url = f"http://127.0.0.1:{free_port()}"
        command = command or [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(FOLDER)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--port", self.url.rpartition(":")[2]],
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
        return httpx2.Client(base_url=self.url, timeout=30, verify=VERIFY, **options)

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=20)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for tests that do not depend on what others left in it."""
    server = Server(tmp_path_factory.mktemp("shared")).start()
    yield server
    server.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
