"""One body on its way in: kept in memory while small, staged in a file when large."""

import asyncio
import os
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from answers import Key
from batches import BATCH, UPLOAD, Batch, Promise, Receipt, Upload, encode
from dedupe import SeenKeys, pack_keys, unpack_keys
from frames import encode_frame
from parsing import Block, Rejected
from projection import Projection
from spool import SAFE_FLAGS, QueueRefused, sync_directory, write_all
from uploads import mark, read_upload
from windows import MICROSECONDS

if TYPE_CHECKING:
    from utils import Pipeline

INLINE_BYTES: Final = 256 * 1024  # larger bodies are staged in a file of their own
STAGED_SYNC_BYTES: Final = 16 * 1024 * 1024
KEYS_PER_TURN: Final = 2_000  # of an upload, before other requests get a turn
LETTER_BYTES: Final = 200  # what is kept of a rejected record beside its bytes
REPORTED_ERRORS: Final = 20


class Intake:
    """Takes the blocks of a body, then commits them as a whole.

    Nothing of it can be seen before `commit`, and nothing is left after `abort`.
    """

    def __init__(self, pipeline: "Pipeline", projection: Projection) -> None:
        self.accepted = self.rejected = self.filtered = 0
        self.repeated = False
        self.codes: set[str] = set()
        self.errors: list[dict[str, Any]] = []
        self._pipeline = pipeline
        self._projection = projection
        self._blocks: list[Block] = []
        self._held_bytes = 0
        self._path: Path | None = None
        self._fd = -1
        self._length = self._staged = self._synced = 0
        self._arrival = int(pipeline.clock() * MICROSECONDS)

    async def add(self, block: Block) -> None:
        """Take a block; raise QueueRefused when the disk does not."""
        filtered = filtered_of(self._projection, block.events)
        self.filtered += filtered
        self.accepted += len(block.events) - filtered
        self.rejected += len(block.rejected)
        if block.rejected:
            self.codes.update(each.code for each in block.rejected)
            self.errors += reported(block.rejected)[: REPORTED_ERRORS - len(self.errors)]
        if self._path is not None:
            await self._stage(block)
            return
        self._blocks.append(block)
        self._held_bytes += len(block.raw)
        self._held_bytes += sum(LETTER_BYTES + len(each.raw) for each in block.rejected)
        if self._held_bytes > INLINE_BYTES:
            self._path = self._pipeline.uploads / uuid.uuid4().hex
            blocks, self._blocks = self._blocks, []
            for each in blocks:
                await self._stage(each)

    async def _stage(self, block: Block) -> None:
        """Write a block to the upload's own file, framed like the log."""
        ids = self._projection.ids
        hash_key = self._pipeline.claims.hash_of(self._projection)
        keys = map(hash_key, ids(block.events)) if ids else ()
        batch = Batch(
            self._projection.name, self._arrival, block.raw, len(block.events), pack_keys(keys),
            rejected=block.rejected, first=self._staged,
        )  # fmt: skip
        frame = encode_frame(BATCH, self._length, encode(batch))
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
                await asyncio.to_thread(self._pipeline.sync, self._fd)
        except OSError as error:
            raise QueueRefused(error) from error

    async def commit(self, status: int, key: Key | None = None) -> Receipt:
        """Make the body durable and visible; raise QueueRefused, and leave nothing, otherwise.

        `key` is the digest of an Idempotency-Key and that of the body. When it has been answered
        already, nothing is added, `repeated` is set, and the first answer is returned; raises
        KeyReused when it was answered for another body.
        """
        if key is None:
            return await self._commit(status, None)
        answers = self._pipeline.answers
        if (receipt := await answers.to(key)) is not None:
            self.repeated = True
            return receipt
        answers.promise(key)
        try:
            return await self._commit(status, key)
        finally:
            answers.withdraw(key)

    async def _commit(self, status: int, key: Key | None) -> Receipt:
        pipeline = self._pipeline
        if self._path is None:
            return await pipeline.accept(self._projection, self._blocks, status, key)
        try:
            await asyncio.to_thread(self._close_file)
            if self._projection.ids is None:
                return await self._publish(status, key, b"", {}, None)
            async with pipeline.claims.merging:
                await pipeline.settled()  # keys that are not certain yet
                newer = SeenKeys(pipeline.dedupe_keys, expected=self._staged)
                skip, duplicates = await self._find_duplicates(newer)
                return await self._publish(status, key, skip, duplicates, newer)
        except OSError as error:
            raise QueueRefused(error) from error

    def _close_file(self) -> None:
        self._pipeline.sync(self._fd)
        os.close(self._fd)
        self._fd = -1
        sync_directory(self._pipeline.uploads)

    async def _find_duplicates(self, newer: SeenKeys) -> tuple[bytes, dict[str, int]]:
        """Which records are duplicates: a bitmap, and how many by source."""
        pipeline, path = self._pipeline, self._path
        assert path is not None  # noqa: S101  (only staged bodies come here)
        skip = bytearray()
        duplicates: dict[str, int] = {}
        seen = pipeline.claims.seen
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
                self._note_duplicates(batch, found, skip, duplicates)
        return bytes(skip), duplicates

    def _note_duplicates(
        self, batch: Batch, found: list[int], skip: bytearray, duplicates: dict[str, int]
    ) -> None:
        projection = self._projection
        decoder = self._pipeline.catalogue.decoder(projection)
        events = decoder.accepted(batch.body, batch.arrival)
        sources = projection.sources(events) if projection.sources else [""] * len(events)
        for place in found:
            duplicates[sources[place]] = duplicates.get(sources[place], 0) + 1
            mark(skip, batch.first + place)
            if events[place].at is None:
                self.filtered -= 1
            else:
                self.accepted -= 1

    async def _publish(
        self,
        status: int,
        key: Key | None,
        skip: bytes,
        duplicates: dict[str, int],
        newer: SeenKeys | None,
    ) -> Receipt:
        pipeline = self._pipeline
        pipeline.catalogue.check_current(self._projection)
        repeated = sum(duplicates.values())
        receipt = Receipt(
            self.accepted, self.rejected, repeated, self.errors, status, filtered=self.filtered
        )
        assert self._path is not None  # noqa: S101  (only staged bodies come here)
        upload = Upload(
            self._projection.name, self._arrival, self._path.name, self._length, self._staged,
            self.accepted, duplicates, self.rejected, skip,
            Promise(*key, receipt) if key else None, self.filtered,
        )  # fmt: skip
        settled = partial(pipeline.upload_settled, upload, receipt)
        promise = pipeline.submit(UPLOAD, upload, settled)
        self._path = None  # from here on the log decides whether the file stays
        if newer is not None:
            pipeline.claims.claim_upload(newer, promise)
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


def filtered_of(projection: Projection, events: list[Any]) -> int:
    """How many of the events the pipeline does not ask for."""
    if projection.spec is None or not projection.spec.where:
        return 0
    return sum(event.at is None for event in events)


def reported(rejected: list[Rejected]) -> list[dict[str, Any]]:
    """The first errors, as they are shown."""
    shown = []
    for each in rejected[:REPORTED_ERRORS]:
        where = {"line": each.line} if each.line is not None else {"index": each.index}
        shown.append({**where, "offset": each.offset, "code": each.code, "message": each.message})
    return shown
