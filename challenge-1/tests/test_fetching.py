"""Whole runs against the simulated APIs, in virtual time."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.responses import JSONResponse, RedirectResponse
from virtual_time import clock, run

from fetch_settings import FetchSettings, Source, load
from fetching import FetchRun
from journal import NothingToResume
from simulators import Behaviour, Simulation, create_app, worst_window

pytestmark = pytest.mark.integration
TAME = Behaviour(failure_rate=0, limited_rate=0, malformed_rate=0)


def simulation(**behaviours: Behaviour) -> Simulation:
    made = Simulation(clock=clock)
    made.behaviours = {
        "atlas": TAME, "bazar": TAME, "corner": replace(TAME, products=40)
    } | behaviours  # fmt: skip
    return made


def fetch(
    served: Simulation | httpx2.AsyncBaseTransport,
    *,
    sources: list[Source] | None = None,
    cut_after: float | None = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run it in virtual time; the summary that was written."""

    async def main() -> dict[str, Any]:
        transport = (
            httpx2.ASGITransport(create_app(served)) if isinstance(served, Simulation) else served
        )
        given = FetchSettings(sources=sources or load().settings.sources, **(settings or {}))
        subject = FetchRun(given, transport=transport, clock=clock, **options)
        if cut_after is not None:
            asyncio.get_running_loop().call_later(cut_after, subject.cut, "SIGTERM")
        await subject.run()
        return json.loads(Path("out/summary.json").read_text())  # type: ignore[no-any-return]

    return run(main())


def answering(answer: Callable[[], Any]) -> httpx2.AsyncBaseTransport:
    """A server that answers everything with this document."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await JSONResponse(answer())(scope, receive, send)

    return httpx2.ASGITransport(application)


class TestResult:
    def test_every_product_of_every_source_is_there_once(self) -> None:
        served = simulation()
        summary = fetch(served)

        assert summary["schema_version"] == 1
        assert (summary["partial"], summary["ended"]) == (False, "finished")
        assert summary["summary"]["total"] == len(summary["products"]) == 360
        assert summary["summary"]["success_rate"] == 1
        assert {name: s["items"] for name, s in summary["sources"].items()} == {
            "atlas": 160, "bazar": 160, "corner": 40
        }  # fmt: skip
        assert len({(p["source"], p["id"]) for p in summary["products"]}) == 360
        assert summary["errors"] == []
        assert served.seen("atlas")["requests"] == 8
        assert served.seen("corner")["requests"] == 41
        assert sorted(path.name for path in Path("out").iterdir()) == ["summary.json"]

    def test_average_prices_are_those_of_the_products(self) -> None:
        summary = fetch(simulation())

        for name, source in summary["sources"].items():
            prices = [p["price"] for p in summary["products"]
                      if p["source"] == name and p["price"] is not None]  # fmt: skip
            assert source["average_price"] == pytest.approx(sum(prices) / len(prices), abs=0.01)

    @pytest.mark.parametrize("seed", range(8))
    def test_failures_429s_and_half_bodies_cost_nothing_but_time(self, seed: int) -> None:
        rough = Behaviour(failure_rate=0.12, limited_rate=0.1, malformed_rate=0.08, hang_rate=0.03)
        served = simulation(atlas=rough, bazar=rough, corner=replace(rough, products=100))
        served.seed = seed
        # With so many failures an item may use up four attempts; then its absence is said.
        summary = fetch(served, settings={"timeout": 600, "breaker_patience": 100})

        missing = {(e["source"], e["item"]) for e in summary["errors"]}
        assert summary["partial"] == bool(missing)
        assert bool(missing) or summary["summary"]["total"] == 420
        corner = summary["sources"]["corner"]
        assert corner["items"] + corner["failed_requests"] == 100
        assert corner["paused"] > 0
        assert corner["retries"] > 0
        assert set(corner["errors"]) <= {"http_500", "malformed", "timeout"}
        for name in ("atlas", "bazar", "corner"):
            assert worst_window(served.arrivals[name]) <= 5

    def test_300_single_products_take_at_most_1_15_times_the_20_seconds_they_must(self) -> None:
        served = simulation(**dict.fromkeys(("atlas", "bazar", "corner"),
                                            replace(TAME, products=100)))  # fmt: skip
        fields = {"corner/items": ("productId", "label"), "atlas/products": ("id", "title"),
                  "bazar/items": ("sku", "name")}  # fmt: skip
        singles = [
            Source.model_validate({
                "name": path.split("/")[0], "paging": "single", "ids": "ids",
                "url": "http://127.0.0.1:1/corner/index",
                "item_url": f"http://127.0.0.1:1/{path}/{{id}}",
                "fields": dict(zip(("id", "name"), paths, strict=True)),
            })
            for path, paths in fields.items()
        ]  # fmt: skip
        summary = fetch(served, sources=singles, settings={"timeout": 100})

        assert summary["summary"]["total"] == 300
        assert summary["summary"]["duration_seconds"] <= 23


class TestTrouble:
    def test_a_dead_source_is_given_up_and_the_others_are_complete(self) -> None:
        summary = fetch(simulation(corner=replace(TAME, products=40, dead_from=10)))

        assert summary["partial"] is True
        corner = summary["sources"]["corner"]
        assert (summary["sources"]["atlas"]["items"], corner["items"]) == (160, 8)
        assert corner["not_tried"] + corner["failed_requests"] == 32
        assert corner["breaker_openings"] >= 3
        assert corner["errors"]["down"] == 1
        assert summary["summary"]["duration_seconds"] < 40
        assert {error["source"] for error in summary["errors"]} == {"corner"}

    @pytest.mark.parametrize("name", ["atlas", "bazar", "corner"])
    def test_a_source_that_is_dead_from_the_start_is_said_to_be(self, name: str) -> None:
        summary = fetch(simulation(**{name: replace(TAME, products=40, dead_from=1)}))

        source = summary["sources"][name]
        assert (source["items"], source["complete"], summary["partial"]) == (0, False, True)
        assert source["failed_requests"] + source["not_tried"] >= 1
        assert summary["summary"]["success_rate"] < 1
        assert summary["errors"]
        assert sum(s["complete"] for s in summary["sources"].values()) == 2

    def test_after_an_outage_the_breaker_lets_a_probe_in_and_nothing_is_missing(self) -> None:
        served = simulation(corner=replace(TAME, products=40, dead_from=10, dead_until=14))
        summary = fetch(served)

        assert summary["partial"] is False
        assert 1 <= summary["sources"]["corner"]["breaker_openings"] <= 3
        assert worst_window(served.arrivals["corner"]) <= 5

    def test_endless_429s_end_with_the_time_limit(self) -> None:
        limited = replace(TAME, limited_rate=1, retry_after="1e9")
        summary = fetch(simulation(atlas=limited), settings={"timeout": 50})

        assert (summary["ended"], summary["partial"]) == ("timeout", True)
        assert summary["summary"]["duration_seconds"] == pytest.approx(50)
        assert summary["sources"]["atlas"]["paused"] == 4  # the 1e9 is believed for 15 s
        assert summary["sources"]["bazar"]["complete"]

    @pytest.mark.parametrize(
        ("answers", "kind"),
        [
            (lambda n: {"data": [], "paging": {"next": ("a", "b")[n % 2]}}, "loop"),
            (lambda n: {"data": [], "paging": {"next": {"a": 1}}}, "shape"),
            (lambda n: {"data": "none"}, "shape"),
        ],
    )
    def test_a_source_that_leads_in_circles_or_elsewhere_ends(
        self, answers: Callable[[int], Any], kind: str
    ) -> None:
        count = 0

        def answer() -> Any:
            nonlocal count
            count += 1
            return answers(count)

        bazar = [each for each in load().settings.sources if each.name == "bazar"]
        summary = fetch(answering(answer), sources=bazar)

        assert summary["partial"] is True
        assert summary["sources"]["bazar"]["errors"].get(kind)
        assert count <= 6

    def test_a_missing_product_is_missing_and_is_not_asked_for_again(self) -> None:
        served = simulation()
        real = create_app(served)

        async def one_less(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"].endswith("/items/7"):
                scope = {**scope, "path": "/corner/items/7000"}
            await real(scope, receive, send)

        summary = fetch(httpx2.ASGITransport(one_less))

        assert summary["sources"]["corner"]["errors"] == {"http_404": 1}
        assert summary["errors"] == [
            {"source": "corner", "item": "7", "kind": "http_404", "message": "It answered 404."}
        ]
        assert summary["partial"] is True
        assert served.seen("corner")["requests"] == 41

    def test_a_redirect_takes_a_slot_of_its_own_and_the_wait_for_it_is_no_time_of_the_answer(
        self,
    ) -> None:
        seen: list[float] = []
        real = create_app(simulation())

        async def moved(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"].startswith("/corner"):
                seen.append(clock())
                if not scope["query_string"]:
                    there = RedirectResponse(f"{scope['path']}?moved")
                    await there(scope, receive, send)
                    return
            await real(scope, receive, send)

        corner = [each for each in load().settings.sources if each.name == "corner"]
        summary = fetch(httpx2.ASGITransport(moved), sources=corner)

        assert summary["partial"] is False
        assert summary["sources"]["corner"]["errors"] == {}
        assert len(seen) == 2 * 41
        assert worst_window(seen) <= 5

    def test_pages_without_a_total_end_with_the_first_that_brings_nothing_new(self) -> None:
        (atlas,) = (each for each in load().settings.sources if each.name == "atlas")
        served = simulation()
        summary = fetch(served, sources=[atlas.model_copy(update={"pages": None})])

        assert summary["sources"]["atlas"]["items"] == 160
        assert served.seen("atlas")["requests"] == 9

    def test_cookies_are_not_taken(self) -> None:
        given: list[bytes] = []
        real = create_app(simulation())

        async def baking(scope: Any, receive: Any, send: Any) -> None:
            given.extend(value for name, value in scope["headers"] if name == b"cookie")

            async def with_cookie(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"].append((b"set-cookie", b"a=b; Path=/"))
                await send(message)

            await real(scope, receive, with_cookie)

        assert fetch(httpx2.ASGITransport(baking))["partial"] is False
        assert given == []

    def test_the_same_product_twice_counts_once(self) -> None:
        def answer() -> Any:
            records = [{"id": n % 3, "title": "x"} for n in range(5)]
            return {"items": records, "meta": {"pages": 1}}

        (atlas,) = (each for each in load().settings.sources if each.name == "atlas")
        summary = fetch(answering(answer), sources=[atlas])

        assert (summary["summary"]["total"], summary["partial"]) == (3, False)
        assert summary["sources"]["atlas"]["duplicates"] == 2

    def test_a_source_has_at_most_max_products(self) -> None:
        summary = fetch(simulation(), settings={"max_products": 50})

        assert summary["sources"]["corner"]["complete"]
        for name in ("atlas", "bazar"):
            assert summary["sources"][name]["items"] == 50
            assert summary["sources"][name]["errors"]["too_many"]
        assert summary["partial"] is True


class FakeDoor:
    def __init__(self) -> None:
        self.sent: dict[str, list[dict[str, Any]]] = {}
        self.calls = 0

    async def send(self, key: str, events: list[dict[str, Any]]) -> None:
        self.calls += 1
        await asyncio.sleep(0.01)
        assert self.sent.setdefault(key, events) == events

    def statistics(self) -> dict[str, Any]:
        return {"batches": len(self.sent)}


class TestResuming:
    def test_a_run_cut_by_a_signal_writes_what_it_has_and_goes_on_where_it_stopped(self) -> None:
        served = simulation()
        first = fetch(served, cut_after=4.0)
        asked = {name: served.seen(name)["requests"] for name in served.behaviours}

        assert (first["ended"], first["partial"]) == ("SIGTERM", True)
        assert 0 < first["sources"]["corner"]["items"] < 40

        second = fetch(served, resume=True)

        assert second["partial"] is False
        assert second["run_id"] == first["run_id"]
        assert second["summary"]["total"] == 360
        assert served.seen("atlas")["requests"] == asked["atlas"]
        assert served.seen("corner")["requests"] == 41

    @pytest.mark.parametrize("cut_after", [0.0, 0.3, 0.7, 1.1, 1.5, 2.9])
    def test_wherever_it_is_cut_the_result_is_the_same(self, cut_after: float) -> None:
        served = simulation()
        fetch(served, cut_after=cut_after)
        fetch(served, cut_after=cut_after, resume=True)
        summary = fetch(served, resume=True)

        assert summary["summary"]["total"] == 360
        assert summary["partial"] is False

    def test_what_a_dead_source_left_out_is_fetched_once_it_lives(self) -> None:
        dead = simulation(corner=replace(TAME, products=40, dead_from=10))
        assert fetch(dead)["partial"]

        summary = fetch(simulation(), resume=True)

        assert (summary["partial"], summary["summary"]["total"]) == (False, 360)

    def test_a_line_torn_by_a_crash_is_ignored(self) -> None:
        fetch(simulation(), cut_after=3)
        with Path("out/fetch.journal").open("ab") as journal:
            journal.write(b'{"source": "corner", "item": "4')

        summary = fetch(simulation(), resume=True)

        assert (summary["partial"], summary["summary"]["total"]) == (False, 360)

    def test_without_a_cut_run_or_over_other_sources_there_is_nothing_to_resume(self) -> None:
        with pytest.raises(NothingToResume, match="no cut run"):
            fetch(simulation(), resume=True)
        fetch(simulation(), cut_after=1)
        with pytest.raises(NothingToResume, match="other sources"):
            fetch(simulation(), sources=load().settings.sources[:1], resume=True)
        assert fetch(simulation(), resume=True)["summary"]["total"] == 360
        for damaged in (b"", b"{}", b"{\n{}\n"):
            Path("out/fetch.journal").write_bytes(damaged)
            with pytest.raises(NothingToResume, match="damaged"):
                fetch(simulation(), resume=True)

    def test_every_product_goes_through_the_door_once_across_cuts(self) -> None:
        door, served = FakeDoor(), simulation()
        fetch(served, cut_after=2.005, door=door)
        for cut_after in (0.5, 1.505):
            fetch(served, cut_after=cut_after, door=door, resume=True)
        summary = fetch(served, door=door, resume=True)

        events = [event for batch in door.sent.values() for event in batch]
        assert len(events) == len({event["event_id"] for event in events}) == 360
        assert summary["pipeline"] == {"batches": len(door.sent)}
        assert {event["event_type"] for event in events} == {"product"}
        assert all(event["data"]["quantity"] == 1 for event in events)
