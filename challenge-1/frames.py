"""How messages stand on the disk, and how they are found again after damage.

A frame is

    magic "\\xc5\\x5c" | kind u8 | 0 u8 | length u32 | position u64 | crc32 u32 | payload

and names its own position, so that after damage the next true frame is known for what it is.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

MAGIC: Final = b"\xc5\x5c"
HEADER: Final = struct.Struct("<2sBBIQI")
MAX_FRAME_BYTES: Final = 32 * 1024 * 1024
READ_BYTES: Final = 256 * 1024


@dataclass(slots=True)
class Message:
    """One message: `start` is its own position, `end` that of the next."""

    start: int
    end: int
    kind: int
    payload: bytes


def encode_frame(kind: int, position: int, payload: bytes) -> bytes:
    """The frame of a message at this position; raises ValueError for more than a frame holds."""
    if len(payload) > MAX_FRAME_BYTES:
        raise ValueError(f"A message of {len(payload):,} bytes is more than a frame holds.")
    crc = zlib.crc32(payload, zlib.crc32(b"%d:%d" % (kind, position)))
    return HEADER.pack(MAGIC, kind, 0, len(payload), position, crc) + payload


def scan_frames(read: Callable[[int], bytes], position: int) -> Iterator[Message | int]:
    """Yield the whole frames of a file from `position` on.

    Where bytes are damaged and a whole frame follows, the position of the damage is yielded
    instead; damage with nothing after it is a torn tail and yields nothing.
    """
    buffer, start, damaged = b"", position, -1
    at_end = False
    while True:
        offset = 0
        while True:
            if len(buffer) - offset < HEADER.size:
                break
            frame = _frame_at(buffer, offset, start + offset)
            if frame is None:
                break
            if isinstance(frame, Message):
                if damaged >= 0:
                    yield damaged
                    damaged = -1
                yield frame
                offset += frame.end - frame.start
                continue
            if damaged < 0:
                damaged = start + offset
            following = buffer.find(MAGIC, offset + 1)
            offset = following if following >= 0 else max(offset + 1, len(buffer) - 1)
        if at_end:
            # A length that points past the end may itself be damage: look behind it.
            rest = len(buffer) - offset
            if rest < HEADER.size:
                return
            damaged = start + offset if damaged < 0 else damaged
            following = buffer.find(MAGIC, offset + 1)
            if following < 0:
                return
            buffer, start = buffer[following:], start + following
            continue
        start += offset
        more = read(max(READ_BYTES, _wanted(buffer, offset)))
        at_end = not more
        buffer = buffer[offset:] + more


def _wanted(buffer: bytes, offset: int) -> int:
    if len(buffer) - offset < HEADER.size:
        return 0
    length: int = HEADER.unpack_from(buffer, offset)[3]
    return min(length, MAX_FRAME_BYTES)


def _frame_at(buffer: bytes, offset: int, position: int) -> Message | bool | None:
    """The frame there, None when more bytes are needed, False when there is none."""
    magic, kind, _, length, written, crc = HEADER.unpack_from(buffer, offset)
    if magic != MAGIC or written != position or length > MAX_FRAME_BYTES:
        return False
    begin = offset + HEADER.size
    if begin + length > len(buffer):
        return None
    payload = buffer[begin : begin + length]
    if zlib.crc32(payload, zlib.crc32(b"%d:%d" % (kind, position))) != crc:
        return False
    return Message(position, position + HEADER.size + length, kind, payload)
