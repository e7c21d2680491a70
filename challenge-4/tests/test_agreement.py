"""What is generated agrees: expressions compiled and evaluated, conditions and orders in Python
and in SQL."""

import datetime as dt
import math
import sqlite3
from decimal import Decimal
from typing import Any

import pytest
from generated import HealthCheck, given, settings, st

from expressions import Expr, it, lit, record
from lazy import LazyCollection
from utils import DatabaseLazyCollection, col

pytestmark = pytest.mark.integration

DSN = "postgresql://postgres@127.0.0.1:5432/test"
from_table = DatabaseLazyCollection.from_table
from_query = DatabaseLazyCollection.from_query


# --- expressions, compiled and evaluated ------------------------------------------------------

VALUES = st.one_of(
    st.none(), st.integers(-5, 5), st.sampled_from([0.5, math.nan, math.inf, 2**64, True]),
    st.sampled_from(["", "a", "A%", "b_c"]), st.sampled_from([[1], b"a", (1, 2)]),
)  # fmt: skip
RECORDS = st.fixed_dictionaries({"a": VALUES, "b": VALUES})
LEAVES = st.one_of(
    st.sampled_from([col("a"), col("b"), col("c", default=None), it["a"]]),
    st.builds(lit, VALUES),
)
BINARY = ["add", "sub", "mul", "div", "floordiv", "mod", "eq", "ne", "lt", "le", "gt", "ge", "and",
          "or"]  # fmt: skip


def grow(inner: Any) -> Any:
    return st.one_of(
        st.builds(Expr, st.sampled_from(BINARY), inner, inner),
        st.builds(Expr, st.sampled_from(["not", "is_null", "lower"]), inner),
        st.builds(lambda e, v: e.is_in(v), inner, st.lists(VALUES, max_size=3)),
        st.builds(lambda e, n, t: getattr(e, n)(t), inner,
                  st.sampled_from(["contains", "startswith", "endswith"]),
                  st.sampled_from(["", "a", "%"])),
        st.builds(lambda e: e.alias("x"), inner),
        st.builds(lambda e: record({"f": e}), inner),
    )  # fmt: skip


EXPRESSIONS = st.recursive(LEAVES, grow, max_leaves=6)


def outcome(function: Any) -> tuple[str, str]:
    try:
        return "", repr(function())
    except Exception as error:  # noqa: BLE001
        return type(error).__name__, str(error)


@settings(max_examples=1500, deadline=None)
@given(EXPRESSIONS, RECORDS)
def test_code_and_evaluation_agree(expression: Expr, row: dict[str, Any]) -> None:
    expected = outcome(lambda: expression.evaluate(row))

    mapped = LazyCollection([row]).map(expression)
    kept = LazyCollection([row]).filter(expression)

    assert outcome(mapped.first) == expected
    if not expected[0]:
        assert kept.count() == int(bool(expression.evaluate(row)))


# --- Python and SQL ---------------------------------------------------------------------------


ODD = [
    None, 0, 1, -7, 5, 2**53 + 1, -(2**62), 2**63 - 1, 0.5, -0.0, 5.0, 1e300, math.inf, "", "5",
    "abc", "ABC", "a%c", "a_c", "ä", "Ä", "z\U0001f600", "!", " 5", "10", "a\0b", b"", b"abc",
]  # fmt: skip
LITERALS = [*ODD, True, False, 2**70, math.nan, Decimal("0.5")]
NUMERIC = [v for v in ODD if v is None or isinstance(v, int | float)]
TEXTS = [v for v in ODD if v is None or (isinstance(v, str) and "\0" not in v)]
TEXTUAL = ["", "a", "c", "%", "_", "ABC", "ä", "\U0001f600", "\0"]


def leaves(columns: list[str], literals: list[Any]) -> Any:
    column = st.sampled_from(columns).map(col)
    literal = st.sampled_from(literals).map(lit)
    names = ["eq", "ne", "lt", "le", "gt", "ge"]
    return st.one_of(
        st.builds(Expr, st.sampled_from(names), column, literal),
        st.builds(Expr, st.sampled_from(names), literal, column),
        st.builds(Expr, st.sampled_from(names), column, column),
        st.builds(Expr, st.just("is_null"), column),
        st.builds(lambda c, v: c.is_in(v), column, st.lists(st.sampled_from(literals), max_size=3)),
        st.builds(lambda c, n, t: getattr(c, n)(t), column,
                  st.sampled_from(["contains", "startswith", "endswith"]),
                  st.sampled_from(TEXTUAL)),
    )  # fmt: skip


def conditions(columns: list[str], literals: list[Any]) -> Any:
    return st.recursive(
        leaves(columns, literals),
        lambda inner: st.one_of(
            st.builds(Expr, st.sampled_from(["and", "or"]), inner, inner),
            st.builds(Expr, st.just("not"), inner),
        ),
        max_leaves=4,
    )


@pytest.fixture(scope="module")
def odd_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("odd") / "odd.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE odd (id INTEGER PRIMARY KEY, i INTEGER, r REAL, t TEXT COLLATE NOCASE, "
            "b BLOB, n NUMERIC)"
        )
        connection.executemany(
            "INSERT INTO odd (i, r, t, b, n) VALUES (?, ?, ?, ?, ?)", [(v,) * 5 for v in ODD]
        )
        connection.execute("CREATE VIEW odd_view AS SELECT id, i, r, t, b, n FROM odd")
    connection.close()
    return path


SETTINGS = settings(
    max_examples=600, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@SETTINGS
@given(conditions(["i", "r", "t", "b", "n"], LITERALS), st.sampled_from(["table", "view", "query"]))
def test_sqlite_and_python_agree_on_every_condition(
    odd_sqlite: Any, condition: Expr, how: str
) -> None:
    if how == "query":
        source = from_query("SELECT * FROM odd ORDER BY id", connection=str(odd_sqlite))
    else:
        name = "odd" if how == "table" else "odd_view"
        source = from_table(name, connection=str(odd_sqlite))
    rows = source.collect()

    found = source.filter(condition).map(col("id")).collect()

    assert sorted(found) == [row["id"] for row in rows if condition.evaluate(row)]


@pytest.mark.parametrize("column", ["i", "r", "t", "b", "n"])
@pytest.mark.parametrize("reverse", [False, True])
def test_sqlite_and_python_agree_on_sorting(odd_sqlite: Any, column: str, reverse: bool) -> None:
    table = from_table("odd", connection=str(odd_sqlite))
    expected = LazyCollection(table.collect()).sort(col(column), reverse=reverse)

    assert "op 1" not in table.sort(col(column), reverse=reverse).explain().split("segment")[1]
    assert table.sort(col(column), reverse=reverse).collect() == expected.collect()


@pytest.fixture(scope="module")
def odd_postgres(postgres: Any) -> Any:
    connection, schema = postgres
    connection.execute(
        f"CREATE TABLE {schema}.odd (id serial PRIMARY KEY, i bigint, f float8, d numeric, t text, "
        "v varchar(20), o boolean, r real, c char(5), m timestamptz, k integer)"
    )
    numbers = [v for v in NUMERIC if v is None or not math.isinf(v)] + [math.nan]
    longest = max(len(numbers), len(TEXTS))
    for number in range(longest):
        value = numbers[number % len(numbers)]
        whole = None if value is None or math.isnan(value) or abs(value) > 2**63 - 1 else int(value)
        text = TEXTS[number % len(TEXTS)]
        connection.execute(
            f"INSERT INTO {schema}.odd (i, f, d, t, v, o, r, c, m, k) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (whole, math.inf if number == 9 else value,
             None if value is None else Decimal(value), text, text, (None, True, False)[number % 3],
             0.1 * number, (text or "")[:5], dt.datetime(2026, 1, 1 + number, tzinfo=dt.UTC),
             (None, 5, -3, 0, 2**31 - 1, -(2**31))[number % 6]),
        )  # fmt: skip
    return f"{schema}.odd"


WHOLE = st.recursive(
    st.one_of(
        st.sampled_from(["i", "j", "o", "f"]).map(col),
        st.integers(-7, 7).map(lit),
        st.sampled_from([2**62, -(2**63), 2**63, 10**25, 0, 1.0, True, None]).map(lit),
    ),
    lambda inner: st.builds(
        Expr, st.sampled_from(["add", "sub", "mul", "mod", "floordiv"]), inner, inner
    ),
    max_leaves=5,
)


@SETTINGS
@given(
    st.builds(Expr, st.sampled_from(["eq", "ne", "lt", "le", "gt", "ge"]), WHOLE, WHOLE).flatmap(
        lambda condition: st.sampled_from([condition, ~condition, condition | col("i").is_null()])
    )
)
def test_postgres_and_python_agree_on_whole_numbers(odd_postgres: str, condition: Expr) -> None:
    source = from_table(odd_postgres, connection=connected())
    rows = source.select("id", "i", "f", "o", j="k").collect()

    def wanted() -> list[Any]:
        return [row["id"] for row in rows if condition.evaluate(row)]

    def found() -> list[Any]:
        selected = source.select("id", "i", "f", "o", j="k")
        return selected.filter(condition).map(col("id")).collect()

    assert outcome(found) == outcome(wanted)


def test_arithmetic_of_whole_columns_is_pushed_to_postgres(odd_postgres: str) -> None:
    table = from_table(odd_postgres, connection=DSN)
    pushed = [col("i") % 3 == 1, (col("i") + col("k")) * 2 > 2**64, 7 - col("i") // -2 <= col("k")]
    doubled = col("i")
    for _ in range(6):
        doubled = doubled * doubled
    left = [col("f") + 1 > 2, col("i") / 2 > 1, col("i") % col("k") == 1, col("i") % 0 == 1,
            col("i") + 1.5 > 2, doubled > 1]  # fmt: skip

    for condition in pushed:
        assert table.filter(condition).explain().pushed, condition
    for condition in left:
        assert not table.filter(condition).explain().pushed


@SETTINGS
@given(
    conditions(["i", "f", "d", "t", "v", "o", "r", "c"],
               [v for v in LITERALS if not isinstance(v, bytes)])
)  # fmt: skip
def test_postgres_and_python_agree_on_every_condition(odd_postgres: str, condition: Expr) -> None:
    source = from_table(odd_postgres, connection=connected())
    rows = source.collect()

    found = source.filter(condition).map(col("id")).collect()

    assert found == [row["id"] for row in rows if condition.evaluate(row)], source.filter(
        condition
    ).explain()


_connection: Any = None


def connected() -> Any:
    """One connection for many examples."""
    global _connection
    if _connection is None or _connection.closed:
        import psycopg

        _connection = psycopg.connect(DSN)
    return _connection


@pytest.mark.parametrize("column", ["i", "f", "d", "t", "v", "o"])
@pytest.mark.parametrize("reverse", [False, True])
def test_postgres_and_python_agree_on_sorting(
    odd_postgres: str, column: str, reverse: bool
) -> None:
    table = from_table(odd_postgres, connection=DSN).filter(
        ~col("i").is_null() | col("f").is_null()
    )
    chain = table.sort(col(column), reverse=reverse).map(col("id"))
    expected = LazyCollection(table.collect()).sort(col(column), reverse=reverse).map(col("id"))

    assert " sort(" not in chain.explain().split("segment")[1]
    assert chain.collect() == expected.collect()
