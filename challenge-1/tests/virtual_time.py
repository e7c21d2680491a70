"""An event loop whose clock jumps to the next timer: an hour of waiting takes no time."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` is virtual, work for threads is done in place, and a dead end raises."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 1000.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        really_select = selector.select

        def select(timeout: float | None = None) -> Any:
            found = really_select(0)
            if not found:
                if timeout is None:
                    raise RuntimeError("everything waits for something that will never happen")
                self._now += self.oversleep(max(timeout, 0))
            return found

        selector.select = select

    def time(self) -> float:
        return self._now

    def oversleep(self, timeout: float) -> float:
        """How long a sleep lasts."""
        return timeout

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> Any:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  (as the executor does)
            future.set_exception(error)
        return future


def run(main: Coroutine[Any, Any, T], loop: Callable[[], VirtualLoop] = VirtualLoop) -> T:
    """Run it in virtual time."""
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(main)


def clock() -> float:
    """The virtual time."""
    return asyncio.get_running_loop().time()
