"""The one thread that turns the log into aggregates: read, fold, commit together with the position.

Recently acknowledged batches are handed over in memory, already decoded; whenever that hand-over is
full, or after a restart, the same messages are read from the log instead. Either way they pass
through the same code in the same order, so the outcome is the same.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from aggregation import PIPELINES
from batches import BATCH, UPLOAD, Batch, decode_batch, decode_upload, encode
from parsing import Decoder
from spool import SAFE_FLAGS, Message, MessageQueue, scan_frames
from storage import Answer, Changes, StagedUpload, Store, StoreRefused
from windows import Tumbling, Watermarks

log = logging.getLogger("applier")

FOLD_EVENTS: Final = 4_000  # events folded at once
TAKE_BYTES: Final = 2 * 1024 * 1024  # of the log in one transaction
HANDOVER_BYTES: Final = 2 * 1024 * 1024
KEEP_BYTES: Final = 256 * 1024 * 1024  # of applied log, and as much of applied uploads
TRIM_BYTES: Final = 64 * 1024 * 1024  # applied since the last look at what may go
COMMIT_SECONDS: Final = 0.03  # between commits under load, so that each has enough to do
RETRY_SECONDS: Final = 0.5  # after the store refused

Decoders = dict[str, Decoder]


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
    late: int = 0
    upload_bytes: int = 0
    lost: int = 0  # records of uploads that were damaged on the disk
    promises: list[bytes] = field(default_factory=list)


class Applier:
    """Applies the log to the store in a thread of its own.

    `notify` is called there after every commit with what was applied, and with None when the store
    refused; the applier then tries again until it is stopped.
    """

    def __init__(
        self,
        queue: MessageQueue,
        store: Store,
        uploads: Path,
        *,
        window: Tumbling,
        notify: Callable[[Applied | None], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._store = store
        self._uploads = uploads
        self._window = window
        self._notify = notify
        self._clock = clock
        self._decoders: Decoders = {name: Decoder(spec) for name, spec in PIPELINES.items()}
        self._watermarks = Watermarks(store.watermark)
        self._handover: deque[Handed] = deque()
        self._handed_bytes = 0
        self._work = threading.Event()
        self._hurry = threading.Event()
        self._stop_at: float | None = None
        self._untrimmed = 0
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
        if self._handed_bytes + size <= HANDOVER_BYTES:
            self._handed_bytes += size
            self._handover.append(handed)
        self._work.set()

    def wake(self, *, hurry: bool = False) -> None:
        """Say that the log has grown; `hurry` when somebody waits for it to be applied."""
        if hurry:
            self._hurry.set()
        self._work.set()

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

    # --- the thread ---

    def _run(self) -> None:
        while True:
            self._work.wait()
            self._work.clear()
            while self.position < self._queue.end and not self.paused:
                if self._stop_at is not None and self._clock() >= self._stop_at:
                    return
                try:
                    applied = self._apply_some()
                except _Stopped:
                    return
                except Exception as error:
                    # The boundary of the thread: whatever it was, the log keeps the batch.
                    if not isinstance(error, StoreRefused):
                        log.exception("A batch could not be applied; it is tried again.")
                    self._forget()
                    self._notify(None)
                    if self._stop_at is not None:
                        return
                    self._pause(RETRY_SECONDS)
                    continue
                self.position = applied.position
                self._notify(applied)
                self._trim(applied)
                if self._stop_at is None and not self._hurry.is_set():
                    self._pause(COMMIT_SECONDS)
                self._hurry.clear()
            if self._stop_at is not None:
                return

    def _trim(self, applied: Applied) -> None:
        """Drop log and uploads that are applied, beyond what is kept, after a checkpoint."""
        self._untrimmed += applied.log_bytes + applied.upload_bytes
        if self._untrimmed < TRIM_BYTES:
            return
        self._untrimmed = 0
        try:
            safe = self._store.checkpoint()
            self._queue.trim(safe - KEEP_BYTES)
            kept = 0
            dropped = []
            for upload in reversed(self._store.uploads()):
                kept += upload.length
                if kept > KEEP_BYTES and upload.position <= safe:
                    (self._uploads / upload.name).unlink(missing_ok=True)
                    dropped.append(upload.name)
            self._store.forget_uploads(dropped)
        except (OSError, StoreRefused):
            return  # nothing is lost by keeping more; the next turn tries again

    def _pause(self, seconds: float) -> None:
        self._hurry.wait(seconds)

    def _forget(self) -> None:
        """Return to what is stored; the log is read again from there."""
        self._watermarks.forget()
        while self._handover and self._handover[0].start < self._queue.end:
            self._handed_bytes -= len(self._handover.popleft().batch.body)

    def _apply_some(self) -> Applied:
        applied = Applied(self.position)
        self._store.apply(self._changes(applied))
        applied.log_bytes = applied.position - self.position
        return applied

    def _changes(self, applied: Applied) -> Iterator[Changes]:
        """The changes of the next messages, up to TAKE_BYTES or the first upload."""
        events: dict[str, list[Any]] = {}
        changes = Changes(self.position)
        limit = self.position + TAKE_BYTES
        for message in self._messages(limit):
            if isinstance(message, Message) and message.kind == UPLOAD:
                yield self._fold(events, changes, applied)
                yield from self._upload(message, applied)
                return
            if isinstance(message, Message):
                if message.kind != BATCH:
                    changes.position = applied.position = message.end
                    continue
                batch = decode_batch(message.payload)
                decoded = self._decode(batch)
            else:
                batch, decoded = message.batch, message.events
            changes.position = applied.position = message.end
            self._count(batch, changes, applied, message.end)
            events.setdefault(batch.pipeline, []).extend(decoded)
            if sum(map(len, events.values())) >= FOLD_EVENTS:
                break
        yield self._fold(events, changes, applied)

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
                # Damage at the very end of a stretch leaves a gap that nothing fills.
                position = until
                if last < until and position >= end:
                    return
            if position >= end:
                return

    def _drop_handed(self) -> None:
        self._handed_bytes -= len(self._handover.popleft().batch.body)

    def _decode(self, batch: Batch) -> list[Any]:
        decoder = self._decoders[batch.pipeline]
        events = decoder.lines(batch.body)
        decoder.spec.arrived(events, batch.arrival)
        return events

    def _count(self, batch: Batch, changes: Changes, applied: Applied, end: int) -> None:
        name = batch.pipeline
        total = changes.total(name, "")
        total.accepted += batch.accepted
        total.rejected += len(batch.rejected)
        for source, count in batch.duplicates.items():
            total.duplicates += count
            changes.total(name, source).duplicates += count
        changes.keys += batch.keys
        changes.rejected += [(name, batch.arrival, end, each) for each in batch.rejected]
        if (promise := batch.promise) is not None:
            promise.receipt.position = end
            changes.answers.append(Answer(promise.key, promise.body, encode(promise.receipt)))
            applied.promises.append(promise.key)
        applied.events += batch.accepted

    def _fold(self, events: dict[str, list[Any]], changes: Changes, applied: Applied) -> Changes:
        for name, decoded in events.items():
            for delta in PIPELINES[name].fold(decoded, self._window, self._watermarks):
                changes.deltas.append((name, delta))
                changes.total(name, "").late += delta.late
                applied.late += delta.late
                if delta.source:
                    by_source = changes.total(name, delta.source)
                    by_source.accepted += delta.count
                    by_source.late += delta.late
        changes.watermarks = self._watermarks.take_changes()
        events.clear()
        return changes

    def _upload(self, message: Message, applied: Applied) -> Iterator[Changes]:
        upload = decode_upload(message.payload)
        staged = StagedUpload(upload.name, message.end, upload.length)
        changes = Changes(message.end, uploads=[staged])
        total = changes.total(upload.pipeline, "")
        total.accepted += upload.accepted
        total.rejected += upload.rejected
        for source, count in upload.duplicates.items():
            total.duplicates += count
            changes.total(upload.pipeline, source).duplicates += count
        if (promise := upload.promise) is not None:
            promise.receipt.position = message.end
            changes.answers.append(Answer(promise.key, promise.body, encode(promise.receipt)))
            applied.promises.append(promise.key)
        events: list[Any] = []
        read = 0
        for batch in self._staged(upload.name):
            if self._stop_at is not None and self._clock() >= self._stop_at:
                raise _Stopped
            decoded, keys = self._decode(batch), batch.keys
            read += len(decoded)
            places = range(len(decoded))
            kept = [i for i in places if not is_marked(upload.skip, batch.first + i)]
            if len(kept) < len(decoded):
                decoded = [decoded[i] for i in kept]
                keys = b"".join(keys[8 * i : 8 * i + 8] for i in kept)
            changes.keys += keys
            changes.rejected += [
                (upload.pipeline, batch.arrival, message.end, each) for each in batch.rejected
            ]
            events += decoded
            if len(events) >= FOLD_EVENTS:
                yield self._fold({upload.pipeline: events}, changes, applied)
                events = []
                changes = Changes(message.end)
        yield self._fold({upload.pipeline: events}, changes, applied)
        applied.position = message.end
        applied.lost += upload.staged - read
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


def read_upload(path: Path) -> Iterator[Batch]:
    """The whole batches of a staged upload; damaged ones are left out."""
    with open(path, "rb", opener=_opener) as file:
        for found in scan_frames(file.read, 0):
            if isinstance(found, Message):
                yield decode_batch(found.payload)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | SAFE_FLAGS)


def is_marked(bitmap: bytes, index: int) -> bool:
    """Whether a bit is set; the bitmap may end early."""
    byte = index >> 3
    return byte < len(bitmap) and bool(bitmap[byte] & (1 << (index & 7)))
