"""Written into the loop or called: nobody can tell, except by the time it takes."""

import datetime as dt
import decimal
import fractions
import functools
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from inlining import face_of
from lazy import LazyCollection

pytestmark = pytest.mark.unit

LAMBDAS: list[Callable[[Any], Any]] = [
    lambda x: x + 1, lambda x: x - 0.5, lambda x: 2 * x, lambda x: x / 3, lambda x: x // 2,
    lambda x: x % 3, lambda x: x**2, lambda x: x << 1, lambda x: x >> 1, lambda x: x & 3,
    lambda x: x | 4, lambda x: x ^ 1, lambda x: -x, lambda x: +x, lambda x: ~(x + 0),
    lambda x: not x,
    lambda x: x == 1, lambda x: x != 1, lambda x: x < 2, lambda x: x <= 2, lambda x: x > 2,
    lambda x: x >= 2, lambda x: x is None, lambda x: x is not None, lambda x: x in (1, "a", 2.5),
    lambda x: x not in "abc", lambda x: x[0], lambda x: x["k"], lambda x: x[1:2], lambda x: x.real,
    lambda x: x.missing, lambda x: (x, x), lambda x: [x, 1], lambda x: x, lambda x: 5,
    lambda x: None, lambda x: 1e400, lambda x: -0.0, lambda x: x * 1e400,
    lambda x: (x + 1) * (x - 1),
    lambda x: x["k"]["k"], lambda x: 10**20 + x, lambda x: x + "a", lambda x: x is x,
    lambda x: x[0] + x[1] * 2 - 1, lambda x: x + x,
    lambda x: not not x, lambda x: not not (x == 1), lambda x: not (x == 1),  # noqa: SIM201, SIM208
    lambda x: not -x,
]  # fmt: skip
VALUES: list[Any] = [
    0, 1, -7, 2.5, math.inf, math.nan, -0.0, True, None, "a", "abc", [1, 2], (3, 4),
    {"k": {"k": 1}},
    2**70, 3j, fractions.Fraction(1, 3), decimal.Decimal("1.5"), SimpleNamespace(real=1), b"ab",
    dt.date(2026, 1, 1),
]  # fmt: skip


def outcome(function: Callable[[], Any]) -> tuple[Any, ...]:
    try:
        value = function()
    except Exception as error:  # noqa: BLE001
        return type(error), str(error)
    return type(value), repr(value)


@pytest.mark.parametrize("number", range(len(LAMBDAS)))
def test_every_white_listed_lambda_is_inlined_and_means_the_same(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZY_INLINE", "1")
    function = LAMBDAS[number]
    if not (sys.version_info < (3, 12) and number == 28):  # 3.11 builds a slice object
        assert face_of(function) is not None

    for value in VALUES:
        chain = LazyCollection([value]).map(function)
        assert outcome(chain.first) == outcome(functools.partial(function, value))
        test = LazyCollection([value]).filter(function)
        expected = outcome(functools.partial(lambda v: int(bool(function(v))), value))
        assert outcome(test.count) == expected


def test_what_is_not_on_the_list_is_called() -> None:
    free = 3

    def generator(x: int) -> Any:
        yield x

    async def coroutine(x: int) -> int:
        return x

    class Callable_:
        def __call__(self, x: int) -> int:
            return x

    long: Any = eval("lambda x: " + " + ".join(["x"] * 80))
    for function in (
        lambda x: x + free, lambda x: len(x), lambda x: x.strip(), lambda x, y=1: x + y,
        lambda *x: x, lambda: 5, lambda x: x if x else 1, lambda x: x and 1, lambda x: 0 < x < 5,
        lambda x: [x for _ in "a"], lambda x: f"{x}", lambda x: lambda: x,
        generator, coroutine, abs, str, int, Callable_(), Callable_().__call__, long,
    ):  # fmt: skip
        assert face_of(function) is None, function


def test_the_environment_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = LazyCollection([1, 2]).map(lambda n: n + 1)

    monkeypatch.setenv("LAZY_INLINE", "1")
    assert "inlined" in chain.explain()
    monkeypatch.setenv("LAZY_INLINE", "0")
    assert "inlined" not in chain.explain()
    assert chain.collect() == [2, 3]


def test_a_tracer_sees_the_functions_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAZY_INLINE", raising=False)
    seen: list[str] = []
    chain = LazyCollection([1]).map(lambda n: n + 1)
    before = sys.gettrace()

    sys.settrace(lambda frame, *_: seen.append(frame.f_code.co_name))
    try:
        chain.collect()
    finally:
        sys.settrace(before)

    assert "<lambda>" in seen


def test_constants_that_have_no_literal_survive() -> None:
    assert LazyCollection([1.0]).map(lambda x: x * 1e400).first() == math.inf
    assert str(LazyCollection([0.0]).map(lambda x: -0.0).first()) == "-0.0"


def test_equal_looking_constants_are_told_apart() -> None:
    for function, expected in (
        (lambda x: 1, "1"),
        (lambda x: True, "True"),
        (lambda x: 1.0, "1.0"),
    ):
        assert repr(LazyCollection([0]).map(function).first()) == expected


def test_a_function_whose_code_is_exchanged_means_its_new_code() -> None:
    def function(x: int) -> int:
        return x + 1

    chain = LazyCollection([1]).map(function)
    assert chain.collect() == [2]
    function.__code__ = (lambda x: x + 10).__code__
    assert chain.collect() == [11]
