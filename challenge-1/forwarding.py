"""A topic of the message queue, delivered over HTTP: one POST per message, at least once, in order
of commit, with an Idempotency-Key that stays the same whatever happens in between.

    topic -> at most 100 undecided -> Guard (rate, breaker, retries) -> POST -> 2xx
                                                                    \\-> dead letter (a file)
    the consumer's offset moves over what is decided without a gap

A process killed at any moment leaves an offset at or before what was accepted: it sends some
messages again, under the same keys. While the other side is down nothing is given up: probes that
find it away cost no message an attempt.
"""

import asyncio
import hashlib
import json
import os
import sqlite3
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

import httpx2
import structlog

from limiter import Clock, Slot, limiter_of
from records import ProcessedRecord
from resilience import (
    Breaker,
    CallError,
    Failed,
    Guard,
    Limited,
    Refused,
)
from sources import no_cookies, retry_after_seconds
from storage import StoreRefused

log = structlog.stdlib.get_logger("delivery")

ATTEMPTS: Final = 7
BREAKER_FAILURES: Final = 3
RECOVERY_SECONDS: Final = 0.5  # until the first probe; it doubles up to 30 s
GUARD_SECONDS: Final = 0.02
OUTAGE: Final = frozenset({"connect", "transport", "timeout", "http_502", "http_503", "http_504"})
MAX_UNDECIDED: Final = 100
POLL_SECONDS: Final = 0.2  # between looks at a topic that has nothing new
COMMIT_SECONDS: Final = 0.5  # between commits of the offset while there is work
ANSWER_BYTES: Final = 64 * 1024  # of an answer that are read; the rest is not our business
STOP_SECONDS: Final = 1.5  # for calls that are under way when told to stop


class Item(Protocol):
    """A message of a topic."""

    @property
    def offset(self) -> int:
        """Where it stands."""
        ...

    @property
    def value(self) -> bytes:
        """JSON."""
        ...

    @property
    def next(self) -> int:
        """Where the one after it stands."""
        ...


class Topic(Protocol):
    """One topic, read as one consumer; blocking."""

    def read(self, offset: int, limit: int) -> Sequence[Item]:
        """The messages from an offset on."""
        ...

    def position(self) -> int:
        """The offset the consumer has committed."""
        ...

    def commit(self, offset: int) -> None:
        """Move it, durably."""
        ...


class HttpDownstream:
    """Sends JSON bodies to one URL, bounded in bytes and time; redirects are refused."""

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        seconds: float = 10.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = url
        self._http = httpx2.AsyncClient(
            timeout=seconds,
            follow_redirects=False,
            trust_env=False,
            headers=dict(headers or {}),
            cookies=no_cookies(),
            limits=httpx2.Limits(max_connections=MAX_UNDECIDED, keepalive_expiry=2),
            transport=transport,
        )

    async def __aenter__(self) -> "HttpDownstream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def send_data(self, record: ProcessedRecord) -> None:
        """Deliver a record under its id."""
        await self.post(record.record_id, record.model_dump_json().encode())

    async def post(self, key: str, body: bytes, slot: Slot | None = None) -> None:
        """Deliver a body under an Idempotency-Key; raise Failed, Refused or Limited."""

        async def trace(event: str, info: object) -> None:
            del info
            if slot is not None and event == "http11.send_request_body.complete":
                slot.sent()

        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        try:
            async with self._http.stream(
                "POST", self._url, content=body, headers=headers, extensions={"trace": trace}
            ) as response:
                if slot is not None:
                    slot.answered()
                status = response.status_code
                wait = retry_after_seconds(response.headers.get("retry-after"))
                await _skim(response)
        except httpx2.ConnectError as error:
            raise Failed("connect", "The connection was refused.") from error
        except httpx2.TimeoutException:
            raise Failed("timeout", "There was no answer in time.") from None
        except httpx2.HTTPError as error:
            raise Failed("transport", f"The connection failed: {type(error).__name__}.") from error
        if status == 429:
            raise Limited(wait)
        if status >= 500 or status in (408, 425):
            raise Failed(f"http_{status}", f"It answered {status}.")
        if not 200 <= status < 300:
            raise Refused(f"http_{status}", f"It answered {status}.")


async def _skim(response: httpx2.Response) -> None:
    """Read a short answer to its end, so that the connection can be used again."""
    size = 0
    async for piece in response.aiter_raw():
        size += len(piece)
        if size > ANSWER_BYTES:
            return


class DeadLetterFile:
    """Messages that were given up: one JSON line each, on the disk before the offset moves."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, offset: int, key: str, value: bytes, error: CallError) -> None:
        """Keep one."""
        line = {
            "offset": offset,
            "key": key,
            "kind": error.kind,
            "message": str(error),
            "given_up_at": datetime.now(UTC).isoformat(),
            "value": value.decode("utf-8", "replace"),
        }
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(self.path, flags, 0o600), "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


class TopicForwarder:
    """Delivers a topic until `stop` is called (or, `until_empty`, until nothing is left)."""

    def __init__(
        self,
        topic: Topic,
        downstream: HttpDownstream,
        dead_letters: DeadLetterFile,
        *,
        prefix: str,
        rate_limit: float | None = None,
        attempts: int = ATTEMPTS,
        call_seconds: float = 10.0,
        clock: Clock = time.monotonic,
    ) -> None:
        """`prefix` makes the keys of this topic different from those of all others."""
        breaker = Breaker(
            BREAKER_FAILURES, RECOVERY_SECONDS, clock=clock,
            on_change=lambda state: log.info("breaker", state=str(state)),
        )  # fmt: skip
        self.guard = Guard(
            limiter_of(rate_limit, guard_seconds=GUARD_SECONDS, clock=clock),
            breaker,
            attempts=attempts,
            call_seconds=call_seconds,
            patient_with=OUTAGE,
            log=log,
        )
        self.delivered = self.dead = 0
        self.position = self._decided = 0
        self._topic = topic
        self._downstream = downstream
        self._dead_letters = dead_letters
        self._prefix = prefix
        self._clock = clock
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._calling: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(MAX_UNDECIDED)
        # In order: where the next message stands, and whether this one is decided.
        self._undecided: deque[tuple[int, asyncio.Task[None]]] = deque()

    @property
    def waiting(self) -> int:
        """Messages that were read and are not decided."""
        return sum(not task.done() for _, task in self._undecided)

    def stop(self) -> None:
        """Send nothing more; calls under way get a moment to end."""
        self._stopping.set()

    async def run(self, *, until_empty: bool = False) -> None:
        """Deliver. What is decided when this returns is committed."""
        offset = await asyncio.to_thread(self._topic.position)
        self.position = self._decided = offset
        committing = asyncio.create_task(self._commit_now_and_then())
        try:
            while not self._stopping.is_set():
                items = await self._read(offset)
                for item in items:
                    if not await self._found_room():
                        return
                    task = asyncio.create_task(self._deliver(item))
                    self._undecided.append((item.next, task))
                    offset = item.next
                if not items:
                    if until_empty and not self.waiting:
                        return
                    await self._rest(POLL_SECONDS)
                for _, task in self._undecided:  # a fault of ours (a full disk) ends it
                    if task.done():
                        task.result()
        finally:
            await self._settle()
            self._ended.set()
            await committing

    async def _read(self, offset: int) -> Sequence[Item]:
        try:
            return await asyncio.to_thread(self._topic.read, offset, MAX_UNDECIDED)
        except StoreRefused as error:  # a database that is busy now
            log.warning("topic_not_read", reason=str(error))
            return ()

    async def _found_room(self) -> bool:
        """Wait for room; False when told to stop meanwhile."""
        room = asyncio.ensure_future(self._room.acquire())
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({room, stop}, return_when=asyncio.FIRST_COMPLETED)
            return not self._stopping.is_set()
        finally:
            room.cancel()
            stop.cancel()

    async def _rest(self, seconds: float) -> None:
        stop = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({stop}, timeout=seconds)
        stop.cancel()

    async def _deliver(self, item: Item) -> None:
        key = f"{self._prefix}-{item.offset}"

        async def send(slot: Slot) -> None:
            task = asyncio.current_task()
            assert task is not None  # noqa: S101  (this is a coroutine)
            self._calling.add(task)
            try:
                await self._downstream.post(key, item.value, slot)
            finally:
                self._calling.discard(task)

        try:
            await self.guard.call(send)
        except CallError as error:
            await asyncio.to_thread(self._dead_letters.add, item.offset, key, item.value, error)
            log.warning("message_given_up", offset=item.offset, kind=error.kind, reason=str(error))
            self.dead += 1
        else:
            self.delivered += 1
        self._room.release()

    async def _commit_now_and_then(self) -> None:
        while not self._ended.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(COMMIT_SECONDS):
                    await self._ended.wait()
            await self._commit()

    async def _commit(self) -> None:
        """Move the offset over what is decided without a gap."""
        while self._undecided and _is_decided(self._undecided[0][1]):
            self._decided = self._undecided.popleft()[0]
        decided = self._decided
        if decided != self.position:
            try:
                await asyncio.to_thread(self._topic.commit, decided)
            except StoreRefused as error:  # a moment later it may not be
                log.warning("offset_not_committed", offset=decided, reason=str(error))
            else:
                self.position = decided

    async def _settle(self) -> None:
        """Give calls under way a moment; what waits for its turn is left to the next start."""
        tasks = [task for _, task in self._undecided if not task.done()]
        for task in tasks:
            if task not in self._calling:
                task.cancel()
        if self._calling:
            await asyncio.wait(set(self._calling), timeout=STOP_SECONDS)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _is_decided(task: "asyncio.Task[None]") -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def identity_of(db_path: Path) -> str:
    """Which data this is: two databases never share it, one keeps it as long as it lives."""
    with closing(sqlite3.connect(f"{db_path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        (secret,) = database.execute("SELECT value FROM meta WHERE name = 'secret'").fetchone()
    return hashlib.blake2b(secret, digest_size=8, person=b"delivery").hexdigest()
