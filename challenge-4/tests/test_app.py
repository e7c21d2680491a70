"""Over HTTP, against a real server: what the documentation promises is what happens."""

import gzip
import json
import re
import signal
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

pytestmark = [pytest.mark.webhook, pytest.mark.integration]

FOLDER = Path(__file__).resolve().parent.parent
NDJSON = {"content-type": "application/x-ndjson"}


def problem_of(response: httpx2.Response) -> dict[str, Any]:
    """The one shape of every error, checked."""
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "request_id"} <= problem.keys()
    assert problem["status"] == response.status_code
    assert len(response.content) < 8192
    assert "Traceback" not in response.text
    assert str(FOLDER) not in response.text
    return problem


@pytest.fixture
def client(server: Any) -> Any:
    with server.client() as client:
        yield client


def begin_stream(server: Any, dataset: str) -> socket.socket:
    """A connection that has asked for a stream and reads nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(pipeline(dataset)).encode()
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        b"POST /pipelines/stream HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    return connection


def slow_map() -> dict[str, Any]:
    """An operation that takes some 50 microseconds per row."""
    value: dict[str, Any] = {"field": "n"}
    for _ in range(7):
        value = {"add": [value, value]}
    return {"op": "map", "expr": value}


def pipeline(dataset: str, *ops: dict[str, Any]) -> dict[str, Any]:
    return {"dataset": dataset, "ops": list(ops)}


def upload(client: Any, name: str, rows: list[Any], **options: Any) -> Any:
    body = "".join(f"{json.dumps(row)}\n" for row in rows)
    params = {"name": name, **options}
    return client.post("/datasets", params=params, content=body, headers=NDJSON)


def items(client: Any, *ops: dict[str, Any], dataset: str = "numbers", **params: Any) -> Any:
    answer = client.post("/pipelines/run", json=pipeline(dataset, *ops), params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()["items"]


@pytest.fixture
def numbers(client: Any) -> Any:
    rows = [{"n": n, "name": f"n{n % 3}", "half": n / 2 if n % 5 else None} for n in range(1, 101)]
    assert upload(client, "numbers", rows).status_code == 201
    return client


class TestLanguage:
    @pytest.mark.parametrize(
        ("op", "expected"),
        [
            ({"field": "n", "cmp": "eq", "value": 5}, [5]),
            ({"field": "n", "cmp": "ne", "value": 5}, [n for n in range(1, 101) if n != 5]),
            ({"field": "n", "cmp": "lt", "value": 3}, [1, 2]),
            ({"field": "n", "cmp": "le", "value": 2.5}, [1, 2]),
            ({"field": "n", "cmp": "gt", "value": 98}, [99, 100]),
            ({"field": "n", "cmp": "ge", "value": 99}, [99, 100]),
            ({"field": "n", "cmp": "in", "value": [3, "x", None, 200, 7]}, [3, 7]),
            ({"field": "n", "cmp": "gt", "value": "98"}, []),
            ({"field": "n", "cmp": "eq", "value": None}, []),
            ({"field": "half", "cmp": "is_null"}, list(range(5, 101, 5))),
            ({"field": "name", "cmp": "contains", "value": "%"}, []),
            ({"field": "name", "cmp": "startswith", "value": "n2"}, list(range(2, 101, 3))),
            ({"field": "name", "cmp": "endswith", "value": "0"}, list(range(3, 101, 3))),
            ({"and": [{"field": "n", "cmp": "gt", "value": 10},
                      {"field": "n", "cmp": "lt", "value": 13}]}, [11, 12]),
            ({"or": [{"field": "n", "cmp": "eq", "value": 1},
                     {"field": "n", "cmp": "eq", "value": 100}]}, [1, 100]),
            ({"not": {"field": "n", "cmp": "lt", "value": 99}}, [99, 100]),
        ],
    )  # fmt: skip
    def test_filters(self, numbers: Any, op: dict[str, Any], expected: list[int]) -> None:
        found = items(numbers, {"op": "filter", **op}, limit=1000)

        assert [row["n"] for row in found] == expected

    def test_the_other_operations(self, numbers: Any) -> None:
        take = {"op": "take", "n": 3}

        assert [r["n"] for r in items(numbers, {"op": "skip", "n": 97}, take)] == [98, 99, 100]
        select = {"op": "map", "select": ["n"]}
        assert items(numbers, select, {"op": "batch", "size": 60}, take) == [
            [{"n": n} for n in range(1, 61)], [{"n": n} for n in range(61, 101)],
        ]  # fmt: skip
        assert items(numbers, {"op": "map", "expr": {"mul": [{"field": "n"}, {"value": 2}]}},
                     take) == [2, 4, 6]  # fmt: skip
        assert items(numbers, {"op": "map", "select": {"x": "n", "y": {
            "div": [{"field": "half"}, {"sub": [{"field": "n"}, {"value": 2}]}]}}}, take) == [
            {"x": 1, "y": -0.5}, {"x": 2, "y": None}, {"x": 3, "y": 1.5}]  # fmt: skip
        assert [r["n"] for r in items(numbers, {"op": "distinct", "field": "name"})] == [1, 2, 3]
        assert len(items(numbers, {"op": "distinct"}, limit=1000)) == 100
        assert items(numbers, {"op": "aggregate"}) == [{"count": 100}]
        assert items(
            numbers,
            {"op": "aggregate", "by": ["name"], "values": {
                "rows": {"fn": "count"}, "sum": {"fn": "sum", "field": "n"},
                "avg": {"fn": "avg", "field": "half"}, "least": {"fn": "min", "field": "n"},
                "most": {"fn": "max", "field": "n"}}},
            {"op": "filter", "field": "rows", "cmp": "gt", "value": 33},
        ) == [{"name": "n1", "rows": 34, "sum": 1717, "avg": pytest.approx(25, abs=1),
               "least": 1, "most": 100}]  # fmt: skip
        empty = {"op": "filter", "field": "n", "cmp": "lt", "value": 0}
        figures = {"s": {"fn": "sum", "field": "n"}, "a": {"fn": "avg", "field": "n"}}
        assert items(numbers, empty, {"op": "aggregate", "values": figures}) == [
            {"s": 0, "a": None}
        ]

    def test_the_built_in_data_sets(self, client: Any) -> None:
        found = items(client, {"op": "filter", "field": "icao", "cmp": "eq", "value": "LSZB"},
                      dataset="airports")  # fmt: skip
        assert found[0]["city"] == "Bern"
        amounts = items(
            client, {"op": "filter", "field": "data.amount", "cmp": "gt", "value": 495},
            {"op": "map", "expr": {"field": "data.currency"}}, dataset="events",
        )  # fmt: skip
        assert set(amounts) <= {"EUR", "USD", "CHF"}

    def test_a_page_says_whether_there_is_more(self, numbers: Any) -> None:
        for limit, has_next in ((99, True), (100, False)):
            answer = numbers.post(
                "/pipelines/run", json=pipeline("numbers"), params={"limit": limit}
            )
            assert answer.json()["count"] == limit
            assert answer.json()["has_next"] is has_next


class TestRefusals:
    @pytest.mark.parametrize(
        ("ops", "words"),
        [
            ([{"op": "take", "n": -1}], "/ops/0/take/n"),
            ([{"op": "take", "n": 1}, {"op": "take", "n": 1.5}], "/ops/1/take/n"),
            ([{"op": "take", "n": True}], "/ops/0/take/n"),
            ([{"op": "take", "n": 10**10}], "/ops/0/take/n"),
            ([{"op": "batch", "size": 0}], "/ops/0/batch/size"),
            ([{"op": "batch", "size": 10**6}], "/ops/0/batch/size"),
            ([{"op": "sort"}], "/ops/0"),
            ([{"op": "filter"}], "/ops/0/filter"),
            (
                [{"op": "filter", "field": "n", "cmp": "matches", "value": "a+"}],
                "/ops/0/filter/cmp",
            ),
            ([{"op": "filter", "field": "n", "cmp": "eq"}], "/ops/0/filter"),
            ([{"op": "map", "expr": {"pow": [{"value": 9}, {"value": 9}]}}], "/ops/0/map/expr"),
            ([{"op": "map", "select": []}], "/ops/0/map/select"),
            ([{"op": "take", "n": 1, "eval": "x"}], "/ops/0/take/eval"),
            ([{"op": "skip", "n": 0}] * 65, "/ops"),
            (
                [{"op": "skip", "n": 1}, {"op": "filter", "field": "x", "cmp": "is_null"}],
                "op 2 filter",
            ),
            ([{"op": "map", "select": ["n"]}, {"op": "map", "select": ["name"]}], "op 2 map"),
            ([{"op": "batch", "size": 2}, {"op": "distinct", "field": "n"}], "op 2 distinct"),
            ([{"op": "filter", "field": "n", "cmp": "in", "value": 5}], "op 1 filter"),
            ([{"op": "filter", "field": "n", "cmp": "contains", "value": 5}], "op 1 filter"),
            ([{"op": "filter", "field": "n", "cmp": "eq", "value": [1]}], "op 1 filter"),
            ([{"op": "filter", "field": "n", "cmp": "eq", "value": 2**64}], "op 1 filter"),
            ([{"op": "filter", "field": "n", "cmp": "in", "value": [0] * 1001}], "op 1 filter"),
            (
                [{"op": "aggregate", "by": ["n"], "values": {"n": {"fn": "count"}}}],
                "op 1 aggregate",
            ),
            ([{"op": "aggregate", "values": {"n": {"fn": "sum"}}}], "/ops/0/aggregate/values"),
        ],
    )
    @pytest.mark.parametrize("path", ["run", "stream", "explain", ""])
    def test_what_does_not_fit_is_422_and_names_the_op(
        self, numbers: Any, path: str, ops: list[Any], words: str
    ) -> None:
        answer = numbers.post(f"/pipelines/{path}".rstrip("/"), json=pipeline("numbers", *ops))

        assert answer.status_code == 422, answer.text
        problem = problem_of(answer)
        assert words in json.dumps(problem)

    def test_depth_and_size_are_bounded(self, numbers: Any) -> None:
        leaf = {"field": "n", "cmp": "eq", "value": 1}
        deep: dict[str, Any] = leaf
        for _ in range(16):
            deep = {"not": deep}
        wide = {"or": [leaf] * 500}

        for condition, words in ((deep, "levels deep"), (wide, "parts")):
            answer = numbers.post(
                "/pipelines/run", json=pipeline("numbers", {"op": "filter", **condition})
            )
            assert answer.status_code == 422
            assert words in problem_of(answer)["detail"]
        for depth in (200, 5_000, 100_000):
            body = '{"dataset":"numbers","ops":[{"op":"filter",' + '"not":{' * depth
            answer = numbers.post(
                "/pipelines/run", content=body + "}" * depth + "}]}",
                headers={"content-type": "application/json"},
            )  # fmt: skip
            assert answer.status_code in (400, 422)
            problem_of(answer)

    @pytest.mark.parametrize(
        ("body", "content_type", "status"),
        [
            (b"{", "application/json", 400),
            (b"", "application/json", 422),
            (b"[]", "application/json", 422),
            (b'{"dataset":"numbers","ops":[{"op":"take","n":NaN}]}', "application/json", 422),
            (b'{"dataset":"\\ud800"}', "application/json", 422),
            (b'{"dataset":"../../etc"}', "application/json", 422),
            (b'{"dataset":"nothing"}', "application/json", 404),
            (b'{"dataset":"numbers"}', "text/plain", 415),
            (b"\xff\xfe", "application/json", 400),
            (b'{"dataset":"' + b"x" * 1_100_000 + b'"}', "application/json", 413),
            (b'{"dataset":"numbers","ops":[{"op":"filter","field":"n","cmp":"eq","value":1e999}]}',
             "application/json", 422),
            (b'{"dataset":"numbers","ops":[{"op":"filter","field":"n","cmp":"eq","value":NaN}]}',
             "application/json", 422),
            (b'{"dataset":"numbers","ops":[{"op":"take","n":' + b"9" * 5000 + b"}]}",
             "application/json", 400),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("path", ["run", "stream", "explain"])
    def test_bad_bodies_are_4xx_of_one_shape(
        self, numbers: Any, path: str, body: bytes, content_type: str, status: int
    ) -> None:
        answer = numbers.post(
            f"/pipelines/{path}", content=body, headers={"content-type": content_type}
        )

        assert answer.status_code == status, answer.text
        problem_of(answer)

    def test_time_is_bounded_and_the_answer_names_the_op(
        self, make_server: Callable[..., Any]
    ) -> None:
        server = make_server(RUN_SECONDS="0.25", STREAM_SECONDS="0.25")
        slow = slow_map()
        every = {"op": "filter", "field": "n", "cmp": "ge", "value": 0}
        none = {"op": "skip", "n": 10**9}
        figures = {f"f{n}": {"fn": "sum", "field": "n"} for n in range(20)}
        grouping = {"op": "aggregate", "by": ["n"], "values": figures}
        with server.client() as client:
            upload(client, "big", [{"n": n} for n in range(60_000)])
            cases: list[tuple[list[Any], str]] = [
                ([every, slow, none], "op 2 map"),
                ([slow, none], "op 1 map"),
                ([every, every, grouping], "op 3 aggregate"),
            ]
            for ops, named in cases:
                for path in ("run", "stream"):
                    answer = client.post(f"/pipelines/{path}", json=pipeline("big", *ops))
                    assert answer.status_code == 422, answer.text
                    problem = problem_of(answer)
                    assert f"most of it in {named}." in problem["detail"]
                    assert int(named[3]) == int(problem["errors"][0]["pointer"][-1]) + 1
            assert client.get("/healthz").status_code == 200

    def test_a_table_of_postgres_is_bounded_too(
        self, make_server: Callable[..., Any], postgres: Any
    ) -> None:
        connection, schema = postgres
        connection.execute(
            f"CREATE TABLE {schema}.processed_events (event_id integer PRIMARY KEY, source text, "
            "event_type text, data json, timestamp text)"
        )
        connection.execute(
            f"INSERT INTO {schema}.processed_events SELECT i, 's', 't', '{{\"a\": 1}}', 'x' "
            "FROM generate_series(1, 200000) AS i"
        )
        dsn = f"postgresql://postgres@127.0.0.1:5432/test?options=-csearch_path%3D{schema}"
        server = make_server(DATABASE_URL=dsn, RUN_SECONDS="0.5")
        never = {"op": "filter", "field": "data.a", "cmp": "gt", "value": 5}
        with server.client() as client:
            answer = client.post("/pipelines/run", json=pipeline("events", never))
            assert answer.status_code == 422, answer.text
            assert "op 1 filter" in problem_of(answer)["detail"]
            first = client.post("/pipelines/run", json=pipeline("events"), params={"limit": 1})
            assert first.json()["items"][0]["data"] == {"a": 1}

    def test_too_many_keys_are_refused_by_the_op_that_keeps_them(self, client: Any) -> None:
        upload(client, "keys", [{"n": n} for n in range(100_001)])
        every = {"op": "filter", "field": "n", "cmp": "ge", "value": 0}
        none = {"op": "skip", "n": 10**9}

        for op in ({"op": "distinct", "field": "n"}, {"op": "aggregate", "by": ["n"]}):
            answer = client.post("/pipelines/run", json=pipeline("keys", every, op, none))
            assert answer.status_code == 422
            assert problem_of(answer)["errors"][0]["pointer"] == "/ops/1"
            assert f"op 2 {op['op']}" in problem_of(answer)["detail"]

    @pytest.mark.parametrize(
        "url", ["postgresql://postgres@127.0.0.1:1/test", "nothing.sqlite", "server.log"]
    )
    def test_a_database_that_cannot_be_read_is_503(
        self, make_server: Callable[..., Any], url: str, needs: Any
    ) -> None:
        if url.startswith("postgresql"):
            needs.package("psycopg", "requirements-services.txt")
        server = make_server(DATABASE_URL=url)
        with server.client() as client:
            saved = client.post("/pipelines", json=pipeline("events")).json()["id"]
            for answer in (
                client.post("/pipelines/run", json=pipeline("events")),
                client.post("/pipelines/stream", json=pipeline("events")),
                client.get(f"/pipelines/{saved}/rows"),
            ):
                assert answer.status_code == 503
                assert answer.headers["retry-after"]
                assert url not in json.dumps(problem_of(answer))

    def test_a_missing_driver_refuses_the_start_by_a_sentence(
        self, make_server: Callable[..., Any], tmp_path: Path
    ) -> None:
        (tmp_path / "psycopg.py").write_text("raise ImportError")
        with pytest.raises(AssertionError, match=r"needs psycopg: pip install -r") as caught:
            make_server(DATABASE_URL="postgresql://u:secret@h/d", PYTHONPATH=str(tmp_path))
        assert "Traceback" not in str(caught.value)
        assert "secret" not in str(caught.value)

    def test_a_table_without_a_key_cannot_be_paged_through(
        self, make_server: Callable[..., Any], tmp_path: Path
    ) -> None:
        path = tmp_path / "view.sqlite"
        with sqlite3.connect(path) as connection:
            connection.execute(
                "CREATE VIEW processed_events AS SELECT 1 AS event_id, 's' AS source, "
                "'t' AS event_type, '{}' AS data, 'x' AS timestamp"
            )
        connection.close()
        server = make_server(DATABASE_URL=str(path))
        with server.client() as client:
            assert client.post("/pipelines/run", json=pipeline("events")).json()["count"] == 1
            saved = client.post("/pipelines", json=pipeline("events")).json()["id"]
            answer = client.get(f"/pipelines/{saved}/rows")
            assert answer.status_code == 422
            assert "no primary key" in problem_of(answer)["detail"]

    def test_places_for_runs_are_bounded(self, make_server: Callable[..., Any]) -> None:
        server = make_server(MAX_RUNS="1")
        with server.client() as client:
            # More than all buffers between server and client hold.
            upload(client, "long", [{"n": n, "pad": "x" * 10_000} for n in range(2_500)])
            body = pipeline("long")
            with client.stream("POST", "/pipelines/stream", json=body) as stream:
                pieces = stream.iter_raw(10)  # an iterator that is let go closes the answer
                next(pieces)
                refused = client.post("/pipelines/run", json=body)
                assert refused.status_code == 429
                assert refused.headers["retry-after"] == "1"
                problem_of(refused)
            deadline = time.monotonic() + 5
            while client.post("/pipelines/run", json=body).status_code != 200:
                assert time.monotonic() < deadline


class TestStreams:
    def test_the_last_line_is_the_end_with_the_count(self, numbers: Any) -> None:
        answer = numbers.post("/pipelines/stream", json=pipeline("numbers"))

        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert lines[-1] == {"end": True, "count": 100}
        assert [row["n"] for row in lines[:-1]] == list(range(1, 101))

    def test_it_arrives_progressively(self, client: Any) -> None:
        upload(client, "long", [{"n": n, "pad": "x" * 10_000} for n in range(4_000)])
        with client.stream("POST", "/pipelines/stream", json=pipeline("long")) as stream:
            lines = stream.iter_lines()
            assert json.loads(next(lines))["n"] == 0
            running = client.get("/metrics").text
            assert "lazy_running 1.0" in running
            rest = list(lines)
        assert json.loads(rest[-1]) == {"end": True, "count": 4_000}

    def test_an_error_on_the_way_is_the_last_line(self, make_server: Callable[..., Any]) -> None:
        server = make_server(STREAM_SECONDS="1")
        with server.client() as client:
            upload(client, "long", [{"n": n} for n in range(150_000)])
            body = pipeline("long", slow_map())
            with client.stream("POST", "/pipelines/stream", json=body) as stream:
                assert stream.status_code == 200
                last = ""
                for line in stream.iter_lines():
                    last = line
        error = json.loads(last)["error"]
        assert error["status"] == 422
        assert "too long" in error["detail"]
        assert "most of it" in error["detail"]

    def test_clients_that_leave_at_any_moment_leave_their_places(
        self, make_server: Callable[..., Any]
    ) -> None:
        server = make_server(MAX_RUNS="2")
        with server.client() as client:
            for number in range(150):
                connection = begin_stream(server, "airports")
                if number % 2:  # a reset instead of a polite end
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                time.sleep(number % 30 / 2000)
                connection.close()
            deadline = time.monotonic() + 20
            while "lazy_running 0.0" not in client.get("/metrics").text:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            answer = client.post("/pipelines/stream", json=pipeline("airports"))
            *rows, end = answer.text.splitlines()
            assert json.loads(end) == {"end": True, "count": len(rows)}
        assert "run_failed" not in server.log.read_text()

    def test_a_stopping_service_ends_its_streams_with_a_line_that_says_so(
        self, make_server: Callable[..., Any]
    ) -> None:
        server = make_server()
        with server.client() as client:
            upload(client, "long", [{"n": n, "pad": "x" * 10_000} for n in range(2_500)])
            with client.stream("POST", "/pipelines/stream", json=pipeline("long")) as stream:
                lines = stream.iter_lines()
                next(lines)
                server.process.terminate()
                rest = list(lines)
        error = json.loads(rest[-1])["error"]
        assert error["status"] == 503
        assert "stopping" in error["detail"]
        assert len(rest) < 2_500
        assert server.process.wait(timeout=10) in (0, -signal.SIGTERM)

    def test_a_client_that_reads_nothing_keeps_no_service_from_stopping(
        self, make_server: Callable[..., Any]
    ) -> None:
        server = make_server()
        with server.client() as client:
            # Each row is more than the buffers of both sides hold: something is always unread.
            upload(client, "long", [{"pad": "x" * 15_000_000}] * 3)
            with begin_stream(server, "long") as connection:
                assert connection.recv(15) == b"HTTP/1.1 200 OK"
                told = time.monotonic()
                assert server.stop() in (0, -signal.SIGTERM)
                assert time.monotonic() - told < 5

    def test_a_client_that_leaves_closes_the_cursor(
        self, make_server: Callable[..., Any], tmp_path: Path
    ) -> None:
        path = tmp_path / "big.sqlite"
        with sqlite3.connect(path) as connection:
            connection.execute(
                "CREATE TABLE processed_events (event_id INTEGER PRIMARY KEY, source TEXT, "
                "event_type TEXT, data TEXT, timestamp TEXT)"
            )
            connection.execute(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300000) "
                "INSERT INTO processed_events SELECT i, 's', 't', '{\"a\": 1}', 'x' FROM n"
            )
        connection.close()
        server = make_server(DATABASE_URL=str(path))
        process = psutil.Process(server.process.pid)

        def open_files() -> int:
            return sum(str(path) in file.path for file in process.open_files())

        never = {"op": "filter", "field": "data.a", "cmp": "gt", "value": 5}
        for ops in ([], [never]):
            body = json.dumps(pipeline("events", *ops)).encode()
            host, port = server.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as sender:
                sender.sendall(
                    b"POST /pipelines/stream HTTP/1.1\r\nHost: localhost\r\n"
                    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                    % (len(body), body)
                )
                deadline = time.monotonic() + 5
                while not open_files():
                    assert time.monotonic() < deadline
                assert not ops or open_files()
            left = time.monotonic()
            while open_files():
                assert time.monotonic() - left < 1, "the cursor is still open"
                time.sleep(0.01)

    def test_the_event_loop_never_waits_for_rows(self, client: Any) -> None:
        upload(client, "busy", [{"n": n, "t": "x" * 200} for n in range(100_000)])
        never = {"op": "filter", "field": "t", "cmp": "contains", "value": "y"}
        runs = [
            threading.Thread(target=client.post, args=("/pipelines/run",),
                             kwargs={"json": pipeline("busy", never)})
            for _ in range(3)
        ]  # fmt: skip
        for run in runs:
            run.start()
        slowest = 0.0
        while any(run.is_alive() for run in runs):
            started = time.monotonic()
            assert client.get("/healthz").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
        assert slowest < 1


class TestSavedPipelines:
    @pytest.mark.parametrize(
        "body",
        [
            pipeline("numbers", {"op": "filter", "field": "n", "cmp": "gt", "value": 10}),
            pipeline("numbers", {"op": "take", "n": 50}, {"op": "batch", "size": 4}),
            pipeline("events", {"op": "filter", "field": "source", "cmp": "eq", "value": "app"}),
            pipeline("events", {"op": "skip", "n": 900}, {"op": "map", "select": ["event_id"]}),
            pipeline("events", {"op": "filter", "field": "data.amount", "cmp": "gt", "value": 400},
                     {"op": "distinct", "field": "event_id"}),
        ],
    )  # fmt: skip
    def test_links_lead_to_the_end_and_show_everything_once(self, numbers: Any, body: Any) -> None:
        saved = numbers.post("/pipelines", json=body)
        assert saved.status_code == 201
        url: str | None = f"{saved.headers['location']}?limit=7"
        seen = []
        while url:
            answer = numbers.get(url)
            assert answer.status_code == 200, answer.text
            seen += answer.json()["items"]
            links = answer.headers["link"]
            match = re.search(r'<([^>]+)>; rel="next"', links)
            assert (match is None) is (answer.json()["next"] is None)
            assert 'rel="first"' in links
            url = match[1] if match else None

        assert (
            seen
            == numbers.post("/pipelines/run", json=body, params={"limit": 1000}).json()["items"]
        )

    def test_the_same_pipeline_has_the_same_id_and_survives_a_restart(
        self, make_server: Callable[..., Any]
    ) -> None:
        server = make_server()
        with server.client() as client:
            first = client.post("/pipelines", json=pipeline("airports")).json()["id"]
            assert client.post("/pipelines", json=pipeline("airports")).json()["id"] == first
            page = client.get(f"/pipelines/{first}/rows?limit=5").json()
        server.stop()
        server.start()
        with server.client() as client:
            after = client.get(
                f"/pipelines/{first}/rows", params={"limit": 5, "cursor": page["next"]}
            )
            assert after.status_code == 200
            assert after.json()["items"] != page["items"]

    def test_a_cursor_that_was_not_issued_for_this_plan_is_400(self, client: Any) -> None:
        one = client.post("/pipelines", json=pipeline("airports")).json()["id"]
        two = client.post("/pipelines", json=pipeline("events")).json()["id"]
        cursor = client.get(f"/pipelines/{one}/rows?limit=1").json()["next"]

        same_bytes = cursor[:-1] + chr(ord(cursor[-1]) + 1)  # decoding drops its last bits
        for bad in ("x", "ö", cursor[:-2], cursor + "A", "A" + cursor[1:], "A" * 5000,
                    cursor + "=", same_bytes):  # fmt: skip
            answer = client.get(f"/pipelines/{one}/rows", params={"cursor": bad})
            assert answer.status_code == 400, bad
            problem_of(answer)
        assert client.get(f"/pipelines/{two}/rows", params={"cursor": cursor}).status_code == 400
        for name in ("nothing", "../x", "0" * 24):
            assert client.get(f"/pipelines/{name}/rows").status_code == 404
        assert client.get(f"/pipelines/{one}/rows?limit=0").status_code == 422


class TestUploads:
    def test_csv_ndjson_and_gzip(self, client: Any) -> None:
        rows = [{"city": "Bern", "people": 134000}, {"city": 'Basel, "BS"', "people": None}]
        text = 'city,people\nBern,134000\n"Basel, ""BS""",\n'
        ndjson = "".join(f"{json.dumps(row)}\n" for row in rows)
        for content_type, body in (
            ("text/csv", text.encode()), ("text/csv; charset=utf-8", gzip.compress(text.encode())),
            ("application/x-ndjson", ndjson.encode()),
            ("text/plain", b"\xef\xbb\xbf" + ndjson.encode()),
            ("application/jsonl", gzip.compress(ndjson.encode())),
        ):  # fmt: skip
            answer = client.post("/datasets?name=cities", content=body,
                                 headers={"content-type": content_type})  # fmt: skip
            assert answer.status_code == 201, answer.text
            assert answer.json()["rows"] == 2
            assert answer.json()["fields"] == ["city", "people"]
            assert items(client, dataset="cities") == rows
        listed = {each["name"]: each for each in client.get("/datasets").json()["items"]}
        assert {"airports", "events", "cities"} <= listed.keys()
        assert listed["cities"]["kind"] == "upload"

    @pytest.mark.parametrize(
        ("body", "content_type", "status", "words"),
        [
            (b'{"a":1}\nnonsense\n', "application/x-ndjson", 422, "Line 2"),
            (b'{"a":1}\n[1]\n', "application/x-ndjson", 422, "Line 2"),
            (b'{"a":1}\n{"a":NaN}\n', "application/x-ndjson", 422, "Line 2"),
            (b'{"a":1}\n{"a":1e999}\n', "application/x-ndjson", 422, "Line 2"),
            (b'{"a":99999999999999999999}\n', "application/x-ndjson", 422, "Line 1"),
            (b'{"a":"\xff"}\n', "application/x-ndjson", 422, "Line 1"),
            (b"a,b\n1\n", "text/csv", 422, "Line 2"),
            (b"a,a\n1,2\n", "text/csv", 422, "twice"),
            (b"a,b\r1,2\r", "text/csv", 422, "Line 1"),
            (b"a\xff,b\n1,2\n", "text/csv", 422, "Line 1"),
            (b",".join(b"c%d" % n for n in range(1001)), "text/csv", 422, "1,000 fields"),
            (b"x" * 201 + b",b\n1,2\n", "text/csv", 422, "200 characters"),
            (b'{"%s":1}\n' % (b"x" * 201), "application/x-ndjson", 422, "200 characters"),
            (b'{"\\ud800":1}\n', "application/x-ndjson", 422, "Unicode"),
            (b'{"a":' + b"9" * 5000 + b"}\n", "application/x-ndjson", 422, "too many digits"),
            (b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff" * 20, "application/x-ndjson", 400, "gzip"),
            (b'{"a":' * 5000 + b"\n", "application/x-ndjson", 422, "Line 1"),
            (b'{"a":' * 100 + b"1" + b"}" * 100 + b"\n", "application/x-ndjson", 422, "levels"),
            (b"{}", "application/json", 415, "ndjson"),
            (gzip.compress(b'{"a":1}\n')[:-4], "application/x-ndjson", 400, "gzip"),
        ],
    )
    def test_bad_uploads_name_the_line_and_lose_nothing(
        self, client: Any, body: bytes, content_type: str, status: int, words: str
    ) -> None:
        upload(client, "kept", [{"a": 7}])

        answer = client.post(
            "/datasets?name=kept", content=body, headers={"content-type": content_type}
        )

        assert answer.status_code == status, answer.text
        assert words in problem_of(answer)["detail"]
        assert items(client, dataset="kept") == [{"a": 7}]

    def test_a_kill_between_rows_and_what_is_said_about_them_leaves_the_old_data_set(
        self, make_server: Callable[..., Any]
    ) -> None:
        server = make_server()
        with server.client() as client:
            upload(client, "mine", [{"old": 1}])
            upload(client, "mine", [{"older": 1}])
            upload(client, "mine", [{"old": 2}])
        server.stop()
        directory = server.data / "lazy_data" / "datasets"
        (kept,) = directory.glob("mine.*.ndjson")  # nothing of what was replaced
        # One of the time before files had names of their own.
        (directory / "past.ndjson").write_text('{"a":1}\n')
        past = {"name": "past", "kind": "upload", "fields": ["a"], "rows": 1, "bytes": 8}
        (directory / "past.json").write_text(json.dumps(past))
        # What is on the disk when it is killed in the middle of the next one.
        (directory / "mine.tmpnew.ndjson").write_text('{"new":1}\n')
        (directory / ".mine.json.tmp").write_text("{")
        (directory / "tmpnew.part").write_text("x")
        server.start()
        with server.client() as client:
            old = {"op": "filter", "field": "old", "cmp": "eq", "value": 2}
            assert items(client, old, dataset="mine") == [{"old": 2}]
            assert items(client, dataset="past") == [{"a": 1}]
        assert {path.name for path in directory.iterdir()} == {
            kept.name, "mine.json", "past.ndjson", "past.json"
        }  # fmt: skip

    def test_bad_lines_can_be_skipped(self, client: Any) -> None:
        body = b'{"a":1}\nnonsense\n[2]\n{"a":3}\n'
        answer = client.post("/datasets?name=some&bad_lines=skip", content=body, headers=NDJSON)

        assert (answer.json()["rows"], answer.json()["skipped_lines"]) == (2, 2)
        assert items(client, dataset="some") == [{"a": 1}, {"a": 3}]

    def test_names_are_checked(self, client: Any) -> None:
        for name, status in (("../x", 422), ("a" * 65, 422), ("", 422), ("airports", 409)):
            answer = client.post(
                "/datasets", params={"name": name}, content=b"{}\n", headers=NDJSON
            )
            assert answer.status_code == status
            problem_of(answer)
        assert client.post("/datasets", content=b"{}", headers=NDJSON).status_code == 422

    @pytest.mark.load
    def test_memory_stays_flat_while_rows_arrive(self, make_server: Callable[..., Any]) -> None:
        server = make_server()
        process = psutil.Process(server.process.pid)
        line = b'{"n":1,"text":"%s"}\n' % (b"x" * 500)
        with server.client() as client:
            peaks = []
            for megabytes in (4, 64):
                count = megabytes * 2000
                body = (line * 100 for _ in range(count // 100))
                answer = client.post("/datasets?name=big", content=body, headers=NDJSON)
                assert answer.json()["rows"] == count
                peaks.append(process.memory_info().rss)
        assert peaks[1] - peaks[0] < 12 * 1024 * 1024

    def test_a_small_gzip_file_cannot_fill_the_disk(self, make_server: Callable[..., Any]) -> None:
        server = make_server(MAX_UPLOAD_BYTES="200000")
        with server.client() as client:
            for lines in (b'{"a":"xxxxxxxxxxxxxxxxxxxxxxxxxxx"}\n' * 200_000, b"\n" * 5_000_000,
                          b"x\n" * 3_000_000, b"x" * 50_000_000):  # fmt: skip
                answer = client.post("/datasets?name=b&bad_lines=skip",
                                     content=gzip.compress(lines), headers=NDJSON)  # fmt: skip
                assert answer.status_code == 413
            long = (b'{"a":1}\n' * 1000 for _ in range(1000))
            assert client.post("/datasets?name=b", content=long, headers=NDJSON).status_code == 413
            assert [d["name"] for d in client.get("/datasets").json()["items"]] == [
                "airports",
                "events",
            ]
        assert not list((server.data / "lazy_data" / "datasets").glob("*.part"))


class TestDocumentation:
    def test_every_example_succeeds_when_executed_as_shown(
        self, make_server: Callable[..., Any]
    ) -> None:
        server = make_server()
        executed = 0
        with server.client() as client:
            document = client.get("/openapi.json").json()
            saved = client.post("/pipelines", json=pipeline("airports")).json()["id"]
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    params = {}
                    for parameter in operation.get("parameters", []):
                        example = parameter["schema"].get("examples", [None])[0]
                        example = example or parameter.get("example")
                        if parameter["in"] == "path":
                            path = path.replace("{id}", saved)
                        elif parameter.get("required"):
                            assert example, (path, parameter)
                            params[parameter["name"]] = example
                    content = operation.get("requestBody", {}).get("content", {})
                    for media_type, described in content.items() or [("", {})]:
                        body = described.get("example", example_of(document, described))
                        text = body if isinstance(body, str) else json.dumps(body)
                        answer = client.request(
                            method.upper(), path, params=params,
                            content=text if media_type else None,
                            headers={"content-type": media_type} if media_type else None,
                        )  # fmt: skip
                        assert answer.is_success, (path, media_type, answer.text)
                        executed += 1
        assert executed >= 13

    def test_the_examples_of_the_operations_run(self, client: Any) -> None:
        for op in client.get("/ops").json()["items"]:
            body = pipeline("airports", op["example"])
            assert client.post("/pipelines/run", json=body).status_code == 200, op
            assert op["json_schema"]["properties"]["op"]["const"] == op["op"]
            assert op["description"]

    def test_every_operation_has_a_tag_a_summary_and_declared_errors(self, client: Any) -> None:
        document = client.get("/openapi.json").json()
        for path, operations in document["paths"].items():
            for operation in operations.values():
                assert operation["tags"], path
                assert operation["summary"], path
                assert operation["operationId"], path
                assert "default" in operation["responses"], path

    def test_explain_says_what_the_database_does(self, client: Any) -> None:
        body = pipeline(
            "events", {"op": "filter", "field": "source", "cmp": "eq", "value": "app"},
            {"op": "take", "n": 5},
            {"op": "filter", "field": "data.items", "cmp": "gt", "value": 0},
        )  # fmt: skip
        plan = client.post("/pipelines/explain?analyze=true", json=body).json()

        assert 'WHERE "source"' in plan["sql"]
        assert "LIMIT" in plan["sql"]
        assert len(plan["pushed"]) == 2
        assert plan["counts"] == [5, None, None, 5]
        assert "op 3 filter" in plan["text"]
        assert "app" not in plan["sql"]

    def test_explain_counts_the_operations_as_the_pipeline_does(self, client: Any) -> None:
        body = pipeline(
            "events", {"op": "filter", "field": "source", "cmp": "eq", "value": "app"},
            {"op": "distinct", "field": "event_id"},
            {"op": "aggregate", "by": ["event_type"]},
            {"op": "filter", "field": "count", "cmp": "gt", "value": 10**6},
        )  # fmt: skip
        plan = client.post("/pipelines/explain?analyze=true", json=body).json()

        assert 'WHERE "source"' in plan["sql"]
        assert plan["pushed"][0].startswith("op 1 filter")
        assert [name in plan["text"] for name in ("op 2 distinct", "op 4 filter")] == [True, True]
        rows, first, kinds, groups, kept = plan["counts"]
        assert rows == kinds > groups > kept == 0
        assert first is None

    def test_the_pages_need_no_other_host(self, client: Any) -> None:
        for page in ("/docs", "/redoc"):
            for asset in re.findall(r'(?:src|href)="([^"]+)"', client.get(page).text):
                assert asset.startswith("/"), asset


def example_of(document: dict[str, Any], described: dict[str, Any]) -> Any:
    reference = described.get("schema", {}).get("$ref", "")
    schema = document["components"]["schemas"].get(reference.rpartition("/")[2], {})
    return schema.get("example", (schema.get("examples") or [None])[0])


class TestAccess:
    def test_a_foreign_host_or_origin_is_refused_without_a_key(self, client: Any) -> None:
        evil = {"host": "evil.example"}
        assert (
            client.post("/pipelines/run", json=pipeline("airports"), headers=evil).status_code
            == 403
        )
        origin = {"origin": "http://evil.example", **NDJSON}
        assert client.post("/datasets?name=x", content=b"{}\n", headers=origin).status_code == 403

    def test_with_a_key_everything_needs_it(self, make_server: Callable[..., Any]) -> None:
        server = make_server(API_KEY="sesame")
        with server.client() as client:
            assert client.get("/datasets").status_code == 401
            assert client.get("/datasets", headers={"x-api-key": "sesame"}).status_code == 200
        assert "sesame" not in server.log.read_text()

    def test_a_directory_that_cannot_be_used_is_one_sentence(
        self, make_server: Callable[..., Any], tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(AssertionError, match="DATA_DIR") as caught:
            make_server(DATA_DIR=str(tmp_path / "file"))
        assert "Traceback" not in str(caught.value)
