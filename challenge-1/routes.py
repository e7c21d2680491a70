"""Bodies over HTTP: the one way in for every pipeline, ahead of the framework's router.

Every microsecond counts here, so these are ASGI applications behind the gate; ordinary routes of
the same paths document them.
"""

import asyncio
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Final
from urllib.parse import parse_qs

import msgspec
from fastapi import Depends, FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

import web
from parsing import BodyError, decoder_of, form_of
from signatures import Signature
from sketches import SketchesMissing
from utils import (
    Busy,
    Intake,
    KeyReused,
    Pipeline,
    PipelineConflict,
    PipelineUnknown,
    Projection,
    QueueRefused,
    Receipt,
    StoreRefused,
)

BUILT_IN: Final = {"/webhook": "webhook", "/webhook/ingest": "events", "/webhook/batch": "events"}
JSON_HEADERS = [(b"content-type", b"application/json")]
EVENTS_PATH = re.compile(r"/pipelines/([A-Za-z0-9_-]{1,64})/events")
MAX_RECORDS_CHARS = 512


def pipeline_of(request: Request) -> Pipeline:
    """The running pipeline."""
    pipeline: Pipeline = request.app.state.pipeline
    return pipeline


Running = Annotated[Pipeline, Depends(pipeline_of)]


def json_example(example: Any) -> dict[str, Any]:
    """What the documentation shows as the body of a request."""
    return {"requestBody": {"content": {"application/json": {"example": example}}}}


class IngestRoutes(Mapping[str, ASGIApp]):
    """The paths that take events: those built in, and `/pipelines/{name}/events`."""

    def __init__(self, built_in: Mapping[str, str], keys: list[bytes]) -> None:
        self._routes = {path: ingest(name, keys) for path, name in built_in.items()}
        self._keys = keys

    def __getitem__(self, path: str) -> ASGIApp:
        route = self._routes.get(path)
        if route is None:
            match = EVENTS_PATH.fullmatch(path)
            if match is None:
                raise KeyError(path)
            route = ingest(match[1], self._keys)
        return route

    def __iter__(self) -> Iterator[str]:
        return iter(self._routes)

    def __len__(self) -> int:
        return len(self._routes)


class StreamingPaths(frozenset[str]):
    """The paths whose bodies may be of any size, `/pipelines/{name}/events` among them."""

    def __contains__(self, path: object) -> bool:
        return super().__contains__(path) or bool(EVENTS_PATH.fullmatch(str(path)))


def ingest(name: str, keys: list[bytes]) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The ASGI application that takes bodies for one pipeline."""

    async def take(scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        pipeline: Pipeline = scope["app"].state.pipeline
        try:
            projection = await pipeline.catalogue.current(name)
            query = scope["query_string"]
            asked = parse_qs(query.decode("latin-1"), max_num_fields=8) if query else {}
            receipt, repeated = await _take(pipeline, projection, scope, receive, asked, keys)
        except Exception as error:
            problem = problem_of(error)
            if problem is None:
                raise
            raise problem from error
        if receipt.status != 202:
            raise web.Problem(
                receipt.status,
                _refusal_sentence(receipt),
                errors=receipt.errors,
                accepted=0,
                rejected=receipt.rejected,
                duplicates=0,
            )
        if asked.get("wait") == ["applied"]:
            await until(scope["app"], pipeline.applied(receipt.position))
        now = time.monotonic()
        pipeline.latencies.add(now - started, now)
        body = (
            b'{"accepted":%d,"rejected":%d,"duplicates":%d,"filtered":%d,"errors":%s,"position":%d}'
            % (
                receipt.accepted, receipt.rejected, receipt.duplicates, receipt.filtered,
                msgspec.json.encode(receipt.errors) if receipt.errors else b"[]", receipt.position,
            )
        )  # fmt: skip
        headers = [*JSON_HEADERS, (b"content-length", b"%d" % len(body))]
        if repeated:
            headers.append((b"idempotent-replayed", b"true"))
        await send({"type": "http.response.start", "status": 202, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return take


def problem_of(error: Exception) -> web.Problem | None:
    """What the pipeline refuses, as an answer; None for a fault of this program."""
    if isinstance(error, BodyError):
        return web.Problem(error.status, str(error))
    if isinstance(error, Busy):
        return web.Problem(429, str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, KeyReused):
        return web.Problem(422, str(error))
    if isinstance(error, SketchesMissing):
        return web.Problem(501, str(error))
    if isinstance(error, PipelineUnknown):
        return web.Problem(404, str(error))
    if isinstance(error, PipelineConflict):
        return web.Problem(409, str(error))
    if isinstance(error, StoreRefused):
        return web.Problem(503, str(error), headers={"Retry-After": "2"})
    if isinstance(error, QueueRefused):
        status = 507 if error.full else 503
        return web.Problem(status, str(error), headers={"Retry-After": "5"})
    return None


async def until(app: FastAPI, done: Awaitable[Any], seconds: float | None = None) -> None:
    """Wait for it, or until the server is told to stop, or for so long."""
    waits = {asyncio.ensure_future(done), asyncio.ensure_future(app.state.stopping.wait())}
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def _take(
    pipeline: Pipeline,
    projection: Projection,
    scope: Scope,
    receive: Receive,
    asked: Mapping[str, list[str]],
    keys: list[bytes],
) -> tuple[Receipt, bool]:
    """Read, parse and commit one body; the flag says that an earlier answer is repeated."""
    content_type = encoding = key_text = message_id = timestamp = given = ""
    for name, value in scope["headers"]:
        if name == b"content-type":
            content_type = value.decode("latin-1")
        elif name == b"content-encoding":
            encoding = value.decode("latin-1")
        elif name == b"idempotency-key":
            key_text = value.decode("latin-1")
        elif name == b"webhook-id":
            message_id = value.decode("latin-1")
        elif name == b"webhook-timestamp":
            timestamp = value.decode("latin-1")
        elif name == b"webhook-signature":
            given = value.decode("latin-1")
    signature = None
    if keys:
        signature = Signature(keys, message_id, timestamp, given, pipeline.clock())
    form, inflate = form_of(content_type), decoder_of(encoding)
    records = asked.get("records", [""])[0]
    if len(records) > MAX_RECORDS_CHARS:
        raise BodyError(422, f"A record path has at most {MAX_RECORDS_CHARS} characters.")
    key_text = key_text or message_id
    if len(key_text) > 255:
        raise BodyError(422, "An Idempotency-Key has at most 255 characters.")
    pipeline.admit()
    message = await receive()
    if not (inflate or key_text or signature or records or message.get("more_body", True)):
        block = pipeline.read_whole(projection, form, message["body"])
        if block is not None:
            pipeline.waiting += 1
            try:
                return await pipeline.accept(projection, [block]), False
            finally:
                pipeline.waiting -= 1
    reader = pipeline.reader(projection, form, records)
    inflater = inflate() if inflate else None
    digest = hashlib.blake2b(digest_size=16) if key_text else None
    intake = pipeline.intake(projection)
    pipeline.waiting += 1
    try:
        while True:
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            data = message.get("body", b"")
            if signature is not None:
                signature.update(data)
            for piece in inflater.feed(data) if inflater else (data,):
                await _feed(reader.feed(piece), intake, digest, piece)
            if not message.get("more_body", False):
                break
            message = await receive()
        if signature is not None:
            signature.verify()
        if inflater is not None:
            for piece in inflater.finish():
                await _feed(reader.feed(piece), intake, digest, piece)
        await _feed(reader.finish(), intake, None, b"")
        key = None
        if digest is not None:
            key = (pipeline.digest(f"{projection.name} {key_text}"), digest.digest())
        return await intake.commit(_status(intake, single=reader.is_single), key), intake.repeated
    except BodyError:
        if signature is not None:  # an unsigned body is told nothing but that
            await _verify_rest(signature, message, receive)
        raise
    finally:
        pipeline.waiting -= 1
        intake.abort()


async def _verify_rest(signature: Signature, message: Mapping[str, Any], receive: Receive) -> None:
    """The body was refused before its end; whose it is decides about the answer."""
    while message.get("more_body", False):
        message = await receive()
        signature.update(message.get("body", b""))
    signature.verify()


async def _feed(blocks: Iterable[Any], intake: Intake, digest: Any, piece: bytes) -> None:
    if digest is not None:
        digest.update(piece)
    for block in blocks:
        await intake.add(block)


def _status(intake: Intake, *, single: bool) -> int:
    if intake.accepted or intake.filtered:
        return 202
    if intake.codes == {"too_large"}:
        return 413
    if single and intake.codes & {"malformed", "encoding", "depth"}:
        return 400
    return 422


def _refusal_sentence(receipt: Receipt) -> str:
    if receipt.rejected == 1:
        return f"The event was refused. {receipt.errors[0]['message']}"
    if receipt.rejected:
        return f"None of the {receipt.rejected:,} records could be accepted; see errors."
    return "The body holds no events."
