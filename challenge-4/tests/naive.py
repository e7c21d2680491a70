"""The operations as one would write them without any idea: the model to compare with.

Each operation is a generator over the one before. An error travels on as a value until a `catch`
takes it or the end raises it, so that what a catch covers is a matter of order alone. A group has
no place for an error, so the catch that follows it takes it in front of the group.
"""

from collections.abc import Iterator
from typing import Any

HEADS = {"batch", "window", "zip", "concat", "sort"}


class Failed:
    """An error on its way; a hard one cannot be caught any more."""

    def __init__(self, error: Exception, hard: bool = False) -> None:
        self.error, self.hard = error, hard


def run(source: Any, ops: list[tuple[Any, ...]]) -> tuple[list[Any], str]:
    """What comes out before the end or the error, and the error."""
    stream = read(source)
    for position, op in enumerate(ops):
        if op == ("take", 0):
            stream = iter(())  # nothing before it runs
        elif op[0] in HEADS:
            following = next((later for later in ops[position:] if later[0] == "catch"), None)
            if following is not None:
                stream = catch(stream, *following[1:])
            stream = globals()[op[0]](stream, *op[1:])
        elif op[0] == "catch":
            stream = catch(stream, *op[1:])
        else:
            stream = each(stream, STEPS[op[0]](*op[1:]))
    out: list[Any] = []
    for value in stream:
        if isinstance(value, Failed):
            error = value.error
            if isinstance(error, StopIteration):
                return out, "RuntimeError"
            return out, f"{type(error).__name__}: {error}"
        out.append(value)
    return out, ""


def read(source: Any) -> Iterator[Any]:
    iterator = iter(source)
    while True:
        try:
            yield next(iterator)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001
            yield Failed(error, hard=True)
            return


class Stop(Exception):
    """The stream ends, after the values given with it."""


def each(stream: Iterator[Any], step: Any) -> Iterator[Any]:
    for value in stream:
        if isinstance(value, Failed):
            yield value
            continue
        try:
            values = step(value)
            while True:
                try:
                    yield next(values)
                except StopIteration as stop:
                    if stop.value == "stop":
                        return
                    break
        except RuntimeError as error:
            cause = error.__cause__
            yield Failed(cause if isinstance(cause, StopIteration) else error)
        except Exception as error:  # noqa: BLE001
            yield Failed(error)


def catch(
    stream: Iterator[Any], errors: tuple[type[Exception], ...], replace: Any
) -> Iterator[Any]:
    for value in stream:
        if isinstance(value, Failed) and not value.hard and isinstance(value.error, errors):
            if replace is not ...:
                yield replace(value.error) if callable(replace) else replace
        else:
            if isinstance(value, Failed):
                value.hard = True
            yield value


def harden(stream: Iterator[Any]) -> Iterator[Any]:
    for value in stream:
        if isinstance(value, Failed):
            value.hard = True
        yield value
        if isinstance(value, Failed):
            return


def map_(function: Any) -> Any:
    def step(value: Any) -> Any:
        yield function(value)

    return step


def filter_(function: Any) -> Any:
    def step(value: Any) -> Any:
        if function(value):
            yield value

    return step


def tap(function: Any) -> Any:
    def step(value: Any) -> Any:
        function(value)
        yield value

    return step


def flat_map(function: Any) -> Any:
    def step(value: Any) -> Any:
        yield from function(value)

    return step


def take(n: int) -> Any:
    left = [n]

    def step(value: Any) -> Any:
        left[0] -= 1
        yield value
        return "stop" if not left[0] else ""

    return step


def skip(n: int) -> Any:
    left = [n]

    def step(value: Any) -> Any:
        if left[0]:
            left[0] -= 1
        else:
            yield value

    return step


def slice_(start: int, stop: int, step_size: int) -> Any:
    wanted = range(start, stop, step_size)
    at = [-1]

    def step(value: Any) -> Any:
        at[0] += 1
        if at[0] in wanted:
            yield value
        return "stop" if at[0] >= wanted[-1] else ""

    return step


def take_while(function: Any) -> Any:
    def step(value: Any) -> Any:
        if not function(value):
            return "stop"
        yield value
        return ""

    return step


def skip_while(function: Any) -> Any:
    skipping = [True]

    def step(value: Any) -> Any:
        if skipping[0] and function(value):
            return
        skipping[0] = False
        yield value

    return step


def distinct(key: Any) -> Any:
    seen: set[Any] = set()

    def step(value: Any) -> Any:
        name = value if key is None else key(value)
        if name not in seen:
            seen.add(name)
            yield value

    return step


def enumerate_(start: int) -> Any:
    number = [start - 1]

    def step(value: Any) -> Any:
        number[0] += 1
        yield number[0], value

    return step


def scan(function: Any, init: Any) -> Any:
    total = [init]

    def step(value: Any) -> Any:
        total[0] = function(total[0], value)
        yield total[0]

    return step


STEPS: dict[str, Any] = {
    "map": map_, "filter": filter_, "tap": tap, "flat_map": flat_map, "take": take, "skip": skip,
    "slice": slice_, "take_while": take_while, "skip_while": skip_while, "distinct": distinct,
    "enumerate": enumerate_, "scan": scan,
}  # fmt: skip


def batch(stream: Iterator[Any], size: int) -> Iterator[Any]:
    held: list[Any] = []
    for value in harden(stream):
        if isinstance(value, Failed):
            yield value
            return
        held.append(value)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


def window(stream: Iterator[Any], size: int, step: int) -> Iterator[Any]:
    held: list[Any] = []
    for number, value in enumerate(harden(stream), 1):
        if isinstance(value, Failed):
            yield value
            return
        held.append(value)
        if number >= size and (number - size) % step == 0:
            yield tuple(held[-size:])


def zip(stream: Iterator[Any], other: list[Any]) -> Iterator[Any]:
    others = iter(other)
    for value in harden(stream):
        if isinstance(value, Failed):
            yield value
            return
        try:
            yield value, next(others)
        except StopIteration:
            return


def concat(stream: Iterator[Any], other: list[Any]) -> Iterator[Any]:
    yield from harden(stream)
    yield from other


def sort(stream: Iterator[Any]) -> Iterator[Any]:
    values = []
    for value in harden(stream):
        if isinstance(value, Failed):
            yield value
            return
        values.append(value)
    try:
        values = sorted(values)
    except Exception as error:  # noqa: BLE001
        yield Failed(error, hard=True)
        return
    yield from values
