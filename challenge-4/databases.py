"""Connections to SQLite and PostgreSQL: opened when the first row is wanted, given back at the end.

A session knows the live schema of a table, quotes names for its database, and streams rows. It
never writes: files are opened read-only, PostgreSQL transactions are read-only, and the text that
runs is a SELECT.
"""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from sources import LazyError

BUNDLED = Path(__file__).resolve().parent / "processed_events.sqlite"
BUNDLED_TABLE, BUNDLED_JSON = "processed_events", "data"
CONNECT_SECONDS = 10
_cursor_numbers = count()


class DatabaseError(LazyError):
    """The database cannot be reached, or does not hold what was named."""


def is_driver_error(error: BaseException) -> bool:
    """Whether the database's own driver raised it."""
    driver = type(error).__module__.partition(".")[0]
    return isinstance(error, sqlite3.Error) or driver == "psycopg"


@dataclass(frozen=True)
class Column:
    """A column, and what may be said about its values in SQL (see `sql.py` for the kinds)."""

    name: str
    kind: str
    nullable: bool = True


@dataclass(frozen=True)
class Table:
    """A table as it is now: its columns, and the columns (or rowid) that tell its rows apart."""

    columns: dict[str, Column]
    key: tuple[str, ...]
    sql: str  # how FROM names it
    row_id: str | None = None  # the name of SQLite's hidden key, where that is the key


class Session:
    """One connection in use; `close` gives it back, or leaves it open for its owner."""

    dialect = ""
    mark = ""

    def __init__(self, connection: Any, give_back: Callable[[], None]) -> None:
        self.connection = connection
        self.give_back = give_back

    def table(self, name: str) -> Table:
        """The live schema."""
        raise NotImplementedError

    def query(self, sql: str, parameters: Any) -> Table:
        """The columns of a query."""
        raise NotImplementedError

    def rows(self, sql: str, parameters: Any, fetch_size: int) -> Iterator[tuple[Any, ...]]:
        """The rows, `fetch_size` at a time."""
        raise NotImplementedError

    def close(self) -> None:
        """End what was begun, and give the connection back."""
        self.give_back()


def quoted(name: str, mark: str = "?") -> str:
    """An identifier that can be nothing else; psycopg wants a percent sign doubled."""
    name = name.replace("%", "%%") if mark == "%s" else name
    return '"' + name.replace('"', '""') + '"'


def chunked(cursor: Any, fetch_size: int) -> Iterator[tuple[Any, ...]]:
    """The rows of a cursor; it is closed with the iterator."""
    try:
        yield from chain.from_iterable(iter(partial(cursor.fetchmany, fetch_size), []))
    finally:
        cursor.close()


# --- SQLite -----------------------------------------------------------------------------------


class SqliteSession(Session):
    """A SQLite connection."""

    dialect, mark = "sqlite", "?"

    def table(self, name: str) -> Table:
        """Columns by affinity; the key is the rowid, which is also the order rows are stored in."""
        found = self.connection.execute(
            'SELECT name, type, "notnull", pk FROM pragma_table_xinfo(?) WHERE hidden <> 1', (name,)
        ).fetchall()
        if not found:
            raise DatabaseError(f"There is no table {name!r}. {self._tables()}")
        entry = self.connection.execute(
            "SELECT type, sql FROM (SELECT type, name, sql FROM sqlite_schema UNION ALL "
            "SELECT type, name, sql FROM sqlite_temp_schema) "
            "WHERE name = ? COLLATE NOCASE AND type IN ('table', 'view')",
            (name,),
        ).fetchone()
        kind, text = entry or ("table", "")
        is_plain = kind == "table" and not (text or "").upper().startswith("CREATE VIRTUAL")
        primary = [str(row[0]) for row in sorted(found, key=lambda row: row[3]) if row[3]]
        is_alias = len(primary) == 1 and any(
            row[0] == primary[0] and row[1].upper() == "INTEGER" for row in found
        )
        columns = {}
        for column, declared, required, in_key in found:
            affinity = _affinity(declared) if is_plain else "unknown"
            if in_key and is_alias and is_plain:
                affinity = "rowid"
            elif "JSON" in declared.upper() or (name, column) == (BUNDLED_TABLE, BUNDLED_JSON):
                affinity = "json"
            columns[str(column)] = Column(str(column), affinity, not required)
        row_id = self._row_id(name, set(columns)) if is_plain else None
        if not is_plain:
            return Table(columns, (), quoted(name))
        if row_id is None:
            return Table(columns, tuple(primary), quoted(name))
        if is_alias:
            return Table(columns, tuple(primary), quoted(name))
        return Table(columns, (row_id,), quoted(name), row_id)

    def _row_id(self, name: str, columns: set[str]) -> str | None:
        """A name of the rowid that no column hides; None: the table has none."""
        taken = {column.lower() for column in columns}
        for candidate in ("rowid", "_rowid_", "oid"):
            if candidate not in taken:
                try:
                    self.connection.execute(f"SELECT {candidate} FROM {quoted(name)} LIMIT 0")
                except sqlite3.OperationalError:
                    return None
                return candidate
        return None

    def _tables(self) -> str:
        names = self.connection.execute(
            "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view') "
            "AND name NOT LIKE 'sqlite_%' ORDER BY name LIMIT 10"
        ).fetchall()
        return f"The database has: {', '.join(name for (name,) in names) or 'no table'}."

    def query(self, sql: str, parameters: Any) -> Table:
        """Names only: an expression has no type in SQLite."""
        base = f"({sql}\n)"  # the query may end in a comment
        cursor = self.connection.execute(f"SELECT * FROM {base} LIMIT 0", parameters)
        names = [entry[0] for entry in cursor.description]
        cursor.close()
        return Table({name: Column(name, "unknown") for name in names}, (), base)

    def rows(self, sql: str, parameters: Any, fetch_size: int) -> Iterator[tuple[Any, ...]]:
        """The rows as tuples, whatever row factory the connection has."""
        cursor = self.connection.cursor()
        cursor.row_factory = None
        cursor.execute(sql, parameters)
        return chunked(cursor, fetch_size)


def _affinity(declared: str) -> str:
    """The rules of SQLite's documentation, section 3.1 of "Datatypes"."""
    upper = declared.upper()
    if "INT" in upper:
        return "numeric"
    if any(word in upper for word in ("CHAR", "CLOB", "TEXT")):
        return "text"
    if "BLOB" in upper or not upper:
        return "none"
    return "numeric"


def open_sqlite(path: str | os.PathLike[str]) -> sqlite3.Connection:
    """A file, read-only; it may be used by one thread after the other."""
    if not Path(path).is_file():
        raise DatabaseError(f"There is no database file {Path(path).name}.")
    uri = f"file:{quote(str(Path(path).resolve()))}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
    connection.execute("BEGIN")  # schema and rows of one moment
    return connection


# --- PostgreSQL -------------------------------------------------------------------------------


class PostgresSession(Session):
    """A psycopg connection, inside a transaction."""

    dialect, mark = "postgresql", "%s"

    def table(self, name: str) -> Table:
        """Columns by type; the key is the primary key."""
        return self._described(name, f"There is no table {name!r} that can be read.")

    def _described(self, name: str, missing: str) -> Table:
        if "\0" in name:
            raise DatabaseError(missing)
        cursor = self.connection.cursor()
        schema, _, bare = name.rpartition(".")
        found = cursor.execute(
            "SELECT c.oid, n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND "
            "((c.relname = %s AND pg_table_is_visible(c.oid)) "
            "OR (c.relname = %s AND n.nspname = %s)) ORDER BY c.relname = %s DESC LIMIT 1",
            (name, bare, schema, name),
        ).fetchone()
        if found is None:
            raise DatabaseError(missing)
        oid, namespace = found
        plain = bare if schema == namespace else name
        rows = cursor.execute(
            "SELECT a.attname, t.typname, a.attnotnull, coalesce(co.collisdeterministic, true), "
            "(SELECT array_position(i.indkey::int[], a.attnum::int) FROM pg_index i "
            "WHERE i.indrelid = a.attrelid AND i.indisprimary) "
            "FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid "
            "LEFT JOIN pg_collation co ON co.oid = a.attcollation "
            "WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
            (oid,),
        ).fetchall()
        columns = {
            column: Column(column, _kind(type_name, steady), not required)
            for column, type_name, required, steady, _ in rows
        }
        placed = [(place, column) for column, _, _, _, place in rows if place is not None]
        key = tuple(column for _, column in sorted(placed))
        return Table(columns, key, f"{quoted(namespace, self.mark)}.{quoted(plain, self.mark)}")

    def query(self, sql: str, parameters: Any) -> Table:
        """The types that the server gives the columns."""
        if not parameters:
            sql = sql.replace("%", "%%")  # as the driver reads it where there is nothing to fill in
        base = f"({sql}\n)"
        # Asking for a binary answer takes the protocol that refuses more than one statement: one
        # that closes our bracket and the read-only transaction could do anything behind it.
        cursor = self.connection.execute(
            f"SELECT * FROM {base} AS q LIMIT 0", parameters, binary=True
        )
        types = self.connection.adapters.types
        columns: dict[str, Column] = {}
        for entry in cursor.description or ():
            if entry.name in columns:
                raise DatabaseError(
                    f"The query gives two columns the name {entry.name!r}; tell them apart with AS."
                )
            info = types.get(entry.type_code)
            columns[entry.name] = Column(entry.name, _kind(info.name if info else "", True))
        return Table(columns, (), base)

    def rows(self, sql: str, parameters: Any, fetch_size: int) -> Iterator[tuple[Any, ...]]:
        """A cursor on the server: it sends `fetch_size` rows when they are asked for."""
        from psycopg.rows import tuple_row

        name = f"lazy_{os.getpid()}_{next(_cursor_numbers)}"
        cursor = self.connection.cursor(name, row_factory=tuple_row)
        try:
            cursor.execute(sql, parameters)
        except BaseException:
            cursor.close()
            raise
        return chunked(cursor, fetch_size)


def _kind(type_name: str, steady: bool) -> str:
    kinds = {
        "int2": "integer", "int4": "integer", "int8": "integer", "float4": "real",
        "float8": "float",
        "numeric": "decimal", "bool": "bool", "json": "json", "jsonb": "json",
    }  # fmt: skip
    if type_name in ("text", "varchar"):
        return "text" if steady else "other"
    return kinds.get(type_name, "other")


def _open_postgres(dsn: str) -> Any:
    psycopg = postgres_driver()
    try:
        connection = psycopg.connect(dsn, connect_timeout=CONNECT_SECONDS)
    except psycopg.OperationalError as error:
        parts = urlsplit(dsn)
        place = f"{parts.hostname or 'localhost'}/{parts.path.lstrip('/')}"
        raise DatabaseError(f"PostgreSQL at {place} cannot be reached.") from error
    connection.read_only = True
    return connection


def postgres_driver() -> Any:
    """The package psycopg; raises DatabaseError, which says how to install it."""
    try:
        import psycopg
    except ImportError as error:
        raise DatabaseError(
            "Reading from PostgreSQL needs psycopg: pip install -r requirements-services.txt"
        ) from error
    return psycopg


# --- what `connection=` may be ----------------------------------------------------------------


def open_session(connection: Any) -> Session:
    """A session on a path, a DSN, a factory's connection, or an open connection."""
    if connection is None:
        connection = os.environ.get("DATABASE_URL") or BUNDLED
    if isinstance(connection, str | os.PathLike):
        opened = _open_named(connection)
        return _session_on(opened, opened.close)
    if hasattr(type(connection), "cursor"):
        return _borrowed(connection)
    if not callable(connection):
        raise _no_connection(connection)
    made = connection()
    if hasattr(type(made), "cursor"):
        session = _session_on(made, lambda: made.close())
        _only_read(session)
        return session
    if not hasattr(type(made), "__enter__"):
        raise _no_connection(made)
    entered = made.__enter__()  # such as pool.connection()

    def leave() -> None:
        with contextlib.suppress(Exception):  # a connection that broke cannot be rolled back
            entered.rollback()
        made.__exit__(None, None, None)

    session = _session_on(entered, leave)
    _only_read(session)
    return session


def _open_named(name: str | os.PathLike[str]) -> Any:
    if isinstance(name, str):
        if name.startswith(("postgresql:", "postgres:")) or (
            "dbname=" in name and not Path(name).exists()
        ):
            return _open_postgres(name)
        if name.startswith("sqlite:"):
            # sqlite:///relative, sqlite:////absolute, sqlite:relative
            name = unquote(name.removeprefix("sqlite:"))
            name = name.removeprefix("///") if name.startswith("///") else name
    return open_sqlite(name)


def _session_on(connection: Any, give_back: Callable[[], None]) -> Session:
    if isinstance(connection, sqlite3.Connection):
        return SqliteSession(connection, give_back)
    is_async = hasattr(type(connection), "__aenter__")
    if type(connection).__module__.partition(".")[0] == "psycopg" and not is_async:
        return PostgresSession(connection, give_back)
    raise _no_connection(connection)


def _no_connection(found: Any) -> TypeError:
    return TypeError(
        "connection= is a path, a DSN, an open connection of sqlite3 or psycopg (not an async "
        f"one), or a function that opens one; {type(found).__name__} is none of these."
    )


def _only_read(session: Session) -> None:
    if isinstance(session, PostgresSession) and session.connection.info.transaction_status == 0:
        session.connection.autocommit = False
        session.connection.execute("SET TRANSACTION READ ONLY")


def _borrowed(connection: Any) -> Session:
    """An open connection stays open, in the state in which it came."""
    session = _session_on(connection, lambda: None)
    if isinstance(session, PostgresSession):
        if connection.autocommit:  # a cursor on the server lives in a transaction
            transaction = connection.transaction()
            transaction.__enter__()
            session.give_back = lambda: transaction.__exit__(None, None, None)
            connection.execute("SET TRANSACTION READ ONLY")
        elif connection.info.transaction_status == 0:  # idle: the transaction is ours to end
            session.give_back = connection.rollback
            connection.execute("SET TRANSACTION READ ONLY")
    return session


def describe_connection(connection: Any) -> str:
    """What is connected to, without its secrets."""
    if connection is None:
        connection = os.environ.get("DATABASE_URL") or BUNDLED
    if isinstance(connection, str | os.PathLike):
        text = str(connection)
        if "://" in text and not text.startswith("sqlite"):
            parts = urlsplit(text)
            return f"{parts.scheme}://{parts.hostname or 'localhost'}{parts.path}"
        return Path(text).name if "dbname=" not in text else "PostgreSQL"
    return (
        f"an open {type(connection).__module__.partition('.')[0]} connection"
        if hasattr(type(connection), "cursor")
        else "a connection factory"
    )
