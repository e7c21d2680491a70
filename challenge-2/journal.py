"""The connection log: what happened to every resource, in a bounded SQLite file.

Managers hand their events in from any loop or thread; that costs an append. A task writes them in
batches, and whoever reads waits for what was handed in before. A kill loses at most the last
`FLUSH_SECONDS`; nothing else depends on this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from failures import described
from sqlite_threads import SqliteThread
from timelines import critical_path

if TYPE_CHECKING:
    from engine import Observe, Owner, Run

log = logging.getLogger("journal")

FLUSH_SECONDS = 0.25
EVENTS = (
    "acquiring", "acquired", "acquire_failed", "released", "release_failed", "abandoned", "lost",
)  # fmt: skip
FIELDS = ("seq", "ts", "run_id", "resource", "event", "duration_s", "error")
PHASES = ("acquire", "hold", "release")
ROWS_PER_RUN = 4  # so many rows of the log stand for one run that is kept
SCHEMA = (
    """CREATE TABLE IF NOT EXISTS records (
        seq INTEGER PRIMARY KEY, ts REAL NOT NULL, run_id TEXT NOT NULL, resource TEXT NOT NULL,
        event TEXT NOT NULL, duration_s REAL, error TEXT)""",
    "CREATE INDEX IF NOT EXISTS records_by_run ON records (run_id, seq)",
    """CREATE TABLE IF NOT EXISTS runs (
        number INTEGER PRIMARY KEY, run_id TEXT NOT NULL UNIQUE, manager TEXT NOT NULL,
        began REAL NOT NULL, start_s REAL, stop_s REAL, sum_s REAL, start_sum_s REAL, path TEXT)""",
    """CREATE TABLE IF NOT EXISTS timings (
        run_id TEXT NOT NULL, resource TEXT NOT NULL, kind TEXT NOT NULL, state TEXT NOT NULL,
        acquiring_s REAL, ready_s REAL, releasing_s REAL, released_s REAL, error TEXT,
        PRIMARY KEY (run_id, resource)) WITHOUT ROWID""",
)


@dataclass(frozen=True)
class Bar:
    """One resource of a timeline: seconds after the start of its run."""

    resource: str
    kind: str
    state: str
    acquiring_s: float | None
    ready_s: float | None
    releasing_s: float | None
    released_s: float | None
    error: str | None

    def seconds(self, phase: str) -> float | None:
        """How long a phase took; None if it has not ended."""
        begin, end = {
            "acquire": (self.acquiring_s, self.ready_s),
            "hold": (self.ready_s, self.releasing_s),
            "release": (self.releasing_s, self.released_s),
        }[phase]
        return None if begin is None or end is None else end - begin


@dataclass(frozen=True)
class Timeline:
    """A run as bars."""

    run_id: str
    manager: str
    began: float
    start_s: float
    stop_s: float
    sum_s: float
    start_sum_s: float
    critical_path: tuple[str, ...]
    bars: tuple[Bar, ...]


class EventLog:
    """Takes events, and answers questions about them. `rows` records are kept, the last ones."""

    def __init__(
        self,
        path: str | Path = ":memory:",
        *,
        rows: int = 10_000,
        secrets: Iterable[str] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._thread = SqliteThread(str(path))
        self._rows = rows
        self._secrets = tuple(secrets)
        self._clock = clock
        self._lock = threading.Lock()
        self._records: deque[tuple[Any, ...]] = deque(maxlen=rows)
        self._ended: deque[Timeline] = deque(maxlen=max(1, rows // ROWS_PER_RUN))
        self._live: dict[str, tuple[str, float, Run]] = {}
        self._seq = 0
        self._writer: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self.failed_writes = 0

    async def __aenter__(self) -> EventLog:
        await self._thread.open(lambda connection: [connection.execute(s) for s in SCHEMA])
        newest = "SELECT coalesce(max(seq), 0) FROM records"
        self._seq = await self._thread.run(lambda c: int(c.execute(newest).fetchone()[0]))
        self._writer = asyncio.create_task(self._write_on())
        return self

    async def __aexit__(self, *_: Any) -> None:
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.wait({self._writer})
        try:
            await self.flush()
        finally:
            await self._thread.close()

    # --- what managers call ---

    def observer(self, run_id: str, manager: str, run: Run) -> Observe:
        """What a run tells its events to."""
        with self._lock:
            self._live[run_id] = (manager, self._clock(), run)

        def observe(
            owner: Owner, event: str, seconds: float | None, error: BaseException | None
        ) -> None:
            text = None if error is None else self._scrubbed(described(error))
            with self._lock:
                self._seq += 1
                self._records.append(
                    (self._seq, self._clock(), run_id, owner.name, event, seconds, text)
                )

        return observe

    def ended(self, run_id: str, manager: str, run: Run) -> None:
        """A run is over: keep its timeline."""
        with self._lock:
            _, began, _ = self._live.pop(run_id, (manager, self._clock(), run))
            self._ended.append(self._timeline(run_id, manager, began, run))

    def _scrubbed(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _timeline(self, run_id: str, manager: str, began: float, run: Run) -> Timeline:
        zero = run.began_at

        def after(moment: float) -> float | None:
            return moment - zero if moment else None

        bars = tuple(
            Bar(
                owner.name, owner.kind, owner.status, after(owner.acquiring_at),
                after(owner.ready_at), after(owner.releasing_at), after(owner.released_at),
                None if owner.error is None else self._scrubbed(described(owner.error)),
            )
            for owner in run.owners
        )  # fmt: skip
        now = run.clock()
        sums = [sum(bar.seconds(phase) or 0.0 for bar in bars) for phase in ("acquire", "release")]
        return Timeline(
            run_id, manager, began, (run.started_at or now) - zero,
            (run.stopped_at or now) - run.stopping_at if run.stopping_at else 0.0,
            sum(sums), sums[0], critical_path(o for o in run.owners if not o.late), bars,
        )  # fmt: skip

    # --- writing ---

    async def _write_on(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            with contextlib.suppress(sqlite3.Error):
                await self.flush()

    async def flush(self) -> None:
        """Write what was handed in; a full disk costs the log its newest records, nothing else."""
        async with self._writing:
            with self._lock:
                records, ended = list(self._records), list(self._ended)
                self._records.clear()
                self._ended.clear()
            if not records and not ended:
                return
            try:
                await self._thread.run(lambda connection: self._write(connection, records, ended))
            except sqlite3.Error as error:
                self.failed_writes += 1
                log.warning("the connection log cannot be written: %s", described(error))

    def _write(
        self, connection: sqlite3.Connection, records: Sequence[Any], ended: Sequence[Timeline]
    ) -> None:
        connection.execute("BEGIN IMMEDIATE")
        try:
            insert = "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?, ?)"
            connection.executemany(insert, records)
            for line in ended:
                self._write_run(connection, line)
            connection.execute(
                "DELETE FROM records WHERE seq <= (SELECT max(seq) FROM records) - ?",
                (self._rows,),
            )
            kept = max(1, self._rows // ROWS_PER_RUN)
            gone = "SELECT run_id FROM runs WHERE number <= (SELECT max(number) FROM runs) - ?"
            connection.execute(f"DELETE FROM timings WHERE run_id IN ({gone})", (kept,))
            connection.execute(f"DELETE FROM runs WHERE run_id IN ({gone})", (kept,))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    @staticmethod
    def _write_run(connection: sqlite3.Connection, line: Timeline) -> None:
        connection.execute(
            "INSERT OR REPLACE INTO runs VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)",
            (line.run_id, line.manager, line.began, line.start_s, line.stop_s, line.sum_s,
             line.start_sum_s, json.dumps(line.critical_path)),
        )  # fmt: skip
        connection.executemany(
            "INSERT OR REPLACE INTO timings VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (line.run_id, bar.resource, bar.kind, bar.state, bar.acquiring_s, bar.ready_s,
                 bar.releasing_s, bar.released_s, bar.error)
                for bar in line.bars
            ],
        )  # fmt: skip

    # --- reading ---

    async def _read(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        await self.flush()
        return await self._thread.run(lambda c: c.execute(sql, parameters).fetchall())

    async def records(
        self,
        *,
        run_id: str | None = None,
        resource: str | None = None,
        event: str | None = None,
        after: int = 0,
        limit: int = 1000,
    ) -> list[dict[str, Any]]:
        """The records that fit, in the order in which they happened."""
        clauses, parameters = ["seq > ?"], [after]
        for column, value in (("run_id", run_id), ("resource", resource), ("event", event)):
            if value is not None:
                clauses.append(f"{column} = ?")
                parameters.append(value)  # type: ignore[arg-type]
        rows = await self._read(
            f"SELECT {', '.join(FIELDS)} FROM records WHERE {' AND '.join(clauses)} "
            "ORDER BY seq LIMIT ?",
            (*parameters, limit),
        )
        found = [dict(zip(FIELDS, row, strict=True)) for row in rows]
        for record in found:
            record["ts"] = text_of(record["ts"])
        return found

    async def timeline(self, run_id: str) -> Timeline | None:
        """One run, also while it lasts."""
        with self._lock:
            live = self._live.get(run_id)
            if live is not None:
                manager, began, run = live
                return self._timeline(run_id, manager, began, run)
        rows = await self._read("SELECT * FROM runs WHERE run_id = ?", (run_id,))
        if not rows:
            return None
        _, _, manager, began, start, stop, total, start_total, path = rows[0]
        bars = await self._read(
            "SELECT resource, kind, state, acquiring_s, ready_s, releasing_s, released_s, error "
            "FROM timings WHERE run_id = ? ORDER BY acquiring_s IS NULL, acquiring_s",
            (run_id,),
        )
        return Timeline(
            run_id, manager, began, start, stop, total, start_total, tuple(json.loads(path)),
            tuple(Bar(*bar) for bar in bars),
        )  # fmt: skip

    def _live_timelines(self) -> list[Timeline]:
        with self._lock:
            return [
                self._timeline(run_id, manager, began, run)
                for run_id, (manager, began, run) in self._live.items()
            ]

    async def bars(self) -> list[tuple[str, str, Bar]]:
        """The bars of all runs that are kept or last: run id, manager, bar."""
        rows = await self._read(
            "SELECT t.run_id, r.manager, resource, kind, state, acquiring_s, ready_s, releasing_s, "
            "released_s, error FROM timings t JOIN runs r USING (run_id) ORDER BY r.number"
        )
        found = [(row[0], row[1], Bar(*row[2:])) for row in rows]
        for line in self._live_timelines():
            found.extend((line.run_id, line.manager, bar) for bar in line.bars)
        return found

    async def summary(self) -> dict[str, Any]:
        """Counts, percentiles, the most frequent errors, and what parallel start has saved."""
        counts = dict(await self._read("SELECT event, count(*) FROM records GROUP BY event"))
        errors = await self._read(
            "SELECT error, count(*), max(ts) FROM records "
            "WHERE error IS NOT NULL AND error <> 'CancelledError' "  # that was our own doing
            "GROUP BY error ORDER BY 2 DESC, 3 DESC LIMIT 10"
        )
        runs = await self._read("SELECT count(*), sum(start_sum_s - start_s) FROM runs")
        live = self._live_timelines()
        bars = [bar for _, _, bar in await self.bars()]
        return {
            "runs": int(runs[0][0]) + len(live),
            "events": {event: int(counts.get(event, 0)) for event in EVENTS},
            **{
                phase: percentiles([s for bar in bars if (s := bar.seconds(phase)) is not None])
                for phase in PHASES
            },
            "top_errors": [
                {"error": error, "count": count, "last": text_of(ts)} for error, count, ts in errors
            ],
            "start_saved_s": float(runs[0][1] or 0.0)
            + sum(line.start_sum_s - line.start_s for line in live),
        }

    async def slowest(self, phase: str, limit: int) -> list[dict[str, Any]]:
        """The longest times of a phase, the longest first."""
        timed = [
            (seconds, run_id, manager, bar)
            for run_id, manager, bar in await self.bars()
            if (seconds := bar.seconds(phase)) is not None
        ]
        timed.sort(key=lambda each: -each[0])
        return [
            {"resource": bar.resource, "kind": bar.kind, "seconds": seconds, "run_id": run_id,
             "manager": manager}
            for seconds, run_id, manager, bar in timed[:limit]
        ]  # fmt: skip


def percentiles(samples: Sequence[float]) -> dict[str, Any]:
    """Nearest-rank percentiles in seconds; None where there is nothing."""
    ordered = sorted(samples)

    def at(share: float) -> float | None:
        if not ordered:
            return None
        rank = -(-int(share * len(ordered)) // 100)
        return ordered[min(len(ordered), max(1, rank)) - 1]

    return {"count": len(ordered), "p50_s": at(50), "p95_s": at(95), "p99_s": at(99)}


def text_of(moment: float) -> str:
    """A moment in UTC, as RFC 3339 with Z."""
    text = dt.datetime.fromtimestamp(moment, dt.UTC).isoformat(timespec="microseconds")
    return text.removesuffix("+00:00") + "Z"
