"""How the first operations of a plan become SQL: one after the other, while SQL means the same.

Filters by expressions, selections of columns, sorting by a column, skip, take and cursors. The
first operation that SQL cannot say exactly ends it; it and all behind it run in Python.
"""

import json
from collections.abc import Iterator
from typing import Any

from cursors import CursorError, decoded, order_text
from databases import Column, Session, describe_connection, open_session
from explaining import call_text
from expressions import Expr, conjuncts
from queries import Query, Term
from sources import Op, Source
from sql import Translator

PER_ROW = frozenset({"filter", "map", "tap", "select"})  # one row in, at most one element out
_SORTABLE = frozenset({"integer", "float", "decimal", "text", "bool", "numeric", "none", "rowid"})


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
                terms.append(Term(name, nullable=optional, cast=_cast(column)))
        query.order = terms
        return query

    def _ordering(self, name: str) -> Term:
        descending = name not in self.table.columns and name.startswith("-")
        column = self._known(name.removeprefix("-") if descending else name)
        return Term(column.name, descending, nullable=column.nullable, cast=_cast(column))

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
            if column is None or column.kind not in _SORTABLE:
                return ()
            if not self.query.order or self.query.is_full():
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
            text = None if self.query.is_full() else self.translator.condition(part)
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
        if payload["order"] != order_text(self.query.order):
            raise CursorError("The cursor belongs to another order of the rows.")
        self.query.add_where(*self.query.after([decoded(value) for value in payload["values"]]))

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


def _cast(column: Column | None) -> str:
    """A real is read as the double that prints the same, which is another number."""
    return "::float4" if column is not None and column.kind == "real" else ""


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
