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
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

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
from catalogue import Catalogue, PipelineConflict, PipelineUnknown
from claims import Claimed, Claims
from dedupe import pack_keys, unpack_keys
from holder import Held, Holder
from ingest_queue import EventRejected, IngestQueue
from intake import Intake, filtered_of, reported
from measures import Latencies, Rate
from parsing import Block, BodyError, Form, Reader, read_whole
from projection import Projection
from revival import Revival
from specs import PipelineSpec
from spool import FDATASYNC, Appended, FileQueue, QueueError, QueueRefused, Sync, make_directory
from sqlite_store import SQLiteStore
from storage import StoreError, StoreRefused, Totals
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
        self.ingest_q = IngestQueue(self)
        self.latencies = Latencies(time.monotonic)
        self.rate = Rate(time.monotonic)
        self.clock = clock
        self.sync = sync
        self.catalogue = Catalogue(
            {each.name: each for each in (builtin.webhook(window_secs), builtin.events())},
            parser,
            self._horizon,
            self._log_alone,
        )
        self.projections = self.catalogue.projections
        self.put_at = self.catalogue.put_at
        self.totals = self.catalogue.totals
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
        catalogue = self.catalogue
        built_in = catalogue.built_in
        self.store.ensure_built_in({name: p.window.lateness for name, p in built_in.items()})
        self.claims = Claims(self.store.secret, self.dedupe_keys)
        self.answers = Answers(self.store)
        self.revival = Revival(self)
        self._submitted: set[Appended] = set()
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self.grown: asyncio.Event | None = None
        self.waiting = 0
        self.store_works = self.queue_works = True
        self._upload_backlog = self._reported_damage = 0
        for build in self.store.builds():
            if not build.shadow:
                catalogue.adopt(catalogue.compile(build.name, build.spec), build.id)
        for keys in self.store.seen():
            self.claims.seen.update(unpack_keys(keys))
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
                catalogue.adopt(catalogue.compile(put.name, put.spec), message.end)
            elif message.kind == DROP:
                catalogue.abandon(decode_drop(message.payload).name)
        for path in self.uploads.iterdir():
            if path.name not in live:  # never committed: its client was not answered
                path.unlink()

    def _recover_batch(self, batch: Batch, end: int) -> None:
        self.claims.seen.update(unpack_keys(batch.keys))
        self._count(batch)
        self.revival.revived.update(batch.replayed)
        self.answers.recovered(batch.promise, end)

    def _recover_upload(self, upload: Upload, end: int) -> None:
        with suppress(FileNotFoundError):
            for batch in read_upload(self.uploads / upload.name):
                for place, key in enumerate(unpack_keys(batch.keys), batch.first):
                    if not is_marked(upload.skip, place):
                        self.claims.seen.add(key)
        self._upload_backlog += upload.length
        self._count(upload)
        self.answers.recovered(upload.promise, end)

    async def start_workers(self) -> None:
        """Begin to apply; call it in the event loop that will accept."""
        self._loop = asyncio.get_running_loop()
        self.grown = asyncio.Event()
        applier = Applier(
            self.queue,
            self.store,
            self.uploads,
            compile_=self.catalogue.compile,
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

    def _horizon(self) -> int:
        return round((self.clock() + self.max_future_seconds) * MICROSECONDS)

    def projection(self, name: str) -> Projection:
        """The pipeline of this name; raises PipelineUnknown."""
        return self.catalogue.projection(name)

    async def put_pipeline(self, name: str, spec: PipelineSpec, *, replace: bool = False) -> bool:
        """Make a pipeline, durable when this returns; True when it is new or starts anew.

        The same spec again changes nothing; another one raises PipelineConflict unless `replace`,
        which lets the pipeline start empty.
        """
        end = await self.catalogue.put(name, spec, replace=replace)
        if end is not None:
            await self.applied(end)
        return end is not None

    async def delete_pipeline(self, name: str) -> None:
        """Delete a pipeline and its aggregates, durable when this returns."""
        await self.applied(await self.catalogue.delete(name))

    def shown(self) -> dict[int, Projection]:
        """What is read now, by build: the projections its rows were made by; blocking."""
        return self.catalogue.shown(self.store.builds())

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
        position = await self._log_alone(REBUILD, Rebuild(name, max(origin, first)))
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
        decoder = self.catalogue.decoder(projection)
        return Reader(decoder, form, max_event_bytes=self.max_event_bytes, records=records)

    def read_whole(self, projection: Projection, form: Form, data: bytes) -> Block | None:
        """The block of a small object that came in one piece; None for every other body."""
        return read_whole(self.catalogue.decoder(projection), form, data, self.max_event_bytes)

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
        claimed = Claimed()
        if projection.ids is not None:
            await self.claims.certain()
        self.catalogue.check_current(projection)
        if projection.ids is not None:
            claimed = self.claims.claim(projection, blocks)
            events, body = claimed.events, b"\n".join(claimed.lines)
        else:
            events = blocks[0].events if len(blocks) == 1 else [e for b in blocks for e in b.events]
            body = blocks[0].raw if len(blocks) == 1 else b"\n".join(b.raw for b in blocks if b.raw)
        filtered = filtered_of(projection, events)
        rejected = [each for block in blocks for each in block.rejected]
        receipt = Receipt(
            len(events) - filtered, len(rejected), sum(claimed.duplicates.values()),
            reported(rejected), status, filtered=filtered,
        )  # fmt: skip
        batch = Batch(
            projection.name, arrival, body, receipt.accepted, pack_keys(claimed.keys),
            claimed.duplicates, rejected, Promise(*key, receipt) if key else None,
            filtered=filtered, replayed=replayed or {},
        )  # fmt: skip
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        settled = partial(self._batch_settled, batch, events, claimed.keys, receipt, durable)
        try:
            self.submit(BATCH, batch, settled)
        except QueueError:
            self.claims.settle(claimed.keys, durable=False)
            raise
        projection.arrived(events, arrival)
        self.revival.revived.update(batch.replayed)
        await durable  # not the log's promise: whoever is cancelled here cancels nothing there
        return receipt

    def submit(
        self,
        kind: int,
        message: Batch | Upload | Put | Drop | Rebuild | Idle,
        settled: Callable[[Appended], None],
    ) -> Appended:
        """Hand a message to the log; `settled` is told as soon as that took or refused it."""
        promise = self.queue.submit(kind, encode(message))
        self._submitted.add(promise)
        promise.add_done_callback(partial(self._settled, settled))
        if isinstance(message, Batch | Upload) and message.promise is not None:
            self.answers.submitted(message.promise.key)
        return promise

    def _settled(self, settled: Callable[[Appended], None], promise: Appended) -> None:
        self._submitted.discard(promise)
        self.queue_works = promise.exception() is None
        settled(promise)

    async def _log_alone(self, kind: int, message: Put | Drop | Rebuild) -> int:
        """Log what is no batch, durable when this returns where it ends; the applier reads it."""
        _, end = await asyncio.shield(self.submit(kind, message, self._wake))
        return end

    def _wake(self, promise: Appended) -> None:
        """The log has grown by something that is not handed over."""
        if self._applier is not None and promise.exception() is None:
            self._applier.wake()

    def _batch_settled(
        self,
        batch: Batch,
        events: list[Any],
        keys: list[int],
        receipt: Receipt,
        durable: "asyncio.Future[None]",
        promise: Appended,
    ) -> None:
        error = promise.exception()
        self.claims.settle(keys, durable=error is None)
        if error is not None:
            self.revival.revived.difference_update(batch.replayed)
            self.answers.settled(batch.promise, error)
            if not durable.done():
                durable.set_exception(error)
            return
        start, receipt.position = promise.result()
        self._count(batch)
        self.answers.settled(batch.promise)
        self.rate.add(batch.accepted, time.monotonic())
        if self._applier is not None:
            self._applier.hand_over(Handed(start, receipt.position, batch, events))
        if not durable.done():
            durable.set_result(None)

    def upload_settled(self, upload: Upload, receipt: Receipt, promise: Appended) -> None:
        """The log has taken an upload, or has refused it."""
        error = promise.exception()
        if error is not None:
            with suppress(OSError):
                (self.uploads / upload.name).unlink()
            self.answers.settled(upload.promise, error)
            return
        receipt.position = promise.result()[1]
        self._upload_backlog += upload.length
        self._count(upload)
        self.answers.settled(upload.promise)
        self.rate.add(upload.accepted, time.monotonic())
        self._wake(promise)

    def _count(self, message: Batch | Upload) -> None:
        self.accepted_events += message.accepted
        self.catalogue.count(message)

    def digest(self, text: str) -> bytes:
        """A 16-byte digest of an idempotency key."""
        return hashlib.blake2b(text.encode(), digest_size=16, key=self.store.secret).digest()

    async def probe_queue(self) -> bool:
        """Whether the disk takes messages; after a refusal an empty one is tried."""
        if not self.queue_works:
            with suppress(QueueRefused):
                probe = self.queue.submit(PROBE, b"")
                probe.add_done_callback(partial(self._settled, lambda _: None))
                await asyncio.shield(probe)
        return self.queue_works

    # --- beside the stream ---

    async def replay_dead_letters(
        self, pipeline: str | None = None, code: str | None = None
    ) -> dict[str, int]:
        """Send the kept records through their pipelines of today; each comes to life at most once.

        Those that are refused again stay where they are. What came to life is counted as what it
        became, and no longer as what it was.
        """
        return await self.revival.replay(pipeline, code)

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
                self.submit(IDLE, idle, self._wake)

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
        self.revival.revived.difference_update(applied.replayed)
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


def parse_spec(document: Any) -> PipelineSpec:
    """A spec from plain data; raises ValueError with sentences."""
    try:
        return PipelineSpec.model_validate(document)
    except ValidationError as error:
        sentences = (each["msg"].removeprefix("Value error, ") for each in error.errors())
        raise ValueError(" ".join(sentences)) from None
