"""The way in from Python: `await ingest_q.put(event)` returns when the event is on the disk."""

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from batches import Receipt
from parsing import BodyError

if TYPE_CHECKING:
    from utils import Pipeline


class EventRejected(ValueError):
    """An event does not have the shape of its pipeline."""


class IngestQueue:
    """The way in from Python: `await put(event)` returns when the event is durable."""

    def __init__(self, pipeline: "Pipeline") -> None:
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
        name = pipeline or ("events" if "event_id" in event else "webhook")
        projection = await owner.catalogue.current(name)
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
