"""The contracts of a chain: when what is read, closed, refused, and what an error says."""

import copy
import io
import itertools
import linecache
import math
import operator
import pickle
import sqlite3
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from compiler import MAX_SHAPES, _functions
from lazy import EmptyCollectionError, LazyCollection
from utils import LazyIterator, Page, SourceExhaustedError, TooManyKeysError, col, it

pytestmark = pytest.mark.unit

Lazy = LazyCollection


def numbers() -> Iterator[int]:
    return iter(range(10))


def fibonacci() -> Iterator[int]:
    a, b = 0, 1
    while True:
        yield a
        a, b = b, a + b


class Spy(Sequence[int]):
    """A sequence that may be indexed, and says so when it is iterated."""

    def __init__(self, size: int) -> None:
        self.size, self.asked = size, list[int]()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if index >= self.size:
            raise IndexError
        self.asked.append(index)
        return index * 10

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("iterated")


class TestBuilding:
    def test_building_calls_no_user_code_and_touches_no_source(self, counting: Any) -> None:
        source = counting(range(5))
        calls: Any = []

        for _ in range(100):
            chain = (
                Lazy(source).map(calls.append).filter(calls.append).flat_map(calls.append)
                .tap(calls.append).distinct(calls.append).scan(calls.append, 0).sort(calls.append)
                .take_while(calls.append).skip_while(calls.append).batch(2).window(2).zip(source)
                .concat(source).catch(ValueError).cache().paginate(2)
            )  # fmt: skip
            repr(chain)
        iter(chain)

        assert (calls, source.starts) == ([], 0)

    def test_chains_off_one_base_do_not_disturb_each_other(self) -> None:
        base = Lazy([1, 2, 3, 4]).filter(lambda n: n > 1)
        left, right = base.map(lambda n: n * 10), base.take(2)

        a, b, c = iter(left), iter(right), iter(base)

        assert [next(a), next(b), next(c), next(a), next(b), next(c)] == [20, 2, 2, 30, 3, 3]
        assert left.collect() == [20, 30, 40]
        assert base.collect() == [2, 3, 4]

    def test_a_collection_has_no_room_for_changes(self) -> None:
        with pytest.raises(AttributeError):
            Lazy([]).colour = "red"  # type: ignore[attr-defined]
        with pytest.raises(AttributeError):
            Lazy([]).ops = ()  # type: ignore[misc]
        assert LazyIterator is LazyCollection

    @pytest.mark.parametrize(
        ("build", "error", "words"),
        [
            (lambda c: c.take(-1), ValueError, ["take", "-1"]),
            (lambda c: c.skip(-3), ValueError, ["skip", "-3"]),
            (lambda c: c.take(2.0), TypeError, ["take", "2.0"]),
            (lambda c: c.take(True), TypeError, ["take", "True"]),
            (lambda c: c.take("3"), TypeError, ["take", "'3'"]),
            (lambda c: c.batch(0), ValueError, ["batch", "0"]),
            (lambda c: c.chunk(-2), ValueError, ["batch", "-2"]),
            (lambda c: c.window(0), ValueError, ["window", "0"]),
            (lambda c: c.window(2, 0), ValueError, ["window", "step"]),
            (lambda c: c.paginate(0), ValueError, ["paginate", "0"]),
            (lambda c: c.paginate(5, 0), ValueError, ["paginate", "page"]),
            (lambda c: c.page(0), ValueError, ["page", "0"]),
            (lambda c: c.page(1, 0), ValueError, ["page", "size"]),
            (lambda c: c.slice(0, 4, 0), ValueError, ["slice", "step"]),
            (lambda c: c.slice(0, 4, -1), ValueError, ["slice", "-1"]),
            (lambda c: c.cache(0), ValueError, ["cache", "0"]),
            (lambda c: c.map(5), TypeError, ["map", "5"]),
            (lambda c: c.filter(None), TypeError, ["filter", "None"]),
            (lambda c: c.enumerate(1.5), TypeError, ["enumerate", "1.5"]),
            (lambda c: c.catch("ValueError"), TypeError, ["catch", "ValueError"]),
            (lambda c: c.catch(KeyboardInterrupt), TypeError, ["catch"]),
            (lambda c: c.select(), ValueError, ["select"]),
            (lambda c: c.select(col("a") + 1), ValueError, ["select", "name"]),
        ],
    )
    def test_bad_numbers_and_functions_fail_at_build_time_naming_op_and_value(
        self, build: Callable[[Any], Any], error: type[Exception], words: list[str]
    ) -> None:
        with pytest.raises(error) as caught:
            build(Lazy(numbers))

        assert all(word in str(caught.value) for word in words), str(caught.value)

    def test_zero_is_a_fine_number_to_take_or_skip(self) -> None:
        source = iter([1, 2])

        assert Lazy(source).take(0).collect() == []
        assert Lazy(source).skip(0).collect() == [1, 2]  # take(0) has not used it up

    def test_what_is_no_source_is_refused_with_the_reason(self) -> None:
        with pytest.raises(TypeError, match="iterable or a function"):
            Lazy(5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="needs 1"):
            Lazy(lambda n: [n])  # type: ignore[arg-type, misc]
        with pytest.raises(TypeError, match="DatabaseLazyCollection"):
            Lazy(sqlite3.connect(":memory:"))  # type: ignore[arg-type]


class TestPulls:
    @pytest.mark.parametrize(
        ("build", "pulls"),
        [
            (lambda c: c.take(3), 3),
            (lambda c: c.take(0), 0),
            (lambda c: c.filter(lambda n: n % 2 == 0).take(3), 5),
            (lambda c: c.take(100).filter(lambda n: n % 2 == 0).take(10), 19),
            (lambda c: c.skip(5).take(2), 7),
            (lambda c: c.slice(0, 10, 3), 10),
            (lambda c: c.slice(0, 9, 3), 7),
            (lambda c: c.slice(0, 4, 2).skip(1), 3),
            (lambda c: c.slice(0, 4, 2).skip(1).slice(0, None, 3), 3),
            (lambda c: c.slice(1, 8, 3).slice(0, 2, 2).skip(0), 2),
            (lambda c: c.batch(10).take(3), 30),
            (lambda c: c.map(str).batch(10).take(3), 30),
            (lambda c: c.window(3).take(2), 4),
            (lambda c: c.flat_map(lambda n: [n] * 5).take(7), 2),
            (lambda c: c.paginate(20).take(2), 41),
            (lambda c: c.paginate(20, 3), 60),
            (lambda c: c.take_while(lambda n: n < 4), 5),
            (lambda c: c.zip("ab"), 3),
            (lambda c: c.distinct(lambda n: n % 3).take(3), 3),
        ],
    )
    def test_never_one_too_many(
        self, inlining: str, counting: Any, build: Callable[[Any], Any], pulls: int
    ) -> None:
        source = counting(range(1000))

        build(Lazy(source)).collect()

        assert source.pulls == pulls
        assert source.closes == source.starts

    @pytest.mark.parametrize(
        ("read", "pulls"),
        [
            (lambda c: c.first(), 1),
            (lambda c: c.is_empty(), 1),
            (lambda c: c[4], 5),
            (lambda c: c[2:6].collect(), 6),
            (lambda c: c.any(lambda n: n == 3), 4),
            (lambda c: c.all(lambda n: n < 3), 4),
            (lambda c: 5 in c, 6),
            (lambda c: c.page(3, 20), 61),
            (lambda c: c.page(1, 1000), 1000),
        ],
    )
    def test_results_stop_early_and_close(
        self, counting: Any, read: Callable[[Any], Any], pulls: int
    ) -> None:
        source = counting(range(1000))

        read(Lazy(source))

        assert (source.pulls, source.closes) == (pulls, 1)

    def test_infinite_sources_work(self) -> None:
        endless = Lazy(fibonacci).filter(lambda n: n % 2 == 0)

        assert endless.take(4).collect() == [0, 2, 8, 34]
        assert endless.paginate(2).map(lambda page: page.items).take(2).collect() == [
            [0, 2],
            [8, 34],
        ]
        assert Lazy(itertools.count).batch(2).first() == [0, 1]
        assert len(repr(endless)) <= 200
        assert 34 in endless

    def test_sequences_are_read_by_index(self) -> None:
        spy = Spy(1_000_000)

        assert Lazy(spy).skip(500_000).take(2).collect() == [5_000_000, 5_000_010]
        assert Lazy(spy)[7] == 70
        assert Lazy(spy)[-1] == 9_999_990
        assert Lazy(spy)[-3:-1].collect() == [9_999_970, 9_999_980]
        assert Lazy(spy).page(3, 2).items == [40, 50]
        assert spy.asked == [500_000, 500_001, 7, 999_999, 999_997, 999_998, 4, 5, 6]

    def test_every_kind_of_sequence_gives_its_slice(self) -> None:
        kinds: list[Any] = [list, tuple, str, range, bytes]
        for kind in kinds:
            whole: Any = (
                range(9) if kind is range else kind("abcdefghi" if kind is str else range(9))
            )
            for bounds in [
                (2, 5),
                (0, 9, 2),
                (3, None),
                (7, 99, 3),
                (-4, -1),
                (-3, None),
                (None, -7),
            ]:
                expected = list(whole)[slice(*bounds)]
                assert Lazy(whole).slice(*bounds).collect() == expected, (kind, bounds)


class TestSpentSources:
    @pytest.mark.parametrize(
        "second",
        [
            lambda c: c.collect(),
            lambda c: c.map(str).count(),
            lambda c: c.first(),
            lambda c: c.is_empty(),
            lambda c: c.take(1).collect(),
        ],
    )
    def test_a_second_reading_raises_with_the_cures(self, second: Callable[[Any], Any]) -> None:
        base = Lazy(n for n in range(5))
        assert base.filter(lambda n: n > 3).collect() == [4]

        with pytest.raises(SourceExhaustedError) as caught:
            second(base)

        message = str(caught.value)
        for words in ("generator", "test_lazy.py", ".cache()", "factory", "list"):
            assert words in message

    def test_a_generator_used_up_elsewhere_is_refused_too(self) -> None:
        generator = (n for n in range(3))
        list(generator)

        with pytest.raises(SourceExhaustedError, match="before it came here"):
            Lazy(generator).collect()

    def test_only_one_of_many_threads_gets_it(self) -> None:
        base = Lazy(iter(range(1000)))
        start, results = threading.Barrier(8), []

        def read() -> None:
            start.wait()
            try:
                results.append(base.count())
            except SourceExhaustedError:
                results.append(-1)

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert sorted(results) == [-1] * 7 + [1000]

    def test_iterables_and_factories_can_be_read_again(self) -> None:
        for source in ([1, 2], range(1, 3), numbers, {1: 0, 2: 0}, lambda: (n for n in (1, 2))):
            base: Any = Lazy(source)
            assert base.collect() == base.collect() != []

    def test_a_spent_other_of_zip_or_concat_raises_too(self) -> None:
        for chain in (Lazy([1]).zip(iter([2])), Lazy([1]).concat(iter([2]))):
            chain.collect()
            with pytest.raises(SourceExhaustedError):
                chain.collect()


class TestClosing:
    def test_an_early_stop_closes_at_once(self, counting: Any) -> None:
        source = counting(range(100))

        for _ in Lazy(source).map(str).batch(3).map(len):
            break

        assert source.closes == 1

    def test_an_error_closes(self, counting: Any) -> None:
        source = counting(range(100))

        with pytest.raises(ZeroDivisionError):
            Lazy(source).map(lambda n: 1 / n).collect()

        assert source.closes == 1

    @pytest.mark.parametrize("end", ["collection", "iterator", "with"])
    def test_close_closes_generators_factories_and_inner_iterators(
        self, counting: Any, end: str
    ) -> None:
        outer, inner, made = counting(range(9)), counting(range(9)), counting(range(9))
        generator = iter(outer)
        chains: list[Any] = [
            Lazy(generator).flat_map(lambda _: iter(inner)),
            Lazy(lambda: iter(made)).map(str).batch(2),
        ]
        for chain in chains:
            iterator = iter(chain)
            next(iterator)
            if end == "iterator":
                iterator.close()
            elif end == "collection":
                chain.close()
            else:
                with chain:
                    pass
        del iterator

        assert (outer.closes, made.closes) == (1, 1)
        assert inner.closes == (1 if end == "iterator" else 0) or end != "iterator"

    def test_closed_generators_do_not_pretend_to_be_empty(self) -> None:
        chain = Lazy(n for n in range(3))
        chain.close()

        with pytest.raises(SourceExhaustedError):
            chain.collect()

    def test_a_file_of_the_caller_stays_open_and_one_of_a_factory_does_not(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "lines").write_text("a\nb\nc\n")
        opened: list[Any] = []

        def factory() -> Any:
            opened.append((tmp_path / "lines").open())
            return opened[-1]

        with (tmp_path / "lines").open() as file:
            assert Lazy(file).first() == "a\n"
            assert not file.closed
        assert Lazy(factory).take(1).collect() == ["a\n"]
        assert opened[0].closed
        text = io.StringIO("x\ny\n")
        assert Lazy(text).map(str.strip).collect() == ["x", "y"]
        assert not text.closed

    def test_zipped_and_appended_sources_are_closed(self, counting: Any) -> None:
        a, b, c = counting(range(9)), counting(range(9)), counting(range(9))

        Lazy(a).zip(b).take(1).collect()
        Lazy([1]).concat(c).take(2).collect()

        assert (a.closes, b.closes, c.closes) == (1, 1, 1)


class TestErrors:
    def test_a_note_names_op_function_place_and_element(self, inlining: str) -> None:
        def risky(value: int) -> float:
            return 1 / value

        chain = Lazy([5, 4, 0, 3]).filter(lambda n: n < 5).map(risky)

        with pytest.raises(ZeroDivisionError) as caught:
            chain.collect()

        (note,) = caught.value.__notes__
        line = risky.__code__.co_firstlineno
        assert "op 2 map(" in note
        assert f"{__file__}:{line}" in note
        assert "source #2" in note
        assert "value 0" in note

    @pytest.mark.parametrize(
        ("build", "words"),
        [
            (lambda c: c.filter(lambda n: n.x), "op 1 filter("),
            (lambda c: c.map(lambda n: n).skip(1).map(lambda n: n.x), "op 3 map("),
            (lambda c: c.take(5).take(4).map(lambda n: n.x), "op 3 map("),
            (lambda c: c.flat_map(lambda n: n.x), "op 1 flat_map("),
            (lambda c: c.flat_map(lambda n: [n]).map(lambda n: n.x), "op 2 map("),
            (lambda c: c.batch(2).map(lambda n: n.x), "op 2 map("),
            (lambda c: c.batch(2).enumerate().map(lambda n: n.x), "op 3 map("),
            (lambda c: c.tap(lambda n: n.x), "op 1 tap("),
            (lambda c: c.distinct(lambda n: n.x), "op 1 distinct("),
            (lambda c: c.scan(lambda a, n: n.x, 0), "op 1 scan("),
            (lambda c: c.take_while(lambda n: n.x), "op 1 take_while("),
            (lambda c: c.sort(lambda n: n.x), "op 1 sort("),
            (lambda c: c.window(2).sort().filter(lambda n: n.x), "op 3 filter("),
            (lambda c: c.map(lambda n: n.x).catch(ValueError), "op 1 map("),
            (
                lambda c: c.map(lambda n: n.x).catch(AttributeError, replace=lambda e: 1 / 0),
                "catch(",
            ),
        ],
    )
    def test_the_right_op_is_blamed(
        self, inlining: str, build: Callable[[Any], Any], words: str
    ) -> None:
        with pytest.raises((AttributeError, ZeroDivisionError)) as caught:
            build(Lazy([1, 2, 3, 4])).collect()

        assert len(caught.value.__notes__) == 1
        assert words in caught.value.__notes__[0]

    def test_terminals_are_blamed_too(self) -> None:
        for end in ("for_each", "group_by", "min", "max", "any", "all"):
            with pytest.raises(ZeroDivisionError) as caught:
                getattr(Lazy([0]), end)(lambda n: 1 / n)
            assert "value 0" in caught.value.__notes__[0]
        with pytest.raises(ZeroDivisionError) as caught:
            Lazy([1.0, 0.0]).reduce(lambda a, n: a / n)
        assert "reduce(" in caught.value.__notes__[0]

    def test_errors_of_the_source_are_not_put_down_to_an_op(self) -> None:
        def failing() -> Iterator[int]:
            yield 1
            raise OSError("disk")

        with pytest.raises(OSError, match="disk") as caught:
            Lazy(failing).map(str).batch(5).map(len).collect()

        assert not hasattr(caught.value, "__notes__")

    def test_long_and_hostile_values_are_shortened(self) -> None:
        class Hostile:
            def __repr__(self) -> str:
                raise RuntimeError

        for value in ("x" * 10**6, Hostile(), list(range(10**5))):
            with pytest.raises(ZeroDivisionError) as caught:
                Lazy([value]).map(lambda _: 1 / 0).collect()
            assert len(caught.value.__notes__[0]) < 500

    def test_the_cause_chain_and_the_generated_line_are_kept(self) -> None:
        def wrapped(value: Any) -> Any:
            try:
                return value.missing
            except AttributeError as error:
                raise ValueError("wrapped") from error

        with pytest.raises(ValueError, match="wrapped") as caught:
            Lazy([1]).map(wrapped).collect()

        assert isinstance(caught.value.__cause__, AttributeError)
        text = "".join(traceback.format_exception(caught.value))
        assert "v = a0(v)" in text
        assert "op 1 map(wrapped" in text or "wrapped (" in text

    @pytest.mark.parametrize("op", ["map", "filter", "flat_map", "tap", "take_while", "distinct",
                                    "skip_while", "sort"])  # fmt: skip
    def test_stop_iteration_from_a_function_never_truncates(self, op: str) -> None:
        def stop(_: int) -> Any:
            raise StopIteration

        for read in (list, Lazy.collect):
            with pytest.raises(RuntimeError) as caught:
                read(getattr(Lazy([1, 2, 3]), op)(stop))

            assert isinstance(caught.value.__cause__, StopIteration)

    def test_stop_iteration_from_around_the_source_never_truncates(self) -> None:
        def stop() -> Any:
            raise StopIteration

        class Closing(list[int]):
            close = staticmethod(stop)

        for factory in (stop, lambda: Closing([1])):
            for read in (list, Lazy.collect):
                with pytest.raises(RuntimeError) as caught:
                    read(Lazy(factory).map(str))

                assert isinstance(caught.value.__cause__, StopIteration)

    @pytest.mark.parametrize("end", ["for_each", "group_by", "min", "max", "any", "all", "reduce"])
    def test_stop_iteration_never_truncates_a_result(self, end: str) -> None:
        def stop(*_: int) -> Any:
            raise StopIteration

        with pytest.raises(RuntimeError):
            getattr(Lazy([1, 2, 3]), end)(stop)

    def test_an_iterator_is_finished_after_an_error(self) -> None:
        iterator = iter(Lazy([0, 1]).map(lambda n: 1 / n))
        with pytest.raises(ZeroDivisionError):
            next(iterator)

        assert list(iterator) == []


class TestCatch:
    def test_it_skips_or_replaces_and_goes_on(self) -> None:
        base = Lazy(["1", "x", "3"]).map(int)

        assert base.catch(ValueError).collect() == [1, 3]
        assert base.catch(ValueError, replace=None).collect() == [1, None, 3]
        assert base.catch(ValueError, replace=lambda e: str(e)[-3:]).collect() == [1, "'x'", 3]
        assert base.catch().sum() == 4

    def test_it_covers_since_the_catch_before_only(self) -> None:
        chain = Lazy([2, 1, 0]).map(lambda n: 1 / n).catch(KeyError).map(str).catch(ValueError)

        with pytest.raises(ZeroDivisionError):
            chain.collect()

    def test_what_fails_before_a_group_is_left_out_of_it(self) -> None:
        base = Lazy(["1", "x", "3", "4"]).map(int)

        assert base.batch(2).catch(ValueError).collect() == [[1, 3], [4]]
        assert base.batch(2).map(sum).catch(ValueError, replace=0).collect() == [1, 7]
        assert base.window(2).catch(ValueError).collect() == [(1, 3), (3, 4)]
        assert base.zip("abc").catch(ValueError).collect() == [(1, "a"), (3, "b"), (4, "c")]
        assert base.concat([9]).catch(ValueError).collect() == [1, 3, 4, 9]
        assert base.sort(reverse=True).catch(ValueError).collect() == [4, 3, 1]
        two = base.batch(2).sort(lambda b: -b[0]).map(lambda b: 6 // (b[0] - 3)).catch()
        assert two.collect() == [6, -3]
        with pytest.raises(ValueError, match="'x'"):  # the first catch is where the second begins
            base.catch(KeyError).batch(2).catch(ValueError).collect()

    def test_what_the_source_or_a_neighbour_took_over_has_no_count_of_its_own(self) -> None:
        chain = Lazy(range(10)).take(5).filter(it > 0).skip(1).skip(1).map(it + 1)

        assert chain.explain(analyze=True).counts == [5, None, 4, 2, None, 2]

    def test_the_elements_that_pass_a_catch_are_counted_once(self) -> None:
        chain = Lazy(["1", "x", "3"]).map(int).batch(2).map(len).catch(ValueError, replace=0)

        assert chain.explain(analyze=True).counts == [3, 2, 2, 2, 2]

    def test_an_error_costs_one_element_also_inside_flat_map(self) -> None:
        chain = Lazy(["1 x 3", "4"]).flat_map(str.split).map(int).catch(ValueError, replace=0)

        assert chain.collect() == [1, 0, 3, 4]

    def test_a_source_error_is_not_caught(self) -> None:
        def failing() -> Iterator[int]:
            yield 1
            raise ValueError

        with pytest.raises(ValueError):  # noqa: PT011
            Lazy(failing).map(str).catch(ValueError).collect()

    def test_thousands_of_caught_errors_are_no_problem(self) -> None:
        assert Lazy(range(50_000)).map(lambda _: 1 / 0).catch(ZeroDivisionError).count() == 0


class TestOps:
    def test_each_op_does_what_it_says(self) -> None:
        base = Lazy([3, 1, 2, 3])

        assert base.enumerate(1).collect() == [(1, 3), (2, 1), (3, 2), (4, 3)]
        assert base.distinct().collect() == [3, 1, 2]
        assert base.distinct(lambda n: n % 2).collect() == [3, 2]
        assert base.batch(3).collect() == [[3, 1, 2], [3]]
        assert base.chunk(2).collect() == [[3, 1], [2, 3]]
        assert base.window(2).collect() == [(3, 1), (1, 2), (2, 3)]
        assert base.window(2, 2).collect() == [(3, 1), (2, 3)]
        assert base.window(5).collect() == []
        assert base.zip("abc", range(9)).collect() == [(3, "a", 0), (1, "b", 1), (2, "c", 2)]
        assert base.concat([7], (8,)).collect() == [3, 1, 2, 3, 7, 8]
        assert base.scan(lambda a, n: a + n, 10).collect() == [13, 14, 16, 19]
        assert base.scan(max).collect() == [3, 3, 3, 3]
        assert base.sort().collect() == [1, 2, 3, 3]
        assert base.sort(lambda n: -n).first() == 3
        assert base.sort(reverse=True).collect() == [3, 3, 2, 1]
        assert base.slice(1, 3).collect() == base[1:3].collect() == [1, 2]
        assert base.slice(2).collect() == [3, 1]
        assert base.skip_while(lambda n: n > 1).collect() == [1, 2, 3]
        assert base.map(it * 2).collect() == [6, 2, 4, 6]
        seen: list[int] = []
        assert base.tap(seen.append).collect() == seen

    def test_distinct_keys_may_be_limited(self) -> None:
        base = Lazy([1, 2, 1, 3])

        assert base.distinct(max_keys=3).collect() == [1, 2, 3]
        assert base.distinct(it % 2, max_keys=2).collect() == [1, 2]
        for chain in (
            base.distinct(max_keys=2),
            base.distinct(lambda n: (n, len("a")), max_keys=2),
        ):
            with pytest.raises(TooManyKeysError, match="more than 2") as caught:
                chain.collect()
            assert "op 1 distinct(" in caught.value.__notes__[0]
            assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        with pytest.raises(ValueError, match="max_keys"):
            base.distinct(max_keys=0)

    def test_elements_pass_through_a_generator_function(self, counting: Any) -> None:
        def pairs(numbers: Iterator[int]) -> Iterator[tuple[int, int]]:
            for number in numbers:
                yield number, next(numbers, 0)

        source = counting(range(9))
        chain = Lazy(source).map(lambda n: n + 1).through(pairs).map(sum)
        assert source.starts == 0
        assert chain.take(2).collect() == [3, 7]
        assert (source.pulls, source.closes) == (4, 1)
        assert Lazy([2, 1]).through(sorted).collect() == [1, 2]
        assert chain.explain(analyze=True).counts == [9, 9, 5, 5]

        def failing(numbers: Iterator[int]) -> Iterator[int]:
            raise KeyError(next(numbers))

        def stopping(numbers: Iterator[int]) -> Iterator[int]:
            raise StopIteration

        with pytest.raises(KeyError) as caught:
            Lazy([1]).through(failing).collect()
        assert "op 1 through(" in caught.value.__notes__[0]
        with pytest.raises(RuntimeError) as stopped:
            Lazy([1]).through(stopping).collect()
        assert "op 1 through(" in stopped.value.__notes__[0]

    def test_an_async_function_is_no_predicate(self) -> None:
        async def passes(_: int) -> bool:
            return False

        with pytest.raises(TypeError, match="async"):
            Lazy([1]).filter(passes)

    def test_strict_batches_and_zips_refuse_a_rest(self) -> None:
        with pytest.raises(ValueError, match="1 element"):
            Lazy([1, 2, 3]).batch(2, strict=True).collect()
        assert Lazy([1, 2]).batch(2, strict=True).collect() == [[1, 2]]
        for others in ([1], [1, 2, 3]):
            with pytest.raises(ValueError, match="strict"):
                Lazy([1, 2]).zip(others, strict=True).collect()
        assert Lazy([1, 2]).zip([3, 4], strict=True).collect() == [(1, 3), (2, 4)]

    def test_records(self) -> None:
        rows = [{"a": 1, "b": "x", "c": None}, {"a": 5, "b": "y", "c": 2}]
        base = Lazy(rows)

        assert base.select("a", col("b")).first() == {"a": 1, "b": "x"}
        assert base.select(col("a").alias("n"), d=col("a") * 2, k=7).last() == {
            "n": 5,
            "d": 10,
            "k": 7,
        }
        assert base.filter(col("c") > 1).map(col("b")).collect() == ["y"]
        assert base.sort(col("c")).map(col("a")).collect() == [1, 5]
        assert base.group_by(col("b")) == {"x": [rows[0]], "y": [rows[1]]}
        assert base.distinct(col("b")).count() == 2

    def test_results(self) -> None:
        base = Lazy([3, 1, 2])

        assert (base.count(), base.sum(), base.min(), base.max()) == (3, 6, 1, 3)
        assert (base.first(), base.last(), base[1], base[-1]) == (3, 2, 1, 2)
        assert base.min(lambda n: -n) == 3
        assert base.max(it % 3) == 2
        assert base.reduce(lambda a, n: a * n) == 6
        assert base.reduce(lambda a, n: a + str(n), "") == "312"
        assert Lazy[int]([]).reduce(lambda a, n: a, None) is None
        assert (base.any(it > 2), base.all(it > 2), base.any(), base.all()) == (
            True,
            False,
            True,
            True,
        )
        assert base.group_by(lambda n: n % 2) == {1: [3, 1], 0: [2]}
        assert (2 in base, 9 in base, math.nan in base) == (True, False, False)
        assert (base.is_empty(), Lazy([]).is_empty(), Lazy([None]).is_empty()) == (
            False,
            True,
            False,
        )
        assert Lazy([0.1] * 10).sum() == sum([0.1] * 10)

    def test_results_of_nothing(self) -> None:
        empty: Lazy[int] = Lazy([])

        assert (empty.collect(), empty.count(), empty.sum(), empty.group_by(str)) == ([], 0, 0, {})
        assert (empty.first(None), empty.last("x"), empty.min(default=0)) == (None, "x", 0)
        assert empty.max(str, default=1) == 1
        ends: list[Any] = [empty.first, empty.last, lambda: empty[0]]
        for end in ends:
            with pytest.raises(IndexError):
                end()
        with pytest.raises(EmptyCollectionError):
            empty.first()
        with pytest.raises(ValueError, match="empty"):
            empty.min()
        with pytest.raises(TypeError, match="reduce"):
            empty.reduce(lambda a, b: a)

    def test_length_and_truth(self) -> None:
        assert len(Lazy([1, 2, 3, 4, 5]).map(str).skip(1).batch(3)) == 2
        with pytest.raises(TypeError, match="count"):
            len(Lazy([1]).filter(str))
        with pytest.raises(TypeError, match="is_empty"):
            bool(Lazy([1]))
        with pytest.raises(ValueError, match="last"):
            Lazy(numbers)[-1]
        with pytest.raises(ValueError, match="slice"):
            Lazy(numbers)[-3:]

    def test_collections_nest_as_sources(self) -> None:
        inner = Lazy([1, 2]).map(lambda n: n + 1)

        assert Lazy(inner).collect() == [2, 3]
        assert Lazy([inner, inner]).flat_map(lambda c: c).collect() == [2, 3, 2, 3]
        assert inner.zip(inner).collect() == [(2, 2), (3, 3)]

    def test_what_was_not_given_is_not_given_in_copies_and_pickles_either(self) -> None:
        totals = Lazy([1, 2, 3]).scan(operator.add)
        caught = Lazy(["1", "x", "3"]).map(int).catch(ValueError)

        def pickled(chain: Any) -> Any:
            return pickle.loads(pickle.dumps(chain))

        again: Callable[[Any], Any]
        for again in (copy.deepcopy, pickled):
            assert again(totals).collect() == [1, 3, 6]
            assert again(caught).collect() == [1, 3]

    def test_sizes_beyond_all_measure_are_fine(self) -> None:
        base = Lazy([1, 2])

        assert base.batch(10**40).collect() == [[1, 2]]
        assert base.window(10**40).collect() == []
        assert base.window(1, 10**40).collect() == [(1,)]
        assert [list(page) for page in base.paginate(10**40)] == [[1, 2]]
        assert base.page(10**40, 10**40).items == []
        assert base.skip(10**40).concat([3]).take(10**40).collect() == [3]

    def test_copies_and_pickles_are_the_same_plan(self) -> None:
        chain = Lazy([1, 2, 3]).filter(it > 1).map(str)

        for again in (copy.copy(chain), pickle.loads(pickle.dumps(chain))):
            assert again.collect() == ["2", "3"]


class TestPages:
    @pytest.mark.parametrize(
        ("length", "number", "items", "has_next"),
        [(0, 1, 0, False), (5, 1, 5, False), (6, 1, 5, True), (10, 2, 5, False), (11, 3, 1, False),
         (10, 3, 0, False), (10, 1, 5, True)],
    )  # fmt: skip
    def test_has_next_is_right_at_the_edges(
        self, length: int, number: int, items: int, has_next: bool
    ) -> None:
        page = Lazy(lambda: iter(range(length))).page(number, 5)

        assert (len(page), page.has_next, page.has_previous) == (items, has_next, number > 1)
        assert (page.total, page.number, page.size) == (None, number, 5)

    def test_a_page_is_a_sequence_and_knows_a_known_total(self) -> None:
        page = Lazy("abcde").map(str.upper).page(2, 2)

        assert (list(page), page[0], page[-1], "C" in page) == (["C", "D"], "C", "D", True)
        assert page.total == 5
        assert Lazy(lambda: iter("abc")).page(1, 2, count=True).total == 3

    def test_paginate_yields_pages_or_one_page_of_elements(self) -> None:
        base = Lazy(range(5))

        pages = base.paginate(2).collect()

        assert all(isinstance(page, Page) for page in pages)
        assert [page.items for page in pages] == [[0, 1], [2, 3], [4]]
        assert [page.has_next for page in pages] == [True, True, False]
        assert [page.number for page in pages] == [1, 2, 3]
        assert [page.has_previous for page in pages] == [False, True, True]
        assert base.paginate(2, 2).collect() == [2, 3]
        assert base.paginate(2, 9).collect() == []
        assert Lazy(range(4)).paginate(2).map(lambda page: page.has_next).collect() == [True, False]
        assert Lazy([]).paginate(3).collect() == []


class TestSize:
    def test_thousands_of_chained_ops_work(self) -> None:
        chain = Lazy(range(3))
        for _ in range(3000):
            chain = chain.map(lambda n: n + 1).filter(lambda n: n >= 0)

        assert chain.collect() == [3000, 3001, 3002]
        assert len(repr(chain)) <= 200
        assert "op 1 map" in chain.explain()

    def test_thousands_of_concats_do_not_nest(self) -> None:
        chain = Lazy[int]([])
        for number in range(5000):
            chain = chain.concat([number])

        assert chain.sum() == sum(range(5000))
        assert chain.take(3).collect() == [0, 1, 2]

    def test_many_nested_loops_and_catches_work(self) -> None:
        chain: Any = Lazy([1])
        for _ in range(60):
            chain = chain.flat_map(lambda n: (n,)).take(5).batch(1).flat_map(lambda n: n).catch()

        assert chain.collect() == [1]

    def test_generated_functions_are_kept_within_bounds(self) -> None:
        for length in range(2 * MAX_SHAPES):
            chain: Any = Lazy([1])
            for bit in f"{length:b}":
                chain = chain.skip(0).map(str) if bit == "1" else chain.tap(str)
            chain.collect()

        assert len(_functions) <= MAX_SHAPES
        kept = [name for name in linecache.cache if name.startswith("<lazy chain")]
        assert len(kept) <= MAX_SHAPES

    def test_plans_of_one_shape_share_their_code(self) -> None:
        Lazy([1]).map(lambda n: n + 1234).collect()
        before = len(_functions)
        Lazy([1]).map(lambda n: n + 5678).collect()

        assert len(_functions) == before

    def test_repr_shows_the_plan_and_evaluates_nothing(self) -> None:
        chain = Lazy(range(10**9)).map(str).filter(it == "5").take(3)

        assert repr(chain) == (
            "LazyCollection(range(0, 1000000000)).map(str).filter((it == '5')).take(3)"
        )
        assert "list of 3" in repr(Lazy(["secret"] * 3))
        assert "secret" not in repr(Lazy(["secret"] * 3))
