"""Which keys were seen lately: at least the last `capacity`, in bounded memory.

Keys are 64-bit keyed hashes in open-addressed tables of plain integers (8 bytes a slot, where a
Python set takes about 80). The tables are generations: the newest takes new keys, and when it is
full the oldest is dropped whole, so nothing is ever searched for eviction. An innocent key is
taken for a seen one with a probability of about capacity / 2^64, 5 in 10^14 for a million keys.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from mmap import mmap
from typing import Final

GENERATIONS: Final = 4  # one filling, three full: at least the last capacity keys
LOAD: Final = 0.75
KEY_BYTES: Final = 8


class KeyHash:
    """Text to key; the same text in another realm is another key.

    The secret keeps anybody from making two texts collide on purpose.
    """

    def __init__(self, secret: bytes, realm: str = "") -> None:
        person = hashlib.blake2b(realm.encode(), digest_size=16).digest() if realm else b""
        self._hash = hashlib.blake2b(digest_size=KEY_BYTES, key=secret, person=person)

    def __call__(self, text: str) -> int:
        """Hash a text."""
        state = self._hash.copy()
        state.update(text.encode())
        return int.from_bytes(state.digest()) or 1  # zero marks a free slot


class _Generation:
    """A set of at most `limit` keys that only grows."""

    __slots__ = ("_size", "_slots", "count", "limit")

    def __init__(self, limit: int) -> None:
        size = self._size = int(limit / LOAD) + 2
        # Mapped, not allocated: an empty table costs nothing, a dropped one goes back at once.
        self._slots = memoryview(mmap(-1, KEY_BYTES * size)).cast("Q")
        self.limit = limit
        self.count = 0

    def __contains__(self, key: int) -> bool:
        slots, size = self._slots, self._size
        place = key % size
        while found := slots[place]:
            if found == key:
                return True
            place += 1
            if place == size:
                place = 0
        return False

    def __iter__(self) -> Iterator[int]:
        return (key for key in self._slots if key)

    def add(self, key: int) -> None:
        slots, size = self._slots, self._size
        place = key % size
        while found := slots[place]:
            if found == key:
                return
            place += 1
            if place == size:
                place = 0
        slots[place] = key
        self.count += 1


class SeenKeys:
    """A set of keys that forgets the oldest: it knows at least the last `capacity`.

    Not thread-safe; the event loop owns it.
    """

    def __init__(self, capacity: int, expected: int | None = None) -> None:
        """With `expected` the first table has room for so many, where that is less."""
        self.capacity = capacity
        self._limit = -(-capacity // (GENERATIONS - 1))
        first = self._limit if expected is None else min(expected, self._limit)
        self._generations = [_Generation(first)]

    def __contains__(self, key: int) -> bool:
        for generation in self._generations:  # noqa: SIM110  (any() costs twice as much)
            if key in generation:
                return True
        return False

    def __len__(self) -> int:
        return sum(generation.count for generation in self._generations)

    def add(self, key: int) -> None:
        """Remember a key; the caller has looked that it is new."""
        newest = self._generations[0]
        if newest.count >= newest.limit:
            newest = _Generation(self._limit)
            self._generations.insert(0, newest)
            del self._generations[GENERATIONS:]
        newest.add(key)

    def absorb(self, newer: "SeenKeys") -> None:
        """Take over another's keys as the newest; drop the oldest generations beyond capacity."""
        if len(newer) < self._limit:
            for generation in reversed(newer._generations):
                self.update(generation)
            return
        generations = [*newer._generations, *self._generations]
        held = sum(generation.count for generation in generations)
        while held - generations[-1].count >= self.capacity:
            held -= generations.pop().count
        self._generations = generations

    def update(self, keys: Iterable[int]) -> None:
        """Remember keys, oldest first."""
        for key in keys:
            self.add(key)


def pack_keys(keys: Iterable[int]) -> bytes:
    """Keys as the bytes they are stored in."""
    return array("Q", keys).tobytes()


def unpack_keys(data: bytes) -> Iterator[int]:
    """The keys in those bytes."""
    keys = array("Q")
    keys.frombytes(data)
    return iter(keys)
