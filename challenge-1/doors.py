"""The way from fetched products into a pipeline: durable, and once per key, as for webhooks."""

import asyncio
import hashlib
import json
from collections import Counter
from typing import Any, Final

import structlog

from resilience import CallError
from utils import (
    Busy,
    KeyReused,
    Pipeline,
    PipelineConflict,
    PipelineUnknown,
    QueueRefused,
    Receipt,
    StoreRefused,
)

log = structlog.stdlib.get_logger("door")

REFUSED_SECONDS: Final = 2.0  # before a disk that refused is asked again


class PipelineDoor:
    """Sends batches of events into one pipeline; waits while it is busy or its disk refuses."""

    def __init__(self, pipeline: Pipeline, name: str) -> None:
        """Raises PipelineUnknown."""
        pipeline.projection(name)
        self._pipeline = pipeline
        self._name = name
        self._counts: Counter[str] = Counter()

    async def send(self, key: str, events: list[dict[str, Any]]) -> None:
        """Make them durable in one body, once for this key; what the pipeline refuses is kept in
        its dead letters. Raises CallError when it was deleted.
        """
        body = b"".join(json.dumps(event).encode() + b"\n" for event in events)
        while True:
            try:
                receipt, repeated = await self._put(key, body)
            except Busy as busy:
                await asyncio.sleep(busy.retry_after)
            except PipelineConflict:  # put anew meanwhile: nothing was kept, the new one takes it
                continue
            except PipelineUnknown:
                raise CallError("pipeline", "The pipeline was deleted meanwhile.") from None
            except (QueueRefused, StoreRefused) as error:
                log.warning("door_refused", pipeline=self._name, error=str(error))
                await asyncio.sleep(REFUSED_SECONDS)
            except KeyReused:  # sent before the cut, with other times of arrival
                self._counts["repeated"] += len(events)
                return
            else:
                if repeated:
                    self._counts["repeated"] += len(events)
                else:
                    self._counts["accepted"] += receipt.accepted
                    self._counts["rejected"] += receipt.rejected
                    self._counts["duplicates"] += receipt.duplicates
                return

    async def _put(self, key: str, body: bytes) -> tuple[Receipt, bool]:
        pipeline = self._pipeline
        pipeline.admit()
        projection = await pipeline.catalogue.current(self._name)
        reader = pipeline.reader(projection, "ndjson")
        intake = pipeline.intake(projection)
        digests = (
            pipeline.digest(f"{self._name} {key}"),
            hashlib.blake2b(body, digest_size=16).digest(),
        )
        try:
            for block in (*reader.feed(body), *reader.finish()):
                await intake.add(block)
            receipt = await intake.commit(202 if intake.accepted else 422, digests)
            return receipt, intake.repeated
        finally:
            intake.abort()

    def statistics(self) -> dict[str, Any]:
        """What the pipeline answered in this run."""
        outcomes = ("accepted", "rejected", "duplicates", "repeated")
        return {"name": self._name, **{name: self._counts[name] for name in outcomes}}
