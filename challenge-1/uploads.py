"""Staged uploads: large bodies in files of their own, framed like the log, one commit each."""

import os
from collections.abc import Iterator
from pathlib import Path

from batches import Batch, decode_batch
from frames import Message, scan_frames
from spool import SAFE_FLAGS


def read_upload(path: Path) -> Iterator[Batch]:
    """The whole batches of a staged upload; damaged ones are left out."""
    with open(path, "rb", opener=_opener) as file:
        for found in scan_frames(file.read, 0):
            if isinstance(found, Message):
                yield decode_batch(found.payload)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | SAFE_FLAGS)


def mark(bitmap: bytearray, index: int) -> None:
    """Set a bit, growing the bitmap as needed."""
    byte = index >> 3
    if byte >= len(bitmap):
        bitmap.extend(bytes(byte + 1 - len(bitmap)))
    bitmap[byte] |= 1 << (index & 7)


def is_marked(bitmap: bytes, index: int) -> bool:
    """Whether a bit is set; the bitmap may end early."""
    byte = index >> 3
    return byte < len(bitmap) and bool(bitmap[byte] & (1 << (index & 7)))
