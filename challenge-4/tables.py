"""A table or query as a lazy collection: rows as mappings, pages with cursors.

What the database does of a plan is decided in `pushing.py`; a page's cursor says where the next one
begins, so that going on does not count the rows before it.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Self

from compiler import iterate_pushed
from cursors import make_cursor, read_cursor
from expressions import Expr, col, record
from lazy import LazyCollection, check_number
from pages import Page
from pushing import TableSource
from sources import LazyError, Op

Row = Mapping[str, Any]


class UnorderedRowsError(LazyError, ValueError):
    """Pages of rows without an order that tells them apart."""


class DatabaseLazyCollection(LazyCollection[Row]):
    """Rows of a table or query as mappings; the first operations are done by the database.

    Nothing is connected before the first row is wanted. The connection is read-only, and given
    back as soon as reading ends. Rows come in the order of `order_by`, then of the key.
    """

    __slots__ = ()

    @classmethod
    def from_table(
        cls,
        table: str,
        columns: Sequence[str] | None = None,
        limit: int | None = None,
        fetch_size: int = 1000,
        *,
        connection: Any = None,
        where: Expr | None = None,
        order_by: str | Sequence[str] | None = None,
        key: str | Sequence[str] | None = None,
    ) -> Self:
        """The rows of a table or view.

        `connection` is a path, a DSN, a function that opens one, or an open connection (left
        open); without it DATABASE_URL, else the bundled SQLite file. `order_by` names columns, with
        a minus for descending. `key` names columns that tell rows apart where there is no primary
        key; pages and cursors need one.
        """
        ops: list[Op] = []
        if where is not None:
            if not isinstance(where, Expr):
                raise TypeError("from_table(where=…) takes an expression such as col('a') > 5.")
            ops.append(("filter", where))
        if columns is not None:
            names = _names("columns", columns)
            if not names:
                raise ValueError("from_table(columns=[]): name at least one column.")
            ops.append(("map", record({name: col(name) for name in names})))
        if limit is not None:
            ops.append(("take", check_number("from_table", "limit", limit, 0)))
        if not isinstance(table, str):
            raise TypeError(f"from_table() takes the name of a table, not {type(table).__name__}.")
        return cls._over(
            TableSource(
                table, None, (), tuple(ops),
                check_number("from_table", "fetch_size", fetch_size, 1), connection,
                _names("order_by", order_by or ()), _names("key", key or ()),
            )
        )  # fmt: skip

    @classmethod
    def from_query(
        cls, sql: str, params: Any = (), fetch_size: int = 1000, *, connection: Any = None,
        key: str | Sequence[str] | None = None,
    ) -> Self:  # fmt: skip
        """The rows of a SELECT, in its order, with its parameters in the database's own style."""
        if isinstance(params, str | bytes | Mapping):
            raise TypeError("from_query(params=…) takes a list of values.")
        statement = sql.strip().rstrip(";").rstrip()
        fetch_size = check_number("from_query", "fetch_size", fetch_size, 1)
        return cls._over(
            TableSource(None, statement, tuple(params), (), fetch_size, connection, (),
                        _names("key", key or ()))
        )  # fmt: skip

    @classmethod
    def _over(cls, source: TableSource) -> Self:
        new = object.__new__(cls)
        new._source, new._ops = source, ()
        return new

    def after(self, cursor: str) -> Self:
        """The rows behind the one that a page's cursor stands for."""
        source = self._table_source("after")
        return self._then("after", read_cursor(cursor, source.identity()))  # type: ignore[no-any-return]

    def _table_source(self, what: str) -> TableSource:
        if not isinstance(self._source, TableSource):
            raise ValueError(f"{what}() works on the rows of a database, before cache().")  # noqa: TRY004
        return self._source

    def page(self, number: int, size: int = 20, *, count: bool = False) -> Page[Row]:
        """One page, counted from 1, with the cursor to go on behind it."""
        check_number("page", "number", number, 1)
        check_number("page", "size", size, 1)
        source = self._source
        if not isinstance(source, TableSource):
            return super().page(number, size, count=count)
        ops = (*self._ops, ("skip", (number - 1) * size), ("take", size + 1))
        pushed, left = source.push(ops, with_key=True)
        if not pushed.order:
            pushed.close()
            raise UnorderedRowsError(
                "Pages need an order that tells rows apart: name its columns with key=…, since "
                f"{source.describe()} has no primary key."
            )
        rows = iterate_pushed(pushed, left)
        try:
            items = list(itertools.islice(rows, size))
            last_key = pushed.last_key
            has_next = next(rows, _END) is not _END
        finally:
            rows.close()  # type: ignore[attr-defined]
        cursor = None
        if has_next and pushed.key_size:
            cursor = make_cursor(last_key, pushed.order, source.identity())
        return Page(items, number, size, has_next, self.count() if count else None, cursor)

    def count(self) -> int:
        """How many elements there are; the database counts where it does all of the plan."""
        if not isinstance(self._source, TableSource):
            return super().count()
        pushed, left = self._source.push(self._ops, counting=True)
        rows = iterate_pushed(pushed, left)
        if pushed.sql.startswith("SELECT count(*) FROM ("):
            return int(next(rows))
        number = 0
        for number, _ in enumerate(rows, 1):  # noqa: B007
            pass
        return number


_END: Any = object()


def _names(what: str, names: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        if what == "columns":
            raise TypeError(f"from_table(columns={names!r}): a list of names is needed.")
        return (names,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{what} takes names of columns.")
    return tuple(names)
