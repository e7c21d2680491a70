"""Rows, bounded answers, and the interface of the databases that give them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar, NamedTuple

from connections import Connection

Parameters = Sequence[Any] | Mapping[str, Any]
ANSWER_BYTES = 4 * 1024 * 1024  # of all values of a bounded query, as they are shown


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
