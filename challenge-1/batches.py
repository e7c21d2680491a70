"""What the log holds: batches of records, commits of whole uploads, and what pipelines there are.

The order of the log is the order of everything. That a pipeline was put, that a source has been
quiet, that a rebuild was asked for are messages too, so a replay decides as the first time.
"""

from typing import Any, Final

import msgspec
from msgspec import Struct

from parsing import Rejected

BATCH: Final = 1  # kinds of messages
UPLOAD: Final = 2
PROBE: Final = 3  # says only that the disk took it
PUT: Final = 4
DROP: Final = 5
REBUILD: Final = 6
IDLE: Final = 7


class Receipt(Struct):
    """What a body came to; `position` is where the log ends after it."""

    accepted: int
    rejected: int
    duplicates: int
    errors: list[dict[str, Any]]
    status: int = 202
    position: int = 0
    filtered: int = 0


class Promise(Struct, array_like=True):
    """The answer that belongs to an Idempotency-Key, with a digest of the body it was given for."""

    key: bytes
    body: bytes
    receipt: Receipt


class Batch(Struct, array_like=True):
    """Records taken together, as NDJSON (with those filtered out), and what else was there."""

    pipeline: str
    arrival: int  # microseconds since the epoch
    body: bytes
    accepted: int
    keys: bytes = b""  # of the records, packed
    duplicates: dict[str, int] = {}  # by source
    rejected: list[Rejected] = []
    promise: Promise | None = None
    first: int = 0  # in an upload: how many records stand before these
    filtered: int = 0
    replayed: dict[int, str] = {}  # dead letters that came to life here, and their codes


class Upload(Struct, array_like=True):
    """Makes a staged file of batches visible; its `duplicates` are marked in the `skip` bitmap."""

    pipeline: str
    arrival: int
    name: str
    length: int
    staged: int  # records in the file, duplicates included
    accepted: int
    duplicates: dict[str, int] = {}
    rejected: int = 0
    skip: bytes = b""
    promise: Promise | None = None
    filtered: int = 0


class Put(Struct, array_like=True):
    """A pipeline is there from here on, and begins empty."""

    name: str
    spec: str


class Drop(Struct, array_like=True):
    """A pipeline is gone."""

    name: str


class Rebuild(Struct, array_like=True):
    """The aggregates of a pipeline are to be built anew from a position of the log."""

    name: str
    origin: int


class Idle(Struct, array_like=True):
    """Sources that have been quiet: pipeline, source, and the position of their last event."""

    sources: list[tuple[str, str, int]]


_encoder: Final = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_batch: Final = msgspec.msgpack.Decoder(Batch).decode
decode_upload: Final = msgspec.msgpack.Decoder(Upload).decode
decode_put: Final = msgspec.msgpack.Decoder(Put).decode
decode_drop: Final = msgspec.msgpack.Decoder(Drop).decode
decode_rebuild: Final = msgspec.msgpack.Decoder(Rebuild).decode
decode_idle: Final = msgspec.msgpack.Decoder(Idle).decode
