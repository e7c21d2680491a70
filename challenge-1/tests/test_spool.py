"""The file-based message queue, and the contract every message queue has to keep."""

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from frames import HEADER, MAX_FRAME_BYTES, Message
from spool import FileQueue, MessageQueue, QueueError, QueueRefused

pytestmark = [pytest.mark.anyio, pytest.mark.unit]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "queue"


@pytest.fixture(params=[FileQueue])
def open_queue(request: pytest.FixtureRequest, directory: Path) -> Callable[..., Any]:
    """Every implementation of the contract: opens the same queue again on every call."""
    return lambda **options: request.param(directory, **options)


def payloads(queue: MessageQueue, position: int = 0) -> list[bytes]:
    return [message.payload for message in queue.read(position)]


class TestTheContract:
    async def test_what_was_promised_is_read_back_in_order_after_a_restart(
        self, open_queue: Callable[..., Any]
    ) -> None:
        queue = open_queue()
        promises = [queue.submit(1, b"%d" % number) for number in range(100)]
        spans = await asyncio.gather(*promises)
        queue.close()

        queue = open_queue()

        assert payloads(queue) == [b"%d" % number for number in range(100)]
        assert [(m.start, m.end) for m in queue.read(0)] == spans
        assert queue.end == spans[-1][1]
        queue.close()

    async def test_reading_goes_on_from_any_message(self, open_queue: Callable[..., Any]) -> None:
        queue = open_queue()
        spans = [await queue.submit(1, b"%d" % number) for number in range(5)]

        assert payloads(queue, spans[2][1]) == [b"3", b"4"]
        assert payloads(queue, queue.end) == []
        queue.close()

    async def test_many_producers_share_few_syncs(self, open_queue: Callable[..., Any]) -> None:
        queue = open_queue()

        await asyncio.gather(*(queue.submit(1, b"x") for _ in range(1000)))

        statistics = queue.statistics()
        assert statistics.appended == 1000
        assert statistics.syncs < 50
        queue.close()

    async def test_a_producer_that_leaves_does_not_take_its_message_along(
        self, open_queue: Callable[..., Any]
    ) -> None:
        queue = open_queue()
        promise = queue.submit(1, b"kept")

        async def produce() -> None:
            await asyncio.shield(promise)

        task = asyncio.create_task(produce())
        await asyncio.sleep(0)
        task.cancel()
        await promise

        assert payloads(queue) == [b"kept"]
        queue.close()

    async def test_trimming_keeps_everything_from_the_position_on(
        self, open_queue: Callable[..., Any]
    ) -> None:
        queue = open_queue(segment_bytes=1000)
        spans = [await queue.submit(1, b"%03d" % number * 50) for number in range(50)]

        dropped = queue.trim(spans[30][0])

        assert dropped > 0
        assert 0 < queue.statistics().first <= spans[30][0]
        assert payloads(queue, spans[30][0])[0] == b"%03d" % 30 * 50
        assert len(payloads(queue, spans[30][0])) == 20
        queue.close()

    async def test_bounds_keep_what_is_young_and_within_the_bytes(
        self, open_queue: Callable[..., Any]
    ) -> None:
        queue = open_queue(segment_bytes=1000)
        for number in range(50):
            await queue.submit(1, b"%03d" % number * 50)
        segments, end = queue.statistics().segments, queue.end

        assert queue.trim(end, older_than=0.0, keep_bytes=10**9) == 0
        would = queue.trim(end, keep_bytes=3000, dry_run=True)
        assert queue.statistics().segments == segments
        assert queue.trim(end, keep_bytes=3000) == would > 0
        assert queue.statistics().bytes <= 4000
        assert queue.trim(end, older_than=2e9) > 0
        assert queue.statistics().segments == 1
        queue.close()


async def test_files_are_for_their_owner_alone(directory: Path) -> None:
    queue = FileQueue(directory)
    await queue.submit(1, b"x")
    queue.close()

    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


async def test_links_are_not_followed(directory: Path, tmp_path: Path) -> None:
    directory.mkdir()
    target = tmp_path / "elsewhere"
    target.write_bytes(b"")
    (directory / f"{0:020d}.seg").symlink_to(target)

    with pytest.raises(QueueError, match="no regular file"):
        FileQueue(directory)

    (tmp_path / "link").symlink_to(directory)
    with pytest.raises(QueueError, match="is a link"):
        FileQueue(tmp_path / "link")


async def test_files_of_others_are_left_alone(directory: Path) -> None:
    directory.mkdir()
    names = {"5.seg", "notes.txt", "٣" * 20 + ".seg", f"{7:020d}.seg~"}
    for name in names:
        (directory / name).write_text("mine")

    queue = FileQueue(directory)
    await queue.submit(1, b"x")
    queue.close()

    assert payloads(FileQueue(directory)) == [b"x"]
    assert all((directory / name).read_text() == "mine" for name in names)


class TestDamage:
    @pytest.mark.parametrize("cut", [1, 5, HEADER.size - 1, HEADER.size, HEADER.size + 3])
    async def test_a_torn_tail_is_cut_off_and_appending_goes_on(
        self, directory: Path, cut: int
    ) -> None:
        queue = FileQueue(directory)
        for number in range(3):
            await queue.submit(1, b"message-%d" % number)
        end = queue.end
        queue.close()
        (segment,) = directory.glob("*.seg")
        frame = HEADER.size + len(b"message-2")
        os.truncate(segment, end - frame + cut)

        queue = FileQueue(directory)
        await queue.submit(1, b"after")

        assert payloads(queue) == [b"message-0", b"message-1", b"after"]
        assert queue.statistics().torn_bytes == cut
        queue.close()

    async def test_every_single_bit_flip_costs_one_message_and_is_reported(
        self, directory: Path
    ) -> None:
        queue = FileQueue(directory)
        spans = [await queue.submit(1, b"message-%d" % number) for number in range(4)]
        queue.close()
        (segment,) = directory.glob("*.seg")
        whole = segment.read_bytes()

        start, end = spans[1]
        for place in range(start, end):
            for bit in range(8):
                damaged = bytearray(whole)
                damaged[place] ^= 1 << bit
                if place == start + 3:
                    continue  # the one spare byte of the header says nothing
                segment.write_bytes(damaged)
                queue = FileQueue(directory)
                assert payloads(queue) == [b"message-0", b"message-2", b"message-3"], (place, bit)
                assert queue.statistics().corrupt_frames == 1
                assert queue.end == len(whole)
                queue.close()

    async def test_damage_in_an_older_segment_does_not_hide_the_later_ones(
        self, directory: Path
    ) -> None:
        queue = FileQueue(directory, segment_bytes=200)
        for number in range(20):
            await queue.submit(1, b"message-%02d" % number)
        queue.close()
        oldest = min(directory.glob("*.seg"))
        data = bytearray(oldest.read_bytes())
        data[HEADER.size] ^= 1
        oldest.write_bytes(data)

        queue = FileQueue(directory, segment_bytes=200)

        assert payloads(queue) == [b"message-%02d" % number for number in range(1, 20)]
        queue.close()


async def test_damage_at_the_end_of_an_older_segment_is_reported(directory: Path) -> None:
    queue = FileQueue(directory, segment_bytes=200)
    for number in range(20):
        await queue.submit(1, b"message-%02d" % number)
    queue.close()
    oldest = min(directory.glob("*.seg"))
    oldest.write_bytes(oldest.read_bytes()[:-1] + b"?")

    queue = FileQueue(directory, segment_bytes=200)

    assert len(payloads(queue)) == 19
    assert queue.statistics().corrupt_frames == 1
    assert payloads(queue, queue.end) == []
    queue.close()


class Disk:
    """A sync that can be told to fail, and remembers which descriptors it was asked for."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self.asked: list[int] = []
        self.failed: set[int] = set()
        self.held: list[int] = []

    def __call__(self, fd: int) -> None:
        inode = os.fstat(fd).st_ino
        assert inode not in self.failed, "synced again after a failure"
        self.asked.append(inode)
        if self.error is not None:
            self.failed.add(inode)
            self.held.append(os.dup(fd))  # so that no new file gets the same number
            raise self.error
        os.fdatasync(fd)


class TestTheDiskRefuses:
    async def test_after_a_failed_sync_the_descriptor_is_given_up_and_nothing_is_acknowledged(
        self, directory: Path
    ) -> None:
        disk = Disk()
        queue = FileQueue(directory, sync=disk)
        await queue.submit(1, b"before")
        end = queue.end

        disk.error = OSError(errno.EIO, "broken")
        with pytest.raises(QueueRefused) as refused:
            await queue.submit(1, b"lost")
        assert not refused.value.full
        assert queue.end == end

        disk.error = None
        await queue.submit(1, b"after")
        assert payloads(queue) == [b"before", b"after"]
        queue.close()
        queue = FileQueue(directory)
        assert payloads(queue) == [b"before", b"after"]
        queue.close()

    async def test_who_waits_behind_a_refused_message_is_refused_too(self, directory: Path) -> None:
        disk = Disk()
        queue = FileQueue(directory, sync=disk)
        await queue.submit(1, b"before")
        disk.error = OSError(errno.ENOSPC, "full")

        promises = [queue.submit(1, b"a"), queue.submit(1, b"b")]
        results = await asyncio.gather(*promises, return_exceptions=True)

        assert all(isinstance(result, QueueRefused) and result.full for result in results)
        queue.close()

    async def test_a_refusal_of_the_very_first_message_leaves_a_queue_that_works(
        self, directory: Path
    ) -> None:
        disk = Disk()
        disk.error = OSError(errno.EIO, "broken")
        queue = FileQueue(directory, sync=disk)
        for _ in range(3):
            with pytest.raises(QueueRefused):
                await queue.submit(1, b"lost")
        disk.error = None
        await queue.submit(1, b"kept")

        assert payloads(queue) == [b"kept"]
        queue.close()

    async def test_a_short_write_leaves_no_half_frame(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        queue = FileQueue(directory)
        await queue.submit(1, b"before")
        real, room = os.write, [10]

        def nearly_full(fd: int, data: bytes) -> int:
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken, room[0] = min(room[0], len(data)), 0
            return real(fd, bytes(data)[:taken])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", nearly_full)
            with pytest.raises(QueueRefused):
                await queue.submit(1, b"too much for the disk")
        await queue.submit(1, b"after")

        assert payloads(queue) == [b"before", b"after"]
        found = [m for m in queue.read(0) if isinstance(m, Message)]
        assert found[1].start == found[0].end
        queue.close()


async def test_a_message_beyond_the_frame_is_refused_by_name(directory: Path) -> None:
    queue = FileQueue(directory)
    with pytest.raises(QueueError, match="more than a frame holds"):
        queue.submit(1, bytes(MAX_FRAME_BYTES + 1))
    queue.close()
