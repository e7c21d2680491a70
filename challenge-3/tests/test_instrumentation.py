"""Counts are exact, and measuring changes nothing else."""

# mypy: disable-error-code="empty-body"

import asyncio
import inspect
import pickle
import random
import sys
import threading
from functools import lru_cache, partialmethod, singledispatchmethod
from typing import Any

import pytest

from instrumentation import Meter
from utils import Contract, PluginBase, Processor, registry

pytestmark = pytest.mark.unit


class Pickled(Processor[int, int], register=False):
    """It can be found by its name."""

    def process(self, data: int) -> int:
        """Add one."""
        return data + 1


def calls(name: str, method: str = "process") -> int:
    return registry.plugin(name).figures()[method].calls


class TestCounts:
    @pytest.mark.load
    def test_eight_threads_count_exactly(self) -> None:
        class P(Processor[int, int]):
            def process(self, data: int) -> int:
                if data % 10 == 0:
                    raise ValueError
                return data

        def work() -> None:
            plugin = P()
            for number in range(100_000):
                try:
                    plugin.process(number)
                except ValueError:
                    continue

        switching = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(switching)

        figures = registry.plugin("P").figures()["process"]
        assert (figures.calls, figures.errors) == (800_000, 80_000)

    def test_no_call_is_missed_while_a_method_is_exchanged(self) -> None:
        class P(Processor[int, int]):
            def process(self, data: int) -> int:
                return data

        stop = threading.Event()
        made = [0] * 4

        def work(number: int) -> None:
            plugin = P()
            while not stop.is_set():
                plugin.process(1)
                made[number] += 1

        switching = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            for _ in range(50):
                P.process = lambda self, data: data  # type: ignore[method-assign]
            stop.set()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(switching)

        assert calls("P") == sum(made)

    def test_a_call_is_counted_once_through_super_and_inheritance(self) -> None:
        class Parent(Processor[int, int]):
            def process(self, data: int) -> int:
                return data + 1

        class Child(Parent):
            def process(self, data: int) -> int:
                return super().process(data) * 2

        class Heir(Child):
            pass

        assert Heir().process(1) == 4
        assert Child().process(1) == 4
        assert [calls(name) for name in ("Parent", "Child", "Heir")] == [0, 1, 1]

    def test_errors_and_cancellations_are_told_apart(self) -> None:
        class P(PluginBase):
            async def process(self, data: float) -> float:
                await asyncio.sleep(data)
                if data == 0:
                    raise ValueError
                return data

        async def run() -> None:
            plugin = P()
            task = asyncio.ensure_future(plugin.process(60))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(
                task, plugin.process(0), plugin.process(0.001), return_exceptions=True
            )

        asyncio.run(run())

        figures = registry.plugin("P").figures()["process"]
        assert (figures.calls, figures.errors, figures.cancellations) == (3, 1, 1)
        assert figures.total_seconds >= 0.01

    def test_async_is_measured_until_it_is_done(self) -> None:
        class P(PluginBase):
            async def process(self, data: float) -> float:
                await asyncio.sleep(data)
                return data

        asyncio.run(P().process(0.05))
        p50 = registry.plugin("P").figures()["process"].p50
        assert p50 is not None
        assert p50 > 0.04

    def test_static_and_class_methods_and_partials_are_counted(self) -> None:
        class K(Contract, attributes="optional"):
            def process(self, data: int) -> int: ...

            @classmethod
            def make(cls, size: int) -> Any: ...

            @staticmethod
            def slug(text: str) -> str: ...

        class P(K):
            def _process(self, step: int, data: int) -> int:
                return data + step

            process = partialmethod(_process, 3)

            @classmethod
            def make(cls, size: int) -> Any:
                return cls

            @staticmethod
            def slug(text: str) -> str:
                return text

        class Q(P):
            @classmethod
            def make(cls, size: int) -> Any:
                return super().make(size)

        assert P().process(1) == 4
        assert P.make(1) is P
        assert Q.make(1) is Q
        assert P().slug("x") == P.slug("x") == "x"
        assert [calls("P", each) for each in ("process", "make", "slug")] == [1, 1, 2]
        assert calls("Q", "make") == 1

    def test_parameters_may_be_called_like_anything(self) -> None:
        class K(Contract, attributes="optional"):
            def run(
                self,
                type: int,
                raw: int,
                /,
                start: int,
                *error: int,
                counts: int = 1,
                **result: int,
            ) -> int: ...

        class P(K):
            def run(
                self,
                type: int,
                raw: int,
                /,
                start: int,
                *error: int,
                counts: int = 5,
                **result: int,
            ) -> int:
                return type + raw + start + sum(error) + counts + sum(result.values())

        assert P().run(1, 2, 3, 4, clock=10) == 25
        assert P().run(1, 2, start=3, counts=0) == 6


class TestNothingElseChanges:
    def test_signature_docstring_and_name_survive(self) -> None:
        assert str(inspect.signature(Pickled.process)) == "(self, data: int) -> int"
        assert Pickled.process.__doc__ == "Add one."
        assert Pickled.process.__qualname__ == "Pickled.process"
        assert Pickled.process.__module__ == __name__
        with pytest.raises(TypeError, match="process"):
            Pickled().process()  # type: ignore[call-arg]

    def test_methods_that_are_no_plain_functions_keep_theirs(self) -> None:
        class P(Processor[int, int]):
            @lru_cache  # noqa: B019  (the class does not outlive the test)
            def process(self, data: int) -> int:
                """Look it up."""
                return data

        class Q(Contract, attributes="none"):
            def f(self, data: Any, /) -> Any: ...

        class D(Q):
            @singledispatchmethod
            def f(self, data: Any, /) -> Any:
                return "anything"

            @f.register
            def _(self, data: int) -> Any:
                return "a number"

        D.f.register(str, lambda _, data: f"a text{data}")  # type: ignore[attr-defined]
        plugin = P()
        assert [plugin.process(1), plugin.process(1)] == [1, 1]
        assert P.process.cache_info().hits == 1
        assert str(inspect.signature(plugin.process)) == "(data: int) -> int"
        assert (P.process.__doc__, P.process.__name__) == ("Look it up.", "process")
        assert P.process.__qualname__.endswith("P.process")
        assert [D().f(None), D().f(1), D().f("")] == ["anything", "a number", "a text"]
        assert (calls("P"), calls("D", "f")) == (2, 3)

    def test_pickling_survives(self) -> None:
        assert pickle.loads(pickle.dumps(Pickled.process)) is Pickled.process
        bound = pickle.loads(pickle.dumps(Pickled().process))
        assert bound(1) == 2

    def test_async_stays_async(self) -> None:
        class P(PluginBase):
            async def process(self, data: int) -> int:
                return data

        assert inspect.iscoroutinefunction(P.process)

    def test_defaults_are_those_of_the_method(self) -> None:
        marker = object()

        class P(PluginBase):
            def process(self, data: Any = marker, *, depth: Any = marker) -> Any:
                return data, depth

        assert P().process() == (marker, marker)
        assert inspect.signature(P.process).parameters["depth"].default is marker


class TestLatencies:
    @pytest.mark.parametrize("shape", ["uniform", "lognormal", "two humps"])
    def test_percentiles_are_within_an_eighth(self, shape: str) -> None:
        chance = random.Random(7)
        draw: Any = {
            "uniform": lambda: chance.uniform(1e3, 1e7),
            "lognormal": lambda: chance.lognormvariate(10, 2),
            "two humps": lambda: chance.gauss(2e3, 100) if chance.random() < 0.9 else 5e8,
        }[shape]
        samples = sorted(max(100, int(draw())) for _ in range(100_000))
        meter = Meter()
        for sample in samples:
            meter.add(sample)

        figures = meter.figures()

        for share, found in ((0.5, figures.p50), (0.95, figures.p95), (0.99, figures.p99)):
            exact = samples[int(share * len(samples)) - 1] / 1e9
            assert found == pytest.approx(exact, rel=0.125)
        assert figures.total_seconds == pytest.approx(sum(samples) / 1e9)

    def test_extremes_have_a_bucket(self) -> None:
        meter = Meter()
        for nanoseconds in (0, 1, 15, 10**9, 10**15):
            meter.add(nanoseconds)
        assert meter.figures().calls == 5
        assert meter.cumulative()[-1] == ("+Inf", 5)
        counts = [count for _, count in meter.cumulative()]
        assert counts == sorted(counts)

    def test_no_call_has_no_percentile(self) -> None:
        assert Meter().figures().p50 is None
