"""Durable message queues behind one interface: an SQLite file embedded, or RabbitMQ.

Both deliver at least once: what was published is on the disk, or confirmed by the broker; what was
received and not acknowledged is delivered again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping
from typing import Any

from addresses import Address
from connections import Connection, Connector, driver, ended_within
from failures import ConnectionBroken, OperationTimeout, ResourceClosed
from sqlite_threads import SqliteThread

NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
POLL_SECONDS = 0.1  # between looks for what another process has published
LEASE_SECONDS = 30.0  # after which an unacknowledged message of a vanished consumer is free again
FAREWELL_SECONDS = 0.5  # for a broker to confirm that a connection is closed


class Message(bytes):
    """A message is its body, and can be acknowledged once."""

    queue: str
    redelivered: bool
    _settle: Callable[[bool], Awaitable[None]] | None

    @property
    def body(self) -> bytes:
        """The body as plain bytes."""
        return bytes(self)

    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self)

    @property
    def settled(self) -> bool:
        """Whether it was acknowledged or given back."""
        return self._settle is None

    async def ack(self) -> None:
        """It is done with: it will not come again."""
        settle, self._settle = self._settle, None
        if settle is not None:
            await settle(True)

    async def nack(self) -> None:
        """It is not done with: give it back to the queue."""
        settle, self._settle = self._settle, None
        if settle is not None:
            await settle(False)


class Consumer:
    """The messages of one queue: `async for`, or `await` for a single one.

    In a loop each message is acknowledged when the next one is asked for; after a failure or a
    `break` the last one is not, and comes again. A message that was awaited is acknowledged with
    `await message.ack()`. With a `timeout` a loop ends, and an await fails, when nothing comes.
    """

    def __init__(self, source: MessageQueue, queue: str, timeout: float | None) -> None:
        self._source = source
        self._queue = queue
        self._timeout = timeout
        self._feed: Any = None
        self._last: Message | None = None
        self._closed = False

    def __aiter__(self) -> Consumer:
        return self

    async def __anext__(self) -> Message:
        if self._last is not None:
            last, self._last = self._last, None
            await last.ack()
        if self._closed:
            raise StopAsyncIteration
        try:
            self._last = await self._next()
        except OperationTimeout:
            raise StopAsyncIteration from None
        return self._last

    def __await__(self) -> Generator[Any, None, Message]:
        return self._next().__await__()

    async def _next(self) -> Message:
        if self._feed is None:
            self._feed = await self._source.open_feed(self._queue)
        try:
            async with asyncio.timeout(self._timeout):
                message: Message = await self._feed.next()
        except TimeoutError as error:
            if isinstance(error, OperationTimeout):
                raise
            raise OperationTimeout(
                f"No message came to {self._queue!r} within {self._timeout:g} s."
            ) from None
        return message

    async def __aenter__(self) -> Consumer:
        return self

    async def __aexit__(self, *details: Any) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End it; a message of the loop that is not acknowledged goes back."""
        self._closed = True
        last, self._last = self._last, None
        if last is not None:
            await last.nack()
        if self._feed is not None:
            await self._feed.close()


class MessageQueue(Connection):
    """`await publish(queue, body)`, `async for message in consume(queue)`."""

    async def publish(self, queue: str, body: bytes | str | Any) -> None:
        """Return once the message is durable. Text is sent as UTF-8, other objects as JSON."""
        raise NotImplementedError

    def consume(self, queue: str, timeout: float | None = None) -> Consumer:
        """The messages of a queue, as they come."""
        return Consumer(self, _name(queue), timeout)

    async def depth(self, queue: str) -> int:
        """How many wait."""
        raise NotImplementedError

    async def purge(self, queue: str) -> None:
        """Remove the queue with all that is in it."""
        raise NotImplementedError

    async def open_feed(self, queue: str) -> Any:
        """What a consumer takes messages from: `next()` and `close()`."""
        raise NotImplementedError


def _name(queue: str) -> str:
    if not isinstance(queue, str) or not NAME.fullmatch(queue):
        raise ValueError("A queue name is 1 to 128 of A-Z a-z 0-9 _ . : -")
    return queue


def _encoded(body: Any) -> bytes:
    if isinstance(body, (bytes, bytearray, memoryview)):
        return bytes(body)
    if isinstance(body, str):
        return body.encode()
    return json.dumps(body, allow_nan=False).encode()


def _message(
    body: bytes, queue: str, *, redelivered: bool, settle: Callable[[bool], Awaitable[None]]
) -> Message:
    message = Message(body)
    message.queue, message.redelivered, message._settle = queue, redelivered, settle
    return message


# --- SQLite -----------------------------------------------------------------------------------

SCHEMA = (
    """CREATE TABLE IF NOT EXISTS messages (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        queue TEXT NOT NULL,
        body BLOB NOT NULL,
        deliveries INTEGER NOT NULL DEFAULT 0,
        leased_by TEXT,
        leased_until REAL NOT NULL DEFAULT 0
    )""",
    "CREATE INDEX IF NOT EXISTS messages_by_queue ON messages (queue, id)",
)
TAKE = """
UPDATE messages SET leased_by = ?, leased_until = ?, deliveries = deliveries + 1
WHERE id = (SELECT id FROM messages WHERE queue = ? AND leased_until < ? ORDER BY id LIMIT 1)
RETURNING id, body, deliveries"""


class SqliteQueue(MessageQueue):
    """A table in a file. A message is leased to its consumer, and free again after the lease."""

    def __init__(
        self,
        address: Address,
        operation_timeout: float,
        lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(address, operation_timeout)
        self._thread = SqliteThread(address.path, synchronous="FULL")
        self._lease = lease_seconds
        self._clock = clock
        self._me = uuid.uuid4().hex
        self._news: dict[str, asyncio.Event] = {}
        self._ended = asyncio.Event()

    async def open(self) -> None:
        """Open the file."""
        await self._thread.open(lambda connection: [connection.execute(s) for s in SCHEMA])

    async def _do(self, what: str, work: Callable[[sqlite3.Connection], Any]) -> Any:
        async with self.operation(what):
            return await self._thread.run(work)

    async def publish(self, queue: str, body: bytes | str | Any) -> None:
        """Return once the message is on the disk."""
        queue, data = _name(queue), _encoded(body)
        await self._do(
            "a publication",
            lambda connection: connection.execute(
                "INSERT INTO messages (queue, body) VALUES (?, ?)", (queue, data)
            ),
        )
        if queue in self._news:
            self._news[queue].set()

    async def depth(self, queue: str) -> int:
        """How many wait, those that are being worked on not included."""

        def count(connection: sqlite3.Connection) -> int:
            asked = (_name(queue), self._clock())
            (found,) = connection.execute(
                "SELECT count(*) FROM messages WHERE queue = ? AND leased_until < ?", asked
            ).fetchone()
            return int(found)

        found: int = await self._do("a count", count)
        return found

    async def purge(self, queue: str) -> None:
        """Remove all messages of the queue."""
        statement = "DELETE FROM messages WHERE queue = ?"
        await self._do("a purge", lambda connection: connection.execute(statement, (_name(queue),)))

    async def check(self) -> None:
        """Look at the table."""
        await self.depth("check")

    async def open_feed(self, queue: str) -> SqliteFeed:
        """Messages as they come, or are found."""
        return SqliteFeed(self, queue)

    async def take(self, queue: str) -> Message | None:
        """Lease the oldest free message."""

        def work(connection: sqlite3.Connection) -> Any:
            now = self._clock()
            asked = (self._me, now + self._lease, queue, now)
            return connection.execute(TAKE, asked).fetchone()

        row = await self._do("a delivery", work)
        if row is None:
            return None
        number, body, deliveries = row

        async def settle(done: bool) -> None:
            mine = (number, self._me)
            if done:
                statement = "DELETE FROM messages WHERE id = ? AND leased_by = ?"
            else:
                statement = (
                    "UPDATE messages SET leased_by = NULL, leased_until = 0 "
                    "WHERE id = ? AND leased_by = ?"
                )
            await self._do("a settlement", lambda connection: connection.execute(statement, mine))
            if not done and queue in self._news:
                self._news[queue].set()

        return _message(body, queue, redelivered=deliveries > 1, settle=settle)

    async def news(self, queue: str) -> None:
        """Wait for a publication here, or for the next look."""
        event = self._news.setdefault(queue, asyncio.Event())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_SECONDS):
                await event.wait()
        event.clear()

    async def close(self) -> None:
        """Give back what is not acknowledged, and close."""
        self.closed = True
        statement = "UPDATE messages SET leased_by = NULL, leased_until = 0 WHERE leased_by = ?"
        try:
            with contextlib.suppress(sqlite3.Error, ResourceClosed):
                await self._thread.run(
                    lambda connection: connection.execute(statement, (self._me,))
                )
        finally:
            await self._thread.close()


class SqliteFeed:
    """Takes from the table until something is there."""

    def __init__(self, source: SqliteQueue, queue: str) -> None:
        self._source = source
        self._queue = queue

    async def next(self) -> Message:
        """The next message."""
        while True:
            message = await self._source.take(self._queue)
            if message is not None:
                return message
            await self._source.news(self._queue)

    async def close(self) -> None:
        """Nothing is held."""


# --- RabbitMQ ---------------------------------------------------------------------------------


class RabbitQueue(MessageQueue):
    """A broker: durable queues, persistent messages, publisher confirms.

    A connection that broke is made again by the next operation.
    """

    def __init__(self, address: Address, operation_timeout: float) -> None:
        super().__init__(address, operation_timeout)
        self._pika = driver("aio_pika", "aio-pika")
        self._aiormq = driver("aiormq.exceptions", "aio-pika")
        self._connection: Any = None
        self._channel: Any = None
        self._declared: set[str] = set()
        self._turn = asyncio.Lock()
        self._feeds: set[RabbitFeed] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self.unconfirmed = 0

    async def open(self) -> None:
        """Connect; the manager has the deadline."""
        self._connection = await self._pika.connect(self.address.url)
        self._channel = await self._connection.channel(publisher_confirms=True)
        self._declared.clear()

    def is_connection_error(self, error: Exception) -> bool:
        """What aio-pika raises when the broker is gone."""
        kinds = (OSError, self._aiormq.AMQPConnectionError, self._aiormq.ChannelInvalidStateError)
        return isinstance(error, kinds)

    async def ready_channel(self) -> Any:
        """The channel for publishing, made again if it broke."""
        async with self._turn:
            if self._connection is None or self._connection.is_closed or self._channel.is_closed:
                self._discard()
                await self.open()
            return self._channel

    def _discard(self) -> None:
        """Give the connection up; closing it politely needs answers, which may not come."""
        connection, self._connection = self._connection, None
        if connection is not None:
            ending = asyncio.create_task(_close_quietly(connection))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)

    @contextlib.asynccontextmanager
    async def _operation(self, what: str) -> AsyncIterator[Any]:
        try:
            async with self.operation(what):
                yield await self.ready_channel()
        except (OperationTimeout, ConnectionBroken):
            self._discard()  # what does not answer is not asked again
            raise

    async def declared(self, channel: Any, queue: str) -> Any:
        """The durable queue of this name."""
        found = await channel.declare_queue(queue, durable=True)
        self._declared.add(queue)
        return found

    async def publish(self, queue: str, body: bytes | str | Any) -> None:
        """Return once the broker has confirmed the message."""
        queue, data = _name(queue), _encoded(body)
        message = self._pika.Message(data, delivery_mode=self._pika.DeliveryMode.PERSISTENT)
        async with self._operation("a publication") as channel:
            if queue not in self._declared:
                await self.declared(channel, queue)
            self.unconfirmed += 1
            try:
                await channel.default_exchange.publish(message, routing_key=queue, mandatory=True)
            finally:
                self.unconfirmed -= 1

    async def depth(self, queue: str) -> int:
        """How many wait, those that are being worked on not included."""
        async with self._operation("a count") as channel:
            found = await self.declared(channel, _name(queue))
            return int(found.declaration_result.message_count)

    async def purge(self, queue: str) -> None:
        """Remove the queue."""
        async with self._operation("a purge") as channel:
            self._declared.discard(queue)
            await channel.queue_delete(_name(queue))

    async def check(self) -> None:
        """Open a channel, and close it."""
        async with self._operation("a check"):
            channel = await self._connection.channel()
            await channel.close()

    async def open_feed(self, queue: str) -> RabbitFeed:
        """A consumer at the broker, which holds one message at a time."""
        async with self._operation("a subscription"):
            channel = await self._connection.channel()
            await channel.set_qos(prefetch_count=1)
            feed = RabbitFeed(self, channel, queue)
            await feed.open(await self.declared(channel, queue))
        self._feeds.add(feed)
        return feed

    def forget(self, feed: RabbitFeed) -> None:
        """A consumer has ended."""
        self._feeds.discard(feed)

    async def close(self) -> None:
        """Close the connection; the broker gives back what is not acknowledged."""
        self.closed = True
        for feed in self._feeds.copy():
            feed.end(ResourceClosed("The queue was closed."))
        self._discard()
        if self._endings:
            await asyncio.wait(self._endings)

    def stats(self) -> Mapping[str, float]:
        """Consumers, and what is not confirmed yet."""
        return {
            "in_use": float(self.in_use),
            "consumers": float(len(self._feeds)),
            "unconfirmed": float(self.unconfirmed),
        }


class RabbitFeed:
    """What one consumer of the broker receives."""

    def __init__(self, source: RabbitQueue, channel: Any, queue: str) -> None:
        self._source = source
        self._channel = channel
        self._queue = queue
        self._arrived: asyncio.Queue[Any] = asyncio.Queue()

    async def open(self, queue: Any) -> None:
        """Begin to receive."""
        self._channel.close_callbacks.add(self._on_close)
        await queue.consume(self._arrived.put)

    def _on_close(self, _channel: Any, error: BaseException | None) -> None:
        self.end(ConnectionBroken(f"{self._source.address.shown} broke off the delivery: {error}"))

    def end(self, error: Exception) -> None:
        """Let whoever waits know that nothing more comes."""
        self._arrived.put_nowait(error)

    async def next(self) -> Message:
        """The next message."""
        incoming = await self._arrived.get()
        if isinstance(incoming, Exception):
            self._arrived.put_nowait(incoming)
            raise incoming

        async def settle(done: bool) -> None:
            async with self._source.operation("a settlement"):
                await (incoming.ack() if done else incoming.nack(requeue=True))

        return _message(
            incoming.body, self._queue, redelivered=bool(incoming.redelivered), settle=settle
        )

    async def close(self) -> None:
        """End the consumer; the broker gives back what is not acknowledged."""
        self._source.forget(self)
        self._channel.close_callbacks.discard(self._on_close)
        with contextlib.suppress(Exception):
            await ended_within(self._channel.close(), 1.0)


async def _close_quietly(connection: Any) -> None:
    with contextlib.suppress(Exception):
        # How long aiormq waits for the broker's farewell before it closes the socket.
        connection.transport.connection.READER_CLOSE_TIMEOUT = FAREWELL_SECONDS
    with contextlib.suppress(Exception):
        await connection.close()


class QueueConnection(Connector):
    """A message queue: an SQLite file, or RabbitMQ where a URL or a host says so."""

    kind = "queue"
    address_kind = "queue"

    def __init__(
        self, url: str | None = None, *, lease_seconds: float = LEASE_SECONDS, **options: Any
    ) -> None:
        super().__init__(url, **options)
        self._lease = lease_seconds

    async def connect(self, address: Address) -> MessageQueue:
        """Open it."""
        queue: SqliteQueue | RabbitQueue
        if address.embedded:
            queue = SqliteQueue(address, self.operation_timeout, self._lease)
        else:
            queue = RabbitQueue(address, self.operation_timeout)
        try:
            await queue.open()
        except BaseException:
            await queue.close()
            raise
        return queue
