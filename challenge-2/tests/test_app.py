"""The HTTP face: what it answers, what it refuses, what it documents."""

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient
from stopwatch import Stopwatch

pytestmark = pytest.mark.webhook


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[TestClient]:
    import app

    monkeypatch.setattr(app.settings, "embedded_dir", tmp_path)
    monkeypatch.setenv("EMBEDDED_DIR", str(tmp_path))
    with TestClient(app.app, "http://127.0.0.1", client=("127.0.0.1", 1)) as found:
        yield found


def drill(client: Any, *resources: Any, **more: Any) -> Any:
    answer = client.post("/drills", json={"resources": list(resources), **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


class TestResources:
    def test_all_are_listed_and_shown(self, client: TestClient) -> None:
        found = client.get("/resources").json()["items"]
        assert [item["name"] for item in found] == ["database", "cache", "queue", "api"]
        assert {item["state"] for item in found} == {"ready"}
        one = client.get("/resources/database").json()
        assert one["address"].startswith("sqlite:///")
        assert one["acquire_s"] > 0
        assert one["pool"]["max"] == 1

    def test_a_probe_asks_now(self, client: TestClient) -> None:
        for name in ("database", "cache", "queue", "api"):
            answer = client.post(f"/resources/{name}/probe").json()
            assert answer["status"] == "healthy"
            assert answer["error"] is None

    def test_an_unknown_name_is_404(self, client: TestClient) -> None:
        assert client.get("/resources/nothing").status_code == 404
        assert client.post("/resources/nothing/probe").status_code == 404

    def test_health_and_readiness_ask_every_resource(self, client: TestClient) -> None:
        assert client.get("/readyz").json()["components"] == dict.fromkeys(
            ("database", "cache", "queue", "api"), True
        )
        assert client.get("/health").json()["status"] == "healthy"


class TestDrills:
    def test_the_catalogue_has_twenty_and_each_can_be_posted(self, client: TestClient) -> None:
        found = client.get("/drills/catalog").json()
        assert len(found) == 20
        expected = {
            "refused": "AcquireError", "two-refused": "AcquireErrorGroup",
            "never-answers": "AcquireTimeout", "body-fails": "DrillError", "lost": "ResourceLost",
            "release-fails": "ReleaseError", "all-releases-fail": "ReleaseErrorGroup",
            "release-hangs": "ReleaseTimeout", "stubborn": "ReleaseTimeout",
            "cancelled-in-use": "CancelledError", "cancelled-while-starting": "CancelledError",
        }  # fmt: skip
        for item in found:
            answer = drill(client, *item["body"]["resources"], **{
                key: value for key, value in item["body"].items() if key != "resources"
            })  # fmt: skip
            assert answer["leaked"] == 0, item["name"]
            if item["name"] in expected:
                assert answer["surfaced"]["type"] == expected[item["name"]], item["name"]
        lowest = drill(client, *found[-1]["body"]["resources"], cancel_after_ms=130)
        assert any("database" in note for note in lowest["surfaced"]["notes"])

    def test_order_and_timings_are_told(self, client: TestClient) -> None:
        answer = drill(
            client,
            {"name": "user", "needs": ["base"], "acquire_ms": 10, "release_ms": 10},
            {"name": "base", "acquire_ms": 10, "release_ms": 10},
        )
        events = [(event["event"], event["resource"]) for event in answer["events"]]
        assert events == [
            ("acquiring", "base"), ("acquired", "base"), ("acquiring", "user"),
            ("acquired", "user"), ("released", "user"), ("released", "base"),
        ]  # fmt: skip
        moments = [event["at_s"] for event in answer["events"]]
        assert moments == sorted(moments)
        report = answer["report"]
        assert report["critical_path"] == ["base", "user"]
        assert report["resources"]["user"]["wait_s"] >= 0.009
        assert answer["surfaced"] is None

    def test_a_group_is_a_tree(self, client: TestClient) -> None:
        answer = drill(client, *({"name": n, "fault": "acquire_error"} for n in "ab"))
        surfaced = answer["surfaced"]
        assert surfaced["type"] == "AcquireErrorGroup"
        assert [e["type"] for e in surfaced["exceptions"]] == ["AcquireError"] * 2
        assert "DrillError" in surfaced["exceptions"][0]["cause"]

    @pytest.mark.parametrize(
        "body",
        [
            {"resources": [{"name": "a", "needs": ["b"]}]},
            {"resources": [{"name": "a", "needs": ["a"]}]},
            {"resources": [{"name": "a", "needs": ["b"]}, {"name": "b", "needs": ["a"]}]},
            {"resources": [{"name": "a"}, {"name": "a"}]},
            {"resources": [{"name": f"r{i}"} for i in range(51)]},
            {"resources": [{"name": "a", "fault": "other"}]},
            {"resources": [{"name": "a", "acquire_ms": -1}]},
            {"resources": [{"name": "a", "acquire_ms": 1e9}]},
            {"resources": [{"name": ""}]},
            {"resources": [{"name": "a", "extra": 1}]},
            {"resources": "a"},
            {},
            {"resources": [{"name": "a"}], "cancel_after_ms": "soon"},
        ],
    )
    def test_what_does_not_add_up_is_422(self, client: TestClient, body: Any) -> None:
        answer = client.post("/drills", json=body)
        assert answer.status_code == 422
        assert answer.headers["content-type"] == "application/problem+json"

    def test_the_worst_graphs_end_within_ten_seconds(self, client: TestClient) -> None:
        chain = [
            {"name": f"r{i}", "needs": [f"r{i - 1}"] if i else [], "fault": "stubborn",
             "release_ms": 2000}
            for i in range(50)
        ]  # fmt: skip
        began = Stopwatch()
        answer = drill(client, *chain)
        assert began.seconds() < 10
        assert answer["leaked"] == 0
        assert drill(client)["events"] == []

    @pytest.mark.parametrize(
        ("path", "body", "seats"),
        [
            ("/runs", {"resources": ["queue"], "steps": [
                {"resource": "queue", "op": "consume", "queue": "nothing-comes"}]}, 4),
            ("/query", {"sql": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
                               "SELECT count(*) FROM n"}, 8),
        ],
    )  # fmt: skip
    def test_what_takes_its_time_is_bounded_in_number(
        self, shared_server: Any, path: str, body: Any, seats: int
    ) -> None:
        with shared_server.client() as client, ThreadPoolExecutor(seats + 6) as pool:
            asked = [pool.submit(client.post, path, json=body) for _ in range(seats + 6)]
            statuses = [each.result().status_code for each in asked]
        assert statuses.count(429) >= 1
        assert len(statuses) - statuses.count(429) >= seats

    def test_a_fifth_at_once_is_429(self, shared_server: Any) -> None:
        body = {"resources": [{"name": "a", "acquire_ms": 800}]}
        with shared_server.client() as client, ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: client.post("/drills", json=body), range(6)))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [200] * 4 + [429] * 2
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["content-type"] == "application/problem+json"


class TestUse:
    def test_a_run_takes_its_steps_and_reports(self, client: TestClient) -> None:
        import app

        answer = client.post("/runs", json=app.RUN_EXAMPLE).json()
        results = [step["result"] for step in answer["results"]]
        assert results[0] == [{"answer": 1}]
        assert results[2] == "hello"
        assert results[4] == "hello"
        assert results[5]["status"] == 200
        assert answer["surfaced"] is None
        states = {timing["state"] for timing in answer["report"]["resources"].values()}
        assert states == {"released"}
        log = client.get("/connections/log", params={"run_id": answer["run_id"]}).json()["items"]
        assert len(log) == 12

    def test_a_failing_step_surfaces_and_releases(self, client: TestClient) -> None:
        steps = [
            {"resource": "database", "op": "fetch", "sql": "SELECT 1 AS one"},
            {"resource": "database", "op": "fetch", "sql": "DROP TABLE x"},
            {"resource": "database", "op": "fetch", "sql": "SELECT 2 AS two"},
        ]
        answer = client.post("/runs", json={"resources": ["database"], "steps": steps}).json()
        assert len(answer["results"]) == 1
        assert answer["surfaced"]["type"] == "OperationError"
        assert answer["report"]["resources"]["database"]["state"] == "released"

    @pytest.mark.parametrize(
        "body",
        [
            {"resources": []},
            {"resources": ["database", "database"]},
            {"resources": ["other"]},
            {"resources": ["cache"], "steps": [{"resource": "api", "op": "get", "path": "/"}]},
            {"resources": ["api"], "steps": [{"resource": "api", "op": "get"}]},
            {"resources": ["api"], "steps": [{"resource": "api", "op": "fetch", "path": "/"}]},
            {"resources": ["api"], "steps": [{"resource": "api", "op": "get", "path": "//x/"}]},
            {"resources": ["api"], "steps": [{"resource": "api", "op": "get", "path": "http://x"}]},
            {"resources": ["queue"],
             "steps": [{"resource": "queue", "op": "consume", "queue": "no spaces"}]},
        ],
    )  # fmt: skip
    def test_a_run_that_does_not_add_up_is_422(self, client: TestClient, body: Any) -> None:
        assert client.post("/runs", json=body).status_code == 422

    def test_a_query_reads(self, client: TestClient) -> None:
        answer = client.post(
            "/query", json={"sql": "SELECT 1 AS a, 'x' AS b, NULL AS c, x'00ff' AS d, 9e999 AS e"}
        ).json()
        assert answer["columns"] == ["a", "b", "c", "d", "e"]
        assert answer["rows"] == [[1, "x", None, "00ff", None]]
        many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
        answer = client.post("/query", json={"sql": many + " LIMIT 5000"}).json()
        assert (len(answer["rows"]), answer["truncated"]) == (1000, True)

    def test_columns_are_told_although_no_row_has_them_or_two_have_one_name(
        self, client: TestClient
    ) -> None:
        answer = client.post("/query", json={"sql": "SELECT 1 AS a WHERE 0"}).json()
        assert (answer["columns"], answer["rows"]) == (["a"], [])
        answer = client.post("/query", json={"sql": "SELECT 1 AS a, 2 AS a"}).json()
        assert (answer["columns"], answer["rows"]) == (["a", "a"], [[1, 2]])

    def test_an_answer_of_any_size_is_cut_short(self, client: TestClient) -> None:
        sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 900) "
        answer = client.post("/query", json={"sql": sql + "SELECT hex(zeroblob(400000)) FROM n"})
        assert answer.status_code == 200
        assert answer.json()["truncated"] is True
        assert len(answer.content) < 5 * 1024 * 1024
        steps = [
            {"resource": "database", "op": "fetch", "sql": sql + "SELECT zeroblob(9999) FROM n"}
        ]
        run = client.post("/runs", json={"resources": ["database"], "steps": steps * 20})
        assert len(run.content) < 20 * 70_000
        wide = ", ".join(["randomblob(900000)"] * 300)
        assert client.post("/query", json={"sql": f"SELECT {wide}"}).status_code == 422

    @pytest.mark.parametrize(
        "sql",
        [
            "DELETE FROM sqlite_master", "CREATE TABLE t (a)", "PRAGMA user_version = 7", "", " ",
            "SELECT 1; SELECT 2", "ATTACH 'x' AS y", "SELEC", "BEGIN", "VACUUM INTO 'x'", "--",
            "INSERT INTO t VALUES (1) RETURNING a", "SELECT load_extension('x')", "SELECT '\x00'",
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n",
            "SELECT zeroblob(1000000000)",
        ],
    )  # fmt: skip
    def test_anything_but_one_reading_statement_is_refused(
        self, client: TestClient, sql: str
    ) -> None:
        answer = client.post("/query", json={"sql": sql})
        assert answer.status_code == 422, answer.text
        assert len(answer.content) < 1000


class TestAnalytics:
    def test_the_log_is_filtered_paged_and_streamed(self, client: TestClient) -> None:
        run_id = drill(client, {"name": "a", "fault": "release_error"}, {"name": "b"})["run_id"]
        everything = client.get("/connections/log").json()["items"]
        assert [record["seq"] for record in everything] == sorted(r["seq"] for r in everything)
        mine = client.get("/connections/log", params={"run_id": run_id}).json()["items"]
        assert sorted((r["event"], r["resource"]) for r in mine) == sorted(
            [("acquiring", "a"), ("acquiring", "b"), ("acquired", "a"), ("acquired", "b"),
             ("release_failed", "a"), ("released", "b")]
        )  # fmt: skip
        assert set(mine[0]) == {
            "seq", "ts", "run_id", "resource", "event", "duration_s", "error",
        }  # fmt: skip
        assert mine[0]["ts"].endswith("Z")
        one = client.get(
            "/connections/log", params={"resource": "a", "event": "release_failed"}
        ).json()["items"]
        assert "fails while it is released" in one[0]["error"]
        page = client.get("/connections/log", params={"limit": 2}).json()
        assert page["next"] == page["items"][-1]["seq"]
        following = client.get("/connections/log", params={"after": page["next"]}).json()
        assert following["items"][0]["seq"] == page["next"] + 1
        answer = client.get(
            "/connections/log",
            params={"run_id": run_id},
            headers={"accept": "application/x-ndjson"},
        )
        assert answer.headers["content-type"].startswith("application/x-ndjson")
        assert [json.loads(line) for line in answer.text.splitlines()] == mine
        assert client.get("/connections/log", params={"event": "other"}).status_code == 422

    def test_the_summary_counts_and_knows_the_time_saved(self, client: TestClient) -> None:
        before = client.get("/analytics/summary").json()
        parts = [{"name": f"r{i}", "acquire_ms": 50} for i in range(10)]
        drill(client, *parts)
        drill(client, {"name": "bad", "fault": "acquire_error"})
        after = client.get("/analytics/summary").json()
        assert after["runs"] == before["runs"] + 2
        assert after["events"]["acquired"] == before["events"]["acquired"] + 10
        assert after["start_saved_s"] - before["start_saved_s"] > 0.3
        assert after["acquire"]["p99_s"] >= after["acquire"]["p50_s"] >= 0.04
        assert after["top_errors"][0]["count"] == 1

    def test_a_timeline_has_bars_and_the_critical_path(self, client: TestClient) -> None:
        parts = [{"name": "a", "acquire_ms": 20}, {"name": "b", "needs": ["a"]}]
        run_id = drill(client, *parts)["run_id"]
        found = client.get(f"/analytics/timeline/{run_id}").json()
        assert found["critical_path"] == ["a", "b"]
        bars = {bar["resource"]: bar for bar in found["bars"]}
        assert bars["b"]["acquiring_s"] >= bars["a"]["ready_s"]
        assert bars["b"]["released_s"] <= bars["a"]["releasing_s"] + 0.001
        live = client.get("/analytics/timeline/app").json()
        assert live["manager"] == "app"
        assert live["bars"][0]["released_s"] is None
        assert client.get("/analytics/timeline/nothing").status_code == 404

    def test_the_slowest_come_first(self, client: TestClient) -> None:
        drill(client, {"name": "slow", "acquire_ms": 300}, {"name": "quick"})
        found = client.get("/analytics/slowest", params={"limit": 2}).json()["items"]
        assert found[0]["resource"] == "slow"
        assert found[0]["seconds"] >= found[1]["seconds"]
        assert client.get("/analytics/slowest?phase=hold").json()["items"]

    def test_metrics_can_be_parsed_and_agree_with_what_happened(self, client: TestClient) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        def figures() -> dict[tuple[str, str, str], float]:
            """By kind: with many names seen before, drills count under the resource `other`."""
            found: defaultdict[tuple[str, str, str], float] = defaultdict(float)
            for family in text_string_to_metric_families(client.get("/metrics").text):
                for sample in family.samples:
                    if "le" not in sample.labels:
                        kind, reason = (
                            sample.labels.get("kind", ""),
                            sample.labels.get("reason", ""),
                        )
                        found[sample.name, kind, reason] += sample.value
            return found

        before = figures()
        drill(client, {"name": "a"}, {"name": "b"})
        drill(client, {"name": "a", "fault": "acquire_error"})
        drill(client, {"name": "a", "fault": "lost"})
        drill(client, {"name": "a", "fault": "stubborn"})
        after = figures()

        def grown(name: str, reason: str = "") -> float:
            key = (name, "drill", reason)
            return after.get(key, 0) - before.get(key, 0)

        assert grown("resource_acquire_duration_seconds_count") == 4
        assert grown("resource_hold_duration_seconds_count") == 4
        assert grown("resource_acquire_failures_total", "error") == 1
        assert grown("resource_release_failures_total", "timeout") == 1
        assert grown("resource_lost_total") == 1
        assert grown("resource_abandoned_total") == 1
        assert after["resource_in_use", "database", ""] == 1
        assert after["resource_acquire_duration_seconds_sum", "database", ""] > 0
        assert any(name == "resource_pool" for name, _, _ in after)

    def test_names_from_outside_become_no_labels(self, client: TestClient) -> None:
        drill(client, {"name": "a-name-from-outside"})
        assert "a-name-from-outside" not in client.get("/metrics").text


MALFORMED: list[bytes] = [
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff", b"\xef\xbb\xbf{}", b"{}garbage", b'{"a":NaN}',
    b'{"sql":1}', b'{"sql":"\\ud800"}', b'{"resources":[{"name":"\\ud800"}]}', b'{"sql":null}',
    b'{"resources":[{"name":"a","acquire_ms":NaN}]}',
    b'{"resources":[{"name":"a","acquire_ms":1e999}]}',
    b"[" * 5000, b'{"resources":' * 2000, b'{"sql":"' + b"x" * 20_000 + b'"}', b"1" * 5000,
    b'{"resources":[{"name":"a","acquire_ms":true}]}', b'{"resources":[{"name":"a","needs":"a"}]}',
]  # fmt: skip


class TestRefusals:
    @pytest.mark.parametrize("path", ["/drills", "/runs", "/query"])
    @pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
    def test_malformed_bodies_are_4xx_of_one_shape(
        self, shared_server: Any, path: str, body: bytes
    ) -> None:
        with shared_server.client() as client:
            answer = client.post(path, content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, answer.text
        document = answer.json()
        assert document["status"] == answer.status_code
        assert document["request_id"]
        assert len(answer.content) < 4096
        assert "Traceback" not in answer.text

    def test_a_foreign_origin_and_another_machine_are_refused(self, client: TestClient) -> None:
        body: dict[str, Any] = {"resources": []}
        answer = client.post("/drills", json=body, headers={"origin": "http://evil.example"})
        assert answer.status_code == 403
        import app

        far = TestClient(app.app, "http://127.0.0.1", client=("10.0.0.1", 1))
        assert far.get("/resources").status_code == 403

    def test_a_body_that_is_too_large_is_413(self, client: TestClient) -> None:
        body = b'{"sql":"' + b"x" * 2_000_000 + b'"}'
        answer = client.post("/query", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 413


class TestDocumentation:
    def test_every_example_succeeds_as_shown(self, client: TestClient) -> None:
        document = client.get("/openapi.json").json()
        executed = 0
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                assert operation["tags"], path
                assert operation["summary"], path
                for url in _urls(path, operation):
                    for body in _bodies(operation):
                        answer = client.request(method, url, json=body)
                        assert 200 <= answer.status_code < 300, (url, answer.text)
                        executed += 1
        assert executed >= 20 + 14

    def test_the_drills_of_the_catalogue_are_the_examples_of_the_route(
        self, client: TestClient
    ) -> None:
        content = client.get("/openapi.json").json()["paths"]["/drills"]["post"]["requestBody"]
        examples = content["content"]["application/json"]["examples"]
        catalogue = client.get("/drills/catalog").json()
        assert list(examples) == [item["name"] for item in catalogue]
        for item in catalogue:
            from models import DrillRequest

            shown = DrillRequest.model_validate(examples[item["name"]]["value"])
            assert shown == DrillRequest.model_validate(item["body"])

    def test_every_operation_declares_its_errors(self, client: TestClient) -> None:
        for path, operations in client.get("/openapi.json").json()["paths"].items():
            for operation in operations.values():
                assert "200" in operation["responses"], path
                assert "default" in operation["responses"], path


def _urls(path: str, operation: Any) -> list[str]:
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path":
            (example,) = parameter["examples"].values()
            path = path.replace("{" + parameter["name"] + "}", example["value"])
    assert "{" not in path
    return [path]


def _bodies(operation: Any) -> list[Any]:
    if "requestBody" not in operation:
        return [None]
    content = operation["requestBody"]["content"]["application/json"]
    return [example["value"] for example in content["examples"].values()]


class TestLifecycle:
    def test_it_stops_at_once_and_starts_again_on_its_data(self, make_server: Any) -> None:
        server = make_server().start()
        with server.client() as client:
            run_id = drill(client, {"name": "a"})["run_id"]
        began = Stopwatch()
        assert server.stop() in (0, -15)  # uvicorn raises its signal again once all is done
        assert began.seconds() < 3
        assert "Traceback" not in server.log.read_text()
        server.start()
        with server.client() as client:
            assert client.get(f"/analytics/timeline/{run_id}").status_code == 200
            log = client.get("/connections/log", params={"run_id": run_id}).json()["items"]
        assert len(log) == 3

    def test_an_app_can_be_started_twice_in_one_process(self, client: TestClient) -> None:
        import app

        assert client.get("/resources").status_code == 200
        with TestClient(app.app, "http://127.0.0.1", client=("127.0.0.1", 1)) as again:
            assert again.get("/resources").status_code == 200

    @pytest.mark.kill
    def test_a_kill_leaves_a_log_that_can_be_read(self, make_server: Any) -> None:
        server = make_server().start()
        with server.client() as client:
            run_id = drill(client, {"name": "a"})["run_id"]
            client.get("/connections/log")  # which writes what was handed in
            server.process.kill()
            server.process.wait()
        server.start()
        with server.client() as client:
            assert len(client.get(f"/connections/log?run_id={run_id}").json()["items"]) == 3
            assert client.get("/readyz").status_code == 200

    def test_the_log_is_bounded(self, make_server: Any) -> None:
        server = make_server().start(JOURNAL_ROWS="100")
        parts = [{"name": f"r{i}"} for i in range(20)]
        with server.client() as client:
            for _ in range(10):
                drill(client, *parts)
            records = client.get("/connections/log").json()["items"]
            assert len(records) == 100
            assert client.get("/analytics/summary").json()["runs"] <= 26

    def test_a_fallback_is_degraded_and_ready(self, make_server: Any, needs: Any) -> None:
        needs.package("redis")
        server = make_server().start(
            REDIS_URL="redis://:secret-word@127.0.0.1:1/0", RESOURCE_FALLBACK="embedded"
        )
        with server.client() as client:
            assert client.get("/resources/cache").json()["degraded"] is True
            assert client.post("/resources/cache/probe").json()["status"] == "degraded"
            everything = [client.get(path).text for path in ("/resources", "/metrics", "/readyz")]
            everything.append(client.get("/connections/log").text)
        assert not re.search("secret-word", " ".join(everything) + server.log.read_text())


@pytest.mark.anyio
async def test_a_client_that_leaves_ends_its_drill(shared_server: Any) -> None:
    async with httpx2.AsyncClient(base_url=shared_server.url, timeout=0.1) as client:
        for _ in range(6):
            with pytest.raises(httpx2.TimeoutException):
                await client.post("/drills", json={"resources": [{"name": "a", "acquire_ms": 400}]})
            await asyncio.sleep(0.5)
        answer = await client.get("/resources", timeout=5)
        assert answer.status_code == 200
