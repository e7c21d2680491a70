"""Operations that need more than one element at a time; each starts a new segment of the plan.

Each is written twice: as a generator that reads the one before it, and as one that asks. Who asks
yields `NEED` and is sent an element, or `END` after the last; see `relaying.py`.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from expressions import Expr, total_order
from notes import add_note, describe_op
from relaying import END, NEED, Turns
from sources import Op, Source

Open = Callable[[Source], Any]


def _windows(stream: Any, op: Op, number: int, opened: Open) -> Iterator[tuple[Any, ...]]:
    del number, opened
    missing = op[1]
    held: deque[Any] = deque(maxlen=missing)
    try:
        for value in stream:
            held.append(value)
            missing -= 1
            if not missing:
                yield tuple(held)
                missing = op[2]
    finally:
        stream.close()


def _asking_windows(op: Op, number: int, opened: Open) -> Turns:
    del number, opened
    missing = op[1]
    held: deque[Any] = deque(maxlen=missing)
    while (value := (yield NEED)) is not END:
        held.append(value)
        missing -= 1
        if not missing:
            yield tuple(held)
            missing = op[2]


def _pages(stream: Any, op: Op, number: int, opened: Open) -> Iterator[Any]:
    del number, opened
    _, size, make = op
    page = 1
    try:
        items = list(islice(stream, size))
        while items:
            ahead = list(islice(stream, 1)) if len(items) == size else []
            yield make(items, page, bool(ahead))
            if not ahead:
                return
            page += 1
            items = ahead + list(islice(stream, size - 1))
    finally:
        stream.close()


def _asking_pages(op: Op, number: int, opened: Open) -> Turns:
    del number, opened
    _, size, make = op
    page = 1
    items: list[Any] = []
    while (value := (yield NEED)) is not END:
        if len(items) == size:
            yield make(items, page, True)
            page += 1
            items = []
        items.append(value)
    if items:
        yield make(items, page, False)


def _zipped(stream: Any, op: Op, number: int, opened: Open) -> Iterator[tuple[Any, ...]]:
    _, others, strict = op
    streams = [stream, *(opened(other) for other in others)]
    try:
        if not strict:
            yield from zip(*streams, strict=False)
            return
        yield from _zip_strictly(streams, number)
    finally:
        for each in streams:
            each.close()


def _zip_strictly(streams: list[Any], number: int) -> Iterator[tuple[Any, ...]]:
    while True:
        values = []
        for position, stream in enumerate(streams):
            value = next(stream, END)
            if value is END:
                if position == 0 and _have_ended(streams[1:]):
                    return
                raise _unequal(number)
            values.append(value)
        yield tuple(values)


def _asking_zip(op: Op, number: int, opened: Open) -> Turns:
    _, others, strict = op
    streams = [opened(other) for other in others]
    try:
        while (value := (yield NEED)) is not END:
            values = [value]
            for stream in streams:
                if (value := next(stream, END)) is END:
                    if strict:
                        raise _unequal(number)
                    return
                values.append(value)
            yield tuple(values)
        if strict and not _have_ended(streams):
            raise _unequal(number)
    finally:
        for each in streams:
            each.close()


def _have_ended(streams: list[Any]) -> bool:
    return all(next(stream, END) is END for stream in streams)


def _unequal(number: int) -> ValueError:
    return ValueError(f"op {number} zip(strict=True): the lengths differ.")


def _concatenated(stream: Any, op: Op, number: int, opened: Open) -> Iterator[Any]:
    del number
    others = op[1]
    try:
        yield from stream
        for other in others:
            stream = opened(other)
            yield from stream
    finally:
        stream.close()


def _asking_concat(op: Op, number: int, opened: Open) -> Turns:
    del number
    while (value := (yield NEED)) is not END:
        yield value
    for other in op[1]:
        stream = opened(other)
        try:
            yield from stream
        finally:
            stream.close()


def _passed_through(stream: Any, op: Op, number: int, opened: Open) -> Turns:
    del opened
    made: Any = None
    try:
        made = iter(op[1](stream))
        yield from made
    except Exception as error:
        _blame(error, op, number)
        raise
    finally:
        if hasattr(made, "close"):
            made.close()
        stream.close()


def _sorted(stream: Any, op: Op, number: int, opened: Open) -> Iterator[Any]:
    del opened
    try:
        items = list(stream)
    finally:
        stream.close()
    _sort(items, op, number)
    yield from items


def _asking_sort(op: Op, number: int, opened: Open) -> Turns:
    del opened
    items = []
    while (value := (yield NEED)) is not END:
        items.append(value)
    _sort(items, op, number)
    yield from items


def _sort(items: list[Any], op: Op, number: int) -> None:
    _, key, reverse = op
    by = (lambda item: total_order(key.evaluate(item))) if isinstance(key, Expr) else key
    try:
        items.sort(key=by, reverse=reverse)
    except Exception as error:  # the key function's, or of comparing
        _blame(error, op, number)
        raise


def _blame(error: Exception, op: Op, number: int) -> None:
    note = f"in {describe_op(op, number)}"
    add_note(error, note)
    if isinstance(error, StopIteration):  # it would end the iteration as if all had been read
        failure = RuntimeError(f"StopIteration was raised in {describe_op(op, number)}.")
        failure.add_note(note)
        raise failure from error


GROUPINGS: dict[str, Callable[[Any, Op, int, Open], Any]] = {
    "window": _windows,
    "pages": _pages,
    "zip": _zipped,
    "concat": _concatenated,
    "sort": _sorted,
    "through": _passed_through,
}

# All but `through`: a function of the user's reads, and cannot be made to ask.
ASKING: dict[str, Callable[[Op, int, Open], Turns]] = {
    "window": _asking_windows,
    "pages": _asking_pages,
    "zip": _asking_zip,
    "concat": _asking_concat,
    "sort": _asking_sort,
}
