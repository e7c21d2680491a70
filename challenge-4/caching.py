"""The shared buffer of `cache()`: as long as somebody has read, each element computed once."""

import threading
from collections.abc import Callable, Iterator
from itertools import islice
from types import TracebackType
from typing import Any

from sources import EVERYTHING, LazyError, Op, Source, bounds_of, depth_of


class CacheFullError(LazyError):
    """More elements came than `cache(max_items=…)` may keep."""


class CachedSource(Source):
    """Elements computed by an upstream plan, kept in the order they came.

    Any number of iterators, in any thread, read the same sequence. Reading what is there takes no
    lock; the next element is computed under one, by whoever needs it first. An error is kept too,
    and raised at the same place for everybody.
    """

    __slots__ = (
        "_done",
        "_error",
        "_items",
        "_lock",
        "_max_items",
        "_open",
        "_recompute",
        "_stream",
        "_traceback",
        "depth",
        "described",
    )  # fmt: skip

    def __init__(
        self,
        upstream: Callable[[int], Iterator[Any]],
        described: tuple[Source, tuple[Op, ...]],
        max_items: int | None,
        *,
        recompute: bool,
    ) -> None:
        super().__init__(())
        self.described = described
        self.depth = depth_of(*described) + 1
        self._open = upstream
        self._max_items = max_items
        self._recompute = recompute
        self._items: list[Any] = []
        self._stream: Iterator[Any] | None = None
        self._done = False
        self._error: Exception | None = None
        self._traceback: TracebackType | None = None
        self._lock = threading.RLock()  # held while an element is computed

    def iterate(self, window: range, opened: list[Any]) -> Iterator[Any]:
        """All elements from the first on, or those of the window."""
        del opened
        if self._done and self._error is None:
            return islice(self._items, *bounds_of(window))
        stream = self._read()
        return stream if window is EVERYTHING else islice(stream, *bounds_of(window))

    def _read(self) -> Iterator[Any]:
        items = self._items
        position = 0
        while True:
            while position < len(items):
                yield items[position]
                position += 1
            if not self._compute(position):
                break
        if not self._done:
            yield from self._beyond()

    def _compute(self, position: int) -> bool:
        """Make sure that there is an element at this position; False: there is none in here."""
        with self._lock:
            if position < len(self._items):
                return True
            if self._error is not None:
                # With its first traceback: every raise would make that longer.
                raise self._error.with_traceback(self._traceback)
            if self._done:
                return False
            if position == self._max_items and self._recompute:
                return False
            if self._stream is None:
                self._stream = self._open(len(self._items))
            try:
                value = next(self._stream)
            except StopIteration:
                self._finish()
                return False
            except Exception as error:
                self._fail(error)
                raise
            except BaseException:
                # An interrupt ended the stream, not the elements: who reads on starts it again.
                self._stream = None
                raise
            if position == self._max_items:
                full = CacheFullError(
                    f"cache(max_items={self._max_items}) is full and more elements came. Raise "
                    'max_items, or use on_overflow="recompute".'
                )
                self._fail(full)
                raise full
            self._items.append(value)
            return True

    def _beyond(self) -> Iterator[Any]:
        """What does not fit: the first to come goes on, others compute it again."""
        with self._lock:
            stream, self._stream = self._stream, None
            if stream is None:
                stream = self._open(len(self._items))
        try:
            yield from stream
        finally:
            stream.close()  # type: ignore[attr-defined]

    def _fail(self, error: Exception) -> None:
        self._error, self._traceback = error, error.__traceback__
        self._finish()

    def _finish(self) -> None:
        self._done = True
        stream, self._stream = self._stream, None
        self._open = _nothing  # the source is no longer held
        self.described = (Source(()), ())
        self.depth = 0
        if stream is not None:
            stream.close()  # type: ignore[attr-defined]

    def close(self) -> None:
        """Close what is being read; what was computed stays."""
        with self._lock:
            stream, self._stream = self._stream, None
            if stream is not None:
                stream.close()  # type: ignore[attr-defined]
            self.described[0].close()

    def size(self) -> int | None:
        """Known once all is computed."""
        return len(self._items) if self._done and self._error is None else None

    def is_sequence(self) -> bool:
        """Its elements are had by index only through the buffer."""
        return False

    def index_of(self, iterator: Any) -> int | None:
        """Unknown."""
        del iterator
        return None

    def describe(self) -> str:
        """How many elements it holds."""
        state = "complete" if self._done else "so far"
        return f"cache of {len(self._items):,} {state}"


def _nothing(skip: int) -> Iterator[Any]:
    del skip
    return iter(())
