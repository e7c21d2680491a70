"""Dead letters that come to life: sent once more through their pipelines of today.

Which letters a batch brings to life stands in the log with it, so each does so at most once, also
across crashes: from the moment it is submitted a letter is known here, then it is gone from the
store in the transaction that counts it.
"""

import asyncio
from typing import TYPE_CHECKING, Final

from catalogue import PipelineConflict
from parsing import Block, BodyError
from projection import Projection
from storage import DeadLetter

if TYPE_CHECKING:
    from utils import Pipeline

REPLAYED_AT_ONCE: Final = 200  # dead letters that come to life in one message


class Revival:
    """Replays dead letters; `revived` are those that the store does not know about yet."""

    def __init__(self, pipeline: "Pipeline") -> None:
        self.revived: set[int] = set()
        self._pipeline = pipeline
        self._one_at_a_time = asyncio.Lock()

    async def replay(self, name: str | None, code: str | None) -> dict[str, int]:
        """Send the letters of a pipeline and a code, or all; tell what became of them.

        What is too late once more is a new letter, which is left for another time.
        """
        pipeline = self._pipeline
        done = {"replayed": 0, "duplicates": 0, "failed": 0, "skipped": 0}
        async with self._one_at_a_time:
            after, end = 0, pipeline.store.topic("dead-letters").next
            while after + 1 < end and (
                letters := await asyncio.to_thread(
                    pipeline.store.dead_letters, after, REPLAYED_AT_ONCE, name, code
                )
            ):
                after = letters[-1].id
                by_name: dict[str, list[DeadLetter]] = {}
                for letter in letters:
                    if letter.id in self.revived or letter.id >= end:
                        continue
                    if letter.record.whole and letter.pipeline in pipeline.projections:
                        by_name.setdefault(letter.pipeline, []).append(letter)
                    else:
                        done["skipped"] += 1
                for each, found in by_name.items():
                    await self._send(each, found, done)
        return done

    async def _send(self, name: str, letters: list[DeadLetter], done: dict[str, int]) -> None:
        pipeline = self._pipeline
        if (projection := pipeline.projections.get(name)) is None:  # deleted meanwhile
            done["skipped"] += len(letters)
            return
        revived: dict[int, str] = {}
        whole = Block()
        for letter in letters:
            if (block := self._read(projection, letter)) is None:
                done["failed"] += 1
                continue
            whole.events += block.events
            whole.lines += block.split()
            revived[letter.id] = letter.record.code
        if not revived:
            return
        try:
            receipt = await pipeline.accept(projection, [whole], replayed=revived)
        except PipelineConflict:
            done["skipped"] += len(revived)
            return
        done["replayed"] += len(revived) - receipt.duplicates
        done["duplicates"] += receipt.duplicates
        await pipeline.applied(receipt.position)

    def _read(self, projection: Projection, letter: DeadLetter) -> Block | None:
        reader = self._pipeline.reader(projection, "json")
        try:
            blocks = [*reader.feed(letter.record.raw), *reader.finish()]
        except BodyError:
            return None
        if len(blocks) != 1 or blocks[0].rejected or len(blocks[0].events) != 1:
            return None
        return blocks[0]
