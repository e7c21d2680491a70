"""Aggregates as they are shown: over HTTP, in exports, and in the topic `aggregates`."""

from typing import Any

import msgspec

from aggregation import text_of
from projection import Projection
from storage import Aggregate
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
