"""What is folded at once is bounded, however many windows an event falls into."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

import catalogue
from aggregation import Folded
from projection import Projection, compile_spec
from results import item_of
from storage import AggregateQuery
from utils import Pipeline, parse_spec
from windows import Windows

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

T0 = 1_700_000_000
SPEC: dict[str, Any] = {
    "select": {"shop": "shop", "amount": "amount"},
    "event_time": "at",
    "group_by": ["shop"],
    "aggregates": [{"op": "count"}, {"op": "sum", "field": "amount"},
                   {"op": "p50", "field": "amount"}],
    "window": {"kind": "sliding", "size_seconds": 60, "slide_seconds": 1,
               "allowed_lateness_seconds": 100},
}  # fmt: skip


async def outcome(pipeline: Pipeline) -> tuple[list[Any], Any]:
    """The rows and the counts after some events on time, some revising and some too late."""
    events = [{"shop": f"s{n % 7}", "amount": n, "at": T0 + n % 20} for n in range(40)]
    events += [{"shop": "s0", "amount": 1, "at": T0 + each} for each in (150, 90, 20, -200, 151)]
    async with pipeline:
        await pipeline.start_workers()
        await pipeline.put_pipeline("orders", parse_spec(SPEC))
        pipeline.pause_applying()
        for event in events:
            receipt = await pipeline.ingest_q.put(event, "orders")
        pipeline.pause_applying(False)
        await pipeline.applied(receipt.position)
        await pipeline.rebuild("orders", 0)
        await pipeline.rebuilt("orders")
        rows = pipeline.store.aggregates(AggregateQuery(pipeline="orders", limit=10_000))
        items = [item_of(pipeline.projection("orders"), row) for row in rows]
        return items, pipeline.store.totals()["orders", ""]


async def test_events_in_many_windows_are_folded_few_at_a_time_to_the_same_rows(
    make_pipeline: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await outcome(make_pipeline("whole"))
    sizes: list[int] = []

    def watched(name: str, spec: Any) -> Projection:
        projection = compile_spec(name, spec)

        def fold(events: Iterable[Any], windows: Windows) -> Folded:
            events = list(events)
            sizes.append(len(events))
            return projection.fold(events, windows)

        return replace(projection, fold=fold)

    monkeypatch.setattr(catalogue, "compile_spec", watched)
    monkeypatch.setattr("builds.FOLDED_ROWS", 3 * 60)

    assert await outcome(make_pipeline("pieces")) == expected
    assert max(sizes) == 3
    assert expected[1].late == 1
    assert expected[1].revised > 0
