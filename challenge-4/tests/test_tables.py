"""SQL sources: the same promises on SQLite and on PostgreSQL, and agreement with Python."""

import contextlib
import datetime as dt
import gc
import math
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from databases import BUNDLED, DatabaseError, describe_connection, is_driver_error
from expressions import it
from lazy import LazyCollection
from utils import DatabaseLazyCollection, Page, col

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).resolve().parent.parent
DSN = "postgresql://postgres@127.0.0.1:5432/test"
ROWS = [
    (number, f"name {number % 7}", number % 5, number * 1.5 if number % 4 else None)
    for number in range(1, 201)
]
Rows = DatabaseLazyCollection
from_table = DatabaseLazyCollection.from_table
from_query = DatabaseLazyCollection.from_query


class Database:
    """A database of the test's own, and what `connection=` says for it."""

    def __init__(self, kind: str, connection: Any, run: Callable[..., Any]) -> None:
        self.kind, self.connection, self.run = kind, connection, run
        self.mark = "?" if kind == "sqlite" else "%s"
        self.own = str(connection).rpartition("=")[2]  # the name of our connections

    def table(self, name: str, columns: str, rows: list[tuple[Any, ...]]) -> Rows:
        quoted = '"' + name.replace('"', '""') + '"'
        self.run(f"CREATE TABLE {quoted} ({columns})")
        if rows:
            marks = ", ".join([self.mark] * len(rows[0]))
            safe = quoted.replace("%", "%%") if self.mark == "%s" else quoted
            self.run(f"INSERT INTO {safe} VALUES ({marks})", rows)
        return from_table(name, connection=self.connection)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        path = tmp_path / "own.sqlite"

        def run(sql: str, rows: Any = None) -> None:
            with sqlite3.connect(path) as connection:
                connection.executemany(sql, rows) if rows else connection.execute(sql)
            connection.close()

        yield Database("sqlite", str(path), run)
        return
    connection, schema = request.getfixturevalue("postgres")
    own = f"{schema}_{uuid.uuid4().hex[:8]}"
    connection.execute(f"CREATE SCHEMA {own}")

    def execute(sql: str, rows: Any = None) -> None:
        connection.execute(f"SET search_path TO {own}")
        with connection.cursor() as cursor:
            cursor.executemany(sql, rows) if rows else cursor.execute(sql)

    yield Database(
        "postgresql", f"{DSN}?options=-csearch_path%3D{own}&application_name={own}", execute
    )
    connection.execute(f"DROP SCHEMA {own} CASCADE")


@pytest.fixture
def items(database: Database) -> Rows:
    columns = "id integer PRIMARY KEY, name text NOT NULL, kind integer NOT NULL, price float8"
    return database.table("items", columns, ROWS)


def as_rows() -> list[dict[str, Any]]:
    return [dict(zip(("id", "name", "kind", "price"), row, strict=True)) for row in ROWS]


class TestPushing:
    def test_rows_are_mappings_in_the_order_of_the_key(self, items: Rows) -> None:
        assert items.collect() == as_rows()
        assert items.first()["name"] == "name 1"
        assert items.count() == len(items.collect()) == 200
        assert isinstance(items.map(lambda row: row["id"]), DatabaseLazyCollection)

    @pytest.mark.parametrize(
        ("build", "left"),
        [
            (lambda c: c.filter(col("price") > 50), 0),
            (lambda c: c.filter((col("kind") == 1) & (col("name") != "name 3")), 0),
            (lambda c: c.filter(~(col("price") < 50) | col("price").is_null()), 0),
            (lambda c: c.filter(col("name").startswith("name")).skip(3).take(5), 0),
            (lambda c: c.take(20).filter(col("kind") == 1), 0),
            (lambda c: c.skip(5).take(20).skip(2).take(50).filter(col("kind") == 1).take(2), 0),
            (lambda c: c.select("id", n=col("name")).filter(col("n") == "name 2"), 0),
            (lambda c: c.map(col("price")), 0),
            (lambda c: c.filter(col("price") > 9).map(col("price")).filter(it < 60), 0),
            (lambda c: c.sort(col("price")).take(7), 0),
            (lambda c: c.sort(col("price"), reverse=True).take(7).sort(col("kind")), 0),
            (lambda c: c.sort(col("name")).sort(col("kind"), reverse=True).skip(3), 0),
            (lambda c: c[5:9], 0),
            (lambda c: c.slice(3, 40, 7), 3),
            (lambda c: c.filter(col("id") / 2 > 30).filter(col("kind") == 1), 2),
            (lambda c: c.filter((col("kind") == 1) & (col("id") / 2 > 30)), 1),
            (lambda c: c.filter(lambda r: r["kind"] == 1).filter(col("id") > 9).take(3), 3),
            (lambda c: c.filter(col("kind") == 1).map(lambda r: r["id"]).filter(it > 30), 2),
            (lambda c: c.select("id", double=col("price") * 2).take(3), 2),
            (lambda c: c.filter(col("name").lower() == "name 1"), 1),
            (lambda c: c.filter(col("kind").is_in([1, 3, None])).batch(3).take(2), 2),
            (lambda c: c.distinct(col("kind")).map(col("kind")), 2),
        ],
    )
    def test_python_and_sql_give_the_same(
        self, items: Rows, build: Callable[[Any], Any], left: int
    ) -> None:
        chain = build(items)
        explanation = chain.explain()

        assert chain.collect() == build(LazyCollection(as_rows())).collect()
        assert chain.count() == build(LazyCollection(as_rows())).count()
        assert explanation.count("\n  op ") == left, explanation

    def test_take_before_filter_becomes_a_sub_select(self, items: Rows) -> None:
        sql = items.take(20).filter(col("kind") == 1).explain().sql or ""

        inner, outer = sql.split(") AS q")
        assert "LIMIT" in inner
        assert '"kind" =' in outer

    def test_only_the_columns_that_are_seen_are_fetched(self, items: Rows) -> None:
        plan = items.filter(col("id") / 2 > 30).map(col("price") * 2).explain()

        assert plan.sql is not None
        assert plan.sql.startswith('SELECT "id", "price" FROM')

    def test_explain_shows_sql_border_and_counts(self, items: Rows) -> None:
        chain = items.filter(col("kind") == 1).map(lambda r: r["id"]).filter(lambda n: n > 50)

        plan = chain.explain(analyze=True)

        assert "WHERE" in (plan.sql or "")
        assert len(plan.pushed) == 1
        assert "pushed into the source: op 1 filter((col('kind') == 1))" in plan
        assert (plan.counts[0], plan.counts[2], plan.counts[3]) == (40, 40, chain.count())
        assert "secret" not in from_table("x", connection="postgresql://u:secret@h/d").__repr__()

    def test_options_of_from_table(self, items: Rows, database: Database) -> None:
        options: dict[str, Any] = {"connection": database.connection}

        assert from_table("items", ["id"], 3, **options).collect() == [
            {"id": 1},
            {"id": 2},
            {"id": 3},
        ]
        ordered = from_table("items", ["id"], order_by=["-kind", "name"], fetch_size=7, **options)
        expected = sorted(ROWS, key=lambda row: (-row[2], row[1], row[0]))
        assert [row["id"] for row in ordered] == [row[0] for row in expected]
        chosen = from_table("items", ["id"], 2, where=col("kind") == 3, **options)
        assert chosen.collect() == [{"id": 3}, {"id": 8}]
        assert chosen.filter(col("id") > 5).collect() == [{"id": 8}]

    def test_queries_are_sources_too(self, items: Rows, database: Database) -> None:
        mark = database.mark
        totals = from_query(
            f"SELECT kind, count(*) AS n, sum(price) AS s FROM items WHERE id > {mark} "
            "GROUP BY kind ORDER BY kind;", [100], connection=database.connection,
        )  # fmt: skip

        assert [row["n"] for row in totals] == [20] * 5
        assert totals.filter(col("kind") > 2).map(col("kind")).collect() == [3, 4]
        keyed = from_query("SELECT * FROM items", connection=database.connection, key="id")
        assert keyed.page(2, 3).items == as_rows()[3:6]


class TestPages:
    def test_cursors_walk_through_everything_once(self, items: Rows) -> None:
        chains: tuple[Any, ...] = (
            items, items.filter(col("kind") != 2), items.sort(col("price")),
            items.sort(col("price"), reverse=True), items.sort(col("name")).filter(col("kind") > 1),
            items.take(50), items.skip(3).take(40).filter(col("kind") == 1),
            items.filter(lambda row: row["id"] % 3 == 0), items.select("name"),
            items.map(lambda row: row["name"]).filter(lambda name: name > "name 2"),
        )  # fmt: skip
        for chain in chains:
            seen: list[Any] = []
            page: Page[Any] = chain.page(1, 13)
            seen += page.items
            while page.has_next:
                assert page.cursor is not None
                page = chain.after(page.cursor).page(1, 13)
                seen += page.items
            assert page.cursor is None
            assert seen == chain.collect()

    def test_a_page_by_number_and_its_cursor(self, items: Rows) -> None:
        page = items.page(3, 20, count=True)

        assert [row["id"] for row in page] == list(range(41, 61))
        assert (page.number, page.size, page.has_next, page.has_previous) == (3, 20, True, True)
        assert page.total == 200
        assert items.after(page.cursor or "").first()["id"] == 61
        assert (items.page(10, 20).has_next, items.page(10, 20).cursor) == (False, None)
        assert items.page(11, 20).items == []
        assert items.paginate(90).map(len).collect() == [90, 90, 20]

    def test_keyset_pages_do_not_count_rows_before_them(self, items: Rows) -> None:
        sql = items.after(items.page(1, 5).cursor or "").explain().sql or ""

        assert "OFFSET" not in sql
        assert ">" in sql

    def test_what_was_not_issued_is_refused(self, items: Rows) -> None:
        cursor = items.page(1, 5).cursor or ""
        sorted_cursor = items.sort(col("name")).page(1, 5).cursor or ""

        # The last character has bits that decoding drops.
        same_bytes = cursor[:-1] + chr(ord(cursor[-1]) + 1)
        for bad in ("", "garbage", cursor[:-4], "A" + cursor[1:], cursor + "AAAA", "ö", "=" * 99,
                    cursor + "=", cursor + "\n", same_bytes):  # fmt: skip
            with pytest.raises(ValueError, match="cursor"):
                items.after(bad)
        with pytest.raises(ValueError, match="order"):
            items.after(sorted_cursor).collect()
        with pytest.raises(ValueError, match="count or group"):
            items.batch(2).after(cursor).collect()
        with pytest.raises(ValueError, match="cursor"):
            from_table("other", connection=items._source.connection).after(cursor)  # type: ignore[attr-defined]

    def test_pages_need_an_order_that_tells_rows_apart(self, database: Database) -> None:
        database.table("plain", "a integer, b text", [(2, "x"), (1, "y"), (1, "x")])
        database.run("CREATE VIEW seen AS SELECT * FROM plain")
        view = from_table("seen", connection=database.connection)

        assert view.count() == 3
        with pytest.raises(ValueError, match="key="):
            view.page(1, 2)
        keyed = from_table("seen", connection=database.connection, key=["a", "b"])
        assert [row["b"] for row in keyed.page(1, 2)] == ["x", "y"]

    def test_nulls_and_ties_in_the_order_are_walked_through(self, database: Database) -> None:
        rows = [(n, None if n % 3 else n % 4) for n in range(40)]
        table = database.table("gaps", "id integer PRIMARY KEY, v integer", rows)
        for order in ("v", "-v"):
            chain = from_table("gaps", connection=database.connection, order_by=order)
            seen = chain.page(1, 7)
            ids = [row["id"] for row in seen]
            while seen.cursor:
                seen = chain.after(seen.cursor).page(1, 7)
                ids += [row["id"] for row in seen]
            assert ids == [row["id"] for row in chain]
            assert sorted(ids) == list(range(40))
        assert table.count() == 40

    @pytest.mark.parametrize(
        ("kind", "values"),
        [
            ("real", [None, 0.1, 0.3, 1e-40, math.nan]),
            ("float8", [None, 0.1, -0.0, 0.0, math.inf, math.nan]),
            ("numeric", [None, Decimal("0.1"), Decimal("0.10"), Decimal("NaN")]),
            ("time", [None, dt.time(1), dt.time(1, 2, 3, 4)]),
            ("interval", [None, dt.timedelta(1), dt.timedelta(-400, microseconds=1)]),
            ("timestamptz", [None, dt.datetime(2026, 1, 1, tzinfo=dt.UTC)]),
            ("date", [None, dt.date(2026, 1, 1), dt.date(2025, 1, 1)]),
            ("bytea", [None, b"", b"a"]),
            ("boolean", [None, True, False]),
        ],
    )
    def test_every_kind_of_value_may_end_a_page(
        self, postgres: Any, kind: str, values: list[Any]
    ) -> None:
        connection, schema = postgres
        name = f"{schema}.ends_{kind}"
        connection.execute(f"CREATE TABLE {name} (id serial PRIMARY KEY, v {kind})")
        with connection.cursor() as cursor:
            rows = [(values[n % len(values)],) for n in range(20)]
            cursor.executemany(f"INSERT INTO {name} (v) VALUES (%s)", rows)
        for order in ("v", "-v"):
            chain = from_table(name, connection=DSN, order_by=order).map(col("id"))
            page = chain.page(1, 3)
            ids = list(page)
            while page.cursor and len(ids) < 40:
                page = chain.after(page.cursor).page(1, 3)
                ids += page
            assert ids == chain.collect()


class TestNames:
    @pytest.mark.parametrize(
        "name",
        ["select", "with space", 'quo"te', "semi; drop table items; --", "percent%s", "ünï", "a.b"],
    )
    def test_any_identifier_is_safe(self, database: Database, name: str) -> None:
        quoted = '"' + name.replace('"', '""') + '"'
        rows = [(1, "x"), (2, "y")]
        table = database.table(name, f"id integer PRIMARY KEY, {quoted} text", rows)

        assert table.filter(col(name) == "y").collect() == [{"id": 2, name: "y"}]
        assert table.sort(col(name), reverse=True).take(1).map(col(name)).collect() == ["y"]
        assert from_table(name, [name], connection=database.connection, order_by=name).count() == 2
        assert table.page(1, 1).has_next

    def test_unknown_names_are_refused_with_those_that_exist(
        self, items: Rows, database: Database
    ) -> None:
        connection = database.connection

        with pytest.raises(DatabaseError, match="nothing"):
            from_table("nothing", connection=connection).collect()
        wrong: list[Any] = [{"order_by": "x; --"}, {"key": 'id" --'}]
        for options in wrong:
            with pytest.raises(ValueError, match="there are: id, name"):
                from_table("items", connection=connection, **options).collect()
        with pytest.raises(KeyError):
            items.filter(col("nope") == 1).collect()
        with pytest.raises(KeyError):
            from_table("items", ["nope"], connection=connection).collect()

    def test_values_are_parameters(self, items: Rows) -> None:
        nasty = "'; DROP TABLE items; --"

        plan = items.filter(col("name") == nasty).explain()

        assert nasty not in (plan.sql or "")
        assert "parameters: 1" in plan
        assert items.filter(col("name") == nasty).collect() == []

    def test_bad_arguments_fail_at_once(self) -> None:
        bad: list[Any] = [{"limit": -1}, {"fetch_size": 0}, {"columns": []}]
        for options in bad:
            with pytest.raises(ValueError, match="from_table"):
                from_table("t", **options)
        worse: list[Any] = [{"columns": "id"}, {"where": lambda r: True}, {"limit": 2.5}]
        for options in worse:
            with pytest.raises(TypeError):
                from_table("t", **options)
        with pytest.raises(TypeError):
            from_query("SELECT 1", "text")


class TestConnections:
    def test_nothing_is_connected_before_the_first_row(self, tmp_path: Path) -> None:
        opened: list[Any] = []

        def factory() -> Any:
            opened.append(sqlite3.connect(BUNDLED, check_same_thread=False))
            return opened[-1]

        chain = from_table("processed_events", connection=factory).filter(col("source") == "app")
        iterator = iter(chain)
        assert opened == []
        next(iterator)
        assert len(opened) == 1
        iterator.close()  # type: ignore[attr-defined]
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            opened[0].execute("SELECT 1")

    @pytest.mark.parametrize("end", ["all", "early", "error", "close", "page", "count", "explain"])
    def test_the_connection_is_given_back_after_every_end(self, end: str) -> None:
        opened: list[Any] = []

        def factory() -> Any:
            opened.append(sqlite3.connect(BUNDLED, check_same_thread=False))
            return opened[-1]

        chain = from_table("processed_events", connection=factory)
        if end == "all":
            chain.collect()
        elif end == "early":
            chain.map(str).batch(3).first()
        elif end == "error":
            with pytest.raises(ZeroDivisionError):
                chain.map(lambda row: 1 / 0).collect()
        elif end == "close":
            iterator = iter(chain)
            next(iterator)
            chain.close()
        elif end == "page":
            chain.page(2, 3)
        elif end == "count":
            chain.count()
        else:
            chain.explain()

        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            opened[0].execute("SELECT 1")

    def test_a_thousand_iterations_leave_no_connection(self, database: Database) -> None:
        database.table("few", "id integer PRIMARY KEY", [(1,), (2,)])
        table = from_table("few", connection=database.connection)
        if database.kind == "postgresql":
            import psycopg
            import psycopg_pool

            with psycopg_pool.ConnectionPool(database.connection, min_size=1, max_size=2) as pool:
                pooled = from_table("few", connection=pool.connection)
                for number in range(1000):
                    assert pooled.take(number % 3).count() == number % 3
                    if number % 50 == 0:
                        with contextlib.suppress(ZeroDivisionError):
                            pooled.map(lambda _: 1 / 0).collect()
                        assert len(table.collect()) == 2
                assert pool.get_stats()["pool_available"] >= 1
                assert pool.get_stats()["requests_waiting"] == 0
            with psycopg.connect(DSN) as connection:
                sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
                left = connection.execute(sql, (database.own,)).fetchone()
            assert left == (0,)
            return
        for _ in range(1000):
            assert table.first() == {"id": 1}
        gc.collect()
        open_files = [
            path for path in Path("/proc/self/fd").iterdir() if "own.sqlite" in _target(path)
        ]
        assert open_files == []

    def test_an_open_connection_stays_open(self, items: Rows, database: Database) -> None:
        if database.kind == "sqlite":
            own: Any = sqlite3.connect(database.connection)
            own.row_factory = sqlite3.Row
        else:
            import psycopg

            own = psycopg.connect(database.connection)
        table = from_table("items", connection=own)

        assert table.filter(col("kind") == 1).take(3).count() == 3
        assert table.collect() == as_rows()
        assert table.page(1, 2).has_next
        assert own.execute("SELECT count(*) FROM items").fetchone()[0] == 200
        if database.kind == "postgresql":
            own.rollback()
            own.autocommit = True
            assert table.count() == len(table.collect()) == 200
            own.execute("CREATE TABLE writable (id integer)")  # it is not left read-only
        own.close()

    @pytest.mark.parametrize(
        "query",
        [
            "SELECT 1) AS q; COMMIT; DELETE FROM items; SELECT * FROM (SELECT 1",
            "SELECT 1) AS q; COMMIT; DELETE FROM items; --",
            "SELECT 1; DELETE FROM items",
            "WITH gone AS (DELETE FROM items RETURNING id) SELECT * FROM gone",
            "DELETE FROM items RETURNING id",
        ],
    )
    def test_a_query_is_one_select(self, items: Rows, database: Database, query: str) -> None:
        source = from_query(query, connection=database.connection)
        for end in (source.collect, source.count, source.explain, lambda: source.page(1, 2)):
            with pytest.raises(Exception) as caught:  # noqa: PT011  (the driver's own)
                end()
            assert is_driver_error(caught.value)
        assert items.count() == len(ROWS)

    @pytest.mark.usefixtures("items")
    def test_queries_are_taken_as_they_are(self, database: Database) -> None:
        def rows(query: str, *params: Any) -> list[Any]:
            return from_query(query, list(params), connection=database.connection).collect()

        assert rows("SELECT 1 AS a -- the last line") == [{"a": 1}]
        assert rows("SELECT 'a%' AS a;") == [{"a": "a%"}]
        escaped = "a%%" if database.kind == "postgresql" else "a%"
        assert rows(f"SELECT '{escaped}' AS a WHERE 1 = {database.mark}", 1) == [{"a": "a%"}]
        if database.kind == "postgresql":
            with pytest.raises(DatabaseError, match="two columns"):
                rows("SELECT 1 AS a, 2 AS a")

    @pytest.mark.parametrize("connection", [5, lambda: None, lambda: 5])
    def test_what_is_no_connection_is_a_sentence(self, connection: Any) -> None:
        with pytest.raises(TypeError, match="connection= is"):
            from_table("items", connection=connection).collect()

    def test_nothing_can_be_written(self, items: Rows, database: Database) -> None:
        for sql in ("DELETE FROM items", "INSERT INTO items VALUES (999, 'x', 1, 1) RETURNING *",
                    "SELECT 1) AS q; DELETE FROM items; --"):  # fmt: skip
            with pytest.raises(
                Exception, match=r"(?i)syntax|one statement|multiple|read-only|near"
            ):
                from_query(sql, connection=database.connection).collect()
        assert items.count() == 200

    def test_the_bundled_file_and_database_url(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.delenv("DATABASE_URL", raising=False)
        events = from_table("processed_events")
        row = events.first()

        assert set(row) == {"event_id", "source", "event_type", "data", "timestamp"}
        assert row["data"]["currency"] in ("EUR", "USD", "CHF")
        assert events.filter(lambda r: (r["data"]["amount"] or 0) > 400).count() > 100
        assert events.map(col("data")["items"]).max() == 9
        assert events.map(col("data")).first() == row["data"]
        with sqlite3.connect(tmp_path / "other.sqlite") as other:
            other.execute("CREATE TABLE processed_events (event_id TEXT, data TEXT)")
            other.execute("INSERT INTO processed_events VALUES ('e', '{\"a\": [1]}')")
        for url in (f"sqlite:///{tmp_path}/other.sqlite", str(tmp_path / "other.sqlite")):
            monkeypatch.setenv("DATABASE_URL", url)
            assert events.collect() == [{"event_id": "e", "data": {"a": [1]}}]

    def test_the_bundled_file_is_what_its_maker_makes(self, tmp_path: Path) -> None:
        made = tmp_path / "made.sqlite"
        subprocess.run([sys.executable, str(FOLDER / "benchmarks" / "make_events.py"), str(made)],
                       check=True)  # fmt: skip

        tables = [
            from_table("processed_events", connection=str(p)).collect() for p in (made, BUNDLED)
        ]
        assert tables[0] == tables[1]

    def test_what_cannot_be_reached_is_a_sentence_without_secrets(self, tmp_path: Path) -> None:
        with pytest.raises(DatabaseError, match=r"no database file missing\.sqlite"):
            from_table("t", connection=tmp_path / "missing.sqlite").first()
        with pytest.raises(DatabaseError) as caught:
            from_table("t", connection="postgresql://me:secret@127.0.0.1:1/db").first()
        assert "secret" not in str(caught.value)
        assert describe_connection("postgresql://me:secret@host/db") == "postgresql://host/db"
        with pytest.raises(TypeError, match="sqlite3 or psycopg"):
            from_table("t", connection=lambda: type("C", (), {"cursor": 1})()).first()

    def test_json_that_is_none_is_an_error(self, tmp_path: Path) -> None:
        with sqlite3.connect(tmp_path / "j.sqlite") as connection:
            connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, j JSON)")
            connection.execute("INSERT INTO t VALUES (1, '[1]'), (2, NULL), (3, 5), (4, 'oops')")
        table = from_table("t", connection=str(tmp_path / "j.sqlite"))

        assert [row["j"] for row in table.take(3)] == [[1], None, 5]
        with pytest.raises(ValueError, match="JSON"):
            table.collect()

    @pytest.mark.parametrize("database", ["postgresql"], indirect=True)
    def test_a_killed_server_is_an_error_and_the_next_reading_works(
        self, database: Database
    ) -> None:
        import psycopg

        table = database.table("many", "id integer PRIMARY KEY", [(n,) for n in range(500)])
        iterator = iter(from_table("many", connection=database.connection, fetch_size=10))
        next(iterator)
        with psycopg.connect(DSN, autocommit=True) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = %s",
                (database.own,),
            )
        with pytest.raises(psycopg.OperationalError):
            list(iterator)
        assert table.count() == 500


def _target(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""
