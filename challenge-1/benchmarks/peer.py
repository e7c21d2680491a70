"""The obvious routes to compare with: FastAPI and pydantic models, everything in memory."""

import datetime as dt

from fastapi import FastAPI
from pydantic import BaseModel, Field

app = FastAPI()


class Data(BaseModel):
    category: str = Field(min_length=1, max_length=256)
    value: float
    quantity: float
    ts: dt.datetime


class Event(BaseModel):
    data: Data


groups: dict[tuple[int, str], list[float]] = {}


def count(event: Event) -> None:
    data = event.data
    key = (int(data.ts.timestamp()) // 10, data.category)
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


@app.post("/upload", status_code=202)
async def upload(events: list[Event]) -> dict[str, int]:
    for event in events:
        count(event)
    return {"accepted": len(events)}
