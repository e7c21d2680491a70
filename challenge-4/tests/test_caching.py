"""cache(): everybody sees the same sequence, and each element was computed once."""

import gc
import itertools
import threading
import traceback
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from lazy import LazyCollection
from utils import CacheFullError, SourceExhaustedError

pytestmark = pytest.mark.unit


def test_it_is_incremental_and_computes_each_element_once(counting: Any) -> None:
    source = counting(range(100))
    computed: list[int] = []
    cached = LazyCollection(source).tap(computed.append).cache()

    assert cached.take(3).collect() == [0, 1, 2]
    assert computed == [0, 1, 2]
    assert cached.take(5).sum() == 10
    assert cached.map(str).count() == cached.count() == 100
    assert computed == list(range(100))
    assert (source.starts, source.closes) == (1, 1)


def test_cache_as_an_argument() -> None:
    cached = LazyCollection((n for n in range(3)), cache=True)

    assert (cached.collect(), cached.collect()) == ([0, 1, 2], [0, 1, 2])


def test_interleaved_iterators_agree() -> None:
    cached = LazyCollection(iter(range(6))).cache()
    a, b = iter(cached), iter(cached.map(lambda n: n * 10))

    seen = [next(a), next(a), next(b), next(a), next(b), next(b), next(b), next(a)]

    assert seen == [0, 1, 0, 2, 10, 20, 30, 3]
    assert list(a) == [4, 5]
    assert list(b) == [40, 50]


def test_threads_agree_and_compute_once() -> None:
    computed: list[int] = []
    lock = threading.Event()

    def slow() -> Iterator[int]:
        for number in range(500):
            if number % 50 == 0:
                lock.wait(0.001)
            computed.append(number)
            yield number

    cached = LazyCollection(slow).cache()
    start, results = threading.Barrier(8), []

    def read(skip: int) -> None:
        start.wait()
        results.append(cached.skip(skip).collect())

    threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert computed == list(range(500))
    assert sorted(results, key=len) == [list(range(n, 500)) for n in range(7, -1, -1)]


def test_an_error_is_kept_and_raised_at_the_same_place() -> None:
    calls: list[int] = []
    cached = LazyCollection([2, 1, 0, 5]).tap(calls.append).map(lambda n: 4 // n).cache()

    for _ in range(3):
        seen = []
        with pytest.raises(ZeroDivisionError) as caught:
            for value in cached:
                seen.append(value)  # noqa: PERF402
        assert seen == [2, 4]
        assert len(caught.value.__notes__) == 1
    assert calls == [2, 1, 0]


def test_an_error_that_is_raised_again_and_again_does_not_grow() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("x")

    cached = LazyCollection(failing).cache()
    frames = []
    for _ in range(20):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            cached.collect()
        frames.append(len(list(traceback.walk_tb(caught.value.__traceback__))))

    assert frames[-1] == frames[1]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_does_not_shorten_it(interrupt: type[BaseException]) -> None:
    computed: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(5):
            if number == 3 and 3 not in computed:
                computed.append(3)
                raise interrupt
            yield number

    cached = LazyCollection(numbers).cache()
    once = LazyCollection(numbers()).cache()
    with pytest.raises(interrupt):
        cached.collect()
    assert cached.collect() == [0, 1, 2, 3, 4]

    computed.clear()
    with pytest.raises(interrupt):
        once.collect()
    with pytest.raises(SourceExhaustedError):
        once.collect()


def test_the_source_is_released_when_complete() -> None:
    class Rows(list[int]):
        pass

    rows = Rows([1, 2, 3])
    alive = weakref.ref(rows)
    cached = LazyCollection(rows).map(lambda n: n + 1).cache()
    del rows

    assert cached.collect() == [2, 3, 4]
    gc.collect()
    assert alive() is None
    assert cached.collect() == [2, 3, 4]
    assert "complete" in repr(cached)
    assert len(cached) == 3


def test_over_the_limit_it_raises_and_never_shortens() -> None:
    cached = LazyCollection(range(5)).cache(max_items=3)

    for _ in range(2):
        seen = []
        with pytest.raises(CacheFullError, match="max_items"):
            for value in cached:
                seen.append(value)  # noqa: PERF402
        assert seen == [0, 1, 2]
    assert LazyCollection(range(3)).cache(max_items=3).collect() == [0, 1, 2]


def test_over_the_limit_it_may_recompute(counting: Any) -> None:
    source = counting(range(6))
    cached = LazyCollection(source).cache(max_items=4, on_overflow="recompute")
    a, b = iter(cached), iter(cached)

    pairs = list(zip(a, b, strict=True))

    assert pairs == [(n, n) for n in range(6)]
    assert cached.collect() == list(range(6))
    assert source.starts == 3
    assert source.closes == 3


def test_over_the_limit_a_generator_cannot_be_recomputed() -> None:
    cached = LazyCollection(iter(range(6))).cache(max_items=2, on_overflow="recompute")

    assert cached.collect() == list(range(6))
    with pytest.raises(SourceExhaustedError):
        cached.collect()


def test_endless_sources_and_early_ends() -> None:
    cached = LazyCollection(itertools.count).cache()

    assert cached.filter(lambda n: n % 7 == 6).take(2).collect() == [6, 13]
    assert cached[5] == 5
    assert cached.skip(3).first() == 3


def test_close_keeps_what_is_there_and_a_generator_is_not_silently_short() -> None:
    cached = LazyCollection(iter(range(6))).cache()
    assert cached.take(2).collect() == [0, 1]

    cached.close()

    assert cached.take(2).collect() == [0, 1]
    with pytest.raises(SourceExhaustedError):
        cached.collect()


def test_it_can_be_read_again_after_close_where_the_source_can() -> None:
    cached = LazyCollection(range(6)).cache()
    cached.take(2).collect()

    cached.close()

    assert cached.collect() == list(range(6))


def test_a_source_that_reads_its_own_cache_fails_instead_of_hanging() -> None:
    def circular() -> Iterator[int]:
        yield from cached

    cached: LazyCollection[int] = LazyCollection(circular).cache()

    with pytest.raises(ValueError, match="already executing"):
        cached.collect()
