"""The obvious routes to compare with: FastAPI and pydantic models, everything in memory.

`app` is the peer; `bare` reads a body and answers, which is the most this server and this load
generator do together.
"""

import datetime as dt

from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

app = FastAPI()

WINDOW_SECS = 10


class Data(BaseModel):
    category: str = Field(min_length=1, max_length=256)
    value: float
    quantity: float
    ts: dt.datetime


class Event(BaseModel):
    data: Data


class SourceEvent(BaseModel):
    event_id: str = Field(min_length=1, max_length=256)
    source: str
    event_type: str
    data: dict[str, float]
    timestamp: dt.datetime


groups: dict[tuple[int, str], list[float]] = {}
sources: dict[tuple[int, str, str], dict[str, float]] = {}
seen: set[str] = set()


def count(event: Event) -> None:
    data = event.data
    key = (int(data.ts.timestamp()) // WINDOW_SECS, data.category)
    group = groups.setdefault(key, [0, 0.0, 0.0])
    group[0] += 1
    group[1] += data.value
    group[2] += data.quantity


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "alive"}


@app.post("/webhook", status_code=202)
async def webhook(event: Event) -> dict[str, int]:
    count(event)
    return {"accepted": 1}


@app.post("/webhook/ingest", status_code=202)
async def ingest(event: SourceEvent) -> dict[str, int]:
    if event.event_id in seen:
        return {"accepted": 0}
    seen.add(event.event_id)
    window = int(event.timestamp.timestamp()) // WINDOW_SECS
    group = sources.setdefault((window, event.source, event.event_type), {})
    for name, value in event.data.items():
        group[name] = group.get(name, 0.0) + value
    return {"accepted": 1}


@app.post("/upload", status_code=202)
async def upload(events: list[Event]) -> dict[str, int]:
    for event in events:
        count(event)
    return {"accepted": len(events)}


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    while (await receive()).get("more_body", False):
        pass
    status = 202 if scope["method"] == "POST" else 200
    headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}"})
