"""Waiting for topics to grow: however many wait, each commit costs one look at each topic."""

import asyncio
from collections import Counter
from contextlib import suppress
from typing import Final

from starlette.concurrency import run_in_threadpool

from utils import Pipeline, StoreRefused

NEVER_LOOKED: Final = -1


class Growth:
    """The ends of the topics, as far as somebody waits for them. Belongs to the event loop."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._ends: dict[str, int] = {}
        self._moved: dict[str, asyncio.Event] = {}
        self._lookouts: dict[str, asyncio.Task[None]] = {}
        self._waiting: Counter[str] = Counter()

    async def end(self, topic: str) -> int:
        """Where the topic ends now; take it before reading, so that nothing is missed between."""
        return await run_in_threadpool(lambda: self._pipeline.topics.state(topic).next)

    async def beyond(self, topic: str, end: int) -> None:
        """Return once the topic has grown beyond this end; for ever when the pipeline stops."""
        if not self._waiting[topic]:
            self._ends[topic] = NEVER_LOOKED
            self._moved[topic] = asyncio.Event()
            self._lookouts[topic] = asyncio.create_task(self._look(topic))
        self._waiting[topic] += 1
        try:
            while self._ends[topic] <= end:
                await self._moved[topic].wait()
        finally:
            self._waiting[topic] -= 1
            if not self._waiting[topic]:
                self._lookouts.pop(topic).cancel()

    async def _look(self, topic: str) -> None:
        while (grown := self._pipeline.grown) is not None:
            with suppress(StoreRefused):  # asked again after the next commit
                end = await self.end(topic)
                if end > self._ends[topic]:
                    self._ends[topic] = end
                    self._moved[topic].set()
                    self._moved[topic] = asyncio.Event()
            await grown.wait()
