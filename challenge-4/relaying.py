"""Plans of hundreds of segments: these take turns, instead of each reading the one before.

Generators that read one another nest, and Python's recursion limit ends some hundreds of them. Here
one that lacks an element yields `NEED`, and is sent the element once the segment before has made
it, or `END`. Who reads how much, and when, stays the same; a turn costs some 0.1 us.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import Any

from metering import Meter

NEED: Any = object()
END: Any = object()
Turns = Generator[Any, Any, None]
Stage = tuple[Turns, int | None]  # and the number of the operation, where a meter is to know it


def relay(stages: list[Stage], meter: Meter | None = None) -> Iterator[Any]:
    """The elements of the last stage; the first one reads the source."""
    turns = [stage for stage, _ in stages]
    sends = [stage.send if meter is None or number is None else _metered(stage, number, meter)
             for stage, number in stages]  # fmt: skip
    last = place = len(turns) - 1
    ended = 0  # stages: the first ones
    given: Any = None
    try:
        while True:
            try:
                made = sends[place](given)
            except StopIteration:
                made = END
            given = None
            if made is NEED:
                place -= 1
            elif place < last:
                if made is END:
                    _close(turns[ended:place])  # what it did not read to the end
                    ended = place + 1
                place += 1
                given = made
            elif made is END:
                return
            else:
                yield made
    finally:
        _close(turns[ended:])


def _metered(turns: Turns, number: int, meter: Meter) -> Callable[[Any], Any]:
    def send(given: Any) -> Any:
        started = meter.start()
        try:
            made = turns.send(given)
        finally:
            meter.stop(number, started)
        meter.counts[number] += made is not NEED
        return made

    return send


def _close(stages: list[Turns]) -> None:
    """All of them, whatever one of them raises."""
    with ExitStack() as closing:
        for turns in stages:
            closing.callback(turns.close)
