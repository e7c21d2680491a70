"""However many wait for a topic, a commit costs one look at it."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from growth import Growth
from utils import Pipeline

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

GOOD: dict[str, Any] = {"data": {"category": "a", "value": 1, "quantity": 1, "ts": 1_700_000_000}}


async def put(pipeline: Pipeline, count: int) -> None:
    for _ in range(count):
        receipt = await pipeline.ingest_q.put(GOOD)
        await pipeline.applied(receipt.position)


async def test_many_who_wait_cost_one_look_for_each_commit_and_none_when_they_have_gone(
    make_pipeline: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_pipeline() as pipeline:
        await pipeline.start_workers()
        growth = Growth(pipeline)
        end = await growth.end("dead-letters")
        looks = 0
        state = pipeline.topics.state

        def counted(topic: str) -> Any:
            nonlocal looks
            looks += 1
            return state(topic)

        monkeypatch.setattr(pipeline.topics, "state", counted)
        waiting = [asyncio.ensure_future(growth.beyond("dead-letters", end)) for _ in range(200)]
        await put(pipeline, 20)

        assert not any(each.done() for each in waiting)
        assert 1 <= looks <= 21
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)
        before = looks
        await put(pipeline, 5)
        assert looks == before


async def test_all_of_them_return_when_it_has_grown(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    async with make_pipeline() as pipeline:
        await pipeline.start_workers()
        growth = Growth(pipeline)
        end = await growth.end("ingest")
        waiting = [asyncio.ensure_future(growth.beyond("ingest", end)) for _ in range(50)]
        waiting.append(asyncio.ensure_future(growth.beyond("ingest", 10**9)))
        await put(pipeline, 1)

        async with asyncio.timeout(20):
            await asyncio.gather(*waiting[:-1])
        assert not waiting[-1].done()
        waiting[-1].cancel()
        async with asyncio.timeout(20):
            await growth.beyond("ingest", end)  # has grown already
