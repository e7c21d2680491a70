"""What a caller holds of a task: wait for it, await it, cancel it."""

import asyncio
import json
import pickle
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import errors
from errors import DependencyFailed, ResultExpired, SchedulerError
from payloads import load_error
from tasks import COMPLETED, TERMINAL, TaskResult, TaskState

if TYPE_CHECKING:
    from engine import Engine


class Outcome(NamedTuple):
    """How a run of a task ended; what it returned or raised is still bytes."""

    state: str
    value: bytes | None
    error: str | None  # JSON: type, message, and what else is known
    attempts: int
    duration: float
    refusal: BaseException | None = None  # the task does not exist, or will not go on here

    def exception(self) -> BaseException | None:
        """What `result` raises, or None."""
        if self.refusal is not None:
            return self.refusal
        if self.state == COMPLETED:
            if self.value is None:
                return ResultExpired("The task completed, and its result is not kept any more.")
            return None
        return error_of(self.error, self.value)


def error_of(text: str | None, travelled: bytes | None) -> BaseException:
    """The exception that a stored description stands for."""
    description = json.loads(text or '{"type": "SchedulerError", "message": "unknown"}')
    if description["type"] == "DependencyFailed" and "parent" in description:
        return DependencyFailed(description["parent"], description["cause"])
    known = getattr(errors, description["type"], None)
    if travelled is None and isinstance(known, type) and issubclass(known, SchedulerError):
        with suppress(TypeError):
            error: BaseException = known(description["message"])
            return error
    return load_error(description, travelled)


_NOT_LOADED = object()
_making = threading.Lock()


class TaskHandle:
    """A submitted task. All methods are for any thread; `await handle` for any event loop.

    `result` returns what the task returned, or raises what it raised, `TaskCancelled`,
    `TaskTimedOut`, `DependencyFailed` or `WorkerCrashed`.
    """

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_cold",
        "_engine",
        "_outcome",
        "_value",
        "existed",
        "id",
    )

    def __init__(
        self, engine: "Engine", task_id: str, *, cold: bool = False, existed: bool = False
    ) -> None:
        self.id = task_id
        self._engine = engine
        self.existed = existed  # the submit found it there already
        self._cold = cold  # the engine does not remember this handle: it has to be told
        self._outcome: Outcome | None = None
        self._callbacks: list[Callable[[TaskHandle], None]] | None = None
        self._value: Any = _NOT_LOADED

    def __repr__(self) -> str:
        state = self._outcome.state if self._outcome else "unfinished"
        return f"<TaskHandle {self.id} {state}>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "A TaskHandle stays in its process; Result(handle.id) passes what the task returns"
        )

    def done(self) -> bool:
        """Has it ended? Never waits."""
        if self._outcome is None and self._cold:
            return self.status() in TERMINAL
        return self._outcome is not None

    def status(self) -> TaskState:
        """Its state as committed."""
        if self._outcome is not None and self._outcome.refusal is not None:
            raise self._outcome.refusal
        return self._engine.state_of(self.id)

    def cancel(self) -> bool:
        """End it; true exactly when it ends cancelled. Returns once that is decided and stored."""
        return self._engine.cancel(self.id)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for what it returns; TimeoutError when that takes longer than `timeout` seconds."""
        return self._open(self._wait(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for what it raises, or None."""
        return self._wait(timeout).exception()

    def outcome_now(self) -> Outcome:
        """How it ended; it has."""
        assert self._outcome is not None
        return self._outcome

    def outcome(self, timeout: float | None = None) -> TaskResult:
        """Wait for how it ended, without raising."""
        return self._result_of(self._wait(timeout))

    async def wait(self) -> TaskResult:
        """Await how it ended, without raising."""
        return self._result_of(await self._await())

    def __await__(self) -> Generator[Any, None, Any]:
        outcome = yield from self._await().__await__()
        return self._open(outcome)

    def add_done_callback(self, callback: "Callable[[TaskHandle], None]") -> None:
        """Call it once with this handle when the task has ended, at once if it has.

        It runs in the scheduler's thread: keep it short, and do not wait for tasks in it.
        """
        if self._callbacks is None:
            with _making:
                if self._callbacks is None:
                    self._callbacks = []
        self._callbacks.append(callback)
        if self._outcome is not None:
            self._call_back()
        elif self._cold:
            self._engine.watch(self)

    def _drop(self, callback: "Callable[[TaskHandle], None]") -> None:
        """Nobody waits there any more: many short waits for a long task leave nothing behind."""
        assert self._callbacks is not None
        with suppress(ValueError):  # it is being called now
            self._callbacks.remove(callback)
        if self._cold and not self._callbacks:
            self._engine.unwatch(self)

    # --- the engine's side ---

    def awaited(self) -> bool:
        """Is somebody to be told when it ends?"""
        return bool(self._callbacks)

    def resolve(self, outcome: Outcome) -> None:
        """It has ended, and that is stored."""
        if self._outcome is None:
            self._outcome = outcome
            if self._callbacks:
                self._call_back()

    def forget(self) -> bool:
        """The engine drops its job from memory; True if somebody is waiting nevertheless."""
        self._cold = True
        return self.awaited()

    def _call_back(self) -> None:
        # Both sides come here after they did their part; `pop` gives each callback to one of them.
        assert self._callbacks is not None
        while self._callbacks:
            try:
                callback = self._callbacks.pop(0)
            except IndexError:
                return
            self._engine.call_back(callback, self)

    # --- waiting ---

    def _wait(self, timeout: float | None) -> Outcome:
        if self._outcome is None:
            self._engine.check_may_wait()
            lock = threading.Lock()
            lock.acquire()

            def callback(_: TaskHandle) -> None:
                lock.release()

            self.add_done_callback(callback)
            if not lock.acquire(timeout=-1 if timeout is None else max(timeout, 0)):
                self._drop(callback)
                raise TimeoutError(f"Task {self.id!r} has not ended within {timeout} s.")
        outcome = self._outcome
        assert outcome is not None
        return outcome

    async def _await(self) -> Outcome:
        if self._outcome is None:
            loop = asyncio.get_running_loop()
            ended = loop.create_future()

            def wake() -> None:
                if not ended.done():
                    ended.set_result(None)

            def callback(_: TaskHandle) -> None:
                with suppress(RuntimeError):  # that loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(wake)

            self.add_done_callback(callback)
            try:
                await ended
            except asyncio.CancelledError:
                self._drop(callback)
                raise
        outcome = self._outcome
        assert outcome is not None
        return outcome

    def _open(self, outcome: Outcome) -> Any:
        error = outcome.exception()
        if error is not None:
            raise error
        if self._value is _NOT_LOADED:
            assert outcome.value is not None
            self._value = pickle.loads(outcome.value)  # noqa: S301  (of our own worker)
        return self._value

    def _result_of(self, outcome: Outcome) -> TaskResult:
        error = outcome.exception()
        if outcome.refusal is not None:
            raise outcome.refusal
        return TaskResult(
            self.id,
            TaskState(outcome.state),
            self._open(outcome) if error is None else None,
            error,
            outcome.attempts,
            outcome.duration,
        )
