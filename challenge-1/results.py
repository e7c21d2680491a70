"""Aggregates and dead letters as they are shown: over HTTP, in exports, and in topics."""

import base64
from typing import Any

import msgspec

from aggregation import text_of
from projection import Projection
from storage import Aggregate, DeadLetter
from windows import FOREVER


def item_of(projection: Projection, row: Aggregate) -> dict[str, Any]:
    """One window of one group, with the names of its pipeline."""
    bounded = row.window_end != FOREVER
    return {
        "pipeline": row.pipeline,
        "window_start": text_of(row.window_start) if bounded else None,
        "window_end": text_of(row.window_end) if bounded else None,
        "group": dict(zip(projection.aliases, row.group, strict=False)),
        "values": projection.values(row.count, row.state),
        "revision": row.revision,
        "final": row.final,
    }


def closed_message(projection: Projection, row: Aggregate) -> bytes:
    """The message that a window has closed, or has been corrected after that."""
    item = item_of(projection, row)
    del item["final"]
    return msgspec.json.encode({"kind": "closed" if row.revision == 1 else "revised", **item})


def letter_message(letter: DeadLetter) -> bytes:
    """A dead letter as the message of its topic."""
    return msgspec.json.encode(letter_fields(letter))


def letter_fields(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter as it is shown: its bytes as text, or as base64 where they are no UTF-8."""

    record = letter.record
    try:
        raw = {"text": record.raw.decode()}
    except UnicodeDecodeError:
        raw = {"base64": base64.b64encode(record.raw).decode()}
    return {
        "id": letter.id, "pipeline": letter.pipeline, "received_at": text_of(letter.received),
        "position": letter.position, "line": record.line, "index": record.index,
        "offset": record.offset, "code": record.code, "message": record.message,
        "whole": record.whole, **raw,
    }  # fmt: skip
