"""What this service shows the world: errors, request ids, limits, access, health, metrics, docs.

`create_app` returns a FastAPI application that stands behind one ASGI gate. The gate decides per
connection who may come in, counts and times what they send, names every request, and turns every
failure into one `application/problem+json` shape. This file is the same in every folder of the
repository, so that each folder can be taken away alone.
"""

import asyncio
import gc
import hmac
import importlib
import importlib.util
import inspect
import ipaddress
import itertools
import json
import logging
import re
import signal
import socket
import sys
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
import structlog
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.stdlib.get_logger("web")
_stdlib_log = logging.getLogger("web")  # its level is cheap to ask

CHECK_SECONDS = 2.0  # a dependency that has not answered a readiness check by then is down
STOP_GRACE_SECONDS = 0.25  # what clients get to send and to read once the server is told to stop
SWEEP_SECONDS = 0.5  # between looks at what waits for clients
REPORTED_ERRORS = 20
HOST_BYTES = 300  # of a name and a port; hosts are remembered, so longer ones are refused
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
KNOWN_METHODS = SAFE_METHODS | {"POST", "PUT", "PATCH", "DELETE"}
HEALTH_PATHS = frozenset({"/health", "/healthz", "/readyz"})
# The pages only describe the service; they stay readable so that Authorize can be pressed on them.
PAGE_PATHS = frozenset({"/", "/docs", "/redoc", "/openapi.json"})
PAGE_ASSETS = "/static-offline-docs/"
REQUEST_ID = re.compile(rb"[A-Za-z0-9._~:/+=-]{1,128}")

Check = Callable[[], bool | Awaitable[bool]]
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Any]]
S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True)
class Limits:
    """How much a client may send, and how slowly it may send and read.

    A body of `body_bytes` at most (routes named in `create_app(streaming=)` count for themselves),
    which has to arrive within `grace_seconds` plus one second per `bytes_per_second` received; a
    request head within `head_seconds`; the first byte of an answer within `answer_seconds`. A long
    answer is cut off when nobody reads for `grace_seconds`.
    """

    body_bytes: int = 1024 * 1024
    grace_seconds: float = 20.0
    bytes_per_second: int = 4096
    head_seconds: float = 20.0
    answer_seconds: float = 120.0


class Problem(HTTPException):
    """An answer of status 4xx or 5xx, in sentences; `members` are added to its JSON."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: Iterable[Mapping[str, Any]] = (),
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.errors = list(errors)
        self.members = members


class StartupRefused(RuntimeError):
    """Raised in a lifespan when the service cannot start; the server prints only its sentence."""


class ProblemError(BaseModel):
    """One of the reasons for a problem."""

    pointer: str | None = Field(default=None, description="Where, as a JSON pointer.")
    message: str


class ProblemDocument(BaseModel):
    """The one shape of every 4xx and 5xx answer (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[ProblemError] | None = None


class Health(BaseModel):
    """Whether each component answers."""

    status: str = Field(examples=["healthy"])
    components: dict[str, bool]


def problems(*statuses: int, **details: str) -> dict[int | str, dict[str, Any]]:
    """Declare the errors of an operation: `responses=problems(404, 429)`."""
    return {
        status: {
            "description": details.get(f"_{status}", HTTPStatus(status).phrase),
            "content": {"application/problem+json": {"schema": _PROBLEM_REF}},
        }
        for status in statuses
    }


_PROBLEM_REF = {"$ref": "#/components/schemas/ProblemDocument"}


def create_app(
    *,
    title: str,
    description: str,
    version: str = "1.0.0",
    lifespan: Lifespan | None = None,
    api_key: str | None = None,
    log_level: str = "INFO",
    limits: Limits | None = None,
    checks: Mapping[str, Check] | None = None,
    collect: Callable[[], Iterable[Metric]] = tuple,
    fast: Mapping[str, ASGIApp] | None = None,
    streaming: Iterable[str] = (),
    tags: list[dict[str, str]] | None = None,
) -> FastAPI:
    """Build the application behind its gate.

    `checks` are the components of `/health` and `/readyz`, `collect` yields more metric families.
    `fast` maps exact paths to ASGI applications that answer POST there ahead of the router; they
    must be documented by an ordinary route of the same path. Paths in `streaming` have no limit on
    the body as a whole. `app.state.stopping` is an event, set as soon as the server is told to
    stop: whatever waits for long (long polls, event streams) ends with it.
    """
    limits = limits or Limits()
    gate = Gate(
        limits=limits,
        key=api_key.encode() if api_key else None,
        fast=fast or {},
        streaming=frozenset(streaming),
    )

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[Any]:
        configure_logging(log_level)
        gate.stopping = app.state.stopping = asyncio.Event()
        with _on_stop_signal(gate.stop):
            gc.collect()
            gc.freeze()  # what was imported stays: the collector need not look at it again
            if lifespan is None:
                yield
            else:
                async with lifespan(app) as state:
                    yield state

    app = App(
        gate,
        title=title,
        description=description,
        version=version,
        lifespan=running,
        openapi_tags=tags,
        docs_url=None,
        redoc_url=None,
    )
    app.state.stopping = gate.stopping
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(Exception, _on_failure)
    _add_docs(app)
    _add_service_routes(app, checks or {}, collect, gate)
    _close_stalled_connections(limits.head_seconds)
    return app


class App(FastAPI):
    """A FastAPI application whose gate stands before everything else."""

    def __init__(self, gate: "Gate", **options: Any) -> None:
        super().__init__(**options)
        self.gate = gate
        gate.inner = super().__call__
        gate.app = self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        await self.gate(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """The generated document, with the one error shape, and the key where one is set."""
        if self.openapi_schema is None:
            _describe_problems(super().openapi(), secured=self.gate.key is not None)
        return super().openapi()


def read_settings(kind: Callable[[], S]) -> S:
    """Read them from the environment; what cannot be used ends the process with a line each."""
    try:
        return kind()
    except ValidationError as error:
        wrong = [
            f"{'_'.join(map(str, each['loc'])).upper() or 'The environment'} cannot be used: "
            f"{_message(each).removesuffix('.')}. Correct or unset it."
            for each in error.errors()
        ]
    except UnicodeDecodeError:
        wrong = ["The file .env cannot be used: it is not valid UTF-8."]
    sys.exit("\n".join(wrong))


def serve(app: FastAPI, *, port: int, host: str = "127.0.0.1") -> None:
    """Run the app until it is stopped; a port in use ends the process with one line naming it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            sys.exit(
                f"Port {port} on {host} cannot be used: {error.strerror}. Set PORT to another."
            )
    uvicorn.run(app, host=host, port=port)


# --- the gate ---------------------------------------------------------------------------------


class Gate:
    """Stands between the server and the app: who, how much, how long, and what failed."""

    inner: ASGIApp
    app: FastAPI

    def __init__(
        self,
        *,
        limits: Limits,
        key: bytes | None,
        fast: Mapping[str, ASGIApp],
        streaming: frozenset[str],
    ) -> None:
        self.limits = limits
        self.key = key
        self.fast = fast
        self.streaming = streaming
        self.stopping = asyncio.Event()
        self.requests: dict[tuple[str, int], int] = {}
        self.waiting: set[_Wait] = set()  # for clients; one timer watches all of them
        self.sweep: asyncio.TimerHandle | None = None
        self._process_id = uuid.uuid4().hex[:16]
        self._counter = itertools.count()

    def stop(self) -> None:
        """End what waits for clients: the server has been told to stop."""
        self.stopping.set()
        _later(STOP_GRACE_SECONDS, self.give_up_slow_clients)
        _later(2 * STOP_GRACE_SECONDS, _abort_unread)

    def give_up_slow_clients(self) -> None:
        """Cancel the waits that took too long, and look again while there are others."""
        now = time.monotonic()
        for wait in self.waiting:
            if not wait.gave_up and (self.stopping.is_set() or wait.deadline <= now):
                wait.gave_up = True
                wait.task.cancel()
        self.sweep = None
        if self.waiting:
            self.sweep = _later(SWEEP_SECONDS, self.give_up_slow_clients)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()
        elif scope["type"] == "lifespan":
            await self.inner(scope, receive, _without_traceback(send))
        else:  # no folder speaks WebSocket
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    def refusal(self, scope: Scope, host: bytes, origin: bytes, given: bytes) -> Problem | None:
        """Why this connection may not do what it asks, or None."""
        path = scope["path"]
        if origin and scope["method"] not in SAFE_METHODS:
            own = host.lower()
            if origin.lower() not in (b"http://" + own, b"https://" + own):
                return Problem(
                    403,
                    "A page of another origin asked for a change. Only pages of this service and "
                    "clients that send no Origin header may write.",
                )
        if self.key is None:
            peer = scope["client"][0] if scope.get("client") else ""
            if _is_loopback(peer) and len(host) <= HOST_BYTES and _is_loopback_host(host):
                return None
            return Problem(
                403,
                "No API key is set, so only this machine is served, under a loopback name. To "
                "serve others set the environment variable API_KEY and send it as X-API-Key.",
            )
        if path in HEALTH_PATHS or path in PAGE_PATHS or path.startswith(PAGE_ASSETS):
            return None
        if hmac.compare_digest(given, self.key):
            return None
        return Problem(
            401,
            "This operation needs the header X-API-Key with the key of this service.",
            headers={"WWW-Authenticate": 'ApiKey realm="X-API-Key"'},
        )

    def new_id(self) -> str:
        """A request id: random per process, counted within it."""
        return f"{self._process_id}-{next(self._counter):x}"


class _Wait:
    """A wait for the client; leaving it raises `_GaveUp` when that took too long."""

    __slots__ = ("deadline", "gate", "gave_up", "task")

    def __init__(self, gate: Gate, deadline: float) -> None:
        self.gate = gate
        self.deadline = deadline
        self.gave_up = False
        self.task = cast("asyncio.Task[Any]", asyncio.current_task())

    def __enter__(self) -> None:
        gate = self.gate
        gate.waiting.add(self)
        if gate.sweep is None:
            gate.sweep = _later(SWEEP_SECONDS, gate.give_up_slow_clients)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.gate.waiting.discard(self)
        if kind is asyncio.CancelledError and self.gave_up and self.task.uncancel() == 0:
            raise _GaveUp from None


class _GaveUp(Exception):
    """The client was too slow, or the server stops."""


class _Exchange:
    """One request and its answer."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self.gate = gate
        self.scope = scope
        self.source = receive
        self.send_to = send
        self.received = 0
        self.more = True
        self.sending = self.answered = False
        self.status = 0
        self.started = 0.0
        self.limit: int | None = None
        self.patience: asyncio.Timeout | None = None
        self.id = ""

    async def run(self) -> None:
        gate, scope = self.gate, self.scope
        self.started = time.monotonic()
        host = origin = key = length = given_id = b""
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"content-length":
                length = value
            elif name == b"origin":
                origin = value
            elif name == b"x-api-key":
                key = value
            elif name == b"x-request-id":
                given_id = value
        if given_id and REQUEST_ID.fullmatch(given_id):
            self.id = given_id.decode("ascii")
        else:
            self.id = gate.new_id()
        scope["request_id"] = self.id
        path = scope["path"]
        if path not in gate.streaming:
            self.limit = gate.limits.body_bytes
        refusal = gate.refusal(scope, host, origin, key)
        if refusal is None and self.limit is not None and length.isdigit():
            refusal = self._too_large() if int(length) > self.limit else None
        handler = gate.fast.get(path) if scope["method"] == "POST" else None
        try:
            if refusal is not None:
                await self._fail(refusal)
            elif handler is not None:
                scope["app"] = gate.app
                await handler(scope, self.receive, self.send)
            else:
                await self._answer_in_time()
        except HTTPException as problem:
            await self._fail(problem)
        except (ClientDisconnect, ConnectionError):
            log.debug("client_left", request_id=self.id, path=path)
        except Exception as error:
            # The boundary: whatever went wrong inside, the client gets one shape and no details.
            log.exception(
                "request_failed", request_id=self.id, path=path, error=type(error).__name__
            )
            await self._fail(Problem(500, _FAILURE))
        finally:
            method = scope["method"] if scope["method"] in KNOWN_METHODS else "OTHER"
            gate.requests[method, self.status] = gate.requests.get((method, self.status), 0) + 1
            if self.status >= 400 or _stdlib_log.isEnabledFor(logging.DEBUG):
                self._report(path)

    async def receive(self) -> Message:
        """The server's receive, counted and timed while a body is expected."""
        if not self.more:
            return await self.source()
        limits = self.gate.limits
        deadline = self.started + limits.grace_seconds + self.received / limits.bytes_per_second
        try:
            with _Wait(self.gate, deadline):
                message = await self.source()
        except _GaveUp:
            raise self._too_slow() from None
        if self.patience is not None:  # for the answer; it begins anew with every piece
            now = asyncio.get_running_loop().time()
            self.patience.reschedule(now + limits.answer_seconds)
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            self.more = message.get("more_body", False)
            if self.limit is not None and self.received > self.limit:
                raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        """The server's send, with the request id on the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.patience is not None:
                self.patience.reschedule(None)  # a streamed answer may take as long as it likes
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", self.id.encode("ascii")),
            ]
            await self.send_to(message)
            return
        self.answered = not message.get("more_body", False)
        if self.sending:
            await self._send_more(message)
        else:
            self.sending = True
            await self.send_to(message)

    async def _send_more(self, message: Message) -> None:
        """A further piece of an answer; it waits until the client has read of those before it."""
        try:
            with _Wait(self.gate, time.monotonic() + self.gate.limits.grace_seconds):
                await self.send_to(message)
        except _GaveUp:
            _abort(self.scope)
            raise ConnectionError("The client does not read its answer.") from None

    async def _answer_in_time(self) -> None:
        try:
            async with asyncio.timeout(self.gate.limits.answer_seconds) as self.patience:
                await self.gate.inner(self.scope, self.receive, self.send)
        except TimeoutError:
            patience, self.patience = self.patience, None
            if patience is None or not patience.expired():
                raise
            raise Problem(
                503, "The answer took too long and was given up.", headers={"Retry-After": "5"}
            ) from None

    def _too_large(self) -> Problem:
        return Problem(413, f"The body is larger than the {self.limit:,} bytes accepted here.")

    def _too_slow(self) -> Problem:
        if self.gate.stopping.is_set():
            return Problem(
                503,
                "The service is stopping; nothing of this request was kept. Send it again.",
                headers={"Retry-After": "2", "Connection": "close"},
            )
        return Problem(
            408,
            f"The body stalled: {self.received:,} bytes came in "
            f"{time.monotonic() - self.started:.0f} s. Nothing of it was kept.",
            headers={"Connection": "close"},
        )

    async def _fail(self, problem: HTTPException) -> None:
        if self.status:
            if self.answered:  # the framework's own handler has answered before it raised
                return
            raise problem  # the answer has begun: cutting the connection is the only honest end
        response = problem_response(self.scope, problem)
        try:
            await response(self.scope, self.source, self.send)
        except (ClientDisconnect, ConnectionError):
            log.debug("client_left", request_id=self.id)

    def _report(self, path: str) -> None:
        level = logging.WARNING if self.status >= 500 else logging.INFO
        log.log(
            level if self.status >= 400 else logging.DEBUG,
            "request",
            request_id=self.id,
            method=self.scope["method"],
            path=path[:200],
            status=self.status,
            ms=round((time.monotonic() - self.started) * 1000, 2),
        )


def _without_traceback(send: Send) -> Send:
    async def quiet(message: Message) -> None:
        if message["type"] == "lifespan.startup.failed":
            error = sys.exception()
            if isinstance(error, StartupRefused):
                message = {**message, "message": str(error)}
        await send(message)

    return quiet


@contextmanager
def _on_stop_signal(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` in the loop as soon as the server receives SIGINT or SIGTERM."""
    loop = asyncio.get_running_loop()
    previous: dict[signal.Signals, Any] = {}

    def chained(number: int, frame: Any) -> None:
        loop.call_soon_threadsafe(stop)
        if callable(handler := previous[signal.Signals(number)]):
            handler(number, frame)

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            handler = signal.getsignal(number)
            if callable(handler) and handler is not signal.default_int_handler:
                previous[number] = handler
                signal.signal(number, chained)
        except ValueError:  # not the main thread: there are no signals to listen to
            break
    try:
        yield
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is chained:
                signal.signal(number, handler)


_connections: "weakref.WeakSet[Any]" = weakref.WeakSet()  # uvicorn's protocols, of all servers


def _abort(scope: Scope) -> None:
    """Cut the connection of a request, whatever of the answer is unread."""
    for each in list(_connections):
        if each.cycle is not None and each.cycle.scope is scope:
            each.transport.abort()


def _abort_unread() -> None:
    """Cut connections with unread answers, again and again, until this loop has none at all."""
    loop = asyncio.get_running_loop()
    own = [each for each in _connections if each.loop is loop and each in each.connections]
    for each in own:
        if each.transport.get_write_buffer_size():
            each.transport.abort()
    if own:
        _later(STOP_GRACE_SECONDS, _abort_unread)


def _later(seconds: float, call: Callable[..., None], *arguments: Any) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(seconds, call, *arguments)


def _close_stalled_connections(head_seconds: float) -> None:
    """Teach uvicorn to give up on request heads that never end.

    It has no time limit of its own there (nor for what follows an early answer). One sweep per
    server looks at its connections; one that waited for a head in two looks in a row is closed.
    The limit is that of the app made last in this process.
    """
    for protocol in _uvicorn_protocols():
        if not hasattr(protocol, "sweep_seconds"):
            protocol.connection_made = _sweeping(protocol.connection_made)
        protocol.sweep_seconds = head_seconds / 2


def _uvicorn_protocols() -> Iterator[Any]:
    yield importlib.import_module("uvicorn.protocols.http.h11_impl").H11Protocol
    if importlib.util.find_spec("httptools"):  # an optional accelerator
        yield importlib.import_module("uvicorn.protocols.http.httptools_impl").HttpToolsProtocol


def _sweeping(connection_made: Callable[[Any, Any], None]) -> Any:
    def sweep(protocol: Any, state: Any, seen: dict[Any, Any]) -> None:
        waiting = {
            each: each.cycle
            for each in list(state.connections)
            if getattr(each, "timeout_keep_alive_task", True) is None
            and (each.cycle is None or each.cycle.response_complete)
        }
        for each, cycle in waiting.items():
            if each in seen and seen[each] is cycle:
                each.transport.close()
        state.sweep = None
        if state.connections:
            schedule(protocol, state, waiting)

    def schedule(protocol: Any, state: Any, seen: dict[Any, Any]) -> None:
        state.sweep = _later(protocol.sweep_seconds, sweep, protocol, state, seen)

    def made(protocol: Any, transport: Any) -> None:
        connection_made(protocol, transport)
        _connections.add(protocol)
        if getattr(protocol.server_state, "sweep", None) is None:
            schedule(type(protocol), protocol.server_state, {})

    return made


@lru_cache(maxsize=1024)
def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


@lru_cache(maxsize=1024)
def _is_loopback_host(host: bytes) -> bool:
    name = host.decode("latin-1").lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return name == "localhost" or _is_loopback(name)


# --- errors -----------------------------------------------------------------------------------


def problem_response(scope: Scope, problem: HTTPException) -> Response:
    """The problem as an answer; its headers (Allow, Retry-After, …) are kept."""
    document: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(problem.status_code).phrase,
        "status": problem.status_code,
        "detail": str(problem.detail),
        "request_id": scope.get("request_id", ""),
    }
    if isinstance(problem, Problem):
        if problem.errors:
            document["errors"] = problem.errors[:REPORTED_ERRORS]
        document.update(problem.members)
    return Response(
        json.dumps(document, allow_nan=False),  # ASCII, so that no string can fail to encode
        problem.status_code,
        headers=problem.headers,
        media_type="application/problem+json",
    )


async def _on_http_exception(request: Request, error: Exception) -> Response:
    problem = cast("HTTPException", error)
    if not isinstance(problem, Problem) and problem.status_code in _SENTENCES:
        problem = HTTPException(
            problem.status_code, _SENTENCES[problem.status_code], problem.headers
        )
    return problem_response(request.scope, problem)


async def _on_failure(request: Request, error: Exception) -> Response:
    del error  # the framework raises it again, and the gate logs it
    return problem_response(request.scope, Problem(500, _FAILURE))


_FAILURE = "The service failed; its log names this request id."
_SENTENCES = {
    404: "There is nothing at this path. The operations are listed at /docs.",
    405: "This path does not know that method; the Allow header names those it knows.",
    400: "The body could not be read as what this operation takes.",
}


async def _on_validation_error(request: Request, error: Exception) -> Response:
    found = cast("RequestValidationError", error).errors()
    if any(entry["type"] == "json_invalid" for entry in found):
        return problem_response(request.scope, Problem(400, "The body is not valid JSON."))
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if any(entry["loc"] == ("body",) for entry in found) and "json" not in media_type:
        return problem_response(
            request.scope,
            Problem(415, "This operation takes JSON: send Content-Type: application/json."),
        )
    errors = [
        {"pointer": _pointer(entry["loc"]), "message": _message(entry)}
        for entry in found[:REPORTED_ERRORS]
    ]
    places = "1 place" if len(found) == 1 else f"{len(found)} places"
    return problem_response(
        request.scope, Problem(422, f"The request does not fit in {places}.", errors=errors)
    )


def _pointer(location: Iterable[Any]) -> str:
    parts = (str(part)[:64].encode("utf-8", "replace").decode() for part in location)
    return "/" + "/".join(part.replace("~", "~0").replace("/", "~1") for part in parts)


def _message(entry: Mapping[str, Any]) -> str:
    if entry["type"] == "union_tag_invalid":  # pydantic's sentence repeats what was sent
        return f"The tag is none of {entry.get('ctx', {}).get('expected_tags', 'those known')}."
    sentence = str(entry["msg"]).removeprefix("Value error, ")  # ours, raised in a validator
    return sentence[:300].encode("utf-8", "replace").decode()


# --- pages ------------------------------------------------------------------------------------


def _add_docs(app: FastAPI) -> None:
    """Swagger UI and ReDoc from an installed package, so that they work with the network off."""
    urls: dict[str, dict[str, Any]] = {"swagger": {}, "redoc": {}}
    if (package := importlib.util.find_spec("fastapi_offline")) and package.origin:
        assets = Path(package.origin).parent / "static"
        app.mount(PAGE_ASSETS.rstrip("/"), StaticFiles(directory=assets), name="docs-assets")
        icon = f"{PAGE_ASSETS}favicon.png"
        urls["swagger"] = {
            "swagger_js_url": f"{PAGE_ASSETS}swagger-ui-bundle.js",
            "swagger_css_url": f"{PAGE_ASSETS}swagger-ui.css",
            "swagger_favicon_url": icon,
        }
        urls["redoc"] = {
            "redoc_js_url": f"{PAGE_ASSETS}redoc.standalone.js",
            "redoc_favicon_url": icon,
        }

    @app.get("/", include_in_schema=False)
    async def lead_to_docs() -> RedirectResponse:
        return RedirectResponse("docs")

    @app.get("/docs", include_in_schema=False)
    async def swagger() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json", title=f"{app.title} - Swagger UI", **urls["swagger"]
        )

    @app.get("/redoc", include_in_schema=False)
    async def redoc() -> HTMLResponse:
        return get_redoc_html(
            openapi_url="/openapi.json",
            title=f"{app.title} - ReDoc",
            with_google_fonts=False,
            **urls["redoc"],
        )


def _add_service_routes(
    app: FastAPI,
    checks: Mapping[str, Check],
    collect: Callable[[], Iterable[Metric]],
    gate: Gate,
) -> None:
    registry = CollectorRegistry()
    registry.register(_Figures(collect, gate))

    @app.get("/healthz", tags=["service"], summary="Is the process alive?")
    async def healthz() -> dict[str, str]:
        """Answer from memory; no dependency is touched."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["service"], summary="Can it take work now?", responses=problems(503))
    async def readyz() -> Health:
        """Ask every component, each within two seconds; 503 while one is down or on shutdown."""
        components = await _ask(checks)
        if app.state.stopping.is_set():
            raise Problem(503, "The service is stopping.", components=components)
        if down := [name for name, works in components.items() if not works]:
            raise Problem(
                503,
                f"Not ready: {', '.join(down)} does not answer.",
                headers={"Retry-After": "2"},
                components=components,
            )
        return Health(status="ready", components=components)

    @app.get(
        "/health",
        tags=["service"],
        summary="The state of each component",
        responses={503: {"model": Health, "description": "A component is down."}},
    )
    async def health() -> JSONResponse:
        """`healthy` when every component answers, else `degraded` with status 503."""
        components = await _ask(checks)
        healthy = all(components.values())
        return JSONResponse(
            {"status": "healthy" if healthy else "degraded", "components": components},
            200 if healthy else 503,
        )

    @app.get(
        "/metrics",
        tags=["service"],
        summary="Figures for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """The figures of the service and of its process, in the Prometheus text format."""
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")


async def _ask(checks: Mapping[str, Check]) -> dict[str, bool]:
    async def ask(check: Check) -> bool:
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                answer = check()
                return bool(await answer if inspect.isawaitable(answer) else answer)
        except Exception as error:  # noqa: BLE001  (any failure of a dependency means: down)
            log.warning("check_failed", error=type(error).__name__)
            return False

    answers = await asyncio.gather(*(ask(check) for check in checks.values()))
    return dict(zip(checks, answers, strict=True))


class _Figures(Collector):
    """The process, the requests, and whatever the folder adds."""

    def __init__(self, collect: Callable[[], Iterable[Metric]], gate: Gate) -> None:
        self._collect = collect
        self._gate = gate
        self._process = psutil.Process()

    def collect(self) -> Iterable[Metric]:
        process = self._process
        with process.oneshot():
            times, memory = process.cpu_times(), process.memory_info()
        cpu = CounterMetricFamily("process_cpu_seconds", "CPU time used by this process.")
        cpu.add_metric([], times.user + times.system)
        yield cpu
        yield GaugeMetricFamily(
            "process_resident_memory_bytes", "Memory held by this process.", memory.rss
        )
        if hasattr(process, "num_fds"):
            yield GaugeMetricFamily(
                "process_open_fds", "File descriptors open in this process.", process.num_fds()
            )
        requests = CounterMetricFamily(
            "http_requests", "Requests answered.", labels=["method", "status"]
        )
        for (method, status), count in sorted(self._gate.requests.items()):
            requests.add_metric([method, str(status)], count)
        yield requests
        yield from self._collect()


def _describe_problems(document: dict[str, Any], *, secured: bool) -> None:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    problem = ProblemDocument.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(problem.pop("$defs"))
    schemas["ProblemDocument"] = problem
    content = {"application/problem+json": {"schema": _PROBLEM_REF}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            if "422" in responses:
                responses["422"] = {"description": "Unprocessable Content", "content": content}
            responses.setdefault("default", {"description": "A problem.", "content": content})
            if secured and path not in HEALTH_PATHS:  # beside what the operation itself asks for
                own = operation.get("security") or [{}]
                operation["security"] = [{**each, "apiKey": []} for each in own]
    if secured:
        schemes = components.setdefault("securitySchemes", {})
        schemes["apiKey"] = {"type": "apiKey", "in": "header", "name": "X-API-Key"}


# --- logs -------------------------------------------------------------------------------------


def configure_logging(level: str = "INFO") -> None:
    """Log to stderr: readable on a terminal, one JSON object a line when piped."""
    terminal = sys.stderr.isatty()
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[Any] = (
        [structlog.dev.ConsoleRenderer()]
        if terminal
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder(allow=())],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error"):
        server = logging.getLogger(name)
        server.handlers.clear()
        server.propagate = True
    for name in ("httpx", "httpx2"):  # clients that would log every request they make
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    access = logging.getLogger("uvicorn.access")  # the gate writes one line per request itself
    access.handlers.clear()
    access.propagate = False
