"""The door from fetched products into a pipeline."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from doors import PipelineDoor
from resilience import CallError
from utils import Busy, PipelineUnknown, parse_spec

pytestmark = pytest.mark.integration
EVENTS: list[dict[str, Any]] = [
    {"data": {"category": "a", "value": n, "quantity": 1, "ts": 1_700_000_000}} for n in range(3)
]


def test_a_key_counts_once_also_with_another_body(make_pipeline: Callable[..., Any]) -> None:
    async def main() -> dict[str, Any]:
        async with make_pipeline() as pipeline:
            await pipeline.start_workers()
            door = PipelineDoor(pipeline, "webhook")
            await door.send("run page-1", EVENTS)
            await door.send("run page-1", EVENTS)
            await door.send("run page-1", EVENTS[:1])
            await door.send("run page-2", [*EVENTS, {"data": {"category": "a", "value": None}}])
            return door.statistics()

    assert asyncio.run(main()) == {
        "name": "webhook", "accepted": 6, "rejected": 1, "duplicates": 0, "repeated": 4
    }  # fmt: skip


def test_a_busy_pipeline_is_waited_for(
    make_pipeline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> dict[str, Any]:
        async with make_pipeline() as pipeline:
            await pipeline.start_workers()
            answers = [Busy("full", 0), None]

            def admit() -> None:
                if (refusal := answers.pop(0)) is not None:
                    raise refusal

            monkeypatch.setattr(pipeline, "admit", admit)
            door = PipelineDoor(pipeline, "webhook")
            await door.send("key", EVENTS)
            return door.statistics()

    assert asyncio.run(main())["accepted"] == 3


def test_a_pipeline_that_is_not_there_is_an_error_before_and_during_a_run(
    make_pipeline: Callable[..., Any],
) -> None:
    spec = {"select": {"a": "a"}, "aggregates": [{"op": "count"}], "window": {"kind": "none"}}

    async def main() -> None:
        async with make_pipeline() as pipeline:
            await pipeline.start_workers()
            with pytest.raises(PipelineUnknown):
                PipelineDoor(pipeline, "counts")
            await pipeline.put_pipeline("counts", parse_spec(spec))
            door = PipelineDoor(pipeline, "counts")
            await pipeline.delete_pipeline("counts")
            with pytest.raises(CallError, match="deleted"):
                await door.send("key", EVENTS)

    asyncio.run(main())
