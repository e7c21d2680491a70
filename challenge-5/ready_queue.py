"""Tasks that are ready, most urgent first, by order of acceptance inside a level.

Four deques of numbers: what is accepted arrives in order, so both ends cost the same at any length.
What comes back (a retry, a child whose parents took long, work of a dead worker) carries an old
number and waits in a small heap beside its deque.
"""

from collections import deque
from collections.abc import Iterable
from heapq import heapify, heappop, heappush

LEVELS = 4


class ReadyQueue:
    """Sequence numbers by (priority, number); 40 bytes each. Removal is lazy."""

    def __init__(self) -> None:
        self._arrived: list[deque[int]] = [deque() for _ in range(LEVELS)]
        self._returned: list[list[int]] = [[] for _ in range(LEVELS)]
        self._removed: set[int] = set()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, priority: int, seq: int) -> None:
        """Add a number that is not in the queue."""
        if seq in self._removed:  # its old entry still lies somewhere: revive that one
            self._removed.discard(seq)
            self._count += 1
            return
        arrived = self._arrived[priority]
        if arrived and seq < arrived[-1]:
            heappush(self._returned[priority], seq)
        else:
            arrived.append(seq)
        self._count += 1

    def extend(self, priority: int, seqs: Iterable[int]) -> None:
        """Add ascending numbers, all higher than those in the level."""
        arrived = self._arrived[priority]
        before = len(arrived)
        arrived.extend(seqs)
        self._count += len(arrived) - before

    def remove(self, seq: int) -> None:
        """Forget a number that is in the queue; its entry goes when it comes up."""
        self._removed.add(seq)
        self._count -= 1
        if len(self._removed) > 1000 and len(self._removed) > self._count:
            self._sweep()

    def peek(self) -> int | None:
        """The next number, which stays."""
        for arrived, returned in zip(self._arrived, self._returned, strict=True):
            while arrived or returned:
                if returned and (not arrived or returned[0] < arrived[0]):
                    if returned[0] not in self._removed:
                        return returned[0]
                    self._removed.discard(heappop(returned))
                else:
                    if not self._removed or arrived[0] not in self._removed:
                        return arrived[0]
                    self._removed.discard(arrived.popleft())
        return None

    def pop(self) -> int:
        """Take the number that `peek` has just shown."""
        self._count -= 1
        for arrived, returned in zip(self._arrived, self._returned, strict=True):
            if arrived:
                if returned and returned[0] < arrived[0]:
                    return heappop(returned)
                return arrived.popleft()
            if returned:
                return heappop(returned)
        raise IndexError("The queue is empty.")

    def upcoming(self, number: int) -> list[int]:
        """About the next numbers of the level that is served next, to be loaded together."""
        for arrived, returned in zip(self._arrived, self._returned, strict=True):
            if arrived or returned:
                head = [arrived[n] for n in range(min(number, len(arrived)))]
                return [s for s in (*returned[:number], *head) if s not in self._removed]
        return []

    def by_level(self) -> list[int]:
        """How many entries each level has."""
        return [
            sum(seq not in self._removed for part in (arrived, returned) for seq in part)
            if self._removed
            else len(arrived) + len(returned)
            for arrived, returned in zip(self._arrived, self._returned, strict=True)
        ]

    def _sweep(self) -> None:
        for level in range(LEVELS):
            self._arrived[level] = deque(s for s in self._arrived[level] if s not in self._removed)
            kept = [s for s in self._returned[level] if s not in self._removed]
            heapify(kept)
            self._returned[level] = kept
        self._removed.clear()
