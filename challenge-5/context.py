"""What a running task may know and say about itself: `current_task()`."""

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from payloads import printable

NOTE_CHARACTERS = 2_000

Say = Callable[[str, Any], None]


class TaskContext:
    """The task that is running: its id, its attempt (1 is the first), and a way to tell of it.

    `idempotency_token` is the same in every attempt of a run: hand it to outside systems, for a
    task runs at least once.
    """

    __slots__ = ("_say", "attempt", "id", "run")

    def __init__(self, task_id: str, attempt: int, run: int, say: Say) -> None:
        self.id = task_id
        self.attempt = attempt
        self.run = run
        self._say = say

    @property
    def idempotency_token(self) -> str:
        """The same in every attempt of a run; another one after `retry_task`."""
        return f"{self.id}/{self.run}"

    def progress(self, fraction: float, text: str = "") -> None:
        """Say how far the task is, from 0 to 1; the last one is shown with its status."""
        if math.isnan(fraction):
            raise ValueError("progress() takes a fraction from 0 to 1, not NaN.")
        part = min(max(float(fraction), 0.0), 1.0)
        self._say("progress", [part, printable(str(text)[:NOTE_CHARACTERS])])

    def log(self, line: str) -> None:
        """Keep a line with the task (the last 100)."""
        self._say("log", printable(str(line)[:NOTE_CHARACTERS]))


running: ContextVar[TaskContext] = ContextVar("running")


def current_task() -> TaskContext:
    """The context of the task that calls; LookupError outside of a task."""
    try:
        return running.get()
    except LookupError:
        raise LookupError("current_task() is for use inside a running task.") from None
