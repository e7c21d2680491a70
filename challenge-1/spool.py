"""The file-based message queue: an append-only log in segments that survives crashes.

Many producers share one `fdatasync` (group commit): a message is acknowledged when it is on the
disk, and no earlier. What follows the last whole frame after a crash (a torn tail) is cut off; a
damaged frame in the middle is reported and skipped, the later ones are kept.
"""

import asyncio
import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, Protocol

from frames import HEADER, MAX_FRAME_BYTES, Message, encode_frame, scan_frames

SEGMENT_BYTES: Final = 64 * 1024 * 1024
QUICK_SYNC_SECONDS: Final = 0.0008  # about four thread switches of a busy process
GATHERED_MESSAGES: Final = 256  # share a sync at most before it is begun
SUFFIX: Final = ".seg"
SEGMENT_NAME: Final = re.compile(rf"[0-9]{{20}}{re.escape(SUFFIX)}")

# Windows knows neither of these; there nothing is a link by accident, and fsync does more.
SAFE_FLAGS: Final[int] = (
    getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)
FDATASYNC: Final[Callable[[int], None]] = getattr(os, "fdatasync", os.fsync)

Sync = Callable[[int], None]
Appended = asyncio.Future[tuple[int, int]]
Entry = tuple[int, bytes, Appended]


class QueueError(Exception):
    """Base of what the message queue raises."""


class QueueRefused(QueueError):
    """The disk refused to take or keep a message; nothing of it is acknowledged.

    `full` tells a full disk from a broken one. The next append tries again by itself.
    """

    def __init__(self, error: OSError) -> None:
        self.full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "The disk is full" if self.full else "The disk refused a write"
        super().__init__(f"{reason}: nothing was kept. Make room or repair it, then send again.")


@dataclass(frozen=True)
class QueueStatistics:
    """What a queue holds and what happened to it since it was opened."""

    first: int
    end: int
    segments: int
    bytes: int
    appended: int
    syncs: int
    refusals: int
    torn_bytes: int
    corrupt_frames: int


class MessageQueue(Protocol):
    """What the pipeline needs of a message queue; positions only ever grow."""

    def submit(self, kind: int, payload: bytes) -> Appended:
        """Promise where the message starts and ends once it is durable, or QueueRefused."""
        ...

    def read(self, position: int, limit: int | None = None) -> Iterator[Message]:
        """Yield the durable messages from `position` on, in order; blocking, any thread."""
        ...

    @property
    def end(self) -> int:
        """The position up to which everything is durable."""
        ...

    def trim(
        self,
        position: int,
        *,
        older_than: float | None = None,
        keep_bytes: int | None = None,
        dry_run: bool = False,
    ) -> int:
        """Forget segments that end before `position`; return how many.

        With bounds only those last written before `older_than` (seconds since the epoch) or
        beyond the newest `keep_bytes`.
        """
        ...

    def statistics(self) -> QueueStatistics:
        """Figures for `/stats`."""
        ...

    def close(self) -> None:
        """Release the files; idempotent."""
        ...


class FileQueue:
    """A `MessageQueue` in a directory of segment files.

    Appends belong to one event loop; reads are safe from any thread. `sync` is what makes a
    descriptor's data durable; after it failed once the descriptor is given up, because the kernel
    may have dropped the very pages it could not write.
    """

    def __init__(
        self, directory: Path, *, segment_bytes: int = SEGMENT_BYTES, sync: Sync = FDATASYNC
    ) -> None:
        """Open or create the queue, and recover it; raise QueueError when that is impossible."""
        self.directory = directory
        self._segment_bytes = segment_bytes
        self._sync = sync
        self._syncer = ThreadPoolExecutor(1, "queue-sync")
        self._pending: list[Entry] = []
        self._committing: asyncio.Task[None] | None = None
        self._sync_seconds = QUICK_SYNC_SECONDS * 2  # unknown yet: the first ones go to the thread
        self._torn_bytes = self._appended = self._syncs = self._refusals = 0
        self._corrupt: set[int] = set()  # where damage was met
        make_directory(directory)
        self._bases = find_segments(directory)
        self._fd = -1
        self._base = self._end = 0
        self._recover()

    # --- appending ---

    @property
    def end(self) -> int:
        """The position up to which everything is durable."""
        return self._end

    def submit(self, kind: int, payload: bytes) -> Appended:
        """Promise where the message starts and ends once it is durable, or QueueRefused.

        Call it in the event loop that owns the queue, and shield the promise where its caller may
        be cancelled. Messages become durable, and their promises true, in the order of the calls.
        """
        if len(payload) > MAX_FRAME_BYTES:
            raise QueueError(f"A message of {len(payload):,} bytes is more than a frame holds.")
        promise: Appended = asyncio.get_running_loop().create_future()
        self._pending.append((kind, payload, promise))
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit())
        return promise

    async def _commit(self) -> None:
        loop = asyncio.get_running_loop()
        batch: list[Entry] = []
        try:
            while self._pending:
                await self._gather()
                batch, self._pending = self._pending, []
                try:
                    ends = self._write(batch)
                    await self._make_durable(loop)
                except OSError as error:
                    self._give_up(error, batch)
                    continue
                start = self._end
                self._end = ends[-1]
                self._appended += len(batch)
                self._syncs += 1
                for (_, _, promise), end in zip(batch, ends, strict=True):
                    if not promise.done():
                        promise.set_result((start, end))
                    start = end
        except BaseException as error:  # a fault of this program: nobody may wait for ever
            for _, _, promise in (*batch, *self._pending):
                if not promise.done():
                    promise.set_exception(error)
            self._pending = []
            raise
        finally:
            self._committing = None

    async def _gather(self) -> None:
        """Let producers that are ready join in: while more keep coming, the sync is worth a wait.

        Two turns of the loop: one reads what clients have sent, the next runs their requests.
        """
        joined = 0
        while joined < len(self._pending) < GATHERED_MESSAGES:
            joined = len(self._pending)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def _make_durable(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sync in place while the disk is quicker than handing over to a thread and back."""
        started = time.perf_counter()
        if self._sync_seconds <= QUICK_SYNC_SECONDS:
            self._sync(self._fd)
        else:
            await loop.run_in_executor(self._syncer, self._sync, self._fd)
        took = time.perf_counter() - started
        self._sync_seconds += (took - self._sync_seconds) / 8

    def _write(self, batch: Sequence[Entry]) -> list[int]:
        if self._fd >= 0 and self._end - self._base >= self._segment_bytes:
            os.close(self._fd)
            self._fd = -1
        if self._fd < 0:
            self._start_segment()
        frames, ends, position = [], [], self._end
        for kind, payload, _ in batch:
            frames.append(encode_frame(kind, position, payload))
            position += HEADER.size + len(payload)
            ends.append(position)
        write_all(self._fd, b"".join(frames))
        return ends

    def _give_up(self, error: OSError, batch: Sequence[Entry]) -> None:
        """Return to the last durable position, and refuse whoever waits behind it too.

        Those were judged against messages that are now gone (as duplicates, for instance).
        """
        self._refusals += 1
        waiting, self._pending = self._pending, []
        self._abandon_segment()
        for _, _, promise in (*batch, *waiting):
            if not promise.done():
                promise.set_exception(QueueRefused(error))
                promise.exception()  # seen, even if its producer has been cancelled meanwhile

    def _abandon_segment(self) -> None:
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        with suppress(OSError):
            os.close(fd)
        path = self._path(self._base)
        with suppress(OSError):
            if self._end == self._base:
                path.unlink()
                self._bases.remove(self._base)
            else:
                os.truncate(path, self._end - self._base)

    def _start_segment(self) -> None:
        base = self._end
        path = self._path(base)
        if base in self._bases:  # left over from a refusal that could not be cleaned up
            path.unlink(missing_ok=True)
            self._bases.remove(base)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | SAFE_FLAGS
        self._fd = os.open(path, flags, 0o600)
        self._bases.append(base)
        self._base = base
        sync_directory(self.directory)

    # --- recovery ---

    def _recover(self) -> None:
        if not self._bases:
            return
        self._base = self._bases[-1]
        path = self._path(self._base)
        size = path.stat().st_size
        end = self._base
        for found in self._scan(self._base, self._base):
            if isinstance(found, Message):
                end = found.end
        self._end = end
        if torn := size - (end - self._base):
            self._torn_bytes += torn
            os.truncate(path, end - self._base)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | SAFE_FLAGS)
        # What a killed process made or wrote but did not sync may be in memory only.
        self._sync(self._fd)
        sync_directory(self.directory)

    def skip_to(self, position: int) -> None:
        """Go on from a position beyond the end: what stood before it is damaged."""
        if self._fd >= 0:
            os.close(self._fd)
        self._corrupt.add(self._end)
        self._end = position
        self._start_segment()

    # --- reading ---

    def read(self, position: int, limit: int | None = None) -> Iterator[Message]:
        """Yield the durable messages from `position` on, in order; blocking, any thread.

        Damaged frames are skipped and counted once in `statistics().corrupt_frames`.
        """
        limit = self._end if limit is None else limit
        bases = list(self._bases)
        for base, following in zip(bases, [*bases[1:], limit], strict=False):
            if following <= position or base >= limit:
                continue
            reached = max(base, position)
            for found in self._scan(base, reached):
                if isinstance(found, int):
                    self._corrupt.add(found)
                    continue
                if found.start >= following or found.end > limit:
                    break  # behind it lies what was refused and could not be cut off
                yield found
                reached = found.end
            else:
                if reached < min(following, limit):
                    self._corrupt.add(reached)  # with nothing whole behind it in its segment

    def _scan(self, base: int, position: int) -> Iterator[Message | int]:
        """Yield messages, and the position of each stretch of damage that whole frames follow."""
        yield from _scan_segment(self._path(base), base, position)

    def trim(
        self,
        position: int,
        *,
        older_than: float | None = None,
        keep_bytes: int | None = None,
        dry_run: bool = False,
    ) -> int:
        """Forget segments that end before `position`; return how many.

        Belongs to the one thread that reads; appends may go on meanwhile.
        """
        gone = 0
        for base, following in pairwise(list(self._bases)):
            path = self._path(base)
            if following > position:
                break
            if (older_than, keep_bytes) != (None, None):
                is_old = older_than is not None and path.stat().st_mtime < older_than
                is_beyond = keep_bytes is not None and self._end - base > keep_bytes
                if not (is_old or is_beyond):
                    break
            gone += 1
            if not dry_run:
                path.unlink(missing_ok=True)
                self._bases.remove(base)
        return gone

    def statistics(self) -> QueueStatistics:
        """Figures for `/stats`."""
        first = self._bases[0] if self._bases else self._end
        return QueueStatistics(
            first=first,
            end=self._end,
            segments=len(self._bases),
            bytes=self._end - first,
            appended=self._appended,
            syncs=self._syncs,
            refusals=self._refusals,
            torn_bytes=self._torn_bytes,
            corrupt_frames=len(self._corrupt),
        )

    def close(self) -> None:
        """Release the files; idempotent."""
        self._syncer.shutdown(wait=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _path(self, base: int) -> Path:
        return segment_path(self.directory, base)


def segment_path(directory: Path, base: int) -> Path:
    """The file of the segment that begins at this position."""
    return directory / f"{base:020d}{SUFFIX}"


def find_segments(directory: Path) -> list[int]:
    """Where the segments in a directory begin; raises QueueError for one that is a link."""
    bases = []
    for entry in os.scandir(directory):
        name = entry.name
        if not SEGMENT_NAME.fullmatch(name):
            continue
        if not entry.is_file(follow_symlinks=False):
            raise QueueError(
                f"The queue holds {name!r}, which is no regular file. Links are not followed; "
                "move it away."
            )
        bases.append(int(name[: -len(SUFFIX)]))
    return sorted(bases)


def _scan_segment(path: Path, base: int, position: int) -> Iterator[Message | int]:
    fd = os.open(path, os.O_RDONLY | SAFE_FLAGS)
    with os.fdopen(fd, "rb") as file:
        file.seek(position - base)
        yield from scan_frames(file.read, position)


def read_log(directory: Path, position: int) -> Iterator[Message]:
    """Yield the whole messages of a queue from a position on, without owning or changing it.

    For other processes, beside the one that writes or without it; a segment that is retained away
    meanwhile is passed over.
    """
    bases = find_segments(directory) if directory.is_dir() else []
    for base, following in zip(bases, [*bases[1:], 1 << 62], strict=True):
        if following <= position:
            continue
        with suppress(FileNotFoundError):
            for found in _scan_segment(segment_path(directory, base), base, max(base, position)):
                if isinstance(found, Message) and found.start < following:
                    yield found


def write_all(fd: int, data: bytes) -> None:
    """Write every byte: a nearly full disk takes a part first and refuses only then."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def make_directory(directory: Path) -> None:
    """Create a directory for this user alone, durably; refuse one that is a link."""
    missing = [each for each in directory.parents if not each.exists()]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_ISLNK(directory.lstat().st_mode):
        raise QueueError(
            "The queue's directory is a link; links are not followed. Name its target."
        )
    for each in (directory, *missing):  # also one that a killed process has made just now
        sync_directory(each.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable (on Windows they are as durable as they get)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
