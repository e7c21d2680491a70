"""A pipeline is put anew, deleted or replayed while others write to it and read it."""

import asyncio
import csv
import errno
import io
from collections.abc import Callable
from typing import Any

import pytest

from pages import Outdated, Question, Reading, as_csv, as_ndjson
from utils import Pipeline, PipelineConflict, PipelineUnknown, QueueRefused, parse_spec
from web import Problem

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

OLD: dict[str, Any] = {
    "select": {"shop": "shop", "amount": "amount"},
    "group_by": ["shop"],
    "aggregates": [{"op": "sum", "field": "amount"}],
    "window": {"kind": "none"},
}
NEW: dict[str, Any] = {
    **OLD,
    "group_by": [],
    "aggregates": [{"op": "count"}, {"op": "max", "field": "amount"}],
}


def question(**asked: Any) -> Question:
    given = {"pipeline": "orders", "group": None, "start": None, "end": None, "final": None}
    return Question(**{**given, **asked})


def reading(pipeline: Pipeline, **asked: Any) -> Reading:
    return Reading(pipeline.store, pipeline.shown, question(**asked))


async def filled(pipeline: Pipeline, shops: int = 1) -> None:
    await pipeline.start_workers()
    await pipeline.put_pipeline("orders", parse_spec(OLD))
    receipts = [
        await pipeline.ingest_q.put({"shop": f"s{n:05}", "amount": 2}, "orders")
        for n in range(shops)
    ]
    await pipeline.applied(receipts[-1].position)


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not claim():
            await asyncio.sleep(0.001)


async def on_its_way(pipeline: Pipeline) -> None:
    """The change has been handed to the log, and is not yet on the disk."""
    async with asyncio.timeout(20):
        while "orders" not in pipeline.catalogue._changes:
            await asyncio.sleep(0)


class TestWriting:
    async def test_who_comes_while_it_is_put_anew_waits_and_writes_to_the_new_one(
        self, make_pipeline: Callable[..., Pipeline]
    ) -> None:
        async with make_pipeline() as pipeline:
            await filled(pipeline)
            old = pipeline.projection("orders")
            change = asyncio.ensure_future(
                pipeline.put_pipeline("orders", parse_spec(NEW), replace=True)
            )
            await on_its_way(pipeline)

            assert pipeline.projection("orders") is old
            with pytest.raises(PipelineConflict):
                pipeline.catalogue.check_current(old)
            receipt = await pipeline.ingest_q.put({"shop": "a", "amount": 7}, "orders")

            assert await change
            await pipeline.applied(receipt.position)
            (items, _) = reading(pipeline).page(None, 10)
            assert [item["values"] for item in items] == [{"count": 1, "max_amount": 7}]

    async def test_who_comes_while_it_is_made_or_deleted_is_told_what_became_of_it(
        self, make_pipeline: Callable[..., Pipeline]
    ) -> None:
        async with make_pipeline() as pipeline:
            await pipeline.start_workers()
            made = asyncio.ensure_future(pipeline.put_pipeline("orders", parse_spec(OLD)))
            await on_its_way(pipeline)
            assert (await pipeline.catalogue.current("orders")).name == "orders"
            await made
            gone = asyncio.ensure_future(pipeline.delete_pipeline("orders"))
            await on_its_way(pipeline)
            with pytest.raises(PipelineUnknown):
                await pipeline.catalogue.current("orders")
            await gone

    async def test_a_change_whose_caller_has_left_happens_nevertheless(
        self, make_pipeline: Callable[..., Pipeline]
    ) -> None:
        async with make_pipeline() as pipeline:
            await filled(pipeline)
            change = asyncio.ensure_future(
                pipeline.put_pipeline("orders", parse_spec(NEW), replace=True)
            )
            await on_its_way(pipeline)
            change.cancel()

            assert (await pipeline.catalogue.current("orders")).spec == parse_spec(NEW)

    async def test_a_change_that_the_disk_refuses_leaves_the_pipeline_as_it_was(
        self, make_pipeline: Callable[..., Pipeline]
    ) -> None:
        full = False

        def sync(_: int) -> None:
            if full:
                raise OSError(errno.ENOSPC, "full")

        async with make_pipeline(sync=sync) as pipeline:
            await filled(pipeline)
            full = True
            with pytest.raises(QueueRefused):
                await pipeline.put_pipeline("orders", parse_spec(NEW), replace=True)
            full = False
            assert (await pipeline.catalogue.current("orders")).spec == parse_spec(OLD)
            assert (await pipeline.ingest_q.put({"shop": "a", "amount": 7}, "orders")).accepted == 1

    async def test_a_body_that_is_still_coming_when_its_pipeline_goes_is_refused_as_a_conflict(
        self, make_pipeline: Callable[..., Pipeline]
    ) -> None:
        async with make_pipeline() as pipeline:
            await filled(pipeline)
            begun = pipeline.projection("orders")
            await pipeline.delete_pipeline("orders")

            with pytest.raises(PipelineConflict):
                pipeline.reader(begun, "ndjson")
            with pytest.raises(PipelineConflict):
                pipeline.read_whole(begun, "json", b'{"shop": "a", "amount": 1}')


class TestReading:
    async def test_until_the_old_rows_are_gone_they_are_read_by_their_own_names(
        self, make_pipeline: Callable[..., Pipeline]
    ) -> None:
        async with make_pipeline() as pipeline:
            await filled(pipeline)
            pipeline.pause_applying()
            change = asyncio.ensure_future(
                pipeline.put_pipeline("orders", parse_spec(NEW), replace=True)
            )
            await until(lambda: pipeline.projection("orders").spec == parse_spec(NEW))

            (items, _) = reading(pipeline).page(None, 10)
            assert [(i["group"], i["values"]) for i in items] == [
                ({"shop": "s00000"}, {"sum_amount": 2})
            ]
            assert len(reading(pipeline, group=["shop:s00000"]).page(None, 10)[0]) == 1
            pipeline.pause_applying(False)

            assert await change
            assert reading(pipeline).page(None, 10) == ([], [])

    async def test_an_export_is_of_the_old_or_of_the_new_and_never_of_both(
        self, make_pipeline: Callable[..., Pipeline]
    ) -> None:
        async with make_pipeline() as pipeline:
            await filled(pipeline, shops=1500)
            begun = as_ndjson(reading(pipeline))
            assert next(begun).count(b"\n") == 1000
            await pipeline.rebuild("orders", 0)
            await pipeline.rebuilt("orders")

            with pytest.raises(Outdated):
                list(begun)
            assert b"".join(as_ndjson(reading(pipeline))).count(b"\n") == 1500

    async def test_an_export_goes_on_while_another_pipeline_is_replayed(
        self, make_pipeline: Callable[..., Pipeline]
    ) -> None:
        async with make_pipeline() as pipeline:
            await filled(pipeline, shops=1500)
            begun = as_ndjson(reading(pipeline))
            next(begun)
            await pipeline.rebuild("webhook", 0)
            await pipeline.rebuilt("webhook")

            assert b"".join(begun).count(b"\n") == 500


class TestCsv:
    async def test_columns_have_names_of_their_own(
        self, make_pipeline: Callable[..., Pipeline]
    ) -> None:
        document = {
            **OLD,
            "select": {"count": "shop", "final": "amount"},
            "group_by": ["count", "final"],
            "aggregates": [{"op": "count"}],
        }
        async with make_pipeline() as pipeline:
            await pipeline.start_workers()
            await pipeline.put_pipeline("orders", parse_spec(document))
            receipt = await pipeline.ingest_q.put({"shop": 'a,"b"', "amount": 2}, "orders")
            await pipeline.applied(receipt.position)

            text = b"".join(as_csv(reading(pipeline), "orders")).decode()

        (row,) = csv.DictReader(io.StringIO(text))
        assert (row["group.count"], row["group.final"], row["count"], row["final"]) == (
            'a,"b"', "2", "1", "false",
        )  # fmt: skip


class TestQuestions:
    def test_a_cursor_of_another_pipeline_is_422(self) -> None:
        question().check([0, "orders", "[]", 0])
        question(pipeline=None).check([0, "webhook", "[]", 0])
        with pytest.raises(Problem, match="another question"):
            question().check([0, "webhook", "[]", 0])

    @pytest.mark.parametrize("start", ["0001-01-01T00:00:00Z", "0004-12-31T00:00:00Z"])
    @pytest.mark.parametrize("end", ["9999-12-31T23:59:59Z", None])
    async def test_a_time_beyond_what_is_kept_is_before_or_after_everything(
        self, make_pipeline: Callable[..., Pipeline], start: str, end: str | None
    ) -> None:
        async with make_pipeline() as pipeline:
            await filled(pipeline)

            assert len(reading(pipeline, start=start, end=end).page(None, 10)[0]) == 1
            assert len(reading(pipeline, start=end).page(None, 10)[0]) == (end is None)

    @pytest.mark.parametrize("text", ["nan", "inf", "1e30", "", "soon", "2026-01-15T10:00:00"])
    async def test_what_is_no_time_is_422(
        self, make_pipeline: Callable[..., Pipeline], text: str
    ) -> None:
        async with make_pipeline() as pipeline:
            await filled(pipeline)
            with pytest.raises(Problem, match="no time"):
                reading(pipeline, start=text).page(None, 10)
