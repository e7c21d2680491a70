"""The demo modes of pipelines as data and of the message queue; `showcase.py` runs them."""

import asyncio
import datetime as dt
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import airportsdata
import msgspec

from results import item_of
from storage import Aggregate, AggregateQuery
from topics import Topics
from utils import Pipeline, parse_spec
from windows import MICROSECONDS

START = 1_768_471_200  # 2026-01-15T10:00:00Z
Claim = Callable[[str, Any, bool], None]
Say = Callable[[str], None]


def spec(window: dict[str, Any], **changes: Any) -> Any:
    """Airports by country, as if each had sent its elevation."""
    return parse_spec(
        {
            "select": {"country": "place.country", "elevation": "elevation"},
            "event_time": "at",
            "group_by": ["country"],
            "aggregates": [
                {"op": "count"}, {"op": "sum", "field": "elevation"},
                {"op": "p95", "field": "elevation"}, {"op": "distinct", "field": "elevation"},
            ],
            "window": window,
            **changes,
        }
    )  # fmt: skip


def documents(count: int, seed: int) -> list[dict[str, Any]]:
    """Airports with times of their own: nearly in order, some late, some much too late."""
    chance = random.Random(seed)
    airports = [a for a in airportsdata.load("ICAO").values() if a["country"]]
    chance.shuffle(airports)
    return [
        {
            "place": {"country": a["country"], "city": a["city"]},
            "elevation": a["elevation"],
            "at": START + n / 100 - chance.choice([0] * 20 + [1, 8, 300]),
        }
        for n, a in enumerate(airports[:count])
    ]


async def upload(pipeline: Pipeline, name: str, body: bytes) -> Any:
    """Take a body as the HTTP route does, and wait for the aggregates."""
    projection = pipeline.projection(name)
    reader, intake = pipeline.reader(projection, "json"), pipeline.intake(projection)
    try:
        for start in range(0, len(body), 65_536):
            for block in reader.feed(body[start : start + 65_536]):
                await intake.add(block)
        for block in reader.finish():
            await intake.add(block)
        receipt = await intake.commit(202)
    finally:
        intake.abort()
    await pipeline.applied(receipt.position)
    return receipt


def rows(pipeline: Pipeline, name: str) -> list[Aggregate]:
    """Everything in the aggregates of a pipeline."""
    found: list[Aggregate] = []
    after = None
    while page := pipeline.store.aggregates(AggregateQuery(name, after=after, limit=1000)):
        found += page
        after = page[-1].cursor
    return found


def shown(pipeline: Pipeline, name: str) -> list[dict[str, Any]]:
    """The same as it is shown: a sum may be kept in two numbers that differ by the batches."""
    return [item_of(pipeline.projection(name), row) for row in rows(pipeline, name)]


def pipelines(say: Say, claim: Claim, *, quick: bool, seed: int) -> None:
    """Windows of every kind over the same stream, a replay, and a bound on groups."""
    asyncio.run(_pipelines(say, claim, 2_000 if quick else 20_000, seed))


async def _pipelines(say: Say, claim: Claim, count: int, seed: int) -> None:
    made = documents(count, seed)
    body = msgspec.json.encode(made)
    kinds: dict[str, dict[str, Any]] = {
        "tumbling": {"kind": "tumbling", "size_seconds": 10, "allowed_lateness_seconds": 5},
        "sliding": {"kind": "sliding", "size_seconds": 60, "slide_seconds": 10},
        "session": {"kind": "session", "gap_seconds": 2, "allowed_lateness_seconds": 5},
        "none": {"kind": "none"},
    }
    async with Pipeline(db_path="windows.db", max_keys=50) as pipeline:
        await pipeline.start_workers()
        for name, window in kinds.items():
            await pipeline.put_pipeline(name, spec(window))
            await upload(pipeline, name, body)
            totals = pipeline.store.totals()[name, ""]
            found = rows(pipeline, name)
            say(f"{name}: {len(found):,} rows, {totals.late} too late, {totals.revised} revisions")
            if name in ("tumbling", "none"):  # there every event counts once
                counted = sum(row.count for row in found)
                claim(f"{name}: aggregated + late = sent", f"{counted:,} + {totals.late}",
                      counted + totals.late == len(made))  # fmt: skip
        naive: dict[Any, int] = {}
        for each in made:
            start = int(each["at"] // 10) * 10
            key = (start, each["place"]["country"])
            naive[key] = naive.get(key, 0) + 1
        most = {row.window_start // MICROSECONDS for row in rows(pipeline, "tumbling")}
        claim("windows stand where the epoch says", f"{len(most)} windows",
              most <= {start for start, _ in naive})  # fmt: skip
        others = sum(row.count for row in rows(pipeline, "none") if row.group == ["(other)"])
        groups = len(rows(pipeline, "none"))
        claim("beyond MAX_KEYS=50 groups are counted together", f"{groups} rows, {others:,} events",
              groups == 51 and others > 0)  # fmt: skip
        before = shown(pipeline, "session")
        await pipeline.rebuild("session", 0)
        await pipeline.rebuilt("session")
        claim("a replay of the log gives the same rows", f"{len(before):,} rows",
              shown(pipeline, "session") == before)  # fmt: skip


def queue(say: Say, claim: Claim, *, quick: bool, seed: int) -> None:
    """Closed windows as messages, a consumer that dies before it commits, and goes on."""
    asyncio.run(_queue(say, claim, 1_000 if quick else 10_000, seed))


async def _queue(say: Say, claim: Claim, count: int, seed: int) -> None:
    async with Pipeline(db_path="queue.db") as pipeline:
        await pipeline.start_workers()
        window = {"kind": "tumbling", "size_seconds": 1, "allowed_lateness_seconds": 60}
        await pipeline.put_pipeline("airports", spec(window))
        made = documents(count, seed)
        for start in range(0, count, 500):
            await upload(pipeline, "airports", msgspec.json.encode(made[start : start + 500]))
    with Topics.open("queue.db", Path("queue.queue")) as topics:  # nobody serves: files are enough
        state = topics.state("aggregates")
        say(f"{state.messages:,} messages of closed and revised windows, {state.bytes:,} bytes")
        first = topics.read("aggregates", consumer="billing", limit=10)
        again = topics.read("aggregates", consumer="billing", limit=10)
        claim("what was read and not committed comes again", f"{len(again.items)} messages",
              first == again and len(first.items) == 10)  # fmt: skip
        latest: dict[Any, int] = {}
        pages = 0
        while (page := topics.read("aggregates", consumer="billing", limit=500)).items:
            for item in page.items:
                value = item.decoded()
                latest[value["window_start"], value["group"]["country"]] = value["values"]["count"]
            topics.commit("aggregates", "billing", page.next)
            pages += 1
        say(f"consumed in {pages} pages; the consumer stands at {page.next:,}")
        ingested, offset = 0, 0
        while (page := topics.read("ingest", offset, limit=1000)).items:
            ingested += sum("event" in item.decoded() for item in page.items)
            offset = page.next
    claim("every record is in the topic ingest once", f"{ingested:,} of {count:,}",
          ingested == count)  # fmt: skip
    async with Pipeline(db_path="queue.db") as pipeline:
        closed = {
            (row.window_start // MICROSECONDS, row.group[0]): row.count
            for row in rows(pipeline, "airports")
        }
    matching = sum(closed.get((_seconds(start), c)) == n for (start, c), n in latest.items())
    claim("the last message of a window is what the aggregates hold", f"{matching:,} windows",
          matching == len(latest) > 0)  # fmt: skip


def _seconds(text: str) -> int:
    return int(dt.datetime.fromisoformat(text).timestamp())
