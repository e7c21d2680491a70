"""What the log holds: batches of accepted records, and the commits of whole uploads."""

from typing import Any, Final

import msgspec
from msgspec import Struct

from parsing import Rejected

BATCH: Final = 1  # kinds of messages
UPLOAD: Final = 2
PROBE: Final = 3  # says only that the disk took it


class Receipt(Struct):
    """What a body came to; `position` is where the log ends after it."""

    accepted: int
    rejected: int
    duplicates: int
    errors: list[dict[str, Any]]
    status: int = 202
    position: int = 0


class Promise(Struct, array_like=True):
    """The answer that belongs to an Idempotency-Key, with a digest of the body it was given for."""

    key: bytes
    body: bytes
    receipt: Receipt


class Batch(Struct, array_like=True):
    """Records accepted together, as NDJSON, and what else their body held."""

    pipeline: str
    arrival: int  # microseconds since the epoch
    body: bytes
    accepted: int
    keys: bytes = b""  # of the accepted records, packed
    duplicates: dict[str, int] = {}  # by source
    rejected: list[Rejected] = []
    promise: Promise | None = None
    first: int = 0  # in an upload: how many records stand before these


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


_encoder: Final = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_batch: Final = msgspec.msgpack.Decoder(Batch).decode
decode_upload: Final = msgspec.msgpack.Decoder(Upload).decode
