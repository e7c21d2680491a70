"""The pipeline without HTTP: the same guarantees, from Python."""

import asyncio
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from applier import Retention
from storage import AggregateQuery
from utils import (
    Busy,
    EventRejected,
    Held,
    KeyReused,
    Pipeline,
    PipelineConflict,
    QueueError,
    QueueRefused,
    parse_spec,
)

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

FOLDER = Path(__file__).resolve().parent.parent


def measurement(value: float = 1, category: str = "a", ts: float = 1_700_000_000) -> dict[str, Any]:
    return {"data": {"category": category, "value": value, "quantity": 1, "ts": ts}}


def event(number: int, **data: float) -> dict[str, Any]:
    return {"event_id": f"e{number}", "source": "s", "event_type": "t", "data": data}


def counted(pipeline: Pipeline, name: str) -> int:
    """Every event once, in however many windows it counts."""
    rows = pipeline.store.aggregates(AggregateQuery(pipeline=name, limit=1000))
    overlap = {"webhook": 1, "events": 6}[name]
    return sum(row.count for row in rows) // overlap


def lines(documents: list[dict[str, Any]]) -> bytes:
    import msgspec

    return b"\n".join(msgspec.json.encode(document) for document in documents)


async def ingest(
    pipeline: Pipeline, name: str, body: bytes, key: tuple[bytes, bytes] | None = None
) -> Any:
    """Take a body as the HTTP route does."""
    projection = pipeline.projection(name)
    reader, intake = pipeline.reader(projection, "ndjson"), pipeline.intake(projection)
    try:
        for start in range(0, len(body), 65_536):
            for block in reader.feed(body[start : start + 65_536]):
                await intake.add(block)
        for block in reader.finish():
            await intake.add(block)
        return await intake.commit(202, key)
    finally:
        intake.abort()


async def test_what_was_put_is_aggregated_when_the_workers_have_stopped(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    async with make_pipeline() as pipeline:
        await pipeline.start_workers()
        await asyncio.gather(*(pipeline.ingest_q.put(measurement(n)) for n in range(200)))
        await pipeline.stop_workers()

        (row,) = pipeline.store.aggregates(AggregateQuery())
        assert row.count == 200
        assert row.measures["value"].total == sum(range(200))
        assert not row.final
        assert pipeline.backlog_events == 0


async def test_a_put_has_returned_only_when_the_event_is_in_the_log(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    pipeline = make_pipeline()
    with pipeline:
        receipt = await pipeline.ingest_q.put(measurement())

        assert [m.end for m in pipeline.queue.read(0)] == [receipt.position]
        assert counted(pipeline, "webhook") == 0
    with make_pipeline() as again:
        await again.start_workers()
        await again.stop_workers()

        assert counted(again, "webhook") == 1


async def test_an_event_that_does_not_fit_is_refused_and_nothing_is_kept(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        for bad in ({"data": 5}, {"event_id": "x"}, {"data": {"value": float("nan")}}):
            with pytest.raises(EventRejected):
                await pipeline.ingest_q.put(bad)

        assert pipeline.queue.end == 0
        assert pipeline.ingest_q.qsize() == 0
        assert pipeline.ingest_q.maxsize == 1000


async def test_a_repeated_event_is_a_duplicate_also_after_a_restart(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        receipts = await asyncio.gather(*(pipeline.ingest_q.put(event(1, x=n)) for n in range(16)))
        assert sorted(r.accepted for r in receipts) == [0] * 15 + [1]
        await pipeline.ingest_q.put(event(2))
    with make_pipeline() as pipeline:  # neither was applied: the keys come from the log
        assert (await pipeline.ingest_q.put(event(1))).duplicates == 1
        await pipeline.start_workers()
        await pipeline.stop_workers()
    with make_pipeline() as pipeline:  # now they come from the store
        assert (await pipeline.ingest_q.put(event(2))).duplicates == 1
        assert pipeline.totals["events"].received == 19
        assert pipeline.totals["events"].accepted == 2


async def test_an_upload_is_in_once_whatever_of_it_was_known(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    body = lines([event(n % 4000, x=1) for n in range(6000)])
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        for n in range(10):
            await pipeline.ingest_q.put(event(n))

        first = await ingest(pipeline, "events", body)
        again = await ingest(pipeline, "events", body)
        await pipeline.stop_workers()

        assert (first.accepted, first.duplicates) == (3990, 2010)
        assert (again.accepted, again.duplicates) == (0, 6000)
        assert counted(pipeline, "events") == 4000
    with make_pipeline() as pipeline:
        assert (await ingest(pipeline, "events", body)).duplicates == 6000
        assert pipeline.totals["events"].received == 18_010


async def test_uploads_and_single_events_that_race_count_each_id_once(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    body = lines([event(n, x=1) for n in range(5000)])
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        receipts = await asyncio.gather(
            ingest(pipeline, "events", body),
            ingest(pipeline, "events", body),
            *(pipeline.ingest_q.put(event(n)) for n in range(0, 5000, 10)),
        )
        await pipeline.stop_workers()

        assert sum(r.accepted for r in receipts) == 5000
        assert counted(pipeline, "events") == 5000


async def test_an_upload_that_ends_early_leaves_nothing(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        webhook = pipeline.projection("webhook")
        reader, intake = pipeline.reader(webhook, "ndjson"), pipeline.intake(webhook)
        for block in reader.feed(lines([measurement(n) for n in range(20_000)])):
            await intake.add(block)
        assert len(list(pipeline.uploads.iterdir())) == 1

        intake.abort()

        assert list(pipeline.uploads.iterdir()) == []
        assert pipeline.queue.end == 0


async def test_an_upload_whose_process_died_before_the_commit_is_cleared_away(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        left = pipeline.uploads / "0123456789abcdef0123456789abcdef"
        left.write_bytes(b"half")
    with make_pipeline():
        assert not left.exists()


@pytest.mark.parametrize("count", [10, 6000])
async def test_an_idempotency_key_gets_its_first_answer_for_ever(
    make_pipeline: Callable[..., Pipeline], count: int
) -> None:
    body = lines([measurement(n) for n in range(count)])
    key = (b"key", b"digest")
    with make_pipeline() as pipeline:
        first, *others = await asyncio.gather(
            *(ingest(pipeline, "webhook", body, key) for _ in range(4))
        )
        assert others == [first] * 3
        with pytest.raises(KeyReused):
            await ingest(pipeline, "webhook", body, (b"key", b"other"))
    with make_pipeline() as pipeline:  # from the log
        assert await ingest(pipeline, "webhook", body, key) == first
        await pipeline.start_workers()
        await pipeline.stop_workers()
        assert counted(pipeline, "webhook") == count
    with make_pipeline() as pipeline:  # from the store
        assert await ingest(pipeline, "webhook", body, key) == first
        with pytest.raises(KeyReused):
            await ingest(pipeline, "webhook", body, (b"key", b"other"))


async def test_the_backlog_bound_refuses_before_memory_grows_and_lifts_by_itself(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline(backlog_max_bytes=64 * 1024) as pipeline:
        await pipeline.start_workers()
        pipeline.pause_applying()
        accepted = 0
        with pytest.raises(Busy) as busy:
            for n in range(10_000):
                pipeline.admit()
                accepted += (await ingest(pipeline, "webhook", lines([measurement(n)]))).accepted
        assert 1 <= busy.value.retry_after <= 60
        assert pipeline.backlog_bytes < 65 * 1024
        waiting = asyncio.create_task(pipeline.ingest_q.put(measurement()))
        await asyncio.sleep(0)
        assert not waiting.done()

        pipeline.pause_applying(False)
        await waiting
        pipeline.admit()
        await pipeline.stop_workers()

        assert counted(pipeline, "webhook") == accepted + 1


async def test_more_is_handed_over_than_memory_takes_and_nothing_is_lost(
    make_pipeline: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("applier.HANDOVER_BYTES", 2000)
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        pipeline.pause_applying()
        for n in range(100):
            await pipeline.ingest_q.put(measurement(n))
        pipeline.pause_applying(False)
        for n in range(100):
            await pipeline.ingest_q.put(measurement(n))
        await pipeline.stop_workers()

        (row,) = pipeline.store.aggregates(AggregateQuery())
        assert (row.count, row.measures["value"].total) == (200, 2 * sum(range(100)))


async def test_after_a_refused_sync_the_same_event_may_come_again(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    broken = False

    def sync(fd: int) -> None:
        if broken:
            raise OSError(errno.EIO, "broken")
        os.fdatasync(fd)

    with make_pipeline(sync=sync) as pipeline:
        await pipeline.start_workers()
        broken = True
        results = await asyncio.gather(
            *(pipeline.ingest_q.put(event(1)) for _ in range(5)), return_exceptions=True
        )
        assert all(isinstance(result, QueueRefused) for result in results)
        assert pipeline.totals["events"].received == 0
        assert not await pipeline.probe_queue()
        with pytest.raises(QueueRefused):
            await ingest(pipeline, "events", lines([event(n) for n in range(5000)]))
        assert list(pipeline.uploads.iterdir()) == []

        broken = False
        assert await pipeline.probe_queue()
        assert (await pipeline.ingest_q.put(event(1))).accepted == 1
        await pipeline.stop_workers()
        assert counted(pipeline, "events") == 1


async def test_a_store_that_refuses_is_waited_for_while_events_are_taken(
    make_pipeline: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("applier.RETRY_SECONDS", 0.01)
    with make_pipeline() as pipeline:
        writer = pipeline.store._writer
        pages = writer.execute("PRAGMA page_count").fetchone()[0]
        writer.execute(f"PRAGMA max_page_count = {pages}")
        await pipeline.start_workers()
        for n in range(300):
            await pipeline.ingest_q.put(measurement(n, f"category-{n}" * 10))
        while (await pipeline.probe_queue()) and vars(pipeline)["store_works"]:
            await asyncio.sleep(0.01)

        writer.execute("PRAGMA max_page_count = 1000000")
        await pipeline.applied(pipeline.queue.end)
        assert pipeline.store_works
        await pipeline.stop_workers()
        assert counted(pipeline, "webhook") == 300


async def test_a_batch_that_fails_for_any_reason_is_tried_again_and_counted_once(
    make_pipeline: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("applier.RETRY_SECONDS", 0.01)
    failures = iter([RuntimeError("first"), ValueError("second")])
    real = Pipeline.__init__.__globals__["SQLiteStore"]._add

    def fails_twice(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        for failure in failures:
            raise failure

    monkeypatch.setattr("sqlite_store.SQLiteStore._add", fails_twice)
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        await asyncio.gather(*(pipeline.ingest_q.put(event(n, x=n)) for n in range(100)))
        await pipeline.applied(pipeline.queue.end)
        await pipeline.stop_workers()

        assert counted(pipeline, "events") == 100
        assert list(failures) == []


async def test_a_damaged_upload_is_reported_and_holds_up_nothing(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        await ingest(pipeline, "webhook", lines([measurement(n) for n in range(20_000)]))
        await pipeline.ingest_q.put(measurement(0, "after"))
        (path,) = pipeline.uploads.iterdir()
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

        class Log:
            said: list[Any] = []

            def error(self, *words: Any) -> None:
                self.said.append(words)

        pipeline._log = Log()
        await pipeline.start_workers()
        await pipeline.applied(pipeline.queue.end)
        await pipeline.stop_workers()

        assert 10_000 < counted(pipeline, "webhook") < 20_000
        assert "damaged" in Log.said[0][0]


async def test_a_damaged_frame_costs_its_events_alone_and_is_reported(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    said: list[Any] = []

    class Log:
        def error(self, *words: Any) -> None:
            said.append(words)

    with make_pipeline() as pipeline:
        for n in range(9):
            await pipeline.ingest_q.put(measurement(n))
        (segment,) = (pipeline.queue_dir / "ingest").iterdir()
        data = bytearray(segment.read_bytes())
        data[len(data) // 2] ^= 1
        segment.write_bytes(data)
    with make_pipeline(logger=Log()) as pipeline:
        await pipeline.start_workers()
        await pipeline.ingest_q.put(measurement(9))
        await pipeline.applied(pipeline.queue.end)
        await pipeline.stop_workers()

        assert counted(pipeline, "webhook") == 9
        assert "damaged" in said[0][0]


async def test_applied_log_and_uploads_are_dropped_only_when_checkpointed(
    make_pipeline: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("applier.TRIM_BYTES", 500_000)
    retention = Retention(max_bytes=1_000_000)
    with make_pipeline(retention=retention) as pipeline:
        pipeline.queue._segment_bytes = 200_000
        await pipeline.start_workers()
        for round_ in range(20):
            body = lines([measurement(n) for n in range(2000)])
            await ingest(pipeline, "webhook", body)
            for n in range(5):
                await ingest(pipeline, "webhook", body[: 180_000 - 50 * n].rpartition(b"\n")[0])
            await pipeline.applied(pipeline.queue.end)
            assert round_ or len(list(pipeline.uploads.iterdir())) <= 1
        await pipeline.stop_workers()

        assert pipeline.queue.statistics().first > 0
        assert pipeline.queue.statistics().bytes < 2_000_000
        assert len(list(pipeline.uploads.iterdir())) < 15
        expected = pipeline.totals["webhook"].accepted
        assert counted(pipeline, "webhook") == expected


async def test_a_second_process_on_the_same_data_is_refused_naming_the_first(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline():
        with pytest.raises(Held, match=str(os.getpid())):
            make_pipeline().__enter__()
        with pytest.raises(Held):
            make_pipeline(queue_dir="elsewhere").__enter__()
    with make_pipeline():
        pass


async def test_a_database_and_a_log_that_do_not_belong_together_are_refused(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    async with make_pipeline() as pipeline:
        await pipeline.start_workers()
        await pipeline.ingest_q.put(measurement())
    with pytest.raises(QueueError, match="belong together"):
        make_pipeline(queue_dir="empty").__enter__()


def test_from_python_no_web_framework_is_imported() -> None:
    code = "import sys, utils; sys.exit('fastapi' in sys.modules or 'starlette' in sys.modules)"

    assert subprocess.call([sys.executable, "-c", code], cwd=FOLDER) == 0


async def test_resource_metrics_name_what_is_used(make_pipeline: Callable[..., Pipeline]) -> None:
    with make_pipeline(queue_maxsize=7) as pipeline:
        metrics = pipeline.get_resource_metrics()

    assert metrics["memory_bytes"] > 10_000_000
    assert metrics["queue_maxsize"] == 7
    assert metrics["backlog_events"] == 0


async def test_a_dead_letter_comes_to_life_once_also_across_a_crash_before_it_is_applied(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    def spec(field: str) -> Any:
        return parse_spec(
            {"select": {"v": field}, "aggregates": [{"op": "sum", "field": "v"}],
             "window": {"kind": "none"}}
        )  # fmt: skip

    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        await pipeline.put_pipeline("p", spec("value"))
        body = lines([{"amount": n} for n in range(5)])
        assert (await ingest(pipeline, "p", body)).rejected == 5
        await pipeline.applied(pipeline.queue.end)
        await pipeline.put_pipeline("p", spec("amount"), replace=True)
        pipeline.pause_applying()
        replaying = asyncio.create_task(pipeline.replay_dead_letters())
        end = pipeline.queue.end
        while pipeline.queue.end == end:
            await asyncio.sleep(0)
        replaying.cancel()
        pipeline._applier._stop_at = 0.0  # type: ignore[union-attr]  # it dies before it applies
    with make_pipeline() as pipeline:
        again = await pipeline.replay_dead_letters()
        assert again["replayed"] == 0
        await pipeline.start_workers()
        await pipeline.applied(pipeline.queue.end)
        assert (await pipeline.replay_dead_letters())["replayed"] == 0
        (row,) = pipeline.store.aggregates(AggregateQuery(pipeline="p"))
        assert (row.count, row.measures["v"].total) == (5, 10)
        assert pipeline.store.dead_letters(0, 10) == []
        await pipeline.stop_workers()


async def test_what_is_not_applied_or_still_rebuilt_from_is_never_dropped(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline(retention=Retention(seconds=0.0, max_bytes=0)) as pipeline:
        pipeline.queue._segment_bytes = 1000
        await pipeline.start_workers()
        pipeline.pause_applying()
        for n in range(100):
            await pipeline.ingest_q.put(measurement(n))
        applier = pipeline._applier
        assert applier is not None
        applier.call(lambda: applier._trim()).result(10)
        assert pipeline.queue.statistics().first == 0

        pipeline.pause_applying(False)
        await pipeline.applied(pipeline.queue.end)
        applier.call(lambda: applier._trim()).result(10)
        assert pipeline.queue.statistics().segments == 1
        assert counted(pipeline, "webhook") == 100
        await pipeline.stop_workers()


def orders(**changes: Any) -> Any:
    return parse_spec(
        {"select": {"k": "k"}, "event_time": "t", "event_id": "id", "group_by": ["k"],
         "aggregates": [{"op": "count"}], "window": {"kind": "tumbling", "size_seconds": 10},
         **changes}
    )  # fmt: skip


@pytest.mark.parametrize("size", [3, 4000])
async def test_duplicates_of_a_pipeline_without_sources_are_counted_once(
    make_pipeline: Callable[..., Pipeline], size: int
) -> None:
    body = lines([{"id": n, "k": "k" * 100, "t": 1_700_000_000} for n in range(size)])
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        await pipeline.put_pipeline("p", orders())
        for _ in range(2):
            await ingest(pipeline, "p", body)
        await pipeline.stop_workers()
    with make_pipeline() as pipeline:
        totals = pipeline.totals["p"]
        assert (totals.accepted, totals.duplicates, totals.received) == (size, size, 2 * size)


async def test_a_source_without_a_name_is_counted_once(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        spec = orders(select={"source": "k"}, group_by=["source"])
        await pipeline.put_pipeline("p", spec)
        await ingest(pipeline, "p", lines([{"id": n, "k": "", "t": 1e9} for n in range(5)]))
        await pipeline.stop_workers()
        assert pipeline.store.totals()["p", ""].accepted == 5


async def test_replayed_dead_letters_that_are_late_once_more_do_not_go_round(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        await pipeline.put_pipeline("p", orders(event_id=None))
        for t in (1_700_000_100, *range(1_700_000_000, 1_700_000_005)):
            await ingest(pipeline, "p", lines([{"k": "a", "t": t}]))
        await pipeline.applied(pipeline.queue.end)

        done = await asyncio.wait_for(pipeline.replay_dead_letters(), 20)

        assert done["replayed"] == 5
        assert len(pipeline.store.dead_letters(0, 100)) == 5
        totals = pipeline.store.totals()["p", ""]
        assert (totals.accepted, totals.late) == (6, 5)
        await pipeline.stop_workers()


@pytest.mark.parametrize("times", [1, 2])
async def test_a_bit_that_flips_in_the_applied_end_of_the_log_stops_nothing(
    make_pipeline: Callable[..., Pipeline], times: int
) -> None:
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        for n in range(3):
            await pipeline.ingest_q.put(measurement(n))
        await pipeline.stop_workers()
    (segment,) = (pipeline.queue_dir / "ingest").glob("*.seg")
    damaged = bytearray(segment.read_bytes())
    damaged[-5] ^= 1
    segment.write_bytes(damaged)

    for n in range(times):  # also when it ends before anything more is accepted
        with make_pipeline() as again:
            assert again.queue.statistics().torn_bytes or n
            assert again.queue.end == again.queue_position
    with make_pipeline() as again:
        await again.start_workers()
        await again.ingest_q.put(measurement(3))
        await again.stop_workers()
        assert counted(again, "webhook") == 4


async def test_damage_with_nothing_whole_behind_it_is_reported_and_holds_nothing_up(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        for n in range(3):
            await pipeline.ingest_q.put(measurement(n))
        (segment,) = (pipeline.queue_dir / "ingest").glob("*.seg")
        damaged = bytearray(segment.read_bytes())
        damaged[-5] ^= 1
        segment.write_bytes(damaged)

        await pipeline.start_workers()
        await asyncio.wait_for(pipeline.applied(pipeline.queue.end), 20)

        assert counted(pipeline, "webhook") == 2
        assert pipeline.queue.statistics().corrupt_frames == 1
        assert (pipeline.backlog_events, pipeline.backlog_bytes) == (0, 0)
        await pipeline.stop_workers()


async def test_a_replay_from_inside_a_message_takes_it_whole_and_reports_no_damage(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        await pipeline.put_pipeline("p", orders())
        spans = []
        for n in range(3):
            receipt = await ingest(pipeline, "p", lines([{"id": n, "k": "a", "t": 1e9}]))
            spans.append(receipt.position)
        await pipeline.rebuild("p", spans[0] + 5)
        await asyncio.wait_for(pipeline.rebuilt("p"), 20)

        (row,) = pipeline.store.aggregates(AggregateQuery(pipeline="p"))
        assert row.count == 2
        assert pipeline.queue.statistics().corrupt_frames == 0
        await pipeline.stop_workers()


async def test_the_largest_event_that_can_be_set_is_counted(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    largest = 16 * 1024 * 1024
    with make_pipeline(max_event_bytes=largest) as pipeline:
        await pipeline.start_workers()
        document = {**measurement(), "pad": ""}
        document["pad"] = "x" * (largest - len(lines([document])))
        receipt = await ingest(pipeline, "webhook", lines([document]))
        await pipeline.stop_workers()
        assert (receipt.accepted, counted(pipeline, "webhook")) == (1, 1)


async def test_a_body_of_nothing_but_tiny_mistakes_is_kept_within_its_bounds(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        receipt = await ingest(pipeline, "webhook", b"x\n" * 300_000)
        await pipeline.stop_workers()
        assert receipt.rejected == pipeline.store.totals()["webhook", ""].rejected == 300_000


async def test_ids_of_an_upload_stay_claimed_when_its_client_leaves_at_the_commit(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    ready = threading.Event()
    ready.set()

    def sync(fd: int) -> None:
        assert ready.wait(20)
        os.fdatasync(fd)

    with make_pipeline(sync=sync) as pipeline:
        await pipeline.start_workers()
        body = lines([event(n, pad=n) for n in range(8_000)])
        projection = pipeline.projection("events")
        reader, intake = pipeline.reader(projection, "ndjson"), pipeline.intake(projection)
        for block in [*reader.feed(body), *reader.finish()]:
            await intake.add(block)
        await asyncio.to_thread(intake._close_file)
        intake._close_file = lambda: None  # type: ignore[method-assign]
        ready.clear()
        leaving = asyncio.create_task(intake.commit(202))
        while not pipeline.queue._pending and pipeline.queue._committing is None:
            await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        intake.abort()
        again = asyncio.create_task(pipeline.ingest_q.put(event(3)))
        await asyncio.sleep(0.05)
        ready.set()

        assert (await again).duplicates == 1
        await pipeline.stop_workers()
        assert pipeline.totals["events"].accepted == 8_000
        assert pipeline.store.totals()["events", ""].accepted == 8_000


async def test_letters_whose_replay_is_given_up_come_to_life_once(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        await pipeline.put_pipeline("p", orders(event_id=None, select={"k": "key"}))
        assert (await ingest(pipeline, "p", lines([{"k": "a", "t": 1e9}]))).rejected == 1
        await pipeline.applied(pipeline.queue.end)
        await pipeline.put_pipeline("p", orders(event_id=None), replace=True)
        pipeline.pause_applying()
        end = pipeline.queue.end
        first = asyncio.create_task(pipeline.replay_dead_letters())
        while pipeline.queue._committing is None:
            await asyncio.sleep(0)
        first.cancel()
        second = asyncio.create_task(pipeline.replay_dead_letters())
        while pipeline.queue.end == end:
            await asyncio.sleep(0)
        pipeline.pause_applying(False)

        assert (await second)["replayed"] == 0
        await pipeline.stop_workers()
        (row,) = pipeline.store.aggregates(AggregateQuery(pipeline="p"))
        assert row.count == 1


async def test_a_pipeline_whose_put_is_given_up_in_the_log_is_there(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        await pipeline.put_pipeline("p", orders())
        changed = orders(select={"k": "key"})
        putting = asyncio.create_task(pipeline.put_pipeline("p", changed, replace=True))
        while pipeline.queue._committing is None:
            await asyncio.sleep(0)
        putting.cancel()
        await asyncio.wait([putting])
        await pipeline.settled()

        assert pipeline.projection("p").spec == changed
        body = lines([{"id": 1, "key": "a", "t": 1e9}])
        receipt = await ingest(pipeline, "p", body)
        await asyncio.wait_for(pipeline.applied(receipt.position), 20)
        assert [row.count for row in pipeline.store.aggregates(AggregateQuery())] == [1]
        await pipeline.stop_workers()


async def test_an_upload_for_a_pipeline_that_is_deleted_at_its_commit_is_a_conflict(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        await pipeline.put_pipeline("p", orders())
        projection = pipeline.projection("p")
        body = lines([{"id": n % 3000, "k": "a" * 60, "t": 1e9} for n in range(6_000)])
        reader, intake = pipeline.reader(projection, "ndjson"), pipeline.intake(projection)
        for block in [*reader.feed(body), *reader.finish()]:
            await intake.add(block)
        committing = asyncio.create_task(intake.commit(202))
        while not pipeline.claims.merging.locked():
            await asyncio.sleep(0)
        await pipeline.delete_pipeline("p")

        with pytest.raises(PipelineConflict):
            await committing
        intake.abort()
        with pytest.raises(PipelineConflict):
            pipeline.reader(projection, "ndjson")
        assert list(pipeline.uploads.iterdir()) == []
        await pipeline.stop_workers()
