"""The tests that CPython has for its own executors, where this Python ships them, on ours.

Left out: what starts an interpreter that imports an executor by its name, and what needs private
attributes of the pool. `test_executor.py` states those promises for ours.
"""

import importlib
import unittest
from typing import Any

import pytest

pytestmark = pytest.mark.integration

SUITES = {  # classes, by the module of `test.test_concurrent_futures` that has them
    "executor": ("ExecutorTest",),
    "test_shutdown": ("ExecutorShutdownTest",),
    "test_wait": ("WaitTests",),
    "test_as_completed": ("AsCompletedTests",),
}
LEFT_OUT = {
    "test_interpreter_shutdown",  # these import an executor by name in another interpreter
    "test_submit_after_interpreter_shutdown",
    "test_hang_gh83386",
    "test_hang_gh94440",
    "test_map_timeout",  # takes five seconds
    "test_cancel_futures",  # wants some to have begun: ours may cancel them all before
}


def executor_of(max_workers: int) -> Any:
    from utils import TaskScheduler

    if max_workers <= 0:
        raise ValueError("max_workers must be greater than 0")
    return TaskScheduler(max_workers, max_tasks=10_000).run().as_executor()


def cases() -> list[Any]:
    try:
        package = importlib.import_module("test.test_concurrent_futures")
        modules = {
            name: importlib.import_module(f"test.test_concurrent_futures.{name}") for name in SUITES
        }
    except ImportError:  # before 3.12 it is one module, and some builds have none
        try:
            package = importlib.import_module("test.test_concurrent_futures")
        except ImportError:
            why = pytest.mark.skip(reason="this Python comes without CPython's own tests")
            return [pytest.param(None, "", marks=why, id="none")]
        modules = dict.fromkeys(SUITES, package)
    found = []
    for name, classes in SUITES.items():
        for mixin in classes:
            tests: Any = getattr(modules[name], mixin)
            found += [
                pytest.param(tests, test, id=f"{mixin}.{test}")
                for test in unittest.TestLoader().getTestCaseNames(tests)
                if test not in LEFT_OUT
            ]
    return found


@pytest.mark.parametrize(("mixin", "name"), cases())
def test_it_behaves_as_the_executors_of_the_standard_library(
    mixin: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Case(mixin, unittest.TestCase):  # type: ignore[misc]
        worker_count = 2

        def setUp(self) -> None:
            self.executor_type = executor_of
            self.executor = executor_of(self.worker_count)

        def tearDown(self) -> None:
            self.executor.shutdown()

    result = unittest.TestResult()
    Case(name).run(result)

    problems = [text for _, text in (*result.failures, *result.errors)]
    assert problems == []
    assert caplog.records == []  # futures log when they are settled twice
    if result.skipped:
        pytest.skip(result.skipped[0][1])
