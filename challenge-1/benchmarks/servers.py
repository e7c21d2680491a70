"""Servers in processes of their own, and what the benchmark asks of them."""

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

FOLDER = Path(__file__).resolve().parent.parent
START_SECONDS = 30
DRAIN_SECONDS = 120
PIECE_BYTES = 64 * 1024
# What decides about speed is what the code does by itself, not what this shell has set.
OWN_VARIABLES = {
    "QUEUE_MAXSIZE", "WINDOW_SECS", "DB_PATH", "QUEUE_DIR", "PORT", "LOG_LEVEL", "MAX_EVENT_BYTES",
    "BACKLOG_MAX_BYTES", "DEDUPE_KEYS", "PARSER", "API_KEY", "MAX_FUTURE_SECONDS", "MAX_KEYS",
    "QUEUE_RETAIN_DAYS", "QUEUE_MAX_BYTES", "WEBHOOK_SECRET",
}  # fmt: skip


class Server:
    """`uvicorn <app>` on a spare loopback port; `peak` is the most memory it was seen to hold."""

    def __init__(self, app: str, code: Path, data: Path) -> None:
        data.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.peak = 0
        self._log = data / "server.log"
        self._ended = threading.Event()
        kept = {
            name: text for name, text in os.environ.items() if name.upper() not in OWN_VARIABLES
        }
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", app, "--app-dir", str(code),
                 "--port", str(self.port), "--no-access-log", "--log-level", "warning"],
                cwd=data, stdout=log, stderr=log, env={**kept, "LOG_LEVEL": "WARNING"},
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_until_up(self) -> None:
        """Return once it answers, and watch its memory from then on."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError, http.client.HTTPException):
                if self.request("GET", "/healthz")[0] == 200:
                    break
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a server did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.02)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        process = psutil.Process(self.process.pid)
        with suppress(psutil.Error):
            while not self._ended.wait(0.05):
                self.peak = max(self.peak, process.memory_info().rss)

    def request(self, method: str, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def stats(self) -> dict[str, Any]:
        figures: dict[str, Any] = json.loads(self.request("GET", "/stats")[1])
        return figures

    def drain(self) -> None:
        """Wait until everything acknowledged is applied, so that the next one has the machine."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while self.stats()["backlog_events"]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"still not applied after {DRAIN_SECONDS} s")
            time.sleep(0.01)

    def upload(self, path: str, body: bytes, content_type: str) -> int:
        """Stream a body in chunks; return how many events were accepted."""
        return self.upload_pieces(path, pieces(body), content_type)

    def upload_pieces(self, path: str, body: Iterator[bytes], content_type: str) -> int:
        """Stream pieces as chunks; return how many events were accepted."""
        headers = {"Content-Type": content_type, "Transfer-Encoding": "chunked"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request("POST", path, body, headers, encode_chunked=True)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status != 202:
            raise RuntimeError(f"{path} answered {answer.status}: {text[:500]!r}")
        accepted: int = json.loads(text)["accepted"]
        return accepted


def pieces(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), PIECE_BYTES):
        yield body[start : start + PIECE_BYTES]
