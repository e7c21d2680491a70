"""Who serves which plugin, for all processes that share a store: one small contract, as data only.

A node announces its plugins, beats every few seconds, and is forgotten when it stops. Two live
nodes may not serve one name and version with different signatures; the same signatures with other
code are allowed and flagged `divergent`. No code and no pickles are ever stored.
"""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from logs import get_logger

log = get_logger("cluster")

EXPIRY_SECONDS = 15.0  # without a heartbeat a node is dead
BUSY_SECONDS = 2.0


class StoreError(RuntimeError):
    """The store cannot be reached or read; the message never holds an address or a password."""


@dataclass(frozen=True)
class PluginRecord:
    """One plugin on one node. `dict(record)` is its JSON."""

    name: str
    version: str
    contract: str
    signature_hash: str
    code_hash: str
    host: str
    node: str
    capabilities: list[str] = field(default_factory=list)
    input_schema: dict[str, Any] = field(default_factory=dict)
    output_schema: dict[str, Any] = field(default_factory=dict)
    description: str = ""
    author: str = ""
    heartbeat: float = 0.0  # seconds since the epoch, by the clock of the store
    divergent: bool = False  # another live node serves the same version from other code

    @property
    def key(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    def keys(self) -> list[str]:
        """The names of the fields."""
        return [each.name for each in fields(self)]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def to_json(self) -> str:
        """What is stored."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, heartbeat: float) -> "PluginRecord":
        """Fields that a later release may add are left out."""
        known = {each.name for each in fields(cls)}
        values = {name: value for name, value in json.loads(text).items() if name in known}
        return replace(cls(**values), heartbeat=heartbeat, divergent=False)


@dataclass(frozen=True)
class Conflict:
    """A record that was refused: a live node serves that version with other signatures."""

    record: PluginRecord
    host: str  # of the node that was there first


class RegistryStore(Protocol):
    """Shared by processes. Every method raises StoreError when the store does not answer."""

    def announce(self, node: str, records: Iterable[PluginRecord]) -> list[Conflict]:
        """Put records of a node, and count as its heartbeat; conflicting ones are left out."""

    def heartbeat(self, node: str) -> bool:
        """Stay alive; False when the store knows nothing of the node (any more)."""

    def withdraw(self, node: str, keys: Iterable[str]) -> None:
        """Take records of a node out again."""

    def leave(self, node: str) -> None:
        """Take the node out with all its records."""

    def records(self) -> list[PluginRecord]:
        """The records of live nodes, by name, version and node."""

    def ping(self) -> None:
        """Return when the store answers."""

    def close(self) -> None:
        """Let connections go."""


def readable(stored: Iterable[tuple[str | bytes, float]]) -> Iterator[PluginRecord]:
    """The records that this release can read, out of (JSON, heartbeat)."""
    for text, heartbeat in stored:
        try:
            yield PluginRecord.from_json(text, heartbeat)
        except (ValueError, TypeError, AttributeError) as error:
            log.warning("registry_record_unreadable", error=type(error).__name__)


def flagged(records: Iterable[PluginRecord]) -> list[PluginRecord]:
    """Sorted, with `divergent` where live nodes run different code under one key."""
    found = sorted(records, key=lambda record: (record.name, record.version, record.node))
    hashes: dict[str, set[str]] = {}
    for record in found:
        hashes.setdefault(record.key, set()).add(record.code_hash)
    return [replace(record, divergent=len(hashes[record.key]) > 1) for record in found]


class MemoryStore:
    """For one process, and for tests."""

    def __init__(
        self, clock: Callable[[], float] = time.time, expiry_seconds: float = EXPIRY_SECONDS
    ) -> None:
        self._clock = clock
        self._expiry_seconds = expiry_seconds
        self._beats: dict[str, float] = {}
        self._records: dict[str, dict[str, PluginRecord]] = {}
        self._lock = threading.Lock()

    def _expire(self) -> None:
        dead_before = self._clock() - self._expiry_seconds
        for node in [node for node, beat in self._beats.items() if beat <= dead_before]:
            del self._beats[node], self._records[node]

    def announce(self, node: str, records: Iterable[PluginRecord]) -> list[Conflict]:
        """Put records of a node, and count as its heartbeat; conflicting ones are left out."""
        conflicts = []
        with self._lock:
            self._expire()
            self._beats[node] = self._clock()
            own = self._records.setdefault(node, {})
            for record in records:
                other = self._other(node, record)
                if other is None:
                    own[record.key] = PluginRecord.from_json(record.to_json(), 0.0)
                else:
                    own.pop(record.key, None)
                    conflicts.append(Conflict(record, other.host))
        return conflicts

    def _other(self, node: str, record: PluginRecord) -> PluginRecord | None:
        for owner, records in self._records.items():
            other = records.get(record.key)
            if owner != node and other and other.signature_hash != record.signature_hash:
                return other
        return None

    def heartbeat(self, node: str) -> bool:
        """Stay alive; False when the store knows nothing of the node (any more)."""
        with self._lock:
            self._expire()
            if node not in self._beats:
                return False
            self._beats[node] = self._clock()
            return True

    def withdraw(self, node: str, keys: Iterable[str]) -> None:
        """Take records of a node out again."""
        with self._lock:
            for key in keys:
                self._records.get(node, {}).pop(key, None)

    def leave(self, node: str) -> None:
        """Take the node out with all its records."""
        with self._lock:
            self._beats.pop(node, None)
            self._records.pop(node, None)

    def records(self) -> list[PluginRecord]:
        """The records of live nodes, by name, version and node."""
        with self._lock:
            self._expire()
            return flagged(
                replace(record, heartbeat=self._beats[node])
                for node, records in self._records.items()
                for record in records.values()
            )

    def ping(self) -> None:
        """Memory always answers."""

    def close(self) -> None:
        """Nothing is held."""


_SCHEMA = """
CREATE TABLE IF NOT EXISTS nodes (node TEXT PRIMARY KEY, pid INTEGER, beat REAL NOT NULL);
CREATE TABLE IF NOT EXISTS plugins (
    node TEXT NOT NULL REFERENCES nodes ON DELETE CASCADE, key TEXT NOT NULL,
    signature_hash TEXT NOT NULL, host TEXT NOT NULL, record TEXT NOT NULL,
    PRIMARY KEY (key, node)
);
"""


class SQLiteStore:
    """The embedded default: a file that the processes of one machine share.

    A node whose process has ended is dead at once; a commit survives a crash of the process, and
    needs to survive no more, since nodes announce themselves again.
    """

    def __init__(
        self,
        path: Path | str,
        clock: Callable[[], float] = time.time,
        expiry_seconds: float = EXPIRY_SECONDS,
    ) -> None:
        self._clock = clock
        self._expiry_seconds = expiry_seconds
        self._path = str(path)
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            if self._path != ":memory:":
                path = Path(self._path)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode=0o600)  # for its owner alone; SQLite gives its helpers the same
            connection = sqlite3.connect(
                self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA foreign_keys=ON")
            connection.executescript(_SCHEMA)
            self._connection = connection
        return self._connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One at a time, also between processes; the dead are out of the way."""
        with self._lock:
            try:
                connection = self._open()
                connection.execute("BEGIN IMMEDIATE")
                try:
                    self._expire(connection)
                    yield connection
                except BaseException:
                    connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
            except (sqlite3.Error, OSError) as error:
                self._forget_connection()
                raise StoreError(f"The registry file cannot be used: {error}.") from error

    def _forget_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _expire(self, connection: sqlite3.Connection) -> None:
        dead_before = self._clock() - self._expiry_seconds
        rows = connection.execute("SELECT node, pid, beat FROM nodes").fetchall()
        dead = [(n,) for n, pid, beat in rows if beat <= dead_before or not _is_running(pid)]
        connection.executemany("DELETE FROM nodes WHERE node = ?", dead)

    def announce(self, node: str, records: Iterable[PluginRecord]) -> list[Conflict]:
        """Put records of a node, and count as its heartbeat; conflicting ones are left out."""
        conflicts = []
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO nodes VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET beat = excluded.beat",
                (node, os.getpid(), self._clock()),
            )
            for record in records:
                other = connection.execute(
                    "SELECT host FROM plugins WHERE key = ? AND node <> ? AND signature_hash <> ?",
                    (record.key, node, record.signature_hash),
                ).fetchone()
                connection.execute(
                    "DELETE FROM plugins WHERE key = ? AND node = ?", (record.key, node)
                )
                if other is not None:
                    conflicts.append(Conflict(record, other[0]))
                    continue
                connection.execute(
                    "INSERT INTO plugins VALUES (?, ?, ?, ?, ?)",
                    (node, record.key, record.signature_hash, record.host, record.to_json()),
                )
        return conflicts

    def heartbeat(self, node: str) -> bool:
        """Stay alive; False when the store knows nothing of the node (any more)."""
        with self._transaction() as connection:
            done = connection.execute(
                "UPDATE nodes SET beat = ? WHERE node = ?", (self._clock(), node)
            )
            return done.rowcount > 0

    def withdraw(self, node: str, keys: Iterable[str]) -> None:
        """Take records of a node out again."""
        with self._transaction() as connection:
            connection.executemany(
                "DELETE FROM plugins WHERE node = ? AND key = ?", [(node, key) for key in keys]
            )

    def leave(self, node: str) -> None:
        """Take the node out with all its records."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM nodes WHERE node = ?", (node,))

    def records(self) -> list[PluginRecord]:
        """The records of live nodes, by name, version and node."""
        with self._transaction() as connection:
            rows = connection.execute(
                "SELECT record, beat FROM plugins JOIN nodes USING (node)"
            ).fetchall()
        return flagged(readable(rows))

    def ping(self) -> None:
        """Return when the file can be read."""
        with self._lock:
            try:
                self._open().execute("SELECT 1 FROM nodes LIMIT 1").fetchall()
            except (sqlite3.Error, OSError) as error:
                self._forget_connection()
                raise StoreError(f"The registry file cannot be used: {error}.") from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._forget_connection()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs under another user
        return True
    return True
