"""Where aggregates live: the `Store` contract and its SQLite implementation.

Everything one batch changes (aggregates, consumed position, watermarks, dedupe keys, answers, dead
letters, totals) is committed in ONE transaction, so after a crash the log is read again from
exactly where the aggregates stand. SQLite runs at synchronous=NORMAL: a transaction lost in a power
cut takes its position along, and the log, which was synced, brings it back. For that reason a
segment of the log may be dropped only up to what `checkpoint` returned.
"""

import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from aggregation import Delta, Measure, group_text
from parsing import Rejected
from windows import BEGINNING

SCHEMA_VERSION: Final = 1
KEPT_DEAD_LETTERS: Final = 10_000
BUSY_MILLISECONDS: Final = 2_000
CACHE_KIBIBYTES: Final = 2 * 1024
LISTED_SOURCES: Final = 1_000

_SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE windows (
    id INTEGER PRIMARY KEY, pipeline TEXT NOT NULL, window_start INTEGER NOT NULL,
    window_end INTEGER NOT NULL, group_key TEXT NOT NULL, source TEXT NOT NULL,
    count INTEGER NOT NULL, revision INTEGER NOT NULL);
CREATE UNIQUE INDEX windows_by_time
    ON windows (window_start, pipeline, group_key, window_end);
CREATE INDEX windows_by_group ON windows (pipeline, group_key, window_start);
CREATE TABLE measures (
    window_id INTEGER NOT NULL, name TEXT NOT NULL, count INTEGER NOT NULL, total REAL NOT NULL,
    rest REAL NOT NULL, least REAL NOT NULL, greatest REAL NOT NULL,
    PRIMARY KEY (window_id, name)) WITHOUT ROWID;
CREATE TABLE watermarks (
    pipeline TEXT, source TEXT, latest INTEGER NOT NULL,
    PRIMARY KEY (pipeline, source)) WITHOUT ROWID;
CREATE TABLE totals (
    pipeline TEXT, source TEXT, accepted INTEGER NOT NULL, rejected INTEGER NOT NULL,
    duplicates INTEGER NOT NULL, late INTEGER NOT NULL,
    PRIMARY KEY (pipeline, source)) WITHOUT ROWID;
CREATE TABLE seen (
    id INTEGER PRIMARY KEY AUTOINCREMENT, count INTEGER NOT NULL, keys BLOB NOT NULL);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL, body BLOB NOT NULL,
    answer BLOB NOT NULL);
CREATE INDEX answers_by_key ON answers (key);
CREATE TABLE dead_letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT, pipeline TEXT NOT NULL, received INTEGER NOT NULL,
    position INTEGER NOT NULL, line INTEGER, number INTEGER, byte_offset INTEGER NOT NULL,
    code TEXT NOT NULL, message TEXT NOT NULL, raw BLOB NOT NULL);
CREATE TABLE uploads (
    name TEXT PRIMARY KEY, position INTEGER NOT NULL, length INTEGER NOT NULL) WITHOUT ROWID;
"""

_ADD_WINDOW: Final = """
INSERT INTO windows (pipeline, window_start, window_end, group_key, source, count, revision)
VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (window_start, pipeline, group_key, window_end)
DO UPDATE SET count = count + excluded.count, revision = revision + ?
RETURNING id
"""

# Knuth's two-sum in SQL: `rest` collects what rounding takes from `total`. Together they carry 106
# bits, so the sum depends on the batches by at most 1e-30 of the magnitudes that were added.
_ADD_MEASURE: Final = """
INSERT INTO measures (window_id, name, count, total, rest, least, greatest)
VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (window_id, name) DO UPDATE SET
    count = count + excluded.count,
    total = total + excluded.total,
    rest = rest + excluded.rest
        + ((total - ((total + excluded.total) - ((total + excluded.total) - total)))
        + (excluded.total - ((total + excluded.total) - total))),
    least = min(least, excluded.least),
    greatest = max(greatest, excluded.greatest)
"""


class StoreError(Exception):
    """The store cannot be opened as it is."""


class StoreRefused(Exception):
    """The store could not take a batch now; nothing of it is kept, and it may be tried again."""


@dataclass
class Totals:
    """What became of the events of one source; received is the sum of the first three."""

    accepted: int = 0
    rejected: int = 0
    duplicates: int = 0
    late: int = 0

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
class Changes:
    """What one batch changes; `position` is where the log has to be read on from."""

    position: int
    deltas: list[tuple[str, Delta]] = field(default_factory=list)
    watermarks: dict[tuple[str, str], int] = field(default_factory=dict)
    totals: dict[tuple[str, str], Totals] = field(default_factory=dict)
    keys: bytes = b""
    answers: list[Answer] = field(default_factory=list)
    rejected: list[tuple[str, int, int, Rejected]] = field(default_factory=list)
    uploads: list[StagedUpload] = field(default_factory=list)

    def total(self, pipeline: str, source: str) -> Totals:
        """The counts of a source, to be added to."""
        return self.totals.setdefault((pipeline, source), Totals())


@dataclass
class Aggregate:
    """One window of one group."""

    pipeline: str
    window_start: int
    window_end: int
    group: list[str]
    count: int
    revision: int
    final: bool
    measures: dict[str, Measure]

    @property
    def cursor(self) -> list[Any]:
        """Where the next page begins after this row."""
        return [self.window_start, self.pipeline, group_text(tuple(self.group)), self.window_end]


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


class Store(Protocol):
    """What the pipeline needs of a store. `apply` is called by one thread, the rest by any."""

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

    def watermark(self, pipeline: str, source: str) -> int | None:
        """The stored watermark of a source."""
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

    def dead_letters(self, after: int, limit: int) -> list[DeadLetter]:
        """Rejected records in the order they came."""
        ...

    def uploads(self) -> list[StagedUpload]:
        """The applied uploads whose files are kept, oldest first."""
        ...

    def forget_uploads(self, names: Iterable[str]) -> None:
        """Drop those names once their files are gone."""
        ...

    def checkpoint(self) -> int:
        """Make what was applied survive a power cut; return the position that is safe."""
        ...

    def close(self) -> None:
        """Release the files; idempotent."""
        ...


class SQLiteStore:
    """A `Store` in one SQLite file (WAL, mode 0600)."""

    def __init__(self, path: Path, *, keep_keys: int = 1_000_000) -> None:
        """Open or create the file; raise StoreError when it cannot be used."""
        self._path = path
        self._keep_keys = keep_keys
        try:
            self._create_file()
            self._writer = self._connect()
            self._migrate()
            self._reader = self._connect()
            self._reader.execute("PRAGMA query_only = ON")
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"The database cannot be used: {error}. Check that the file named by DB_PATH is a "
                "writable SQLite database, or name another."
            ) from error
        self._reading = threading.Lock()
        self.secret: bytes = self._meta("secret")
        row = self._writer.execute("SELECT coalesce(sum(count), 0) FROM seen").fetchone()
        self._seen_keys: int = row[0]

    def _create_file(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        os.close(os.open(self._path, flags, 0o600))

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        connection.execute(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIBIBYTES}")
        return connection

    def _migrate(self) -> None:
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if version == SCHEMA_VERSION:
            return
        tables = self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version or tables:
            raise StoreError(
                f"The database has schema version {version}; this program knows {SCHEMA_VERSION}. "
                "Name another file in DB_PATH, or use the program that wrote this one."
            )
        with self._transaction():
            for statement in _SCHEMA.split(";"):
                self._writer.execute(statement)
            rows = [("secret", secrets.token_bytes(16)), ("position", 0)]
            self._writer.executemany("INSERT INTO meta VALUES (?, ?)", rows)
            self._writer.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._writer.execute("COMMIT")
        except BaseException:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise

    # --- writing ---

    def apply(self, changes: Iterable[Changes]) -> None:
        """Commit all the changes in one transaction; raise StoreRefused and keep nothing."""
        held = self._seen_keys
        with _refusing("batch"), self._transaction():
            for each in changes:
                held += self._apply(each)
            held = self._prune(held)
        self._seen_keys = held

    def _apply(self, changes: Changes) -> int:
        execute, many = self._writer.execute, self._writer.executemany
        for pipeline, delta in changes.deltas:
            self._add(pipeline, delta)
        many(
            "INSERT INTO watermarks VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET "
            "latest = max(latest, excluded.latest)",
            [(*key, latest) for key, latest in changes.watermarks.items()],
        )
        many(
            "INSERT INTO totals VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
            "accepted = accepted + excluded.accepted, rejected = rejected + excluded.rejected, "
            "duplicates = duplicates + excluded.duplicates, late = late + excluded.late",
            [
                (*key, t.accepted, t.rejected, t.duplicates, t.late)
                for key, t in changes.totals.items()
            ],
        )
        many(
            "INSERT INTO dead_letters (pipeline, received, position, line, number, byte_offset, "
            "code, message, raw) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (pipeline, received, position, r.line, r.index, r.offset, r.code, r.message, r.raw)
                for pipeline, received, position, r in changes.rejected
            ],
        )
        many(
            "INSERT INTO answers (key, body, answer) VALUES (?, ?, ?)",
            [(a.key, a.body, a.answer) for a in changes.answers],
        )
        many(
            "INSERT OR IGNORE INTO uploads VALUES (?, ?, ?)",
            [(upload.name, upload.position, upload.length) for upload in changes.uploads],
        )
        keys = len(changes.keys) // 8
        if keys:
            execute("INSERT INTO seen (count, keys) VALUES (?, ?)", (keys, changes.keys))
        execute("UPDATE meta SET value = ? WHERE name = 'position'", (changes.position,))
        return keys

    def _add(self, pipeline: str, delta: Delta) -> None:
        # A late event that opens its window is its first word, not a correction of it.
        first = delta.late if delta.late == delta.count else 1 + delta.late
        (window_id,) = self._writer.execute(
            _ADD_WINDOW,
            (
                pipeline,
                delta.window_start,
                delta.window_end,
                group_text(delta.group),
                delta.source,
                delta.count,
                first,
                delta.late,
            ),
        ).fetchone()
        self._writer.executemany(
            _ADD_MEASURE,
            [
                (window_id, name, m.count, m.total, m.rest, m.least, m.greatest)
                for name, m in delta.measures.items()
            ],
        )

    def _prune(self, held: int) -> int:
        """Forget dedupe keys, answers and dead letters beyond their bounds; return keys left."""
        execute = self._writer.execute
        while held > self._keep_keys:
            oldest, count = execute("SELECT id, count FROM seen ORDER BY id LIMIT 1").fetchone()
            if held - count < self._keep_keys:
                break
            execute("DELETE FROM seen WHERE id = ?", (oldest,))
            held -= count
        execute(
            "DELETE FROM answers WHERE id <= (SELECT max(id) FROM answers) - ?", (self._keep_keys,)
        )
        execute(
            "DELETE FROM dead_letters WHERE id <= (SELECT max(id) FROM dead_letters) - ?",
            (KEPT_DEAD_LETTERS,),
        )
        return held

    def forget_uploads(self, names: Iterable[str]) -> None:
        """Drop those names once their files are gone."""
        with _refusing("change"), self._transaction():
            self._writer.executemany(
                "DELETE FROM uploads WHERE name = ?", [(name,) for name in names]
            )

    def checkpoint(self) -> int:
        """Make what was applied survive a power cut; return the position that is safe."""
        position = self.position()
        with _refusing("checkpoint"):
            busy, _, _ = self._writer.execute("PRAGMA wal_checkpoint(FULL)").fetchone()
        return 0 if busy else position

    # --- reading ---

    def _rows(self, sql: str, parameters: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        with self._reading, _refusing("question"):
            return self._reader.execute(sql, tuple(parameters)).fetchall()

    def _meta(self, name: str) -> Any:
        sql = "SELECT value FROM meta WHERE name = ?"
        return self._writer.execute(sql, (name,)).fetchone()[0]

    def position(self) -> int:
        """Up to where the log has been applied."""
        position: int = self._rows("SELECT value FROM meta WHERE name = 'position'")[0][0]
        return position

    def watermark(self, pipeline: str, source: str) -> int | None:
        """The stored watermark of a source."""
        rows = self._rows(
            "SELECT latest FROM watermarks WHERE pipeline = ? AND source = ?", (pipeline, source)
        )
        return rows[0][0] if rows else None

    def totals(self) -> dict[tuple[str, str], Totals]:
        """The counts by pipeline (with source `""`), and of the thousand busiest sources."""
        rows = self._rows(
            "SELECT pipeline, source, accepted, rejected, duplicates, late FROM totals "
            "ORDER BY source <> '', accepted DESC LIMIT ?",
            (LISTED_SOURCES,),
        )
        return {(row[0], row[1]): Totals(*row[2:]) for row in rows}

    def seen(self) -> Iterator[bytes]:
        """The dedupe keys, packed, oldest first."""
        with closing(self._writer.execute("SELECT keys FROM seen ORDER BY id")) as cursor:
            for (keys,) in cursor:
                yield keys

    def answer(self, key: bytes) -> Answer | None:
        """What this idempotency key was answered."""
        rows = self._rows(
            "SELECT key, body, answer FROM answers WHERE key = ? ORDER BY id DESC LIMIT 1", (key,)
        )
        return Answer(*rows[0]) if rows else None

    def aggregates(self, query: AggregateQuery) -> list[Aggregate]:
        """A page of aggregates, ordered by window, pipeline and group."""
        where, parameters = ["1"], list[Any]()

        def condition(sql: str, *values: Any) -> None:
            where.append(sql)
            parameters.extend(values)

        if query.pipeline is not None:
            condition("w.pipeline = ?", query.pipeline)
        for alternatives in query.group:
            one = "w.pipeline = ? AND json_extract(w.group_key, ?) = ?"
            condition(
                f"({' OR '.join([one] * len(alternatives))})",
                *(
                    part
                    for pipeline, index, value in alternatives
                    for part in (pipeline, f"$[{index}]", value)
                ),
            )
        if query.start is not None:
            condition("w.window_start >= ?", query.start)
        if query.end is not None:
            condition("w.window_start < ?", query.end)
        if query.final is not None:
            condition(f"({_FINAL}) = ?", int(query.final))
        if query.after is not None:
            condition(
                "(w.window_start, w.pipeline, w.group_key, w.window_end) > (?, ?, ?, ?)",
                *query.after,
            )
        return self._aggregates(
            f"WHERE {' AND '.join(where)} "
            "ORDER BY w.window_start, w.pipeline, w.group_key, w.window_end LIMIT ?",
            [*parameters, query.limit],
        )

    def latest(self, pipeline: str) -> list[Aggregate]:
        """The latest window of each group, a thousand groups at most."""
        return self._aggregates(
            "WHERE w.id IN (SELECT id FROM (SELECT id, max(window_start) FROM windows "
            "WHERE pipeline = ? GROUP BY group_key LIMIT ?)) ORDER BY w.group_key",
            [pipeline, LISTED_SOURCES],
        )

    def _aggregates(self, clauses: str, parameters: list[Any]) -> list[Aggregate]:
        sql = (  # only fixed clauses are put together; what is asked for is bound
            "SELECT w.id, w.pipeline, w.window_start, w.window_end, w.group_key, w.count, "
            f"w.revision, {_FINAL} FROM windows w LEFT JOIN watermarks m "
            f"ON m.pipeline = w.pipeline AND m.source = w.source {clauses}"
        )
        # One read transaction, so that no row is seen half updated.
        with self._reading, _refusing("question"):
            self._reader.execute("BEGIN")
            try:
                rows = self._reader.execute(sql, parameters).fetchall()
                measures = self._measures([row[0] for row in rows])
            finally:
                self._reader.execute("COMMIT")
        return [
            Aggregate(row[1], row[2], row[3], msgspec.json.decode(row[4]), row[5], row[6],
                      bool(row[7]), measures.get(row[0], {}))
            for row in rows
        ]  # fmt: skip

    def _measures(self, ids: list[int]) -> dict[int, dict[str, Measure]]:
        found: dict[int, dict[str, Measure]] = {}
        for window_id, name, *figures in self._reader.execute(
            "SELECT window_id, name, count, total, rest, least, greatest FROM measures "
            "WHERE window_id IN (SELECT value FROM json_each(?))",
            (msgspec.json.encode(ids).decode(),),
        ):
            found.setdefault(window_id, {})[name] = Measure(*figures)
        return found

    def dead_letters(self, after: int, limit: int) -> list[DeadLetter]:
        """Rejected records in the order they came."""
        rows = self._rows(
            "SELECT id, pipeline, received, position, line, number, byte_offset, code, message, "
            "raw FROM dead_letters WHERE id > ? ORDER BY id LIMIT ?",
            (after, limit),
        )
        return [DeadLetter(row[0], row[1], row[2], row[3], Rejected(*row[4:])) for row in rows]

    def uploads(self) -> list[StagedUpload]:
        """The applied uploads whose files are kept, oldest first."""
        rows = self._rows("SELECT name, position, length FROM uploads ORDER BY position")
        return [StagedUpload(*row) for row in rows]

    def close(self) -> None:
        """Release the files; idempotent."""
        with self._reading:
            self._reader.close()
        self._writer.close()


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """A full, locked or damaged database, as StoreRefused."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise StoreRefused(f"The database refused a {what}: {error}.") from error


_FINAL: Final = f"w.window_end <= coalesce(m.latest, {BEGINNING})"
