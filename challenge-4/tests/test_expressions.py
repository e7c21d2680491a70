"""Expressions: written into code or evaluated, they keep the same rules."""

import decimal
import math
import pickle
from typing import Any

import pytest

from expressions import GUARD, Expr, guarded, it, lit, record
from lazy import LazyCollection
from utils import col

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (col("a") > 1, [False, False, False, True, False]),
        (col("a") == 2, [False, False, False, True, False]),
        (col("a") != 2, [True, False, True, False, True]),
        (~(col("a") > 1), [True, True, True, False, True]),
        (col("a") == None, [False] * 5),  # noqa: E711
        (col("a") != None, [False] * 5),  # noqa: E711
        (col("a").is_null(), [False, True, False, False, False]),
        (col("a") == col("a"), [True, False, True, True, False]),
        (col("a") + 1 > 1, [False, False, None, True, False]),
        (1 - col("a") < 0, [False, False, None, True, False]),
        (col("a").is_in([0, None, math.nan, "x"]), [True, False, True, False, False]),
        (col("a").contains("x"), [False, False, True, False, False]),
        (col("a").startswith(""), [False, False, True, False, False]),
        (col("a").lower() == "x", [False, False, True, False, False]),
        ((col("a") > 1) | col("a").is_null(), [False, True, False, True, False]),
        ((col("a") > 1) & (col("a") < 3), [False, False, False, True, False]),
        (2 ** lit(3) if False else -col("a") < 0, [False, False, None, True, False]),
    ],
)
def test_none_and_unlike_types_make_comparisons_false(
    inlining: str, expression: Expr, expected: list[Any]
) -> None:
    for value, wanted in zip([0, None, "x", 2, math.nan], expected, strict=True):
        row = LazyCollection([{"a": value}]).map(expression)
        if wanted is None:  # arithmetic with a text is an error, as in Python
            with pytest.raises(TypeError):
                row.first()
        else:
            assert row.first() is wanted, value


def test_a_field_that_is_missing_is_an_error_unless_there_is_a_default(inlining: str) -> None:
    rows = LazyCollection([{"a": 1}, {}])

    with pytest.raises(KeyError, match="a"):
        rows.filter(col("a") > 0).collect()
    assert rows.filter(col("a", default=None) > 0).count() == 1


def test_mistakes_are_told_at_once() -> None:
    with pytest.raises(TypeError, match=r"& \| ~"):
        bool(col("a") > 1)
    with pytest.raises(TypeError, match="is_in"):
        col("a").is_in("text")
    with pytest.raises(TypeError, match="contains"):
        col("a").contains(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="col"):
        col(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        iter(col("a"))
    with pytest.raises(AttributeError, match="cannot be changed"):
        col("a").op = "b"


def test_deep_expressions_are_evaluated_and_endless_ones_refused() -> None:
    deep = it
    for _ in range(200):
        deep = deep + 1

    assert LazyCollection([0]).map(deep).first() == 200
    with pytest.raises(ValueError, match="300"):
        for _ in range(200):
            deep = deep + 1


def test_expressions_can_be_pickled_and_read() -> None:
    expression = (col("a") * 2 >= lit(3)) & ~col("b").is_in(["x"]) | it["c"].lower().contains("y")

    again = pickle.loads(pickle.dumps(expression))

    assert repr(again) == repr(expression)
    assert repr(expression) == (
        "((((col('a') * 2) >= 3) & ~col('b').is_in(('x',))) | it['c'].lower().contains('y'))"
    )
    assert again.columns() is None
    assert (col("a") + col("b", default=0)).columns() == {"a", "b"}


def test_guarded_functions_and_defaults_have_a_text() -> None:
    assert repr(guarded(abs, col("a", default=1))) == "abs(col('a', default=1))"
    assert guarded(abs, col("a")).evaluate({"a": -1}) == 1
    assert repr(record({"x": it.alias("y")})) == "{'x': it.alias('y')}"
    assert issubclass(TypeError, GUARD)


def test_numbers_of_every_kind_sort_by_value_and_those_that_are_none_last() -> None:
    odd = [
        decimal.Decimal("NaN"),
        "a",
        2.5,
        None,
        decimal.Decimal("sNaN"),
        1,
        decimal.Decimal("1.5"),
    ]

    ordered = LazyCollection(odd).sort(it).collect()

    assert ordered[:4] == [None, 1, decimal.Decimal("1.5"), 2.5]
    assert [str(value) for value in ordered[4:]] == ["NaN", "sNaN", "a"]


def test_a_field_behind_none_is_not_looked_at_and_odd_candidates_compare_with_nothing() -> None:
    odd = col("a").is_in([decimal.Decimal("sNaN"), math.nan, None, 1])
    for expression, row, expected in (
        (col("a") != col("missing"), {"a": None}, False),
        (odd, {"a": 1}, True),
        (odd, {"a": "x"}, False),
    ):
        assert expression.evaluate(row) is expected
        assert LazyCollection([row]).map(expression).first() is expected
