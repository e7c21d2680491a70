"""What CPython's own tests ask of exit stacks, asked of `sequential=True`.

The names are those of `test_contextlib` and `test_contextlib_async`. Where the manager deviates on
purpose the docstring of the test says so:

* an error of `__aexit__` does not replace the one that is being unwound, but becomes its note, and
  its own context is left alone (the six `exit_exception…` tests on chaining);
* an error of entering or leaving surfaces as AcquireError or ReleaseError with the original as its
  cause, because it has to name its resource;
* a manager is used once, and resources cannot be moved to another (`pop_all`).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytestmark = [pytest.mark.unit, pytest.mark.anyio]


class Exit:
    """A context manager made of an exit function, like what `push` takes."""

    def __init__(self, function: Any = lambda *details: None) -> None:
        self.function = function

    async def __aenter__(self) -> "Exit":
        return self

    async def __aexit__(self, *details: Any) -> Any:
        result = self.function(*details)
        return await result if asyncio.iscoroutine(result) else result


def stack(*resources: Any) -> Any:
    from utils import ResourceManager

    return ResourceManager(*resources, sequential=True)


async def test_no_resources() -> None:
    async with stack():
        pass


async def test_callback() -> None:
    called: list[Any] = []
    async with stack(*(Exit(lambda *d, n=n: called.append(n)) for n in range(4))):
        assert called == []
    assert called == [3, 2, 1, 0]


async def test_push() -> None:
    expected = ZeroDivisionError
    seen: list[Any] = []

    def check(kind: Any, error: Any, traceback: Any) -> None:
        seen.append((kind, error is not None, traceback is not None))

    with pytest.raises(ZeroDivisionError):
        async with stack(Exit(check), Exit(check)):
            _ = 1 / 0
    assert seen == [(expected, True, True)] * 2


async def test_enter_context_and_async_context() -> None:
    result: list[Any] = []

    class Plain:
        def __enter__(self) -> str:
            result.append("enter")
            return "value"

        def __exit__(self, *details: Any) -> None:
            result.append("exit")

    manager = stack()
    manager.add(Plain(), "plain")
    async with manager as scope:
        assert scope.plain == "value"
        assert await scope.acquire(Exit(lambda *d: result.append("late")), "late")
        result.append("body")
    assert result == ["enter", "body", "late", "exit"]


async def test_enter_context_errors() -> None:
    class NoExit:
        async def __aenter__(self) -> None: ...

    class NoEnter:
        async def __aexit__(self, *details: Any) -> None: ...

    for wrong in (NoExit(), NoEnter(), object(), None):
        with pytest.raises(TypeError, match="no resource"):
            stack(wrong)


async def test_close() -> None:
    result: list[Any] = []
    async with stack(Exit(lambda *d: result.append("closed"))) as scope:
        await scope.aclose()
        assert result == ["closed"]
    assert result == ["closed"]


async def test_exit_raise() -> None:
    """Deviation: the error of the exit is the cause of the ReleaseError that names it."""
    from utils import ReleaseError

    with pytest.raises(ReleaseError) as caught:
        async with stack(Exit(lambda *details: False), Exit(lambda *details: 1 / 0)):
            pass
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


async def test_exit_suppress() -> None:
    async with stack(Exit(lambda *details: True), Exit(lambda *details: 1 / 0)):
        pass


async def test_exit_exception_traceback() -> None:
    """The error of the body keeps the traceback of its frames."""
    with pytest.raises(ValueError, match="body") as caught:
        async with stack(Exit(lambda *details: None)):
            raise ValueError("body")
    frames = [entry.name for entry in caught.traceback]
    assert frames[0] == "test_exit_exception_traceback"


async def test_exit_exception_chaining() -> None:
    """Deviation: the body's error surfaces with its context untouched; the others are notes."""
    original = IndexError("body")

    def fail(error: Exception) -> Any:
        def exit_with(*details: Any) -> None:
            raise error

        return Exit(exit_with)

    manager = stack(fail(LookupError("outer")), fail(KeyError("middle")), fail(ValueError("inner")))
    with pytest.raises(IndexError) as caught:
        async with manager:
            raise original
    assert caught.value is original
    assert original.__context__ is None
    assert [note for word in ("inner", "middle", "outer") for note in original.__notes__
            if word in note] == original.__notes__  # fmt: skip


async def test_exit_exception_explicit_none_context() -> None:
    """Deviation as above: what the body raised `from None` stays as it was."""
    from utils import ReleaseError

    with pytest.raises(ValueError, match="body") as caught:
        async with stack(Exit(lambda *details: 1 / 0)):
            raise ValueError("body") from None
    assert caught.value.__suppress_context__
    with pytest.raises(ReleaseError):
        async with stack(Exit(lambda *details: 1 / 0)):
            pass


async def test_exit_exception_chaining_suppress() -> None:
    def raising(error: Exception) -> Any:
        def exit_with(*details: Any) -> None:
            raise error

        return exit_with

    async with stack(
        Exit(lambda *details: True),
        Exit(raising(LookupError())),
        Exit(lambda *details: 1 / 0),
        Exit(lambda *details: [].pop()),
    ):
        pass


async def test_exit_exception_non_suppressing() -> None:
    def raise_new(kind: Any, error: Any, traceback: Any) -> None:
        raise RuntimeError from error

    def raise_same(kind: Any, error: Any, traceback: Any) -> None:
        raise error

    for function in (lambda *details: False, raise_same, raise_new):
        with pytest.raises(IndexError):
            async with stack(Exit(function)):
                raise IndexError


async def test_exit_exception_with_existing_context() -> None:
    inner, outer = KeyError("inner"), ValueError("outer")
    outer.__context__ = inner
    with pytest.raises(ValueError, match="outer") as caught:
        async with stack(Exit(lambda *details: 1 / 0)):
            raise outer
    assert caught.value.__context__ is inner


async def test_body_exception_suppress() -> None:
    async with stack(Exit(lambda *details: True)):
        _ = [][1]


async def test_body_exception_suppressed_by_the_inner_is_not_seen_by_the_outer() -> None:
    seen: list[Any] = []
    async with stack(Exit(lambda *details: seen.append(details[0])), Exit(lambda *details: True)):
        _ = [][1]
    assert seen == [None]


async def test_excessive_nesting() -> None:
    async with stack(*(Exit() for _ in range(10_000))):
        pass


async def test_instance_bypass() -> None:
    class Example:
        pass

    instance: Any = Example()
    instance.__aenter__ = instance.__aexit__ = lambda *details: None
    with pytest.raises(TypeError):
        stack(instance)


async def test_dont_reraise_runtime_error() -> None:
    """Deviation: as with all errors of exits, the second one becomes a note of the first."""

    class UniqueError(Exception):
        pass

    @contextlib.asynccontextmanager
    async def second() -> AsyncIterator[int]:
        try:
            yield 1
        except Exception as error:
            raise UniqueError("new exception") from error

    @contextlib.asynccontextmanager
    async def first() -> AsyncIterator[int]:
        yield 1

    with pytest.raises(RuntimeError, match="original") as caught:
        async with stack(second(), first()):
            raise RuntimeError("original")
    assert "new exception" in caught.value.__notes__[0]


async def test_async_exit_exception_chaining_reference() -> None:
    """Deviation: in an exit stack a cancelled body plus an error on close is no cancellation."""

    async def run() -> None:
        async with stack(Exit(lambda *details: 1 / 0)):
            await asyncio.sleep(5)

    task = asyncio.create_task(run())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_enter_failure_unwinds_what_was_entered() -> None:
    """Deviation: the error of entering is the cause of the AcquireError that names it."""
    from utils import AcquireError

    seen: list[Any] = []

    class Fails(Exit):
        async def __aenter__(self) -> Any:
            raise OSError("no")

    manager = stack(Exit(lambda *details: seen.append(details[0])), Fails(), Exit())
    with pytest.raises(AcquireError) as caught:
        async with manager:
            pass
    assert isinstance(caught.value.__cause__, OSError)
    assert seen == [AcquireError]


async def test_needs_come_first_whatever_the_order_of_declaration() -> None:
    from utils import ResourceManager

    entered: list[str] = []
    manager = ResourceManager(sequential=True)
    for name, needs in (("c", ("b",)), ("x", ()), ("b", ("a",)), ("a", ())):
        manager.add(lambda *_, name=name: entered.append(name), name, needs)
    async with manager:
        pass
    assert entered == ["x", "a", "b", "c"]


async def test_deadlines_hold_in_the_callers_own_task() -> None:
    from utils import AcquireTimeout, ReleaseTimeout, ResourceManager

    class Hangs(Exit):
        async def __aenter__(self) -> Any:
            await asyncio.sleep(60)

    left: list[Any] = []
    manager = ResourceManager(
        Exit(lambda *details: left.append(1)), Hangs(), sequential=True, acquire_timeout=0.05
    )
    with pytest.raises(AcquireTimeout):
        async with manager:
            pass
    assert left == [1]
    manager = ResourceManager(
        Exit(lambda *details: left.append(2)), Exit(lambda *details: asyncio.sleep(60)),
        sequential=True, release_timeout=0.05,
    )  # fmt: skip
    with pytest.raises(ReleaseTimeout):
        async with manager:
            pass
    assert left == [1, 2]
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


# --- what CPython asks of task groups, where siblings and parents meet -------------------------


async def test_taskgroup_nested_both_cancelled() -> None:
    from utils import ResourceManager

    log: list[str] = []

    async def run() -> None:
        outer = ResourceManager(Exit(lambda *d: log.append("outer")))
        async with outer, ResourceManager(Exit(lambda *d: log.append("inner"))):
            await asyncio.sleep(60)

    task = asyncio.create_task(run())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["inner", "outer"]


async def test_taskgroup_exit_raising() -> None:
    from utils import ResourceManager

    async def run() -> None:
        async with ResourceManager(Exit(lambda *details: asyncio.sleep(0.05))):
            raise ValueError("body")

    task = asyncio.create_task(run())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert "ValueError: body" in caught.value.__notes__[0]


async def test_taskgroup_keeps_the_cancelling_level() -> None:
    from utils import ResourceManager

    levels: list[int] = []

    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            async with ResourceManager(Exit(lambda *details: asyncio.sleep(0.03))):
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            levels.append(task.cancelling())

    task = asyncio.create_task(run())
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0.01)
    task.cancel()
    await task
    assert levels == [2]


async def test_taskgroup_entered_twice_and_not_entered() -> None:
    from utils import ResourceManager

    manager = ResourceManager()
    assert await manager.__aexit__(None, None, None) is False
    async with manager:
        with pytest.raises(RuntimeError):
            async with manager:
                pass


async def test_taskgroup_inside_a_taskgroup_whose_other_task_fails() -> None:
    from utils import ResourceManager

    log: list[str] = []

    async def fails() -> None:
        await asyncio.sleep(0.01)
        raise KeyError("other")

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(fails())
            async with ResourceManager(Exit(lambda *d: log.append("released"))):
                await asyncio.sleep(60)
    assert log == ["released"]
    assert isinstance(caught.value.exceptions[0], KeyError)
