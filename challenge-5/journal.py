"""The store: every task, every transition, in one SQLite file. What is not here has not happened.

One writer (the engine's thread), one transaction per turn, so a hundred tasks share an fsync. Rows
go in by statements of many rows: each statement gives the interpreter lock away once, not once per
row. Readers of other threads have a connection of their own and see committed states only.

durability  survives a crash of the process   survives a power cut
full        everything that was visible       everything that was visible (fsync before visible)
normal      everything that was visible       all but the last moments; never a torn file
off         all but the last 20 ms            nothing is promised, the file may be torn
"""

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from errors import StoreUnavailable
from holder import Holder
from records import Batch, Job
from store import KEPT_LINES, Durability, Filter, Recovered
from tasks import LIVE, RetryPolicy

SCHEMA_VERSION = 1
CHECKPOINT_PAGES = 4_000  # 16 MB of log between checkpoints
TASK_COLUMNS = (
    "seq", "id", "name", "kind", "priority", "state", "created", "since", "run_at", "started",
    "finished", "timeout", "retry", "run", "attempts", "crashes", "positionally", "idem_key",
    "digest", "error", "progress",
)  # fmt: skip
CHANGING = (
    "state", "since", "run_at", "started", "finished", "run", "attempts", "crashes", "error",
    "progress",
)  # fmt: skip
SCHEMA = """
CREATE TABLE task (
  seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL, kind TEXT NOT NULL,
  priority INTEGER NOT NULL, state TEXT NOT NULL, created REAL NOT NULL, since REAL NOT NULL,
  run_at REAL, started REAL, finished REAL, timeout REAL, retry TEXT, run INTEGER NOT NULL,
  attempts INTEGER NOT NULL, crashes INTEGER NOT NULL, positionally INTEGER NOT NULL,
  idem_key TEXT, digest BLOB, error TEXT, progress TEXT);
CREATE UNIQUE INDEX task_key ON task (idem_key) WHERE idem_key IS NOT NULL;
CREATE TABLE call (seq INTEGER PRIMARY KEY, fn BLOB NOT NULL, args BLOB NOT NULL);
CREATE TABLE result (seq INTEGER PRIMARY KEY, value BLOB NOT NULL, expires REAL);
CREATE INDEX result_expires ON result (expires) WHERE expires IS NOT NULL;
CREATE TABLE dep (
  child INTEGER NOT NULL, position INTEGER NOT NULL, parent INTEGER NOT NULL,
  PRIMARY KEY (child, position)) WITHOUT ROWID;
CREATE INDEX dep_parent ON dep (parent);
CREATE TABLE event (
  eid INTEGER PRIMARY KEY AUTOINCREMENT, seq INTEGER NOT NULL, ts REAL NOT NULL, from_state TEXT,
  to_state TEXT NOT NULL, reason TEXT, worker INTEGER);
CREATE INDEX event_seq ON event (seq);
CREATE TABLE note (seq INTEGER NOT NULL, ts REAL NOT NULL, line TEXT NOT NULL);
CREATE INDEX note_seq ON note (seq);
"""
_LIVE = "(" + ", ".join(f"'{state}'" for state in sorted(LIVE)) + ")"


class _Rows:
    """A statement for many rows at once, prepared for a few sizes."""

    SIZES = (64, 16, 4, 1)

    def __init__(self, before: str, width: int, after: str = "", zeros: int = 0) -> None:
        one = "(" + ", ".join("?" * width + "0" * zeros) + ")"
        self._texts = {n: f"{before} {', '.join([one] * n)} {after}" for n in self.SIZES}

    def write(self, connection: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> int:
        """Execute for all rows; return how many were changed."""
        position, changed = 0, 0
        for size in self.SIZES:
            while len(rows) - position >= size:
                values: list[Any] = []
                for row in rows[position : position + size]:
                    values += row
                changed += connection.execute(self._texts[size], values).rowcount
                position += size
        return changed


_INSERT_TASK = _Rows("INSERT INTO task VALUES", len(TASK_COLUMNS))
# Most tasks are plain, and each value that need not be bound saves a tenth of a microsecond.
_INSERT_PLAIN_TASK = _Rows(
    "INSERT INTO task (seq, id, name, kind, priority, state, created, since, timeout, run, "
    "attempts, crashes, positionally) VALUES",
    9,
    zeros=4,
)
_INSERT_CALL = _Rows("INSERT INTO call VALUES", 3)
_INSERT_DEP = _Rows("INSERT INTO dep VALUES", 3)
_INSERT_RESULT = _Rows("INSERT OR REPLACE INTO result VALUES", 3)
_INSERT_EVENT = _Rows("INSERT INTO event (seq, ts, from_state, to_state, reason, worker) VALUES", 6)
_INSERT_NOTE = _Rows("INSERT INTO note VALUES", 3)
_UPDATE_TASK = _Rows(
    "UPDATE task SET "
    + ", ".join(f"{name} = new.column{n}" for n, name in enumerate(CHANGING, 3))
    + " FROM (VALUES",
    len(CHANGING) + 2,
    ") AS new WHERE task.seq = new.column1 AND task.state = new.column2",
)
_UPDATE_PLAIN_TASK = _Rows(
    "UPDATE task SET state = new.column3, since = new.column4, started = new.column5, "
    "finished = new.column6, attempts = new.column7, error = NULL FROM (VALUES",
    7,
    ") AS new WHERE task.seq = new.column1 AND task.state = new.column2",
)


class SQLiteStore:
    """The store in one file beside its log; memory does not grow with it."""

    def __init__(self, path: str | Path, durability: Durability = "full", *, private: bool = False):
        """`private`: the file goes away at close, so no write of it has to reach the disk."""
        self.path = Path(path)
        self.durability = durability
        self.lasting = not private
        self._holder: Holder | None = None
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._reading = threading.Lock()
        self._files: dict[Path, tuple[int, int]] = {}  # that are to stay where they are

    # --- the engine's thread ---

    def open(self) -> Recovered:
        """Lock the file, lay out a new one, and read what is unfinished."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._holder = Holder(self.path)
        try:
            with _private_files():
                self._writer = self._connect()
            recovered = self._recover(self._writer)
        except sqlite3.Error as error:
            self.close()
            raise StoreUnavailable(
                f"The database {self.path.name} cannot be used: {error}. Give another path, or "
                "restore the file."
            ) from error
        except BaseException:
            self.close()
            raise
        if self.lasting:
            files = (self.path, Path(f"{self.path}-wal"))
            self._files = {each: _identity(each) for each in files}
        return recovered

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        synchronous = self.durability if self.lasting else "OFF"
        connection.execute("PRAGMA busy_timeout = 5000")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        connection.execute("PRAGMA temp_store = MEMORY")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = 1; COMMIT;")
        elif version != SCHEMA_VERSION:
            connection.close()
            raise StoreUnavailable(
                f"The database {self.path.name} has layout {version}; this program knows "
                f"{SCHEMA_VERSION}. Use the program that wrote it, or another path."
            )
        return connection

    def _recover(self, connection: sqlite3.Connection) -> Recovered:
        (last,) = connection.execute(
            "SELECT max(coalesce((SELECT max(seq) FROM task), 0), "
            "coalesce((SELECT max(seq) FROM event), 0))"
        ).fetchone()
        live = connection.execute(
            "SELECT seq, kind, priority, state, run_at FROM task "
            f"WHERE state IN {_LIVE} ORDER BY seq"
        ).fetchall()
        edges = connection.execute(
            "SELECT dep.child, dep.parent, mother.state FROM task AS young "
            "JOIN dep ON dep.child = young.seq JOIN task AS mother ON mother.seq = dep.parent "
            "WHERE young.state = 'pending'"
        ).fetchall()
        return Recovered(last + 1, _count(connection), live, edges)

    def commit(self, batch: Batch) -> None:
        """One transaction; also refused when the file is not where it was."""
        connection = self._open_writer()
        self._check_files()
        connection.execute("BEGIN IMMEDIATE")
        try:
            self._write(connection, batch)
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            raise

    def _check_files(self) -> None:
        """SQLite goes on writing to files that were removed, where the next start finds nothing."""
        for path, identity in self._files.items():
            if _identity(path) != identity:
                raise StoreUnavailable(
                    f"The file {path.name} was removed or replaced while it was in use. Put it "
                    "back, or restart with a new one."
                )

    def _write(self, connection: sqlite3.Connection, batch: Batch) -> None:
        if batch.tasks:
            plain = [job for job in batch.tasks if _is_plain(job) and _is_new(job)]
            _INSERT_PLAIN_TASK.write(connection, [_plain_task_row(job) for job in plain])
            if len(plain) < len(batch.tasks):
                rest = [job for job in batch.tasks if not (_is_plain(job) and _is_new(job))]
                _INSERT_TASK.write(connection, [_task_row(job) for job in rest])
            _INSERT_CALL.write(connection, [(job.seq, job.fn, job.args) for job in batch.tasks])
        if batch.edges:
            _INSERT_DEP.write(connection, batch.edges)
        if batch.changed:
            jobs = batch.changed.values()
            plain = [job for job in jobs if _is_plain(job)]
            changed = _UPDATE_PLAIN_TASK.write(connection, [_plain_row(job) for job in plain])
            if len(plain) < len(jobs):
                rest = [job for job in jobs if not _is_plain(job)]
                changed += _UPDATE_TASK.write(connection, [_change_row(job) for job in rest])
            if changed != len(jobs):
                raise StoreUnavailable(
                    "The stored tasks are not in the states they were left in: somebody else "
                    "has written to the database."
                )
        for seq in batch.dropped_results:
            connection.execute("DELETE FROM result WHERE seq = ?", (seq,))
        if batch.results:
            _INSERT_RESULT.write(connection, [(s, *kept) for s, kept in batch.results.items()])
        if batch.events:
            _INSERT_EVENT.write(connection, batch.events)
        if batch.notes:
            _INSERT_NOTE.write(connection, batch.notes)
            for seq in {note[0] for note in batch.notes}:
                connection.execute(
                    "DELETE FROM note WHERE seq = ?1 AND rowid <= (SELECT rowid FROM note WHERE "
                    "seq = ?1 ORDER BY rowid DESC LIMIT 1 OFFSET ?2)", (seq, KEPT_LINES)
                )  # fmt: skip

    def load(self, seqs: Sequence[int]) -> list[Job]:
        """One query for the tasks and one for their parents."""
        connection = self._open_writer()
        marks = ", ".join("?" * len(seqs))
        columns = ", ".join(f"task.{name}" for name in TASK_COLUMNS)
        rows = connection.execute(
            f"SELECT {columns}, call.fn, call.args FROM task JOIN call USING (seq) "
            f"WHERE task.seq IN ({marks}) ORDER BY task.seq", list(seqs)
        ).fetchall()  # fmt: skip
        parents: dict[int, list[str]] = {}
        for child, parent in connection.execute(
            "SELECT dep.child, task.id FROM dep JOIN task ON task.seq = dep.parent "
            f"WHERE dep.child IN ({marks}) ORDER BY dep.child, dep.position", list(seqs)
        ):  # fmt: skip
            parents.setdefault(child, []).append(parent)
        return [_job_of(row, parents.get(row[0], ())) for row in rows]

    def known(self, ids: Sequence[str]) -> dict[str, tuple[int, str, bytes | None]]:
        """By the index of ids, 500 at a time."""
        connection = self._open_writer()
        found = {}
        for part in _parts(ids, 500):
            marks = ", ".join("?" * len(part))
            for task_id, *rest in connection.execute(
                f"SELECT id, seq, state, digest FROM task WHERE id IN ({marks})", part
            ):
                found[task_id] = (rest[0], rest[1], rest[2])
        return found

    def with_key(self, key: str) -> tuple[str, bytes | None] | None:
        """By the partial index of keys."""
        row = (
            self._open_writer()
            .execute("SELECT id, digest FROM task WHERE idem_key = ?", (key,))
            .fetchone()
        )
        return None if row is None else (row[0], row[1])

    def results(self, seqs: Sequence[int]) -> dict[int, bytes]:
        """By number, 500 at a time."""
        connection = self._open_writer()
        found: dict[int, bytes] = {}
        for part in _parts(seqs, 500):
            marks = ", ".join("?" * len(part))
            found.update(
                connection.execute(f"SELECT seq, value FROM result WHERE seq IN ({marks})", part)
            )
        return found

    def unfinished(self) -> list[str]:
        """By a look at the whole table."""
        rows = self._open_writer().execute(f"SELECT id FROM task WHERE state IN {_LIVE}")
        return [task_id for (task_id,) in rows]

    def cleanup(self, before: float, states: Sequence[str], limit: int) -> dict[str, int]:
        """One transaction; the pages are used again."""
        connection = self._open_writer()
        marks = ", ".join("?" * len(states))
        rows = connection.execute(
            f"SELECT seq, state FROM task WHERE state IN ({marks}) AND finished < ? "
            "AND NOT EXISTS (SELECT 1 FROM dep JOIN task AS young ON young.seq = dep.child "
            f"WHERE dep.parent = task.seq AND young.state IN {_LIVE}) LIMIT ?",
            [*states, before, limit],
        ).fetchall()
        connection.execute("BEGIN IMMEDIATE")
        try:
            for part in _parts([seq for seq, _ in rows], 500):
                marks = ", ".join("?" * len(part))
                for table in ("task", "call", "result", "event", "note"):
                    connection.execute(f"DELETE FROM {table} WHERE seq IN ({marks})", part)
                connection.execute(f"DELETE FROM dep WHERE child IN ({marks})", part)
                connection.execute(f"DELETE FROM dep WHERE parent IN ({marks})", part)
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        counts: dict[str, int] = {}
        for _, state in rows:
            counts[state] = counts.get(state, 0) + 1
        return counts

    def expire(self, now: float) -> int:
        """By the partial index of the times they expire."""
        return (
            self._open_writer()
            .execute(
                "DELETE FROM result WHERE expires <= ? AND NOT EXISTS (SELECT 1 FROM dep JOIN task "
                f"ON task.seq = dep.child WHERE dep.parent = result.seq AND task.state IN {_LIVE})",
                (now,),
            )
            .rowcount
        )

    def close(self) -> None:
        """A private file is removed, with what lies beside it."""
        with self._reading:
            if self._reader is not None:
                self._reader.close()
                self._reader = None
        if self._writer is not None:
            with suppress(sqlite3.Error):
                self._writer.close()
            self._writer = None
        if self._holder is not None:
            if not self.lasting:
                for suffix in ("", "-wal", "-shm"):
                    with suppress(OSError):
                        Path(f"{self.path}{suffix}").unlink()
            self._holder.release(remove=not self.lasting)
            self._holder = None

    def _open_writer(self) -> sqlite3.Connection:
        if self._writer is None:
            raise StoreUnavailable(f"The database {self.path.name} is closed.")
        return self._writer

    # --- any thread ---

    def find(self, task_id: str) -> dict[str, Any] | None:
        """By the connection for reading."""
        with self._read() as connection:
            row = connection.execute("SELECT * FROM task WHERE id = ?", (task_id,)).fetchone()
            if row is None:
                return None
            parents = connection.execute(
                "SELECT task.id FROM dep JOIN task ON task.seq = dep.parent WHERE dep.child = ? "
                "ORDER BY dep.position", (row["seq"],)
            ).fetchall()  # fmt: skip
            return {**row, "dependencies": [parent for (parent,) in map(tuple, parents)]}

    def page(self, wanted: Filter) -> list[dict[str, Any]]:
        """Key-set paging by number; a filter by state or text reads the table."""
        clauses, values = ["1"], list[Any]()
        if wanted.states:
            clauses.append(f"state IN ({', '.join('?' * len(wanted.states))})")
            values += wanted.states
        for column, value in (("name", wanted.name), ("priority", wanted.priority)):
            if value is not None:
                clauses.append(f"{column} = ?")
                values.append(value)
        if wanted.text:
            clauses.append(
                "(instr(id, ?) OR instr(name, ?) OR instr(coalesce(error, ''), ?) "
                "OR instr(coalesce(idem_key, ''), ?))"
            )
            values += [wanted.text] * 4
        if wanted.before is not None:
            clauses.append("seq < ?")
            values.append(wanted.before)
        with self._read() as connection:
            rows = connection.execute(
                f"SELECT * FROM task WHERE {' AND '.join(clauses)} ORDER BY seq DESC LIMIT ?",
                [*values, wanted.limit],
            ).fetchall()
            return [dict(row) for row in rows]

    def result(self, seq: int) -> bytes | None:
        """By number."""
        with self._read() as connection:
            row = connection.execute("SELECT value FROM result WHERE seq = ?", (seq,)).fetchone()
            return None if row is None else bytes(row[0])

    def events(self, after: int, limit: int) -> list[dict[str, Any]]:
        """By number, joined with the tasks that are still there."""
        with self._read() as connection:
            return [
                dict(row)
                for row in connection.execute(
                    "SELECT event.*, task.id, task.name FROM event JOIN task USING (seq) "
                    "WHERE eid > ? ORDER BY eid LIMIT ?", (after, limit)
                )
            ]  # fmt: skip

    def history(self, seq: int) -> list[dict[str, Any]]:
        """By the index of events."""
        with self._read() as connection:
            return [
                dict(row)
                for row in connection.execute(
                    "SELECT * FROM event WHERE seq = ? ORDER BY eid", (seq,)
                )
            ]

    def last_event(self) -> int:
        """The highest number given so far."""
        with self._read() as connection:
            return int(connection.execute("SELECT coalesce(max(eid), 0) FROM event").fetchone()[0])

    def notes(self, seq: int) -> list[dict[str, Any]]:
        """In the order they were told."""
        with self._read() as connection:
            return [
                dict(row)
                for row in connection.execute(
                    "SELECT ts, line FROM note WHERE seq = ? ORDER BY rowid", (seq,)
                )
            ]

    def graph(self, seq: int, limit: int) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
        """By recursion in both directions, each bounded."""
        with self._read() as connection:
            connected = (
                "WITH RECURSIVE up(seq) AS (SELECT ?1 UNION SELECT dep.parent FROM dep JOIN up "
                "ON dep.child = up.seq LIMIT ?2), down(seq) AS (SELECT ?1 UNION SELECT dep.child "
                "FROM dep JOIN down ON dep.parent = down.seq LIMIT ?2), near(seq) AS (SELECT seq "
                "FROM up UNION SELECT seq FROM down) "
            )
            nodes = connection.execute(
                connected + "SELECT task.id, task.name, task.state FROM near JOIN task USING (seq) "
                "ORDER BY seq LIMIT ?2", (seq, limit)
            ).fetchall()  # fmt: skip
            edges = connection.execute(
                connected + "SELECT mother.id, young.id FROM dep JOIN task AS mother ON "
                "mother.seq = dep.parent JOIN task AS young ON young.seq = dep.child WHERE "
                "dep.parent IN (SELECT seq FROM near) AND dep.child IN (SELECT seq FROM near) "
                "ORDER BY dep.child, dep.position LIMIT 10 * ?2", (seq, limit)
            ).fetchall()  # fmt: skip
            return [dict(node) for node in nodes], [(a, b) for a, b in map(tuple, edges)]

    def counts(self) -> dict[str, int]:
        """By a look at the whole table."""
        with self._read() as connection:
            return _count(connection)

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._reading:
            if self._reader is None:
                self._reader = reader(self.path)
            try:
                yield self._reader
            except sqlite3.Error as error:
                raise StoreUnavailable(f"The stored tasks cannot be read: {error}.") from error


def reader(path: Path) -> sqlite3.Connection:
    """A connection that can only read; the scheduler may run meanwhile."""
    try:
        connection = sqlite3.connect(
            f"file:{path.absolute().as_posix().replace('?', '%3f').replace('#', '%23')}?mode=ro",
            uri=True, isolation_level=None, check_same_thread=False,
        )  # fmt: skip
        connection.execute("PRAGMA busy_timeout = 5000")
        connection.execute("SELECT 1 FROM task LIMIT 1")
    except sqlite3.Error as error:
        raise StoreUnavailable(f"{path} cannot be read as a database of tasks: {error}.") from error
    connection.row_factory = sqlite3.Row
    return connection


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116  (at every commit: this is the quick way)
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino


@contextmanager
def _private_files() -> Iterator[None]:
    """What is created is for this user only: the calls in it are code."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _count(connection: sqlite3.Connection) -> dict[str, int]:
    rows = connection.execute("SELECT state, count(*) FROM task GROUP BY state")
    return dict(map(tuple, rows))


def _parts(values: Sequence[Any], size: int) -> Iterable[list[Any]]:
    for start in range(0, len(values), size):
        yield list(values[start : start + size])


def _is_plain(job: Job) -> bool:
    """Has nothing happened to it but one run that did not fail?"""
    return (
        job.error is None
        and job.retry is None
        and job.run_at is None
        and job.progress is None
        and not job.crashes
        and not job.run
    )


def _is_new(job: Job) -> bool:
    """Is there nothing to be stored of it but what every task has?"""
    return job.digest is None and job.started is None and not job.positionally


def _plain_task_row(job: Job) -> tuple[Any, ...]:
    return (
        job.seq, job.id, job.name, job.kind, job.priority, job.state, job.created, job.since,
        job.timeout,
    )  # fmt: skip


def _plain_row(job: Job) -> tuple[Any, ...]:
    return (
        job.seq, job.stored, job.state, job.since, job.started, job.finished, job.attempts,
    )  # fmt: skip


def _task_row(job: Job) -> tuple[Any, ...]:
    return (
        job.seq, job.id, job.name, job.kind, job.priority, job.state, job.created, job.since,
        job.run_at, job.started, job.finished, job.timeout,
        None if job.retry is None else json.dumps(asdict(job.retry)),
        job.run, job.attempts, job.crashes, job.positionally, job.idem_key, job.digest, job.error,
        job.progress,
    )  # fmt: skip


def _change_row(job: Job) -> tuple[Any, ...]:
    return (
        job.seq, job.stored, job.state, job.since, job.run_at, job.started, job.finished, job.run,
        job.attempts, job.crashes, job.error, job.progress,
    )  # fmt: skip


def _job_of(row: Sequence[Any], parents: Sequence[str]) -> Job:
    values = dict(zip(TASK_COLUMNS, row, strict=False))
    job = Job(values["id"], values["name"], values["kind"], row[-2], row[-1])
    for name in TASK_COLUMNS:
        if name not in ("id", "name", "kind", "retry", "positionally"):
            setattr(job, name, values[name])
    job.positionally = bool(values["positionally"])
    job.retry = None if values["retry"] is None else RetryPolicy(**json.loads(values["retry"]))
    job.stored = job.state
    job.parents = tuple(parents)
    return job
