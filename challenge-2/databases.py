"""Databases behind one interface: SQLite embedded, PostgreSQL by psycopg and its pool."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import re
import socket
import sqlite3
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

from addresses import Address
from connections import Connection, Connector, driver, ended_within
from failures import (
    ConnectionBroken,
    OperationError,
    OperationTimeout,
    QueryTooLong,
    ResourceClosed,
)
from sqlite_threads import BUSY_SECONDS, SqliteThread

log = logging.getLogger("resources")

T = TypeVar("T")
Parameters = Sequence[Any] | Mapping[str, Any]
ANSWER_BYTES = 4 * 1024 * 1024  # of all values of a bounded query, as they are shown
VALUE_BYTES = 1_000_000  # of one value of an SQLite query
COLUMNS_MAX = 100  # of one row of an SQLite query
AGGREGATES = """
CREATE TABLE IF NOT EXISTS aggregates (
    window_start REAL NOT NULL,
    category TEXT NOT NULL,
    count INTEGER NOT NULL DEFAULT 0,
    total REAL NOT NULL DEFAULT 0,
    average REAL,
    PRIMARY KEY (window_start, category)
)"""


class Row(tuple[Any, ...]):
    """A row of a result: values by position or by column name; equal to the plain tuple."""

    __slots__ = ()
    _places: ClassVar[Mapping[str, int]] = {}

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return tuple.__getitem__(self, self._places[key])
        return tuple.__getitem__(self, key)

    def keys(self) -> list[str]:
        """The column names; with them `dict(row)` works."""
        return list(self._places)


@functools.lru_cache(maxsize=256)
def row_class(names: tuple[str, ...]) -> type[Row]:
    """The class of the rows that have these columns."""
    places = {name: place for place, name in enumerate(names)}
    return type("Row", (Row,), {"_places": places, "__slots__": ()})


class Answer(NamedTuple):
    """What a bounded query gave; `more` says that its limits have cut it short."""

    columns: list[str]
    rows: list[Row]
    more: bool


class Database(Connection):
    """`await execute(...)`, `await fetch(...)`, `async with transaction()`.

    Placeholders are `?`, at PostgreSQL `%s` too. Inside a transaction all statements of the same
    task belong to it; it is rolled back when its block fails, and may be nested.
    """

    async def execute(self, sql: str, params: Parameters = ()) -> int:
        """Run a statement; return how many rows it concerned, -1 if that is unknown."""
        raise NotImplementedError

    async def fetch(self, sql: str, params: Parameters = ()) -> list[Row]:
        """Run a statement and return its rows."""
        raise NotImplementedError

    def transaction(self) -> AbstractAsyncContextManager[Database]:
        """`async with database.transaction():` everything in the block, or nothing."""
        raise NotImplementedError

    async def query(
        self, sql: str, *, rows: int, seconds: float, size: int = ANSWER_BYTES
    ) -> Answer:
        """One reading statement, within these limits."""
        raise NotImplementedError

    async def check(self) -> None:
        """Ask it for the number one."""
        await self.fetch("SELECT 1")


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


class Kept:
    """Rows up to a number, and up to a size."""

    def __init__(self, limit: int, size: int) -> None:
        self.rows: list[Row] = []
        self.more = False
        self._limit = limit
        self._size_left = size

    def takes(self, row: Row) -> bool:
        """Keep a row; False if it is one too many."""
        self._size_left -= sum(map(_size, row))
        self.more = len(self.rows) >= self._limit or self._size_left < 0
        if not self.more:
            self.rows.append(row)
        return not self.more


def _size(value: Any) -> int:
    if isinstance(value, bytes):
        return 2 * len(value)  # they are shown as hexadecimal digits
    return len(value) if isinstance(value, str) else len(str(value))


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


class PostgresDatabase(Database):
    """A pool of psycopg connections."""

    def __init__(self, address: Address, operation_timeout: float, pool_size: int) -> None:
        super().__init__(address, operation_timeout)
        self._psycopg = driver("psycopg", "psycopg")
        pools = driver("psycopg_pool", "psycopg_pool")
        self._size = pool_size
        self._pool = pools.AsyncConnectionPool(
            self.address.url, min_size=1, max_size=pool_size, open=False, timeout=operation_timeout,
            kwargs={"autocommit": True, "row_factory": _row_factory},
        )  # fmt: skip
        self._mine: ContextVar[Any] = ContextVar("connection", default=None)
        self._checking: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Try one connection first: the pool would only say that time is up, and not why."""
        connection = await self._psycopg.AsyncConnection.connect(self.address.url)
        await connection.close()
        await self._pool.open()
        await self._pool.wait()

    def is_connection_error(self, error: Exception) -> bool:
        """What psycopg raises when the server is gone."""
        kinds = (OSError, self._psycopg.OperationalError, self._psycopg.InterfaceError)
        return isinstance(error, kinds)

    async def execute(self, sql: str, params: Parameters = ()) -> int:
        """Run a statement; outside a transaction it is one of its own."""

        async def work(connection: Any) -> int:
            cursor = await connection.execute(_placeholders(sql, params), params or None)
            return int(cursor.rowcount)

        return await self._do("a statement", work)

    async def fetch(self, sql: str, params: Parameters = ()) -> list[Row]:
        """Run a statement and return its rows."""

        async def work(connection: Any) -> list[Row]:
            cursor = await connection.execute(_placeholders(sql, params), params or None)
            return list(await cursor.fetchall()) if cursor.description else []

        return await self._do("a query", work)

    async def _do(self, what: str, work: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        began = asyncio.get_running_loop().time()
        connection = self._mine.get()
        if connection is not None and not connection.closed:
            return await self._bounded(what, work(connection), connection, began)
        async with self._borrowed(what) as borrowed:
            return await self._bounded(what, work(borrowed), borrowed, began)

    @asynccontextmanager
    async def _borrowed(self, what: str) -> AsyncIterator[Any]:
        async with self.operation(f"the wait for a connection for {what}"):
            connection = await self._pool.getconn()
        try:
            yield connection
        finally:
            await self._pool.putconn(connection)

    async def _bounded(
        self,
        what: str,
        work: Coroutine[Any, Any, T],
        connection: Any,
        began: float | None = None,
    ) -> T:
        """A cancelled psycopg query waits for the server; one that is gone is hung up on."""
        task = asyncio.ensure_future(work)
        cancelled = False
        now = asyncio.get_running_loop().time()
        seconds = self.operation_timeout - (0.0 if began is None else now - began)
        try:
            async with self.operation(what, limit=self.operation_timeout + 2):
                try:
                    await asyncio.wait({task}, timeout=seconds)
                except asyncio.CancelledError:
                    cancelled = True
                    task.cancel()
                    await asyncio.wait({task}, timeout=1.0)
                if not task.done():
                    _hang_up(connection)
                    await asyncio.wait({task}, timeout=1.0)
                    if not cancelled:
                        raise self._no_answer(what)
                if cancelled:
                    raise asyncio.CancelledError
                return task.result()
        except (ConnectionBroken, OperationTimeout):
            self._suspect_all()
            raise
        finally:
            if not task.done():
                task.cancel()
            elif not task.cancelled():
                task.exception()

    def _no_answer(self, what: str) -> OperationTimeout:
        return OperationTimeout(
            f"{self.address.shown} did not answer {what} within {self.operation_timeout:g} s"
        )

    def _suspect_all(self) -> None:
        """The others in the pool may be as dead: have them tried."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check_pool())

    async def _check_pool(self) -> None:
        with contextlib.suppress(Exception):
            await ended_within(self._pool.check(), self.operation_timeout)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Database]:
        """Everything in the block, or nothing; a nested one is a savepoint."""
        mine = self._mine.get()
        if mine is not None and not mine.closed:
            async with self._block(mine):
                yield self
            return
        async with self._borrowed("a transaction") as connection:
            self._mine.set(connection)
            try:
                async with self._block(connection):
                    yield self
            finally:
                self._mine.set(None)

    @asynccontextmanager
    async def _block(self, connection: Any) -> AsyncIterator[None]:
        block = connection.transaction()
        await self._bounded("BEGIN", block.__aenter__(), connection)
        try:
            yield
        except BaseException as error:
            details = (type(error), error, error.__traceback__)
            try:
                await self._bounded("ROLLBACK", block.__aexit__(*details), connection)
            except Exception as failure:  # noqa: BLE001  (a dead connection rolls back by itself)
                if failure is not error:
                    error.add_note(f"the rollback failed too: {failure}")
            raise
        await self._bounded("COMMIT", block.__aexit__(None, None, None), connection)

    async def query(
        self, sql: str, *, rows: int, seconds: float, size: int = ANSWER_BYTES
    ) -> Answer:
        """One reading statement in a read-only transaction, with the server's own time limit."""
        if not READING_STATEMENT.match(sql):
            raise OperationError("Only statements that read are run here: begin with SELECT.")
        asked = f"SELECT * FROM ({sql.strip().rstrip(';')}\n) AS asked LIMIT"

        async def work(connection: Any) -> Answer:
            kept = Kept(rows, size)
            async with connection.transaction(), connection.cursor() as cursor:
                await cursor.execute("SET TRANSACTION READ ONLY")
                await cursor.execute(f"SET LOCAL statement_timeout = {int(seconds * 1000)}")
                # Prepared on its own: several statements in one string are refused by the server.
                await cursor.execute(f"{asked} 0", prepare=True)
                columns = [column.name for column in cursor.description]
                # Streamed, so that what is too large is never held whole.
                async with contextlib.aclosing(cursor.stream(f"{asked} {rows + 1}")) as stream:
                    async for row in stream:
                        if not kept.takes(row):
                            break
            return Answer(columns, kept.rows, kept.more)

        async with self._borrowed("a query") as connection:
            try:
                return await self._bounded("the query", work(connection), connection)
            except ConnectionBroken as error:
                if isinstance(error.__cause__, self._psycopg.errors.QueryCanceled):
                    raise QueryTooLong(f"The query took longer than {seconds:g} s.") from error
                raise

    async def close(self) -> None:
        """Close the pool; statements that still run lose their connections."""
        self.closed = True
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.wait({self._checking})
        await self._pool.close()

    def stats(self) -> Mapping[str, float]:
        """The figures that the pool keeps itself."""
        figures = self._pool.get_stats()
        size, idle = figures.get("pool_size", 0), figures.get("pool_available", 0)
        return {
            "max": float(self._size),
            "used": float(size - idle),
            "idle": float(idle),
            "pending": float(figures.get("requests_waiting", 0)),
            "timeouts": float(figures.get("requests_errors", 0)),
        }


READING_STATEMENT = re.compile(r"\s*(SELECT|WITH|VALUES|TABLE)\b", re.IGNORECASE)


def _row_factory(cursor: Any) -> Any:
    names = tuple(column.name for column in cursor.description or ())
    return row_class(names)


def _placeholders(sql: str, params: Parameters) -> str:
    """`?` as psycopg's `%s`, outside quotes; statements that have `%s` are left alone."""
    if not params or isinstance(params, Mapping) or "%s" in sql:
        return sql
    pieces = re.split(r"('(?:[^']|'')*'|\"(?:[^\"]|\"\")*\")", sql.replace("%", "%%"))
    pieces[::2] = [piece.replace("?", "%s") for piece in pieces[::2]]
    return "".join(pieces)


def _hang_up(connection: Any) -> None:
    """End the conversation from this side: what waits for the server sees its end."""
    with contextlib.suppress(Exception), socket.socket(fileno=os.dup(connection.fileno())) as twin:
        twin.shutdown(socket.SHUT_RDWR)


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


def plain_rows(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries, for JSON."""
    for row in rows:
        yield {name: row[place] for place, name in enumerate(row.keys())}
