"""Where aggregates live: the `Store` contract, and what goes in and out of a store.

Everything one batch changes (aggregates, consumed position, watermarks, dedupe keys, answers, dead
letters, totals, the messages of closed windows) is committed in ONE transaction, so after a crash
the log is read again from exactly where the aggregates stand.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from aggregation import Delta, Measure, State
from parsing import Rejected
from windows import Clock, Group

KEPT_DEAD_LETTERS: Final = 10_000
LISTED_SOURCES: Final = 1_000


class StoreError(Exception):
    """The store cannot be opened as it is."""


class StoreRefused(Exception):
    """The store could not take a batch now; nothing of it is kept, and it may be tried again."""


@dataclass
class Totals:
    """What became of the events of one source.

    received = accepted + rejected + duplicates, and accepted = aggregated + late. Late ones came
    after their windows' lateness and are dead letters; revised ones corrected a closed window.
    """

    accepted: int = 0
    rejected: int = 0
    duplicates: int = 0
    late: int = 0
    revised: int = 0
    filtered: int = 0  # outside of what the pipeline asks for; not received

    @property
    def received(self) -> int:
        """Every event that was answered for."""
        return self.accepted + self.rejected + self.duplicates

    def add(self, other: "Totals") -> None:
        """Add another's counts."""
        self.accepted += other.accepted
        self.rejected += other.rejected
        self.duplicates += other.duplicates
        self.late += other.late
        self.revised += other.revised
        self.filtered += other.filtered


@dataclass
class Answer:
    """What an Idempotency-Key was answered, and a digest of the body it came with."""

    key: bytes
    body: bytes
    answer: bytes


@dataclass
class DeadLetter:
    """A rejected record as it is kept."""

    id: int
    pipeline: str
    received: int  # microseconds since the epoch
    position: int
    record: Rejected


@dataclass(frozen=True)
class StagedUpload:
    """An applied upload whose file still lies in the queue directory."""

    name: str
    position: int  # of the end of its commit in the log
    length: int


@dataclass
class Build:
    """One build of the aggregates of a pipeline: the active one, or a shadow being rebuilt.

    `id` is the position of the message in the log that asked for it; `begins` is where the name
    was put first. A shadow has been rebuilt from `origin` up to `progress`.
    """

    id: int
    name: str
    spec: str | None
    lateness: int
    begins: int
    shadow: bool = False
    origin: int = 0
    progress: int = 0
    done: int = 0  # records of the upload at `progress` that are in already
    events: int = 0
    misfits: int = 0  # old records that do not fit the spec of today


@dataclass
class Changes:
    """What one batch changes; `position` is where the log has to be read on from.

    `put` makes a build the active one of its name (dropping the one before), `drop` names a
    pipeline that is gone, `shadow` begins a rebuild, `rebuilt` notes its progress, `swap` makes it
    the active one. `deltas` are taken before all that follows them, which may be incomplete until
    then. `describe` turns a closed window into its message; without it none is sent.
    """

    position: int | None = None
    put: Build | None = None
    drop: str | None = None
    shadow: Build | None = None
    deltas: Iterable[tuple[int, str, Delta]] = ()
    clocks: dict[tuple[int, str], tuple[Clock, int]] = field(default_factory=dict)
    totals: dict[tuple[str, str], Totals] = field(default_factory=dict)
    keys: bytes = b""
    answers: list[Answer] = field(default_factory=list)
    rejected: list[tuple[str, int, int, Rejected]] = field(default_factory=list)
    replayed: list[int] = field(default_factory=list)  # dead letters that came to life
    uploads: list[StagedUpload] = field(default_factory=list)
    rebuilt: Build | None = None
    swap: Build | None = None
    describe: "Callable[[Aggregate], bytes] | None" = None
    now: int = 0

    def total(self, pipeline: str) -> Totals:
        """The counts of a pipeline, to be added to."""
        return self.totals.setdefault((pipeline, ""), Totals())

    def by_source(self, pipeline: str, source: str) -> Totals:
        """Those of one of its sources; one without a name is counted with its pipeline only."""
        return self.totals.setdefault((pipeline, source), Totals()) if source else Totals()


@dataclass
class Aggregate:
    """One window of one group."""

    pipeline: str
    window_start: int
    window_end: int
    group: list[Any]
    count: int
    revision: int
    final: bool
    state: State

    @property
    def measures(self) -> dict[str, Measure]:
        """The sums by field."""
        return self.state.measures

    @property
    def cursor(self) -> list[Any]:
        """Where the next page begins after this row."""
        return [self.window_start, self.pipeline, group_text(self.group), self.window_end]


@dataclass(frozen=True)
class AggregateQuery:
    """Which aggregates: `group` holds (pipeline, index of the group's part, value) alternatives."""

    pipeline: str | None = None
    group: tuple[tuple[tuple[str, int, str], ...], ...] = ()
    start: int | None = None
    end: int | None = None
    final: bool | None = None
    after: list[Any] | None = None
    limit: int = 100


@dataclass(frozen=True)
class TopicState:
    """What a topic holds: the offsets of its first and next message, and about how many bytes."""

    first: int
    next: int
    messages: int
    bytes: int


def group_text(group: Iterable[Any]) -> str:
    """The group as the text it is stored and paged by."""
    return msgspec.json.encode(list(group)).decode()


class Store(Protocol):
    """What the pipeline needs of a store.

    One thread, the applier's, writes: it alone calls `apply`, `clock`, `open_windows`, `cleanup`,
    `retain`, `purge`, `forget_uploads` and `checkpoint`. The rest is called by any thread.
    """

    @property
    def secret(self) -> bytes:
        """A random key made with the store, for hashes nobody outside can predict."""
        ...

    def position(self) -> int:
        """Up to where the log has been applied."""
        ...

    def apply(self, changes: Iterable[Changes]) -> None:
        """Commit all the changes in one transaction; raise StoreRefused and keep nothing."""
        ...

    def builds(self) -> list[Build]:
        """The active builds and the shadows, oldest first."""
        ...

    def clock(self, build: int, source: str) -> Clock | None:
        """The stored clock of a source, uncommitted changes included."""
        ...

    def open_windows(self, build: int) -> Iterator[tuple[Group, str, int, int]]:
        """Group, source, start and end of the windows that may still change."""
        ...

    def quiet(self, build: int, since: int, limit: int) -> list[tuple[str, int]]:
        """Sources with open windows that have been silent since then, and their last position."""
        ...

    def totals(self) -> dict[tuple[str, str], Totals]:
        """The counts by pipeline (with source `""`), and of the thousand busiest sources."""
        ...

    def seen(self) -> Iterator[bytes]:
        """The dedupe keys, packed, oldest first."""
        ...

    def answer(self, key: bytes) -> Answer | None:
        """What this idempotency key was answered."""
        ...

    def aggregates(self, query: AggregateQuery) -> list[Aggregate]:
        """A page of aggregates, ordered by window, pipeline and group."""
        ...

    def latest(self, pipeline: str) -> list[Aggregate]:
        """The latest window of each group, a thousand groups at most."""
        ...

    def dead_letters(
        self, after: int, limit: int, pipeline: str | None = None, code: str | None = None
    ) -> list[DeadLetter]:
        """Rejected records in the order they came."""
        ...

    def messages(self, topic: str, offset: int, limit: int) -> list[tuple[int, bytes]]:
        """Messages of the topic `aggregates` or `dead-letters` from an offset on."""
        ...

    def topic(self, topic: str) -> TopicState:
        """What such a topic holds."""
        ...

    def uploads(self) -> list[StagedUpload]:
        """The applied uploads whose files are kept, oldest first."""
        ...

    def forget_uploads(self, names: Iterable[str]) -> None:
        """Drop those names once their files are gone."""
        ...

    def cleanup(self, before: int, *, dry_run: bool) -> dict[str, int]:
        """Delete closed windows that ended, and dead letters that came, before that moment."""
        ...

    def retain(self, since: int, max_bytes: int) -> None:
        """Forget messages of topics that are older, or beyond that many bytes."""
        ...

    def purge(self) -> bool:
        """Delete some of what belongs to dropped builds; True while there is more."""
        ...

    def checkpoint(self) -> int:
        """Make what was applied survive a power cut; return the position that is safe."""
        ...

    def close(self) -> None:
        """Release the files; idempotent."""
        ...
