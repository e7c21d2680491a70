"""When an event counts, and when it came too late: windows, watermarks, sessions, bounded groups.

Pure logic: no I/O and no clock, and everything is decided event by event in the order of the log.
So a replay gives the same rows at any speed, however the events were batched. All times are
integer microseconds since the epoch.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from math import gcd
from typing import Any, Final, Literal

MICROSECONDS: Final = 1_000_000
BEGINNING: Final = -(2**62)  # of a source that has not spoken yet
FOREVER: Final = 2**62  # the end of a window that never closes
REMEMBERED_SOURCES: Final = 20_000  # clocks held in memory; the others are in the store
MAX_OVERLAP: Final = 360  # windows that one event may fall into
OTHER: Final = "(other)"  # every part of the group that takes what is beyond MAX_KEYS
IDLE_SECONDS: Final = 60.0
Kind = Literal["tumbling", "sliding", "session", "none"]


def _micros(what: str, seconds: float, least: float = 0.001) -> int:
    if not least <= seconds <= 366 * 86_400:
        raise ValueError(
            f"{what} of {seconds} s was asked for; sizes from {least:g} s to a year are possible."
        )
    return round(seconds * MICROSECONDS)


@dataclass(frozen=True)
class Window:
    """How a stream is cut. Windows are aligned to the epoch, hold their start but not their end.

    Sliding windows are put together from panes (the greatest common divisor of size and slide), so
    an event is summed up once however many windows it falls into. `revises_for_ever` counts a late
    event in its window however late it is; otherwise one that comes more than `lateness` after the
    watermark passed its window's end is too late.
    """

    kind: Kind
    size: int = 0
    slide: int = 0
    gap: int = 0
    out_of_order: int = 0
    lateness: int = 0
    idle: int = round(IDLE_SECONDS * MICROSECONDS)
    revises_for_ever: bool = False
    pane: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.kind in ("tumbling", "sliding"):
            object.__setattr__(self, "pane", gcd(self.size, self.slide))

    @classmethod
    def of(
        cls,
        kind: Kind,
        size_seconds: float | None = None,
        slide_seconds: float | None = None,
        gap_seconds: float | None = None,
        out_of_order_seconds: float = 0,
        allowed_lateness_seconds: float = 0,
        idle_timeout_seconds: float = IDLE_SECONDS,
        *,
        revises_for_ever: bool = False,
    ) -> "Window":
        """Check and build; raise ValueError with a sentence."""
        given = {"size_seconds": size_seconds, "slide_seconds": slide_seconds,
                 "gap_seconds": gap_seconds}  # fmt: skip
        needed = {"tumbling": {"size_seconds"}, "sliding": {"size_seconds", "slide_seconds"},
                  "session": {"gap_seconds"}, "none": set[str]()}[kind]  # fmt: skip
        found = {name for name, value in given.items() if value is not None}
        if found != needed:
            raise ValueError(
                f"A window of kind {kind} takes {' and '.join(sorted(needed)) or 'no size'}; "
                f"given: {', '.join(sorted(found)) or 'nothing'}."
            )
        size = _micros("A window", size_seconds) if size_seconds is not None else 0
        slide = _micros("A slide", slide_seconds) if slide_seconds is not None else size
        if slide > size:
            raise ValueError(
                f"A window of {size_seconds} s cannot slide by {slide_seconds} s: events between "
                f"two windows would be lost. Choose a slide of at most {size_seconds} s."
            )
        if size and -(-size // slide) > MAX_OVERLAP:
            raise ValueError(
                f"Each event would fall into {-(-size // slide):,} windows; at most {MAX_OVERLAP} "
                "are possible. Choose a larger slide."
            )
        return cls(
            kind,
            size,
            slide,
            _micros("A gap", gap_seconds) if gap_seconds is not None else 0,
            _micros("An out-of-order bound", out_of_order_seconds, 0),
            _micros("A lateness", allowed_lateness_seconds, 0),
            _micros("An idle timeout", idle_timeout_seconds),
            revises_for_ever,
        )

    @property
    def overlap(self) -> int:
        """How many windows an event may fall into."""
        return -(-self.size // self.slide) if self.slide else 1

    def starts(self, pane: int) -> range:
        """The starts of the windows that hold this pane."""
        begin = pane * self.pane
        first = -(-(begin + self.pane - self.size) // self.slide) * self.slide
        return range(first, begin // self.slide * self.slide + 1, self.slide)

    def last_closed(self, watermark: int) -> int:
        """The latest end of a window that this watermark has passed."""
        return (watermark - self.size) // self.slide * self.slide + self.size


class Clock:
    """How far the event time of one source has come.

    `latest` is its greatest event time, `floor` what an idle timeout raised the watermark to;
    `seen` and `arrival` are the log's position and the wall clock of its last event.
    `open_from` is the first pane all of whose windows are open, `next_close` the event time that
    closes a window or ends its lateness: what the group-by loops look at.
    """

    __slots__ = ("arrival", "floor", "latest", "next_close", "open_from", "seen")

    def __init__(
        self, latest: int = BEGINNING, floor: int = BEGINNING, seen: int = 0, arrival: int = 0
    ) -> None:
        self.latest = latest
        self.floor = floor
        self.seen = seen
        self.arrival = arrival
        self.open_from = self.next_close = BEGINNING


@dataclass(slots=True)
class Session:
    """A session that may still grow.

    `past` is how it came about, in the order of the log: ("load", the start of its row in the
    store), ("add", columns of values), ("join", the past of a session that turned out to be the
    same). `columns` takes the values of the events that come now.
    """

    start: int
    end: int
    source: str
    past: list[tuple[str, Any]]
    columns: tuple[list[Any], ...] | None = None
    late: int = 0
    joined: bool = False  # it is part of another now

    def close_columns(self) -> list[tuple[str, Any]]:
        """Let the past reach up to now, and return it."""
        if self.columns is not None:
            self.past.append(("add", self.columns))
            self.columns = None
        return self.past


Group = tuple[object, ...]


class Windows:
    """The window state of one projection: clocks by source, groups that hold state, sessions.

    At most `max_keys` groups may have a window that can still change. What would open one more is
    counted in the group `(other)`, so that nothing is lost, sums over all groups stay right, and
    memory is bounded; a group's place is free again once its windows are closed. Not thread-safe.
    """

    def __init__(
        self,
        window: Window,
        load: Callable[[str], Clock | None],
        *,
        max_keys: int = 100_000,
    ) -> None:
        self.window = window
        self.max_keys = max_keys
        self.clocks: OrderedDict[str, Clock] = OrderedDict()
        self.live: dict[Group, int] = {}  # group -> when its last window can no longer change
        self.sessions: dict[Group, list[Session]] = {}
        self.overflowed = 0  # events counted in (other) since this was made
        self._load = load
        self._expiring: dict[str, list[tuple[int, int, Group]]] = {}
        self._entries = count()  # so that groups are never compared
        self._touched: dict[str, Clock] = {}

    # --- clocks ---

    def clock(self, source: str) -> Clock:
        """The clock of a source, from memory or from what is stored."""
        clock = self.clocks.get(source)
        if clock is None:
            clock = self._touched.get(source) or self._load(source) or Clock()
            self.clocks[source] = clock
            self.moved(clock)
        return clock

    def watermark(self, clock: Clock) -> int:
        """Up to where the source is complete."""
        if clock.latest == BEGINNING:
            return clock.floor
        return max(clock.latest - self.window.out_of_order, clock.floor)

    def moved(self, clock: Clock) -> None:
        """Derive what the loops look at, after `latest` or `floor` changed."""
        window = self.window
        if not window.pane or self.watermark(clock) == BEGINNING:
            return
        watermark = self.watermark(clock)
        closed = window.last_closed(watermark)
        ended = window.last_closed(watermark - window.lateness) + window.lateness
        clock.open_from = closed // window.pane
        clock.next_close = min(closed, ended) + window.slide + window.out_of_order

    def advance(self, clock: Clock, source: str, moment: int) -> None:
        """Note an event time; the watermark never goes back."""
        if moment > clock.latest:
            clock.latest = moment
            if moment >= clock.next_close:
                self.passed(clock, source)

    def passed(self, clock: Clock, source: str) -> None:
        """The watermark has passed the end of a window: free what can no longer change."""
        self.moved(clock)
        self.release(source, self.watermark(clock))

    def idle(self, source: str, seen: int) -> bool:
        """Close the windows of a source that was quiet; False when it has spoken since `seen`."""
        clock = self.clock(source)
        if clock.seen != seen or clock.latest == BEGINNING:
            return False
        window = self.window
        if window.kind == "session":
            clock.floor = max(clock.floor, clock.latest + window.gap)
        elif window.pane:
            last = clock.latest // window.slide * window.slide
            clock.floor = max(clock.floor, last + window.size)
        self.passed(clock, source)
        self._touched[source] = clock
        return True

    def touch(self, source: str) -> None:
        """The state of this clock has to be stored with the batch."""
        self._touched[source] = self.clock(source)

    def take_touched(self) -> dict[str, Clock]:
        """The clocks that changed since the last call."""
        touched, self._touched = self._touched, {}
        while len(self.clocks) > REMEMBERED_SOURCES:
            self.clocks.popitem(last=False)
        return touched

    # --- lateness ---

    def late_starts(self, clock: Clock, pane: int) -> tuple[int, list[int]]:
        """Of the windows that hold a pane: how many are beyond lateness, and which are revised.

        The first are the oldest; when they are all, the event is too late.
        """
        window, watermark = self.window, self.watermark(clock)
        cut, revised = 0, list[int]()
        if not window.pane:
            return cut, revised
        for start in window.starts(pane):
            end = start + window.size
            if end > watermark:
                break
            if window.revises_for_ever or end + window.lateness > watermark:
                revised.append(start)
            else:
                cut += 1
        return cut, revised

    def expiry(self, pane: int) -> int:
        """When the last window that holds this pane can no longer change."""
        window = self.window
        if not window.pane:
            return FOREVER
        last = pane * window.pane // window.slide * window.slide
        return last + window.size + window.lateness

    # --- groups that hold state ---

    def place(self, group: Group, source: str, expiry: int, watermark: int) -> bool:
        """Whether a group may hold state until then; False: count it in `(other)`.

        A correction of windows that can no longer open takes no place.
        """
        known = self.live.get(group)
        if known is not None:
            if expiry > known:
                self.live[group] = expiry
            return True
        if expiry <= watermark:
            return True
        if len(self.live) >= self.max_keys:
            self.overflowed += 1
            return False
        self.live[group] = expiry
        if expiry != FOREVER:
            heap = self._expiring.setdefault(source, [])
            heapq.heappush(heap, (expiry, next(self._entries), group))
        return True

    def release(self, source: str, watermark: int) -> None:
        """Free the groups of a source whose windows can no longer change."""
        heap = self._expiring.get(source)
        if heap is None:
            return
        while heap and heap[0][0] <= watermark:
            group = heapq.heappop(heap)[2]
            expiry = self.live[group]
            if expiry > watermark:
                heapq.heappush(heap, (expiry, next(self._entries), group))
                continue
            del self.live[group]
            self.sessions.pop(group, None)
        if not heap:
            del self._expiring[source]

    # --- sessions ---

    def session(self, group: Group, source: str, moment: int) -> tuple[Group, Session] | None:
        """The session this event belongs to, joined and grown by it; None when it is too late."""
        window = self.window
        watermark = self.watermark(self.clock(source))
        start, end = moment, moment + window.gap
        held = self.sessions.get(group, [])
        if len(held) > 1:  # let go of those that can no longer change
            held[:] = [each for each in held if each.end + window.lateness > watermark]
        joined = sorted(
            (each for each in held if each.start < end and start < each.end),
            key=lambda each: each.start,
        )
        for each in joined:
            start, end = min(start, each.start), max(end, each.end)
        expiry = end + window.lateness
        if expiry <= watermark:
            return None
        if not is_other(group) and not self.place(group, source, expiry, watermark):
            if source:  # its own clock: this group is of every source
                self.advance(self.clock(OTHER), OTHER, moment - window.gap)
            return self.session(other(len(group)), OTHER if source else "", moment)
        if not joined:
            session = Session(start, end, source, [])
            self.sessions.setdefault(group, held).append(session)
            return group, session
        session = joined[0]
        session.late += any(each.end <= watermark for each in joined)
        for each in joined[1:]:
            session.close_columns().append(("join", each.close_columns()))
            session.late += each.late
            each.joined = True
            held.remove(each)
        session.start, session.end = start, end
        return group, session

    # --- after a start, or a refused batch ---

    def restore(self, rows: Iterable[tuple[Group, str, int, int]]) -> None:
        """Take over the open windows of the store: group, source, start, end of each."""
        window = self.window
        latest: dict[Group, tuple[int, str]] = {}
        for group, source, start, end in rows:
            watermark = self.watermark(self.clock(source))
            expiry = FOREVER if end == FOREVER else end + window.lateness
            if expiry <= watermark:
                continue
            if window.kind == "session":
                session = Session(start, end, source, [("load", start)])
                self.sessions.setdefault(group, []).append(session)
            if is_other(group):
                continue
            if expiry > latest.get(group, (BEGINNING, ""))[0]:
                latest[group] = (expiry, source)
        for group, (expiry, source) in latest.items():
            self.live[group] = expiry
            if expiry != FOREVER:
                entry = (expiry, next(self._entries), group)
                heapq.heappush(self._expiring.setdefault(source, []), entry)


def is_other(group: Group) -> bool:
    """Whether this is the group that takes what is beyond MAX_KEYS."""
    return bool(group) and all(part == OTHER for part in group)


def other(parts: int) -> Group:
    """The group that takes what is beyond MAX_KEYS."""
    return (OTHER,) * max(parts, 1)
