"""Memory that a worker shares with the engine: what it runs since when, and what it has finished.

    claimed | started | revoked from | revoked to | written | read | … ring of records …

Each field of the header is one aligned machine word, so nobody reads half of it. The worker claims
a task by writing its index *before* it looks at the revoked range; the engine revokes by writing
the range, and reads the claim a moment later. Whatever is claimed then stays with the worker,
everything behind it is the engine's again: tasks are taken back from a worker that is deep in a C
loop and cannot answer. A result is out of the worker's hands the moment its record is written: a
SIGKILL after that loses nothing.
"""

import struct
from mmap import mmap

HEADER_BYTES = 64
RING_BYTES = 256 * 1024
SLOT_BYTES = HEADER_BYTES + RING_BYTES
SETTLE_SECONDS = 0.001  # store buffers drain within nanoseconds; this is when a revoke is read back

DONE, FAILED, GIVEN_BACK, NOTE = 1, 2, 3, 4  # kinds of records

_CLAIMED, _STARTED, _FROM, _TO, _WRITTEN, _READ = range(6)  # words of the header
RECORD = struct.Struct("<IBxxxQdd")  # bytes that follow, kind, index, started, elapsed
_WRAP = 0xFFFFFFFF

Record = tuple[int, int, float, float, bytes]  # kind, index, started, elapsed, payload


class Slot:
    """Both ends of the shared memory; each field has one writer."""

    def __init__(self, memory: mmap) -> None:
        self.memory = memory
        header = memoryview(memory)[:HEADER_BYTES]
        self._numbers = header.cast("Q")
        self._moments = header.cast("d")
        self._position = 0  # of this end: the worker's next write, the engine's next read

    # --- the worker's end ---

    def claim(self, index: int, now: float) -> bool:
        """Say what is about to run; False when it was revoked."""
        numbers = self._numbers
        self._moments[_STARTED] = now  # first: an old start would look like a task that is late
        numbers[_CLAIMED] = index
        return not numbers[_FROM] <= index < numbers[_TO]

    def put(self, kind: int, index: int, started: float, elapsed: float, payload: bytes) -> bool:
        """Write a record; False when there is no room for it now."""
        memory, position = self.memory, self._position
        size = RECORD.size + len(payload)
        offset = position % RING_BYTES
        skipped = RING_BYTES - offset if RING_BYTES - offset < size else 0
        if position + skipped + size - self._numbers[_READ] > RING_BYTES:
            return False
        if skipped:
            if skipped >= RECORD.size:
                RECORD.pack_into(memory, HEADER_BYTES + offset, _WRAP, 0, 0, 0.0, 0.0)
            position += skipped
            offset = 0
        start = HEADER_BYTES + offset
        RECORD.pack_into(memory, start, len(payload), kind, index, started, elapsed)
        memory[start + RECORD.size : start + size] = payload
        self._numbers[_WRITTEN] = self._position = position + size
        return True

    # --- the engine's end ---

    def running(self) -> tuple[int, float]:
        """The index claimed last (0: none yet), and when it began on the monotonic clock."""
        while True:
            claimed, started = self._numbers[_CLAIMED], self._moments[_STARTED]
            if claimed == self._numbers[_CLAIMED]:  # else the next has begun in between
                return claimed, started

    def revoke(self, first: int, end: int) -> None:
        """Take back the indexes from `first` to before `end` that are not claimed yet."""
        numbers = self._numbers
        if numbers[_CLAIMED] >= numbers[_TO]:  # it is past the range before; else that one grows
            numbers[_FROM] = first
        numbers[_TO] = end

    def take(self) -> list[Record]:
        """The records that are new."""
        memory, position = self.memory, self._position
        written = self._numbers[_WRITTEN]
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
        self._numbers[_READ] = self._position = position
        return found
