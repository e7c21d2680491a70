"""Servers of our own, to be killed and cut off: the shared ones belong to others too."""

import atexit
import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

START_SECONDS = 60


def free_port() -> int:
    """A free port below those the system hands out itself.

    A client that keeps trying a closed port of that range may be given the same port as its own,
    and be connected to itself; the server could not come back then.
    """
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Proxy:
    """Stands before a server; can cut all connections, and swallow what passes."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.hole = False
        self._pairs: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._running = True
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while self._running:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                continue
            self._pairs |= {client, server}
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                while self.hole and self._running:
                    time.sleep(0.01)
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break all connections; new ones are served."""
        for each in self._pairs:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for each in self._pairs:
            each.close()
        self._pairs.clear()

    def close(self) -> None:
        self._running = False
        self._listener.close()
        self.cut()


class Process:
    """A server process on a spare port, which can be killed and started again."""

    def __init__(self, name: str, command: list[str], port: int, **environment: str) -> None:
        self.name = name
        self.command = command
        self.port = port
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Process":
        """Start it; after a kill its children may hold the data a moment longer: then again."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen(
                    self.command, env={**os.environ, **self.environment}, start_new_session=True,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                if self.process.poll() is None:
                    return self
            time.sleep(0.05)
        raise AssertionError(f"{self.name} did not start")

    def kill(self) -> None:
        """End it and its children, which may lead sessions of their own (PostgreSQL's do)."""
        if self.process is not None and self.process.poll() is None:
            parent = psutil.Process(self.process.pid)
            for each in (*parent.children(recursive=True), parent):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            self.process.wait()


def postgres(data: Path) -> Process:
    """An own PostgreSQL, run by the user postgres where we are root."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    binary = shutil.which("postgres") or (str(found[-1]) if found else None)
    if binary is None:
        pytest.skip("needs the program postgres to start one of its own")
    become: list[str] = []
    if os.getuid() == 0:
        become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        # pytest closes its own directories to other users whenever a run begins.
        data = Path(tempfile.mkdtemp(prefix="postgres-"))
        atexit.register(shutil.rmtree, data, ignore_errors=True)
        shutil.chown(data, "postgres", "postgres")
    subprocess.run(
        [*become, str(Path(binary).with_name("initdb")), "-D", str(data / "pg"), "-A", "trust",
         "-U", "postgres", "--no-sync"],
        check=True, capture_output=True, cwd="/",
    )  # fmt: skip
    port = free_port()
    return Process(
        "postgres",
        [*become, binary, "-D", str(data / "pg"), "-p", str(port), "-k", "", "-h", "127.0.0.1",
         "-c", "fsync=off"],
        port,
    )  # fmt: skip


def redis(data: Path) -> Process:
    """An own Redis."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("needs the program redis-server to start one of its own")
    port = free_port()
    return Process(
        "redis", [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir",
                  str(data)], port,
    )  # fmt: skip


def rabbitmq(data: Path) -> Process:
    """An own RabbitMQ; it takes some seconds to start."""
    found = [*Path("/usr/lib/rabbitmq").glob("bin/rabbitmq-server"), *Path("/usr/lib/rabbitmq").glob("lib/*/sbin/rabbitmq-server")]  # noqa: E501  # fmt: skip
    if not found:
        pytest.skip("needs the program rabbitmq-server to start one of its own")
    port, distribution = free_port(), free_port()
    plugins = data / "plugins"
    plugins.write_text("[].")
    (data / "rabbit.conf").write_text(f"listeners.tcp.local = 127.0.0.1:{port}\n")
    return Process(
        "rabbitmq", [str(found[0])], port,
        RABBITMQ_NODENAME=f"test{port}@localhost", RABBITMQ_NODE_PORT=str(port),
        RABBITMQ_NODE_IP_ADDRESS="127.0.0.1", RABBITMQ_DIST_PORT=str(distribution),
        RABBITMQ_MNESIA_BASE=str(data), RABBITMQ_LOG_BASE=str(data),
        RABBITMQ_ENABLED_PLUGINS_FILE=str(plugins), HOME=str(data),
        RABBITMQ_CONFIG_FILE=str(data / "rabbit.conf"),
        RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="+S 1:1",
    )  # fmt: skip


def silent() -> tuple[socket.socket, int]:
    """A port that accepts and never answers."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=16)
    return listener, listener.getsockname()[1]


def main() -> Any:  # a look by hand: python own_servers.py
    for make in (postgres, redis, rabbitmq):
        with tempfile.TemporaryDirectory() as scratch:
            began = time.monotonic()
            server = make(Path(scratch)).start()
            print(server.name, server.port, round(time.monotonic() - began, 2), file=sys.stderr)
            server.kill()


if __name__ == "__main__":
    main()
