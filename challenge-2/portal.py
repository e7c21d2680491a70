"""The bridge of a sync `with`: a private event loop in a thread, and the caller's own thread.

Async resources live in the loop. Blocking context managers are entered and left by the thread that
waits in `drive`, which is the caller's, so they may be bound to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import queue
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, TypeVar, cast

from failures import ResourceClosed
from openings import CallerDesk

T = TypeVar("T")
LOOK_SECONDS = 1.0  # between looks whether the private loop is still there


class Portal(CallerDesk):
    """A private loop in a daemon thread; `outer_loop` says that the caller runs one as well."""

    def __init__(self, *, outer_loop: bool) -> None:
        self.outer_loop = outer_loop
        self.loop = asyncio.new_event_loop()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._local = threading.local()
        self._turn = threading.RLock()
        self._thread = threading.Thread(target=self._work, name="resources", daemon=True)
        self._ctrl_c = CtrlC()
        self.closed = False
        self._thread.start()

    def _work(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            left = asyncio.all_tasks(self.loop)
            for task in left:
                task.cancel()
            if left:
                self.loop.run_until_complete(asyncio.wait(left, timeout=1.0))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def host(self) -> Host:
        """A task of the loop in which one manager starts, acquires and stops."""
        if not self.alive:
            raise _too_late()
        made: queue.SimpleQueue[Host] = queue.SimpleQueue()
        self.loop.call_soon_threadsafe(lambda: made.put(Host(self)))
        return self._answer(made)

    @property
    def alive(self) -> bool:
        """Whether anybody still works here: not after the end, nor in a forked child."""
        return not self.closed and self._thread.is_alive()

    def _answer(self, box: queue.SimpleQueue[T]) -> T:
        while True:
            try:
                return box.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                if not self._thread.is_alive():
                    raise _too_late() from None

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine. Calls of one thread share a context: transactions last."""
        if not self.alive:
            work.close()
            raise _too_late()
        context = getattr(self._local, "context", None)
        if context is None:
            context = self._local.context = contextvars.copy_context()
        box: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        async def settle() -> None:
            try:
                box.put((await work, None))
            except BaseException as error:  # noqa: BLE001  (it is raised in the thread that asked)
                box.put((None, error))

        tasks: list[asyncio.Task[None]] = []

        def begin() -> None:
            task = self.loop.create_task(settle(), context=context)
            task.add_done_callback(lambda _: work.close())  # if it was cancelled before it began
            tasks.append(task)

        try:
            self.loop.call_soon_threadsafe(begin)
        except RuntimeError:  # closed by another thread in this very moment
            work.close()
            raise _too_late() from None
        try:
            result, error = self._answer(box)
        except BaseException:  # Ctrl-C, or the end: what was asked for is not wanted any more
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])
            if not self._thread.is_alive():
                work.close()
            raise
        if error is not None:
            raise error
        return cast("T", result)

    def drive(self, host: Host, command: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Run a command in the host's task, and meanwhile what it asks of this thread."""
        if not self.alive:
            raise _too_late()
        with self._turn:
            outcome: list[tuple[Any, BaseException | None]] = []

            def done(result: Any, error: BaseException | None) -> None:
                outcome.append((result, error))
                self._inbox.put(None)

            def interrupt() -> None:
                if not outcome:
                    self.loop.call_soon_threadsafe(host.interrupt)

            with CtrlC(lambda: self._inbox.put(interrupt)) as self._ctrl_c:
                self.loop.call_soon_threadsafe(host.commands.put_nowait, (command, done))
                while (job := self._answer(self._inbox)) is not None:
                    job()
            result, error = outcome[0]
            if self._ctrl_c.pressed:
                raise KeyboardInterrupt
            if error is not None:
                raise error
            return result

    async def at_the_caller(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Have the driving thread call this."""
        future: asyncio.Future[Any] = self.loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        def job() -> None:
            try:
                with self._ctrl_c.let_through():
                    found = function(*arguments)
            except KeyboardInterrupt:
                self.loop.call_soon_threadsafe(settle, None, KeyboardInterrupt())
            except BaseException as error:  # noqa: BLE001  (it belongs to who asked)
                self.loop.call_soon_threadsafe(settle, None, error)
            else:
                self.loop.call_soon_threadsafe(settle, found, None)

        self._inbox.put(job)
        return await future

    def close(self) -> None:
        """End the loop and its thread."""
        self.closed = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5.0)


class CtrlC:
    """While a thread waits for the private loop, Ctrl-C is noted: raised, it could lose a message.

    The first one is told to `note`, a second one forces the end. A handler of the program's own is
    left alone.
    """

    def __init__(self, note: Callable[[], None] = lambda: None) -> None:
        self._note = note
        self._through = False
        self._ours = False
        self.pressed = False

    def __enter__(self) -> CtrlC:
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, self._handle)
            self._ours = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._through or self.pressed:
            signal.default_int_handler(number, frame)
        self.pressed = True
        self._note()

    @contextlib.contextmanager
    def let_through(self) -> Iterator[None]:
        """What blocks in code of the caller's can be interrupted."""
        self._through = True
        try:
            yield
        finally:
            self._through = False


def _too_late() -> ResourceClosed:
    return ResourceClosed("The manager of this resource is closed, or belongs to another process.")


class Host:
    """One task, alive from the start of a manager to its stop, that runs its commands."""

    def __init__(self, portal: Portal) -> None:
        self.commands: asyncio.Queue[Any] = asyncio.Queue()
        self._portal = portal
        self._busy = False
        self.task = portal.loop.create_task(self._live())

    async def _live(self) -> None:
        task = self.task
        while True:
            try:
                command, done = await self.commands.get()
            except asyncio.CancelledError:  # an interrupt that came too late for its command
                if self._portal.closed:
                    raise
                task.uncancel()
                continue
            if command is None:
                return
            self._busy = True
            try:
                result = await command()
            except BaseException as error:  # noqa: BLE001  (it is raised in the thread that asked)
                done(None, error)
            else:
                done(result, None)
            self._busy = False
            while task.cancelling():
                task.uncancel()

    def interrupt(self) -> None:
        """Cancel the command under way; from the thread of the loop."""
        if self._busy:
            self.task.cancel()

    def end(self) -> None:
        """End the task; from the thread of the loop or not."""
        self.task.get_loop().call_soon_threadsafe(self.commands.put_nowait, (None, None))


class Blocking:
    """A value whose async methods are called without await: each runs in the private loop."""

    def __init__(self, value: Any, portal: Portal) -> None:
        self._value = value
        self._portal = portal

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._value, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            return self._unwrapped(lambda: found(*arguments, **options))

        call.__name__, call.__doc__ = name, found.__doc__
        return call

    def _unwrapped(self, make: Callable[[], Any]) -> Any:
        result = self._portal.call(_in_loop(make))
        if hasattr(type(result), "__aiter__"):
            return BlockingIterator(result, self._portal)
        if hasattr(type(result), "__aenter__"):
            return BlockingContext(result, self._portal)
        if hasattr(type(result), "blocking"):
            return Blocking(result, self._portal)
        return result

    def __repr__(self) -> str:
        return repr(self._value)


async def _in_loop(make: Callable[[], Any]) -> Any:
    made = make()
    if inspect.iscoroutine(made) or isinstance(made, asyncio.Future):
        return await made
    return made


class BlockingContext:
    """An async context manager as a sync one."""

    def __init__(self, manager: Any, portal: Portal) -> None:
        self._manager = manager
        self._portal = portal

    def __enter__(self) -> Any:
        value = self._portal.call(type(self._manager).__aenter__(self._manager))
        return Blocking(value, self._portal) if hasattr(type(value), "blocking") else value

    def __exit__(self, *details: Any) -> bool | None:
        result: bool | None = self._portal.call(
            type(self._manager).__aexit__(self._manager, *details)
        )
        return result


class BlockingIterator:
    """An async iterator as a sync one."""

    def __init__(self, iterator: Any, portal: Portal) -> None:
        self._iterator = iterator
        self._portal = portal

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            value = self._portal.call(self._iterator.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None
        return value

    def close(self) -> None:
        """End it."""
        self._portal.call(self._iterator.aclose())
