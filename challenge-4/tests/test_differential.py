"""Generated chains give what a naive implementation gives: values, order, errors and pulls."""

import operator
from typing import Any

import naive
import pytest
from generated import HealthCheck, given, settings, st

import compiler
from lazy import LazyCollection
from utils import it

pytestmark = pytest.mark.unit


@pytest.fixture(params=["inlined", "called", "taking turns"])
def execution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Functions written into the loop; functions called; segments that do not nest."""
    monkeypatch.setenv("LAZY_INLINE", "0" if request.param == "called" else "1")
    if request.param == "taking turns":
        monkeypatch.setattr(compiler, "MAX_NESTED", 0)
    return str(request.param)


def stopping(value: Any) -> Any:
    if value == 7:
        raise StopIteration
    return value


def failing_late(value: int) -> Any:
    yield value
    if value % 3 == 0:
        raise ValueError("late")
    yield value + 1


FUNCTIONS: list[Any] = [
    lambda x: x + 1,
    lambda x: x * 3 % 11,
    lambda x: 12 // (x % 5),
    lambda x: -x,
    lambda x: x,
    lambda x: (x, x),
    lambda x: x[0],
    lambda x: str(x),
    lambda x: 7,
    abs,
    stopping,
    it + 1,
    it * 2 - 3,
    it % 4,
]
PREDICATES: list[Any] = [
    lambda x: x % 2 == 0,
    lambda x: x % 3 != 0,
    lambda x: x < 5,
    lambda x: x,
    lambda x: x in (1, 2, 3, 8),
    lambda x: not x,
    lambda x: 12 // x > 2,
    stopping,
    it > 3,
    (it % 2 == 0) & (it < 9),
    ~(it == 4) | it.is_null(),
    it.is_in([1, 2, 3, None]),
    (it + 1) / it > 1,
]
FLAT: list[Any] = [
    lambda x: (x, x + 1),
    lambda x: range(x % 4),
    lambda x: [],
    lambda x: [12 // (x % 5)],
    failing_late,
    lambda x: (12 // (y % 5) for y in (x, x + 1, x + 2)),
]
KEYS: list[Any] = [None, lambda x: x % 3, it % 2]
ERRORS: list[Any] = [
    (ZeroDivisionError,), (TypeError,), (ValueError, TypeError), (Exception,), (StopIteration,),
]  # fmt: skip
REPLACEMENTS: list[Any] = [..., 0, None, 5, lambda error: 8]
SMALL = st.integers(0, 6)
POSITIVE = st.integers(1, 5)


def op(name: str, *arguments: Any) -> Any:
    return st.tuples(st.just(name), *arguments)


WINDOW = st.one_of(
    op("take", st.integers(0, 12)),
    op("skip", SMALL),
    st.tuples(st.just("slice"), SMALL, POSITIVE, POSITIVE).map(
        lambda o: (o[0], o[1], o[1] + o[2] * o[3], o[3])
    ),
)
OPS = st.lists(
    st.one_of(
        op("map", st.sampled_from(FUNCTIONS)),
        op("map", st.sampled_from(FUNCTIONS)),
        op("filter", st.sampled_from(PREDICATES)),
        op("filter", st.sampled_from(PREDICATES)),
        op("flat_map", st.sampled_from(FLAT)),
        op("tap", st.sampled_from(FUNCTIONS)),
        WINDOW,
        WINDOW,
        WINDOW,
        op("take_while", st.sampled_from(PREDICATES)),
        op("skip_while", st.sampled_from(PREDICATES)),
        op("distinct", st.sampled_from(KEYS)),
        op("enumerate", SMALL),
        op("scan", st.just(operator.add), st.just(0)),
        op("batch", POSITIVE),
        op("window", POSITIVE, POSITIVE),
        op("zip", st.just([1, 2, 3, 4, 5])),
        op("concat", st.just([3, 4])),
        op("sort"),
        op("catch", st.sampled_from(ERRORS), st.sampled_from(REPLACEMENTS)),
        op("catch", st.sampled_from(ERRORS), st.sampled_from(REPLACEMENTS)),
    ),
    max_size=9,
)


class Source:
    def __init__(self, elements: list[int], fails: bool) -> None:
        self.elements, self.fails, self.pulls = elements, fails, 0

    def __iter__(self) -> Any:
        for element in self.elements:
            self.pulls += 1
            yield element
        self.pulls += 1
        if self.fails:
            raise KeyError("source")


def chain(base: LazyCollection[Any], ops: list[tuple[Any, ...]]) -> LazyCollection[Any]:
    for name, *arguments in ops:
        if name == "catch":
            errors, replace = arguments
            given = {} if replace is ... else {"replace": replace}
            base = base.catch(*errors, **given)
        else:
            base = getattr(base, name)(*arguments)
    return base


def outcome(collection: LazyCollection[Any]) -> tuple[list[Any], str]:
    out: list[Any] = []
    try:
        for value in collection:
            out.append(value)  # noqa: PERF402  (what came before an error counts)
    except Exception as error:  # noqa: BLE001
        return out, told(error)
    return out, ""


def gathered(collection: LazyCollection[Any]) -> list[Any] | str:
    try:
        return collection.collect()
    except Exception as error:  # noqa: BLE001
        return told(error)


def told(error: Exception) -> str:
    stopped = isinstance(error.__cause__, StopIteration)
    return "RuntimeError" if stopped else f"{type(error).__name__}: {error}"


@settings(
    max_examples=1200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(elements=st.lists(st.integers(0, 20), max_size=12), ops=OPS, fails=st.booleans())
def test_chains_equal_the_naive_model(
    execution: str, elements: list[int], ops: list[tuple[Any, ...]], fails: bool
) -> None:
    expected_source, source = Source(elements, fails), Source(elements, fails)

    expected = naive.run(expected_source, ops)
    actual = outcome(chain(LazyCollection(source), ops))

    assert actual == expected
    assert source.pulls == expected_source.pulls
    again = Source(elements, fails)  # gathering runs another function than iterating
    assert gathered(chain(LazyCollection(again), ops)) == (expected[1] or expected[0])
    assert again.pulls == expected_source.pulls
    if not fails:  # lists take another way: by index
        assert outcome(chain(LazyCollection(elements), ops)) == expected
        assert outcome(chain(LazyCollection(tuple(elements)), ops)) == expected


@settings(max_examples=600, deadline=None)
@given(count=st.integers(0, 30), ops=st.lists(WINDOW, max_size=6), fails=st.booleans())
def test_windows_of_windows_read_what_the_naive_model_reads(
    count: int, ops: list[tuple[Any, ...]], fails: bool
) -> None:
    elements = list(range(count))
    expected_source, source = Source(elements, fails), Source(elements, fails)

    expected = naive.run(expected_source, ops)

    assert outcome(chain(LazyCollection(source), ops)) == expected
    assert source.pulls == expected_source.pulls
