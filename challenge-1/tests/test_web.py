"""The gate every app stands behind: limits in time and size, and failures without details."""

import asyncio
import contextlib
import io
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx2
import pytest
import uvicorn
from fastapi import Depends, FastAPI, Response
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client.core import GaugeMetricFamily
from pydantic import BaseModel, Field

import web

pytestmark = pytest.mark.integration
HERE = Path(__file__).resolve().parent


class Thing(BaseModel):
    name: str = Field(max_length=5)
    number: int = Field(le=10**6)
    share: float = Field(default=0, allow_inf_nan=False)


def build(**options: Any) -> FastAPI:
    options.setdefault("limits", web.Limits(body_bytes=1000, grace_seconds=1.0, head_seconds=1.0))
    app = web.create_app(title="t", description="d", **options)

    @app.post("/things", responses=web.problems(404))
    async def things(thing: Thing) -> Thing:
        return thing

    @app.get("/boom")
    async def boom() -> Thing:
        raise RuntimeError("postgresql://user:secret@host/db")

    @app.get("/slow")
    async def slow() -> Thing:
        await asyncio.sleep(60)
        raise AssertionError("not reached")

    return app


class Log(io.StringIO):
    """What the servers of a test have logged."""

    def lines(self, containing: str) -> list[str]:
        """The lines with these words; waits for the first, since answers precede their line."""
        deadline = time.monotonic() + 5
        while containing not in self.getvalue() and time.monotonic() < deadline:
            time.sleep(0.005)
        return [line for line in self.getvalue().splitlines() if containing in line]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Takes the place of stderr, which pytest exchanges while a server still runs."""
    log = Log()
    monkeypatch.setattr(logging, "StreamHandler", partial(logging.StreamHandler, log))
    return log


@pytest.fixture
def serve(said: Log) -> Iterator[Callable[..., str]]:
    """Run an app in a server in a thread; returns its URL. It ends before its log does."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: FastAPI) -> str:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_keep_alive=1))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


HOSTILE = [
    b'{"name": NaN, "number": 1}',
    b'{"name": "a", "number": NaN}',
    b'{"name": "a", "number": 1, "share": Infinity}',
    b'{"name": "a", "number": 1e999}',
    b'{"name": "\\ud800", "number": "x"}',
    b'{"name": 1, "number": "\\udfff"}',
    b'{"name": "' + b"x" * 900 + b'", "number": 1}',
    b'{"' + b"k" * 900 + b'": 1}',
    b'{"name": "a", "number": ' + b"9" * 900 + b"}",
    b'{"name": "a", "number": 1',
    b"\xff\xfe",
    b"[" * 900,
    b"",
    b"null",
    b'"\x00"',
]


@pytest.mark.parametrize("body", HOSTILE)
def test_hostile_json_is_a_4xx_that_echoes_nothing(serve: Callable[..., str], body: bytes) -> None:
    answer = httpx2.post(
        f"{serve(build())}/things", content=body, headers={"content-type": "application/json"}
    )

    assert 400 <= answer.status_code < 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < 1000
    for echo in ("kkkkk", "xxxxxx", "99999", "\\ud800"):
        assert echo not in answer.text


def test_a_failure_inside_tells_the_client_an_id_and_the_log_the_rest(
    serve: Callable[..., str], said: Log
) -> None:
    answer = httpx2.get(f"{serve(build())}/boom")

    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    (line,) = said.lines('"event": "request_failed"')
    assert answer.headers["x-request-id"] in line
    assert "RuntimeError" in line


def test_the_wrong_media_type_is_415_with_the_cure(serve: Callable[..., str]) -> None:
    answer = httpx2.post(
        f"{serve(build())}/things", content=b"{}", headers={"content-type": "text/plain"}
    )

    assert answer.status_code == 415
    assert "application/json" in answer.json()["detail"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413_however_it_is_sent(
    serve: Callable[..., str], chunked: bool
) -> None:
    content: Any = iter([b"x" * 600, b"x" * 600]) if chunked else b"x" * 1200
    answer = httpx2.post(
        f"{serve(build())}/things", content=content, headers={"content-type": "application/json"}
    )

    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b""),
        (b"GET / HT", b""),
        (b"POST /things HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{", b"408"),
        (b"POST /none HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{", b"404"),
        (b"POST /things HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"408"),
    ],
)
def test_half_open_clients_are_closed_while_others_are_served(
    serve: Callable[..., str], sent: bytes, status: bytes, said: Log
) -> None:
    url = serve(build())
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    sockets = [socket.create_connection(address) for _ in range(5)]
    for each in sockets:
        each.sendall(sent)
    for _ in range(20):
        assert httpx2.get(f"{url}/healthz").status_code == 200
    for each in sockets:
        each.settimeout(8)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := each.recv(4096):
                received += data
        assert received[9:12] == status
        each.close()
    assert said.lines("startup complete")
    assert "Traceback" not in said.getvalue()


def test_by_default_a_half_sent_request_is_given_up_within_30_seconds() -> None:
    limits = web.Limits()

    assert limits.grace_seconds + 2 * web.SWEEP_SECONDS < 30
    assert limits.head_seconds < 30


def test_a_body_that_trickles_is_given_up_although_something_always_comes(
    serve: Callable[..., str],
) -> None:
    url = serve(build())
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as slow:
        slow.sendall(b"POST /things HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n")
        slow.settimeout(0.05)
        started, received = time.monotonic(), b""
        while not received and time.monotonic() - started < 8:
            with contextlib.suppress(TimeoutError):
                received = slow.recv(4096)
            with contextlib.suppress(OSError):
                slow.sendall(b"x")

    assert received[9:12] == b"408"


def long_answers() -> FastAPI:
    """An app whose answers do not fit between a server and a client that does not read."""
    app = build(limits=web.Limits(grace_seconds=0.5), log_level="DEBUG")

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(2000):
            yield b"x" * 65_536

    @app.get("/endless")
    async def endless() -> StreamingResponse:
        return StreamingResponse(pieces())

    @app.get("/whole")
    async def whole() -> Response:
        return Response(b"x" * 50_000_000)

    return app


def ask(port: int, path: str) -> socket.socket:
    """Send a request, read the first bytes of the answer, and nothing more."""
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    client.settimeout(10)
    assert client.recv(15) == b"HTTP/1.1 200 OK"
    return client


def test_a_long_answer_that_nobody_reads_is_cut_off(serve: Callable[..., str], said: Log) -> None:
    url = serve(long_answers())
    with ask(int(url.rpartition(":")[2]), "/endless"):
        assert said.lines("client_left")
    with httpx2.stream("GET", f"{url}/endless") as answer:
        assert sum(len(piece) for piece in answer.iter_bytes()) == 2000 * 65_536
    assert "Traceback" not in said.getvalue()
    assert "without completing" not in said.getvalue()


@pytest.mark.parametrize("path", ["/endless", "/whole"])
def test_who_does_not_read_does_not_keep_the_server_from_stopping(
    make_server: Callable[[], Any], path: str
) -> None:
    command = [sys.executable, "-m", "uvicorn", "--factory", "test_web:long_answers"]
    places = os.pathsep.join(map(str, (HERE, HERE.parent)))
    server = make_server().start(command=command, PYTHONPATH=places)
    with ask(int(server.url.rpartition(":")[2]), path):
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(5)
    assert "Application shutdown complete" in server.log.read_text()
    assert "Traceback" not in server.log.read_text()


def test_an_answer_that_never_comes_is_503(serve: Callable[..., str]) -> None:
    answer = httpx2.get(f"{serve(build(limits=web.Limits(answer_seconds=0.2)))}/slow")

    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"


def test_a_long_upload_does_not_use_up_the_time_of_its_answer(
    serve: Callable[..., str],
) -> None:
    app = build(limits=web.Limits(answer_seconds=0.4))

    def slowly() -> Iterator[bytes]:
        yield b'{"name": "a",'
        for _ in range(8):
            time.sleep(0.1)
            yield b" "
        yield b'"number": 1}'

    answer = httpx2.post(
        f"{serve(app)}/things", content=slowly(), headers={"content-type": "application/json"}
    )

    assert answer.status_code == 200


def test_a_component_that_fails_or_hangs_degrades_health_and_readiness_only(
    serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "CHECK_SECONDS", 0.1)

    async def hangs() -> bool:
        await asyncio.sleep(60)
        return True

    def fails() -> bool:
        raise OSError("10.0.0.5 is down")

    url = serve(build(checks={"good": lambda: True, "hangs": hangs, "fails": fails}))

    health, ready = httpx2.get(f"{url}/health"), httpx2.get(f"{url}/readyz")

    components = {"good": True, "hangs": False, "fails": False}
    assert (health.status_code, ready.status_code) == (503, 503)
    assert health.json() == {"status": "degraded", "components": components}
    assert ready.json()["components"] == components
    assert "10.0.0.5" not in ready.text
    assert httpx2.get(f"{url}/healthz").json() == {"status": "alive"}


def test_metrics_of_the_folder_stand_beside_those_of_the_process(
    serve: Callable[..., str],
) -> None:
    url = serve(build(collect=lambda: [GaugeMetricFamily("my_depth_bytes", "d", 7)]))
    httpx2.request("PROPFIND", f"{url}/things")

    text = httpx2.get(f"{url}/metrics").text

    assert "my_depth_bytes 7.0" in text
    assert 'http_requests_total{method="OTHER",status="405"} 1.0' in text


def test_a_refused_start_prints_one_sentence(said: Log) -> None:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        if not hasattr(app, "never"):
            raise web.StartupRefused("The database is in use by process 7.")
        yield

    server = uvicorn.Server(uvicorn.Config(build(lifespan=lifespan), port=0, log_config=None))
    with contextlib.suppress(SystemExit):
        server.run()

    assert len(said.lines("in use by process 7")) == 1
    assert "Traceback" not in said.getvalue()


def test_a_host_longer_than_a_name_is_refused_and_not_remembered(
    serve: Callable[..., str],
) -> None:
    url = serve(build())
    before = web._is_loopback_host.cache_info().currsize

    for number in range(3):
        host = f"localhost:{number}{'0' * web.HOST_BYTES}"
        assert httpx2.get(f"{url}/docs", headers={"host": host}).status_code == 403
    assert httpx2.get(f"{url}/docs", headers={"host": "localhost:1"}).status_code == 200

    assert web._is_loopback_host.cache_info().currsize <= before + 1


def test_settings_that_cannot_be_used_are_named_one_a_line_without_their_text() -> None:
    class Settings(BaseModel):
        port: int = Field(le=65_535)
        log_level: Literal["INFO"]

    with pytest.raises(SystemExit) as refused:
        web.read_settings(partial(Settings.model_validate, {"port": "hunter2", "log_level": ""}))

    assert str(refused.value).splitlines() == [
        "PORT cannot be used: Input should be a valid integer, unable to parse string as an "
        "integer. Correct or unset it.",
        "LOG_LEVEL cannot be used: Input should be 'INFO'. Correct or unset it.",
    ]
    assert web.read_settings(partial(Thing, name="ok", number=1)).number == 1


def test_piped_logs_are_one_json_object_a_line(serve: Callable[..., str], said: Log) -> None:
    httpx2.get(f"{serve(build())}/nothing%0a%22injected")

    (line,) = said.lines('"logger": "web"')

    assert json.loads(line)["status"] == 404
    assert all(json.loads(line) for line in said.getvalue().splitlines())


def test_the_documents_error_shape_replaces_the_frameworks() -> None:
    document = build().openapi()

    responses = document["paths"]["/things"]["post"]["responses"]
    assert set(responses) == {"200", "404", "422", "default"}
    for status in ("404", "422", "default"):
        assert list(responses[status]["content"]) == ["application/problem+json"]
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_a_key_is_documented_beside_the_scheme_an_operation_has_of_its_own() -> None:
    app = build(api_key="sesame")

    @app.post("/admin", dependencies=[Depends(HTTPBearer(auto_error=False))])
    async def admin() -> None:
        raise AssertionError("not reached")

    document = app.openapi()
    assert document["paths"]["/admin"]["post"]["security"] == [{"HTTPBearer": [], "apiKey": []}]
    assert document["paths"]["/things"]["post"]["security"] == [{"apiKey": []}]
    assert set(document["components"]["securitySchemes"]) == {"apiKey", "HTTPBearer"}
