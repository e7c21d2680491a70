"""Streams whose client is no good: in the very process, so that the client can be anything."""

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import app as application
import streaming

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

app: Any = application.app
Message = MutableMapping[str, Any]
Client = Callable[[Message], Awaitable[None]]


async def ask_for_a_stream(send: Client) -> None:
    """What a server does with such a request; `send` is the client."""
    body = json.dumps({"dataset": "airports"}).encode()
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": "POST", "scheme": "http", "path": "/pipelines/stream", "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await asyncio.Event().wait()  # type: ignore[return-value]

    await app(scope, receive, send)


def reads_nothing(meanwhile: Callable[[], None] = lambda: None) -> Client:
    """As a server sees it: the first piece fits into its buffer, with the next it has to wait."""
    pieces = itertools.count()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body" and next(pieces):
            meanwhile()
            await asyncio.Event().wait()

    return send


def reads_nothing_while_the_service_stops() -> Client:
    return reads_nothing(app.gate.stop)


def is_gone() -> Client:
    async def send(message: Message) -> None:
        raise ConnectionResetError(message["type"])

    return send


@pytest.mark.parametrize(
    ("client", "grace_seconds"),
    [(reads_nothing, 0.05), (reads_nothing_while_the_service_stops, 1000), (is_gone, 1000)],
)
async def test_its_place_is_given_back_and_its_rows_are_closed(
    client: Callable[[], Client],
    grace_seconds: float,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    closed: list[Any] = []
    limits = replace(app.gate.limits, grace_seconds=grace_seconds)
    monkeypatch.setattr(app.gate, "limits", limits)
    monkeypatch.setattr(app.gate, "sweep", None)  # that of the loop of another test
    monkeypatch.setattr(application.settings, "data_dir", tmp_path)
    close = streaming.RowStream.close

    def noted(stream: streaming.RowStream) -> None:
        close(stream)
        closed.append(stream)

    monkeypatch.setattr(streaming.RowStream, "close", noted)
    async with app.router.lifespan_context(app):
        service = app.state.service

        await asyncio.wait_for(ask_for_a_stream(client()), 20)

        assert service.running == 0
        assert service.runs == {"finished": 0, "failed": 0, "left": 1}
        assert closed[-1].rows is None
