"""Chains of thousands of operations, of one kind and mixed: results, pulls, closing, notes."""

import operator
import random
from collections.abc import Callable, Iterator
from typing import Any

import naive
import pytest

import compiler
from lazy import MAX_DEPTH, LazyCollection
from utils import DatabaseLazyCollection, SourceExhaustedError, col, it

pytestmark = pytest.mark.unit

MANY = 5000
Lazy = LazyCollection
Chain = LazyCollection[Any]


def plain(chain: Chain, ops: list[tuple[Any, ...]]) -> Chain:
    for name, *arguments in ops:
        chain = getattr(chain, name)(*arguments)
    return chain


def model(values: list[Any], ops: list[tuple[Any, ...]]) -> list[Any]:
    """One operation after the other, so that the model does not nest either."""
    for op in ops:
        values, error = naive.run(values, [op])
        assert not error
    return values


KEEPING: list[list[tuple[Any, ...]]] = [
    [("map", lambda n: n + 1)],
    [("map", abs)],
    [("map", it + 1)],
    [("filter", lambda n: n > 1)],
    [("filter", it > 1)],
    [("flat_map", lambda n: (n,))],
    [("tap", abs)],
    [("take", 4)],
    [("skip", 0)],
    [("skip", 1), ("concat", [9])],
    [("slice", 0, 4, 1)],
    [("take_while", lambda n: n < 10**6)],
    [("skip_while", lambda n: n < 2)],
    [("distinct", None)],
    [("distinct", lambda n: n % 7)],
    [("scan", operator.add, 0)],
    [("concat", [3])],
    [("sort",)],
    [("batch", 1), ("map", operator.itemgetter(0))],
    [("batch", 3), ("flat_map", lambda part: part)],
    [("window", 1, 1), ("map", operator.itemgetter(0))],
    [("window", 2, 1), ("map", operator.itemgetter(1)), ("concat", [5])],
    [("zip", [1, 2, 3, 4]), ("map", operator.itemgetter(0))],
    [("enumerate", 3), ("map", operator.itemgetter(1))],
    [("sort",), ("take", 4), ("concat", [0])],
    [("flat_map", lambda n: (n, n)), ("take", 5)],
]


@pytest.mark.parametrize("number", range(len(KEEPING)))
def test_thousands_of_one_operation_give_what_the_model_gives(number: int) -> None:
    ops = KEEPING[number] * (MANY // len(KEEPING[number]))
    if ops[0] == ("concat", [3]):
        ops = ops[:2000]  # the model copies all of them each time

    chain = plain(Lazy([3, 1, 4, 2]), ops)

    expected = model([3, 1, 4, 2], ops)
    assert chain.collect() == list(chain) == expected
    assert chain.take(1).collect() == expected[:1]
    assert len(repr(chain)) <= 200
    assert chain.explain().startswith("source   list of 4")


@pytest.mark.parametrize(
    ("op", "inner"),
    [
        (("batch", 1), lambda value: value[0]),
        (("window", 1, 1), lambda value: value[0]),
        (("zip", [7]), lambda value: value[0]),
        (("enumerate", 0), lambda value: value[1]),
        (("paginate", 1), lambda value: value.items[0]),
    ],
)
def test_thousands_of_groups_hold_one_another(op: Any, inner: Callable[[Any], Any]) -> None:
    (value,) = plain(Lazy([3]), [op] * MANY).collect()

    for _ in range(MANY):  # comparing would recurse
        value = inner(value)
    assert value == 3


@pytest.mark.parametrize("seed", range(6))
def test_thousands_of_mixed_operations_give_what_the_model_gives(seed: int, inlining: str) -> None:
    chosen = random.Random(seed)
    ops: list[tuple[Any, ...]] = []
    while len(ops) < MANY:
        # Sums of sums would be numbers of a thousand digits.
        ops += [*chosen.choice(KEEPING), ("map", lambda n: n % 1000), ("take", 30)]

    chain = plain(Lazy([3, 1, 4, 2]), ops)

    expected = model([3, 1, 4, 2], ops)
    assert expected
    assert chain.collect() == list(chain) == expected


GROUPS: list[tuple[Any, ...]] = [
    ("window", 1, 1), ("map", operator.itemgetter(0)), ("batch", 1),
    ("flat_map", lambda part: part), ("zip", range(100)), ("map", operator.itemgetter(0)),
    ("concat", [8]),
]  # fmt: skip


def test_what_is_read_is_what_is_needed_and_all_is_closed_at_once(counting: Any) -> None:
    source, other = counting(range(100)), counting(range(100))
    ops = GROUPS * (MANY // len(GROUPS))

    chain = plain(Lazy(source), ops).zip(other)
    chain = plain(chain, [("window", 1, 1), ("map", operator.itemgetter(0))] * 100)

    assert chain.take(2).collect() == [(0, 0), (1, 1)]
    assert (source.pulls, source.closes, other.pulls, other.closes) == (2, 1, 2, 1)
    iterator: Any = iter(chain)
    assert next(iterator) == (0, 0)
    iterator.close()
    assert (source.pulls, source.closes, other.pulls, other.closes) == (3, 2, 3, 2)
    iter(chain)
    assert source.starts == 2


@pytest.mark.parametrize(
    ("op", "pulls"),
    [(("batch", 3), 3), (("window", 3, 2), 3), (("paginate", 3), 4), (("zip", [1]), 1),
     (("sort",), 9), (("concat", [1]), 1)],
)  # fmt: skip
def test_a_group_reads_no_more_than_it_needs(counting: Any, op: Any, pulls: int) -> None:
    source = counting(range(9))

    plain(Lazy(source), [*GROUPS[:4] * 50, op]).first()

    assert (source.pulls, source.closes) == (pulls, 1)


def test_a_segment_that_ends_closes_those_before_it(counting: Any) -> None:
    source = counting(range(100))
    seen: list[int] = []
    first = plain(Lazy(source), GROUPS * 100).take_while(lambda n: n < 2)

    for element in plain(first, [("concat", [7]), *GROUPS] * 100).tap(lambda _: None):
        seen.append(source.closes)
        if element == 7:
            break

    assert seen == [0, 0, 1]
    assert source.pulls == 3


@pytest.mark.parametrize("place", [0, 4, 2500, MANY])
def test_an_error_names_its_operation_and_closes(counting: Any, place: int) -> None:
    source = counting([1, 0, 5])
    ops = GROUPS[:4] * (MANY // 4)
    ops.insert(place, ("map", lambda n: 1 / n))

    with pytest.raises(ZeroDivisionError) as caught:
        plain(Lazy(source), ops).collect()

    assert (source.pulls, source.closes) == (2, 1)
    (note,) = caught.value.__notes__
    assert note.startswith(f"in op {place + 1} map(")
    assert note.endswith("· value 0")


def test_a_spent_source_names_the_place_where_it_was_read() -> None:
    chain = plain(Lazy(iter([1])), GROUPS * 100)
    assert chain.first() == 1

    with pytest.raises(SourceExhaustedError, match=r"was read at .*test_deep_chains\.py:\d+\."):
        chain.first()


def test_errors_in_groups_and_of_sources_come_through(counting: Any) -> None:
    def stop(_: Any) -> Any:
        raise StopIteration

    deep = plain(Lazy([2, 1]), [("window", 1, 1), ("flat_map", lambda group: group)] * 200)

    for stopped in (deep.sort(stop), deep.map(stop), deep.through(stop)):
        with pytest.raises(RuntimeError) as caught:
            plain(stopped, GROUPS * 20).collect()
        assert isinstance(caught.value.__cause__, StopIteration)
    with pytest.raises(ValueError, match="op 401 zip"):
        deep.zip([1], strict=True).sort().collect()
    with pytest.raises(ValueError, match="op 401 zip"):
        deep.zip([1, 2, 3], strict=True).collect()
    assert deep.zip("ab", strict=True).collect() == [(2, "a"), (1, "b")]
    with pytest.raises(ValueError, match="last batch"):
        deep.concat([3]).batch(2, strict=True).collect()


@pytest.mark.parametrize("op", [("map", abs), ("flat_map", lambda n: (n,)), ("tap", abs)])
def test_one_catch_covers_thousands_of_operations(op: tuple[Any, ...]) -> None:
    for place in (0, 999, 1000, MANY - 1):
        ops = [op] * MANY
        ops[place] = ("map", lambda n: 6 // (n - 7))

        chain = plain(Lazy([6, 7, 8]), ops)

        assert chain.catch(ZeroDivisionError).map(abs).collect() == [6, 6]
        with pytest.raises(ZeroDivisionError):
            chain.catch(KeyError).collect()


def test_a_replacement_passes_the_rest_of_what_its_catch_covers() -> None:
    chain = plain(Lazy([1, 0]).map(lambda n: 1 // n), [("map", lambda n: n + 1)] * MANY)
    assert chain.catch(replace=-1).collect() == [MANY + 1, -1]

    loops = plain(Lazy([1, 0]).map(lambda n: 1 // n), [("flat_map", lambda n: (n + 1,))] * 12)
    assert loops.catch(replace=-1).map(it * 2).collect() == [26, -2]
    assert loops.map(it * 1).catch(replace=-1).explain(analyze=True).counts[-1] == 2
    with pytest.raises(ValueError, match="13 flat_map"):
        loops.flat_map(lambda n: (n,)).catch(replace=-1)
    assert loops.catch().flat_map(lambda n: (n,)).catch(replace=-1).collect() == [13]


def test_counts_and_times_of_thousands_of_operations() -> None:
    ops = [("window", 1, 1), ("map", operator.itemgetter(0)), ("batch", 2),
           ("flat_map", lambda part: part)] * 100  # fmt: skip

    explained = plain(Lazy(range(4)), ops).explain(analyze=True)

    assert explained.counts == [4, *[4, 4, 2, 4] * 100]
    assert all(seconds >= 0 for seconds in explained.seconds)


@pytest.mark.parametrize("op", ["cache", "through"])
def test_what_can_only_nest_has_a_limit_that_is_named(op: str) -> None:
    def passing(elements: Iterator[int]) -> Iterator[int]:
        yield from elements

    def add(chain: Chain) -> Chain:
        chain = plain(chain, GROUPS[:4] * 10)
        return chain.cache() if op == "cache" else chain.through(passing)

    chain: Chain = Lazy([1, 2])
    for _ in range(MAX_DEPTH):
        chain = add(chain)
    with pytest.raises(ValueError, match=rf"{op}\(\): {MAX_DEPTH} cache and through"):
        add(chain)

    assert plain(chain, GROUPS[:4] * 100).collect() == [1, 2]
    if op == "cache":  # what is complete reads nothing any more
        assert add(chain).collect() == [1, 2]


def test_sql_takes_as_much_as_a_database_can_and_python_the_rest() -> None:
    events = DatabaseLazyCollection.from_table("processed_events").sort(col("event_id"))
    expected = events.take(10).map(col("event_id")).collect()
    steps: list[Callable[[Any], Any]] = [
        lambda c: c.filter(col("event_id") != ""),
        lambda c: c.filter(col("event_id") != "").take(10),
        lambda c: c.take(10).sort(col("event_id")),
    ]
    for step in steps:
        chain: Any = events
        for _ in range(1500):
            chain = step(chain)
        assert chain.take(10).map(col("event_id")).collect() == expected


def test_only_long_chains_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "relay", lambda stages, _: iter([f"{len(stages)} take turns"]))

    nested = plain(Lazy([1]), [("sort",)] * (compiler.MAX_NESTED - 1))

    assert nested.collect() == [1]
    assert nested.sort().collect() == [f"{compiler.MAX_NESTED + 1} take turns"]
