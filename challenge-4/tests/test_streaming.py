"""Streams whose client is no good: in the very process, so that the client can be anything."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import pytest

import app as application
import streaming

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

Message = MutableMapping[str, Any]


async def ask_for_a_stream(send: Callable[[Message], Awaitable[None]]) -> None:
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

    await application.app(scope, receive, send)


async def reads_nothing(message: Message) -> None:
    if message["type"] == "http.response.body":
        await asyncio.Event().wait()


async def is_gone(message: Message) -> None:
    raise ConnectionResetError(message["type"])


@pytest.mark.parametrize("client", [reads_nothing, is_gone])
async def test_its_place_is_given_back_and_its_rows_are_closed(
    client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed: list[Any] = []
    monkeypatch.setattr(streaming, "STALL_SECONDS", 0.05)
    monkeypatch.setattr(application.settings, "data_dir", tmp_path)
    close = streaming.RowStream.close

    def noted(stream: streaming.RowStream) -> None:
        close(stream)
        closed.append(stream)

    monkeypatch.setattr(streaming.RowStream, "close", noted)
    async with application.app.router.lifespan_context(application.app):
        service = application.app.state.service

        await asyncio.wait_for(ask_for_a_stream(client), 20)

        assert service.running == 0
        assert service.runs == {"finished": 0, "failed": 0, "left": 1}
        assert closed[-1].rows is None
