"""Topics and their consumers: beside the process that writes, and without it."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from topics import MAX_CONSUMERS, TopicError, Topics
from utils import EventRejected, Pipeline

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

FOLDER = Path(__file__).resolve().parent.parent


def measurement(value: float, ts: float) -> dict[str, Any]:
    return {"data": {"category": "a", "value": value, "quantity": 1, "ts": ts}}


async def fill(pipeline: Pipeline, windows: int = 3) -> None:
    for n in range(windows):
        await pipeline.ingest_q.put(measurement(n, 1_700_000_000 + 10 * n))
    await pipeline.applied(pipeline.queue.end)


async def test_closed_windows_come_in_order_and_again_when_they_are_revised(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        await fill(pipeline)
        first = pipeline.topics.read("aggregates")
        receipt = await pipeline.ingest_q.put(measurement(5, 1_700_000_001))
        await pipeline.applied(receipt.position)
        more = pipeline.topics.read("aggregates", first.next)
        await pipeline.stop_workers()

    assert [item.decoded()["values"]["sum_value"] for item in first.items] == [0, 1]
    assert {item.decoded()["kind"] for item in first.items} == {"closed"}
    (revised,) = more.items
    assert revised.decoded()["kind"] == "revised"
    assert (revised.decoded()["revision"], revised.decoded()["values"]["count"]) == (2, 2)


async def test_a_consumer_sees_its_messages_again_until_it_commits(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        await fill(pipeline)
        topics = pipeline.topics
        one = topics.read("aggregates", consumer="billing", limit=1)
        assert topics.read("aggregates", consumer="billing", limit=1) == one

        topics.commit("aggregates", "billing", one.next)

        (two,) = topics.read("aggregates", consumer="billing").items
        assert two.offset == one.next
        assert topics.read("aggregates", consumer="other", limit=1) == one
        topics.commit("aggregates", "billing", 0)
        assert topics.read("aggregates", consumer="billing", limit=1) == one
        assert topics.consumers("aggregates") == {"billing": 0}
        await pipeline.stop_workers()


async def test_many_commits_of_one_consumer_at_once_leave_one_offset_and_no_litter(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        await fill(pipeline)
        topics = pipeline.topics
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: topics.commit("ingest", "c", n % 4), range(400)))

        assert topics.position("ingest", "c") in range(4)
        assert [path.name for path in (pipeline.queue_dir / "consumers/ingest").iterdir()] == ["c"]
        await pipeline.stop_workers()


async def test_every_accepted_record_is_in_ingest_once_from_any_offset(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        await asyncio.gather(
            *(pipeline.ingest_q.put(measurement(n, 1_700_000_000)) for n in range(50))
        )
        topics, seen, offset = pipeline.topics, [], 0
        while (page := topics.read("ingest", offset, limit=7)).items:
            seen += [item.decoded()["event"]["data"]["value"] for item in page.items]
            offset = page.next

        assert sorted(seen) == list(range(50))
        assert offset == topics.state("ingest").next == pipeline.queue.end


async def test_any_offset_inside_a_large_message_is_found_again(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        projection = pipeline.projection("webhook")
        body = b"\n".join(msgspec.json.encode(measurement(n, 1_700_000_000)) for n in range(2000))
        for _ in range(3):
            reader = pipeline.reader(projection, "ndjson")
            await pipeline.accept(projection, [*reader.feed(body), *reader.finish()])
        start = list(pipeline.queue.read(0))[1].start
        for number in (0, 1, 700, 1999):
            item = pipeline.topics.read("ingest", start + number, limit=1).items[0]
            assert item.decoded()["event"]["data"]["value"] == number


async def test_topics_are_read_beside_the_writer_and_without_it(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        await fill(pipeline)
        with pytest.raises(EventRejected):
            await pipeline.ingest_q.put({"data": {}})
        with Topics.open(pipeline.db_path, pipeline.queue_dir) as beside:
            assert len(beside.read("aggregates").items) == 2
            assert len(beside.read("ingest").items) == 3
            beside.commit("aggregates", "outside", 2)
        assert pipeline.topics.position("aggregates", "outside") == 2
        await pipeline.stop_workers()
    with Topics.open(pipeline.db_path, pipeline.queue_dir) as after:
        assert after.position("aggregates", "outside") == 2
        assert len(after.read("aggregates", consumer="outside").items) == 1
        assert after.state("ingest").next == after.read("ingest").next


async def test_names_and_offsets_that_there_are_not_are_refused_in_sentences(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    with make_pipeline() as pipeline:
        topics = pipeline.topics
        with pytest.raises(TopicError, match="there are: ingest, aggregates"):
            topics.read("nothing")
        for name in ("", "../x", "a/b", "x" * 65, ".."):
            with pytest.raises(TopicError, match="1 to 64"):
                topics.commit("aggregates", name, 0)
        with pytest.raises(TopicError, match="ends at 1"):
            topics.commit("aggregates", "ok", 2)
        for number in range(MAX_CONSUMERS):
            path = pipeline.queue_dir / "consumers" / "ingest" / f"c{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("0\n")
        with pytest.raises(TopicError, match="no more fit"):
            topics.commit("ingest", "one-more", 0)
        (pipeline.queue_dir / "consumers" / "ingest" / "c0").write_text("no number")
        with pytest.raises(TopicError, match="cannot be read"):
            topics.position("ingest", "c0")


async def test_the_command_lists_reads_and_commits(make_pipeline: Callable[..., Pipeline]) -> None:
    with make_pipeline() as pipeline:
        await pipeline.start_workers()
        await fill(pipeline)
        await pipeline.stop_workers()

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        places = ["--db", str(pipeline.db_path), "--queue", str(pipeline.queue_dir)]
        return subprocess.run(
            [sys.executable, str(FOLDER / "topics.py"), *places, *arguments],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip

    read = command("read", "aggregates", "--consumer", "c", "--limit", "1", "--commit")
    assert json.loads(read.stdout)["value"]["window_start"] == "2023-11-14T22:13:20Z"
    assert "c: 2, 1 behind" in command("list").stdout
    assert json.loads(command("read", "aggregates", "--consumer", "c").stdout)["offset"] == 2
    missing = subprocess.run(
        [sys.executable, str(FOLDER / "topics.py"), "--db", "none.db", "list"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert missing.returncode == 1
    assert "DB_PATH" in missing.stderr
    assert "Traceback" not in missing.stderr
