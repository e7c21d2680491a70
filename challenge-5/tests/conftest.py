"""Schedulers whose event tables are checked at the end, a clock to turn, and a real server."""

import itertools
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

FOLDER = Path(__file__).resolve().parent.parent
START_SECONDS = 30
VERIFY = False  # else each client first reads the certificates of the machine: 20 ms


class Clock:
    """A wall clock that goes only when told."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0
        self.scheduler: Any = None

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
        if self.scheduler is not None:
            self.scheduler.engine.wake()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def check_events(path: Path) -> None:
    """Every task's transitions form a chain of legal ones that ends in its state."""
    from tasks import LEGAL

    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        states = dict(connection.execute("SELECT seq, state FROM task"))
        rows = connection.execute("SELECT seq, from_state, to_state FROM event ORDER BY seq, eid")
        for seq, chain in itertools.groupby(rows, key=lambda row: row[0]):
            before = None
            for _, from_state, to_state in chain:
                assert from_state == before, (seq, from_state, before)
                assert to_state in LEGAL[from_state], (seq, from_state, to_state)
                before = to_state
            assert states[seq] == before
    finally:
        connection.close()


@pytest.fixture
def make_scheduler(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Schedulers on files of their own; their tables are checked when they are closed."""
    from utils import TaskScheduler

    made: list[Any] = []
    counter = itertools.count()

    def make(cls: type = TaskScheduler, **options: Any) -> Any:
        options.setdefault("num_workers", 2)
        options.setdefault("store", tmp_path / f"tasks-{next(counter)}.db")
        scheduler = cls(**options)
        if isinstance(clock := options.get("clock"), Clock):
            clock.scheduler = scheduler
        made.append((scheduler, options["store"]))
        return scheduler

    yield make
    for scheduler, _ in made:
        scheduler.shutdown(wait=False)
    for _, path in made:
        if isinstance(path, Path) and path.exists():
            check_events(path)


@pytest.fixture
def scheduler(make_scheduler: Callable[..., Any]) -> Any:
    return make_scheduler(max_tasks=100_000).run()


@pytest.fixture
def soon() -> Callable[..., Any]:
    """Wait until something is true; what a test waits for has to happen, not to take long."""

    def wait(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
        deadline = time.monotonic() + seconds
        pause = threading.Event()
        while not (found := condition()):
            assert time.monotonic() < deadline, "it did not happen"
            pause.wait(0.002)
        return found

    return wait


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


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
