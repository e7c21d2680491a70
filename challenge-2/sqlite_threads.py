"""An SQLite connection on its own thread.

A connection that is closed while another thread is inside a query crashes the process. Here it is
opened, used and closed by one thread; cancelling a query interrupts it and waits until it has let
go, and closing does the same.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from failures import ResourceClosed
from threads import OwnThread

T = TypeVar("T")
BUSY_SECONDS = 5.0  # how long another process may hold the file


class _Job:
    withdrawn = False


class SqliteThread:
    """One connection and its thread; `open` it first."""

    def __init__(self, path: str, *, synchronous: str = "NORMAL", read_only: bool = False) -> None:
        self.path = path
        self._synchronous = synchronous
        self._read_only = read_only
        self._thread = OwnThread(f"sqlite {Path(path).name}")
        self._connection: sqlite3.Connection | None = None
        self._running: _Job | None = None
        self._lock = threading.Lock()  # an interrupt may only hit the query it was meant for
        self.waiting = 0
        self._closing: Future[Any] | None = None

    async def open(self, setup: Callable[[sqlite3.Connection], object] | None = None) -> None:
        """Open the file, creating it readable by its owner alone."""
        try:
            await self._finished(asyncio.wrap_future(self._thread.submit(self._open, setup)))
        except BaseException:
            await self.close()
            raise

    def _open(self, setup: Callable[[sqlite3.Connection], object] | None) -> None:
        if self.path and self.path != ":memory:" and not self._read_only:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        target = self.path or ":memory:"
        if self._read_only:
            target = Path(self.path).resolve().as_uri() + "?mode=ro"
        self._connection = connection = sqlite3.connect(
            target, timeout=BUSY_SECONDS, isolation_level=None, uri=self._read_only
        )
        connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        if not self._read_only:
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA foreign_keys = ON")
        if setup is not None:
            setup(connection)

    async def run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """The result of a function on that thread; cancelling interrupts it and waits."""
        job = _Job()

        def work() -> T:
            with self._lock:
                if job.withdrawn or self._connection is None or self._closing is not None:
                    raise ResourceClosed("The database was closed before this began.")
                self._running = job
            try:
                return function(self._connection)
            finally:
                with self._lock:
                    self._running = None

        try:
            submitted = self._thread.submit(work)
        except RuntimeError:
            raise ResourceClosed("The database is closed.") from None
        self.waiting += 1
        try:
            result: T = await self._finished(asyncio.wrap_future(submitted), job)
        finally:
            self.waiting -= 1
        return result

    async def _finished(self, future: asyncio.Future[Any], job: _Job | None = None) -> Any:
        cancelled = False
        while not future.done():
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError:
                cancelled = True
                if job is not None:
                    self._interrupt(job)
        if cancelled:
            future.exception()
            raise asyncio.CancelledError
        return future.result()

    def _interrupt(self, job: _Job | None) -> None:
        with self._lock:
            if job is not None:
                job.withdrawn = True
            meant = self._running is not None and job in (None, self._running)
            if self._connection is not None and meant:
                self._connection.interrupt()

    async def close(self) -> None:
        """Interrupt, wait, close on its own thread; what waits is refused."""
        if self._closing is None:
            self._closing = self._thread.submit(self._close)
            self._thread.stop()
            self._interrupt(None)
        await self._finished(asyncio.wrap_future(self._closing))
        self._thread.join(1.0)

    def _close(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()
