"""Operations that need more than one element at a time; each starts a new segment of the plan."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from expressions import Expr, total_order
from notes import add_note, describe_op
from sources import Op, Source

Open = Callable[[Source], Any]
_END: Any = object()


def _windows(stream: Any, op: Op, number: int, opened: Open) -> Iterator[tuple[Any, ...]]:
    del number, opened
    _, size, step = op
    try:
        held: deque[Any] = deque(islice(stream, size), maxlen=size)
        while len(held) == size:
            yield tuple(held)
            fresh = list(islice(stream, step))
            if len(fresh) < step:
                return
            held.extend(fresh)
    finally:
        stream.close()


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
            value = next(stream, _END)
            if value is _END:
                if position == 0 and all(next(other, _END) is _END for other in streams[1:]):
                    return
                raise ValueError(f"op {number} zip(strict=True): the lengths differ.")
            values.append(value)
        yield tuple(values)


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


def _passed_through(stream: Any, op: Op, number: int, opened: Open) -> Iterator[Any]:
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
    _, key, reverse = op
    by = (lambda item: total_order(key.evaluate(item))) if isinstance(key, Expr) else key
    try:
        items.sort(key=by, reverse=reverse)
    except Exception as error:  # the key function's, or of comparing
        _blame(error, op, number)
        raise
    yield from items


def _blame(error: Exception, op: Op, number: int) -> None:
    note = f"in {describe_op(op, number)}"
    add_note(error, note)
    if isinstance(error, StopIteration):  # it would end the iteration as if all had been read
        failure = RuntimeError(f"StopIteration was raised in {describe_op(op, number)}.")
        failure.add_note(note)
        raise failure from error


GROUPINGS: dict[str, Callable[[Any, Op, int, Open], Iterator[Any]]] = {
    "window": _windows,
    "pages": _pages,
    "zip": _zipped,
    "concat": _concatenated,
    "sort": _sorted,
    "through": _passed_through,
}
