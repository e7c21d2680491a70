"""The two built-in pipelines: the fields an event is projected to, and what is summed by group.

An event is decoded straight into a small struct that names only the needed fields; everything else
in the document is skipped by the decoder. `fold` turns a block of such structs into one `Delta`
per window and group, ready to be added to what is stored. No I/O and no clock.
"""

import datetime as dt
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from windows import MICROSECONDS, Tumbling, Watermarks

LARGEST: Final = 1e290  # beyond it 10^15 additions could overflow, and one event poison a sum
MAX_NAME_CHARS: Final = 256
MAX_MEMBERS: Final = 32  # numeric members of one event's data
EARLIEST_SECONDS: Final = -62_000_000_000  # year 5, so that a window's bounds stay printable
LATEST_SECONDS: Final = 253_000_000_000  # year 9987
MILLISECONDS_ABOVE: Final = 1e11  # epoch numbers larger than this are milliseconds

EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
MICROSECOND: Final = dt.timedelta(microseconds=1)

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]
Number = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
Moment = Annotated[dt.datetime, Meta(tz=True)] | float


class Measurement(Struct):
    """The part of a `/webhook` event that counts."""

    category: Name
    value: Number
    quantity: Number
    ts: Moment


class WebhookEvent(Struct):
    """`{"data": {"category", "value", "quantity", "ts"}}`."""

    data: Measurement


class SourceEvent(Struct):
    """`{"event_id", "source", "event_type", "data": {…}, "timestamp"?}`."""

    event_id: Name
    source: Name
    event_type: Name
    data: dict[str, Any]
    timestamp: Moment | None = None


@dataclass(slots=True)
class Measure:
    """Count, exact sum (the unevaluated pair `total + rest`), least and greatest of a member."""

    count: int
    total: float
    rest: float
    least: float
    greatest: float


@dataclass(slots=True)
class Delta:
    """What one block adds to one window of one group."""

    window_start: int  # microseconds since the epoch, like window_end
    window_end: int
    group: tuple[str, ...]
    source: str
    count: int
    late: int
    measures: dict[str, Measure]


def micros(moment: dt.datetime | float) -> int:
    """Microseconds since the epoch; raises ValueError when the moment is out of range."""
    if not isinstance(moment, dt.datetime):
        seconds = moment / 1000 if moment > MILLISECONDS_ABOVE else moment
        if not EARLIEST_SECONDS <= seconds <= LATEST_SECONDS:
            raise ValueError("The time is out of range: years 5 to 9987 are kept.")
        return round(seconds * MICROSECONDS)
    value = (moment - EPOCH) // MICROSECOND
    if not EARLIEST_SECONDS * MICROSECONDS <= value <= LATEST_SECONDS * MICROSECONDS:
        raise ValueError("The time is out of range: years 5 to 9987 are kept.")
    return value


def measure(values: Sequence[float]) -> Measure:
    """Sum up exactly: the rounded sum of `values` and, as a second number, what rounding lost."""
    total = fsum(values)
    rest = fsum((*values, -total))
    return Measure(len(values), total, rest, min(values), max(values))


def _check_webhook(event: WebhookEvent) -> None:
    micros(event.data.ts)


def _check_source_event(event: SourceEvent) -> None:
    if event.timestamp is not None:
        micros(event.timestamp)
    members = 0
    for name, value in event.data.items():
        if type(value) is int or type(value) is float:
            members += 1
            if not -LARGEST <= value <= LARGEST:
                raise ValueError("A number in `data` is out of range: at most 1e290 is kept.")
            if len(name) > MAX_NAME_CHARS:
                raise ValueError("A name in `data` is too long: at most 256 characters are kept.")
    if members > MAX_MEMBERS:
        raise ValueError("There are too many numbers in `data`: at most 32 members are kept.")


def _fold_webhook(
    events: Iterable[WebhookEvent], window: Tumbling, watermarks: Watermarks
) -> list[Delta]:
    size = window.size
    latest = watermarks.latest("webhook", "")
    open_from = latest // size
    groups: dict[tuple[int, str], tuple[list[float], list[float]]] = {}
    late: dict[tuple[int, str], int] = {}
    for event in events:
        data = event.data
        moment = micros(data.ts)
        index = moment // size
        key = (index, data.category)
        if moment > latest:
            latest, open_from = moment, index
        elif index < open_from:
            late[key] = late.get(key, 0) + 1
        group = groups.get(key)
        if group is None:
            group = groups[key] = ([], [])
        group[0].append(data.value)
        group[1].append(data.quantity)
    watermarks.advance("webhook", "", latest)
    return [
        Delta(
            index * size,
            index * size + size,
            (category,),
            "",
            len(values),
            late.get((index, category), 0),
            {"value": measure(values), "quantity": measure(quantities)},
        )
        for (index, category), (values, quantities) in groups.items()
    ]


def _fold_events(
    events: Iterable[SourceEvent], window: Tumbling, watermarks: Watermarks
) -> list[Delta]:
    size = window.size
    groups: dict[tuple[int, str, str], dict[str, list[float]]] = {}
    counts: dict[tuple[int, str, str], int] = {}
    late: dict[tuple[int, str, str], int] = {}
    for event in events:
        moment = micros(event.timestamp or 0.0)
        index = moment // size
        key = (index, event.source, event.event_type)
        if watermarks.is_late("events", event.source, moment, size):
            late[key] = late.get(key, 0) + 1
        counts[key] = counts.get(key, 0) + 1
        members = groups.get(key)
        if members is None:
            members = groups[key] = {}
        for name, value in event.data.items():
            if type(value) is float or type(value) is int:
                values = members.get(name)
                if values is None:
                    values = members[name] = []
                values.append(float(value))
    return [
        Delta(
            key[0] * size,
            key[0] * size + size,
            key[1:],
            key[1],
            counts[key],
            late.get(key, 0),
            {name: measure(values) for name, values in members.items()},
        )
        for key, members in groups.items()
    ]


@dataclass(frozen=True)
class Spec:
    """One pipeline: the struct it projects to, how it groups, and what it shows of a measure."""

    name: str
    shape: type[Struct]
    aliases: tuple[str, ...]  # names of the group's parts
    check: Callable[[Any], None]  # what the struct's types cannot say; raises ValueError
    fold: Callable[[Iterable[Any], Tumbling, Watermarks], list[Delta]]
    shown: tuple[str, ...]  # "sum", "avg", "min", "max"
    hidden: frozenset[str] = frozenset()  # shown values that are not part of the pipeline
    has_ids: bool = False  # events carry an `event_id`, and a second one is a duplicate
    levels: int = 2  # objects that every valid event opens

    def arrived(self, events: Iterable[Any], arrival: int) -> None:
        """Give events without a time of their own that of their arrival, in microseconds."""
        if self.shape is SourceEvent:
            for event in events:
                if event.timestamp is None:
                    event.timestamp = arrival / MICROSECONDS

    def values(self, count: int, measures: dict[str, Measure]) -> dict[str, float | int]:
        """The `values` of an aggregate, as `count`, `sum_<member>`, `avg_<member>`, …"""
        values: dict[str, float | int] = {"count": count}
        for name in sorted(measures):
            measured = measures[name]
            total = measured.total + measured.rest
            every = {
                "sum": total,
                "avg": total / measured.count,
                "min": measured.least,
                "max": measured.greatest,
            }
            for kind in self.shown:
                if (label := f"{kind}_{name}") not in self.hidden:
                    values[label] = _plain(every[kind])
        return values


def _plain(number: float) -> float | int:
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


WEBHOOK: Final = Spec(
    name="webhook",
    shape=WebhookEvent,
    aliases=("category",),
    check=_check_webhook,
    fold=_fold_webhook,
    shown=("sum", "avg"),
    hidden=frozenset({"avg_quantity"}),
)
EVENTS: Final = Spec(
    name="events",
    shape=SourceEvent,
    aliases=("source", "event_type"),
    check=_check_source_event,
    fold=_fold_events,
    shown=("sum", "avg", "min", "max"),
    has_ids=True,
)
PIPELINES: Final = {spec.name: spec for spec in (WEBHOOK, EVENTS)}


def group_text(group: tuple[str, ...]) -> str:
    """The group as the text it is stored and paged by."""
    return msgspec.json.encode(group).decode()
