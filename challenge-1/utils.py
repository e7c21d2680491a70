"""The pipeline: what is accepted is on the disk first, and is counted exactly once after.

    body -> blocks -> decoded once -> log (one shared fdatasync) -> acknowledged
                                       |
                                       +-> applier thread -> ONE transaction {aggregates, position,
                                           watermarks, dedupe keys, answers, dead letters}

The event loop owns acceptance: dedupe, admission, the log. The applier thread owns the aggregates.
They share the log, and a hand-over of what was decoded already. Nothing here knows HTTP.
"""

import asyncio
import hashlib
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import psutil

from aggregation import EVENTS, PIPELINES, WEBHOOK, Spec
from applier import Applied, Applier, Handed, is_marked, read_upload
from batches import (
    BATCH,
    PROBE,
    UPLOAD,
    Batch,
    Promise,
    Receipt,
    Upload,
    decode_batch,
    decode_upload,
)
from batches import encode as encode_message
from dedupe import KeyHash, SeenKeys, pack_keys, unpack_keys
from holder import Held, Holder
from measures import Latencies, Rate
from parsing import Block, BodyError, Decoder, Form, Reader, Rejected, read_whole
from spool import (
    FDATASYNC,
    SAFE_FLAGS,
    FileQueue,
    QueueError,
    QueueRefused,
    Sync,
    encode_frame,
    make_directory,
    sync_directory,
    write_all,
)
from storage import SQLiteStore, StoreError, StoreRefused, Totals
from windows import MICROSECONDS, Tumbling

__all__ = [
    "EVENTS",
    "PIPELINES",
    "WEBHOOK",
    "BodyError",
    "Busy",
    "EventRejected",
    "Held",
    "Intake",
    "KeyReused",
    "Pipeline",
    "QueueError",
    "QueueRefused",
    "Receipt",
    "Spec",
    "StoreError",
    "StoreRefused",
    "Totals",
]

Appended = asyncio.Future[tuple[int, int]]

INLINE_BYTES: Final = 256 * 1024  # larger bodies are staged in a file of their own
STAGED_SYNC_BYTES: Final = 16 * 1024 * 1024
KEYS_PER_TURN: Final = 2_000  # of an upload, before other requests get a turn
REPORTED_ERRORS: Final = 20


class Busy(Exception):
    """More is waiting than the bounds allow; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class KeyReused(Exception):
    """An Idempotency-Key came back with another body."""


class EventRejected(ValueError):
    """An event does not have the shape of its pipeline."""


@dataclass
class _Promised:
    """An Idempotency-Key whose first request is on its way."""

    body: bytes
    answer: "asyncio.Future[Receipt]"
    submitted: bool = False  # from then on only the log decides


class Pipeline:
    """Durable, exactly-once windowed aggregation in one process.

    `with` or `async with` opens the data (refusing it while another process has it);
    `await start_workers()` begins, `await ingest_q.put(event)` returns once the event is on the
    disk, `await stop_workers()` applies what was accepted and leaves open windows in the store.
    `queue_maxsize` bounds the puts that wait at the same time. What `put` accepted survives
    `kill -9` and a power cut.
    """

    def __init__(
        self,
        queue_maxsize: int = 1000,
        window_secs: float = 10,
        db_path: str | Path = "aggregates.db",
        logger: Any = None,
        queue_dir: str | Path | None = None,
        *,
        max_event_bytes: int = 1024 * 1024,
        backlog_max_bytes: int = 256 * 1024 * 1024,
        dedupe_keys: int = 1_000_000,
        parser: str = "msgspec",
        clock: Callable[[], float] = time.time,
        sync: Sync = FDATASYNC,
    ) -> None:
        self.window = Tumbling.of_seconds(window_secs)
        self.db_path = Path(db_path)
        self.queue_dir = Path(queue_dir or self.db_path.with_suffix(".queue"))
        self.queue_maxsize = queue_maxsize
        self.max_event_bytes = max_event_bytes
        self.backlog_max_bytes = backlog_max_bytes
        self.dedupe_keys = dedupe_keys
        self.parser = parser
        self.ingest_q = IngestQueue(self)
        self.latencies = Latencies(time.monotonic)
        self.rate = Rate(time.monotonic)
        self.clock = clock
        self._sync = sync
        self._log = logger or logging.getLogger("pipeline")
        self._holders: list[Holder] = []
        self._applier: Applier | None = None
        self._is_open = False

    # --- opening and closing ---

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._open)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop_workers()
        self.close()

    def _open(self) -> None:
        make_directory(self.queue_dir)
        self.db_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            for path in (self.queue_dir / "holder", Path(f"{self.db_path}.lock")):
                self._holders.append(Holder(path))
            self._uploads = self.queue_dir / "uploads"
            make_directory(self._uploads)
            self.store = SQLiteStore(self.db_path, keep_keys=self.dedupe_keys)
            self.queue = FileQueue(self.queue_dir / "ingest", sync=self._sync)
            self._recover()
        except BaseException:
            self._release()
            raise
        self._is_open = True

    def _recover(self) -> None:
        """Rebuild what lives in memory from the store and the unapplied end of the log."""
        self._hash = KeyHash(self.store.secret)
        self._seen = SeenKeys(self.dedupe_keys)
        self._claimed: dict[int, None] = {}  # keys of what is being made durable
        self._promised: dict[bytes, _Promised] = {}
        self._unapplied: dict[bytes, tuple[bytes, Receipt]] = {}
        self._merging = asyncio.Lock()
        self.decoders = {n: Decoder(spec, self.parser) for n, spec in PIPELINES.items()}
        self._submitted: set[Appended] = set()
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self.totals: dict[str, Totals] = {name: Totals() for name in PIPELINES}
        self.waiting = self.staging = 0
        self.store_works = self.queue_works = True
        self._upload_backlog = self._reported_damage = 0
        for keys in self.store.seen():
            self._seen.update(unpack_keys(keys))
        for (name, source), totals in self.store.totals().items():
            if not source:
                self.totals[name] = totals
        self.applied_events = sum(totals.accepted for totals in self.totals.values())
        live = {upload.name for upload in self.store.uploads()}
        self.queue_position = self.store.position()
        if self.queue_position > self.queue.end:
            raise QueueError(
                f"The database has applied the log up to {self.queue_position:,}, but the log ends "
                f"at {self.queue.end:,}: DB_PATH and QUEUE_DIR do not belong together."
            )
        for message in self.queue.read(self.queue_position):
            if message.kind == BATCH:
                self._recover_batch(decode_batch(message.payload), message.end)
            elif message.kind == UPLOAD:
                upload = decode_upload(message.payload)
                live.add(upload.name)
                self._recover_upload(upload, message.end)
        for path in self._uploads.iterdir():
            if path.name not in live:  # never committed: its client was not answered
                path.unlink()

    def _recover_batch(self, batch: Batch, end: int) -> None:
        self._seen.update(unpack_keys(batch.keys))
        self._count(batch.pipeline, batch.accepted, len(batch.rejected), batch.duplicates)
        self._keep_answer(batch.promise, end)

    def _recover_upload(self, upload: Upload, end: int) -> None:
        with suppress(FileNotFoundError):
            for batch in read_upload(self._uploads / upload.name):
                for place, key in enumerate(unpack_keys(batch.keys), batch.first):
                    if not is_marked(upload.skip, place):
                        self._seen.add(key)
        self._upload_backlog += upload.length
        self._count(upload.pipeline, upload.accepted, upload.rejected, upload.duplicates)
        self._keep_answer(upload.promise, end)

    def _keep_answer(self, promise: Promise | None, end: int) -> None:
        if promise is not None:
            promise.receipt.position = end
            self._unapplied[promise.key] = (promise.body, promise.receipt)

    async def start_workers(self) -> None:
        """Begin to apply; call it in the event loop that will accept."""
        self._loop = asyncio.get_running_loop()
        applier = Applier(
            self.queue,
            self.store,
            self._uploads,
            window=self.window,
            notify=self._notify,
        )
        self._applier = applier
        applier.start()

    async def stop_workers(self, timeout: float | None = None) -> None:
        """Apply what is accepted (for `timeout` seconds at most), then stop; idempotent.

        What is left stays in the log and is applied after the next start.
        """
        applier, self._applier = self._applier, None
        if applier is not None:
            while self._submitted:
                await asyncio.wait(self._submitted)
            await asyncio.to_thread(applier.stop, timeout)

    def close(self) -> None:
        """Stop the worker if it runs, and release the data; idempotent, blocking."""
        if self._applier is not None:
            self._applier.stop()
            self._applier = None
        if self._is_open:
            self._is_open = False
            with suppress(StoreRefused):
                self.store.checkpoint()
        self._release()

    def _release(self) -> None:
        for name in ("queue", "store"):
            if (part := self.__dict__.get(name)) is not None:
                part.close()
        while self._holders:
            self._holders.pop().release()

    # --- accepting ---

    def admit(self) -> None:
        """Raise Busy when the bounds are reached; call it before reading a body."""
        if self.waiting >= self.queue_maxsize:
            raise Busy(f"{self.waiting:,} requests are waiting already; send this again.", 1)
        if self.backlog_bytes >= self.backlog_max_bytes:
            seconds = self.backlog_events / max(self.rate.per_second(), 1000.0)
            raise Busy(
                f"{self.backlog_bytes:,} bytes are waiting to be aggregated, the bound is "
                f"{self.backlog_max_bytes:,}; send this again later.",
                min(60, max(1, math.ceil(seconds / 2))),
            )

    def intake(self, spec: Spec) -> "Intake":
        """Begin to take one body."""
        return Intake(self, spec)

    def reader(self, spec: Spec, form: Form) -> Reader:
        """A reader for one body of this form."""
        return Reader(self.decoders[spec.name], form, max_event_bytes=self.max_event_bytes)

    def read_whole(self, spec: Spec, form: Form, data: bytes) -> Block | None:
        """The block of a small object that came in one piece; None for every other body."""
        return read_whole(self.decoders[spec.name], form, data, self.max_event_bytes)

    async def applied(self, position: int) -> None:
        """Return once everything before `position` can be seen in the aggregates."""
        if self._applier is None or position <= self.queue_position:
            return
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.append((position, waiter))
        self._applier.wake(hurry=True)
        await waiter

    def pause_applying(self, paused: bool = True) -> None:
        """Hold the applier back, or let it go on; what is accepted meanwhile waits in the log."""
        if self._applier is not None:
            self._applier.paused = paused
            self._applier.wake()

    @property
    def backlog_bytes(self) -> int:
        """Bytes that are acknowledged and not yet aggregated."""
        return self.queue.end - self.queue_position + self._upload_backlog

    @property
    def backlog_events(self) -> int:
        """Events that are acknowledged and not yet aggregated."""
        return sum(t.accepted for t in self.totals.values()) - self.applied_events

    def get_resource_metrics(self) -> dict[str, Any]:
        """What the process and the pipeline use now."""
        process = psutil.Process()
        with process.oneshot():
            return {
                "cpu_seconds": sum(process.cpu_times()[:2]),
                "memory_bytes": process.memory_info().rss,
                "open_files": process.num_fds() if hasattr(process, "num_fds") else None,
                "threads": process.num_threads(),
                "queue_size": self.waiting,
                "queue_maxsize": self.queue_maxsize,
                "backlog_events": self.backlog_events,
                "backlog_bytes": self.backlog_bytes,
                "accepted": sum(t.accepted for t in self.totals.values()),
                "applied": self.applied_events,
            }

    async def accept(
        self,
        spec: Spec,
        blocks: list[Block],
        status: int = 202,
        key: tuple[bytes, bytes] | None = None,
    ) -> Receipt:
        """Make one small body durable, in one message; raise QueueRefused."""
        arrival = int(self.clock() * MICROSECONDS)
        if spec.has_ids and self._merging.locked():
            async with self._merging:  # an upload is claiming its keys
                pass
        keys: list[int] = []
        duplicates: dict[str, int] = {}
        if spec.has_ids:
            events, lines = self._claim(blocks, keys, duplicates)
            body = b"\n".join(lines)
        else:
            events = blocks[0].events if len(blocks) == 1 else [e for b in blocks for e in b.events]
            body = blocks[0].raw if len(blocks) == 1 else b"\n".join(b.raw for b in blocks if b.raw)
        rejected = [each for block in blocks for each in block.rejected]
        receipt = Receipt(
            len(events), len(rejected), sum(duplicates.values()), _reported(rejected), status
        )
        batch = Batch(
            spec.name, arrival, body, len(events), pack_keys(keys), duplicates, rejected,
            Promise(*key, receipt) if key else None,
        )  # fmt: skip
        try:
            promise = self._submit(BATCH, batch, key, receipt)
        except QueueError:
            for each in keys:
                self._claimed.pop(each, None)
            raise
        spec.arrived(events, arrival)
        promise.add_done_callback(partial(self._batch_settled, batch, events, keys, receipt))
        await asyncio.shield(promise)
        return receipt

    def _submit(
        self,
        kind: int,
        message: Batch | Upload,
        key: tuple[bytes, bytes] | None,
        receipt: Receipt,
    ) -> Appended:
        promise = self.queue.submit(kind, encode_message(message))
        self._submitted.add(promise)
        promise.add_done_callback(self._submission_settled)
        if key is not None:
            self._promised[key[0]].submitted = True
            promise.add_done_callback(partial(self._answer_settled, key, receipt))
        return promise

    def _submission_settled(self, promise: Appended) -> None:
        self._submitted.discard(promise)
        self.queue_works = promise.exception() is None

    def _claim(
        self, blocks: Iterable[Block], keys: list[int], duplicates: dict[str, int]
    ) -> tuple[list[Any], list[bytes]]:
        """The events that are new, and their lines; their keys are claimed until durable."""
        events: list[Any] = []
        lines: list[bytes] = []
        claimed, seen, digest = self._claimed, self._seen, self._hash
        for block in blocks:
            for event, line in zip(block.events, block.split(), strict=True):
                key = digest(event.event_id)
                if key in claimed or key in seen:
                    duplicates[event.source] = duplicates.get(event.source, 0) + 1
                    continue
                claimed[key] = None
                keys.append(key)
                events.append(event)
                lines.append(line)
        return events, lines

    def _batch_settled(
        self,
        batch: Batch,
        events: list[Any],
        keys: list[int],
        receipt: Receipt,
        promise: Appended,
    ) -> None:
        for key in keys:
            del self._claimed[key]
        if promise.exception() is not None:
            return
        start, end = promise.result()
        receipt.position = end
        for key in keys:
            self._seen.add(key)
        self._count(batch.pipeline, batch.accepted, len(batch.rejected), batch.duplicates)
        self.rate.add(batch.accepted, time.monotonic())
        if self._applier is not None:
            self._applier.hand_over(Handed(start, end, batch, events))

    def _upload_settled(
        self, upload: Upload, newer: SeenKeys | None, receipt: Receipt, promise: Appended
    ) -> None:
        if promise.exception() is not None:
            with suppress(OSError):
                (self._uploads / upload.name).unlink()
            return
        receipt.position = promise.result()[1]
        if newer is not None:
            self._seen.absorb(newer)
        self._upload_backlog += upload.length
        self._count(upload.pipeline, upload.accepted, upload.rejected, upload.duplicates)
        self.rate.add(upload.accepted, time.monotonic())
        if self._applier is not None:
            self._applier.wake()

    def _answer_settled(
        self, key: tuple[bytes, bytes], receipt: Receipt, promise: Appended
    ) -> None:
        promised = self._promised.pop(key[0])
        if (error := promise.exception()) is not None:
            promised.answer.set_exception(error)
            promised.answer.exception()
            return
        receipt.position = promise.result()[1]
        self._unapplied[key[0]] = (key[1], receipt)
        promised.answer.set_result(receipt)

    def _promise(self, key: tuple[bytes, bytes]) -> None:
        """Let repeats of this key wait for the request that begins now."""
        answer: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._promised[key[0]] = _Promised(key[1], answer)

    def _withdraw(self, key: tuple[bytes, bytes]) -> None:
        """The first request with this key failed before it reached the log."""
        promised = self._promised.get(key[0])
        if promised is not None and not promised.submitted:
            del self._promised[key[0]]
            promised.answer.set_exception(
                Busy("The first request with this Idempotency-Key failed; send it again.", 1)
            )
            promised.answer.exception()

    def _count(
        self, pipeline: str, accepted: int, rejected: int, duplicates: dict[str, int]
    ) -> None:
        self.totals[pipeline].add(Totals(accepted, rejected, sum(duplicates.values())))

    async def _answer_to(self, key: tuple[bytes, bytes]) -> Receipt | None:
        """What this Idempotency-Key was answered; without an await when it is new."""
        name, body = key
        if (promised := self._promised.get(name)) is not None:
            known = promised.body
            receipt = await asyncio.shield(promised.answer)
        elif name in self._unapplied:
            known, receipt = self._unapplied[name]
        elif (stored := self.store.answer(name)) is not None:
            known = stored.body
            receipt = msgspec.msgpack.decode(stored.answer, type=Receipt)
        else:
            return None
        if known != body:
            raise KeyReused(
                "This Idempotency-Key was used with another body. Use a new key for a new body."
            )
        return receipt

    def digest(self, text: str) -> bytes:
        """A 16-byte digest of an idempotency key."""
        return hashlib.blake2b(text.encode(), digest_size=16, key=self.store.secret).digest()

    async def probe_queue(self) -> bool:
        """Whether the disk takes messages; after a refusal an empty one is tried."""
        if not self.queue_works:
            with suppress(QueueRefused):
                probe = self.queue.submit(PROBE, b"")
                probe.add_done_callback(self._submission_settled)
                await asyncio.shield(probe)
        return self.queue_works

    # --- what the applier says ---

    def _notify(self, applied: Applied | None) -> None:
        """In the applier's thread."""
        with suppress(RuntimeError):  # the loop is gone: the process ends
            self._loop.call_soon_threadsafe(self._on_applied, applied)

    def _on_applied(self, applied: Applied | None) -> None:
        if applied is None:
            if self.store_works:
                self._log.error("The store refuses batches; they wait in the log.")
            self.store_works = False
            return
        self.store_works = True
        self.queue_position = applied.position
        self.applied_events += applied.events
        self._upload_backlog -= applied.upload_bytes
        for key in applied.promises:
            self._unapplied.pop(key, None)
        if applied.lost:
            self._log.error("A staged upload is damaged: %d records are lost.", applied.lost)
        if (damaged := self.queue.statistics().corrupt_frames) > self._reported_damage:
            self._reported_damage = damaged
            self._log.error("The log is damaged in %d places; the rest was applied.", damaged)
        due = [waiter for position, waiter in self._waiters if position <= applied.position]
        if due:
            self._waiters = [each for each in self._waiters if each[0] > applied.position]
            for waiter in due:
                if not waiter.done():
                    waiter.set_result(None)


class Intake:
    """One body on its way in: kept in memory while small, staged in a file when large.

    Nothing of it can be seen before `commit`, and nothing is left after `abort`.
    """

    def __init__(self, pipeline: Pipeline, spec: Spec) -> None:
        self.accepted = self.rejected = 0
        self.repeated = False
        self.codes: set[str] = set()
        self.errors: list[dict[str, Any]] = []
        self._pipeline = pipeline
        self._spec = spec
        self._blocks: list[Block] = []
        self._held_bytes = 0
        self._path: Path | None = None
        self._fd = -1
        self._length = self._staged = self._synced = 0
        self._arrival = int(pipeline.clock() * MICROSECONDS)

    async def add(self, block: Block) -> None:
        """Take a block; raise QueueRefused when the disk does not."""
        self.accepted += len(block.events)
        self.rejected += len(block.rejected)
        if block.rejected:
            self.codes.update(each.code for each in block.rejected)
            self.errors += _reported(block.rejected)[: REPORTED_ERRORS - len(self.errors)]
        if self._path is not None:
            await self._stage(block)
            return
        self._blocks.append(block)
        self._held_bytes += len(block.raw) + sum(len(each.raw) for each in block.rejected)
        if self._held_bytes > INLINE_BYTES:
            self._path = self._pipeline._uploads / uuid.uuid4().hex
            blocks, self._blocks = self._blocks, []
            for each in blocks:
                await self._stage(each)

    async def _stage(self, block: Block) -> None:
        """Write a block to the upload's own file, framed like the log."""
        hash_key = self._pipeline._hash
        ids = (hash_key(event.event_id) for event in block.events) if self._spec.has_ids else ()
        batch = Batch(
            self._spec.name, self._arrival, block.raw, len(block.events), pack_keys(ids),
            rejected=block.rejected, first=self._staged,
        )  # fmt: skip
        frame = encode_frame(BATCH, self._length, encode_message(batch))
        try:
            if self._fd < 0:
                assert self._path is not None  # noqa: S101  (set by add)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | SAFE_FLAGS
                self._fd = os.open(self._path, flags, 0o600)
            write_all(self._fd, frame)
            self._length += len(frame)
            self._staged += len(block.events)
            if self._length - self._synced >= STAGED_SYNC_BYTES:
                self._synced = self._length
                await asyncio.to_thread(self._pipeline._sync, self._fd)
        except OSError as error:
            raise QueueRefused(error) from error

    async def commit(self, status: int, key: tuple[bytes, bytes] | None = None) -> Receipt:
        """Make the body durable and visible; raise QueueRefused, and leave nothing, otherwise.

        `key` is the digest of an Idempotency-Key and that of the body. When it has been answered
        already, nothing is added, `repeated` is set, and the first answer is returned; raises
        KeyReused when it was answered for another body.
        """
        if key is None:
            return await self._commit(status, None)
        pipeline = self._pipeline
        if (receipt := await pipeline._answer_to(key)) is not None:
            self.repeated = True
            return receipt
        pipeline._promise(key)
        try:
            return await self._commit(status, key)
        finally:
            pipeline._withdraw(key)

    async def _commit(self, status: int, key: tuple[bytes, bytes] | None) -> Receipt:
        pipeline = self._pipeline
        if self._path is None:
            return await pipeline.accept(self._spec, self._blocks, status, key)
        try:
            await asyncio.to_thread(self._close_file)
            if not self._spec.has_ids:
                return await self._publish(status, key, b"", {}, None)
            async with pipeline._merging:
                while pipeline._submitted:  # their keys are not certain yet
                    await asyncio.wait(pipeline._submitted)
                newer = SeenKeys(pipeline.dedupe_keys)
                skip, duplicates = await self._find_duplicates(newer)
                return await self._publish(status, key, skip, duplicates, newer)
        except OSError as error:
            raise QueueRefused(error) from error

    def _close_file(self) -> None:
        self._pipeline._sync(self._fd)
        os.close(self._fd)
        self._fd = -1
        sync_directory(self._pipeline._uploads)

    async def _find_duplicates(self, newer: SeenKeys) -> tuple[bytes, dict[str, int]]:
        """Which records are duplicates: a bitmap, and how many by source."""
        pipeline, path = self._pipeline, self._path
        assert path is not None  # noqa: S101  (only staged bodies come here)
        skip = bytearray()
        duplicates: dict[str, int] = {}
        seen = pipeline._seen
        for batch in read_upload(path):
            found = []
            for place, key in enumerate(unpack_keys(batch.keys)):
                if key in newer or key in seen:
                    found.append(place)
                else:
                    newer.add(key)
                if place % KEYS_PER_TURN == 0:
                    await asyncio.sleep(0)
            if found:
                sources = [
                    event.source for event in pipeline.decoders[batch.pipeline].lines(batch.body)
                ]
                for place in found:
                    source = sources[place]
                    duplicates[source] = duplicates.get(source, 0) + 1
                    mark(skip, batch.first + place)
        return bytes(skip), duplicates

    async def _publish(
        self,
        status: int,
        key: tuple[bytes, bytes] | None,
        skip: bytes,
        duplicates: dict[str, int],
        newer: SeenKeys | None,
    ) -> Receipt:
        repeated = sum(duplicates.values())
        accepted = self.accepted - repeated
        receipt = Receipt(accepted, self.rejected, repeated, self.errors, status)
        assert self._path is not None  # noqa: S101  (only staged bodies come here)
        upload = Upload(
            self._spec.name, self._arrival, self._path.name, self._length, self._staged, accepted,
            duplicates, self.rejected, skip, Promise(*key, receipt) if key else None,
        )  # fmt: skip
        promise = self._pipeline._submit(UPLOAD, upload, key, receipt)
        self._path = None  # from here on the log decides whether the file stays
        promise.add_done_callback(partial(self._pipeline._upload_settled, upload, newer, receipt))
        await asyncio.shield(promise)
        return receipt

    def abort(self) -> None:
        """Leave nothing behind; idempotent, and without effect after `commit`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink()
            self._path = None
        self._blocks = []


class IngestQueue:
    """The way in from Python: `await put(event)` returns when the event is durable."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._room = asyncio.Semaphore(pipeline.queue_maxsize)
        self._readers: dict[str, Any] = {}

    @property
    def maxsize(self) -> int:
        """How many puts may wait for the disk at the same time; more wait for their turn."""
        return self._pipeline.queue_maxsize

    def qsize(self) -> int:
        """How many puts wait for the disk now."""
        return self._pipeline.waiting

    async def put(self, event: dict[str, Any], pipeline: str | None = None) -> Receipt:
        """Accept one event; raise EventRejected when it does not fit, QueueRefused when the disk
        refuses. With the backlog at its bound it waits for the applier.

        The pipeline is `events` for an event with an `event_id`, else `webhook`.
        """
        owner = self._pipeline
        name = pipeline or ("events" if "event_id" in event else "webhook")
        spec = PIPELINES[name]
        reader = owner.reader(spec, "json")
        try:
            blocks = [*reader.feed(msgspec.json.encode(event)), *reader.finish()]
        except (BodyError, TypeError) as error:
            raise EventRejected(str(error)) from error
        if bad := blocks[0].rejected:
            raise EventRejected(bad[0].message)
        async with self._room:
            while owner.backlog_bytes >= owner.backlog_max_bytes:
                await owner.applied(owner.queue_position + 1)
            owner.waiting += 1
            try:
                return await owner.accept(spec, blocks)
            finally:
                owner.waiting -= 1


def mark(bitmap: bytearray, index: int) -> None:
    """Set a bit, growing the bitmap as needed."""
    byte = index >> 3
    if byte >= len(bitmap):
        bitmap.extend(bytes(byte + 1 - len(bitmap)))
    bitmap[byte] |= 1 << (index & 7)


def _reported(rejected: list[Rejected]) -> list[dict[str, Any]]:
    """The first errors, as they are shown."""
    shown = []
    for each in rejected[:REPORTED_ERRORS]:
        where = {"line": each.line} if each.line is not None else {"index": each.index}
        shown.append({**where, "offset": each.offset, "code": each.code, "message": each.message})
    return shown
