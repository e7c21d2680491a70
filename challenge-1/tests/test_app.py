"""Over HTTP, against a real server: what the documentation promises is what happens."""

import base64
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytestmark = [pytest.mark.webhook, pytest.mark.integration]

FOLDER = Path(__file__).resolve().parent.parent
GOOD = {"data": {"category": "c", "value": 1.5, "quantity": 2, "ts": "2026-01-15T10:00:03Z"}}


def good(**data: Any) -> bytes:
    return json.dumps({"data": {**GOOD["data"], **data}}).encode()


def an_event(**changes: Any) -> dict[str, Any]:
    event = {"event_id": uuid.uuid4().hex, "source": "s", "event_type": "t", "data": {"x": 1}}
    return {**event, **changes}


def problem_of(response: httpx2.Response) -> dict[str, Any]:
    """The one shape of every error, checked."""
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "request_id"} <= problem.keys()
    assert problem["status"] == response.status_code
    assert problem["request_id"] == response.headers["x-request-id"]
    assert len(response.content) < 8192
    assert "Traceback" not in response.text
    assert str(FOLDER) not in response.text
    return problem


class TestBodies:
    @pytest.mark.parametrize("path", ["/webhook", "/webhook/ingest", "/webhook/batch"])
    @pytest.mark.parametrize("form", ["object", "array", "ndjson", "text", "gzip", "chunked"])
    def test_every_route_takes_every_body(self, shared_server: Any, path: str, form: str) -> None:
        def document() -> dict[str, Any]:
            return GOOD if path == "/webhook" else an_event()

        single, count = json.dumps(document()).encode(), 1 if form == "object" else 3
        many = [document() for _ in range(3)]
        ndjson = "\n".join(map(json.dumps, many)).encode()
        chunked: Iterator[bytes] = (ndjson[start : start + 10] for start in range(0, 999, 10))
        body, content_type, headers = {
            "object": (single, "application/json", {}),
            "array": (json.dumps(many).encode(), "application/json", {}),
            "ndjson": (ndjson, "application/x-ndjson", {}),
            "text": (ndjson, "text/plain", {}),
            "gzip": (gzip.compress(ndjson), "application/jsonl", {"content_encoding": "gzip"}),
            "chunked": (chunked, "application/x-ndjson", {}),
        }[form]

        answer = shared_server.post(path, body, content_type=content_type, **headers)

        assert answer.status_code == 202
        assert answer.json()["accepted"] == count
        assert answer.json()["errors"] == []

    def test_a_bad_line_is_reported_and_kept_with_its_bytes(self, server: Any) -> None:
        body = b"\n".join([good(), b'{"data":', good(), b'{"data":{"x":"\xff"}}'])

        answer = server.post("/webhook?wait=applied", body, content_type="text/plain").json()

        assert (answer["accepted"], answer["rejected"]) == (2, 2)
        offset = body.index(b'{"data":\n')
        assert answer["errors"][0]["line"] == 2
        assert answer["errors"][0]["offset"] == offset
        first, second = server.get("/dead-letters")["items"]
        assert (first["line"], first["offset"], first["text"]) == (2, offset, '{"data":')
        assert base64.b64decode(second["base64"]) == b'{"data":{"x":"\xff"}}'

    def test_an_upload_of_many_blocks_is_one_answer(self, server: Any) -> None:
        body = b"\n".join(good(value=n) for n in range(30_000))
        sent = (body[start : start + 60_000] for start in range(0, len(body), 60_000))

        answer = server.post("/webhook?wait=applied", sent, content_type="application/x-ndjson")

        assert answer.json()["accepted"] == 30_000
        (row,) = server.get("/aggregates", pipeline="webhook")["items"]
        assert row["values"]["sum_value"] == sum(range(30_000))

    @pytest.mark.parametrize(
        ("body", "headers", "status"),
        [
            (b"{", {}, 400),
            (b"", {}, 400),
            (b"[1,", {}, 400),
            (b"NaN", {}, 400),
            (b"\xff\xfe", {}, 400),
            (b'{"data":5}', {}, 422),
            (b"[]", {}, 422),
            (b"[5]", {}, 422),
            (b'"quoted"', {}, 422),
            (b"nonsense\nnonsense", {"content_type": "text/plain"}, 422),
            (b"", {"content_type": "text/plain"}, 422),
            (good(), {"content_type": "application/xml"}, 415),
            (good(), {"content_type": ""}, 415),
            (good(), {"content_encoding": "br"}, 415),
            (good(), {"content_encoding": "gzip"}, 400),
            (gzip.compress(good())[:-3], {"content_encoding": "gzip"}, 400),
            (b'{"data":"' + b"x" * 1_100_000 + b'"}', {}, 413),
            (b"x" * 1_100_000, {"content_type": "text/plain"}, 413),
            (good(), {"idempotency_key": "k" * 300}, 422),
            (b"[" * 100_000, {}, 400),
            (b'{"a":' * 100_000, {}, 400),
        ],
    )
    def test_bad_bodies_are_4xx_of_one_shape(
        self, shared_server: Any, body: bytes, headers: dict[str, str], status: int
    ) -> None:
        answer = shared_server.post("/webhook", body, **headers)

        assert answer.status_code == status
        problem_of(answer)

    def test_a_gzip_bomb_is_read_in_constant_memory_and_refused(self, server: Any) -> None:
        bomb = gzip.compress(b"x" * 300_000_000, 9)
        before = server.get("/stats")["resources"]["memory_bytes"]

        answer = server.post("/webhook", bomb, content_type="text/plain", content_encoding="gzip")

        assert answer.status_code == 413
        assert server.get("/stats")["resources"]["memory_bytes"] - before < 40_000_000

    def test_parser_ijson_takes_the_same_bodies(self, make_server: Callable[[], Any]) -> None:
        server = make_server().start(PARSER="ijson")
        body = b"\n".join([good(), b"oops", good()])

        answer = server.post("/webhook?wait=applied", body, content_type="text/plain").json()

        assert (answer["accepted"], answer["rejected"]) == (2, 1)
        assert server.get("/aggregates")["items"][0]["values"]["count"] == 2


class TestIdempotency:
    def test_a_repeated_key_gets_the_first_answer_and_another_body_422(self, server: Any) -> None:
        with ThreadPoolExecutor(16) as pool:
            answers = list(
                pool.map(
                    lambda _: server.post("/webhook?wait=applied", good(), idempotency_key="k"),
                    range(16),
                )
            )

        assert {answer.content for answer in answers} == {answers[0].content}
        assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
        other = server.post("/webhook", good(value=9), idempotency_key="k")
        assert other.status_code == 422
        problem_of(other)
        assert server.get("/aggregates")["items"][0]["values"]["count"] == 1

    def test_a_refusal_is_repeated_as_well(self, server: Any) -> None:
        first = server.post("/webhook", b'{"data":5}', idempotency_key="bad")
        again = server.post("/webhook", b'{"data":5}', idempotency_key="bad")

        assert first.status_code == again.status_code == 422
        assert server.get("/stats")["rejected"] == 1

    def test_a_repeated_event_is_a_duplicate_whatever_it_holds(self, server: Any) -> None:
        server.post("/webhook/ingest", json.dumps(an_event(event_id="one")).encode())
        batch = [an_event(event_id="one", data={"x": 5}), an_event(event_id="two")] * 2

        answer = server.post("/webhook/batch?wait=applied", json.dumps(batch).encode()).json()

        assert (answer["accepted"], answer["duplicates"]) == (1, 3)
        stats = server.get("/stats")
        assert (stats["received"], stats["accepted"], stats["duplicates"]) == (5, 2, 3)
        assert stats["pipelines"]["events"]["sources"]["s"]["duplicates"] == 3


class TestResults:
    def test_late_events_revise_their_window_and_final_follows_the_watermark(
        self, server: Any
    ) -> None:
        for ts in ("10:00:03", "10:00:12", "10:00:05", "10:00:06"):
            server.post("/webhook?wait=applied", good(ts=f"2026-01-15T{ts}Z"))

        first, second = server.get("/aggregates", pipeline="webhook")["items"]

        assert first["window_start"] == "2026-01-15T10:00:00Z"
        assert first["window_end"] == "2026-01-15T10:00:10Z"
        assert (first["values"]["count"], first["revision"], first["final"]) == (3, 3, True)
        assert (second["revision"], second["final"]) == (1, False)
        stats = server.get("/stats")
        assert (stats["late"], stats["revised"], stats["aggregated"]) == (0, 2, 4)

    def test_pages_follow_their_link(self, server: Any) -> None:
        body = b"\n".join(good(ts=1_700_000_000 + 10 * n, category=f"c{n % 3}") for n in range(25))
        server.post("/webhook?wait=applied", body, content_type="text/plain")
        rows: list[Any] = []
        with server.client() as client:
            url = "/aggregates?limit=10"
            while url:
                page = client.get(url)
                rows += page.json()["items"]
                url = page.links["next"]["url"] if "next" in page.links else ""

        assert len(rows) == 25
        assert len({row["window_start"] for row in rows}) == 25
        only = server.get("/aggregates", group="category:c1", limit=1000)["items"]
        assert {row["group"]["category"] for row in only} == {"c1"}
        window = {"from": "2023-11-14T22:13:20Z", "to": 1_700_000_050}
        assert len(server.get("/aggregates", **window)["items"]) == 5

    @pytest.mark.parametrize(
        "query",
        [
            "pipeline=none", "group=x:y", "group=category", "from=noon", "to=1e99", "limit=0",
            "limit=1001", "cursor=abc",
            "cursor=WzEwMDAwMDAwMDAwMDAwMDAwMDAwMDAwLCJhIiwiYiIsMV0",
            "cursor=%00", "cursor=WzFd", "final=perhaps",
            "group=category:a&pipeline=events",
        ],
    )  # fmt: skip
    def test_questions_that_make_no_sense_are_422(self, shared_server: Any, query: str) -> None:
        with shared_server.client() as client:
            answer = client.get(f"/aggregates?{query}")

        assert answer.status_code == 422
        problem_of(answer)

    def test_open_windows_are_visible_within_a_second(self, server: Any) -> None:
        waits = []
        for n in range(30):
            server.post("/webhook", good(category=f"k{n}"))
            started = time.monotonic()
            while not server.get("/aggregates", group=f"category:k{n}")["items"]:
                assert time.monotonic() - started < 5
            waits.append(time.monotonic() - started)

        assert sorted(waits)[-1] < 1

    def test_figures_reconcile_on_stats_and_metrics(self, server: Any) -> None:
        batch = json.dumps([an_event(event_id="a"), an_event(event_id="a"), 5]).encode()
        server.post("/webhook/batch?wait=applied", batch)
        server.post("/webhook?wait=applied", good())

        stats = server.get("/stats")
        with server.client() as client:
            text = client.get("/metrics").text

        assert stats["received"] == stats["accepted"] + stats["rejected"] + stats["duplicates"] == 4
        assert stats["applied"] == stats["accepted"] == 2
        assert (stats["backlog_events"], stats["backlog_bytes"]) == (0, 0)
        assert stats["latency"]["count"] == 2
        assert stats["aggregations"][0]["event_type"] == "t"
        assert 'pipeline_events_total{outcome="duplicates",pipeline="events"} 1.0' in text
        assert "process_open_fds" in text


class TestDocumentation:
    def test_every_example_succeeds_when_executed_as_shown(self, server: Any) -> None:
        with server.client() as client:
            document = client.get("/openapi.json").json()
            executed = 0
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    content = operation.get("requestBody", {}).get("content", {})
                    for media_type, described in content.items() or [("", {})]:
                        body = described.get("example")
                        text = body if isinstance(body, str) else json.dumps(body)
                        shown = {
                            p["name"]: p.get("example") or p["schema"]["examples"][0]
                            for p in operation.get("parameters", [])
                            if p["in"] == "path"
                        }
                        answer = client.request(
                            method.upper(), path.format(**shown),
                            content=text if body is not None else None,
                            headers={"content-type": media_type} if media_type else None,
                        )  # fmt: skip
                        assert answer.is_success, (path, media_type, answer.text)
                        executed += 1
        assert executed >= 30

    def test_every_operation_has_a_tag_a_summary_and_declared_errors(
        self, shared_server: Any
    ) -> None:
        document = shared_server.get("/openapi.json")
        for path, operations in document["paths"].items():
            for operation in operations.values():
                assert operation["tags"], path
                assert operation["summary"], path
                assert operation["operationId"], path
                assert "default" in operation["responses"], path
        assert "HTTPValidationError" not in document["components"]["schemas"]

    def test_the_pages_need_no_other_host(self, shared_server: Any) -> None:
        with shared_server.client() as client:
            root = client.get("/", follow_redirects=True)
            assert "swagger-ui" in root.text
            for page in ("/docs", "/redoc"):
                html = client.get(page).text
                for asset in re.findall(r'(?:src|href)="([^"]+)"', html):
                    assert asset.startswith("/"), asset
                    assert client.get(asset).status_code == 200


class TestTheWorldOutside:
    def test_a_foreign_host_or_origin_is_refused_without_a_key(self, shared_server: Any) -> None:
        assert shared_server.post("/webhook", good(), host="evil.example").status_code == 403
        for origin in ("http://evil.example", "null", "http://localhost:1"):
            answer = shared_server.post("/webhook", good(), origin=origin)
            assert answer.status_code == 403
            problem_of(answer)
        own = shared_server.url
        assert shared_server.post("/webhook", good(), origin=own).status_code == 202
        port = own.rpartition(":")[2]
        for host in (f"localhost:{port}", f"[::1]:{port}", f"127.1.2.3:{port}"):
            assert shared_server.post("/webhook", good(), host=host).status_code == 202

    def test_with_a_key_everything_but_health_and_the_pages_needs_it(
        self, make_server: Callable[[], Any]
    ) -> None:
        server = make_server().start(API_KEY="sesame")
        with server.client() as client:
            for path in ("/health", "/healthz", "/readyz", "/docs", "/openapi.json"):
                assert client.get(path, headers={"host": "any.example"}).status_code == 200
            for path in ("/stats", "/metrics", "/aggregates", "/nothing"):
                refused = client.get(path)
                assert refused.status_code == 401
                problem_of(refused)
                assert "www-authenticate" in refused.headers
            assert client.get("/stats", headers={"x-api-key": "sesame"}).status_code == 200
            assert client.get("/stats", headers={"x-api-key": b"\xff"}).status_code == 401
            document = client.get("/openapi.json").json()
        assert document["components"]["securitySchemes"]["apiKey"]["name"] == "X-API-Key"
        assert document["paths"]["/stats"]["get"]["security"] == [{"apiKey": []}]
        assert "sesame" not in server.log.read_text()

    def test_health_has_exactly_the_documented_shape(self, shared_server: Any) -> None:
        assert shared_server.get("/health") == {
            "status": "healthy",
            "components": {"store": True, "message_queue": True},
        }
        assert shared_server.get("/readyz")["components"]["store"] is True

    def test_errors_of_the_router_have_the_one_shape_and_keep_allow(
        self, shared_server: Any
    ) -> None:
        with shared_server.client() as client:
            missing = client.get("/nothing/here")
            wrong = client.delete("/webhook")
        assert missing.status_code == 404
        problem_of(missing)
        assert wrong.status_code == 405
        assert wrong.headers["allow"] == "POST"
        problem_of(wrong)

    def test_a_request_id_is_kept_when_it_is_a_decent_one(self, shared_server: Any) -> None:
        with shared_server.client() as client:
            kept = client.get("/healthz", headers={"x-request-id": "abc-123"})
            made = client.get("/healthz", headers={"x-request-id": "a b\tc" * 50})
        assert kept.headers["x-request-id"] == "abc-123"
        assert re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]+", made.headers["x-request-id"])


class TestLife:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_it_within_two_seconds_and_keeps_what_was_accepted(
        self, server: Any, number: int
    ) -> None:
        body = b"\n".join(good(value=n) for n in range(20_000))
        assert server.post("/webhook", body, content_type="text/plain").status_code == 202
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with socket.create_connection(address) as half:
            half.sendall(b"POST /webhook HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            started = time.monotonic()
            server.stop(number)
            took = time.monotonic() - started

        assert took < 2
        assert "Traceback" not in server.log.read_text()
        server.start()
        server.post("/webhook?wait=applied", good())
        assert server.get("/stats")["applied"] == 20_001

    def test_a_second_process_is_refused_in_one_line_that_names_the_first(
        self, server: Any
    ) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(FOLDER), "--port", "0"],
            cwd=server.data, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip

        assert done.returncode != 0
        assert f"in use by process {server.process.pid}" in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_port_in_use_is_one_line_that_names_it(self, server: Any, tmp_path: Path) -> None:
        port = server.url.rpartition(":")[2]

        done = subprocess.run(
            [sys.executable, str(FOLDER / "app.py")],
            cwd=tmp_path, env={**os.environ, "PORT": port},
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip

        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert f"Port {port}" in done.stderr

    def test_who_only_takes_webhooks_does_not_hold_what_fetches(self) -> None:
        code = "import sys, app; sys.exit(str({'fetching', 'httpx2', 'yaml'} & set(sys.modules)))"

        done = subprocess.run(
            [sys.executable, "-c", code], cwd=FOLDER,
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip

        assert done.stderr.strip() == "set()"

    def test_reload_hands_over_and_loses_nothing(
        self, make_server: Callable[[], Any], tmp_path: Path
    ) -> None:
        code = tmp_path / "code"
        code.mkdir()
        for path in FOLDER.glob("*.py"):
            (code / path.name).write_bytes(path.read_bytes())
        command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(code), "--reload",
                   "--reload-dir", str(code)]  # fmt: skip
        server = make_server().start(command=command)
        assert server.post("/webhook", good()).status_code == 202
        first = server.get("/metrics-of-nothing")["request_id"]

        (code / "app.py").write_text((code / "app.py").read_text() + "\n# changed\n")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                second = server.get("/metrics-of-nothing")["request_id"]
            except httpx2.TransportError:
                continue
            if second.partition("-")[0] != first.partition("-")[0]:
                break
        server.post("/webhook?wait=applied", good())

        assert server.get("/aggregates")["items"][0]["values"]["count"] == 2
        server.stop()

    def test_the_start_says_where_the_data_lives(self, server: Any) -> None:
        said = [json.loads(line) for line in server.log.read_text().splitlines() if line[0] == "{"]
        (data,) = [line for line in said if line["event"] == "data"]

        assert data["database"] == str(server.data / "webhook_results.db")
        assert data["message_queue"] == str(server.data / "message_queue")
