"""SQLite on its own thread, behind the interface of a database."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from addresses import Address
from failures import OperationError, QueryTooLong, ResourceClosed
from rows import ANSWER_BYTES, Answer, Database, Kept, Parameters, Row, row_class
from sqlite_threads import SqliteThread

T = TypeVar("T")
VALUE_BYTES = 1_000_000  # of one value of a bounded query
COLUMNS_MAX = 100  # of one row of it


class SqliteDatabase(Database):
    """A file, or memory, on its own thread."""

    def __init__(self, address: Address, operation_timeout: float) -> None:
        super().__init__(address, operation_timeout)
        self._thread = SqliteThread(address.path)
        self._turn = asyncio.Lock()  # held by a transaction, or for a statement
        self._depth: ContextVar[tuple[object, int] | None] = ContextVar("depth", default=None)
        self._open_transaction: object | None = None

    async def open(self, *scripts: str) -> None:
        """Open the file, and run what sets it up."""
        await self._thread.open(lambda connection: [connection.execute(s) for s in scripts])

    def is_connection_error(self, error: Exception) -> bool:
        """A file that cannot be opened or is held by another."""
        return isinstance(error, OSError) or "unable to open" in str(error)

    async def execute(self, sql: str, params: Parameters = ()) -> int:
        """Run a statement; outside a transaction it is one of its own."""

        def work(connection: sqlite3.Connection) -> int:
            return connection.execute(sql, params).rowcount

        return await self._do("a statement", work)

    async def fetch(self, sql: str, params: Parameters = ()) -> list[Row]:
        """Run a statement and return its rows."""
        return await self._do("a query", lambda connection: _rows(connection.execute(sql, params)))

    async def _do(self, what: str, work: Callable[[sqlite3.Connection], T]) -> T:
        async with self.operation(what):
            if self._inside():
                return await self._thread.run(work)
            async with self._turn:
                return await self._thread.run(work)

    def _inside(self) -> bool:
        mine = self._depth.get()
        return mine is not None and mine[0] is self._open_transaction

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Database]:
        """Everything in the block, or nothing; a nested one is a savepoint."""
        if self._inside():
            mark, depth = cast("tuple[object, int]", self._depth.get())
            level = depth + 1
            async with self._block(
                (mark, level), f"SAVEPOINT level{level}", f"RELEASE level{level}",
                f"ROLLBACK TO level{level}",
            ):  # fmt: skip
                yield self
            return
        async with self.operation("the wait for a transaction"):
            await self._turn.acquire()
        try:
            self._open_transaction = mark = object()
            async with self._block((mark, 0), "BEGIN IMMEDIATE", "COMMIT", "ROLLBACK"):
                yield self
        finally:
            self._open_transaction = None
            self._turn.release()

    @asynccontextmanager
    async def _block(
        self, mark: tuple[object, int], begin: str, commit: str, rollback: str
    ) -> AsyncIterator[None]:
        before = self._depth.get()
        try:
            await self._command(begin)
            self._depth.set(mark)
            yield
            await self._command(commit)
        except BaseException:
            with contextlib.suppress(ResourceClosed):  # closing has rolled it back
                await asyncio.shield(self._thread.run(functools.partial(_roll_back, sql=rollback)))
            raise
        finally:
            self._depth.set(before)

    async def _command(self, sql: str) -> None:
        async with self.operation(sql.split()[0]):
            await self._thread.run(lambda connection: connection.execute(sql))

    async def query(
        self, sql: str, *, rows: int, seconds: float, size: int = ANSWER_BYTES
    ) -> Answer:
        """One reading statement, on a read-only connection of its own where there is a file."""
        try:
            async with asyncio.timeout(seconds):
                if self.address.path in ("", ":memory:"):
                    async with self._turn:
                        found = await self._thread.run(
                            functools.partial(_guarded, sql, Kept(rows, size))
                        )
                else:
                    found = await self._read_only(sql, Kept(rows, size))
        except TimeoutError:
            raise QueryTooLong(f"The query took longer than {seconds:g} s.") from None
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise OperationError(f"The query was refused: {error}") from error
        return found

    async def _read_only(self, sql: str, kept: Kept) -> Answer:
        reader = SqliteThread(self.address.path, read_only=True)
        await reader.open(_forbid_writing)
        try:
            return await reader.run(lambda connection: _limited(connection, sql, kept))
        finally:
            await reader.close()

    async def close(self) -> None:
        """Interrupt, wait, and close on the thread."""
        self.closed = True
        await self._thread.close()

    def stats(self) -> Mapping[str, float]:
        """One connection, and who waits for it."""
        return {"max": 1.0, "used": float(min(1, self.in_use)), "pending": float(max(0, self.in_use - 1))}  # noqa: E501  # fmt: skip


def _rows(cursor: sqlite3.Cursor) -> list[Row]:
    if cursor.description is None:
        return []
    make = row_class(tuple(column[0] for column in cursor.description))
    return [make(row) for row in cursor]


def _roll_back(connection: sqlite3.Connection, *, sql: str) -> None:
    if connection.in_transaction:  # an interrupted write has ended it already
        with contextlib.suppress(sqlite3.Error):
            connection.execute(sql)


def _limited(connection: sqlite3.Connection, sql: str, kept: Kept) -> Answer:
    cursor = connection.execute(sql)
    if cursor.description is None:
        raise sqlite3.OperationalError("it returns no rows")
    columns = [column[0] for column in cursor.description]
    make = row_class(tuple(columns))
    for row in cursor:
        if not kept.takes(make(row)):
            break
    return Answer(columns, kept.rows, kept.more)


def _guarded(sql: str, kept: Kept, connection: sqlite3.Connection) -> Answer:
    before = _bound(connection)
    connection.set_authorizer(_only_reading)
    try:
        return _limited(connection, sql, kept)
    finally:
        connection.set_authorizer(None)
        for limit, value in before:
            connection.setlimit(limit, value)


READING = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
DANGEROUS_FUNCTIONS = frozenset({"load_extension", "readfile", "writefile", "fts3_tokenizer"})


def _only_reading(action: int, _first: Any, second: Any, *_: Any) -> int:
    if action == sqlite3.SQLITE_FUNCTION and second in DANGEROUS_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in READING else sqlite3.SQLITE_DENY


def _forbid_writing(connection: sqlite3.Connection) -> None:
    _bound(connection)
    connection.set_authorizer(_only_reading)


def _bound(connection: sqlite3.Connection) -> list[tuple[int, int]]:
    """Bound what a statement may build in memory; return what the bounds were before."""
    limits = (
        (sqlite3.SQLITE_LIMIT_LENGTH, VALUE_BYTES),
        (sqlite3.SQLITE_LIMIT_COLUMN, COLUMNS_MAX),
        (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
    )
    return [(limit, connection.setlimit(limit, value)) for limit, value in limits]
