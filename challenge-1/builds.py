"""Builds: the aggregates of a pipeline in the making, live from the log or anew beside the old.

A build is a projection, its window state, and its rows in the store. The live one takes every
batch as it comes; a `Rebuilding` reads the log again into a shadow, a piece at a time, and is
swapped in when it has reached the place where the live one stands. Neither does anything else than
fold the log in its order, so both come to the same rows.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

from aggregation import Delta
from batches import BATCH, IDLE, UPLOAD, Batch, decode_batch, decode_idle, decode_upload
from frames import Message
from parsing import KEPT_BYTES, Decoder, Rejected
from projection import Projection
from spool import MessageQueue
from storage import Build, Changes, Store
from uploads import is_marked, read_upload
from windows import Windows

REBUILD_EVENTS: Final = 8_000  # of the old log in one transaction
FOLDED_ROWS: Final = 24_000  # of windows that are held at once
LATE: Final = "The event came after the allowed lateness of all its windows."


@dataclass
class Live:
    """A build at work."""

    build: Build
    projection: Projection
    decoder: Decoder
    windows: Windows

    @classmethod
    def of(cls, build: Build, projection: Projection, store: Store, max_keys: int) -> "Live":
        """Take up the state that is stored."""
        windows = Windows(projection.window, partial(store.clock, build.id), max_keys=max_keys)
        windows.restore(store.open_windows(build.id))
        return cls(build, projection, Decoder(projection), windows)

    def note(self, spoken: dict[str, tuple[int, int]]) -> None:
        """Remember which sources have spoken, and where in the log and when they did so last."""
        for source, (end, arrival) in spoken.items():
            clock = self.windows.clock(source)
            clock.seen, clock.arrival = end, arrival
            self.windows.touch(source)

    def idle(self, entries: list[tuple[str, str, int]]) -> None:
        """Close the windows of the sources of this pipeline that have been quiet."""
        for name, source, seen in entries:
            if name == self.build.name:
                self.windows.idle(source, seen)

    def take_clocks(self, changes: Changes) -> None:
        """The clocks that moved belong to these changes."""
        windows = self.windows
        for source, clock in windows.take_touched().items():
            changes.clocks[self.build.id, source] = (clock, windows.watermark(clock))


@dataclass
class Chunk:
    """Events of one build that are folded together, and the batches they came in."""

    live: Live
    events: list[Any] = field(default_factory=list)
    batches: list[tuple[list[Any], list[int] | None, Batch, int]] = field(default_factory=list)
    spoken: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, events: list[Any], batch: Batch, end: int, kept: list[int] | None = None) -> None:
        """Take the events of a batch; `kept` are their places in it where some were left out."""
        if events:
            sources = self.live.projection.sources
            for source in sources(events) if sources else ("",):
                self.spoken[source] = (end, batch.arrival)
            self.events += events
            self.batches.append((events, kept, batch, end))

    def fold(self, changes: Changes) -> None:
        """Add the outcome to the changes: worked out, and complete, while their deltas are taken.

        So an event that falls into hundreds of windows costs time, but no memory.
        """
        changes.deltas = chain(changes.deltas, self._fold(changes))

    def _fold(self, changes: Changes) -> Iterator[tuple[int, str, Delta]]:
        live, events = self.live, self.events
        build, projection = live.build, live.projection
        live.note(self.spoken)
        dropped: list[Any] = []
        total = changes.total(build.name)
        at_once = max(1, FOLDED_ROWS // projection.window.overlap)
        for start in range(0, len(events), at_once):
            folded = projection.fold(events[start : start + at_once], live.windows)
            for delta in folded.deltas:
                yield build.id, build.name, delta
            dropped += folded.dropped
            total.revised += folded.revised
        live.take_clocks(changes)
        total.late += len(dropped)
        if projection.sources:
            for source, count in Counter(projection.sources(events)).items():
                changes.by_source(build.name, source).accepted += count
            for source, count in Counter(projection.sources(dropped)).items():
                changes.by_source(build.name, source).late += count
        if dropped:
            self._bury(dropped, changes)
        self.events, self.batches, self.spoken = [], [], {}

    def _bury(self, dropped: list[Any], changes: Changes) -> None:
        """Keep the too late as dead letters, with the bytes they came in."""
        late = {id(event) for event in dropped}
        for events, kept, batch, end in self.batches:
            lines: list[bytes] = []
            for number, event in enumerate(events):
                if id(event) not in late:
                    continue
                lines = lines or batch.body.split(b"\n")
                raw = lines[number if kept is None else kept[number]]
                letter = Rejected(
                    None, None, None, "late", LATE, raw[:KEPT_BYTES], len(raw) <= KEPT_BYTES
                )
                changes.rejected.append((batch.pipeline, batch.arrival, end, letter))


def unskipped(upload_skip: bytes, first: int, count: int) -> list[int] | None:
    """The places of a staged batch that are no duplicates; None when all are."""
    if not upload_skip:
        return None
    kept = [i for i in range(count) if not is_marked(upload_skip, first + i)]
    return None if len(kept) == count else kept


class Rebuilding:
    """A shadow on its way from `origin` to where the live build stands.

    Progress is stored with the rows, so a killed process goes on where it was. Events that do not
    fit the spec of today are counted as misfits; late ones are left out without a second letter.
    """

    def __init__(
        self,
        build: Build,
        projection: Projection,
        store: Store,
        queue: MessageQueue,
        uploads: Path,
        max_keys: int,
    ) -> None:
        self.build = build
        self.live = Live.of(build, projection, store, max_keys)
        self._queue = queue
        self._uploads = uploads
        self._pieces: Iterator[Changes | None] | None = None

    def step(self, until: int) -> Changes | None:
        """The changes of the next piece up to `until`; None when it is reached."""
        if self._pieces is None:
            self._pieces = self._read(until)
        piece = next(self._pieces, None)
        if piece is None:
            self._pieces = None
        return piece

    def _read(self, until: int) -> Iterator[Changes]:
        build = self.build
        chunk = Chunk(self.live)
        for message in self._queue.read(build.progress, until):
            if message.kind == UPLOAD:
                yield from self._upload(message, chunk)
            elif message.kind == BATCH:
                batch = decode_batch(message.payload)
                if batch.pipeline == build.name:
                    self._take(chunk, batch, message.end, b"")
            elif message.kind == IDLE:
                self._fold_into(chunk, idle := Changes())
                yield self._noted(idle)
                self.live.idle(decode_idle(message.payload).sources)
                changes = Changes()
                self.live.take_clocks(changes)
                build.progress = message.end
                yield self._noted(changes)
                continue
            build.progress, build.done = message.end, 0
            if len(chunk.events) >= REBUILD_EVENTS:
                self._fold_into(chunk, changes := Changes())
                yield self._noted(changes)
        build.progress = max(build.progress, until)
        self._fold_into(chunk, changes := Changes())
        yield self._noted(changes)

    def _upload(self, message: Message, chunk: Chunk) -> Iterator[Changes]:
        upload = decode_upload(message.payload)
        build = self.build
        if upload.pipeline != build.name:
            return
        self._fold_into(chunk, changes := Changes())
        yield self._noted(changes)
        try:
            for batch in read_upload(self._uploads / upload.name):
                if batch.first < build.done:
                    continue
                self._take(chunk, batch, message.end, upload.skip)
                build.done = batch.first + batch.accepted + batch.filtered
                if len(chunk.events) >= REBUILD_EVENTS:
                    self._fold_into(chunk, changes := Changes())
                    yield self._noted(changes)
        except FileNotFoundError:
            return  # its file has been retained away; the log names it still

    def _take(self, chunk: Chunk, batch: Batch, end: int, skip: bytes) -> None:
        decoder = self.live.decoder
        count = batch.accepted + batch.filtered
        kept = unskipped(skip, batch.first, count)
        try:
            events = decoder.accepted(batch.body, batch.arrival)
        except ValueError:  # of an older spec of this name
            lines = batch.body.split(b"\n")
            places = range(len(lines)) if kept is None else kept
            events, kept = [], []
            for place in places:
                try:
                    events += decoder.accepted(lines[place], batch.arrival)
                    kept.append(place)
                except ValueError:
                    self.build.misfits += 1
        else:
            if kept is not None:
                events = [events[place] for place in kept]
        self.build.events += len(events)
        chunk.add(events, batch, end, kept)

    def _fold_into(self, chunk: Chunk, changes: Changes) -> None:
        counted = Changes()  # what was counted and buried the first time
        chunk.fold(counted)
        changes.deltas, changes.clocks = counted.deltas, counted.clocks

    def _noted(self, changes: Changes) -> Changes:
        build = self.build
        changes.rebuilt = Build(**vars(build))
        return changes
