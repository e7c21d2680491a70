"""Memory that a worker shares with the engine: what it runs since when, and what it has finished.

    claimed | started | revoked from | revoked to | written | read | … ring of records …

The worker claims a task by writing its index *before* it looks at the revoked range; the engine
revokes by writing the range, and reads the claim a moment later. Whatever is claimed then stays
with the worker, everything behind it is the engine's again: tasks are taken back from a worker that
is deep in a C loop and cannot answer. A result is out of the worker's hands the moment its record
is written: a SIGKILL after that loses nothing.
"""

import struct
from mmap import mmap

HEADER_BYTES = 64
RING_BYTES = 256 * 1024
SLOT_BYTES = HEADER_BYTES + RING_BYTES
SETTLE_SECONDS = 0.001  # store buffers drain within nanoseconds; this is when a revoke is read back

DONE, FAILED, GIVEN_BACK, NOTE = 1, 2, 3, 4  # kinds of records

_CLAIMED, _STARTED, _FROM, _TO, _WRITTEN, _READ = range(0, 48, 8)
_number = struct.Struct("<Q")
_moment = struct.Struct("<d")
_range = struct.Struct("<QQ")
_claim = struct.Struct("<Qd")
RECORD = struct.Struct("<IBxxxQdd")  # bytes that follow, kind, index, started, elapsed
_WRAP = 0xFFFFFFFF

Record = tuple[int, int, float, float, bytes]  # kind, index, started, elapsed, payload


class Slot:
    """Both ends of the shared memory; each field has one writer."""

    def __init__(self, memory: mmap) -> None:
        self.memory = memory
        self._position = 0  # of this end: the worker's next write, the engine's next read

    # --- the worker's end ---

    def claim(self, index: int, now: float) -> bool:
        """Say what is about to run; False when it was revoked."""
        _claim.pack_into(self.memory, _CLAIMED, index, now)
        first, end = _range.unpack_from(self.memory, _FROM)
        return not first <= index < end

    def started(self, now: float) -> None:
        """The claimed task's code begins."""
        _moment.pack_into(self.memory, _STARTED, now)

    def put(self, kind: int, index: int, started: float, elapsed: float, payload: bytes) -> bool:
        """Write a record; False when there is no room for it now."""
        memory, position = self.memory, self._position
        size = RECORD.size + len(payload)
        offset = position % RING_BYTES
        skipped = RING_BYTES - offset if RING_BYTES - offset < size else 0
        (read,) = _number.unpack_from(memory, _READ)
        if position + skipped + size - read > RING_BYTES:
            return False
        if skipped:
            if skipped >= RECORD.size:
                RECORD.pack_into(memory, HEADER_BYTES + offset, _WRAP, 0, 0, 0.0, 0.0)
            position += skipped
            offset = 0
        start = HEADER_BYTES + offset
        RECORD.pack_into(memory, start, len(payload), kind, index, started, elapsed)
        memory[start + RECORD.size : start + size] = payload
        self._position = position + size
        _number.pack_into(memory, _WRITTEN, self._position)
        return True

    # --- the engine's end ---

    def running(self) -> tuple[int, float]:
        """The index claimed last (0: none yet), and when it began on the monotonic clock."""
        claimed, started = _claim.unpack_from(self.memory, _CLAIMED)
        return claimed, started

    def revoke(self, first: int, end: int) -> None:
        """Take back the indexes from `first` to before `end` that are not claimed yet."""
        (old_end,) = _number.unpack_from(self.memory, _TO)
        if self.running()[0] >= old_end:  # it is past the range before; else that one grows
            _number.pack_into(self.memory, _FROM, first)
        _number.pack_into(self.memory, _TO, end)

    def take(self) -> list[Record]:
        """The records that are new."""
        memory, position = self.memory, self._position
        (written,) = _number.unpack_from(memory, _WRITTEN)
        if written == position:
            return []
        found: list[Record] = []
        unpack, head = RECORD.unpack_from, RECORD.size
        while position < written:
            offset = position % RING_BYTES
            if RING_BYTES - offset < head:
                position += RING_BYTES - offset
                continue
            start = HEADER_BYTES + offset
            size, kind, index, began, elapsed = unpack(memory, start)
            if size == _WRAP:
                position += RING_BYTES - offset
                continue
            start += head
            found.append((kind, index, began, elapsed, memory[start : start + size]))
            position += head + size
        self._position = position
        _number.pack_into(memory, _READ, position)
        return found
