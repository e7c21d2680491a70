"""The `Store` in one SQLite file.

SQLite runs in WAL mode at synchronous=FULL: what a power cut takes from it, the log would bring
back, but not under the same numbers, and those of dead letters and of messages are in the hands of
others by then. One sync for each of the applier's transactions costs little.
"""

import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from aggregation import Delta, State, evolved
from sqlite_reader import (
    SCHEMA_VERSION,
    SQLiteReader,
    aggregate_of,
    decode_state,
    refusing,
    wrong_version,
)
from storage import KEPT_DEAD_LETTERS, Changes, StoreError, StoreRefused, group_text
from windows import BEGINNING, Clock, Group

AT_ONCE: Final = 2_000  # rows closed, cleaned or purged by one statement

_SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE builds (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, spec TEXT, state TEXT NOT NULL,
    lateness INTEGER NOT NULL, begins INTEGER NOT NULL, origin INTEGER NOT NULL,
    progress INTEGER NOT NULL, done INTEGER NOT NULL, events INTEGER NOT NULL,
    misfits INTEGER NOT NULL);
CREATE UNIQUE INDEX one_of_a_kind ON builds (name, state) WHERE state <> 'dropped';
CREATE TABLE windows (
    id INTEGER PRIMARY KEY, build INTEGER NOT NULL, pipeline TEXT NOT NULL,
    window_start INTEGER NOT NULL, window_end INTEGER NOT NULL, group_key TEXT NOT NULL,
    source TEXT NOT NULL, count INTEGER NOT NULL, revision INTEGER NOT NULL,
    closed INTEGER NOT NULL DEFAULT 0, state BLOB NOT NULL);
CREATE UNIQUE INDEX windows_by_time
    ON windows (window_start, pipeline, group_key, window_end, build);
CREATE INDEX windows_by_group ON windows (build, group_key, window_start);
CREATE INDEX open_windows ON windows (build, source, window_end) WHERE closed = 0;
CREATE TABLE clocks (
    build INTEGER, source TEXT, latest INTEGER NOT NULL, floor INTEGER NOT NULL,
    watermark INTEGER NOT NULL, seen INTEGER NOT NULL, arrival INTEGER NOT NULL,
    quiet INTEGER NOT NULL, PRIMARY KEY (build, source)) WITHOUT ROWID;
CREATE INDEX speaking ON clocks (build, arrival) WHERE quiet = 0;
CREATE TABLE totals (
    pipeline TEXT, source TEXT, accepted INTEGER NOT NULL, rejected INTEGER NOT NULL,
    duplicates INTEGER NOT NULL, late INTEGER NOT NULL, revised INTEGER NOT NULL,
    filtered INTEGER NOT NULL, PRIMARY KEY (pipeline, source)) WITHOUT ROWID;
CREATE TABLE seen (
    id INTEGER PRIMARY KEY AUTOINCREMENT, count INTEGER NOT NULL, keys BLOB NOT NULL);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL, body BLOB NOT NULL,
    answer BLOB NOT NULL);
CREATE INDEX answers_by_key ON answers (key);
CREATE TABLE dead_letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT, pipeline TEXT NOT NULL, received INTEGER NOT NULL,
    position INTEGER NOT NULL, line INTEGER, number INTEGER, byte_offset INTEGER,
    code TEXT NOT NULL, message TEXT NOT NULL, raw BLOB NOT NULL, whole INTEGER NOT NULL);
CREATE TABLE closed_windows (
    id INTEGER PRIMARY KEY AUTOINCREMENT, sent INTEGER NOT NULL, value BLOB NOT NULL);
CREATE TABLE uploads (
    name TEXT PRIMARY KEY, position INTEGER NOT NULL, length INTEGER NOT NULL) WITHOUT ROWID;
"""

_CLOSE: Final = """
UPDATE windows SET closed = 1 WHERE id IN (
    SELECT id FROM windows WHERE build = ? AND source = ? AND closed = 0 AND window_end <= ?
    ORDER BY window_end LIMIT ?)
RETURNING pipeline, window_start, window_end, group_key, count, revision, state
"""

_encode_state: Final = msgspec.msgpack.Encoder().encode


class SQLiteStore(SQLiteReader):
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
        with suppress(StoreRefused):
            self.checkpoint()  # what a killed process committed may be in memory only
        self.secret: bytes = self._meta("secret")
        row = self._writer.execute("SELECT coalesce(sum(count), 0) FROM seen").fetchone()
        self._seen_keys: int = row[0]

    def _create_file(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        os.close(os.open(self._path, flags, 0o600))

    def _migrate(self) -> None:
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if version == SCHEMA_VERSION:
            return
        tables = self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version or tables:
            raise wrong_version(version)
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

    def ensure_built_in(self, lateness: dict[str, int]) -> None:
        """Let the built-in pipelines have a build each."""
        with refusing("change"), self._transaction():
            self._writer.executemany(
                "INSERT OR IGNORE INTO builds SELECT ?, ?, NULL, 'active', ?, 0, 0, 0, 0, 0, 0 "
                "WHERE NOT EXISTS (SELECT 1 FROM builds WHERE name = ? AND state = 'active')",
                [(-number, name, late, name) for number, (name, late) in
                 enumerate(lateness.items(), 1)],
            )  # fmt: skip

    # --- writing ---

    def apply(self, changes: Iterable[Changes]) -> None:
        """Commit all the changes in one transaction; raise StoreRefused and keep nothing."""
        held = self._seen_keys
        with refusing("batch"), self._transaction():
            for each in changes:
                held += self._apply(each)
            held = self._prune(held)
        self._seen_keys = held

    def _apply(self, changes: Changes) -> int:
        execute, many = self._writer.execute, self._writer.executemany
        self._change_builds(changes)
        for build, pipeline, delta in changes.deltas:
            self._add(build, pipeline, delta)
        if changes.clocks:
            many(
                "INSERT OR REPLACE INTO clocks VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (*key, clock.latest, clock.floor, watermark, clock.seen, clock.arrival,
                     clock.floor > clock.latest or clock.latest == BEGINNING)
                    for key, (clock, watermark) in changes.clocks.items()
                ],
            )  # fmt: skip
            for key, (_, watermark) in changes.clocks.items():
                self._close(*key, watermark, changes)
        many(
            "INSERT INTO totals VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
            "accepted = accepted + excluded.accepted, rejected = rejected + excluded.rejected, "
            "duplicates = duplicates + excluded.duplicates, late = late + excluded.late, "
            "revised = revised + excluded.revised, filtered = filtered + excluded.filtered",
            [
                (*key, t.accepted, t.rejected, t.duplicates, t.late, t.revised, t.filtered)
                for key, t in changes.totals.items()
            ],
        )
        many("DELETE FROM dead_letters WHERE id = ?", [(each,) for each in changes.replayed])
        many(
            "INSERT INTO dead_letters (pipeline, received, position, line, number, byte_offset, "
            "code, message, raw, whole) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [(pipeline, received, position, r.line, r.index, r.offset, r.code, r.message, r.raw,
              r.whole) for pipeline, received, position, r in changes.rejected],
        )  # fmt: skip
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
        if changes.position is not None:
            execute("UPDATE meta SET value = ? WHERE name = 'position'", (changes.position,))
        return keys

    def _add(self, build: int, pipeline: str, delta: Delta) -> None:
        execute = self._writer.execute
        if delta.steps is not None:
            self._add_session(build, pipeline, delta)
            return
        group = group_text(delta.group)
        row = execute(
            "SELECT id, state FROM windows WHERE window_start = ? AND pipeline = ? "
            "AND group_key = ? AND window_end = ? AND build = ?",
            (delta.window_start, pipeline, group, delta.window_end, build),
        ).fetchone()
        if row is None:
            state = State()
            state.add(delta)
            # A late event that opens its window is its first word, not a correction of it.
            first = delta.late if delta.late == delta.count else 1 + delta.late
            self._insert(build, pipeline, delta, group, delta.count, first, state)
            return
        state = decode_state(row[1])
        state.add(delta)
        execute(
            "UPDATE windows SET count = count + ?, revision = revision + ?, closed = 0, state = ? "
            "WHERE id = ?",
            (delta.count, delta.late, _encode_state(state), row[0]),
        )

    def _insert(
        self,
        build: int,
        pipeline: str,
        delta: Delta,
        group: str,
        count: int,
        revision: int,
        state: State,
    ) -> None:
        self._writer.execute(
            "INSERT INTO windows (build, pipeline, window_start, window_end, group_key, source, "
            "count, revision, state) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (build, pipeline, delta.window_start, delta.window_end, group, delta.source, count,
             revision, _encode_state(state)),
        )  # fmt: skip

    def _add_session(self, build: int, pipeline: str, delta: Delta) -> None:
        """Write a session in place of the stored ones it has grown out of."""
        group = group_text(delta.group)

        def load(start: int) -> tuple[State, int, int]:
            row = self._writer.execute(
                "DELETE FROM windows WHERE build = ? AND group_key = ? AND window_start = ? "
                "RETURNING state, count, revision",
                (build, group, start),
            ).fetchone()
            if row is None:  # cleaned up meanwhile
                return State(), 0, 0
            return decode_state(row[0]), row[1], row[2] - 1

        state, count, revisions = evolved(delta.steps or [], load)
        revision = 1 + revisions + delta.late
        self._insert(build, pipeline, delta, group, count, revision, state)

    def _close(self, build: int, source: str, watermark: int, changes: Changes) -> None:
        """Mark the windows the watermark has passed, and send word of each."""
        while True:
            rows = self._writer.execute(_CLOSE, (build, source, watermark, AT_ONCE)).fetchall()
            if changes.describe is not None:
                describe, now = changes.describe, changes.now
                self._writer.executemany(
                    "INSERT INTO closed_windows (sent, value) VALUES (?, ?)",
                    [(now, describe(aggregate_of(row, final=False))) for row in rows],
                )
            if len(rows) < AT_ONCE:
                return

    def _change_builds(self, changes: Changes) -> None:
        execute = self._writer.execute
        if changes.drop is not None:
            self._drop(changes.drop)
        if (put := changes.put) is not None:
            self._drop(put.name)
            execute(
                "INSERT INTO builds VALUES (?, ?, ?, 'active', ?, ?, 0, 0, 0, 0, 0)",
                (put.id, put.name, put.spec, put.lateness, put.begins),
            )
        if (new := changes.shadow) is not None:
            execute("UPDATE builds SET state = 'dropped' WHERE name = ? AND state = 'shadow'",
                    (new.name,))  # fmt: skip
            execute(
                "INSERT INTO builds VALUES (?, ?, ?, 'shadow', ?, ?, ?, ?, 0, 0, 0)",
                (new.id, new.name, new.spec, new.lateness, new.begins, new.origin, new.progress),
            )
        if (step := changes.rebuilt) is not None:
            execute(
                "UPDATE builds SET progress = ?, done = ?, events = ?, misfits = ? WHERE id = ?",
                (step.progress, step.done, step.events, step.misfits, step.id),
            )
        if (swap := changes.swap) is not None:
            execute("UPDATE builds SET state = 'dropped' WHERE name = ? AND state = 'active'",
                    (swap.name,))  # fmt: skip
            execute("UPDATE builds SET state = 'active' WHERE id = ?", (swap.id,))

    def _drop(self, name: str) -> None:
        self._writer.execute("UPDATE builds SET state = 'dropped' WHERE name = ?", (name,))
        self._writer.execute("DELETE FROM totals WHERE pipeline = ?", (name,))

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
        with refusing("change"), self._transaction():
            self._writer.executemany(
                "DELETE FROM uploads WHERE name = ?", [(name,) for name in names]
            )

    def cleanup(self, before: int, *, dry_run: bool) -> dict[str, int]:
        """Delete closed windows that ended, and dead letters that came, before that moment."""
        windows = "windows WHERE closed = 1 AND window_start < ?1 AND window_end < ?1"
        letters = "dead_letters WHERE received < ?1"
        found = {"aggregates": windows, "dead_letters": letters}
        deleted = {}
        with refusing("change"):
            for name, what in found.items():
                if dry_run:
                    sql = f"SELECT count(*) FROM {what}"
                    deleted[name] = self._writer.execute(sql, (before,)).fetchone()[0]
                else:
                    deleted[name] = self._delete(what, before)
        return deleted

    def _delete(self, what: str, *parameters: Any) -> int:
        """Delete in small transactions, so that nothing else waits for long."""
        table = what.partition(" ")[0]
        deleted = 0
        while True:
            with self._transaction():
                count = self._writer.execute(
                    f"DELETE FROM {table} WHERE id IN (SELECT id FROM {what} LIMIT {AT_ONCE})",
                    parameters,
                ).rowcount
            deleted += count
            if count < AT_ONCE:
                return deleted

    def retain(self, since: int, max_bytes: int) -> None:
        """Forget messages of topics that are older, or beyond that many bytes."""
        with refusing("change"):
            self._delete("closed_windows WHERE sent < ?", since)
            self._delete("dead_letters WHERE received < ?", since)
            state = self.topic("aggregates")
            if state.bytes > max_bytes:
                keep = state.messages * max_bytes // state.bytes
                self._delete("closed_windows WHERE id < ?", state.next - keep)

    def purge(self) -> bool:
        """Delete some of what belongs to dropped builds; True while there is more."""
        execute = self._writer.execute
        with refusing("change"):
            row = execute("SELECT id FROM builds WHERE state = 'dropped' LIMIT 1").fetchone()
            if row is None:
                return False
            with self._transaction():
                rows = execute(
                    "DELETE FROM windows WHERE id IN (SELECT id FROM windows WHERE build = ? "
                    f"LIMIT {AT_ONCE})", row,
                ).rowcount  # fmt: skip
                clocks = execute(
                    "DELETE FROM clocks WHERE build = ? AND source IN (SELECT source FROM clocks "
                    f"WHERE build = ? LIMIT {AT_ONCE})", (*row, *row),
                ).rowcount  # fmt: skip
                if rows < AT_ONCE and clocks < AT_ONCE:
                    execute("DELETE FROM builds WHERE id = ?", row)
        return True

    def checkpoint(self) -> int:
        """Move what was applied from the journal into the database; return the position there.

        It waits for no reader; while one holds on to what was before, the position is 0.
        """
        position = self.position()
        with refusing("checkpoint"):
            sql = "PRAGMA wal_checkpoint(PASSIVE)"
            busy, frames, moved = self._writer.execute(sql).fetchone()
        return position if not busy and frames == moved else 0

    # --- what the writer reads, its own changes included ---

    def clock(self, build: int, source: str) -> Clock | None:
        """The stored clock of a source, uncommitted changes included."""
        with refusing("question"):
            row = self._writer.execute(
                "SELECT latest, floor, seen, arrival FROM clocks WHERE build = ? AND source = ?",
                (build, source),
            ).fetchone()
        return None if row is None else Clock(*row)

    def open_windows(self, build: int) -> Iterator[tuple[Group, str, int, int]]:
        """Group, source, start and end of the windows that may still change."""
        lateness = self._writer.execute(
            "SELECT lateness FROM builds WHERE id = ?", (build,)
        ).fetchone()
        if lateness is None:
            return
        sql = "SELECT group_key, source, window_start, window_end FROM windows w WHERE "
        if lateness[0]:  # closed ones may still be revised
            sql += (
                "build = ?1 AND (closed = 0 OR window_end + ?2 > (SELECT watermark FROM clocks c "
                "WHERE c.build = w.build AND c.source = w.source))"
            )
        else:
            sql += "build = ?1 AND closed = 0 AND ?2 = 0"
        with closing(self._writer.execute(sql, (build, *lateness))) as cursor:
            for group, source, start, end in cursor:
                yield tuple(msgspec.json.decode(group)), source, start, end

    def _meta(self, name: str) -> Any:
        sql = "SELECT value FROM meta WHERE name = ?"
        return self._writer.execute(sql, (name,)).fetchone()[0]

    def seen(self) -> Iterator[bytes]:
        """The dedupe keys, packed, oldest first."""
        with closing(self._writer.execute("SELECT keys FROM seen ORDER BY id")) as cursor:
            for (keys,) in cursor:
                yield keys

    def close(self) -> None:
        """Release the files; idempotent."""
        super().close()
        self._writer.close()
