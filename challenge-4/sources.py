"""Where elements come from, and who may read, index and close it.

A source is opened once per iteration and closed by whoever opened it, also when the iteration ends
early. An iterator can be read once only; a second reading raises instead of finding nothing.
"""

import io
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice
from pathlib import Path
from types import FunctionType, GeneratorType
from typing import Any

Op = tuple[Any, ...]  # the name of an operation, and its arguments
EVERYTHING = range(sys.maxsize)
_claiming = threading.Lock()


class LazyError(Exception):
    """What a lazy collection itself complains about."""


class SourceExhaustedError(LazyError):
    """An iterator was to be read a second time."""


class Source:
    """An iterable, or a function that makes one, behind the operations of a plan."""

    __slots__ = ("_first_use", "_live", "origin", "produces")
    numbers: list[int] = []  # noqa: RUF012  (of the operations a pushing source leaves over)
    depth: int = 0  # how many caches it is, and functions under them that read on their own
    is_late = False  # True: what runs is known only once the source is open

    def __init__(self, origin: Iterable[Any] | Callable[[], Iterable[Any]]) -> None:
        kind = type(origin)
        if hasattr(kind, "__iter__"):
            self.produces = False
        elif callable(origin) and not hasattr(kind, "cursor"):
            _check_factory(origin)
            self.produces = True
        else:
            raise TypeError(
                f"A source is an iterable or a function without arguments that returns one; "
                f"{kind.__name__} is neither."
                + (" Use DatabaseLazyCollection for a connection." if callable(origin) else "")
            )
        self.origin: Any = origin
        self._first_use: str | None = None
        self._live: dict[int, Any] | None = None  # what iterations have open, by identity

    def iterate(self, window: range, opened: list[Any]) -> Iterator[Any]:
        """Start to read the elements of the window; what has to be closed goes into `opened`."""
        origin = self.origin
        if self.produces:
            made = origin()
            iterator = iter(made)
            self._keep(iterator, opened)
            if made is not iterator:
                self._keep(made, opened)
        else:
            if window is not EVERYTHING and isinstance(origin, Sequence):
                return _indexed(origin, window)
            iterator = iter(origin)
            if iterator is origin:
                self._claim()
                if isinstance(iterator, io.IOBase):  # a file belongs to whoever opened it
                    return _within(iterator, window)
            self._keep(iterator, opened)
        return iterator if window is EVERYTHING else _within(iterator, window)

    def _keep(self, closable: Any, opened: list[Any]) -> None:
        if hasattr(closable, "close"):
            opened.append(closable)
            if self._live is None:
                with _claiming:
                    if self._live is None:
                        self._live = {}
            self._live[id(closable)] = closable

    def release(self, opened: list[Any]) -> None:
        """Close what one iteration has opened."""
        while opened:
            closable = opened.pop()
            if self._live is not None:
                self._live.pop(id(closable), None)
            closable.close()

    def _claim(self) -> None:
        with _claiming:
            spent = type(self.origin) is GeneratorType and self.origin.gi_frame is None
            if self._first_use is None and not spent:
                self._first_use = _caller()
                return
        where = "before it came here" if self._first_use is None else f"at {self._first_use}"
        raise SourceExhaustedError(
            f"{self.describe()} can be read once only, and was read {where}. To read it again, "
            "keep its elements with .cache(), give a function that makes a new one (a factory), "
            "or make a list of it first."
        )

    def close(self) -> None:
        """Close what iterations have open, and an iterator that was handed in."""
        if not self.produces and self._first_use is None and hasattr(type(self.origin), "__next__"):
            self._first_use = "close()"
            if hasattr(self.origin, "close") and not isinstance(self.origin, io.IOBase):
                self.origin.close()
        if self._live is not None:
            self.release(list(self._live.values()))

    def push(self, ops: tuple[Op, ...]) -> tuple["Source", tuple[Op, ...]]:
        """The source that does the first operations itself, and those that are left."""
        return self, ops

    def size(self) -> int | None:
        """How many elements there are, where that can be known without reading any."""
        if self.produces or not isinstance(self.origin, Sized):
            return None
        return None if hasattr(type(self.origin), "__next__") else len(self.origin)

    def is_sequence(self) -> bool:
        """Whether elements can be had by index."""
        return not self.produces and isinstance(self.origin, Sequence)

    def index_of(self, iterator: Any) -> int | None:
        """The index of the element read last, where that can be known without counting."""
        try:
            if type(self.origin) in (list, tuple, range, str):
                return len(self.origin) - int(iterator.__length_hint__()) - 1
        except (AttributeError, TypeError):
            pass
        return None

    def describe(self) -> str:
        """The source in a few words, without looking at an element."""
        origin = self.origin
        kind = type(origin)
        if self.produces:
            return f"factory {name_of(origin)}"
        if kind is range:
            return repr(origin)
        if kind in (list, tuple, dict, set, frozenset, str, bytes, deque):
            return f"{kind.__name__} of {len(origin):,}"
        if kind is GeneratorType:
            return f"generator {origin.__name__} ({place_of(origin)})"
        # Objects of others are named only: their repr could do anything.
        return repr(origin) if kind.__module__ == "files" else kind.__name__[:60]


def _check_factory(function: Any) -> None:
    if isinstance(function, FunctionType):
        needed = function.__code__.co_argcount - len(function.__defaults__ or ())
        if needed > 0:
            raise TypeError(
                f"A factory is called without arguments; {name_of(function)} needs {needed}."
            )


def _indexed(origin: Sequence[Any], window: range) -> Iterator[Any]:
    """The elements of the window by index, so that the others are not touched."""
    kind = type(origin)
    if kind is range:
        return iter(origin[window.start : window.stop : window.step])
    if kind in (list, tuple) and window.step == 1:
        iterator: Any = iter(origin)
        iterator.__setstate__(window.start)
        rest = window.stop == sys.maxsize
        return iterator if rest else islice(iterator, window.stop - window.start)
    return map(origin.__getitem__, range(len(origin))[window.start : window.stop : window.step])


def _within(iterator: Iterator[Any], window: range) -> Iterator[Any]:
    if window is EVERYTHING:
        return iterator
    return islice(iterator, *bounds_of(window))


def depth_of(source: Source, ops: tuple[Op, ...]) -> int:
    """How many caches and `through` of a plan read one another: these can only nest."""
    return source.depth + [op[0] for op in ops].count("through")


def bounds_of(window: range) -> tuple[int, int | None, int]:
    """The window as `islice` takes it."""
    return window.start, None if window.stop == sys.maxsize else window.stop, window.step


def _caller() -> str:
    """The first place outside this folder's machinery."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename in _MACHINERY or frame.f_code.co_filename.startswith("<lazy ")
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


_MACHINERY = {
    str(Path(__file__).with_name(name))
    for name in ("sources.py", "lazy.py", "compiler.py", "caching.py", "grouping.py", "metering.py",
                 "relaying.py", "explaining.py", "files.py", "tables.py", "pushing.py")
}  # fmt: skip


def name_of(function: Any) -> str:
    """`double (file.py:12)` for a function, its text for an expression."""
    place = place_of(function)
    name = getattr(function, "__name__", None)
    if name is None:
        kind = type(function)
        text = repr(function) if kind.__name__ == "Expr" else kind.__name__
        return text if len(text) <= 80 else f"{text[:77]}..."
    return f"{name} ({place})" if place else str(name)


def place_of(function: Any) -> str:
    """Where a function or generator is written, if Python knows."""
    code = getattr(function, "__code__", None) or getattr(function, "gi_code", None)
    if code is None and hasattr(function, "func"):  # functools.partial
        return place_of(function.func)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""
