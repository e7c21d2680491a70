"""What is added up: exact sums, sketches of bounded size, and what a batch adds to a window.

No I/O and no clock. A `Delta` is what one batch adds to one window of one group; a `State` is what
is stored of it. Whatever the batches were, the same events give the same state: sums are exact to
106 bits, and sketches take their values in the order of the log.
"""

import datetime as dt
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import fsum
from typing import Annotated, Any, Final

from msgspec import Meta, Struct

from sketches import Quantiles, count_distinct, join_distinct
from windows import FOREVER, MICROSECONDS, OTHER, Clock, Group, Session, Window, Windows, other

LARGEST: Final = 1e290  # beyond it 10^15 additions could overflow, and one event poison a sum
MAX_NAME_CHARS: Final = 256
EARLIEST_SECONDS: Final = -62_000_000_000  # year 5, so that a window's bounds stay printable
LATEST_SECONDS: Final = 253_000_000_000  # year 9987
MILLISECONDS_ABOVE: Final = 1e11  # epoch numbers larger than this are milliseconds

EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
MICROSECOND: Final = dt.timedelta(microseconds=1)

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]
Number = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
Moment = Annotated[dt.datetime, Meta(tz=True)] | int | float


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


def text_of(moment: int) -> str:
    """A moment as RFC 3339 in UTC."""
    text = (EPOCH + dt.timedelta(microseconds=moment)).isoformat()
    return text.removesuffix("+00:00") + "Z"


# --- sums -------------------------------------------------------------------------------------


class Measure(Struct, array_like=True, gc=False):
    """Count, exact sum (the unevaluated pair `total + rest`), least and greatest of a field."""

    count: int
    total: float
    rest: float
    least: float
    greatest: float

    def plus(self, more: "Measure") -> "Measure":
        """Both together. Knuth's two-sum: `rest` collects what rounding takes from `total`."""
        total = self.total + more.total
        part = total - self.total
        lost = (self.total - (total - part)) + (more.total - part)
        return Measure(
            self.count + more.count,
            total,
            self.rest + more.rest + lost,
            min(self.least, more.least),
            max(self.greatest, more.greatest),
        )


def measure(values: Sequence[float], *, extremes: bool = True) -> Measure:
    """Sum up exactly: the rounded sum of `values` and, as a second number, what rounding lost."""
    if len(values) == 1:
        (value,) = values
        return Measure(1, value, 0.0, value, value)
    total = fsum(values)
    rest = fsum(chain(values, (-total,)))
    if not extremes:
        return Measure(len(values), total, rest, 0.0, 0.0)
    return Measure(len(values), total, rest, min(values), max(values))


# --- what a batch adds, and what is stored ----------------------------------------------------


@dataclass(slots=True)
class Delta:
    """What one batch adds to one window of one group.

    `samples` and `values` are for sketches, in the order of the log. Where windows move (sessions),
    `steps` tell what the row is made of: stored rows, what is added, sessions that are joined.
    """

    window_start: int  # microseconds since the epoch, like window_end
    window_end: int
    group: Group
    source: str
    count: int
    late: int
    measures: dict[str, Measure] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, list[Any]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    steps: "list[Step] | None" = None


Step = tuple[str, Any]  # ("load", start), ("add", Delta) or ("join", steps of the other)


class State(Struct, array_like=True):
    """What is stored of the values of one window of one group."""

    measures: dict[str, Measure] = {}
    quantiles: dict[str, Quantiles] = {}
    distinct: dict[str, bytes] = {}
    counts: dict[str, int] = {}

    def add(self, delta: Delta) -> None:
        """Take what a batch adds."""
        measures = self.measures
        for name, part in delta.measures.items():
            known = measures.get(name)
            measures[name] = part if known is None else known.plus(part)
        for name, samples in delta.samples.items():
            self.quantiles.setdefault(name, Quantiles()).add(samples)
        for name, values in delta.values.items():
            self.distinct[name] = count_distinct(self.distinct.get(name, b""), values)
        for name, count in delta.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def join(self, more: "State") -> None:
        """Take over the values of a session that turned out to be the same one."""
        for name, part in more.measures.items():
            known = self.measures.get(name)
            self.measures[name] = part if known is None else known.plus(part)
        for name, quantiles in more.quantiles.items():
            self.quantiles.setdefault(name, Quantiles()).join(quantiles)
        for name, sketch in more.distinct.items():
            self.distinct[name] = join_distinct(self.distinct.get(name, b""), sketch)
        for name, count in more.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count


@dataclass(slots=True)
class Folded:
    """What the events of a batch came to: deltas, corrections of closed windows, the too late."""

    deltas: list[Delta]
    revised: int = 0  # events that corrected a closed window
    dropped: list[Any] = field(default_factory=list)  # events that were too late for every window


@dataclass(slots=True)
class Summary:
    """The sums of one bucket of events."""

    count: int
    measures: dict[str, Measure]
    samples: dict[str, list[Any]] = field(default_factory=dict)
    values: dict[str, list[Any]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


Buckets = dict[Any, dict[Any, Any]]  # by pane, then by group (a single part stands alone)
Late = dict[Any, int]


def judge(windows: Windows, clock: Clock, pane: int, group: Any, late: Late) -> Any:
    """Where an event goes whose pane has closed windows; None when it is too late for all.

    Counts the correction of each closed window that still takes it. A pane whose oldest windows
    are beyond lateness goes by (pane, how many those are).
    """
    cut, revised = windows.late_starts(clock, pane)
    group = group if type(group) is tuple else (group,)
    for start in revised:
        late[start, group] = late.get((start, group), 0) + 1
    if not cut:
        return pane
    return None if cut == len(windows.window.starts(pane)) else (pane, cut)


def place(
    windows: Windows, pane: int, group: Group, source: str, clock: Clock, late: Late
) -> Group:
    """The group an event is counted in: its own, or `(other)` when there is no place left."""
    expiry = windows.expiry(pane)
    if not group or windows.place(group, source, expiry, windows.watermark(clock)):
        return group
    shared = other(len(group))
    for start in windows.late_starts(clock, pane)[1]:
        late[start, group] -= 1  # judged a moment ago
    if source:  # this group is of every source, and has a clock of its own
        clock = windows.clock(OTHER)
    for start in windows.late_starts(clock, pane)[1]:
        late[start, shared] = late.get((start, shared), 0) + 1
    if source:
        windows.advance(clock, OTHER, pane * windows.window.pane)
    return shared


def bucket(
    windows: Windows,
    data: Buckets,
    where: Any,
    group: Any,
    source: str,
    clock: Clock,
    late: Late,
    lists: int,
) -> Any:
    """The bucket of an event that found none: methods that append to the lists of its columns."""
    pane = where if type(where) is int else where[0]
    kept = place(windows, pane, group if type(group) is tuple else (group,), source, clock, late)
    level = data.setdefault(where, {})
    key = kept[0] if len(kept) == 1 else kept
    row = level.get(key)
    if row is None:
        row = level[key] = tuple([].append for _ in range(lists))
    return row


def deltas_of(
    window: Window,
    data: Buckets,
    late: Late,
    summarise: Callable[[Any], Summary],
    source_of: Callable[[Group], str],
) -> list[Delta]:
    """The deltas of the buckets of panes: a window is the sum of its panes."""
    found: dict[Any, Delta] = {}
    for where, key, row in (
        (where, key, row) for where, level in data.items() for key, row in level.items()
    ):
        pane, cut = (where, 0) if type(where) is int else where
        group = key if type(key) is tuple else (key,)
        summary = summarise(row)
        for start in window.starts(pane)[cut:] if window.pane else (0,):
            delta = found.get((start, group))
            if delta is None:
                end = start + window.size if window.pane else FOREVER
                found[start, group] = Delta(
                    start, end, group, source_of(group), summary.count,
                    late.get((start, group), 0), dict(summary.measures),
                    {name: list(v) for name, v in summary.samples.items()},
                    {name: list(v) for name, v in summary.values.items()},
                    dict(summary.counts),
                )  # fmt: skip
            else:
                _add(delta, summary)
    if window.kind == "sliding":  # panes take turns: back to the order of the log
        for delta in found.values():
            for columns in (delta.samples, delta.values):
                for name, numbered in columns.items():
                    pairs: list[Any] = sorted(numbered, key=_number)
                    columns[name] = [value for _, value in pairs]
    return list(found.values())


def _number(numbered: Any) -> int:
    number: int = numbered[0]
    return number


def sessions_folded(
    touched: Iterable[tuple[Group, Session]],
    dropped: list[Any],
    summarise: Callable[[Any], Summary],
) -> Folded:
    """What a batch adds to the sessions it touched; those that were joined go with the others."""
    folded = Folded([], dropped=dropped)
    for group, session in touched:
        if session.joined:
            continue
        steps = _steps(session, group, session.close_columns(), summarise)
        folded.deltas.append(
            Delta(session.start, session.end, group, session.source, 0, session.late, steps=steps)
        )
        folded.revised += session.late
        session.late, session.past = 0, [("load", session.start)]
    return folded


def _steps(
    session: Session,
    group: Group,
    past: list[tuple[str, Any]],
    summarise: Callable[[Any], Summary],
) -> list[Step]:
    steps: list[Step] = []
    for kind, what in past:
        if kind == "add":
            summary = summarise(tuple(column.append for column in what))
            what = Delta(
                session.start, session.end, group, session.source, summary.count, 0,
                summary.measures, summary.samples, summary.values, summary.counts,
            )  # fmt: skip
        elif kind == "join":
            what = _steps(session, group, what, summarise)
        steps.append((kind, what))
    return steps


def evolved(
    steps: list[Step], load: Callable[[int], tuple[State, int, int]]
) -> tuple[State, int, int]:
    """The state, count and number of revisions a session comes to, step by step.

    `load` takes the stored row with that start. The steps are those of the log, so the outcome is
    the same whether a batch took one of them or all.
    """
    state, count, revisions = State(), 0, 0
    for kind, what in steps:
        if kind == "load":
            state, count, revisions = load(what)
        elif kind == "add":
            state.add(what)
            count += what.count
        else:
            other_state, other_count, other_revisions = evolved(what, load)
            state.join(other_state)
            count += other_count
            revisions += other_revisions
    return state, count, revisions


def _add(delta: Delta, more: Summary) -> None:
    delta.count += more.count
    for name, part in more.measures.items():
        known = delta.measures.get(name)
        delta.measures[name] = part if known is None else known.plus(part)
    for name, samples in more.samples.items():
        delta.samples.setdefault(name, []).extend(samples)
    for name, values in more.values.items():
        delta.values.setdefault(name, []).extend(values)
    for name, count in more.counts.items():
        delta.counts[name] = delta.counts.get(name, 0) + count
