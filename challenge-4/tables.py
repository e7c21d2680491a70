"""A table or query as the source of a lazy collection: the first operations become SQL.

The operations of a plan are taken one after the other for as long as SQL means exactly the same:
filters by expressions, selections of columns, sorting by a column, skip and take. Where a filter
follows a take, the query so far becomes a sub-select. What is left runs in Python.
"""

import base64
import binascii
import datetime as dt
import hashlib
import hmac
import itertools
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Self

from compiler import iterate_pushed
from databases import Column, Session, describe_connection, open_session, quoted
from explaining import call_text
from expressions import Expr, col, conjuncts, record
from lazy import LazyCollection, check_number
from pages import Page
from sources import Op, Source
from sql import Translator

Row = Mapping[str, Any]
PER_ROW = frozenset({"filter", "map", "tap", "select"})  # one row in, at most one element out
_SORTABLE = frozenset({"integer", "float", "text", "bool", "numeric", "none", "rowid"})


@dataclass(frozen=True)
class Term:
    """One term of ORDER BY."""

    column: str
    descending: bool = False
    collation: str = ""  # by code points, as Python sorts; empty: as the database does
    nullable: bool = True


@dataclass
class Query:
    """A SELECT in the making. Whatever follows a limit wraps what is there into a sub-select."""

    mark: str
    base: str
    base_columns: list[str]
    order: list[Term]
    parameters: list[Any] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    where_parameters: list[Any] = field(default_factory=list)
    skip: int = 0
    take: int | None = None
    row_id: str | None = None

    def name(self, column: str) -> str:
        """The column as SQL names it; the hidden key is no quoted name."""
        return column if column == self.row_id else quoted(column, self.mark)

    def add_where(self, text: str, parameters: list[Any]) -> None:
        """Keep the rows for which the text is true."""
        if self.skip or self.take is not None:
            self.wrap()
        self.where.append(text)
        self.where_parameters += parameters

    def add_order(self, term: Term) -> None:
        """Sort by this before everything else."""
        if self.skip or self.take is not None:
            self.wrap()
        self.order = [term, *(old for old in self.order if old.column != term.column)]

    def add_skip(self, number: int) -> None:
        """Leave out the first rows."""
        self.skip += number
        if self.take is not None:
            self.take = max(0, self.take - number)

    def add_take(self, number: int) -> None:
        """Stop after so many rows."""
        self.take = number if self.take is None else min(self.take, number)

    def wrap(self) -> None:
        """Make it the FROM of a new one."""
        key = [self.row_id] if self.row_id else []
        names = [f"{self.name(c)} AS {quoted(c, self.mark)}" for c in [*self.base_columns, *key]]
        text, parameters = self.text(names)
        self.base, self.parameters = f"({text}) AS q", parameters
        self.base_columns = [*self.base_columns, *key]
        self.where, self.where_parameters = [], []
        self.skip, self.take, self.row_id = 0, None, None

    def text(self, selected: Sequence[str], *, ordered: bool = True) -> tuple[str, list[Any]]:
        """The statement and its parameters."""
        text = f"SELECT {', '.join(selected)} FROM {self.base}"
        parameters = [*self.parameters, *self.where_parameters]
        if self.where:
            text += f" WHERE {' AND '.join(self.where)}"
        if ordered and self.order:
            text += f" ORDER BY {', '.join(map(self._term, self.order))}"
        if self.take is not None or self.skip:
            take = self.take
            if take is None and self.mark == "?":
                take = -1  # SQLite has no OFFSET without LIMIT
            if take is not None:
                text += f" LIMIT {self.mark}"
                parameters.append(min(take, 2**63 - 1))
            if self.skip:
                text += f" OFFSET {self.mark}"
                parameters.append(min(self.skip, 2**63 - 1))
        return text, parameters

    def _term(self, term: Term) -> str:
        text = self.name(term.column)
        if term.collation:
            text += f" COLLATE {term.collation}"
        text += " DESC" if term.descending else ""
        if term.nullable:  # None comes first, as in Python's order of expressions
            text += " NULLS LAST" if term.descending else " NULLS FIRST"
        return text

    def after(self, values: Sequence[Any]) -> tuple[str, list[Any]]:
        """The condition for rows behind the one with these values in the terms of the order."""
        text, parameters = "1 = 0", list[Any]()
        for term, value in reversed(list(zip(self.order, values, strict=True))):
            name = self.name(term.column)
            collate = f" COLLATE {term.collation}" if term.collation else ""
            if value is None:
                beyond = "1 = 0" if term.descending else f"{name} IS NOT NULL"
                text = f"({beyond} OR ({name} IS NULL AND {text}))"
                continue
            sign = "<" if term.descending else ">"
            beyond = f"{name}{collate} {sign} {self.mark}"
            if term.descending and term.nullable:
                beyond = f"({beyond} OR {name} IS NULL)"
            if text == "1 = 0":
                text, parameters = beyond, [value, *parameters]
            else:
                text = f"({beyond} OR ({name}{collate} = {self.mark} AND {text}))"
                parameters = [value, value, *parameters]
        return text, parameters


class PushedSource(Source):
    """The rows of one statement, on a connection that is given back by `close`."""

    __slots__ = ("fetch_size", "key_size", "last_key", "numbers", "order", "owner", "parameters",
                 "pushed", "query", "session", "sql")  # fmt: skip

    def __init__(self, session: Session, fetch_size: int) -> None:
        super().__init__(())
        self.session = session
        self.fetch_size = fetch_size
        self.sql = ""
        self.parameters: list[Any] = []
        self.pushed: list[str] = []
        self.numbers: list[int] = []
        self.order: list[Term] = []
        self.key_size = 0  # columns at the end of a row that only the page's cursor needs
        self.last_key: tuple[Any, ...] = ()
        self.owner: TableSource | None = None

    def iterate(self, window: range, opened: list[Any]) -> Iterator[Any]:
        """Run the statement."""
        del window  # the first operation left makes the row, so there is none
        rows = self.session.rows(self.sql, self.parameters, self.fetch_size)
        self._keep(rows, opened)
        return self._noting_keys(rows) if self.key_size else rows

    def _noting_keys(self, rows: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        size = self.key_size
        for row in rows:
            self.last_key = row[-size:]
            yield row[:-size]

    def is_sequence(self) -> bool:
        """Rows come in order."""
        return False

    def close(self) -> None:
        """Give the connection back, once."""
        if self.owner is not None:
            self.owner.reading.remove(self)
            self.owner = None
            super().close()  # the rows that are open
            self.session.close()


class TableSource(Source):
    """A table or a query, and how to connect; what it runs is known once the schema is."""

    __slots__ = ("base_ops", "connection", "fetch_size", "key", "order_by", "parameters", "query",
                 "reading", "table")  # fmt: skip
    is_late = True

    def __init__(
        self,
        table: str | None,
        query: str | None,
        parameters: Any,
        base_ops: tuple[Op, ...],
        fetch_size: int,
        connection: Any,
        order_by: tuple[str, ...],
        key: tuple[str, ...],
    ) -> None:
        super().__init__(())
        self.table, self.query, self.parameters = table, query, parameters
        self.base_ops, self.fetch_size, self.connection = base_ops, fetch_size, connection
        self.order_by, self.key = order_by, key
        self.reading: list[PushedSource] = []

    def describe(self) -> str:
        """The table and the place of the database, without secrets."""
        what = f"table {self.table!r}" if self.table is not None else "query"
        return f"{what} of {describe_connection(self.connection)}"

    def size(self) -> int | None:
        """Known to the database only."""
        return None

    def is_sequence(self) -> bool:
        """Rows come in order."""
        return False

    def push(
        self, ops: tuple[Op, ...], *, with_key: bool = False, counting: bool = False
    ) -> tuple[PushedSource, tuple[Op, ...]]:
        """Connect, look at the schema, and take over what SQL can do."""
        session = open_session(self.connection)
        try:
            made, left = _Pushing(self, session, ops, with_key, counting).run()
        except BaseException:
            session.close()
            raise
        made.owner = self
        self.reading.append(made)
        return made, left

    def close(self) -> None:
        """End what is being read."""
        for made in list(self.reading):
            made.close()

    def identity(self) -> str:
        """What a cursor belongs to."""
        parts = (self.table, self.query, repr(self.parameters), self.order_by, self.key)
        return json.dumps([str(part) for part in parts])


class _Pushing:
    """One walk over the operations."""

    def __init__(
        self, source: TableSource, session: Session, ops: tuple[Op, ...], with_key: bool,
        counting: bool,
    ) -> None:  # fmt: skip
        self.source, self.session, self.with_key, self.counting = (
            source,
            session,
            with_key,
            counting,
        )
        hidden = len(ops) + 1  # the number of operations that nobody has written
        self.ops = [*source.base_ops, *ops]
        self.numbers = [hidden] * len(source.base_ops) + list(range(1, len(ops) + 1))
        self.hidden = hidden
        if source.table is not None:
            self.table = session.table(source.table)
        else:
            self.table = session.query(source.query or "", source.parameters)
        self.translator = Translator(session.dialect, session.mark, dict(self.table.columns))
        self.names = {name: name for name in self.table.columns}  # field -> column
        self.scalar: str | None = None
        self.query = self._start()
        self.pushed: list[str] = []

    def _start(self) -> Query:
        table, mark = self.table, self.session.mark
        key = self.source.key or table.key
        base = table.sql if self.source.query is None else f"{table.sql} AS q"
        query = Query(mark, base, list(table.columns), [], row_id=table.row_id)
        query.parameters = list(self.source.parameters)
        terms = [self._ordering(name) for name in self.source.order_by]
        for name in key:
            if name != table.row_id:
                self._known(name)
            if name not in [term.column for term in terms]:
                column = table.columns.get(name)
                optional = column is not None and column.nullable and column.kind != "rowid"
                terms.append(Term(name, nullable=optional))
        query.order = terms
        return query

    def _ordering(self, name: str) -> Term:
        descending = name not in self.table.columns and name.startswith("-")
        column = self._known(name.removeprefix("-") if descending else name)
        return Term(column.name, descending, nullable=column.nullable)

    def _known(self, name: str) -> Column:
        column = self.table.columns.get(name)
        if column is None:
            known = ", ".join(list(self.table.columns)[:20])
            raise ValueError(f"There is no column {name!r}; there are: {known}.")
        return column

    def run(self) -> tuple[PushedSource, tuple[Op, ...]]:
        done = 0
        for op in self.ops:
            rest = self._take_over(op)
            if rest is not None:
                if rest:  # a filter of which a part was taken
                    self.ops[done] = rest
                break
            text = f"op {self.numbers[done]} " if self.numbers[done] != self.hidden else ""
            self.pushed.append(text + call_text(op))
            done += 1
        left, numbers = self.ops[done:], self.numbers[done:]
        left, numbers = self._place_after(left, numbers)
        return self._finish(left, numbers)

    def _take_over(self, op: Op) -> Op | tuple[()] | None:
        """None: SQL does it. Else what is left of it; nothing: all of it is left."""
        name = op[0]
        if name == "filter" and isinstance(op[1], Expr):
            return self._filter(op[1])
        if name == "map" and isinstance(op[1], Expr):
            return None if self._select(op[1]) else ()
        if name == "skip":
            self.query.add_skip(op[1])
            return None
        if name == "take":
            self.query.add_take(op[1])
            return None
        if name == "slice" and op[3] == 1 and op[1] >= 0 and (op[2] is None or op[2] >= 0):
            self.query.add_skip(op[1])
            if op[2] is not None:
                self.query.add_take(max(0, op[2] - op[1]))
            return None
        if name == "sort" and isinstance(op[1], Expr):
            column = self.translator.column_of(op[1])
            if column is None or column.kind not in _SORTABLE or not self.query.order:
                return ()
            texts = {"sqlite": "BINARY", "postgresql": '"C"' if column.kind == "text" else ""}
            collation = texts[self.session.dialect]
            self.query.add_order(Term(column.name, op[2], collation, column.nullable))
            return None
        if name == "after":
            self._go_on_after(op[1])
            return None
        return ()

    def _filter(self, expr: Expr) -> Op | None:
        parts = conjuncts(expr)
        for position, part in enumerate(parts):
            text = self.translator.condition(part)
            if text is None:
                rest = parts[position]
                for other in parts[position + 1 :]:
                    rest = rest & other
                return ("filter", rest) if position else ()
            self.query.add_where(*text)
        return None

    def _select(self, expr: Expr) -> bool:
        """Take over a selection of columns, under new names perhaps, or of one column."""
        fields = expr.args[0] if expr.op == "record" else {"": expr}
        chosen = {name: self.translator.column_of(part) for name, part in fields.items()}
        columns = {name: column for name, column in chosen.items() if column is not None}
        if len(columns) < len(chosen):
            return False
        if expr.op == "record":
            self.names = {name: column.name for name, column in columns.items()}
            self.scalar = self.translator.element = None
            self.translator.columns = columns
        else:
            self.translator.element = columns[""]
            self.scalar = columns[""].name
        return True

    # --- cursors ---

    def _go_on_after(self, payload: dict[str, Any]) -> None:
        if payload["order"] != _order_text(self.query.order):
            raise ValueError("The cursor belongs to another order of the rows.")
        self.query.add_where(*self.query.after([_decoded(value) for value in payload["values"]]))

    def _place_after(self, left: list[Op], numbers: list[int]) -> tuple[list[Op], list[int]]:
        """A cursor behind operations on single rows means the same before them."""
        for position, op in enumerate(left):
            if op[0] == "after":
                if not all(before[0] in PER_ROW for before in left[:position]):
                    raise ValueError(
                        "after() cannot pass operations that count or group rows in Python; put "
                        "it before them."
                    )
                self._go_on_after(op[1])
                self.pushed.append("after(…)")
                return self._place_after(
                    left[:position] + left[position + 1 :],
                    numbers[:position] + numbers[position + 1 :],
                )
        return left, numbers

    # --- the statement, and what makes elements of its rows ---

    def _finish(self, left: list[Op], numbers: list[int]) -> tuple[PushedSource, tuple[Op, ...]]:
        made = PushedSource(self.session, self.source.fetch_size)
        makers: list[Op]
        if self.scalar is not None:
            selected = [self.scalar]
            makers = [("map", _only)]
            if self.translator.element is not None and self._is_json(self.scalar):
                makers.append(("map", decode_json))
        else:
            fields = self._needed(left)
            selected = [self.names[name] for name in fields]
            makers = [("row", tuple(fields))]
            if decoded := [name for name in fields if self._is_json(self.names[name])]:
                makers.append(("map", _JsonFields(decoded)))
        names = [self.query.name(column) for column in selected] or ["1"]
        if not selected:
            makers = [("map", _nothing)]
        if self.counting and not left:
            inner, parameters = self.query.text(["1"], ordered=False)
            made.sql, made.parameters = f"SELECT count(*) FROM ({inner}) AS counted", parameters
            made.numbers = [self.hidden]
            return made, (("map", _only),)
        if self.with_key and self.query.order and all(op[0] in PER_ROW or op[0] in ("skip", "take")
                                                      for op in left):  # fmt: skip
            names += [self.query.name(term.column) for term in self.query.order]
            made.key_size = len(self.query.order)
        made.order = self.query.order
        made.sql, made.parameters = self.query.text(names)
        made.pushed = self.pushed
        made.numbers = [self.hidden] * len(makers) + numbers
        return made, (*makers, *left)

    def _needed(self, left: list[Op]) -> list[str]:
        """The fields that the operations left can see: all, unless they choose soon."""
        needed: set[str] = set()
        for op in left:
            if not (len(op) > 1 and isinstance(op[1], Expr)) and op[0] not in ("skip", "take"):
                break
            columns = op[1].columns() if isinstance(op[1], Expr) else set()
            if columns is None or op[0] not in ("filter", "map", "skip", "take"):
                break
            needed |= columns
            if op[0] == "map":
                return [name for name in self.names if name in needed]
        return list(self.names)

    def _is_json(self, column: str) -> bool:
        found = self.table.columns.get(column)
        is_json = found is not None and found.kind == "json"
        return is_json and self.session.dialect == "sqlite"  # psycopg decodes by itself


_only = lambda row: row[0]  # noqa: E731  (written into the loop)


def _nothing(row: tuple[Any, ...]) -> dict[str, Any]:
    del row
    return {}


def decode_json(value: Any) -> Any:
    """A stored JSON text as what it says; what is no text (NULL, a number) as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError("A column that is declared to hold JSON holds something else.") from None


class _JsonFields:
    """Decodes some fields of a row."""

    __name__ = "decode_json"

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        for name in self.names:
            row[name] = decode_json(row[name])
        return row


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
            raise ValueError(
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


# --- cursors ----------------------------------------------------------------------------------


def make_cursor(values: Sequence[Any], order: Sequence[Term], identity: str) -> str:
    """A text that stands for the row with these values in the terms of the order."""
    payload = {"values": [_encoded(value) for value in values], "order": _order_text(order)}
    body = json.dumps(payload, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(_seal(body, identity) + body).decode().rstrip("=")


def read_cursor(cursor: str, identity: str) -> dict[str, Any]:
    """What the cursor stands for; ValueError if it was not issued for this table and order."""
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (ValueError, TypeError, binascii.Error):
        raw = b""
    seal, body = raw[:16], raw[16:]
    if len(raw) <= 16 or not hmac.compare_digest(seal, _seal(body, identity)):
        raise ValueError("This is no cursor of a page of these rows.")
    payload: dict[str, Any] = json.loads(body)
    return payload


def _seal(body: bytes, identity: str) -> bytes:
    return hashlib.blake2b(
        identity.encode() + b"\0" + body, digest_size=16, person=b"lazy cursor"
    ).digest()


def _order_text(order: Sequence[Term]) -> list[list[Any]]:
    return [[term.column, term.descending, term.collation] for term in order]


_ENCODERS: dict[type, tuple[str, Callable[[Any], str], Callable[[str], Any]]] = {
    bytes: ("bytes", bytes.hex, bytes.fromhex),
    dt.datetime: ("time", dt.datetime.isoformat, dt.datetime.fromisoformat),
    dt.date: ("date", dt.date.isoformat, dt.date.fromisoformat),
    Decimal: ("decimal", str, Decimal),
    uuid.UUID: ("uuid", str, uuid.UUID),
}


def _encoded(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    try:
        name, encode, _ = _ENCODERS[type(value)]
    except KeyError:
        raise ValueError(
            f"A {type(value).__name__} in the order of the rows cannot be put into a cursor."
        ) from None
    return {name: encode(value)}


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        ((name, text),) = value.items()
        return next(decode for kind, _, decode in _ENCODERS.values() if kind == name)(text)
    return value
