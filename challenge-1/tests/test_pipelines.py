"""Pipelines as data, over HTTP against a real server: every sentence of their description."""

import base64
import csv
import hashlib
import hmac
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from standardwebhooks import Webhook

pytestmark = [pytest.mark.webhook, pytest.mark.integration]

T0 = 1_700_000_000
SPEC: dict[str, Any] = {
    "select": {"shop": "shop.name", "amount": "order.amount", "state": "order.state"},
    "where": [{"field": "state", "cmp": "in", "value": ["paid", "sent"]}],
    "event_time": "order.at",
    "event_id": "order.id",
    "group_by": ["shop"],
    "aggregates": [
        {"op": "count"}, {"op": "sum", "field": "amount"}, {"op": "avg", "field": "amount"},
        {"op": "min", "field": "amount"}, {"op": "max", "field": "amount"},
        {"op": "p50", "field": "amount"}, {"op": "p95", "field": "amount"},
        {"op": "p99", "field": "amount"}, {"op": "distinct", "field": "state"},
    ],
    "window": {"kind": "tumbling", "size_seconds": 10, "out_of_order_seconds": 2,
               "allowed_lateness_seconds": 10},
}  # fmt: skip


def spec(**changes: Any) -> dict[str, Any]:
    return {**SPEC, **changes}


def order(number: int, at: float = T0, **changes: Any) -> dict[str, Any]:
    # An id stays known to the name of its pipeline, and tests share a server: each has its own ids.
    fields = {
        "id": f"{Path.cwd().name} {number}",
        "amount": number,
        "state": "paid",
        "at": at,
        **changes,
    }
    return {"shop": {"name": "books", "city": "x"}, "order": fields, "noise": [1, {"a": None}]}


@pytest.fixture
def client(shared_server: Any) -> Any:
    """Of a server that others have used; the pipelines they put are gone."""
    with shared_server.client() as client:
        yield client
        for each in client.get("/pipelines").json()["items"]:
            if not each["built_in"]:
                client.delete(f"/pipelines/{each['name']}")


@pytest.fixture
def fresh(server: Any) -> Any:
    """Of a server of its own."""
    with server.client() as client:
        yield client


def put(client: httpx2.Client, name: str, document: Any, query: str = "") -> httpx2.Response:
    return client.put(f"/pipelines/{name}{query}", json=document)


def send(client: httpx2.Client, name: str, documents: Any) -> Any:
    answer = client.post(f"/pipelines/{name}/events?wait=applied", json=documents)
    assert answer.status_code == 202, answer.text
    return answer.json()


def rows(client: httpx2.Client, name: str, **more: Any) -> list[Any]:
    answer = client.get("/aggregates", params={"pipeline": name, "limit": 1000, **more})
    found: list[Any] = answer.json()["items"]
    return found


def reconciled(stats: dict[str, Any]) -> bool:
    parts = ("aggregated", "duplicates", "late", "rejected")
    return bool(stats["received"] == sum(stats[part] for part in parts))


class TestData:
    def test_a_pipeline_is_there_after_a_kill_with_its_results(
        self, make_server: Callable[[], Any]
    ) -> None:
        server = make_server().start()
        with server.client() as client:
            assert put(client, "orders", spec()).status_code == 201
            answer = client.post("/pipelines/orders/events", json=[order(n) for n in range(1, 101)])
            assert answer.json()["accepted"] == 100
        server.kill()
        server.start()
        with server.client() as client:
            assert put(client, "orders", spec()).status_code == 200
            assert client.get("/pipelines/orders").json()["spec"]["select"] == SPEC["select"]
            again = send(client, "orders", [order(100), order(101, state="open")])
            assert (again["accepted"], again["duplicates"], again["filtered"]) == (0, 1, 1)
            (row,) = rows(client, "orders")
            values = row["values"]
            assert row["group"] == {"shop": "books"}
            assert (values["count"], values["sum_amount"], values["avg_amount"]) == (
                100,
                5050,
                50.5,
            )
            assert (values["min_amount"], values["max_amount"]) == (1, 100)
            assert values["p50_amount"] == pytest.approx(50.5)
            assert values["p99_amount"] == pytest.approx(99.01)
            assert values["distinct_state"] == 1
            assert reconciled(client.get("/stats").json())

    def test_a_changed_put_is_409_unless_it_replaces_and_then_starts_empty(
        self, client: httpx2.Client
    ) -> None:
        put(client, "orders", spec())
        send(client, "orders", order(1))
        changed = spec(where=[])

        refused = put(client, "orders", changed)
        assert refused.status_code == 409
        assert "replace=true" in refused.json()["detail"]
        assert len(rows(client, "orders")) == 1
        assert put(client, "orders", changed, "?replace=true").status_code == 201
        assert rows(client, "orders") == []
        assert client.get("/stats").json()["pipelines"]["orders"]["received"] == 0
        send(client, "orders", order(2, state="open"))
        (row,) = rows(client, "orders")
        assert row["values"]["count"] == 1

    def test_an_id_is_known_to_the_pipeline_that_took_it_and_to_no_other(
        self, make_server: Callable[[], Any]
    ) -> None:
        server = make_server().start()
        body = [order(n) | {"padding": "x" * 400} for n in range(2000)]  # large: it is staged
        with server.client() as client:
            for name in ("orders", "invoices"):
                put(client, name, spec())
                assert send(client, name, body)["accepted"] == 2000
            assert send(client, "orders", body[:5])["duplicates"] == 5
        server.kill()
        server.start()
        with server.client() as client:
            put(client, "others", spec())
            assert send(client, "others", body[:5])["accepted"] == 5
            assert send(client, "invoices", body[-5:])["duplicates"] == 5

    def test_the_time_and_the_id_may_be_selected_as_well_while_nothing_adds_them_up(
        self, client: httpx2.Client
    ) -> None:
        document = {
            "select": {"at": "at", "id": "id", "shop": "shop"},
            "event_time": "at", "event_id": "id", "group_by": ["shop"],
            "aggregates": [{"op": "count"}],
            "window": {"kind": "tumbling", "size_seconds": 10},
        }  # fmt: skip
        assert put(client, "plain", document).status_code == 201
        again = {**document, "group_by": ["id"]}
        assert put(client, "twice", again).status_code == 422

        answer = send(client, "plain", [{"at": T0, "id": "1", "shop": "a"}] * 2)

        assert (answer["accepted"], answer["duplicates"]) == (1, 1)

    def test_deleted_it_is_gone_for_every_question(self, fresh: httpx2.Client) -> None:
        put(fresh, "orders", spec())
        send(fresh, "orders", order(1))

        assert fresh.delete("/pipelines/orders").status_code == 204

        assert fresh.delete("/pipelines/orders").status_code == 404
        assert fresh.get("/pipelines/orders").status_code == 404
        assert fresh.post("/pipelines/orders/events", json=order(2)).status_code == 404
        assert fresh.get("/aggregates?pipeline=orders").status_code == 422
        assert fresh.get("/aggregates").json()["items"] == []
        names = [each["name"] for each in fresh.get("/pipelines").json()["items"]]
        assert sorted(names) == ["events", "webhook"]
        put(fresh, "orders", spec())
        assert rows(fresh, "orders") == []

    def test_built_in_pipelines_are_listed_and_stay(self, client: httpx2.Client) -> None:
        assert put(client, "webhook", spec()).status_code == 409
        assert client.delete("/pipelines/events").status_code == 409
        document = {"data": {"category": "a", "value": 1, "quantity": 1, "ts": T0}}
        assert send(client, "webhook", document)["accepted"] == 1

    @pytest.mark.parametrize(
        ("change", "pointer"),
        [
            ({"group_by": ["nobody"]}, "no alias"),
            ({"aggregates": []}, "at least 1"),
            ({"aggregates": [{"op": "sum"}]}, "needs a field"),
            ({"aggregates": [{"op": "median", "field": "amount"}]}, "Input should be"),
            ({"aggregates": [{"op": "count"}, {"op": "count"}]}, "twice"),
            ({"select": {"a.b": "c"}}, "An alias is"),
            ({"select": {"shop": ""}}, "A path is"),
            ({"select": {"shop": "a..b"}}, "A path is"),
            ({"select": {"shop": 'a"b'}}, "A path is"),
            ({"select": {"shop": "a\\b"}}, "A path is"),
            ({"select": {"shop": "a\u241fat"}}, "A path is"),
            ({"select": {"shop": "order", "amount": "order.amount", "state": "x"}}, "hold"),
            ({"event_time": "order.amount"}, "read the same value"),
            ({"where": [{"field": "state", "cmp": "like", "value": "x"}]}, "Input should be"),
            ({"where": [{"field": "state", "cmp": "in", "value": "x"}]}, "needs a list"),
            ({"window": {"kind": "tumbling"}}, "size_seconds"),
            ({"window": {"kind": "sliding", "size_seconds": 5, "slide_seconds": 9}}, "lost"),
            ({"window": {"kind": "hopping", "size_seconds": 5}}, "Input should be"),
            ({"window": {"kind": "tumbling", "size_seconds": True}}, "valid number"),
            ({"window": {"kind": "tumbling", "size_seconds": "5"}}, "valid number"),
            ({"where": [{"field": "state", "cmp": "eq", "value": "\ud800"}]}, "UTF-16"),
            ({"where": [{"field": "state", "cmp": "in", "value": ["\ud800"]}]}, "UTF-16"),
            ({"unknown": 1}, "Extra inputs"),
        ],
    )
    def test_a_spec_that_makes_no_sense_is_422_in_a_sentence(
        self, shared_server: Any, change: dict[str, Any], pointer: str
    ) -> None:
        with shared_server.client() as client:
            answer = client.put(
                "/pipelines/bad", content=json.dumps(spec(**change)),
                headers={"content-type": "application/json"},
            )  # fmt: skip

        assert answer.status_code == 422
        assert pointer in answer.text

    def test_names_are_names(self, shared_server: Any) -> None:
        with shared_server.client() as client:
            for name in ("a.b", "x" * 65, "%2e%2e", "a%00b", "ü"):
                assert put(client, name, spec()).status_code in (404, 422)


class TestMeaning:
    @pytest.mark.parametrize(
        ("condition", "expected"),
        [
            ({"cmp": "eq", "value": 1}, [1, 1.0]),
            ({"cmp": "eq", "value": True}, [True]),
            ({"cmp": "ne", "value": 1}, [True, "1", None, "b", 2.5, "absent"]),
            ({"cmp": "lt", "value": 2}, [1, 1.0]),
            ({"cmp": "ge", "value": 1.0}, [1, 1.0, 2.5]),
            ({"cmp": "gt", "value": "a"}, ["b"]),
            ({"cmp": "le", "value": "1"}, ["1"]),
            ({"cmp": "in", "value": ["b", 2.5, None]}, [None, "b", 2.5]),
            ({"cmp": "in", "value": [True]}, [True]),
            ({"cmp": "in", "value": [1, 0, False]}, [1, 1.0]),
            ({"cmp": "exists", "value": True}, [1, 1.0, True, "1", "b", 2.5]),
            ({"cmp": "exists", "value": False}, [None, "absent"]),
        ],
    )
    def test_conditions_compare_as_json_does(
        self, shared_server: Any, condition: dict[str, Any], expected: list[Any]
    ) -> None:
        document = {
            "select": {"v": "v", "label": "label"},
            "where": [{"field": "v", **condition}],
            "group_by": ["label"],
            "aggregates": [{"op": "count"}],
            "window": {"kind": "none"},
        }
        values: list[Any] = [1, 1.0, True, "1", None, "b", 2.5]
        events: list[dict[str, Any]] = [{"v": v, "label": f"{v!r}"} for v in values]
        events.append({"label": "'absent'"})
        with shared_server.client() as client:
            put(client, "where", document, "?replace=true")
            answer = send(client, "where", events)
            found = {row["group"]["label"] for row in rows(client, "where")}

        assert found == {f"{v!r}" for v in expected}
        assert answer["accepted"] == len(expected)
        assert answer["filtered"] == 8 - len(expected)

    def test_without_windows_there_is_one_row_per_group_with_null_bounds(
        self, client: httpx2.Client
    ) -> None:
        document = {
            "select": {"k": "k", "n": "n"},
            "group_by": ["k"],
            "aggregates": [{"op": "count"}, {"op": "sum", "field": "n"},
                           {"op": "count", "field": "n"}],
            "window": {"kind": "none"},
        }  # fmt: skip
        put(client, "all", document)
        events = [{"k": 5, "n": 1}, {"k": 5.0, "n": None}, {"k": "5", "n": 2}, {"k": True, "n": 3},
                  {"k": None, "n": 4}, {"k": 5, "n": 10}]  # fmt: skip
        for event in events:
            send(client, "all", event)

        found = {row["group"]["k"]: row["values"] for row in rows(client, "all")}
        assert found[5] == {"count": 3, "sum_n": 11, "count_n": 2}
        assert found["5"]["sum_n"] == 2
        assert found["true"]["sum_n"] == 3
        assert found[None]["sum_n"] == 4
        assert all(row["window_start"] is row["window_end"] is None for row in rows(client, "all"))
        assert len(rows(client, "all", group="k:5")) == 2
        bad = client.post("/pipelines/all/events", json=[{"n": 1}, {"k": 1, "n": "1"}, {"k": 1}])
        assert bad.status_code == 422
        assert bad.json()["rejected"] == 3

    def test_late_events_revise_then_are_dead_letters_and_the_counts_add_up(
        self, fresh: httpx2.Client
    ) -> None:
        put(fresh, "orders", spec())
        for number, second in enumerate([1, 15, 3, 30, 4, 12], 1):
            send(fresh, "orders", order(number, T0 + second))

        first, second, third = rows(fresh, "orders")
        assert (first["values"]["count"], first["revision"], first["final"]) == (2, 2, True)
        assert (second["values"]["count"], second["revision"], second["final"]) == (2, 2, False)
        assert (third["revision"], third["final"]) == (1, False)
        (letter,) = fresh.get("/dead-letters").json()["items"]
        assert (letter["code"], json.loads(letter["text"])["order"]["amount"]) == ("late", 5)
        stats = fresh.get("/stats").json()
        assert (stats["received"], stats["aggregated"], stats["late"], stats["revised"]) == (
            6,
            5,
            1,
            2,
        )
        assert reconciled(stats)

    def test_each_source_has_its_own_watermark(self, client: httpx2.Client) -> None:
        document = {
            "select": {"source": "from"}, "event_time": "at", "group_by": ["source"],
            "aggregates": [{"op": "count"}], "window": {"kind": "tumbling", "size_seconds": 10},
        }  # fmt: skip
        put(client, "sources", document)
        send(client, "sources", [{"from": "a", "at": T0 + 500}, {"from": "b", "at": T0}])

        assert client.get("/stats").json()["late"] == 0
        finals = {row["group"]["source"]: row["final"] for row in rows(client, "sources")}
        assert finals == {"a": False, "b": False}

    def test_a_quiet_stream_closes_its_last_window(self, fresh: httpx2.Client) -> None:
        for kind, size in (
            ("tumbling", {"size_seconds": 10}),
            ("sliding", {"size_seconds": 20, "slide_seconds": 10}),
            ("session", {"gap_seconds": 3}),
        ):
            window = {"kind": kind, **size, "idle_timeout_seconds": 0.2}
            put(fresh, kind, spec(window=window))
            fresh.post(f"/pipelines/{kind}/events", json=order(1, id=kind))
        deadline = time.monotonic() + 10
        while not all(row["final"] for row in fresh.get("/aggregates").json()["items"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        closed = fresh.get("/queue/aggregates").json()["items"]
        assert len(closed) == 4
        assert {item["value"]["pipeline"] for item in closed} == {"tumbling", "sliding", "session"}

    def test_an_event_from_the_future_is_a_dead_letter_and_closes_nothing(
        self, make_server: Callable[[], Any]
    ) -> None:
        server = make_server().start(MAX_FUTURE_SECONDS="60")
        now = time.time()
        with server.client() as client:
            put(client, "orders", spec())
            send(client, "orders", order(1, now))
            refused = client.post("/pipelines/orders/events", json=order(2, now + 90))
            mixed = send(client, "orders", [order(3, now + 90), order(4, now + 5)])
            assert refused.status_code == 422
            assert "MAX_FUTURE_SECONDS" in refused.json()["detail"]
            assert mixed["errors"][0]["code"] == "future"
            assert (mixed["accepted"], mixed["rejected"]) == (1, 1)
            late = {"data": {"category": "a", "value": 1, "quantity": 1, "ts": now + 3600}}
            assert client.post("/webhook?wait=applied", json=late).status_code == 422
            send(client, "orders", order(5, now + 31))
            letters = client.get("/dead-letters?code=future").json()["items"]
            assert len(letters) == 3
            assert client.get("/stats").json()["late"] == 0

    def test_events_slide_by_ten_seconds_in_windows_of_a_minute(
        self, client: httpx2.Client
    ) -> None:
        event = {"event_id": "1", "source": "s", "event_type": "t", "data": {"x": 2},
                 "timestamp": "2026-01-15T10:00:05Z"}  # fmt: skip
        client.post("/webhook/ingest?wait=applied", json=event)

        found = rows(client, "events")

        assert [row["window_start"][11:19] for row in found] == [
            "09:59:10", "09:59:20", "09:59:30", "09:59:40", "09:59:50", "10:00:00",
        ]  # fmt: skip
        assert found[0]["window_end"][11:19] == "10:00:10"
        assert all(row["values"]["sum_x"] == 2 for row in found)

    def test_beyond_max_keys_groups_are_counted_together(
        self, make_server: Callable[[], Any]
    ) -> None:
        server = make_server().start(MAX_KEYS="10")
        with server.client() as client:
            put(client, "orders", spec(window={"kind": "none"}))
            events = [{**order(n), "shop": {"name": f"s{n}"}} for n in range(1, 31)]
            send(client, "orders", events)
            found = {row["group"]["shop"]: row["values"]["count"] for row in rows(client, "orders")}
            assert len(found) == 11
            assert found["(other)"] == 20
            assert reconciled(client.get("/stats").json())


class TestBodies:
    @pytest.fixture
    def client(self, fresh: httpx2.Client) -> httpx2.Client:
        return fresh

    def test_concatenated_pretty_and_under_a_path(self, client: httpx2.Client) -> None:
        put(client, "orders", spec())
        kind = {"content-type": "application/json"}
        pretty = "\n".join(json.dumps(order(n), indent=2) for n in range(3))
        under = json.dumps({"type": "x", "features": [order(n) for n in range(3, 8)], "n": 1})

        one = client.post("/pipelines/orders/events?wait=applied", content=pretty, headers=kind)
        two = client.post(
            "/pipelines/orders/events?wait=applied&records=features.item", content=under,
            headers=kind,
        )  # fmt: skip
        wrong = client.post(
            "/pipelines/orders/events?records=nothing.item", content=under, headers=kind
        )
        lines = client.post("/webhook?records=a.item", content="{}",
                            headers={"content-type": "text/plain"})  # fmt: skip

        assert (one.json()["accepted"], two.json()["accepted"]) == (3, 5)
        assert (wrong.status_code, lines.status_code) == (422, 422)
        (row,) = rows(client, "orders")
        assert row["values"]["count"] == 8

    def test_a_large_upload_becomes_visible_all_at_once_or_not_at_all(
        self, client: httpx2.Client
    ) -> None:
        put(client, "orders", spec(window={"kind": "none"}))
        events = [order(n) for n in range(20_000)]
        body = json.dumps(events).encode()

        broken = client.post("/pipelines/orders/events?wait=applied", content=body[:-1],
                             headers={"content-type": "application/json"})  # fmt: skip
        assert broken.status_code == 400
        assert rows(client, "orders") == []
        assert client.get("/stats").json()["received"] == 0
        assert client.post(
            "/pipelines/orders/events", content=body, headers={"content-type": "application/json"}
        ).json()["accepted"] == 20_000  # fmt: skip
        counts = set()
        while 20_000 not in counts:
            counts |= {row["values"]["count"] for row in rows(client, "orders")}
        assert counts == {20_000}

    def test_a_preview_aggregates_and_keeps_nothing(self, client: httpx2.Client) -> None:
        body = "\n".join(json.dumps(order(n)) for n in (1, 2, 3)) + "\nnonsense\n"

        answer = client.post(
            "/preview?group_by=shop.name&sum=order.amount&count=true", content=body,
            headers={"content-type": "application/x-ndjson"},
        ).json()  # fmt: skip

        assert answer["items"] == [{"group": "books", "count": 3, "sum": 6}]
        assert (answer["events"], answer["rejected"]) == (3, 1)
        assert answer["errors"][0]["line"] == 4
        stats = client.get("/stats").json()
        assert (stats["received"], stats["queue"]["end"]) == (0, 0)
        whole = client.post("/preview", json=[{"a": 1}, {"a": 2}]).json()
        assert whole["items"] == [{"group": None, "count": 2, "sum": None}]
        for query, body, status in (
            ("?group_by=", "{}", 422), ("?sum=a", '{"a":"x"}', 422), ("?sum=a", "{", 400),
            ("?group_by=a", "", 400),
        ):  # fmt: skip
            refused = client.post(f"/preview{query}", content=body,
                                  headers={"content-type": "application/json"})  # fmt: skip
            assert refused.status_code == status, refused.text

    def test_exports_are_streamed_whole(self, client: httpx2.Client) -> None:
        put(client, "orders", spec())
        send(client, "orders", [order(n, T0 + 10 * n) for n in range(2500)])

        ndjson = client.get("/aggregates/export?pipeline=orders").text.splitlines()
        text = client.get("/aggregates/export?pipeline=orders&format=csv").text
        table = list(csv.DictReader(io.StringIO(text)))

        assert len(ndjson) == len(table) == 2500
        assert [json.loads(line)["values"]["sum_amount"] for line in ndjson] == list(range(2500))
        assert [int(row["sum_amount"]) for row in table] == list(range(2500))
        assert table[0]["shop"] == "books"
        every = list(csv.DictReader(io.StringIO(client.get("/aggregates/export?format=csv").text)))
        assert json.loads(every[0]["group"]) == {"shop": "books"}


class TestDeadLetters:
    @pytest.fixture
    def client(self, fresh: httpx2.Client) -> httpx2.Client:
        return fresh

    def test_after_a_fix_they_come_to_life_once(self, client: httpx2.Client) -> None:
        put(client, "orders", spec())
        wrong = [order(n, state=5, amount="x") for n in range(5)]
        send(client, "orders", [order(10), *wrong, order(11)])
        kept = client.get("/dead-letters").json()["items"]
        assert len(kept) == 5
        first = client.post("/dead-letters/replay").json()
        assert first == {"replayed": 0, "duplicates": 0, "failed": 5, "skipped": 0}
        aggregates = [{"op": "count"}]
        put(client, "orders", spec(aggregates=aggregates, where=[]), "?replace=true")
        before = client.get("/stats").json()["pipelines"]["orders"]

        answers = [client.post("/dead-letters/replay?pipeline=orders").json() for _ in range(3)]

        assert [answer["replayed"] for answer in answers] == [5, 0, 0]
        assert client.get("/dead-letters").json()["items"] == []
        (row,) = rows(client, "orders")
        assert row["values"]["count"] == 5
        after = client.get("/stats").json()["pipelines"]["orders"]
        assert after["aggregated"] == before["aggregated"] + 5
        again = send(client, "orders", order(0))
        assert again["duplicates"] == 1

    def test_what_turns_out_to_be_known_is_a_duplicate(self, client: httpx2.Client) -> None:
        put(client, "orders", spec())
        client.post("/pipelines/orders/events?wait=applied", json=order(1, amount="x"))
        send(client, "orders", order(1))
        put(client, "orders", spec(aggregates=[{"op": "count"}]), "?replace=true")

        answer = client.post("/dead-letters/replay").json()

        assert answer == {"replayed": 0, "duplicates": 1, "failed": 0, "skipped": 0}
        assert client.get("/dead-letters").json()["items"] == []


class TestReplay:
    @pytest.fixture
    def client(self, fresh: httpx2.Client) -> httpx2.Client:
        return fresh

    def test_a_replay_gives_the_same_rows_and_replaced_pipelines_get_the_old_events(
        self, client: httpx2.Client
    ) -> None:
        window = {"kind": "session", "gap_seconds": 4, "allowed_lateness_seconds": 5}
        put(client, "orders", spec(window=window))
        send(client, "orders", [order(n, T0 + n * 1.5 - (n % 7) * 3) for n in range(300)])
        for n in range(300, 330):
            send(client, "orders", order(n, T0 + n * 1.5))
        before = rows(client, "orders")
        assert client.get("/pipelines/orders/replay").json()["state"] == "none"

        done = client.post("/pipelines/orders/replay?from=0&wait=done").json()

        assert done["state"] == "done"
        assert rows(client, "orders") == before
        put(client, "orders", spec(window={"kind": "none"}, event_id=None), "?replace=true")
        assert rows(client, "orders") == []
        done = client.post("/pipelines/orders/replay?from=0&wait=done").json()
        assert done["events"] == 330
        (row,) = rows(client, "orders")
        assert row["values"]["count"] == 330
        send(client, "orders", order(1000))
        (row,) = rows(client, "orders")
        assert row["values"]["count"] == 331
        assert client.post("/pipelines/nobody/replay").status_code == 404
        assert client.post("/pipelines/orders/replay?from=99999999").status_code == 409

    def test_reads_see_the_old_or_the_new_and_live_events_go_on(
        self, client: httpx2.Client
    ) -> None:
        put(client, "orders", spec(window={"kind": "none"}))
        total = 60_000
        for start in range(0, total, 20_000):
            events = [order(n, amount=1) for n in range(start, start + 20_000)]
            send(client, "orders", events)
        client.post("/pipelines/orders/replay?from=0")
        seen, added = set(), 0
        while client.get("/pipelines/orders/replay").json()["state"] == "running":
            send(client, "orders", order(total + added, amount=1))
            added += 1
            (row,) = rows(client, "orders")
            seen.add(row["values"]["count"] - total - added)
        (row,) = rows(client, "orders")

        assert seen <= {0}
        assert row["values"]["count"] == row["values"]["sum_amount"] == total + added


class TestCleanup:
    @pytest.fixture
    def client(self, fresh: httpx2.Client) -> httpx2.Client:
        return fresh

    def test_what_is_old_goes_and_a_dry_run_only_tells(self, client: httpx2.Client) -> None:
        now = time.time()
        put(client, "orders", spec(window={"kind": "tumbling", "size_seconds": 10}))
        for n, days in enumerate((100, 50, 20, 0.1)):
            send(client, "orders", order(n, now - days * 86_400))

        dry = client.delete("/data/cleanup?days_old=30&dry_run=true").json()
        assert dry["deleted"] == {"aggregates": 2, "dead_letters": 0, "segments": 0}
        assert len(rows(client, "orders")) == 4
        done = client.delete("/data/cleanup").json()
        assert done["deleted"]["aggregates"] == 2
        assert len(rows(client, "orders")) == 2
        for query in ("days_old=0", "days_old=0.5", "days_old=-1", "days_old=nan", "days_old=x"):
            assert client.delete(f"/data/cleanup?{query}").status_code == 422


class TestQueue:
    @pytest.fixture
    def client(self, fresh: httpx2.Client) -> httpx2.Client:
        return fresh

    def test_consumers_over_http(self, client: httpx2.Client) -> None:
        put(client, "orders", spec(window={"kind": "tumbling", "size_seconds": 10}))
        for n in range(4):
            send(client, "orders", order(n, T0 + 10 * n))
        first = client.get("/queue/aggregates?consumer=c&limit=2").json()
        assert [item["value"]["values"]["sum_amount"] for item in first["items"]] == [0, 1]
        assert client.get("/queue/aggregates?consumer=c&limit=2").json() == first

        done = client.post("/queue/aggregates/consumers/c", json={"offset": first["next"]})

        assert done.status_code == 200
        (third,) = client.get("/queue/aggregates?consumer=c").json()["items"]
        assert third["value"]["values"]["sum_amount"] == 2
        topics = {each["topic"]: each for each in client.get("/queue").json()["topics"]}
        assert topics["aggregates"]["consumers"] == [{"consumer": "c", "offset": 3, "behind": 1}]
        ingested = client.get("/queue/ingest").json()["items"]
        assert [item["value"]["event"]["order"]["amount"] for item in ingested] == [0, 1, 2, 3]

    def test_a_wait_ends_with_the_first_message(self, client: httpx2.Client, server: Any) -> None:
        import threading

        put(client, "orders", spec(window={"kind": "tumbling", "size_seconds": 10}))
        found: list[Any] = []
        waiting = threading.Thread(
            target=lambda: found.append(server.get("/queue/aggregates", consumer="c", wait=20))
        )
        started = time.monotonic()
        waiting.start()
        send(client, "orders", [order(1, T0), order(2, T0 + 20)])
        waiting.join(15)

        assert time.monotonic() - started < 10
        assert len(found[0]["items"]) == 1
        assert client.get("/queue/aggregates?offset=99&wait=0.1").json()["items"] == []

    @pytest.mark.parametrize(
        ("method", "path", "body", "status"),
        [
            ("GET", "/queue/nothing", None, 404),
            ("GET", "/queue/aggregates?limit=0", None, 422),
            ("GET", "/queue/aggregates?wait=31", None, 422),
            ("GET", "/queue/aggregates?consumer=a/b", None, 422),
            ("GET", "/queue/aggregates?offset=-1", None, 422),
            ("POST", "/queue/aggregates/consumers/c", {"offset": 10**6}, 422),
            ("POST", "/queue/aggregates/consumers/c", {"offset": -1}, 422),
            ("POST", "/queue/aggregates/consumers/c", {"offset": "1"}, 422),
            ("POST", "/queue/aggregates/consumers/a.b", {"offset": 0}, 422),
            ("POST", "/queue/nothing/consumers/c", {"offset": 0}, 404),
        ],
    )
    def test_what_there_is_not_is_4xx(
        self, shared_server: Any, method: str, path: str, body: Any, status: int
    ) -> None:
        with shared_server.client() as client:
            answer = client.request(method, path, json=body)

        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"


SECRET = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes....").decode()
OLD_SECRET = "whsec_" + base64.b64encode(b"the secret before that one......").decode()
EVENT = {"data": {"category": "a", "value": 1, "quantity": 1, "ts": T0}}


def signed(body: bytes, secret: str = SECRET, *, at: float = 0, name: str = "msg_1") -> Any:
    import datetime as dt

    moment = dt.datetime.fromtimestamp(time.time() + at, dt.UTC)
    return {
        "content-type": "application/json",
        "webhook-id": name,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": Webhook(secret).sign(name, moment, body.decode()),
    }


@pytest.fixture(scope="module")
def signing(make_shared_server: Callable[..., Any]) -> Any:
    server = make_shared_server(WEBHOOK_SECRET=f"{SECRET} {OLD_SECRET}")
    with server.client() as client:
        yield client


class TestSignatures:
    def test_what_the_reference_signs_is_taken_with_either_secret(self, signing: Any) -> None:
        body = json.dumps(EVENT).encode()
        for number, secret in enumerate((SECRET, OLD_SECRET)):
            headers = signed(body, secret, name=f"ok-{number}")
            assert signing.post("/webhook", content=body, headers=headers).status_code == 202
        both = signed(body, name="ok-3")
        both["webhook-signature"] = f"v1,bad v2,x {both['webhook-signature']}"
        assert signing.post("/webhook", content=body, headers=both).status_code == 202

    def test_everything_else_is_401_and_leaves_nothing(self, signing: Any) -> None:
        body = json.dumps(EVENT).encode()
        before = signing.get("/stats").json()["received"]
        other = "whsec_" + base64.b64encode(b"not the secret").decode()
        requests = [
            (body, {"content-type": "application/json"}),
            (body, signed(body, other)),
            (body, signed(body, at=-310)),
            (body, signed(body, at=310)),
            (body + b" ", signed(body)),
            (b"{", signed(body)),
            (body, {**signed(body), "webhook-id": "msg_2"}),
            (body, {**signed(body), "webhook-timestamp": "soon"}),
            (body, {**signed(body), "webhook-signature": "v1,"}),
            (body, {**signed(body), "webhook-signature": "v1,\u00fc".encode("latin-1")}),
            (body * 5000, signed(body)),
        ]
        for path in ("/webhook", "/webhook/ingest", "/webhook/batch", "/pipelines/webhook/events"):
            for content, headers in requests:
                answer = signing.post(path, content=content, headers=headers)
                assert answer.status_code == 401, (path, headers)
                assert answer.headers["content-type"] == "application/problem+json"
        assert signing.get("/stats").json()["received"] == before

    def test_the_webhook_id_is_an_idempotency_key(self, signing: Any) -> None:
        body = json.dumps(EVENT).encode()
        one = signing.post("/webhook", content=body, headers=signed(body, name="same"))
        two = signing.post("/webhook", content=body, headers=signed(body, name="same", at=-5))
        other = body.replace(b"1", b"2", 1)
        three = signing.post("/webhook", content=other, headers=signed(other, name="same"))

        assert one.json() == two.json()
        assert two.headers["idempotent-replayed"] == "true"
        assert three.status_code == 422

    def test_a_compressed_upload_is_signed_as_it_is_sent(self, signing: Any) -> None:
        import gzip

        body = gzip.compress(b"\n".join([json.dumps(EVENT).encode()] * 3000))
        key = base64.b64decode(SECRET.removeprefix("whsec_"))
        stamp = str(int(time.time()))
        mac = hmac.new(key, f"zip.{stamp}.".encode() + body, hashlib.sha256).digest()
        headers = {
            "content-type": "application/x-ndjson", "content-encoding": "gzip", "webhook-id": "zip",
            "webhook-timestamp": stamp,
            "webhook-signature": "v1," + base64.b64encode(mac).decode(),
        }  # fmt: skip
        assert signing.post("/webhook", content=body, headers=headers).json()["accepted"] == 3000
