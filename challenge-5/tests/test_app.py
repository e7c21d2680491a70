"""The HTTP surface: what a client is promised, and what it cannot do."""

import json
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.webhook
PRIMES = {"name": "count_primes", "args": {"start": 0, "stop": 100}}
LONG = {"name": "sleep", "args": {"seconds": 600}}


def ok(answer: Any, status: int = 200) -> Any:
    assert answer.status_code == status, (answer.status_code, answer.text)
    return answer.json()


def problem(answer: Any, status: int) -> Any:
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert {"type", "title", "status", "detail", "request_id"} <= found.keys()
    assert len(answer.content) < 4096
    assert "Traceback" not in answer.text
    return found


class TestSubmitting:
    def test_a_task_is_accepted_runs_and_its_result_is_there(self, server: Any) -> None:
        with server.client() as client:
            answer = client.post("/tasks", json={**PRIMES, "priority": "HIGH"})
            accepted = ok(answer, 202)
            assert accepted.keys() == {"id", "state"}
            assert answer.headers["location"] == f"/tasks/{accepted['id']}"
            found = ok(client.get(answer.headers["location"], params={"wait": 20}))
            assert (found["state"], found["priority"]) == ("completed", "HIGH")
            result = ok(client.get(f"/tasks/{accepted['id']}/result"))

        assert (result["state"], result["output"], result["error"]) == ("completed", 25, None)

    @pytest.mark.parametrize(
        ("body", "status", "pointer"),
        [
            ({"name": "os.system", "args": {"command": "true"}}, 404, None),
            ({"name": "__import__"}, 404, None),
            ({"args": {}}, 422, "/body/name"),
            ({**PRIMES, "args": {"start": 0, "stop": "100"}}, 422, "/body/args/stop"),
            ({**PRIMES, "args": {"start": 0}}, 422, "/body/args/stop"),
            ({**PRIMES, "args": {"start": 0, "stop": 9, "step": 1}}, 422, "/body/args/step"),
            ({**PRIMES, "args": [0, 100]}, 422, "/body/args"),
            ({**PRIMES, "priority": "URGENT"}, 422, "/body/priority"),
            ({**PRIMES, "timeout": 0}, 422, "/body/timeout"),
            ({**PRIMES, "delay": -1}, 422, "/body/delay"),
            ({**PRIMES, "code": "1"}, 422, "/body/code"),
            ({**PRIMES, "retry": {"max_attempts": 0}}, 422, "/body/retry/max_attempts"),
            ({**PRIMES, "dependencies": ["nobody"]}, 422, "/body/dependencies"),
            ({**PRIMES, "id": "../x"}, 422, "/body/id"),
            ([PRIMES], 422, "/body"),
        ],
    )
    def test_what_does_not_fit_is_refused_where_it_does_not(
        self, shared_server: Any, body: Any, status: int, pointer: str | None
    ) -> None:
        with shared_server.client() as client:
            before = ok(client.get("/statistics"))["total"]
            found = problem(client.post("/tasks", json=body), status)
            assert ok(client.get("/statistics"))["total"] == before
        if pointer is not None:
            assert [error["pointer"] for error in found["errors"]] == [pointer]

    @pytest.mark.parametrize(
        ("content", "media_type", "statuses"),
        [
            (b"\x80\x04\x95\x1a\x00", "application/octet-stream", (400, 415, 422)),
            (b"{", "application/json", (400,)),
            (b'{"name": NaN}', "application/json", (400, 422)),
            (b'{"name": "sleep", "args": {"seconds": NaN}}', "application/json", (400, 422)),
            (b'{"name": "sleep", "args": {"seconds": 1e999}}', "application/json", (400, 422)),
            (b'{"name": "\\ud800"}', "application/json", (400, 404, 422)),
            (b'{"name": "count_primes", "args": {"\\ud800": 1}}', "application/json", (400, 422)),
            (b'{"name": "sleep", "args": {"seconds": 1' + b"0" * 5000 + b"}}", "application/json",
             (400, 422)),
            (b"[" * 100_000, "application/json", (400, 422)),
            (json.dumps({"name": "x" * 500_000}).encode(), "application/json", (422,)),
            (b'{"name": "sleep", "args": {"seconds": 0}}', "text/plain", (415, 422)),
            (b"x" * 2_000_000, "application/json", (413,)),
            (b"", "application/json", (400, 422)),
        ],
    )  # fmt: skip
    def test_hostile_bodies_get_one_shape_and_never_a_failure(
        self, shared_server: Any, content: bytes, media_type: str, statuses: tuple[int, ...]
    ) -> None:
        with shared_server.client() as client:
            for path in ("/tasks", "/tasks/batch"):
                answer = client.post(path, content=content, headers={"content-type": media_type})
                assert answer.status_code in statuses, answer.text
                problem(answer, answer.status_code)

    def test_a_failed_task_is_no_failure_of_http(self, shared_server: Any) -> None:
        body = {"name": "aggregate_csv", "args": {"file": "no.csv", "group_by": "a", "value": "b"}}
        with shared_server.client() as client:
            accepted = ok(client.post("/tasks", json=body), 202)
            result = ok(client.get(f"/tasks/{accepted['id']}/result", params={"wait": 20}))

        assert (result["state"], result["output"]) == ("failed", None)
        assert result["error"]["type"] == "FileNotFoundError"

    def test_fifty_identical_requests_with_a_key_are_one_task(self, server: Any) -> None:
        headers = {"Idempotency-Key": "k-1"}

        def post(_: int) -> Any:
            with server.client() as client:
                return client.post("/tasks", json=PRIMES, headers=headers)

        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(post, range(50)))

        assert sorted(answer.status_code for answer in answers) == [200] * 49 + [202]
        assert len({answer.json()["id"] for answer in answers}) == 1
        with server.client() as client:
            assert ok(client.get("/statistics"))["total"] == 1
            other = {**PRIMES, "args": {"start": 1, "stop": 100}}
            problem(client.post("/tasks", json=other, headers=headers), 422)

    def test_a_full_queue_answers_429_with_a_wait_and_takes_more_later(
        self, make_server: Callable[[], Any]
    ) -> None:
        server = make_server().start(SCHEDULER_MAX_TASKS="3")
        with server.client() as client:
            ids = [ok(client.post("/tasks", json=LONG), 202)["id"] for _ in range(3)]
            full = client.post("/tasks", json=PRIMES)
            problem(full, 429)
            assert int(full.headers["retry-after"]) >= 1
            assert ok(client.post(f"/tasks/{ids[0]}/cancel"))["cancelled"] is True
            ok(client.post("/tasks", json=PRIMES), 202)


class TestBatches:
    def test_a_graph_with_local_references_in_any_order(self, server: Any) -> None:
        (server.data / "one.csv").write_text("a,b\nx,1\n")
        batch = [
            {"ref": "all", "name": "merge", "dependencies": ["sums", "more"]},
            {"ref": "files", "name": "list_files", "args": {"pattern": "*.csv"}},
            {"ref": "sums", "name": "checksum_files", "dependencies": ["files"]},
            {"ref": "more", "name": "checksum_files", "args": {"files": ["one.csv"]}},
        ]
        with server.client() as client:
            accepted = ok(client.post("/tasks/batch", json=batch), 202)
            assert [each["ref"] for each in accepted] == ["all", "files", "sums", "more"]
            result = ok(client.get(f"/tasks/{accepted[0]['id']}/result", params={"wait": 20}))
            graph = ok(client.get(f"/tasks/{accepted[1]['id']}/graph"))

        assert result["output"].keys() == {"one.csv"}
        ids = {each["ref"]: each["id"] for each in accepted}
        assert {node["id"] for node in graph["nodes"]} == {ids["files"], ids["sums"], ids["all"]}
        assert [ids["files"], ids["sums"]] in graph["edges"]

    def test_it_is_all_or_nothing_and_keyed(self, server: Any) -> None:
        a, b = {"ref": "a", **PRIMES}, {"ref": "b", **PRIMES, "dependencies": ["a"]}
        with server.client() as client:
            for batch, status in (
                ([a, {**b, "dependencies": ["nobody"]}], 422),
                ([{**a, "dependencies": ["b"]}, b], 422),
                ([{**a, "dependencies": ["a"]}], 422),
                ([a, a], 422),
                ([a, {**b, "name": "nothing"}], 404),
                ([], 422),
            ):
                problem(client.post("/tasks/batch", json=batch), status)
            assert ok(client.get("/statistics"))["total"] == 0
            headers = {"Idempotency-Key": "b-1"}
            first = ok(client.post("/tasks/batch", json=[a, b], headers=headers), 202)
            again = ok(client.post("/tasks/batch", json=[a, b], headers=headers), 200)
            problem(client.post("/tasks/batch", json=[a, a | {"ref": "c"}], headers=headers), 422)

        assert [each["id"] for each in first] == [each["id"] for each in again]


class TestFollowing:
    def test_lists_are_filtered_and_paged_while_tasks_come_in(self, server: Any) -> None:
        with server.client() as client:
            ids = [
                ok(client.post("/tasks", json={**PRIMES, "priority": p}), 202)["id"]
                for p in ("LOW", "HIGH") * 5
            ]
            failing = {"name": "checksum_files", "args": {"files": ["gone.txt"]}}
            failed = ok(client.post("/tasks", json=failing), 202)["id"]
            ok(client.get(f"/tasks/{failed}", params={"wait": 20}))
            page = client.get("/tasks", params={"limit": 4})
            seen = [item["id"] for item in ok(page)["items"]]
            assert 'rel="next"' in page.headers["link"]
            while (cursor := page.json()["next"]) is not None:
                ok(client.post("/tasks", json=PRIMES), 202)
                page = client.get("/tasks", params={"limit": 4, "cursor": cursor})
                seen += [item["id"] for item in ok(page)["items"]]
            assert seen == [failed, *reversed(ids)]

            def found(**params: Any) -> list[str]:
                return [i["id"] for i in ok(client.get("/tasks", params=params))["items"]]

            assert found(state="failed") == [failed]
            assert found(name="checksum_files") == [failed]
            assert found(q="gone.txt") == [failed]
            assert found(q=ids[3]) == [ids[3]]
            assert set(found(priority="LOW")) == set(ids[::2])
            assert failed in found(state=["failed", "completed"])
            for params in ({"cursor": "x"}, {"limit": 0}, {"state": "lost"}, {"priority": "4"}):
                problem(client.get("/tasks", params=params), 422)

    def test_long_polls_end_with_the_task_and_tags_save_transfers(self, server: Any) -> None:
        with server.client() as client:
            body = {"name": "sleep", "args": {"seconds": 0.3}}
            task = ok(client.post("/tasks", json=body), 202)["id"]
            running = client.get(f"/tasks/{task}", params={"wait": 0.05})
            assert running.json()["state"] == "running"
            ok(client.get(f"/tasks/{task}/result"), 202)
            began = time.monotonic()
            ended = client.get(f"/tasks/{task}", params={"wait": 20})
            assert time.monotonic() - began < 2
            assert ended.json()["state"] == "completed"
            assert ended.headers["etag"] != running.headers["etag"]
            same = client.get(f"/tasks/{task}", headers={"If-None-Match": ended.headers["etag"]})
            assert (same.status_code, same.content) == (304, b"")

    def test_unknown_tasks_are_404_everywhere(self, shared_server: Any) -> None:
        with shared_server.client() as client:
            for path in ("", "/result", "/attempts", "/graph"):
                problem(client.get(f"/tasks/nobody{path}"), 404)
                problem(client.get(f"/tasks/nobody{path}", params={"wait": 1}), 404)
            for path in ("/cancel", "/retry"):
                problem(client.post(f"/tasks/nobody{path}"), 404)

    def test_attempts_show_each_run_and_why_it_ended(self, server: Any) -> None:
        body = {"name": "checksum_files", "args": {"files": ["gone"]},
                "retry": {"max_attempts": 3, "base": 0}}  # fmt: skip
        with server.client() as client:
            task = ok(client.post("/tasks", json=body), 202)["id"]
            ok(client.get(f"/tasks/{task}", params={"wait": 20}))
            attempts = ok(client.get(f"/tasks/{task}/attempts"))

        assert [each["outcome"] for each in attempts] == ["retrying", "retrying", "failed"]
        assert all("FileNotFoundError" in each["reason"] for each in attempts)
        assert all(each["worker"] for each in attempts)


class TestChanging:
    def test_cancel_and_retry_say_what_became_of_it(self, server: Any) -> None:
        with server.client() as client:
            task = ok(client.post("/tasks", json=LONG), 202)["id"]
            problem(client.post(f"/tasks/{task}/retry"), 409)
            answer = ok(client.post(f"/tasks/{task}/cancel"))
            assert answer == {"id": task, "state": "cancelled", "cancelled": True}
            assert ok(client.post(f"/tasks/{task}/retry"), 202)["id"] == task
            assert ok(client.post(f"/tasks/{task}/cancel"))["cancelled"] is True
            done = ok(client.post("/tasks", json=PRIMES), 202)["id"]
            ok(client.get(f"/tasks/{done}", params={"wait": 20}))
            late = ok(client.post(f"/tasks/{done}/cancel"))
            assert (late["cancelled"], late["state"]) == (False, "completed")
            ok(client.post(f"/tasks/{done}/retry"), 202)
            assert ok(client.get(f"/tasks/{done}", params={"wait": 20}))["run"] == 2

    def test_a_timeout_ends_it_and_is_no_error_of_http(self, shared_server: Any) -> None:
        with shared_server.client() as client:
            task = ok(client.post("/tasks", json={**LONG, "timeout": 0.05}), 202)["id"]
            result = ok(client.get(f"/tasks/{task}/result", params={"wait": 20}))

        assert result["state"] == "timed_out"
        assert result["error"]["type"] == "TaskTimedOut"

    def test_workers_scale_within_bounds(self, server: Any, soon: Any) -> None:
        with server.client() as client:
            assert ok(client.get("/workers"))["count"] == 4
            assert ok(client.put("/workers", json={"count": 2}))["count"] == 2
            soon(lambda: len(ok(client.get("/workers"))["workers"]) == 2)
            assert ok(client.put("/workers", json={"count": 3}))["count"] == 3
            for body in ({"count": 0}, {"count": 1000}, {"count": "3"}, {"count": True}, {}):
                problem(client.put("/workers", json=body), 422)

    def test_cleanup_deletes_by_age(self, server: Any) -> None:
        with server.client() as client:
            task = ok(client.post("/tasks", json=PRIMES), 202)["id"]
            ok(client.get(f"/tasks/{task}", params={"wait": 20}))
            assert ok(client.delete("/tasks/cleanup", params={"days_old": 1})) == {"deleted": 0}
            assert ok(client.delete("/tasks/cleanup", params={"days_old": 0})) == {"deleted": 1}
            problem(client.get(f"/tasks/{task}"), 404)
            problem(client.delete("/tasks/cleanup", params={"days_old": -1}), 422)


class TestFigures:
    def test_metrics_statistics_and_the_stored_tasks_agree(self, server: Any) -> None:
        import sqlite3

        with server.client() as client:
            for n in range(20):
                ok(client.post("/tasks", json={**PRIMES, "delay": 600 if n % 4 == 0 else 0}), 202)
            for item in ok(client.get("/tasks", params={"limit": 100}))["items"]:
                if item["run_at"] is None:
                    ok(client.get(f"/tasks/{item['id']}", params={"wait": 20}))
            ok(client.post(f"/tasks/{item['id']}/cancel"))
            text = client.get("/metrics").text
            statistics = ok(client.get("/statistics"))
        metrics = {
            state: int(float(value))
            for state, value in re.findall(r'scheduler_tasks\{state="(\w+)"\} (\S+)', text)
        }
        connection = sqlite3.connect(server.data / "scheduler.db")
        stored = dict(connection.execute("SELECT state, count(*) FROM task GROUP BY state"))
        connection.close()

        assert metrics == statistics["states"]
        assert {state: n for state, n in metrics.items() if n} == stored
        assert stored == {"completed": 15, "pending": 4, "cancelled": 1}
        assert statistics["queue_wait_seconds"]["p95"] is not None
        assert len(statistics["workers"]) == 4
        assert all(worker["memory_bytes"] > 0 for worker in statistics["workers"])

    def test_the_registry_names_every_task_with_a_schema(self, shared_server: Any) -> None:
        with shared_server.client() as client:
            items = {item["name"]: item for item in ok(client.get("/registry"))}

        assert items.keys() >= {
            "checksum_files", "count_primes", "fetch_url", "aggregate_csv", "transform_matrix",
            "sleep",
        }  # fmt: skip
        schema = items["count_primes"]["schema"]
        assert schema["required"] == ["start", "stop"]
        assert schema["additionalProperties"] is False


class TestEvents:
    def lines(self, client: Any, number: int, **options: Any) -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        eid = 0
        with client.stream("GET", "/events", **options) as answer:
            for line in answer.iter_lines():
                if line.startswith("id:"):
                    eid = int(line[3:])
                elif line.startswith("data:"):
                    found.append((eid, json.loads(line[5:])["to"]))
                    if len(found) == number:
                        break
        return found

    def test_a_resumed_stream_has_no_gap_and_no_repetition(self, server: Any) -> None:
        with server.client() as client:
            for _ in range(3):
                task = ok(client.post("/tasks", json=PRIMES), 202)["id"]
                ok(client.get(f"/tasks/{task}", params={"wait": 20}))
            every = self.lines(client, -1, params={"follow": "false"})
            assert [state for _, state in every] == ["queued", "running", "completed"] * 3
            first = self.lines(client, 4, headers={"Last-Event-ID": "0"})
            rest = self.lines(client, 5, headers={"Last-Event-ID": str(first[-1][0])})
            assert first + rest == every

    def test_an_open_stream_gets_what_happens_and_ends_when_the_server_stops(
        self, server: Any
    ) -> None:
        found: list[tuple[int, str]] = []
        opened = threading.Event()

        def listen() -> None:
            with server.client() as client, client.stream("GET", "/events") as answer:
                opened.set()
                found.extend(
                    (0, line[6:].strip())
                    for line in answer.iter_lines()
                    if line.startswith("event:")
                )

        thread = threading.Thread(target=listen)
        thread.start()
        assert opened.wait(10)
        with server.client() as client:
            task = ok(client.post("/tasks", json=PRIMES), 202)["id"]
            ok(client.get(f"/tasks/{task}", params={"wait": 20}))
        began = time.monotonic()
        assert server.stop() in (0, -signal.SIGTERM)
        thread.join(10)

        assert time.monotonic() - began < 3
        assert [state for _, state in found] == ["queued", "running", "completed"]


class TestLife:
    def test_a_restart_goes_on_where_the_kill_was(self, make_server: Callable[[], Any]) -> None:
        server = make_server().start()
        with server.client() as client:
            slow = {"name": "sleep", "args": {"seconds": 0.4}}
            ids = [ok(client.post("/tasks", json=slow), 202)["id"] for _ in range(5)]
        server.kill()
        server.start()
        with server.client() as client:
            for task in ids:
                assert ok(client.get(f"/tasks/{task}", params={"wait": 20}))["state"] == "completed"

    def test_a_second_server_on_the_database_is_refused_by_a_sentence(
        self, make_server: Callable[[], Any]
    ) -> None:
        first, second = make_server().start(), make_server()
        with pytest.raises(AssertionError, match="in use by the scheduler of process"):
            second.start(SCHEDULER_DB_PATH=str(first.data / "scheduler.db"))
        assert "Traceback" not in second.log.read_text()

    def test_it_stops_quickly_and_ready_says_so(self, server: Any) -> None:
        with server.client() as client:
            assert ok(client.get("/readyz"))["components"] == {"scheduler": True}
            ok(client.post("/tasks", json=LONG), 202)
        began = time.monotonic()
        assert server.stop() in (0, -signal.SIGTERM)
        assert time.monotonic() - began < 4
        assert "Traceback" not in server.log.read_text()

    def test_with_a_key_every_operation_needs_it(self, make_server: Callable[[], Any]) -> None:
        server = make_server().start(API_KEY="sesame")
        with server.client() as client:
            problem(client.get("/tasks"), 401)
            problem(client.post("/tasks", json=PRIMES), 401)
            ok(client.post("/tasks", json=PRIMES, headers={"x-api-key": "sesame"}), 202)

    def test_pages_of_other_origins_cannot_submit(self, shared_server: Any) -> None:
        with shared_server.client() as client:
            for path in ("/tasks", "/tasks/x/cancel"):
                origin = {"origin": "http://evil.example"}
                problem(client.post(path, json=PRIMES, headers=origin), 403)


class TestDocumentation:
    def test_every_example_succeeds_when_executed_as_shown(self, server: Any) -> None:
        with server.client() as client:
            document = client.get("/openapi.json").json()
            executed = 0
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    params: dict[str, Any] = {}
                    url = path
                    for parameter in operation.get("parameters", ()):
                        examples = parameter["schema"].get("examples") or [parameter.get("example")]
                        if parameter["in"] == "path":
                            url = url.replace(f"{{{parameter['name']}}}", str(examples[0]))
                        elif parameter["in"] == "query" and examples[0] is not None:
                            params[parameter["name"]] = examples[0]
                    body = operation.get("requestBody", {}).get("content", {})
                    example = None
                    if body:
                        (described,) = body.values()
                        example = (described.get("examples") or described["schema"]["examples"])[0]
                    answer = client.request(method.upper(), url, params=params, json=example)
                    assert answer.is_success, (method, url, answer.text)
                    executed += 1
        assert executed >= 18

    def test_every_operation_has_a_tag_a_summary_and_declared_errors(
        self, shared_server: Any
    ) -> None:
        with shared_server.client() as client:
            document = ok(client.get("/openapi.json"))
        for path, operations in document["paths"].items():
            for operation in operations.values():
                assert operation["tags"], path
                assert operation["summary"], path
                assert operation["operationId"], path
                assert "default" in operation["responses"], path
        assert "HTTPValidationError" not in document["components"]["schemas"]


def test_the_command_lists_and_shows_tasks(server: Any, capsys: Any) -> None:
    from inspect_db import main

    database = str(server.data / "scheduler.db")
    with server.client() as client:
        good = ok(client.post("/tasks", json=PRIMES), 202)["id"]
        body = {"name": "checksum_files", "args": {"files": ["gone"]}}
        bad = ok(client.post("/tasks", json=body), 202)["id"]
        for task in (good, bad):
            ok(client.get(f"/tasks/{task}", params={"wait": 20}))
    assert main(["list", database, "--state", "failed"]) == 0
    listed = capsys.readouterr().out
    assert bad in listed
    assert good not in listed
    assert "1 completed, 1 failed" in listed
    server.stop()
    assert main(["show", database, bad]) == 0
    assert "FileNotFoundError" in capsys.readouterr().out
    assert main(["show", database, "nobody"]) == 1
    assert main(["list", str(Path(database).parent / "none.db")]) == 1
