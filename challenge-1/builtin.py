"""The two built-in pipelines: `webhook`, which is a spec, and `events`, which is a little more.

`events` sums up every numeric member of `data`, whatever members there are; so its struct and its
loop are written by hand. Both count a late event in its window however late it is.
"""

from collections.abc import Iterable
from typing import Any, Final

from msgspec import Struct

from aggregation import (
    LARGEST,
    MAX_NAME_CHARS,
    Folded,
    Moment,
    Name,
    Summary,
    deltas_of,
    judge,
    measure,
    micros,
    place,
)
from projection import Projection, compile_spec, too_early
from shapes import NO_TIME
from specs import PipelineSpec
from windows import Window, Windows

MAX_MEMBERS: Final = 32  # numeric members of one event's data
WINDOW_SECONDS: Final = 60.0
SLIDE_SECONDS: Final = 10.0
NAMES: Final = ("webhook", "events")


def webhook(window_seconds: float = 10.0) -> Projection:
    """`{"data": {"category", "value", "quantity", "ts"}}` in tumbling windows."""
    spec = PipelineSpec.model_validate(
        {
            "select": {
                "category": "data.category",
                "value": "data.value",
                "quantity": "data.quantity",
            },
            "event_time": "data.ts",
            "group_by": ["category"],
            "aggregates": [
                {"op": "count"},
                {"op": "sum", "field": "value"},
                {"op": "avg", "field": "value"},
                {"op": "sum", "field": "quantity"},
            ],
            "window": {"kind": "tumbling", "size_seconds": window_seconds},
        }
    )
    window = Window.of("tumbling", window_seconds, revises_for_ever=True)
    return compile_spec("webhook", spec, window=window, strict=True)


class SourceEvent(Struct, gc=False):
    """`{"event_id", "source", "event_type", "data": {…}, "timestamp"?}`."""

    event_id: Name
    source: Name
    event_type: Name
    data: dict[str, Any]
    timestamp: Moment | None = None
    at: int | None = NO_TIME  # always set after decoding


def events() -> Projection:
    """Events by source and type, in sliding windows of 60 s by 10 s, a watermark per source."""
    return Projection(
        name="events",
        spec=None,
        shape=SourceEvent,
        aliases=("source", "event_type"),
        window=Window.of("sliding", WINDOW_SECONDS, SLIDE_SECONDS, revises_for_ever=True),
        aggregates=(),
        normalise=_normalise,
        fold=_fold,
        ids=lambda found: [event.event_id for event in found],
        sources=lambda found: [event.source for event in found],
        may_lack_time=True,
        levels=2,
        strict=True,
        built_in=True,
    )


def _normalise(found: Iterable[SourceEvent], horizon: int) -> int:
    for event in found:
        members = 0
        for name, value in event.data.items():
            if type(value) is int or type(value) is float:
                members += 1
                if not -LARGEST <= value <= LARGEST:
                    raise ValueError("A number in `data` is out of range: at most 1e290 is kept.")
                if len(name) > MAX_NAME_CHARS:
                    raise ValueError(
                        "A name in `data` is too long: at most 256 characters are kept."
                    )
        if members > MAX_MEMBERS:
            raise ValueError("There are too many numbers in `data`: at most 32 members are kept.")
        moment = event.timestamp
        event.at = NO_TIME if moment is None else micros(moment)
        if event.at > horizon:
            raise too_early()
    return 0


Members = dict[str, list[float]]


def _fold(found: Iterable[SourceEvent], windows: Windows) -> Folded:
    window = windows.window
    size, clocks = window.pane, windows.clocks
    data: dict[Any, dict[Any, tuple[list[None], Members]]] = {}
    late: dict[Any, int] = {}
    dropped: list[Any] = []
    for event in found:
        moment: Any = event.at
        source = event.source
        group: Any = (source, event.event_type)
        clock = clocks.get(source) or windows.clock(source)
        pane = where = moment // size
        if pane < clock.open_from:
            where = judge(windows, clock, pane, group, late)
            if where is None:
                dropped.append(event)
                continue
        if moment > clock.latest:
            clock.latest = moment
            if moment >= clock.next_close:
                windows.passed(clock, source)
        level = data.get(where)
        if level is None:
            level = data[where] = {}
        row = level.get(group)
        if row is None:
            group = place(windows, pane, group, source, clock, late)
            row = level.setdefault(group, ([], {}))
        counter, members = row
        counter.append(None)
        for name, value in event.data.items():
            if type(value) is float or type(value) is int:
                values = members.get(name)
                if values is None:
                    values = members[name] = []
                values.append(float(value))
    deltas = deltas_of(window, data, late, _summarise, lambda group: str(group[0]))
    return Folded(deltas, sum(late.values()), dropped)


def _summarise(bucket: tuple[list[None], Members]) -> Summary:
    counter, members = bucket
    return Summary(len(counter), {name: measure(values) for name, values in members.items()})


PROJECTIONS: Final = {each.name: each for each in (webhook(), events())}  # with their defaults
