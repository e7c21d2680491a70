"""PostgreSQL by a pool of psycopg, behind the interface of a database."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from addresses import Address
from connections import driver, ended_within
from failures import ConnectionBroken, OperationError, OperationTimeout, QueryTooLong
from rows import ANSWER_BYTES, Answer, Database, Kept, Parameters, Row, row_class

T = TypeVar("T")


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
