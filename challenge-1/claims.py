"""Which event ids are taken: those seen lately, and those of what is on its way to the disk.

An id is claimed when its event is submitted, and seen once that is durable; a repeat in between is
a duplicate too, and is refused together with what it repeats when the disk refuses. An upload
claims its ids all at once, and whoever comes meanwhile waits. Belongs to the event loop.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from dedupe import KeyHash, SeenKeys
from parsing import Block
from projection import Projection
from spool import Appended


@dataclass(slots=True)
class Claimed:
    """What is new in a body, in order, and how many repeats it held by source."""

    events: list[Any] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    duplicates: dict[str, int] = field(default_factory=dict)


class Claims:
    """The ids that are taken, as keys of a hash nobody outside can predict."""

    def __init__(self, secret: bytes, capacity: int) -> None:
        self._hash = lru_cache(256)(partial(KeyHash, secret))
        self.seen = SeenKeys(capacity)
        self.merging = asyncio.Lock()  # held while an upload looks for its duplicates
        self._claimed: dict[int, None] = {}
        self._upload: tuple[SeenKeys, Appended] | None = None

    def hash_of(self, projection: Projection) -> KeyHash:
        """Its ids are its own: the same ones mean nothing to another pipeline."""
        return self._hash("" if projection.built_in else projection.name)

    async def certain(self) -> None:
        """Return when no upload is claiming its ids; without an await when none is."""
        while self.merging.locked() or self._upload is not None:
            if self._upload is not None:  # its client may be gone: the log still decides
                await asyncio.wait([self._upload[1]])
            else:
                async with self.merging:
                    pass

    def claim(self, projection: Projection, blocks: Iterable[Block]) -> Claimed:
        """Claim what is new; each key has to be settled."""
        found = Claimed()
        claimed, seen, digest = self._claimed, self.seen, self.hash_of(projection)
        ids_of, sources = projection.ids, projection.sources
        assert ids_of is not None  # noqa: S101  (asked by the caller)
        for block in blocks:
            if not block.events:
                continue
            ids = ids_of(block.events)
            for event, line, event_id in zip(block.events, block.split(), ids, strict=True):
                key = digest(event_id)
                if key in claimed or key in seen:
                    source = sources((event,))[0] if sources else ""
                    found.duplicates[source] = found.duplicates.get(source, 0) + 1
                    continue
                claimed[key] = None
                found.keys.append(key)
                found.events.append(event)
                found.lines.append(line)
        return found

    def settle(self, keys: Iterable[int], *, durable: bool) -> None:
        """These are seen from now on, or free again."""
        for key in keys:
            del self._claimed[key]
            if durable:
                self.seen.add(key)

    def claim_upload(self, newer: SeenKeys, promise: Appended) -> None:
        """The ids of an upload, which are seen once the log has taken it."""
        self._upload = newer, promise
        promise.add_done_callback(self._settle_upload)

    def _settle_upload(self, promise: Appended) -> None:
        assert self._upload is not None  # noqa: S101  (set before)
        newer, _ = self._upload
        self._upload = None
        if promise.exception() is None:
            self.seen.absorb(newer)
