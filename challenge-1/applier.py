"""The one thread that turns the log into aggregates: read, fold, commit together with the position.

Recently acknowledged batches are handed over in memory, already decoded; whenever that hand-over is
full, or after a restart, the same messages are read from the log instead. Either way they pass
through the same code in the same order, so the outcome is the same. Rebuilds, retention and
clean-ups are done here as well, in pieces between the batches: there is one writer, and no race.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from batches import (
    BATCH,
    DROP,
    IDLE,
    PROBE,
    PUT,
    REBUILD,
    UPLOAD,
    Batch,
    Idle,
    decode_batch,
    decode_drop,
    decode_idle,
    decode_put,
    decode_rebuild,
    decode_upload,
    encode,
)
from builds import Chunk, Live, Rebuilding, unskipped
from frames import Message
from projection import Projection
from results import closed_message
from spool import MessageQueue
from storage import Aggregate, Answer, Build, Changes, StagedUpload, Store, StoreRefused
from uploads import read_upload
from windows import MICROSECONDS

log = logging.getLogger("applier")

FOLD_EVENTS: Final = 4_000  # events folded at once
TAKE_BYTES: Final = 2 * 1024 * 1024  # of the log in one transaction
HANDOVER_BYTES: Final = 2 * 1024 * 1024
TRIM_BYTES: Final = 64 * 1024 * 1024  # applied since the last look at what may go
COMMIT_SECONDS: Final = 0.1  # between commits under load, so that each has enough to do
RETRY_SECONDS: Final = 0.5  # after the store refused
LOOK_SECONDS: Final = 0.5  # between looks at quiet sources
RETAIN_SECONDS: Final = 60.0  # between looks at what is old
QUIET_AT_ONCE: Final = 10_000

T = TypeVar("T")


@dataclass(slots=True)
class Handed:
    """An acknowledged message with its events, which are decoded already."""

    start: int
    end: int
    batch: Batch
    events: list[Any]


@dataclass
class Applied:
    """What one transaction came to."""

    position: int
    log_bytes: int = 0
    events: int = 0
    upload_bytes: int = 0
    closed: bool = False  # windows may have closed: a topic may have grown
    lost: int = 0  # records of uploads that were damaged on the disk
    promises: list[bytes] = field(default_factory=list)
    replayed: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Retention:
    """How long and how much of the queue is kept beyond what is needed."""

    seconds: float = 7 * 86_400.0
    max_bytes: int = 512 * 1024 * 1024


class Applier:
    """Applies the log to the store in a thread of its own.

    `notify` is called there after every commit with what was applied, and with None when the store
    refused; the applier then tries again until it is stopped. `quiet` is called with the sources
    that have been silent for their idle timeout; it has to log them. `compile_` makes the
    projection of a name and a spec.
    """

    def __init__(
        self,
        queue: MessageQueue,
        store: Store,
        uploads: Path,
        *,
        compile_: Callable[[str, str | None], Projection],
        notify: Callable[[Applied | None], None],
        quiet: Callable[[Idle], None],
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        max_keys: int = 100_000,
        retention: Retention | None = None,
    ) -> None:
        self._queue = queue
        self._store = store
        self._uploads = uploads
        self._compile = compile_
        self._notify = notify
        self._quiet = quiet
        self._wall = wall
        self._clock = clock
        self._max_keys = max_keys
        self._retention = retention or Retention()
        self._live: dict[str, Live] = {}
        self._rebuilding: dict[str, Rebuilding] = {}
        self._handover: deque[Handed] = deque()
        self._handed_bytes = self._taken_bytes = 0  # each counted up by one thread alone
        self._work = threading.Event()
        self._hurry = threading.Event()
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._stop_at: float | None = None
        self._untrimmed = 0
        self._looked = self._retained = clock()
        self._purging = self._stale = True
        self._thread: threading.Thread | None = None
        self.position = store.position()
        self.paused = False  # a test or an operator may hold the applier back

    # --- called by the event loop ---

    def start(self) -> None:
        """Begin with what the log holds beyond the store's position."""
        self._thread = threading.Thread(target=self._run, name="applier", daemon=True)
        self._thread.start()
        self._work.set()

    def hand_over(self, handed: Handed) -> None:
        """Offer an acknowledged batch; where there is no room the log will be read."""
        size = len(handed.batch.body)
        if self._handed_bytes - self._taken_bytes + size <= HANDOVER_BYTES:
            self._handed_bytes += size
            self._handover.append(handed)
        if not self._work.is_set():
            self._work.set()

    def wake(self, *, hurry: bool = False) -> None:
        """Say that the log has grown; `hurry` when somebody waits for it to be applied."""
        if hurry:
            self._hurry.set()
        self._work.set()

    def call(self, job: Callable[[], T]) -> "Future[T]":
        """Run a job in this thread, between two transactions; it alone may write to the store."""
        future: Future[T] = Future()
        self._jobs.append((future, job))
        self._work.set()
        return future

    def stop(self, timeout: float | None = None) -> None:
        """Apply what the log holds, for at most `timeout` seconds, and end; blocking.

        What is left then stays in the log and is applied after the next start.
        """
        self._stop_at = self._clock() + (1e9 if timeout is None else timeout)
        self.paused = False
        self.wake(hurry=True)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for future, _ in self._jobs:
            future.cancel()

    # --- the thread ---

    def _run(self) -> None:
        while self._stop_at is None or (
            self._clock() < self._stop_at and self.position < self._queue.end
        ):
            busy = False
            try:
                if self._stale:
                    self._load()
                if self.position < self._queue.end and not self.paused:
                    busy = True
                    self._apply_next()
                busy |= self._do_jobs()
                if self._stop_at is None and not self.paused:
                    busy |= self._rebuild()
                    self._keep_house()
            except _Stopped:
                return
            except Exception as error:
                # The boundary of the thread: whatever it was, the log keeps the batch.
                if not isinstance(error, StoreRefused):
                    log.exception("A batch could not be applied; it is tried again.")
                self._notify(None)
                if self._stop_at is not None:
                    return
                self._forget()
                self._hurry.wait(RETRY_SECONDS)
                continue
            if not busy:
                self._work.wait(LOOK_SECONDS)
                self._work.clear()

    def _apply_next(self) -> None:
        applied = Applied(self.position)
        self._store.apply(self._changes(applied))
        applied.log_bytes = applied.position - self.position
        self.position = applied.position
        self._notify(applied)
        self._untrimmed += applied.log_bytes + applied.upload_bytes
        if self._untrimmed >= TRIM_BYTES:
            self._untrimmed = 0
            self._trim()
        if self._stop_at is None and not self._hurry.is_set() and not self._rebuilding:
            self._hurry.wait(COMMIT_SECONDS)
        self._hurry.clear()

    def _do_jobs(self) -> bool:
        if not self._jobs:
            return False
        future, job = self._jobs.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except Exception as error:  # noqa: BLE001  (whoever waits for the job is told)
                future.set_exception(error)
        return True

    def _load(self) -> None:
        """Take up the builds as they are stored."""
        self._live, self._rebuilding = {}, {}
        for build in self._store.builds():
            projection = self._compile(build.name, build.spec)
            if build.shadow:
                self._rebuilding[build.name] = Rebuilding(
                    build, projection, self._store, self._queue, self._uploads, self._max_keys
                )
            else:
                self._live[build.name] = Live.of(build, projection, self._store, self._max_keys)

        self._stale = False

    def _forget(self) -> None:
        """Return to what is stored; the log is read again from there."""
        self._stale = True
        while self._handover and self._handover[0].start < self._queue.end:
            self._drop_handed()

    # --- beside the batches ---

    def _rebuild(self) -> bool:
        """A piece of each rebuild; True when there was one."""
        for name, rebuilding in list(self._rebuilding.items()):
            if rebuilding.build.progress < self.position:
                piece = rebuilding.step(self.position)
                if piece is not None:
                    self._store.apply([piece])
            else:
                # The shadow and the live build stand at the same place: the old goes, unmixed.
                self._store.apply([Changes(swap=rebuilding.build)])
                rebuilding.build.shadow = False
                self._live[name] = rebuilding.live
                del self._rebuilding[name]
                self._purging = True
                self._notify(Applied(self.position))
            return True
        return False

    def _keep_house(self) -> None:
        now = self._clock()
        if now - self._looked >= LOOK_SECONDS and self.position == self._queue.end:
            self._looked = now
            self._look_for_quiet_sources()
        if now - self._retained >= RETAIN_SECONDS:
            self._retained = now
            self._trim()
        if self._purging and self.position == self._queue.end:
            self._purging = self._store.purge()

    def _look_for_quiet_sources(self) -> None:
        now = round(self._wall() * MICROSECONDS)
        found = []
        for name, live in self._live.items():
            if live.projection.window.kind != "none":
                since = now - live.projection.window.idle
                found += [
                    (name, source, seen)
                    for source, seen in self._store.quiet(live.build.id, since, QUIET_AT_ONCE)
                ]
        if found:
            self._quiet(Idle(found[:QUIET_AT_ONCE]))

    def _trim(self) -> None:
        """Drop log, uploads and messages that nobody needs, once what was applied is safe."""
        kept = self._retention
        since = self._wall() - kept.seconds
        try:
            self._store.retain(round(since * MICROSECONDS), kept.max_bytes)
            self.drop_applied(since, kept.max_bytes)
        except (OSError, StoreRefused):
            return  # nothing is lost by keeping more; the next turn tries again

    def drop_applied(self, since: float, max_bytes: int, *, dry_run: bool = False) -> int:
        """Drop applied, checkpointed segments and uploads older than `since` or beyond `max_bytes`.

        Returns how many files went (or would go). What a rebuild still reads is kept.
        """
        safe = self._store.checkpoint()
        safe = min([safe, *(each.build.progress for each in self._rebuilding.values())])
        dropped = self._queue.trim(safe, older_than=since, keep_bytes=max_bytes, dry_run=dry_run)
        held = self._queue.statistics().bytes
        gone = []
        for upload in reversed(self._store.uploads()):
            path = self._uploads / upload.name
            held += upload.length
            if upload.position > safe:
                continue
            if held > max_bytes or not path.exists() or path.stat().st_mtime < since:
                gone.append(upload.name)
                if not dry_run:
                    path.unlink(missing_ok=True)
        if gone and not dry_run:
            self._store.forget_uploads(gone)
        return dropped + len(gone)

    # --- one transaction ---

    def _changes(self, applied: Applied) -> Iterator[Changes]:
        """The changes of the next messages, up to TAKE_BYTES or the first upload."""
        chunks: dict[str, Chunk] = {}
        changes = self._begin(self.position)
        limit = self.position + TAKE_BYTES
        folded = 0
        for message in self._messages(limit):
            if isinstance(message, Message) and message.kind != BATCH:
                yield self._fold(chunks, changes)
                chunks.clear()
                changes = self._begin(message.end)
                if message.kind == UPLOAD:
                    yield from self._upload(message, applied)
                    return
                yield from self._other(message, changes)
                changes = self._begin(message.end)
                applied.position = message.end
                continue
            if isinstance(message, Message):
                batch = decode_batch(message.payload)
                live = self._live.get(batch.pipeline)
                events = live.decoder.accepted(batch.body, batch.arrival) if live else []
            else:
                batch, events = message.batch, message.events
                live = self._live.get(batch.pipeline)
            changes.position = applied.position = message.end
            self._count(batch, changes, applied, message.end)
            if live is None:
                continue
            chunk = chunks.get(batch.pipeline)
            if chunk is None:
                chunk = chunks[batch.pipeline] = Chunk(live)
            chunk.add(events, batch, message.end)
            folded += len(events)
            if folded >= FOLD_EVENTS:
                break
        yield self._fold(chunks, changes)

    def _begin(self, position: int) -> Changes:
        now = round(self._wall() * MICROSECONDS)
        return Changes(position, describe=self._describe, now=now)

    def _describe(self, row: Aggregate) -> bytes:
        return closed_message(self._live[row.pipeline].projection, row)

    def _fold(self, chunks: Mapping[str, Chunk], changes: Changes) -> Changes:
        for chunk in chunks.values():
            if chunk.events:
                chunk.fold(changes)
        return changes

    def _other(self, message: Message, changes: Changes) -> Iterator[Changes]:
        """Pipelines that come and go, rebuilds that are asked for, sources that are quiet."""
        if message.kind == PUT:
            put = decode_put(message.payload)
            before = self._live.get(put.name)
            projection = self._compile(put.name, put.spec)
            begins = before.build.begins if before else message.start
            build = Build(message.end, put.name, put.spec, projection.window.lateness, begins)
            changes.put = build
            self._rebuilding.pop(put.name, None)
            self._purging = True
            yield changes
            self._live[put.name] = Live.of(build, projection, self._store, self._max_keys)
            return
        if message.kind == DROP:
            changes.drop = decode_drop(message.payload).name
            self._live.pop(changes.drop, None)
            self._rebuilding.pop(changes.drop, None)
            self._purging = True
        elif message.kind == IDLE:
            entries = decode_idle(message.payload).sources
            for live in self._live.values():
                live.idle(entries)
                live.take_clocks(changes)
        elif message.kind == REBUILD:
            wanted = decode_rebuild(message.payload)
            if (current := self._live.get(wanted.name)) is not None:
                old = current.build
                origin = max(wanted.origin, self._queue.statistics().first)
                build = Build(
                    message.end, old.name, old.spec, old.lateness, old.begins,
                    shadow=True, origin=origin, progress=origin,
                )  # fmt: skip
                changes.shadow = build
                yield changes
                self._rebuilding[build.name] = Rebuilding(
                    build, current.projection, self._store, self._queue, self._uploads,
                    self._max_keys,
                )  # fmt: skip
                return
        yield changes

    def _messages(self, limit: int) -> Iterator[Message | Handed]:
        """What follows `position`: from the hand-over where it is there, else from the log."""
        position = self.position
        end = min(self._queue.end, max(limit, position + 1))
        while position < self._queue.end:
            handed = self._handover[0] if self._handover else None
            if handed is not None and handed.start < position:
                self._drop_handed()
                continue
            if handed is not None and handed.start == position:
                self._drop_handed()
                position = handed.end
                yield handed
            else:
                until = self._queue.end if handed is None else min(handed.start, self._queue.end)
                last = position
                for message in self._queue.read(position, until):
                    last = message.end
                    yield message
                    if last >= end:
                        return
                position = until
                if last < until:  # damaged, with nothing whole behind it
                    yield Message(last, until, PROBE, b"")
            if position >= end:
                return

    def _drop_handed(self) -> None:
        self._taken_bytes += len(self._handover.popleft().batch.body)

    def _count(self, batch: Batch, changes: Changes, applied: Applied, end: int) -> None:
        name = batch.pipeline
        applied.events += batch.accepted
        if name in self._live:
            total = changes.total(name)
            total.accepted += batch.accepted
            total.rejected += len(batch.rejected)
            total.filtered += batch.filtered
            for source, count in batch.duplicates.items():
                total.duplicates += count
                changes.by_source(name, source).duplicates += count
            for code in batch.replayed.values():
                if code == "late":
                    total.late -= 1
                    total.accepted -= 1
                else:
                    total.rejected -= 1
        changes.replayed += batch.replayed
        applied.replayed += batch.replayed
        changes.keys += batch.keys
        changes.rejected += [(name, batch.arrival, end, each) for each in batch.rejected]
        if (promise := batch.promise) is not None:
            promise.receipt.position = end
            changes.answers.append(Answer(promise.key, promise.body, encode(promise.receipt)))
            applied.promises.append(promise.key)

    def _upload(self, message: Message, applied: Applied) -> Iterator[Changes]:
        upload = decode_upload(message.payload)
        name = upload.pipeline
        live = self._live.get(name)
        changes = self._begin(message.end)
        changes.uploads.append(StagedUpload(upload.name, message.end, upload.length))
        if live is not None:
            total = changes.total(name)
            total.accepted += upload.accepted
            total.rejected += upload.rejected
            total.filtered += upload.filtered
            for source, count in upload.duplicates.items():
                total.duplicates += count
                changes.by_source(name, source).duplicates += count
        if (promise := upload.promise) is not None:
            promise.receipt.position = message.end
            changes.answers.append(Answer(promise.key, promise.body, encode(promise.receipt)))
            applied.promises.append(promise.key)
        chunks = {name: Chunk(live)} if live is not None else {}
        read = 0
        for batch in self._staged(upload.name) if live is not None else ():
            if self._stop_at is not None and self._clock() >= self._stop_at:
                raise _Stopped
            assert live is not None  # noqa: S101  (nothing is read without it)
            events, keys = live.decoder.accepted(batch.body, batch.arrival), batch.keys
            read += len(events)
            kept = unskipped(upload.skip, batch.first, len(events))
            if kept is not None:
                events = [events[place] for place in kept]
                keys = b"".join(keys[8 * place : 8 * place + 8] for place in kept)
            changes.keys += keys
            changes.rejected += [
                (name, batch.arrival, message.end, each) for each in batch.rejected
            ]
            chunks[name].add(events, batch, message.end, kept)
            if len(chunks[name].events) >= FOLD_EVENTS:
                yield self._fold(chunks, changes)
                changes = self._begin(message.end)
        yield self._fold(chunks, changes)
        applied.position = message.end
        applied.lost += upload.staged - read if live is not None else 0
        applied.events += upload.accepted
        applied.upload_bytes += upload.length

    def _staged(self, name: str) -> Iterator[Batch]:
        try:
            yield from read_upload(self._uploads / name)
        except FileNotFoundError:
            return  # counted as lost, and reported; what follows in the log is not held up
        except OSError as error:
            raise StoreRefused("A staged upload cannot be read now.") from error


class _Stopped(Exception):
    """The time for a clean end ran out inside an upload, which stays in the log as it is."""
