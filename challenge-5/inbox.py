"""What other threads say to the engine's, and how they are answered."""

import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from errors import SchedulerClosed, StoreUnavailable
from handles import Outcome
from records import Job

ANSWER_SECONDS = 60.0  # a caller that has waited so long for the engine is told so

T = TypeVar("T")


class Reply(Generic[T]):
    """The answer to a question put to the engine."""

    def __init__(self, callback: Callable[[], None] | None = None) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._value: T
        self._error: BaseException | None = None
        self._callback = callback

    def give(self, value: T) -> None:
        """Answer with a value."""
        self._value = value
        self._release()

    def fail(self, error: BaseException) -> None:
        """Answer with a refusal."""
        self._error = error
        self._release()

    def _release(self) -> None:
        self._lock.release()
        if self._callback is not None:
            self._callback()

    def wait(self, timeout: float | None) -> bool:
        """Is it there in time?"""
        return self._lock.acquire(timeout=-1 if timeout is None else max(timeout, 0))

    def get(self) -> T:
        """Wait for the answer, or raise the refusal."""
        if not self.wait(ANSWER_SECONDS):
            raise StoreUnavailable("The scheduler has not answered for a minute; is the disk slow?")
        return self.taken()

    def taken(self) -> T:
        """The answer, which is there."""
        if self._error is not None:
            raise self._error
        return self._value


class Inbox:
    """New jobs and calls, in order, for one thread that sleeps in a selector."""

    def __init__(self) -> None:
        self.messages: deque[Job | Callable[[], None]] = deque()
        self.replies: list[tuple[Reply[Any], Any]] = []  # to be given after the commit
        self.asleep = False
        self.ended = False  # what still comes is refused
        self.thread: threading.Thread | None = None  # that reads it
        self._woken, self._wake = socket.socketpair()
        for end in (self._woken, self._wake):
            end.setblocking(False)

    def register(self, selector: selectors.BaseSelector) -> None:
        """Let a message end the sleep of this selector."""
        selector.register(self._woken, selectors.EVENT_READ, self._drain)

    def _drain(self, mask: int) -> None:
        del mask
        with suppress(BlockingIOError):
            self._woken.recv(4096)

    def wake(self) -> None:
        """Have a turn now."""
        with suppress(OSError):  # full: it is awake; closed: it is gone
            self._wake.send(b"\0")

    def post(self, message: Job | Callable[[], None]) -> None:
        """Hand over a new job, or something to do."""
        self.messages.append(message)
        if self.asleep:
            self.wake()

    def ask(self, question: Callable[[], T], *, at_once: bool = False) -> T:
        """Call it in the reading thread; return once what it did is committed (or at once)."""
        if threading.current_thread() is self.thread:
            return question()
        return self.asking(question, at_once=at_once).get()

    def asking(
        self,
        question: Callable[[], T],
        *,
        at_once: bool = False,
        callback: Callable[[], None] | None = None,
    ) -> Reply[T]:
        """Like `ask`, without waiting; the callback is called when the answer is there."""
        reply: Reply[T] = Reply(callback)

        def answer() -> None:
            if self.ended:
                reply.fail(SchedulerClosed("The scheduler was shut down."))
                return
            try:
                value = question()
            except Exception as error:  # noqa: BLE001  (it belongs to the one who asked)
                reply.fail(error)
                return
            if at_once:
                reply.give(value)
            else:
                self.replies.append((reply, value))

        self.post(answer)
        self.refuse_if_unread()
        return reply

    def refuse_if_unread(self) -> None:
        """If nobody reads any more: whoever has asked is told."""
        if not self.ended and self.thread is not None and self.thread.is_alive():
            return
        while self.messages:
            with suppress(IndexError):  # two callers may be here
                message = self.messages.popleft()
                if type(message) is not Job:
                    message()  # type: ignore[operator]
                elif message.handle is not None:
                    gone = SchedulerClosed("The scheduler was shut down; nothing was kept.")
                    message.handle.resolve(Outcome("", None, None, 0, 0.0, gone))

    def give_replies(self) -> None:
        """What was asked for is committed."""
        replies, self.replies = self.replies, []
        for reply, value in replies:
            reply.give(value)

    def fail_replies(self, error: BaseException) -> None:
        """What was asked for could not be committed."""
        replies, self.replies = self.replies, []
        for reply, _ in replies:
            reply.fail(error)

    def close(self) -> None:
        """Wake nobody any more."""
        for end in (self._woken, self._wake):
            end.close()
