"""Which database serves: SQLite embedded, or PostgreSQL where a URL or a host says so."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from addresses import Address
from connections import Connector
from postgres_databases import PostgresDatabase
from rows import Database, Row
from sqlite_databases import SqliteDatabase
from sqlite_threads import BUSY_SECONDS

__all__ = ["Database", "DatabaseConnection", "PipelineDatabase", "Row"]

AGGREGATES = """
CREATE TABLE IF NOT EXISTS aggregates (
    window_start REAL NOT NULL,
    category TEXT NOT NULL,
    count INTEGER NOT NULL DEFAULT 0,
    total REAL NOT NULL DEFAULT 0,
    average REAL,
    PRIMARY KEY (window_start, category)
)"""


class DatabaseConnection(Connector):
    """A database: SQLite embedded, or PostgreSQL where a URL or a host says so."""

    kind = "database"
    address_kind = "database"

    def __init__(
        self, url: str | None = None, *, path: str | Path | None = None, pool_size: int = 4,
        setup: Iterable[str] = (), **options: Any,
    ) -> None:  # fmt: skip
        if path is not None:
            url = f"sqlite:///{path}"
        super().__init__(url, **options)
        self._pool_size = pool_size
        self._setup = tuple(setup)

    async def connect(self, address: Address) -> Database:
        """Open it, ask it once, and run what sets it up."""
        database: SqliteDatabase | PostgresDatabase
        if address.embedded:
            database = SqliteDatabase(address, self.operation_timeout)
        else:
            database = PostgresDatabase(address, self.operation_timeout, self._pool_size)
        try:
            await database.open()
            for statement in self._setup:
                await database.execute(statement)
        except BaseException:
            await database.close()
            raise
        return database


class PipelineDatabase:
    """SQLite for a pipeline: an ordinary connection in a plain `with`, else a `Database`."""

    kind = "database"

    def __init__(self, path: Path, *, setup_schema: bool) -> None:
        self._path = path
        self._setup = (AGGREGATES,) if setup_schema else ()
        self._plain: sqlite3.Connection | None = None
        self._database: SqliteDatabase | None = None

    def __enter__(self) -> sqlite3.Connection:
        self._plain = sqlite3.connect(self._path, timeout=BUSY_SECONDS)
        try:
            self._plain.execute("PRAGMA journal_mode = WAL")
            for statement in self._setup:
                self._plain.execute(statement)
            self._plain.commit()
        except BaseException:
            self._plain.close()
            raise
        return self._plain

    def __exit__(self, kind: Any, *_: Any) -> None:
        plain = cast("sqlite3.Connection", self._plain)
        try:
            if kind is None:
                plain.commit()
        finally:
            plain.close()  # what was not committed is rolled back

    async def __aenter__(self) -> Database:
        address = Address("sqlite", path=str(self._path))
        self._database = SqliteDatabase(address, BUSY_SECONDS + 3)
        await self._database.open(*self._setup)
        return self._database

    async def __aexit__(self, *_: Any) -> None:
        await cast("SqliteDatabase", self._database).close()
