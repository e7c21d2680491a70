"""What can be read of the SQLite file, by any thread, and beside the process that writes it."""

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from aggregation import State
from parsing import Rejected
from results import letter_message
from storage import (
    LISTED_SOURCES,
    Aggregate,
    AggregateQuery,
    Answer,
    Build,
    DeadLetter,
    StagedUpload,
    StoreError,
    StoreRefused,
    TopicState,
    Totals,
)
from windows import BEGINNING

SCHEMA_VERSION: Final = 2
BUSY_MILLISECONDS: Final = 2_000
CACHE_KIBIBYTES: Final = 2 * 1024

_ROW: Final = "w.pipeline, w.window_start, w.window_end, w.group_key, w.count, w.revision, w.state"
_FINAL: Final = f"w.window_end + b.lateness <= coalesce(c.watermark, {BEGINNING})"
_LETTER: Final = (
    "id, pipeline, received, position, line, number, byte_offset, code, message, raw, whole"
)
decode_state: Final = msgspec.msgpack.Decoder(State).decode


class SQLiteReader:
    """The reading half of a `Store`; safe from any thread."""

    def __init__(self, path: Path) -> None:
        """Open the file for reading; raise StoreError when there is none of this version."""
        self._path = path
        self._reading = threading.Lock()
        try:
            if not path.is_file():
                raise StoreError(f"There is no database at {path}: set DB_PATH to the one in use.")
            self._reader = self._connect()
            self._reader.execute("PRAGMA query_only = ON")
            version = self._reader.execute("PRAGMA user_version").fetchone()[0]
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"The database cannot be read: {error}.") from error
        if version != SCHEMA_VERSION:
            raise wrong_version(version)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        connection.execute(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIBIBYTES}")
        return connection

    def _rows(self, sql: str, parameters: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        with self._reading, refusing("question"):
            return self._reader.execute(sql, tuple(parameters)).fetchall()

    def position(self) -> int:
        """Up to where the log has been applied."""
        position: int = self._rows("SELECT value FROM meta WHERE name = 'position'")[0][0]
        return position

    def builds(self) -> list[Build]:
        """The active builds and the shadows, oldest first."""
        rows = self._rows(
            "SELECT id, name, spec, lateness, begins, state = 'shadow', origin, progress, done, "
            "events, misfits FROM builds WHERE state <> 'dropped' ORDER BY id"
        )
        return [
            Build(row[0], row[1], row[2], row[3], row[4], bool(row[5]), *row[6:]) for row in rows
        ]

    def quiet(self, build: int, since: int, limit: int) -> list[tuple[str, int]]:
        """Sources with open windows that have been silent since then, and their last position."""
        rows = self._rows(
            "SELECT source, seen FROM clocks WHERE build = ? AND quiet = 0 AND arrival < ? LIMIT ?",
            (build, since, limit),
        )
        return [(source, seen) for source, seen in rows]

    def totals(self) -> dict[tuple[str, str], Totals]:
        """The counts by pipeline (with source `""`), and of the thousand busiest sources."""
        rows = self._rows(
            "SELECT pipeline, source, accepted, rejected, duplicates, late, revised, filtered "
            "FROM totals ORDER BY source <> '', accepted DESC LIMIT ?",
            (LISTED_SOURCES,),
        )
        return {(row[0], row[1]): Totals(*row[2:]) for row in rows}

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
            one = "w.pipeline = ? AND CAST(json_extract(w.group_key, ?) AS TEXT) = ?"
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
            "WHERE build = (SELECT id FROM builds WHERE name = ? AND state = 'active') "
            "GROUP BY group_key LIMIT ?)) ORDER BY w.group_key",
            [pipeline, LISTED_SOURCES],
        )

    def _aggregates(self, clauses: str, parameters: list[Any]) -> list[Aggregate]:
        sql = (  # only fixed clauses are put together; what is asked for is bound
            f"SELECT {_ROW}, {_FINAL} FROM windows w "
            "CROSS JOIN builds b ON b.id = w.build AND b.state = 'active' "
            f"LEFT JOIN clocks c ON c.build = w.build AND c.source = w.source {clauses}"
        )
        return [aggregate_of(row, final=bool(row[7])) for row in self._rows(sql, parameters)]

    def dead_letters(
        self, after: int, limit: int, pipeline: str | None = None, code: str | None = None
    ) -> list[DeadLetter]:
        """Rejected records in the order they came."""
        rows = self._rows(
            f"SELECT {_LETTER} FROM dead_letters WHERE id > ? AND (? IS NULL OR pipeline = ?) "
            "AND (? IS NULL OR code = ?) ORDER BY id LIMIT ?",
            (after, pipeline, pipeline, code, code, limit),
        )
        return [_letter(row) for row in rows]

    def messages(self, topic: str, offset: int, limit: int) -> list[tuple[int, bytes]]:
        """Messages of the topic `aggregates` or `dead-letters` from an offset on."""
        if topic == "dead-letters":
            return [
                (letter.id, letter_message(letter))
                for letter in self.dead_letters(offset - 1, limit)
            ]
        rows = self._rows(
            "SELECT id, value FROM closed_windows WHERE id >= ? ORDER BY id LIMIT ?",
            (offset, limit),
        )
        return [(row[0], row[1]) for row in rows]

    def topic(self, topic: str) -> TopicState:
        """What such a topic holds."""
        table, column = (
            ("dead_letters", "raw") if topic == "dead-letters" else ("closed_windows", "value")
        )
        ((first, last, size),) = self._rows(
            f"SELECT (SELECT min(id) FROM {table}), "
            f"(SELECT seq FROM sqlite_sequence WHERE name = '{table}'), "
            f"(SELECT avg(length({column})) FROM (SELECT {column} FROM {table} LIMIT 100))"
        )
        following = (last or 0) + 1
        first = following if first is None else first
        messages = following - first
        return TopicState(first, following, messages, round(messages * (size or 0)))

    def uploads(self) -> list[StagedUpload]:
        """The applied uploads whose files are kept, oldest first."""
        rows = self._rows("SELECT name, position, length FROM uploads ORDER BY position")
        return [StagedUpload(*row) for row in rows]

    def close(self) -> None:
        """Release the files; idempotent."""
        with self._reading:
            self._reader.close()


def wrong_version(version: int) -> StoreError:
    """The file is of another version of this program."""
    return StoreError(
        f"The database has schema version {version}; this program knows {SCHEMA_VERSION}. "
        "Name other places in DB_PATH and QUEUE_DIR, or use the program that wrote it."
    )


def aggregate_of(row: tuple[Any, ...], *, final: bool) -> Aggregate:
    """A row of windows as what it stands for."""
    return Aggregate(
        row[0], row[1], row[2], msgspec.json.decode(row[3]), row[4], row[5], final,
        decode_state(row[6]),
    )  # fmt: skip


def _letter(row: tuple[Any, ...]) -> DeadLetter:
    record = Rejected(row[4], row[5], row[6], row[7], row[8], row[9], bool(row[10]))
    return DeadLetter(row[0], row[1], row[2], row[3], record)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """A full, locked or damaged database, as StoreRefused."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise StoreRefused(f"The database refused a {what}: {error}.") from error
