"""A thread of one's own, for what must be opened, used and closed in the same one."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class OwnThread:
    """Runs calls one after the other in one daemon thread, started by the first of them.

    A daemon, so that a call that never returns cannot keep the program from ending.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Queue a call; its result is in the future. RuntimeError after `stop`."""
        if self._stopped:
            raise RuntimeError(f"The thread of {self._name} has been stopped.")
        future: Future[Any] = Future()
        context = contextvars.copy_context()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = context.run(function, *arguments)
            except BaseException as error:  # noqa: BLE001  (it belongs to who asked)
                future.set_exception(error)
            else:
                future.set_result(result)

        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._calls.put(call)
        return future

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a call. Cancelling takes it back only if it has not begun."""
        return await asyncio.wrap_future(self.submit(function, *arguments))

    def stop(self) -> None:
        """End the thread after the calls that are queued; does not wait."""
        if not self._stopped:
            self._stopped = True
            self._calls.put(None)

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # or the last one would keep its arguments alive


def loop_is_running() -> bool:
    """Whether this thread runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
