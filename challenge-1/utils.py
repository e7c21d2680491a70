"""The pipeline: what is accepted is on the disk first, and is counted exactly once after.

    body -> blocks -> decoded once -> log (one shared fdatasync) -> acknowledged
                                       |
                                       +-> applier thread -> ONE transaction {aggregates, position,
                                           watermarks, dedupe keys, answers, dead letters, messages}

The event loop owns acceptance: pipelines, dedupe, admission, the log. The applier thread owns the
aggregates. They share the log, and a hand-over of what is decoded already. Nothing here knows HTTP.
"""

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec
import psutil
from pydantic import ValidationError

import builtin
from answers import Answers, Busy, Key, KeyReused
from applier import Applied, Applier, Handed, Retention
from batches import (
    BATCH,
    DROP,
    IDLE,
    PROBE,
    PUT,
    REBUILD,
    UPLOAD,
    Batch,
    Drop,
    Idle,
    Promise,
    Put,
    Rebuild,
    Receipt,
    Upload,
    decode_batch,
    decode_drop,
    decode_put,
    decode_upload,
    encode,
)
from dedupe import KeyHash, SeenKeys, pack_keys, unpack_keys
from holder import Held, Holder
from intake import Intake, filtered_of, reported
from measures import Latencies, Rate
from parsing import Block, BodyError, Decoder, Form, Reader, read_whole
from projection import Projection, compile_spec
from specs import MAX_PIPELINES, PipelineSpec
from spool import FDATASYNC, Appended, FileQueue, QueueError, QueueRefused, Sync, make_directory
from sqlite_store import SQLiteStore
from storage import DeadLetter, StoreError, StoreRefused, Totals
from topics import Topics
from uploads import is_marked, read_upload
from windows import MICROSECONDS, Window

if TYPE_CHECKING:
    from settings import Settings

__all__ = [
    "BodyError",
    "Busy",
    "EventRejected",
    "Held",
    "Intake",
    "KeyReused",
    "Pipeline",
    "PipelineConflict",
    "PipelineSpec",
    "PipelineUnknown",
    "Projection",
    "QueueError",
    "QueueRefused",
    "Receipt",
    "StoreError",
    "StoreRefused",
    "Topics",
    "Totals",
]

REPLAYED_AT_ONCE: Final = 200  # dead letters that come to life in one message


class EventRejected(ValueError):
    """An event does not have the shape of its pipeline."""


class PipelineUnknown(LookupError):
    """There is no pipeline of this name."""


class PipelineConflict(Exception):
    """The pipeline is not what the request takes it for."""


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
        max_keys: int = 100_000,
        max_future_seconds: float = 3600,
        retention: Retention | None = None,
        parser: str = "msgspec",
        clock: Callable[[], float] = time.time,
        sync: Sync = FDATASYNC,
    ) -> None:
        self.window = Window.of("tumbling", window_secs, revises_for_ever=True)
        self.db_path = Path(db_path)
        self.queue_dir = Path(queue_dir or self.db_path.with_suffix(".queue"))
        self.uploads = self.queue_dir / "uploads"
        self.queue_maxsize = queue_maxsize
        self.max_event_bytes = max_event_bytes
        self.backlog_max_bytes = backlog_max_bytes
        self.dedupe_keys = dedupe_keys
        self.max_keys = max_keys
        self.max_future_seconds = max_future_seconds
        self.retention = retention or Retention()
        self.parser = parser
        self.ingest_q = IngestQueue(self)
        self.latencies = Latencies(time.monotonic)
        self.rate = Rate(time.monotonic)
        self.clock = clock
        self.sync = sync
        self._built_in = {
            each.name: each for each in (builtin.webhook(window_secs), builtin.events())
        }
        self._log = logger or logging.getLogger("pipeline")
        self._holders: list[Holder] = []
        self._applier: Applier | None = None
        self._is_open = False

    # --- opening and closing ---

    @classmethod
    def configured(cls, settings: "Settings", logger: Any = None) -> Self:
        """The pipeline that the environment describes, as the service and the commands open it."""
        return cls(
            settings.queue_maxsize,
            settings.window_secs,
            settings.db_path,
            logger,
            settings.queue_dir,
            max_event_bytes=settings.max_event_bytes,
            backlog_max_bytes=settings.backlog_max_bytes,
            dedupe_keys=settings.dedupe_keys,
            max_keys=settings.max_keys,
            max_future_seconds=settings.max_future_seconds,
            retention=Retention(settings.queue_retain_days * 86_400, settings.queue_max_bytes),
            parser=settings.parser,
        )

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
            make_directory(self.uploads)
            self.store = SQLiteStore(self.db_path, keep_keys=self.dedupe_keys)
            self.queue = FileQueue(self.queue_dir / "ingest", sync=self.sync)
            self.topics = Topics(self.store, self.queue_dir, lambda: self.queue.end)
            self._recover()
        except BaseException:
            self._release()
            raise
        self._is_open = True

    def _recover(self) -> None:
        """Rebuild what lives in memory from the store and the unapplied end of the log."""
        self.store.ensure_built_in({n: p.window.lateness for n, p in self._built_in.items()})
        self.key_hash = KeyHash(self.store.secret)
        self.seen = SeenKeys(self.dedupe_keys)
        self.answers = Answers(self.store)
        self._claimed: dict[int, None] = {}  # keys of what is being made durable
        self.merging = asyncio.Lock()
        self._changing = asyncio.Lock()
        self._replaying = asyncio.Lock()
        self._revived: set[int] = set()  # dead letters that came to life, not yet applied
        self.projections: dict[str, Projection] = {}
        self.decoders: dict[str, Decoder] = {}
        self.put_at: dict[str, int] = {}  # where the log says that the pipeline is there
        self.totals: dict[str, Totals] = {}
        self._submitted: set[Appended] = set()
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self.grown: asyncio.Event | None = None
        self.waiting = 0
        self.store_works = self.queue_works = True
        self._upload_backlog = self._reported_damage = 0
        for build in self.store.builds():
            if not build.shadow:
                self._adopt(self._compile(build.name, build.spec), build.id)
        for keys in self.store.seen():
            self.seen.update(unpack_keys(keys))
        for (name, source), totals in self.store.totals().items():
            if not source and name in self.totals:
                self.totals[name] = totals
        self.applied_events = self.accepted_events = sum(
            totals.accepted for totals in self.totals.values()
        )
        live = {upload.name for upload in self.store.uploads()}
        self.queue_position = self.store.position()
        if self.queue_position > self.queue.end:
            if not self.queue.statistics().torn_bytes:
                raise QueueError(
                    f"The database has applied the log up to {self.queue_position:,}, but the log "
                    f"ends at {self.queue.end:,}: DB_PATH and QUEUE_DIR do not belong together."
                )
            self.queue.skip_to(self.queue_position)  # its damaged end had been applied
        for message in self.queue.read(self.queue_position):
            if message.kind == BATCH:
                self._recover_batch(decode_batch(message.payload), message.end)
            elif message.kind == UPLOAD:
                upload = decode_upload(message.payload)
                live.add(upload.name)
                self._recover_upload(upload, message.end)
            elif message.kind == PUT:
                put = decode_put(message.payload)
                self._adopt(self._compile(put.name, put.spec), message.end)
            elif message.kind == DROP:
                self._abandon(decode_drop(message.payload).name)
        for path in self.uploads.iterdir():
            if path.name not in live:  # never committed: its client was not answered
                path.unlink()

    def _recover_batch(self, batch: Batch, end: int) -> None:
        self.seen.update(unpack_keys(batch.keys))
        self._count(batch)
        self._revived.update(batch.replayed)
        self.answers.recovered(batch.promise, end)

    def _recover_upload(self, upload: Upload, end: int) -> None:
        with suppress(FileNotFoundError):
            for batch in read_upload(self.uploads / upload.name):
                for place, key in enumerate(unpack_keys(batch.keys), batch.first):
                    if not is_marked(upload.skip, place):
                        self.seen.add(key)
        self._upload_backlog += upload.length
        self._count_upload(upload)
        self.answers.recovered(upload.promise, end)

    async def start_workers(self) -> None:
        """Begin to apply; call it in the event loop that will accept."""
        self._loop = asyncio.get_running_loop()
        self.grown = asyncio.Event()
        applier = Applier(
            self.queue,
            self.store,
            self.uploads,
            compile_=self._compile,
            notify=self._notify,
            quiet=self._submit_quiet,
            wall=self.clock,
            max_keys=self.max_keys,
            retention=self.retention,
        )
        self._applier = applier
        applier.start()

    async def stop_workers(self, timeout: float | None = None) -> None:
        """Apply what is accepted (for `timeout` seconds at most), then stop; idempotent.

        What is left stays in the log and is applied after the next start.
        """
        applier, self._applier = self._applier, None
        if applier is not None:
            await self.settled()
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

    # --- pipelines ---

    def _compile(self, name: str, spec: str | None) -> Projection:
        if name in self._built_in:
            return self._built_in[name]
        return compile_spec(name, PipelineSpec.model_validate_json(spec or "{}"))

    def _adopt(self, projection: Projection, position: int) -> None:
        """From here on this is the pipeline of its name; it begins empty."""
        name = projection.name
        self.projections[name] = projection
        self.decoders[name] = Decoder(projection, self.parser, self._horizon)
        self.put_at[name] = position
        self.totals[name] = Totals()

    def _abandon(self, name: str) -> None:
        for part in self._registry().values():
            part.pop(name, None)

    def _horizon(self) -> int:
        return round((self.clock() + self.max_future_seconds) * MICROSECONDS)

    def projection(self, name: str) -> Projection:
        """The pipeline of this name; raises PipelineUnknown."""
        try:
            return self.projections[name]
        except KeyError:
            raise PipelineUnknown(
                "There is no pipeline of this name; GET /pipelines lists those there are."
            ) from None

    def check_current(self, projection: Projection) -> None:
        """Raise PipelineConflict when the pipeline was put anew or deleted in the meantime."""
        if self.projections.get(projection.name) is not projection:
            raise PipelineConflict(
                "The pipeline was changed or deleted while this came in; nothing of it was kept."
            )

    async def put_pipeline(self, name: str, spec: PipelineSpec, *, replace: bool = False) -> bool:
        """Make a pipeline, durable when this returns; True when it is new or starts anew.

        The same spec again changes nothing; another one raises PipelineConflict unless `replace`,
        which lets the pipeline start empty.
        """
        async with self._changing:
            if name in self._built_in:
                raise PipelineConflict(f"`{name}` is built in and cannot be changed.")
            known = self.projections.get(name)
            if known is not None and known.spec is not None:
                if known.spec.canonical() == spec.canonical():
                    return False
                if not replace:
                    raise PipelineConflict(
                        "There is another pipeline of this name. Delete it, choose another name, "
                        "or put it with ?replace=true: then its aggregates start empty."
                    )
            elif len(self.projections) - len(self._built_in) >= MAX_PIPELINES:
                raise PipelineConflict(
                    f"There are {MAX_PIPELINES} pipelines, which is the bound: delete one first."
                )
            projection = compile_spec(name, spec)
            await self._change(name, PUT, Put(name, spec.canonical()), projection)
            return True

    async def delete_pipeline(self, name: str) -> None:
        """Delete a pipeline and its aggregates, durable when this returns."""
        async with self._changing:
            if name in self._built_in:
                raise PipelineConflict(f"`{name}` is built in and cannot be deleted.")
            self.projection(name)
            await self._change(name, DROP, Drop(name), None)

    async def _change(
        self, name: str, kind: int, message: Put | Drop, projection: Projection | None
    ) -> None:
        """Log the change. What was read for the old pipeline cannot be committed behind it."""
        before = {key: part.get(name) for key, part in self._registry().items()}
        self._abandon(name)
        try:
            _, end = await asyncio.shield(self._submit_alone(kind, message))
        except BaseException:
            for key, part in self._registry().items():
                if before[key] is not None:
                    part[name] = before[key]
            raise
        if projection is not None:
            self._adopt(projection, end)
        await self.applied(end)

    def _registry(self) -> dict[str, dict[str, Any]]:
        return {
            "projections": self.projections, "decoders": self.decoders, "put_at": self.put_at,
            "totals": self.totals,
        }  # fmt: skip

    async def rebuild(self, name: str, origin: int) -> int:
        """Ask for the aggregates to be built anew from a position of the log; tell where that is.

        Raises PipelineConflict while one is under way or when the log does not go back so far.
        """
        self.projection(name)
        first, end = self.queue.statistics().first, self.queue.end
        if not 0 <= origin <= end:
            raise PipelineConflict(f"`from` is a position of the log, which ends at {end}.")
        if any(build.shadow and build.name == name for build in self.store.builds()):
            raise PipelineConflict("A rebuild of this pipeline is under way; wait for its end.")
        if origin < end:
            origin = await asyncio.to_thread(self.topics.message_at, origin)
        _, position = await asyncio.shield(
            self._submit_alone(REBUILD, Rebuild(name, max(origin, first)))
        )
        await self.applied(position)
        return position

    async def rebuilt(self, name: str) -> None:
        """Return once no rebuild of this pipeline is under way."""
        while self._applier is not None:
            grown = self.grown  # taken first, so that an end in between is not missed
            builds = await asyncio.to_thread(self.store.builds)
            if grown is None or not any(b.shadow and b.name == name for b in builds):
                return
            await grown.wait()

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

    def intake(self, projection: Projection) -> Intake:
        """Begin to take one body."""
        return Intake(self, projection)

    def reader(self, projection: Projection, form: Form, records: str = "") -> Reader:
        """A reader for one body of this form."""
        decoder = self.decoders[projection.name]
        return Reader(decoder, form, max_event_bytes=self.max_event_bytes, records=records)

    def read_whole(self, projection: Projection, form: Form, data: bytes) -> Block | None:
        """The block of a small object that came in one piece; None for every other body."""
        return read_whole(self.decoders[projection.name], form, data, self.max_event_bytes)

    async def applied(self, position: int) -> None:
        """Return once everything before `position` can be seen in the aggregates."""
        if self._applier is None or position <= self.queue_position:
            return
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.append((position, waiter))
        self._applier.wake(hurry=True)
        await waiter

    async def settled(self) -> None:
        """Return once the log has taken or refused everything that was submitted."""
        while self._submitted:
            await asyncio.wait(self._submitted)

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
        return self.accepted_events - self.applied_events if self.backlog_bytes else 0

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
        projection: Projection,
        blocks: list[Block],
        status: int = 202,
        key: Key | None = None,
        replayed: dict[int, str] | None = None,
    ) -> Receipt:
        """Make one small body durable, in one message; raise QueueRefused."""
        arrival = int(self.clock() * MICROSECONDS)
        has_ids = projection.ids is not None
        if has_ids and self.merging.locked():
            async with self.merging:  # an upload is claiming its keys
                pass
        self.check_current(projection)
        keys: list[int] = []
        duplicates: dict[str, int] = {}
        if has_ids:
            events, lines = self._claim(projection, blocks, keys, duplicates)
            body = b"\n".join(lines)
        else:
            events = blocks[0].events if len(blocks) == 1 else [e for b in blocks for e in b.events]
            body = blocks[0].raw if len(blocks) == 1 else b"\n".join(b.raw for b in blocks if b.raw)
        filtered = filtered_of(projection, events)
        rejected = [each for block in blocks for each in block.rejected]
        receipt = Receipt(
            len(events) - filtered, len(rejected), sum(duplicates.values()), reported(rejected),
            status, filtered=filtered,
        )  # fmt: skip
        batch = Batch(
            projection.name, arrival, body, receipt.accepted, pack_keys(keys), duplicates, rejected,
            Promise(*key, receipt) if key else None, filtered=filtered, replayed=replayed or {},
        )  # fmt: skip
        try:
            promise = self.submit(BATCH, batch, key, receipt)
        except QueueError:
            for each in keys:
                self._claimed.pop(each, None)
            raise
        projection.arrived(events, arrival)
        promise.add_done_callback(partial(self._batch_settled, batch, events, keys, receipt))
        await asyncio.shield(promise)
        return receipt

    def submit(
        self, kind: int, message: Batch | Upload, key: Key | None, receipt: Receipt
    ) -> Appended:
        """Hand a message to the log, with the promise of its answer."""
        promise = self.queue.submit(kind, encode(message))
        self._submitted.add(promise)
        promise.add_done_callback(self._submission_settled)
        if key is not None:
            self.answers.submitted(key)
            promise.add_done_callback(partial(self._answer_settled, key, receipt))
        return promise

    def _submit_alone(self, kind: int, message: Put | Drop | Rebuild | Idle) -> Appended:
        """Hand a message to the log that is no batch; the applier reads it there."""
        promise = self.queue.submit(kind, encode(message))
        self._submitted.add(promise)
        promise.add_done_callback(self._submission_settled)
        promise.add_done_callback(self._wake)
        return promise

    def _submission_settled(self, promise: Appended) -> None:
        self._submitted.discard(promise)
        self.queue_works = promise.exception() is None

    def _wake(self, promise: Appended) -> None:
        """The log has grown by something that is not handed over."""
        if self._applier is not None and promise.exception() is None:
            self._applier.wake()

    def _answer_settled(self, key: Key, receipt: Receipt, promise: Appended) -> None:
        error = promise.exception()
        if error is None:
            receipt.position = promise.result()[1]
        self.answers.settled(key, receipt, error)

    def _claim(
        self,
        projection: Projection,
        blocks: Iterable[Block],
        keys: list[int],
        duplicates: dict[str, int],
    ) -> tuple[list[Any], list[bytes]]:
        """The events that are new, and their lines; their keys are claimed until durable."""
        events: list[Any] = []
        lines: list[bytes] = []
        claimed, seen, digest = self._claimed, self.seen, self.key_hash
        ids_of, sources = projection.ids, projection.sources
        assert ids_of is not None  # noqa: S101  (asked by the caller)
        for block in blocks:
            if not block.events:
                continue
            ids = ids_of(block.events)
            for event, line, event_id in zip(block.events, block.split(), ids, strict=True):
                key = digest(event_id)
                if key in claimed or key in seen:
                    source = sources((event,))[0] if sources else ""
                    duplicates[source] = duplicates.get(source, 0) + 1
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
            self.seen.add(key)
        self._count(batch)
        self.rate.add(batch.accepted, time.monotonic())
        if self._applier is not None:
            self._applier.hand_over(Handed(start, end, batch, events))

    def upload_settled(
        self, upload: Upload, newer: SeenKeys | None, receipt: Receipt, promise: Appended
    ) -> None:
        """The log has taken an upload, or has refused it."""
        if promise.exception() is not None:
            with suppress(OSError):
                (self.uploads / upload.name).unlink()
            return
        receipt.position = promise.result()[1]
        if newer is not None:
            self.seen.absorb(newer)
        self._upload_backlog += upload.length
        self._count_upload(upload)
        self.rate.add(upload.accepted, time.monotonic())
        self._wake(promise)

    def _count(self, batch: Batch) -> None:
        self.accepted_events += batch.accepted
        totals = self.totals.get(batch.pipeline)
        if totals is None:
            return
        totals.add(
            Totals(batch.accepted, len(batch.rejected), sum(batch.duplicates.values()),
                   filtered=batch.filtered)
        )  # fmt: skip
        for code in batch.replayed.values():  # what it was counted as before it came to life
            if code == "late":
                totals.accepted -= 1
            else:
                totals.rejected -= 1

    def _count_upload(self, upload: Upload) -> None:
        self.accepted_events += upload.accepted
        if (totals := self.totals.get(upload.pipeline)) is not None:
            totals.add(
                Totals(upload.accepted, upload.rejected, sum(upload.duplicates.values()),
                       filtered=upload.filtered)
            )  # fmt: skip

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

    # --- dead letters ---

    async def replay_dead_letters(
        self, pipeline: str | None = None, code: str | None = None
    ) -> dict[str, int]:
        """Send the kept records through their pipelines of today; each comes to life at most once.

        Those that are refused again stay where they are. What came to life is counted as what it
        became, and no longer as what it was; what is too late once more is a new dead letter, and
        is left for another time.
        """
        done = {"replayed": 0, "duplicates": 0, "failed": 0, "skipped": 0}
        async with self._replaying:
            after, end = 0, self.store.topic("dead-letters").next
            while after + 1 < end and (
                letters := await asyncio.to_thread(
                    self.store.dead_letters, after, REPLAYED_AT_ONCE, pipeline, code
                )
            ):
                after = letters[-1].id
                by_name: dict[str, list[DeadLetter]] = {}
                for letter in letters:
                    if letter.id in self._revived or letter.id >= end:
                        continue
                    if letter.record.whole and letter.pipeline in self.projections:
                        by_name.setdefault(letter.pipeline, []).append(letter)
                    else:
                        done["skipped"] += 1
                for name, found in by_name.items():
                    await self._replay(self.projections[name], found, done)
        return done

    async def _replay(
        self, projection: Projection, letters: list[DeadLetter], done: dict[str, int]
    ) -> None:
        revived: dict[int, str] = {}
        whole = Block()
        for letter in letters:
            reader = self.reader(projection, "json")
            try:
                blocks = [*reader.feed(letter.record.raw), *reader.finish()]
            except BodyError:
                blocks = []
            if len(blocks) != 1 or blocks[0].rejected or len(blocks[0].events) != 1:
                done["failed"] += 1
                continue
            whole.events += blocks[0].events
            whole.lines += blocks[0].split()
            revived[letter.id] = letter.record.code
        if not revived:
            return
        try:
            receipt = await self.accept(projection, [whole], replayed=revived)
        except PipelineConflict:
            done["skipped"] += len(revived)
            return
        self._revived.update(revived)
        done["replayed"] += len(revived) - receipt.duplicates
        done["duplicates"] += receipt.duplicates
        await self.applied(receipt.position)

    # --- cleaning up ---

    async def cleanup(self, days_old: float, *, dry_run: bool) -> dict[str, int]:
        """Delete closed windows, dead letters and applied log that are older than that."""
        applier = self._applier
        if applier is None:
            raise Busy("The service is stopping.", 2)
        before = self.clock() - days_old * 86_400

        def clean() -> dict[str, int]:
            deleted = self.store.cleanup(round(before * MICROSECONDS), dry_run=dry_run)
            deleted["segments"] = applier.drop_applied(before, 1 << 62, dry_run=dry_run)
            return deleted

        return await asyncio.wrap_future(applier.call(clean))

    # --- what the applier says ---

    def _notify(self, applied: Applied | None) -> None:
        """In the applier's thread."""
        with suppress(RuntimeError):  # the loop is gone: the process ends
            self._loop.call_soon_threadsafe(self._on_applied, applied)

    def _submit_quiet(self, idle: Idle) -> None:
        """In the applier's thread: that sources are quiet is a message, so that a replay agrees."""

        def submit() -> None:
            if self._applier is not None and self.queue_works:
                self._submit_alone(IDLE, idle)

        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(submit)

    def _on_applied(self, applied: Applied | None) -> None:
        if applied is None:
            if self.store_works:
                self._log.error("The store refuses batches; they wait in the log.")
            self.store_works = False
            return
        self.store_works = True
        self.queue_position = max(self.queue_position, applied.position)
        self.applied_events += applied.events
        self._upload_backlog -= applied.upload_bytes
        self.answers.applied(applied.promises)
        self._revived.difference_update(applied.replayed)
        if self.grown is not None:
            self.grown.set()  # whoever waits for messages looks again
            self.grown = asyncio.Event()
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


class IngestQueue:
    """The way in from Python: `await put(event)` returns when the event is durable."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._room = asyncio.Semaphore(pipeline.queue_maxsize)

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
        projection = owner.projection(pipeline or ("events" if "event_id" in event else "webhook"))
        reader = owner.reader(projection, "json")
        try:
            blocks = [*reader.feed(msgspec.json.encode(event)), *reader.finish()]
        except (BodyError, TypeError) as error:
            raise EventRejected(str(error)) from error
        if bad := [each for block in blocks for each in block.rejected]:
            raise EventRejected(bad[0].message)
        async with self._room:
            while owner.backlog_bytes >= owner.backlog_max_bytes:
                await owner.applied(owner.queue_position + 1)
            owner.waiting += 1
            try:
                return await owner.accept(projection, blocks)
            finally:
                owner.waiting -= 1


def parse_spec(document: Any) -> PipelineSpec:
    """A spec from plain data; raises ValueError with sentences."""
    try:
        return PipelineSpec.model_validate(document)
    except ValidationError as error:
        raise ValueError("; ".join(each["msg"] for each in error.errors())) from None
